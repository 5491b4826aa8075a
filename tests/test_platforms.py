"""Where it really runs: the variables of Slurm, of operators of Kubernetes, of Ascend's MindCluster; containers."""
import errno
import fcntl
import os
import pwd
import re
import secrets
import shlex
import signal
import subprocess
import sys
import time
import types

import pytest
import torch
import yaml
from conftest import (
    ROOT,
    environment,
    error_line,
    finish,
    free_port,
    left_of,
    run,
    train_flags,
    wait_for_iteration,
)

import cli
import data
import device
import evaluate
import train
import weights

MEETING = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
KUBERNETES = {**MEETING, "WORLD_SIZE": "4", "RANK": "1"}  # counts machines
MINDCLUSTER = {**MEETING, "WORLD_SIZE": "4", "RANK": "0", "LOCAL_RANK": "0,1,2,3", "LOCAL_WORLD_SIZE": "4"}
ONE_CARD = {**MEETING, "WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
MACHINES = ("--nnodes", "2", "--node_rank", "1", "--master_addr", "10.0.0.1")
CPUS = ("--device", "cpu", "--device_list", "0,1")
TORCHRUN = {**ONE_CARD, "WORLD_SIZE": "8", "RANK": "5", "LOCAL_RANK": "1", "TORCHELASTIC_RUN_ID": "x"}


@pytest.fixture
def parsed(monkeypatch, capsys):
    """parsed(variables, *flags) -> (train.py's flags in that environment, None), or (None, the error)"""
    def parse(variables, *flags):
        for name in [name for name in os.environ if name.startswith(("SLURM", "PET_"))] + [*TORCHRUN]:
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        try:
            return train.parse_args(["--data_path", "data", *flags]), None
        except SystemExit as ended:
            assert ended.code == 2
            return None, capsys.readouterr().err
    return parse


@pytest.mark.parametrize("variables, flags", (
    (KUBERNETES, CPUS), (KUBERNETES, ()), ({**KUBERNETES, "RANK": "0"}, CPUS), ({**KUBERNETES, "RANK": "0"}, ()),
    ({"RANK": "1"}, CPUS), (MINDCLUSTER, CPUS), ({**MINDCLUSTER, "RANK": "1"}, ("--device_list", "0,1,2,3")),
    ({"PET_NNODES": "2"}, CPUS), ({"PET_NNODES": "1:2"}, CPUS), ({"PET_NNODES": "2", **ONE_CARD}, ())))
def test_a_pod_that_would_train_alone_is_an_error_that_names_the_flags(variables, flags, parsed):
    _, error = parsed(variables, *flags)
    assert all(flag in error for flag in ("--device_list", "--nnodes", "--node_rank", "--master_addr"))
    assert error.count("\n") == 1
    args, _ = parsed(variables, *CPUS, *MACHINES)
    assert train.must_launch(args)


@pytest.mark.parametrize("variables, flags", (
    ({**MINDCLUSTER, "WORLD_SIZE": "2", "LOCAL_RANK": "0,1"}, CPUS), (MINDCLUSTER, ("--device_list", "0,1,2,3")),
    (ONE_CARD, CPUS), ({**ONE_CARD, "WORLD_SIZE": "2"}, (*CPUS, *MACHINES)), ({"PET_NNODES": "1"}, CPUS),
    ({"SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "8"}, CPUS),
    ({"SLURM_STEP_NUM_TASKS": "2"}, (*CPUS, *MACHINES))))
def test_a_list_of_devices_is_launched(variables, flags, parsed):
    args, error = parsed(variables, *flags)
    assert error is None and train.must_launch(args)


@pytest.mark.parametrize("variables", (TORCHRUN, {**TORCHRUN, "PET_NNODES": "2", "SLURM_STEP_NUM_TASKS": "2"},
                                       {**ONE_CARD, "WORLD_SIZE": "2", "SLURM_STEP_NUM_TASKS": "2"}))
def test_a_rank_launches_nothing_and_has_its_own_device(variables, parsed):
    """Of torchrun by its mark, of srun with a task a card by a complete set of whole numbers."""
    for flags in ((), CPUS):
        args, error = parsed(variables, *flags)
        assert error is None and not train.must_launch(args)
    assert "each process has its own device" in parsed(variables, "--device_id", "0")[1]


def test_tasks_of_srun_that_know_nothing_of_each_other_are_an_error_with_the_right_command(parsed):
    for flags in ((), CPUS):
        _, error = parsed({"SLURM_STEP_NUM_TASKS": "2"}, *flags)
        assert "srun --ntasks-per-node=1 python " in error and "--device_list 0,1,.." in error and "--nnodes" in error
    with pytest.raises(SystemExit):
        evaluate.parse_args(["file", "--data_path", "data"])
    assert parsed({"SLURM_STEP_NUM_TASKS": "2", "RANK": "0"})[1] is None


def test_a_port_that_cannot_be_is_one_line_at_once(drawn_voc, tmp_path):
    variables = {**ONE_CARD, "WORLD_SIZE": "2", "MASTER_PORT": "99999"}
    assert "rank 0 could not meet the other processes" in error_line(
        ROOT / "train.py", *train_flags(drawn_voc, tmp_path / "run"), env=variables)


def test_torchruns_mark_alone_makes_no_rank(parsed):
    args, _ = parsed({"TORCHELASTIC_RUN_ID": "left over"})
    assert device.started(args) == "alone"


def test_a_pod_of_one_card_trains_evaluates_and_takes_a_device(drawn_voc, tmp_path):
    flags = ("--device_id", 0, "--max_iters", 1)
    run(ROOT / "train.py", *train_flags(drawn_voc, tmp_path / "run"), *flags, env=ONE_CARD)
    run(ROOT / "evaluate.py", tmp_path / "run/ckpt/best.pth", "--data_path", drawn_voc, "--device", "cpu",
        "--device_id", 0, env=ONE_CARD)


@pytest.mark.parametrize("files, cores", (
    ({}, 16), ({"cpu.max": "max 100000\n"}, 16), ({"cpu.max": "350000 100000\n"}, 3), ({"cpu.max": "50000 100000"}, 1),
    ({"cpu/cpu.cfs_quota_us": "200000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 2),
    ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 16)))
def test_the_smaller_of_affinity_and_a_containers_cpu_quota_counts(files, cores, tmp_path, monkeypatch):
    """Of control groups version 2 and 1."""
    (tmp_path / "cpu").mkdir()
    for path, text in files.items():
        (tmp_path / path).write_text(text)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))
    assert cli.usable_cores(tmp_path) == cores


def test_a_process_takes_no_more_threads_than_its_share_of_the_cores(monkeypatch):
    """Unless OMP_NUM_THREADS says how many; never more than before."""
    before = torch.get_num_threads()
    monkeypatch.setattr(cli, "usable_cores", lambda: 4)
    try:
        torch.set_num_threads(8)
        device.choose_device("cpu")
        assert torch.get_num_threads() == 8  # the tests set OMP_NUM_THREADS
        monkeypatch.delenv("OMP_NUM_THREADS")
        seen = []
        for act in (lambda: device.choose_device("cpu"), lambda: device.limit_threads(2),
                    lambda: device.limit_threads(9), lambda: device.choose_device("cpu")):
            act()
            seen.append(torch.get_num_threads())
        assert seen == [4, 2, 1, 1]
    finally:
        torch.set_num_threads(before)


# ---- real processes

@pytest.fixture
def page():
    """The scripts of docs/several-cards.md: page("sbatch") is the one that begins with a text or holds it."""
    fences = re.findall(r"```(?:sh|yaml)\n(.*?)```", (ROOT / "docs/several-cards.md").read_text(), re.DOTALL)
    return lambda words: next(fence for fence in fences if words in fence)


@pytest.fixture
def cluster(tmp_path):
    """A folder of stand-ins for the PATH: srun starts a task for each machine, scontrol writes what it is told."""
    (tmp_path / "bin").mkdir()
    stand_ins = {"srun": SRUN, "scontrol": f'[[ $1 != show ]] || echo 127.0.0.1\necho "$@" >> {tmp_path}/scontrol'}
    for name, script in stand_ins.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{script}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    return tmp_path / "bin"


SRUN = """
shift  # --cpus-per-task
export SLURM_STEP_NUM_TASKS=$SLURM_NNODES
tasks=()
for ((SLURM_NODEID = 0; SLURM_NODEID < SLURM_NNODES; SLURM_NODEID++)); do
    export SLURM_NODEID SLURM_PROCID=$SLURM_NODEID
    "$@" &
    tasks+=($!)
    echo "task $SLURM_NODEID is $!"
done
for task in "${tasks[@]}"; do
    wait "$task"
    ended=$?
    status=$((ended > status ? ended : status))
done
exit $status
"""


def on_the_cpu(script, data, work_dir):
    """A script of the page with a small network, one process a machine, and that data and work folder."""
    flags = shlex.join(map(str, (*train_flags(data, work_dir), "--max_iters", 100_000, "--eval_interval", 100_000,
                                 "--workers", 0, "--device_list", 0)))
    return re.sub(r"--data_path=\S+", flags, re.sub(r"--work_dir=\S+", "", script))


def shell(script, cwd, variables):
    """Starts bash with a script, in a session of its own. -> subprocess.Popen"""
    own = {name: value for name, value in environment().items() if not name.startswith(("SLURM", "PET_"))}
    mark = secrets.token_hex(8)  # for `left_of`
    env = {**own, "PYTHON": sys.executable, "MARK_OF_TEST": mark, **variables}
    process = subprocess.Popen(["bash", "-c", script], cwd=cwd, env=env, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True, start_new_session=True)
    process.mark = f"MARK_OF_TEST={mark}"
    return process


def test_the_slurm_job_of_the_page_is_put_back_when_one_of_two_machines_is_drained(page, cluster, drawn_voc, tmp_path):
    """SIGTERM to the second task alone, which `exec` hands to the launcher: both machines end soon, all is saved."""
    script, work_dir = page("#SBATCH"), tmp_path / "run"
    assert all(f"\n#SBATCH {words}\n" in script for words in ("--signal=TERM@300", "--requeue", "--ntasks-per-node=1"))
    job = shell(on_the_cpu(script, drawn_voc, work_dir), ROOT, {
        "PATH": f"{cluster}:{os.environ['PATH']}", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_JOB_ID": str(next(port for port in iter(free_port, None) if port > 20_000) - 20_000),
        "SLURM_CPUS_PER_TASK": "1"})
    tasks = [int(job.stdout.readline().split()[-1]) for _ in range(2)]
    wait_for_iteration(job, work_dir, 2)
    os.kill(tasks[1], signal.SIGTERM)
    since = time.monotonic()
    output = finish(job, 128 + signal.SIGTERM)
    assert time.monotonic() - since < 15
    assert "stopped by SIGTERM at iteration" in output and ", which is saved" in output
    assert not left_of(job)
    assert "requeue" in (tmp_path / "scontrol").read_text()


def test_mindclusters_pod_whose_name_does_not_resolve_trains(page, drawn_voc, tmp_path):
    """On one machine, beside variables of torchrun that an operator sets; SIGUSR1 to its launcher is a stop."""
    variables = {**MINDCLUSTER, "WORLD_SIZE": "2", "LOCAL_RANK": "0,1", "LOCAL_WORLD_SIZE": "2", "PET_NNODES": "1",
                 "PET_NPROC_PER_NODE": "3", "PET_NODE_RANK": "1", "PET_MAX_RESTARTS": "9", "PET_RDZV_BACKEND": "c10d",
                 "PET_RDZV_ENDPOINT": "nowhere:1", "PET_RDZV_ID": "job"}
    script = on_the_cpu(page("LOCAL_WORLD_SIZE"), drawn_voc, tmp_path / "run")
    script = script.partition(" \\\n    --nnodes")[0] + " --device_list=$LOCAL_RANK"  # for a single machine
    script = shlex.join(["bash", "-c", script])
    if subprocess.run(["unshare", "-u", "true"], capture_output=True).returncode == 0:
        script = "exec unshare -u bash -c " + shlex.quote(f"hostname pod-abc-0 && exec {script}")
    pod = shell(script, ROOT, variables)
    wait_for_iteration(pod, tmp_path / "run", 2)
    pod.send_signal(signal.SIGUSR1)
    output = finish(pod, 128 + signal.SIGUSR1)
    assert "device: 2 x cpu" in output and "stopped by SIGUSR1 at iteration" in output and ", which is saved" in output


@pytest.mark.parametrize("words, variables, flags", (
    ("LOCAL_WORLD_SIZE", {**MINDCLUSTER, "WORLD_SIZE": "8", "RANK": "1"},
     {"nnodes": 2, "node_rank": 1, "master_addr": "10.0.0.1", "master_port": 29500}),
    ("LOCAL_WORLD_SIZE", MINDCLUSTER, {"nnodes": 1, "node_rank": 0}),
    ("kind: Job", {"JOB_COMPLETION_INDEX": "1"}, {"nnodes": 2, "node_rank": 1, "master_addr": "fcn8s-0.fcn8s"})))
def test_the_commands_of_the_page_for_pods_launch_what_they_say(words, variables, flags, page, parsed, tmp_path):
    """A stand-in for Python shows the flags that train.py gets."""
    script = page(words)
    if "kind: Job" in script:
        service, job = yaml.safe_load_all(script)
        pod = job["spec"]["template"]["spec"]
        container = pod["containers"][0]
        assert pod["terminationGracePeriodSeconds"] > cli.SAVING_TIME
        assert pod["subdomain"] == service["metadata"]["name"] == job["metadata"]["name"]
        assert {"name": "shm", "emptyDir": {"medium": "Memory"}} in pod["volumes"]
        mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
        assert {"/dev/shm", "/tmp"} <= mounts
        writable = [variable["value"] for variable in container["env"]]
        assert len(writable) == 3 and all(any(path.startswith(mount) for mount in mounts) for path in writable)
        assert container["command"] == ["bash", "-c"] and job["spec"]["completions"] == flags["nnodes"]
        (script,) = container["args"]
    assert script.startswith("exec ")
    (tmp_path / "python").write_text('#!/bin/sh\ncase "$*" in -c*) ;; *) printf "%s\\n" "$@" ;; esac\n')
    (tmp_path / "python").chmod(0o755)
    shown = finish(shell(script, ROOT, {**variables, "PYTHON": str(tmp_path / "python")}), 0).splitlines()
    args, error = parsed(variables, *[flag for flag in shown[1:] if not flag.startswith("--data_path")])
    assert error is None and train.must_launch(args) and args.resume == "auto"
    assert {name: getattr(args, name) for name in flags} == flags


def test_tasks_of_srun_with_torchruns_variables_are_ranks_that_share_the_cores(drawn_voc, tmp_path):
    """One task a card. srun does not say LOCAL_WORLD_SIZE, nor OMP_NUM_THREADS."""
    command = shlex.join(map(str, (sys.executable, ROOT / "train.py", *train_flags(drawn_voc, tmp_path / "run"),
                                   "--max_iters", 1)))
    tasks = "".join(f"RANK={rank} LOCAL_RANK={rank} {command} & pids+=($!); " for rank in (0, 1))
    job = shell(f"unset OMP_NUM_THREADS; {tasks} wait ${{pids[0]}} && wait ${{pids[1]}}", ROOT, {
        "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "SLURM_STEP_NUM_TASKS": "2"})
    threads = re.search(r"device: 2 x cpu \(\w+, (\d+) threads\)", finish(job, 0))
    assert 1 <= int(threads[1]) <= max(1, cli.usable_cores() // 2)


EARLY = """
import os, signal, sys
from importlib.machinery import PathFinder

class Early:  # before PyTorch is there
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            os.kill(os.getpid(), signal.SIGTERM)
        return None

assert os.getpid() == 1
sys.meta_path.insert(0, Early())
sys.argv.pop(0)
sys.path.insert(0, os.path.dirname(sys.argv[0]))
exec(compile(open(sys.argv[0]).read(), sys.argv[0], "exec"), {"__name__": "__main__", "__file__": sys.argv[0]})
"""


@pytest.mark.skipif(subprocess.run(["unshare", "-p", "-f", "true"], capture_output=True).returncode != 0,
                    reason="needs the right to start a process 1")
def test_process_1_of_a_container_ends_by_a_signal_while_it_imports_pytorch(drawn_voc, tmp_path):
    (tmp_path / "early.py").write_text(EARLY)
    command = (sys.executable, tmp_path / "early.py", ROOT / "train.py", *train_flags(drawn_voc, tmp_path / "run"))
    script = "exec unshare -p -f --kill-child " + shlex.join(map(str, command))
    assert finish(shell(script, ROOT, {}), 128 + signal.SIGTERM) == "" and not (tmp_path / "run").exists()


# ---- small containers

@pytest.mark.parametrize("home, reason", ((None, "the home folder is not known"), ("/proc", "'/proc/")))
def test_weights_without_a_home_folder_are_an_error_that_names_torch_home(home, reason, tmp_path, monkeypatch):
    """An unknown user without HOME; a home folder that cannot be written to."""
    def unknown(uid):
        raise KeyError(uid)

    for name in ("TORCH_HOME", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    if home:
        monkeypatch.setenv("HOME", home)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(cli.UserError) as error:
        weights.Checkpoint.read("imagenet", "resnet50")
    assert reason in str(error.value) and "TORCH_HOME" in str(error.value) and "--pretrained FILE" in str(error.value)
    assert not list(tmp_path.iterdir())


def test_a_network_that_cannot_be_reached_says_nothing_of_folders(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(cli.UserError) as error:
        weights.download("http://127.0.0.1:9/none-0000000000.pth", "none", "resnet50")
    assert "refused" in str(error.value) and "TORCH_HOME" not in str(error.value)


def test_a_file_system_without_locks_is_a_note(drawn_voc, tmp_path, monkeypatch):
    """As NFS without its lock service. A second start takes the lock of the folder that is there."""
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    for iterations in (1, 2):
        flags = (*train_flags(drawn_voc, tmp_path / "run"), "--max_iters", iterations, "--resume", "auto")
        output = run(ROOT / "train.py", *flags).stdout
        assert output.count(f"note: the file system of {tmp_path / 'run'} has no locks (No locks available)") == 1


@pytest.mark.parametrize("error", (RuntimeError("can't start new thread"),
                                   BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")))
def test_a_limit_on_processes_is_one_line(error):
    message = cli.message_of(error)
    assert "no more threads or processes can be started" in message and "ulimit -u" in message and "\n" not in message


def test_a_rank_that_sigkill_ended_makes_one_think_of_memory(capsys):
    failure = types.SimpleNamespace(exitcode=-signal.SIGKILL, signal_name=lambda: "SIGKILL")
    assert device.status_of({1: failure}) == 128 + signal.SIGKILL
    assert "rank 1 was killed by SIGKILL; if memory ran out, lower --batch_size" in capsys.readouterr().err


def test_little_shared_memory_names_a_remedy_of_kubernetes(monkeypatch):
    def none_left(*_):
        raise RuntimeError("No space left on device")

    monkeypatch.setattr(data, "default_collate", none_left)
    with pytest.raises(cli.UserError, match="emptyDir of medium Memory at /dev/shm"):
        data.collate([])
