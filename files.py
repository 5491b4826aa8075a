"""Files that are written whole or not at all, and checks that a path can be written to."""
import contextlib
import fcntl
import functools
import json
import os
import platform
import re
import secrets
import shutil
import tempfile
from pathlib import Path

TEMPORARY = ".{}.tmp"  # name of a file that is being written; short, so that a long final name stays legal


@contextlib.contextmanager
def naming(path, message="{}"):
    """Makes an OSError of the block name the file `path`. message: takes the error's own text"""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, message.format(error.strerror or error), str(path)) from None


@contextlib.contextmanager
def whole_file(path):
    """Yields a temporary path in the folder of `path`. Renames it to `path` on success, deletes it on an exception.

    The temporary file is locked while its writer lives, which `remove_leftovers` respects. An OSError names `path`.
    """
    path = Path(path)
    temporary = path.with_name(TEMPORARY.format(secrets.token_hex(8)))
    try:
        with naming(path), open(temporary, "wb") as holder:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(holder, fcntl.LOCK_EX)
            yield temporary
            temporary.replace(path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def write_whole(path, content):
    """Writes text or bytes to `path`. After a power failure the file is the old one or the new one.

    Text becomes UTF-8, but for names of files that are not: these keep their bytes.
    """
    with whole_file(path) as temporary, open(temporary, "wb") as file:
        file.write(content.encode(errors="surrogateescape") if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())


def as_json(value):
    """A value as JSON in UTF-8: bytes. A byte XX of a name that is not UTF-8 becomes the escape \\udcXX.

    Indented, but a list of whole numbers, say a row of a confusion matrix, is one line.
    """
    text = re.sub(r"\n +(?=\d+,?\n)|(?<=\d)\n +(?=\])", " ", json.dumps(value, indent=2, ensure_ascii=False))
    return (text + "\n").encode(errors="backslashreplace")


def write_summary(folder, backbone, batch_size, cards, kind, values):
    """FCN_bs<batch>_<cards>p_<kind>.log: `Key = value` lines, as the Ascend port's scripts leave them."""
    case = f"FCN_bs{batch_size}_{cards}p_{kind}"
    lines = {"Network": "FCN", "Backbone": backbone, "RankSize": cards, "BatchSize": batch_size,
             "DeviceType": platform.machine(), "CaseName": case, **values}
    write_whole(folder / f"{case}.log", "".join(f"{key} = {value}\n" for key, value in lines.items()))


def link_or_copy(source, target):
    """Makes `target` a hard link to the file `source`, or a copy if the file system has no hard links."""
    with whole_file(target) as temporary:
        temporary.unlink()
        try:
            os.link(os.path.realpath(source), temporary)  # link() itself does not follow a symlink
        except OSError:
            shutil.copyfile(source, temporary)


def remove_leftovers(folders):
    """Deletes the temporary files in folders whose writers were killed. A link or a pipe of such a name is left."""
    names = [path for folder in folders for path in folder.glob(TEMPORARY.format(16 * "[0-9a-f]"))]
    for leftover in (path for path in names if path.is_file() and not path.is_symlink()):
        with contextlib.suppress(OSError), open(leftover, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises while the writer lives
            leftover.unlink()


def check_writable(folder):
    """Raises OSError unless files can be written into `folder` or, if it does not exist, its nearest parent."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    with naming(folder, "cannot be written to ({}); name another folder"), tempfile.TemporaryFile(dir=existing):
        pass


def check_no_overlap(read, written, flag):
    """Raises OSError if a file of `written` is one of `read`, be it through links."""
    inputs = set(map(os.path.realpath, read))
    for path in written:
        if os.path.realpath(path) in inputs:
            raise OSError(None, f"{flag} would overwrite this file; name another place", str(path))


def output_file(path, read, flag):
    """Checks that the file `path`, named by a flag, can be written and is none of `read`. -> what writes bytes to it

    What killed writers left in its folder is deleted. A link is followed. Devices, pipes and the command's own output
    are written to as they are. Raises OSError, also for a pipe that nobody reads: to open it would wait for a reader.
    """
    check_no_overlap(read, [path], flag)
    own = [number for number in (1, 2) if path.exists() and os.path.samestat(path.stat(), os.fstat(number))]
    message = "cannot be written to ({}); name a file in a folder that exists; if it is a pipe, start its reader first"
    with naming(path, message):
        if not own and (path.is_file() or not path.exists()):
            target = Path(os.path.realpath(path))
            tempfile.TemporaryFile(dir=target.parent).close()
            remove_leftovers([target.parent])
            return functools.partial(write_whole, target)
        # The command's own stands at the end of what was printed.
        descriptor = os.dup(own[0]) if own else os.open(path, os.O_WRONLY | os.O_NONBLOCK)
    os.set_blocking(descriptor, True)

    def write(content):
        with naming(path), open(descriptor, "wb") as file:
            file.write(content)
    return write
