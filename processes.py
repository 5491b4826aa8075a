"""The ranks of a run: the process group, shared values, stopping on a signal, and the end of all when one fails."""
import contextlib
import datetime
import os
import signal
import sys
import threading
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from errors import DeviceError, RunError, UserError, first_line
from launch import BEGUN, LAUNCHER, NOTES, STOPPED, under_torchrun
from loader import SIGNALS, STARTED, raise_if_worker_died

BACKENDS = {"npu": "hccl", "cuda": "nccl", "cpu": "gloo"}
STOP_INTERVAL = 10  # iterations between two checks whether a signal asked some rank to stop
BLOCKED_TIME = 10  # seconds that one of several ranks waits for a batch after a signal
FAILED = "failed"  # the key of the store that tells every rank of a failure
# torchrun's store keeps the previous attempt's addresses, on which gloo would wait: each attempt has a prefix.
ATTEMPT = f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"
WATCH_INTERVAL, GRACE = 1, 4  # seconds between two looks at that key; seconds that a rank then has to end by itself
JOIN_TIME = 2  # seconds to wait for the watching thread


class Processes:
    """The ranks of one run, as torchrun started them; alone, rank 0 of a world of size 1."""

    def __init__(self):
        started = under_torchrun()
        self.rank, self.local_rank, self.count = (
            (int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")) if started else (0, 0, 1))
        self.here = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if started else 1  # on this machine
        self.store, self.stopping = None, False  # stopping: this rank saves, and the watcher leaves it alone
        self.watcher, self.over = None, threading.Event()
        if "TORCHELASTIC_RUN_ID" in os.environ and started:
            launcher = int(os.environ.get(LAUNCHER, os.getppid()))
            self.watcher = threading.Thread(target=self.watch, args=(launcher,), daemon=True)
            self.watcher.start()

    def join(self, device, timeout):
        """Initialises the process group; waits at most `timeout` seconds, now and in every later operation.

        Raises DeviceError if the other ranks cannot be reached.
        """
        if note(STOPPED):
            note(STOPPED).unlink(missing_ok=True)  # by a rank that torchrun ended before it restarted all
        if self.count > 1:
            self.meet(device, timeout)
        if note(STOPPED):
            for number in SIGNALS:
                signal.signal(number, self.end_early)

    def end_early(self, number, frame):
        """Ends this rank, and the others beside it, on a signal before the training, when nothing is to be saved."""
        status = exit_status(number)
        self.report_failure()
        sys.exit(status)

    def meet(self, device, timeout):
        """Initialises the process group of several ranks, as `join` says."""
        for number in SIGNALS:  # a Python handler does not run inside the C++ rendezvous; SIG_DFL ends it at once
            signal.signal(number, signal.SIG_DFL)
        limit = datetime.timedelta(seconds=timeout)
        try:
            store = dist.PrefixStore(ATTEMPT, next(dist.rendezvous("env://", timeout=limit))[0])
            dist.init_process_group(BACKENDS[device.type], store=store, rank=self.rank, world_size=self.count,
                                    timeout=limit)
        except (dist.DistError, RuntimeError) as error:
            where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            raise DeviceError(f"rank {self.rank} could not meet the other processes at {where} within {timeout} s "
                              f"({first_line(error)})") from None
        self.store = store

    def watch(self, launcher):
        """Sends SIGTERM to this process once its launcher, torchrun, is gone. Ends it GRACE seconds after another rank
        failed, for which it may wait in a collective operation."""
        while not self.over.wait(WATCH_INTERVAL):
            if os.getppid() != launcher:
                os.kill(os.getpid(), signal.SIGTERM)
                if self.store is None and not self.over.wait(GRACE):  # it waits for a store that is gone
                    self.end_at_once()
                return
            with contextlib.suppress(RuntimeError):  # the store goes with the launcher
                if self.store is not None and self.store.check([FAILED]):
                    if not self.over.wait(GRACE):
                        self.end_at_once()
                    return

    def end_at_once(self):
        """Ends this process, whatever it is waiting for, unless it is saving to end by itself."""
        if not self.stopping:
            for worker in STARTED:
                worker.kill()
            os._exit(status_beside_failure())

    def leave(self):
        if self.count > 1:
            dist.destroy_process_group()

    @contextlib.contextmanager
    def failing_together(self):
        """An exception inside ends every rank. The first rank to fail raises it, the others exit silently."""
        try:
            yield
        except SystemExit:  # beside another rank's failure, or by a signal
            raise
        except BaseException as error:
            lost, beside = self.lost_others(error), self.report_failure()
            if beside or (lost and status_beside_failure() == 0):
                sys.exit(status_beside_failure())
            raise_if_worker_died(error)
            if not lost:
                raise
            raise RunError(f"rank {self.rank}: lost the other processes ({first_line(error).split('. ')[0]})") from None
        finally:
            self.over.set()
            if self.watcher is not None:
                self.watcher.join(JOIN_TIME)  # a thread that is in the store while Python ends aborts the process

    def report_failure(self):
        """Marks the run as failed: in the store, or, before there is one, by a file on this machine.

        -> whether another rank did so first
        """
        try:
            if self.store is not None:
                return self.store.add(FAILED, 1) > 1
            if note(FAILED):
                note(f"{FAILED} {ATTEMPT}").touch(exist_ok=False)
        except FileExistsError:
            return True
        except (OSError, RuntimeError):  # the store is gone with its process
            pass
        return False

    def lost_others(self, error):
        """Whether an error is that of an operation among ranks. NCCL and HCCL raise a type of their own, gloo a bare
        RuntimeError, so that only its text tells."""
        words = ("gloo", "connection", "socket", "hccl", "timed out")
        return self.count > 1 and isinstance(error, RuntimeError) and (
            isinstance(error, dist.DistError) or any(word in str(error).lower() for word in words))

    def share(self, value):
        """Broadcasts rank 0's value. -> it, in every rank"""
        values = [value]
        if self.count > 1:
            dist.broadcast_object_list(values, 0)
        return values[0]

    def once_a_machine(self, work):
        """Calls `work` in the first rank of each machine; the others wait. -> what it returned in rank 0, everywhere

        If it raises UserError or OSError anywhere, all ranks end, and the first rank where it did raises it.
        """
        result = error = None
        if self.local_rank == 0:
            try:
                result = work()
            except (UserError, OSError) as problem:
                error = problem
        if self.count > 1:
            failed = [None] * self.count
            dist.all_gather_object(failed, error is not None)
            if any(failed) and failed.index(True) != self.rank:
                self.leave()
                sys.exit(1)
        if error is not None:
            raise error
        return self.share(result)

    def add_up(self, array, device):
        """The sum over all ranks of a NumPy array."""
        if self.count == 1:
            return array
        total = torch.from_numpy(np.ascontiguousarray(array)).to(device)
        dist.all_reduce(total)
        return total.cpu().numpy()


class StopSignal:
    """SIGTERM or Ctrl-C, on which the ranks of a run save and stop together.

    Once this exists, its handler only records such a signal; `agreed` and `wait_for` act on it.
    """

    def __init__(self, processes, device):
        self.processes, self.device = processes, device
        self.number, self.waiting = 0, False
        for number in SIGNALS:
            signal.signal(number, self.record)
        signal.signal(signal.SIGALRM, self.give_up)

    def record(self, number, frame):
        self.number = number
        if self.waiting:
            self.limit_wait()

    def limit_wait(self):
        """Ends the wait for a batch: at once for a single process, else after BLOCKED_TIME, as the other ranks may be
        in a step that needs this rank's gradients."""
        if self.processes.count == 1:
            self.stop_waiting()
        signal.alarm(BLOCKED_TIME)

    def give_up(self, number, frame):
        if self.waiting:
            self.stop_waiting()

    def stop_waiting(self):
        self.processes.stopping = True
        raise StoppedWaiting

    def wait_for(self, batches):
        """The next of some batches. Raises StoppedWaiting if a stop is asked for while the loader blocks."""
        self.waiting = True
        try:
            if self.number:
                self.limit_wait()
            return next(batches)
        finally:
            self.waiting = False
            signal.alarm(0)

    def agreed(self, iteration=0):
        """The number of the signal on which the run stops after this iteration, else 0; the same in every rank, as a
        rank that continued alone would hang.

        Asking synchronises with the device, so on accelerators only every STOP_INTERVAL-th iteration asks.
        """
        if self.processes.count == 1:
            return self.number
        if self.device.type != "cpu" and iteration % STOP_INTERVAL:
            return 0
        number = torch.tensor([self.number], device=self.device)
        dist.all_reduce(number, dist.ReduceOp.MAX)
        self.processes.stopping = bool(number)
        return int(number)


class StoppedWaiting(BaseException):
    """A signal came while the loader blocked. A BaseException, as `except Exception` in voc.read_image would report a
    damaged file."""


def status_beside_failure():
    """The exit status of a rank that ends because another one did: 0 if that was a stop, which launch.py reports."""
    return 0 if note(STOPPED) and note(STOPPED).is_file() else 1


def exit_status(number):
    """The exit status of a run that a signal stopped: 128 + the signal, as shells report it.

    Under launch.py it is 0, and the signal goes into a file: torchrun would start a rank anew that ends with another.
    """
    if not note(STOPPED):
        return 128 + number
    note(STOPPED).write_text(str(int(number)))
    return 0


def restarted():
    """Whether torchrun restarted this run, one of whose processes died after the work folder was open."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0" and (not note(BEGUN) or note(BEGUN).exists())


def note(name):
    """The path of a message between the ranks and their launcher; None without launch.py."""
    return Path(os.environ[NOTES], name) if os.environ.get(NOTES) else None
