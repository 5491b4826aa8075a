"""Whatever is raised in a run, its cause is shown and every process of it ends."""
import contextlib
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading

import pytest
import torch
from conftest import (
    ROOT,
    environment,
    error_line,
    finish,
    free_port,
    left_of,
    run,
    start,
    train,
    train_flags,
    wait_for_iteration,
)

import cli
import device

LONG = ("--max_iters", 10_000, "--eval_interval", 10)
FAULTY = str(ROOT / "tests/faulty")


def cause(kind, rank, data, fault):
    """Makes a run on that data fail soon. -> what it must say"""
    if kind in ("train", "val"):
        for path in (data / "JPEGImages").glob(f"drawn_{kind}_*.jpg"):
            path.write_bytes(b"garbage")
        return "jpg: the image does not decode"
    if kind == "vanished":
        (data / "JPEGImages").rename(data / "elsewhere")
        return "its folder is not there any more; mount or restore it"
    fault.write_text(f"{kind} {rank}")
    return {"bug": "RuntimeError: a bug", "kill": "a process that loads images died"}[kind]


@pytest.mark.parametrize("kind, workers, ranks", [
    ("train", 0, 1), ("val", 4, 1), ("bug", 4, 1), ("kill", 4, 1), ("vanished", 1, 1),
    ("train", 4, 2), ("kill", 1, 2)])
def test_an_error_is_shown_and_no_process_is_left(kind, workers, ranks, own_drawn_voc, tmp_path):
    """Of two ranks one raises while the other waits for its gradients. A SIGTERM finds nobody who would ignore it."""
    fault = tmp_path / "fault"
    devices = ("--device_list", "0,1") if ranks == 2 else ()
    process = start(own_drawn_voc, tmp_path / "run", *LONG, "--workers", workers, *devices,
                    env={"PYTHONPATH": FAULTY, "FAULT": str(fault)})
    wait_for_iteration(process, tmp_path / "run", 1)
    words = cause(kind, ranks - 1, own_drawn_voc, fault)
    output = finish(process, 1)
    assert words in output and ("Traceback" in output) == (kind == "bug")
    assert "lost the other processes" not in output
    assert not left_of(process)


@pytest.mark.parametrize("error", (EOFError(), ConnectionResetError(), RuntimeError(
    "DataLoader worker (pid 7) is killed by signal: Killed.")))
def test_a_worker_that_was_killed_is_one_line_whichever_error_comes_first(error):
    message = cli.message_of(error)
    assert "a process that loads images died" in message and "lower --workers" in message and "\n" not in message


def test_a_second_interrupt_ends_a_run_whose_loader_blocks(drawn_voc, tmp_path):
    """As it does on a folder whose server does not answer. The first asks the run to stop after the iteration."""
    fault = tmp_path / "fault"
    process = start(drawn_voc, tmp_path / "run", *LONG[:2], "--eval_interval", 10_000, "--checkpoint_interval", 2,
                    env={"PYTHONPATH": FAULTY, "FAULT": str(fault)})
    wait_for_iteration(process, tmp_path / "run", 3)  # the second is saved
    fault.write_text("block 0")
    while fault.exists() and process.poll() is None:
        os.sched_yield()
    for _ in range(2):
        while process.poll() is None and signal.SIGINT in pending(process.pid):
            os.sched_yield()
        process.send_signal(signal.SIGINT)
    finish(process, 128 + signal.SIGINT)
    assert not left_of(process)
    assert (tmp_path / "run/ckpt/latest.pth").is_file()


def pending(pid):
    """The signals that a process has not got yet."""
    with open(f"/proc/{pid}/status") as status:
        masks = dict(line.rstrip().split(":\t") for line in status if line.startswith(("SigPnd", "ShdPnd")))
    bits = int(masks["SigPnd"], 16) | int(masks["ShdPnd"], 16)
    return {number for number in signal.Signals if bits >> (number - 1) & 1}


def test_a_stop_that_takes_too_long_is_ended_by_an_alarm():
    with cli.Stop(device.Ranks(torch.device("cpu"))) as stop:
        stop.deferred = True
        assert stop.agreed(1) == 0
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)  # Slurm sends it to the ranks and to their launcher
        assert stop.agreed(2) == signal.SIGTERM
        assert 0 < signal.getitimer(signal.ITIMER_REAL)[0] <= cli.SAVING_TIME
        with pytest.raises(SystemExit) as ended, stop.at_once():
            pytest.fail("a stop that was asked for before must end the run at once")
        assert ended.value.code == 128 + signal.SIGTERM
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0


def test_a_stop_whose_exception_python_drops_stops_the_run_after_the_iteration():
    """As in a destructor or a weakref's callback, where a signal may come."""
    with cli.Stop(device.Ranks(torch.device("cpu"))) as stop:
        with contextlib.suppress(SystemExit):
            signal.raise_signal(signal.SIGTERM)
        assert stop.agreed(1) == signal.SIGTERM


def test_two_stops_at_one_moment_are_one(monkeypatch):
    dropped, both = [], {signal.SIGHUP, signal.SIGTERM}
    monkeypatch.setattr(sys, "unraisablehook", dropped.append)
    signal.pthread_sigmask(signal.SIG_BLOCK, both)
    with pytest.raises(SystemExit), cli.Stop(device.Ranks(torch.device("cpu"))):
        for number in both:
            signal.raise_signal(number)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, both)
    assert not dropped


LATE = """
import atexit, signal
from cli import run


class SignalException(Exception):
    sigval = signal.SIGTERM


def torchruns(number, frame):
    raise SignalException


def main(args):
    signal.signal(signal.SIGTERM, torchruns)
    atexit.register(signal.raise_signal, signal.SIGTERM)
    signal.raise_signal(signal.SIGTERM)


run(main, list)
"""


DROPPING = """
from cli import run


class Raising:
    def __init__(self, error):
        self.error = error

    def __del__(self):
        raise self.error


def main(args):
    for error in (SystemExit(143), KeyError("a bug")):
        Raising(error)


run(main, list)
"""


def test_what_a_signals_handler_raises_in_a_destructor_is_not_shown(tmp_path):
    """A bug is shown."""
    (tmp_path / "dropping.py").write_text(DROPPING)
    shown = run(tmp_path / "dropping.py").stderr
    assert "KeyError: 'a bug'" in shown and "143" not in shown


def test_a_signal_while_the_launcher_ends_changes_nothing(tmp_path):
    """A rank passes it on. torchrun's handler raises an exception, wherever the launcher is."""
    (tmp_path / "late.py").write_text(LATE)
    done = run(tmp_path / "late.py", status=128 + signal.SIGTERM)
    assert done.stdout == done.stderr == ""


def test_signals_are_held_while_workers_start_whichever_thread_gets_them():
    got = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: got.append(number))
    with cli.held_signals():
        thread = threading.Thread(target=signal.raise_signal, args=(signal.SIGTERM,))
        thread.start()
        thread.join()
        assert got == []
    assert got == [signal.SIGTERM]
    signal.signal(signal.SIGTERM, before)


def test_only_the_first_rank_of_a_machine_prints_and_none_once_the_launcher_is_gone(tmp_path, monkeypatch):
    assert cli.first_to("failed")  # not under torchrun
    (tmp_path / "attempt_0/1").mkdir(parents=True)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "attempt_0/1/error.json"))
    assert [cli.first_to("failed"), cli.first_to("failed"), cli.first_to("stopped")] == [True, False, True]
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "attempt_1/0/error.json"))
    assert not cli.first_to("failed")


@pytest.mark.parametrize("number", (signal.SIGHUP, signal.SIGUSR1))
@pytest.mark.parametrize("ignored", (False, True))
def test_a_hangup_or_slurms_warning_is_a_stop_unless_it_is_ignored(ignored, number):
    """As nohup ignores the first."""
    before = signal.signal(number, signal.SIG_IGN if ignored else signal.SIG_DFL)
    ended = []
    with cli.Stop(device.Ranks(torch.device("cpu"))):
        try:
            signal.raise_signal(number)
        except SystemExit as ending:
            ended.append(ending.code)
    signal.signal(number, before)
    assert ended == ([] if ignored else [128 + number])


@pytest.mark.parametrize("number", (signal.SIGTERM, signal.SIGINT))
def test_a_rank_that_waits_for_the_others_ends_on_a_signal(number, drawn_voc, tmp_path):
    """They never come."""
    port = free_port()
    process = start(drawn_voc, tmp_path / "run", env={
        "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
    with socket.socket() as there:
        while process.poll() is None and there.connect_ex(("127.0.0.1", port)):
            os.sched_yield()
    process.send_signal(number)
    finish(process, -number)


def test_shared_memory_that_runs_out_is_one_line(drawn_voc, tmp_path, monkeypatch):
    """As in a container, whose default is 64 MiB. The queue's thread would lose the batch, and the run would wait."""
    def none_left(*size, **device):
        raise RuntimeError("No space left on device")

    monkeypatch.setattr(torch.UntypedStorage, "_new_shared", none_left)
    assert "no shared memory is left for batches (No space left on device)" in error_line(
        ROOT / "train.py", *train_flags(drawn_voc, tmp_path / "run"))


def test_an_error_of_the_user_is_not_repeated_by_restarts(drawn_voc, tmp_path):
    """By torchrun, which restarts a refused run: the second attempt must not take over the run in the folder."""
    train(drawn_voc, tmp_path / "run", "--max_iters", 1)
    before = (tmp_path / "run/metrics.jsonl").read_text()
    done = run("-m", "torch.distributed.run", "--standalone", "--max_restarts", 1, ROOT / "train.py",
               *train_flags(drawn_voc, tmp_path / "run"), status=1)
    assert done.stderr.count("holds a run already") == 1 and (tmp_path / "run/metrics.jsonl").read_text() == before
    flags = ("--max_restarts", 1, "--device_list", 0)
    line = error_line(ROOT / "train.py", *train_flags(drawn_voc, tmp_path / "run"), *flags, status=2)
    assert "--max_restarts needs --resume auto" in line
    line = error_line(ROOT / "train.py", *train_flags(drawn_voc, "/proc/run"), *flags, "--resume", "auto")
    assert "/proc/run: cannot be written to" in line


def test_restarts_repeat_an_error_of_the_user_only_after_the_first_iteration(own_drawn_voc, tmp_path):
    """A damaged image during the training: in the second attempt rank 0, for which the other waits, finds it before the
    first iteration, and the attempt is the last."""
    flags = ("--device_list", "0,1", "--max_restarts", 3, "--resume", "auto", *LONG)
    process = start(own_drawn_voc, tmp_path / "run", *flags)
    wait_for_iteration(process, tmp_path / "run", 1)
    for path in (own_drawn_voc / "JPEGImages").glob("drawn_train_*.jpg"):
        path.write_bytes(b"garbage")
    output = finish(process, 1)
    assert output.count("train.py: error: ") == 2 and not left_of(process)


SWALLOWS = """
import os, signal, sys
from importlib.machinery import PathFinder

class Interrupted:  # while a part of PyTorch is imported, which swallows the KeyboardInterrupt
    def find_spec(self, name, path=None, target=None):
        if name == "torch.distributed.elastic.multiprocessing.errors":
            try:
                os.kill(os.getpid(), signal.SIGINT)
            except KeyboardInterrupt:
                pass
        return None

sys.meta_path.insert(0, Interrupted())
sys.argv.pop(0)
sys.path.insert(0, os.path.dirname(sys.argv[0]))
exec(compile(open(sys.argv[0]).read(), sys.argv[0], "exec"), {"__name__": "__main__", "__file__": sys.argv[0]})
"""


def test_an_interrupt_while_pytorch_is_imported_starts_no_run(drawn_voc, tmp_path):
    (tmp_path / "swallows.py").write_text(SWALLOWS)
    run(tmp_path / "swallows.py", ROOT / "train.py", *train_flags(drawn_voc, tmp_path / "run"), "--device_list", "0,1",
        status=-signal.SIGINT)
    assert not (tmp_path / "run").exists()


def test_a_command_whose_outputs_are_closed_has_its_status(tmp_path):
    """As a daemon's may be: a file that it opens must not become its output."""
    command = f'"{sys.executable}" "{ROOT}/evaluate.py" absent --data_path d --device cpu'
    done = [subprocess.run(["bash", "-c", f"{command} {closed}"], capture_output=True, text=True, env=environment())
            for closed in (">&- 2>&-", ">&-")]
    assert [process.returncode for process in done] == [1, 1] and done[0].stderr == ""
    assert done[1].stderr == (
        "evaluate.py: error: absent: there is no such checkpoint file, nor are there published weights of that name\n")


@pytest.mark.parametrize("output, reason", (("| head -1", "Broken pipe"), ("> /dev/full", "No space left on device")))
def test_a_run_whose_output_nobody_reads_goes_on_and_its_log_has_all(output, reason, drawn_voc, tmp_path):
    """In an ASCII locale: what is dropped holds names that this cannot encode."""
    (tmp_path / "names.txt").write_text("\n".join("背景 猫 狗 鸟 船 瓶".split()), encoding="utf-8")
    flags = shlex.join(map(str, (*train_flags(drawn_voc, tmp_path / "run"), "--train_split", "trainaug", "--classes",
                                 tmp_path / "names.txt")))
    done = subprocess.run(["bash", "-c", f'set -o pipefail; "{sys.executable}" "{ROOT}/train.py" {flags} {output}'],
                          capture_output=True, text=True, env={
                              **environment(), "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"})
    log = (tmp_path / "run/train_0.log").read_text(encoding="utf-8")
    assert done.returncode == 0 and done.stderr == "" and (tmp_path / "run/result.json").is_file()
    assert log.count(f"note: the output cannot be written to ({reason})") == 1 and "\nnext, to see" in log


LOSES_ITS_WORKER = """
import atexit, multiprocessing, threading, time
from cli import UserError, run

def watch():  # as the thread of a pool of processes
    worker.join()
    raise RuntimeError("the pool is broken")

worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
worker.start()
thread = threading.Thread(target=watch)
thread.start()
atexit.register(thread.join)

def main(args):
    raise UserError("a fault")

run(main, lambda: None)
"""


def test_a_thread_that_loses_its_worker_adds_no_line_to_the_error(tmp_path):
    (tmp_path / "loses.py").write_text(LOSES_ITS_WORKER)
    assert error_line(tmp_path / "loses.py") == "loses.py: error: a fault"


ENDS_LATE = """
import atexit, os, sys, time

class AtTheEnd:
    def __del__(self):  # in Python's finalization: lets gloo's thread have the GIL
        os.waitpid(other, 0)
        time.sleep(1)

def fail_the_operation():  # whose tensor gloo's thread then drops, for which it waits for the GIL
    sys.setswitchinterval(1000)
    os.close(writer)
    sum(range(3 * 10 ** 7))

atexit.register(fail_the_operation)  # before PyTorch's, so that it comes last
import torch, torch.distributed
from cli import UserError, run

reader, writer = os.pipe()
other = os.fork()
torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{sys.argv[1]}", rank=int(other == 0),
                                     world_size=2)
if other == 0:
    os.close(writer)
    os.read(reader, 1)
    os._exit(0)
os.close(reader)
kept = AtTheEnd()

def main(args):
    torch.distributed.all_reduce(torch.zeros(2), async_op=True)
    raise UserError("a fault")

run(main, lambda: None)
"""


def test_a_thread_that_drops_a_tensor_late_aborts_no_process(tmp_path):
    """Python ends a thread that takes the GIL in its finalization, which inside PyTorch's code is an abort."""
    (tmp_path / "ends_late.py").write_text(ENDS_LATE)
    assert error_line(tmp_path / "ends_late.py", free_port()) == "ends_late.py: error: a fault"
