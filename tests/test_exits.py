"""Whatever is raised in a run, its cause is shown and every process of it ends."""
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import (
    ROOT,
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

import loader
from errors import RunError
from processes import StopSignal

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
    *((kind, workers, 1) for kind in ("train", "val", "vanished", "bug", "kill") for workers in (0, 1, 4)
      if (kind, workers) != ("kill", 0)),  # that would be the process itself
    ("train", 4, 2), ("val", 0, 2), ("vanished", 1, 2), ("bug", 0, 2), ("kill", 1, 2)])
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
    assert not left_of(process, tmp_path / "run")


@pytest.mark.parametrize("error", (EOFError(), ConnectionResetError(), RuntimeError("unable to open shared memory")))
def test_a_worker_that_was_killed_is_told_by_whatever_fails_first(error, monkeypatch):
    """As taking over its batch does, before the system says that it is dead."""
    worker = multiprocessing.get_context("fork").Process(target=signal.pause)
    worker.start()
    monkeypatch.setattr(loader, "STARTED", [worker])
    os.kill(worker.pid, signal.SIGKILL)
    if isinstance(error, RuntimeError):
        worker.join()
    with pytest.raises(RunError, match="a process that loads images died"):
        loader.raise_if_worker_died(error)


def test_a_refused_run_is_no_more_accepted_when_it_is_restarted(drawn_voc, tmp_path):
    train(drawn_voc, tmp_path / "run", "--max_iters", 1)
    before = (tmp_path / "run/metrics.jsonl").read_text()
    output = finish(start(drawn_voc, tmp_path / "run", "--device_list", 0, "--max_restarts", 1), 1)
    assert "holds a run already" in output and (tmp_path / "run/metrics.jsonl").read_text() == before


@pytest.mark.parametrize("flags, number", [
    (("--workers", 0), signal.SIGTERM), (("--workers", 0), signal.SIGINT), ((), signal.SIGTERM), ((), signal.SIGINT),
    (("--device_list", "0,1"), signal.SIGTERM)])
def test_a_stop_is_heard_while_the_loader_blocks(flags, number, drawn_voc, tmp_path):
    """As it does on a folder whose server does not answer. Of two ranks, both are asked."""
    fault = tmp_path / "fault"
    process = start(drawn_voc, tmp_path / "run", *LONG[:2], "--eval_interval", 10_000, *flags,
                    env={"PYTHONPATH": FAULTY, "FAULT": str(fault)})
    wait_for_iteration(process, tmp_path / "run", 2)
    fault.write_text("block 0")
    while fault.exists() and process.poll() is None:
        os.sched_yield()
    process.send_signal(number)
    output = finish(process, 128 + number)
    assert f"stopped by {number.name} at iteration" in output and "which is saved" in output.splitlines()[-1]
    assert not left_of(process, tmp_path / "run")
    assert (tmp_path / "run/ckpt/latest.pth").is_file()


@pytest.mark.parametrize("number", (signal.SIGTERM, signal.SIGINT))
def test_a_rank_that_waits_for_the_others_ends_on_a_signal(number, drawn_voc, tmp_path):
    """They never come. launch.py's folder of notes is there."""
    port = free_port()
    process = start(drawn_voc, tmp_path / "run", env={
        "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "FCN8S_NOTES": str(tmp_path)})
    with socket.socket() as there:
        while process.poll() is None and there.connect_ex(("127.0.0.1", port)):
            os.sched_yield()
    process.send_signal(number)
    finish(process, -number)


def test_only_a_wait_after_a_signal_is_limited():
    """Of several ranks: a batch that comes in time ends the limit, and the next wait has one of its own."""
    def left():
        return signal.getitimer(signal.ITIMER_REAL)[0]

    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM)}
    try:
        stop = StopSignal(SimpleNamespace(count=2, stopping=False), torch.device("cpu"))
        batches = (signal.raise_signal(number) or left() if number else left() for number in (0, signal.SIGTERM, 0))
        limits = []
        for _ in range(3):
            limits.append(stop.wait_for(batches))
            assert left() == 0
        assert [limit > 0 for limit in limits] == [False, True, True] and stop.number == signal.SIGTERM
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def test_shared_memory_that_runs_out_is_one_line(drawn_voc, tmp_path):
    """As in a container, whose default is 64 MiB. The queue's thread would lose the batch, and the run would wait."""
    (tmp_path / "full.py").write_text(FULL)
    flags = train_flags(drawn_voc, tmp_path / "run")
    assert "no shared memory is left for batches (No space left on device)" in error_line(
        tmp_path / "full.py", ROOT / "train.py", *flags)


FULL = """
import os, runpy, sys, torch

def share_memory_(tensor, main=os.getpid(), share=torch.Tensor.share_memory_):
    if os.getpid() != main:
        raise RuntimeError("No space left on device")
    return share(tensor)

torch.Tensor.share_memory_ = share_memory_
sys.argv.pop(0)
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


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
        status=-signal.SIGINT, real=True)
    assert not (tmp_path / "run").exists()


def test_a_command_whose_outputs_are_closed_has_its_status(tmp_path):
    """As a daemon's may be: a file that it opens must not become its output."""
    command = f'"{sys.executable}" "{ROOT}/evaluate.py" absent --data_path d --device cpu'
    done = [subprocess.run(["bash", "-c", f"{command} {closed}"], capture_output=True, text=True)
            for closed in (">&- 2>&-", ">&-")]
    assert [process.returncode for process in done] == [1, 1] and done[0].stderr == ""
    assert done[1].stderr == "evaluate.py: error: absent: there is no such checkpoint file\n"


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
from cli import run
from errors import RunError

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

def main():
    torch.distributed.all_reduce(torch.zeros(2), async_op=True)
    raise RunError("a fault")

run(main, "command")
"""


def test_a_thread_that_drops_a_tensor_late_aborts_no_process(tmp_path):
    """Python ends a thread that takes the GIL in its finalization, which inside PyTorch's code is an abort."""
    (tmp_path / "ends_late.py").write_text(ENDS_LATE)
    assert error_line(tmp_path / "ends_late.py", free_port(), real=True) == "command: error: a fault"
