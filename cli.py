"""Command-line helpers: parser, argument types, error messages, signals, exit.

Every command imports this module first, before PyTorch. The body below prepares the process for that import.
"""
import argparse
import atexit
import contextlib
import ctypes
import gc
import importlib.util
import io
import math
import multiprocessing
import os
import re
import select
import signal
import sys
import threading
import traceback
from pathlib import Path

COMMANDS = ("train.py", "evaluate.py", "predict.py", "export.py", "convert_voc_aug.py")
PROG = Path(sys.argv[0]).name
REQUIREMENTS = ("numpy", "PIL", "scipy", "tqdm", "matplotlib", "torch")  # modules of requirements.txt
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)  # the last: Slurm's usual warning
TORCHRUN = "TORCHELASTIC_RUN_ID"  # a variable that torchrun sets in the ranks, and nothing else does
PR_SET_PDEATHSIG = 1  # of Linux's prctl: the signal that this process gets when its parent ends
SAVING_TIME = 300  # seconds that a run has to save after a signal, before it is killed; torchrun's own are 30
STOP_INTERVAL = 10  # iterations between two checks of the other ranks' signals on an accelerator
PATIENCE = 1  # seconds that a process which is to stop waits for the reader of its output
LARGEST = 2 ** 31  # limit of integer flags without another one
MAX_SIDE, MAX_BATCH = 2 ** 14, 2 ** 14  # pixels, images: beyond any memory
PARENT = os.getppid()


def end_with_parent(number, parent):
    """Asks Linux to send this process signal `number` when its parent ends. Exits if that has happened already."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:
        os._exit(128 + number)


if PROG in COMMANDS and Path(sys.argv[0]).resolve().parent == Path(__file__).resolve().parent:  # not imported elsewhere
    if sys.platform != "linux":  # macOS lacks /proc and prctl
        sys.exit(f"{PROG}: error: runs on Linux; on Windows, use WSL2; on macOS, a Linux container")
    for stop in STOP_SIGNALS if os.getpid() == 1 else ():  # in a container; a signal's default does not end process 1
        if signal.getsignal(stop) is not signal.SIG_IGN:
            signal.signal(stop, lambda number, frame: os._exit(128 + number))
    gc.disable()  # until `run`: an import leaves no garbage, and looking for some is a sixth of PyTorch's
    os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")  # or a broken torch_npu breaks `import torch`
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # else each failed try to connect prints a C++ stack
    if PROG == "predict.py":  # oneDNN keeps 1,024 operators, of which each shape of image takes a network's own
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # an import may swallow KeyboardInterrupt; `run` handles it
    if TORCHRUN in os.environ:  # a rank of torchrun: if the launcher is killed, it saves and ends
        end_with_parent(signal.SIGTERM, PARENT)
        file = os.environ.get("TORCHELASTIC_ERROR_FILE")
        if file and any(Path(file).parents[2].glob("*/refused")):
            os._exit(1)  # an attempt before this one ended by an error that will not go away
    missing = [name for name in REQUIREMENTS if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(f"{PROG}: error: this Python lacks {missing[0]}; pip install -r requirements.txt, or use "
                 ".venv/bin/python, if run_1p.sh made it")


class UserError(ValueError):
    """An error the user can fix: one line that names the file, the value and a hint.

    An OSError is one line, too: it may pass by itself, as a full disk or a lost process does.
    """


LASTING = (UserError, PermissionError, FileNotFoundError, NotADirectoryError)  # another attempt would raise them again


def first_line(error):
    """The first line of an exception's message, or its type if the message is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# ---- flags

class Parser(argparse.ArgumentParser):
    """An ArgumentParser for which `--data-path` is `--data_path`. An error is one line and exit status 2."""

    def __init__(self, description=None, **kwargs):
        super().__init__(prog=kwargs.pop("prog", PROG), description=description, allow_abbrev=False, **kwargs)
        self.register("type", None, not_empty)

    def parse_known_args(self, args=None, namespace=None):
        flag = re.compile("(?<=^--)[^=]+")
        args = sys.argv[1:] if args is None else map(str, args)
        args = [flag.sub(lambda name: name[0].replace("-", "_"), arg) for arg in args]
        return super().parse_known_args(args, namespace)

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message} (--help lists the flags)\n")


def not_empty(text):
    """The default argparse type: rejects '', the value of an unset shell variable."""
    if not text:
        raise argparse.ArgumentTypeError("takes a value, not ''")
    return text


def file_path(text):
    """An argparse type: pathlib.Path."""
    return Path(not_empty(text))


def number(low, high=LARGEST, kind=int, without=()):
    """An argparse type: an int, or a finite float if `kind` is float, in [low, high] and not in `without`."""
    bounds = f"{'above' if low in without else 'of at least'} {low}"
    if high not in (LARGEST, math.inf):
        bounds += f" and {'below' if high in without else 'at most'} {high}"

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high or value in without or not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"takes a {'whole ' * (kind is int)}number {bounds}, not '{text}'")
        return value
    return parse


def device_list(text):
    """An argparse type: `0,1,2` -> ["0", "1", "2"]."""
    devices = [str(number(0)(part)) for part in text.split(",")]
    if len(set(devices)) < len(devices):
        raise argparse.ArgumentTypeError(f"takes each device once, not '{text}'")
    return devices


def class_weights(text):
    """An argparse type: a file with a number of at least 0 on each line -> tuple of float."""
    path = file_path(text)
    try:
        weights = tuple(map(number(0, math.inf, float), path.read_text(encoding="utf-8-sig").split()))
    except (OSError, UnicodeDecodeError, argparse.ArgumentTypeError) as error:
        raise argparse.ArgumentTypeError(f"{text}: {getattr(error, 'strerror', error)}") from None
    if not any(weights):
        raise argparse.ArgumentTypeError(f"{text}: holds no number above 0")
    return weights


def flag_or_env(flag, given, variable):
    """`given`, the value of a flag; if that is None, the whole number in an environment variable, or None without one.

    If both are there and differ, a line says that the flag wins.
    """
    value = os.environ.get(variable, "")
    if given is None and value:
        if not value.isdecimal():
            raise UserError(f"{variable}={value}: takes a whole number of at least 0; change it, or add {flag}")
        return int(value)
    if value not in ("", str(given)):
        print(f"{PROG}: {variable}={value} is set, {flag} {given} wins over it", file=sys.stderr)
    return given


# ---- processes

def usable_cores(root=Path("/sys/fs/cgroup")):
    """How many cores this process may use: its affinity, or the CPU quota of its container.

    root: the container's control group, of version 2 or 1
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    for names in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        with contextlib.suppress(OSError):  # no such file
            quota, period = " ".join((root / name).read_text() for name in names).split()
            if quota.isdecimal():  # none: "max", -1
                cores = min(cores, int(quota) // int(period))
    return max(1, cores)


class HandledStops(contextlib.ExitStack):
    """A context in which the stop signals call `handler`, unless they are ignored, as SIGHUP by nohup.

    No signal mask: that is of one thread, and Python runs its handlers in the main thread, whichever gets the signal.
    """

    def __init__(self, handler):
        super().__init__()
        for stop in STOP_SIGNALS:
            if signal.getsignal(stop) is not signal.SIG_IGN:
                self.callback(signal.signal, stop, signal.signal(stop, handler))


@contextlib.contextmanager
def held_signals():
    """Holds the stop signals back for the block, in which workers start: these record them until `start_worker`.

    The DataLoader's handler of SIGCHLD goes: it raises wherever the process is when a worker is killed. Without it the
    loader finds that within 5 s.
    """
    held = []
    try:
        with HandledStops(lambda number, frame: held.append(number)):
            yield
    finally:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for number in held:
            signal.raise_signal(number)


class Stop(HandledStops):
    """The stop signals in a training of one or several ranks. A context, which restores what handled them before.

    At first, and during an evaluation, a signal ends the process at once: everything is saved. While `deferred`,
    `agreed` tells all ranks to stop after the same iteration.
    ranks: a device.Ranks
    """

    def __init__(self, ranks):
        self.ranks, self.number, self.deferred, self.trains = ranks, 0, False, False
        super().__init__(self.record)
        self.callback(signal.alarm, 0)

    def __exit__(self, kind, error, trace):
        if error:
            error.late = self.trains  # raised after the first iteration
        return super().__exit__(kind, error, trace)

    def record(self, number, frame):
        """The signal handler. A second Ctrl-C ends the process at once; Slurm sends SIGTERM twice."""
        ends = not self.deferred or number == signal.SIGINT == self.number
        self.number = number  # where Python drops an exception, as in a destructor, `agreed` stops the run
        signal.alarm(SAVING_TIME)  # ends a run that cannot stop, say because a dead file server blocks the loader
        Output.stopping = True
        if ends:
            HandledStops(late_stop)
            sys.exit(self.status(number))

    @contextlib.contextmanager
    def at_once(self):
        """A context for an evaluation, before which all is saved: a signal ends the process at once."""
        self.deferred = False
        if self.number:
            sys.exit(self.status(self.number))
        yield
        self.deferred = True

    def agreed(self, iteration):
        """The signal on which the run stops after this iteration, else 0; the same in every rank."""
        self.trains = True
        if self.ranks.count > 1 and self.ranks.device.type != "cpu" and iteration % STOP_INTERVAL:
            return 0  # asking waits for the device
        return self.ranks.largest(self.number)

    def leave(self, number):
        """Ends all ranks together, once rank 0 has saved. -> the exit status"""
        status = self.status(number) if self.ranks.local_rank == 0 else 128 + number
        self.ranks.largest(0)  # a barrier
        return status

    def status(self, number):
        """The exit status after a signal. Passes it to torchrun first, which then does not restart the ranks.

        If a rank has died, the signal is torchrun's, to the peers of a failed rank, and it may restart them.
        """
        if TORCHRUN in os.environ:
            if not all(os.path.exists(f"/proc/{pid}") for pid in self.ranks.pids):
                return 1
            # Once a machine: torchrun, which may have it from the user already, leaves its ranks alone at the third.
            if os.getppid() == PARENT and first_to("stopped"):
                os.kill(PARENT, number)
        return 128 + number


def start_worker(*_):
    """The first call of a worker process. The worker is killed when its parent ends, and ignores the stop signals:
    terminals and schedulers send these to every process, but the parent needs its workers until it has stopped."""
    end_with_parent(signal.SIGKILL, multiprocessing.parent_process().pid)
    for stop in STOP_SIGNALS:
        signal.signal(stop, signal.SIG_IGN)
    sys.excepthook = lambda *error: None  # of a queue's thread, when the parent has died


def kill_children():
    """Begins the end of this process: kills its workers, which ignore SIGTERM and for which Python would wait."""
    HandledStops(late_stop)  # not SIG_IGN: Python prints an error for a signal that came just before that
    threading.excepthook = lambda error: None  # a thread of a pool may raise
    for child in multiprocessing.active_children():
        child.kill()


# ---- output, and the end of a command

class Output(io.FileIO):
    """stdout (1) or stderr (2). It waits for a reader that is behind, but not after a stop signal.

    What cannot be written is dropped: a message that nobody can read interrupts no command.
    """
    stopping = False  # this process got a stop signal
    problem = None  # the first OSError of stdout

    def write(self, data):
        """Writes as much as fits into a pipe that has room. -> the number of bytes"""
        try:
            while not select.select([], [self], [], PATIENCE)[1]:
                if Output.stopping:
                    raise OSError(None, "nobody reads it")
            return super().write(data[:select.PIPE_BUF])
        except OSError as error:
            if self.fileno() == 1:
                Output.problem = OSError(error.errno, f"the output cannot be written to ({error.strerror})")
            discard(self.fileno())
            return len(data)


def discard(descriptor):
    """What is written to a descriptor of this process goes nowhere from now on."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)


def late_stop(number, frame):
    """The handler of a stop signal in a process that ends already. A second Ctrl-C ends it at once."""
    Output.stopping = True
    if number == signal.SIGINT:
        signal.signal(number, signal.SIG_DFL)


def interrupted(number, frame):
    """The handler of Ctrl-C."""
    late_stop(number, frame)
    sys.exit(128 + number)


def dropped(unraisable):
    """sys.unraisablehook: hides a stop signal's exit where Python drops it, as in a destructor or a fork's hook."""
    if not isinstance(unraisable.exc_value, SystemExit):
        sys.__unraisablehook__(unraisable)


def run(main, parse_args):
    """Calls `main(parse_args())` and exits with its status. An error that the user can fix is one line.

    Of several ranks on a machine, only the first to fail prints its error. No worker process is left.
    """
    gc.freeze()  # what was imported
    gc.enable()
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, interrupted)
    sys.unraisablehook = dropped
    for descriptor, name in enumerate(("stdout", "stderr"), 1):
        if getattr(sys, name) is None:  # closed by the caller; a file opened later must not become it
            discard(descriptor)
        buffer = io.BufferedWriter(Output(descriptor, "w", closefd=False))
        # A name that is not UTF-8 keeps its bytes.
        setattr(sys, name, io.TextIOWrapper(buffer, "utf-8", "surrogateescape", line_buffering=True))
    try:
        status = main(parse_args())
        sys.stdout.flush()
        if not status and Output.problem:
            raise Output.problem
        kill_children()
    except BaseException as error:
        kill_children()  # while the error holds its frames: a DataLoader waits 5 s for each worker when they are freed
        if isinstance(error, SystemExit):
            stops = {128 + stop: f"{PROG}: stopped by {stop.name}" for stop in STOP_SIGNALS}
            status, message = error.code, stops.get(error.code)
        elif hasattr(error, "sigval"):  # torchrun's; it raises that in the launcher for any signal, whatever it is at
            status, message = 128 + error.sigval, None
        else:
            status, message = 1, message_of(error)
        if message and first_to("failed"):
            print(message, file=sys.stderr)
            if isinstance(error, LASTING) and not getattr(error, "late", False):
                first_to("refused")
    # No finalization of Python: it would end a thread of gloo or of a loader that takes the GIL meanwhile, inside a C++
    # destructor, which aborts the process (PyTorch's issues 38228 and 190489).
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(status or 0)


def first_to(name):
    """True for the first rank of this machine that calls it with this name. torchrun makes a folder for each attempt,
    which the ranks share: the first creates a file there. False if the launcher has gone and deleted it."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    try:
        return not file or Path(file).parents[1].joinpath(name).touch(exist_ok=False) is None
    except (FileExistsError, FileNotFoundError):
        return False


def message_of(error):
    """What the user reads of an exception: one line if the user can fix it, else the traceback.

    The DataLoader raises a worker's error anew, with the worker's traceback as its message.
    """
    line = (str(error).strip() or type(error).__name__).splitlines()[-1]
    line = line.removeprefix(f"{type(error).__module__}.{type(error).__name__}: ")
    lost = isinstance(error, ConnectionResetError | ConnectionRefusedError | EOFError)  # the worker's end of a pipe
    if lost or "DataLoader worker (pid" in str(error):
        line = f"a process that loads images died ({first_line(error)}); if memory ran out, lower --workers"
    elif isinstance(error, BlockingIOError) or "can't start new thread" in str(error):
        line = f"no more threads or processes can be started ({line}); raise ulimit -u, or a container's limit of pids"
    elif isinstance(error, OSError):
        line = (f"{error.filename}: " if error.filename else "") + (error.strerror or line)
    elif not isinstance(error, UserError):
        return "".join(traceback.format_exception(error)).rstrip()
    return f"{PROG}: error: {line}"
