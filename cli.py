"""What the command lines share: how flags are spelled, the types of their values, errors of one line, how they end.

It imports nothing heavy, so that `--help` and usage errors answer at once.
"""
import argparse
import atexit
import contextlib
import math
import multiprocessing
import os
import signal
import sys
import traceback
from pathlib import Path

from errors import UserError

REQUIREMENTS = ("numpy", "PIL", "scipy", "tqdm", "matplotlib", "torch")  # the modules of requirements.txt
LARGEST = 2 ** 31  # of flags without another limit
INTERRUPTED = 128 + signal.SIGINT  # the exit status, as shells report a signal


class Parser(argparse.ArgumentParser):
    """An ArgumentParser for which `--data-path` is `--data_path`; an error is one line and exit status 2."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, **kwargs)
        self.register("type", None, not_empty)

    def parse_known_args(self, args=None, namespace=None):
        args = sys.argv[1:] if args is None else args
        return super().parse_known_args([underscored(arg) for arg in args], namespace)

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message} (--help lists the flags)\n")


def underscored(arg):
    """`--data-path=my-data` -> `--data_path=my-data`; anything but a long flag is returned as it is."""
    if not arg.startswith("--"):
        return arg
    flag, equals, value = arg.partition("=")
    return "--" + flag[2:].replace("-", "_") + equals + value


def not_empty(text):
    """The type of a flag that names none: text that is not empty, as an unset variable of a shell would be."""
    if not text:
        raise argparse.ArgumentTypeError("takes a value, not ''")
    return text


def file_path(text):
    """An argparse type: a pathlib.Path."""
    return Path(not_empty(text))


def number(low, high=LARGEST, kind=int, without=()):
    """An argparse type: an int, or with `kind` a finite float, from `low` to `high`, but none of `without`."""
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


def class_weights(text):
    """An argparse type: a file of numbers of at least 0, one a line -> a tuple of float."""
    try:
        weights = tuple(map(number(0, math.inf, float), file_path(text).read_text(encoding="utf-8").split()))
    except (OSError, UnicodeDecodeError) as error:
        raise argparse.ArgumentTypeError(f"{text}: cannot be read ({error})") from None
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{text}: a line {error}") from None
    if not any(weights):
        raise argparse.ArgumentTypeError(f"{text}: holds no number above 0")
    return weights


def usable_cores():
    """How many cores this process may use; a container or a scheduler may grant fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def run(main, prog):
    """Calls `main()` and exits with the status that it returns. Errors that the user can mend are one line.

    At the end no process started by this one is left, not even one that ignores signals.
    """
    if sys.platform == "win32":
        sys.exit(f"{prog}: error: runs on Linux; on Windows, run it in WSL2")
    os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")  # or a broken torch_npu breaks `import torch`
    for descriptor, name in enumerate(("stdout", "stderr"), 1):
        if getattr(sys, name) is None:  # closed by the caller; a file opened later must not become it
            os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
            setattr(sys, name, open(descriptor, "w"))
        getattr(sys, name).reconfigure(errors="backslashreplace")  # class names in any script, under LC_ALL=C, too
    try:
        status = main()
    except KeyboardInterrupt:
        print(f"{prog}: interrupted", file=sys.stderr)
        status = INTERRUPTED
    except SystemExit as ending:
        status = ending.code
    except Exception as error:
        status = message_of(error, prog)
    kill_children()
    leave(status)


def message_of(error, prog):
    """What the user reads of an exception: one line where they can mend it, else the traceback."""
    if isinstance(error, UserError):
        return f"{prog}: error: {error}"
    if isinstance(error, OSError):
        return f"{prog}: error: {f'{error.filename}: ' if error.filename else ''}{error.strerror or error}"
    if isinstance(error, ModuleNotFoundError) and error.name in REQUIREMENTS:
        return (f"{prog}: error: this Python lacks {error.name}; pip install -r requirements.txt, or use "
                ".venv/bin/python, if run_1p.sh made it")
    return "".join(traceback.format_exception(error)).rstrip()


def leave(status):
    """Exits with a status as sys.exit does, but without Python's finalization where PyTorch is loaded.

    A thread of gloo or of a loader that takes the GIL during the finalization is ended by Python, inside a C++
    destructor, which aborts the process (PyTorch's issues 38228 and 190489).
    """
    if "torch" not in sys.modules:
        sys.exit(status)
    if isinstance(status, str):
        print(status, file=sys.stderr)
        status = 1
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # nobody reads it any more
            stream.flush()
    os._exit(status or 0)


def kill_children():
    """Ends the processes that load images. They ignore SIGTERM (see loader.py), which Python would send and wait."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler raises when one is killed
    for child in multiprocessing.active_children():
        child.kill()
