"""Batches from worker processes: their order, their errors, and how the workers end.

Workers ignore SIGTERM and SIGINT, which a terminal and a scheduler send to every process: the main process stops the
run and needs batches until then. `cli.kill_children` ends them. A worker whose main process died ends by itself.
"""
import multiprocessing
import signal
import sys
from multiprocessing.connection import wait

import torch
from torch.utils._pytree import tree_map_only
from torch.utils.data import DataLoader, Dataset, get_worker_info

from cli import kill_children, usable_cores
from errors import RunError, UserError, first_line

WORKERS = 4  # a process's, where the cores suffice
SIGNALS = (signal.SIGTERM, signal.SIGINT)  # that stop a run
EXIT_TIME = 1  # seconds to wait for a worker's exit code after its pipe broke
STARTED = []  # the worker processes that this process started


def default_workers(processes_here=1):
    """How many workers each of the processes on this machine gets."""
    return max(1, min(WORKERS, usable_cores() // processes_here))


class Batches:
    """An iterable of batches: each is what `collate` makes of the samples of some indices of a data set.

    data: a map-style data set; batches: an iterable of lists of indices; collate: samples -> batch
    workers: how many processes load; 0: this one does
    Raises what the data set raises, whichever process loads, and RunError where a worker dies.
    """

    def __init__(self, data, batches, collate, workers, pin_memory=False):
        self.loader = DataLoader(Reporting(data, collate), batch_sampler=batches, num_workers=workers,
                                 pin_memory=pin_memory, collate_fn=as_it_is, worker_init_fn=start_worker,
                                 multiprocessing_context="fork" if workers else None)  # forkserver since Python 3.14

    def __iter__(self):
        before = set(multiprocessing.active_children())
        # Forked workers have this process's handlers: they get no signal until `start_worker` ignores them.
        ours = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            batches = iter(self.loader)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, ours)
        own = [child for child in multiprocessing.active_children() if child not in before]
        STARTED.extend(own)
        try:
            for batch in batches:
                if isinstance(batch, Exception):
                    raise batch
                yield batch
        except GeneratorExit:
            forget(own)
            raise
        except BaseException as error:  # StoppedWaiting, too; PyTorch would wait 5 s for each worker that blocks
            raise_if_worker_died(error)
            STARTED.clear()  # what is killed now has not died
            kill_children()
            raise
        forget(own)


def forget(workers):
    """Takes workers that ended as they should out of STARTED."""
    STARTED[:] = [worker for worker in STARTED if worker not in workers]


class Reporting(Dataset):
    """Loads batches of a data set. Returns a UserError or OSError in place of a batch: the DataLoader would put the
    worker's traceback into its message."""

    def __init__(self, data, collate):
        self.data, self.collate = data, collate

    def __getitems__(self, indices):
        try:
            batch = self.collate([self.data[index] for index in indices])
        except (UserError, OSError) as error:
            return error
        if get_worker_info() is None:
            return batch
        try:  # the queue's thread would do it later, where an error loses the batch, for which the run then waits
            return tree_map_only(torch.Tensor, torch.Tensor.share_memory_, batch)
        except RuntimeError as error:
            return RunError(f"no shared memory is left for batches ({first_line(error)}); give more (docker run "
                            "--shm-size=8g), or --workers 0")


def as_it_is(batch):
    return batch


def start_worker(worker):
    """Workers ignore SIGTERM and SIGINT. Their queue's thread prints no traceback when the main process has died."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    sys.excepthook = lambda *error: None


def raise_if_worker_died(error):
    """Raises RunError if a worker was killed. PyTorch's handler of SIGCHLD raises RuntimeError at any moment, unless
    reading from the dying worker raises EOFError or OSError first."""
    if not isinstance(error, RuntimeError | EOFError | OSError):
        return
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # that handler would raise here
    ended = wait([worker.sentinel for worker in STARTED], EXIT_TIME)
    for worker in STARTED:
        if worker.sentinel in ended:
            worker.join(EXIT_TIME)  # its pipes close before it has an exit code
    if any(worker.exitcode not in (None, 0) for worker in STARTED):
        raise RunError(f"a process that loads images died ({first_line(error)}); if memory ran out, lower --workers"
                       ) from None


def stack_images(images):
    """Images uint8 [3, h, w] of one size -> uint8 [N, h, w, 3], contiguous.

    Channels last is how they lie in memory. A host tensor of that shape is copied to any device as it is, where
    `augment.prepare` permutes it; torch_npu would first make a permuted one contiguous, on the CPU.
    """
    return torch.stack([image.permute(1, 2, 0) for image in images])
