"""What the command lines share: one spelling rule, one-line errors, number types, files that are whole or not there.

It imports nothing heavy, so that `--help` and a usage error answer at once; PyTorch alone takes seconds to import.
"""
import argparse
import contextlib
import importlib.util
import math
import signal
import sys
import tempfile
from pathlib import Path

MODULES = ("numpy", "PIL", "scipy", "tqdm", "matplotlib", "torch")  # without which no command runs
BACKBONES = ("resnet50_d8", "resnet101_d8", "resnet50", "vgg16")


class Parser(argparse.ArgumentParser):
    """An ArgumentParser in which `--data-path` is `--data_path`, and an error is one line and exit status 2."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, **kwargs)

    def parse_known_args(self, args=None, namespace=None):
        args = sys.argv[1:] if args is None else args
        # PyTorch's import comes next, which takes seconds: until `run` takes over, Ctrl-C ends without a traceback.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        parsed = super().parse_known_args([underscored(arg) for arg in args], namespace)
        missing = next((module for module in MODULES if importlib.util.find_spec(module) is None), None)
        if missing:
            self.exit(1, f"{self.prog}: error: this Python lacks {missing}; pip install -r requirements.txt, or use "
                         ".venv/bin/python, if run_1p.sh made it\n")
        return parsed

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message} (--help lists the flags)\n")


def underscored(arg):
    """`--data-path=my-data` -> `--data_path=my-data`; what is no long flag stays as it is."""
    if not arg.startswith("--"):
        return arg
    flag, equals, value = arg.partition("=")
    return "--" + flag[2:].replace("-", "_") + equals + value


def not_empty(text):
    """An argparse type: a path or name, which an unset variable of a shell would leave empty."""
    if not text:
        raise argparse.ArgumentTypeError("takes a name, not ''")
    return text


def file_path(text):
    """An argparse type: a pathlib.Path."""
    return Path(not_empty(text))


@contextlib.contextmanager
def whole_file(path):
    """Gives a name to write to; what is there at the end becomes the file `path`, which so is whole or not there.

    Without an end, by an exception, nothing is left. An OSError names `path`.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def check_writable(folder):
    """Raises OSError if nothing can be written into a folder, or into the one it would be made in: to be found before
    the work whose result it is to hold."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise OSError(error.errno, f"nothing can be written there ({error.strerror}); name another folder", str(folder)
                      ) from None


def check_new_file(path):
    """The same for a file, whose folder must be there."""
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise OSError(None, "no file can be written there; name one in a folder that exists", str(path))
    check_writable(path.parent)


def whole_number(minimum, maximum=2 ** 31):
    """An argparse type: an int of at least `minimum` and at most `maximum`."""
    def parse(text):
        try:
            number = int(text)
        except ValueError:
            number = None
        if number is None or number < minimum:
            raise argparse.ArgumentTypeError(f"takes a whole number of at least {minimum}, not '{text}'")
        if number > maximum:
            raise argparse.ArgumentTypeError(f"takes a whole number of at most {maximum}, not '{text}'")
        return number
    return parse


def non_negative(text):
    """An argparse type: a finite float of at least 0."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not (math.isfinite(number) and number >= 0):
        raise argparse.ArgumentTypeError(f"takes a number of at least 0, not '{text}'")
    return number


def positive(text, maximum=100):
    """An argparse type: a float above 0, up to a `maximum` that nobody means to pass."""
    number = non_negative(text)
    if not 0 < number <= maximum:
        raise argparse.ArgumentTypeError(f"takes a number above 0, up to {maximum}, not '{text}'")
    return number


def run(main, args, prog, errors):
    """Calls `main(args)` and exits with its status; what a user can mend ends as one line, without a traceback.

    `errors`: the exception classes whose message is meant for the user. OSError (disk full, no permission) is one too.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        sys.exit(main(args))
    except errors as error:
        sys.exit(f"{prog}: error: {error}")
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        sys.exit(f"{prog}: error: {where}{error.strerror or error}")
    except KeyboardInterrupt:
        print(f"{prog}: interrupted", file=sys.stderr)
        sys.exit(130)  # 128 + SIGINT, as shells report it
