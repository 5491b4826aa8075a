"""What the tests share: the project's commands, called in the tests' process or as real ones, and their data."""
import contextlib
import ctypes
import gc
import importlib
import io
import json
import multiprocessing
import os
import runpy
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
from draw_voc import draw_data_set

import cli
from fcn8s import FCN8s

ROOT = Path(__file__).resolve().parent.parent
SITE = ROOT / "tests/site"
HANGS = 240  # seconds after which a command that takes a few is said to hang
REAL_VOC = Path(os.environ.get("FCN8S_VOC", ROOT.parent / "shared" / "voc"))
# The longest modules, which start first: at the end both processes then have small ones to share.
FIRST = ("test_learning", "test_processes", "test_faults", "test_device")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # as cli.py does in a command


def pytest_configure():
    """Half the cores for each of two tests at a time, and the same in every process: torchrun would give its own
    another number, and sums by another number of threads are not equal to the bit. Signals have their defaults, also
    in the processes that tests start: a script's `bash tests/run.sh &` ignores SIGINT, nohup SIGHUP."""
    for number in cli.STOP_SIGNALS:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    os.environ.setdefault("OMP_NUM_THREADS", str((os.cpu_count() + 1) // 2))
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    runpy.run_path(str(SITE / "sitecustomize.py"))  # the small backbone, for what is tested in this process
    os.environ["NO_PICTURES"] = "1"  # two thirds of a short training, unless a test asks for `pictures`


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: FIRST.index(item.path.stem) if item.path.stem in FIRST else len(FIRST))


@contextlib.contextmanager
def drawing():
    """A training in the block draws its pictures, as a user's does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("NO_PICTURES")
        yield


@pytest.fixture
def pictures():
    """For tests that look at what a training draws."""
    with drawing():
        yield


@pytest.fixture(autouse=True)
def nothing_stays_behind():
    """A command that was called in this process leaves no signal handler, variable or thread."""
    def state():
        handlers = {number: signal.getsignal(number) for number in (*cli.STOP_SIGNALS, signal.SIGALRM)}
        return handlers, dict(os.environ), {thread for thread in threading.enumerate() if not thread.daemon}

    def changed(before, after):  # the name of the current test; torch._dynamo's folder
        names = (before[1].keys() | after[1].keys()) - {"PYTEST_CURRENT_TEST", "TORCHINDUCTOR_CACHE_DIR"}
        return [name for name in names if before[1].get(name) != after[1].get(name)]

    before = state()
    yield
    after = state()
    assert before[0] == after[0] and not changed(before, after) and not after[2] - before[2]


def give_memory_back():
    """Networks lie in reference cycles, and malloc keeps what is freed. Forks of a large process are slow."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


@pytest.fixture(autouse=True, scope="module")
def memory_of_a_module_is_given_back():
    yield
    give_memory_back()


def environment(changes=None):
    """The environment of a real process: ours, the small backbone, and changes, whose PYTHONPATH comes before ours."""
    changes = changes or {}
    folders = [*changes.get("PYTHONPATH", "").split(os.pathsep), ROOT, ROOT / "tests", ROOT / "tools", SITE]
    folders = dict.fromkeys(str(folder) for folder in folders if folder)  # each once
    return {**os.environ, **changes, "PYTHONPATH": os.pathsep.join(folders)}


def start_python(command, cwd=ROOT, env=None, merged=False, new_session=False):
    """Starts `python COMMAND...`. merged: the errors go where the output goes. -> subprocess.Popen, with a `mark` in
    the environment of all its processes, by which `left_of` finds them"""
    mark = f"MARK_OF_TEST={secrets.token_hex(8)}"
    process = subprocess.Popen([sys.executable, *map(str, command)], cwd=cwd, text=True, errors="surrogateescape",
                               env=environment({**(env or {}), **dict([mark.split("=")])}), stdin=subprocess.DEVNULL,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT if merged else subprocess.PIPE,
                               start_new_session=new_session)
    process.mark = mark
    return process


def kill_workers(kept=()):
    """Kills the workers of this process but for those kept, as cli.run does at the end of a command. They ignore
    SIGTERM: PyTorch would wait 5 s for each, and Python for ever."""
    for child in set(multiprocessing.active_children()).difference(kept):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler raises
        child.kill()


def call(script, arguments, cwd, env):
    """Calls a command of the project in this process, as `python SCRIPT ARGUMENTS...` would. -> CompletedProcess"""
    module, folder = importlib.import_module(script.stem), os.getcwd()
    children = set(multiprocessing.active_children())
    out, err = io.StringIO(), io.StringIO()
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, env or {}))
        stack.enter_context(mock.patch.object(sys, "argv", [str(script), *arguments]))
        for name in ("draw", "draw_data") if os.environ.get("NO_PICTURES") else ():
            stack.enter_context(mock.patch(f"train.{name}"))
        for holder in (cli, module):
            if hasattr(holder, "PROG"):
                stack.enter_context(mock.patch.object(holder, "PROG", script.name))
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(err))
        try:
            os.chdir(cwd)
            status = module.main(module.parse_args(arguments))
        except SystemExit as ending:
            status = ending.code
        except (cli.UserError, OSError) as error:
            status = 1
            print(cli.message_of(error), file=err)
        finally:
            kill_workers(children)
            os.chdir(folder)
    return subprocess.CompletedProcess([str(script), *arguments], status, out.getvalue(), err.getvalue())


def run(*command, status=0, cwd=ROOT, env=None, real=False):
    """Runs `python COMMAND...`, checks its exit status, and returns it with its output.

    A command of the project is called in this process, unless `real`, or it starts ranks, or its modules are found
    elsewhere. Real processes take seconds: they are for signals, kills, locks, ranks, exit statuses and `--help`.
    """
    command = [str(part) for part in command]
    script = Path(command[0])
    ours = script.parent == ROOT and script.name in cli.COMMANDS
    launches = status != 2 and any(part.startswith(("--device_list", "--device-list")) for part in command)
    if ours and not real and "PYTHONPATH" not in (env or {}) and not launches:
        done = call(script, command[1:], cwd, env)
    else:
        process = start_python(command, cwd, env)
        try:
            done = subprocess.CompletedProcess(process.args, None, *process.communicate())
        except BaseException:  # Ctrl-C
            process.kill()
            raise
        done.returncode = process.returncode
    assert done.returncode == status, f"status {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def error_line(*command, status=1, **kwargs):
    """Runs a command that must fail; its error must be one line and no traceback. -> that line"""
    lines = run(*command, status=status, **kwargs).stderr.strip().splitlines()
    assert len(lines) == 1, "\n".join(lines)
    return lines[0]


def train(data, work_dir, *flags, status=0, real=False):
    """A short training on small crops; `flags` come last and so override the defaults here."""
    return run(ROOT / "train.py", *train_flags(data, work_dir), *flags, status=status, real=real)


def start(data, work_dir, *flags, env=None):
    """Starts a training as `train` does, in a session of its own, and does not wait for it. -> subprocess.Popen"""
    return start_python((ROOT / "train.py", *train_flags(data, work_dir), *flags), env=env, merged=True,
                        new_session=True)


def finish(process, status):
    """Waits for a started training, checks its exit status, and returns its output."""
    try:
        output, _ = process.communicate(timeout=HANGS)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun ends its processes, which a SIGKILL would leave behind
        raise
    assert process.returncode == status, f"status {process.returncode}\n{output}"
    return output


def left_of(process):
    """The ids of the processes that are left of a started command, in any session: torchrun gives each rank its own."""
    left = []
    for path in processes():
        with contextlib.suppress(OSError):  # it ended meanwhile, or is another user's
            if process.mark.encode() in (path / "environ").read_bytes():  # empty once it has ended
                left.append(int(path.name))
    return left


def processes():
    """The folders in /proc. Path.glob looks into them, and raises for a process that ends meanwhile."""
    return [Path("/proc", name) for name in os.listdir("/proc") if name.isdecimal()]


def free_port():
    """A port below 32768, from where Linux gives ports to processes that ask for any: one could take it meanwhile."""
    while True:
        port = 10_000 + secrets.randbelow(20_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def children_of(pid):
    """The ids of a process's children that have not ended: of a launcher the ranks, of a rank the workers."""
    found = []
    for path in processes():
        with contextlib.suppress(OSError):
            state, parent = (path / "stat").read_text().rpartition(") ")[2].split()[:2]
            if state != "Z" and int(parent) == pid:
                found.append(int(path.name))
    return found


def fill_pipe(path):
    """Writes into a pipe until it is full."""
    writer = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writer, bytes(2 ** 16))
    os.close(writer)


def wait_for_iteration(process, work_dir, number):
    """Returns once the metrics, a line each iteration, show that iteration, or when the training has ended."""
    since = time.monotonic()
    while process.poll() is None and f'"iter": {number},' not in read(work_dir / "metrics.jsonl"):
        assert time.monotonic() - since < HANGS, "the training hangs"
        time.sleep(0.01)


def read(path):
    try:
        return path.read_text()
    except FileNotFoundError:  # not there yet, or a resumed run has just deleted it
        return ""


def metrics(work_dir):
    return [json.loads(line) for line in (work_dir / "metrics.jsonl").read_text().splitlines()]


def timeless(lines):
    """Lines of metrics without the values that are of the clock or the machine."""
    return [{key: value for key, value in line.items() if key not in ("fps", "iter_time", "data_time", "memory")}
            for line in lines]


def state(path):
    return torch.load(path, weights_only=True)


def assert_same_run(ours, theirs):
    """Two finished runs: parameters, buffers and momentum equal to the bit, the same metrics and the same result."""
    a, b = (state(folder / "ckpt/latest.pth") for folder in (ours, theirs))
    assert a["state_dict"].keys() == b["state_dict"].keys()
    assert all(torch.equal(value, b["state_dict"][key]) for key, value in a["state_dict"].items())
    for number, values in a["optimizer"]["state"].items():
        assert torch.equal(values["momentum_buffer"], b["optimizer"]["state"][number]["momentum_buffer"])
    assert timeless(metrics(ours)) == timeless(metrics(theirs))
    a, b = (json.loads((folder / "result.json").read_text()) for folder in (ours, theirs))
    assert {key: value for key, value in a.items() if "fps" not in key} == {
        key: value for key, value in b.items() if "fps" not in key}


def train_flags(data, work_dir):
    return ("--device", "cpu", "--data_path", data, "--work_dir", work_dir, "--backbone", "tiny",
            "--pretrained", "none", "--scale", 256, 64, "--crop_size", 64, "--batch_size", 2,
            "--max_iters", 4, "--log_interval", 1)


def untrained_checkpoint(path, names):
    """Writes a network that was never trained, but whose answers vary from pixel to pixel, as train.py would."""
    torch.manual_seed(0)
    model = FCN8s(len(names), "tiny")
    for layer in (model.decode_head.score_pool3, model.decode_head.score_pool4, model.decode_head.score_fr):
        torch.nn.init.normal_(layer.weight, std=0.1)
    colours = [[200, 10 * i, 5] for i in range(len(names))]
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": model.state_dict(), "meta": {
        "backbone": "tiny", "num_classes": len(names), "classes": names, "palette": colours,
        "scale": (96, 64)}}, path)
    return path


@pytest.fixture(scope="session")
def real_voc(tmp_path_factory):
    """The year folder of a converted copy of the real subset."""
    if not REAL_VOC.is_dir():
        pytest.skip(f"no real VOC subset at {REAL_VOC} ($FCN8S_VOC)")
    devkit = tmp_path_factory.mktemp("real") / "VOCdevkit"
    shutil.copytree(REAL_VOC / "VOCdevkit", devkit)
    run(ROOT / "convert_voc_aug.py", devkit, devkit / "VOCaug", "--nproc", 2)
    return devkit / "VOC2012"


@pytest.fixture(scope="session")
def drawn_voc(tmp_path_factory):
    """The year folder of a converted drawn sample. Shared by the tests: they copy it before they change it."""
    devkit = draw_data_set(tmp_path_factory.mktemp("drawn"), counts={"train": 6, "val": 5, "sbd": 6})
    run(ROOT / "convert_voc_aug.py", devkit, devkit / "VOCaug", "--nproc", 2)
    return devkit / "VOC2012"


@pytest.fixture
def own_drawn_voc(drawn_voc, tmp_path):
    """A copy of the drawn sample's year folder, to spoil."""
    return Path(shutil.copytree(drawn_voc.parent, tmp_path / "VOCdevkit")) / "VOC2012"
