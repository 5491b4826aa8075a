"""Files that are written whole or not at all, and checks that a path can be written to."""
import contextlib
import fcntl
import os
import secrets
import shutil
import tempfile
from pathlib import Path

TEMPORARY = ".{}.tmp"  # name of a file that is being written; short, so that a long final name stays legal


@contextlib.contextmanager
def whole_file(path):
    """Yields a temporary path in the folder of `path`. Renames it to `path` on success, deletes it on an exception.

    The temporary file is locked while its writer lives, which `remove_leftovers` respects. An OSError names `path`.
    """
    path = Path(path)
    temporary = path.with_name(TEMPORARY.format(secrets.token_hex(8)))
    try:
        with open(temporary, "wb") as holder:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(holder, fcntl.LOCK_EX)
            yield temporary
            temporary.replace(path)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def write_whole(path, content):
    """Writes text (UTF-8) or bytes to `path`. After a power failure the file is the old one or the new one."""
    with whole_file(path) as temporary, open(temporary, "wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())


def link_or_copy(source, target):
    """Makes `target` a hard link to the file `source`, or a copy if the file system has no hard links."""
    with whole_file(target) as temporary:
        temporary.unlink()
        try:
            os.link(os.path.realpath(source), temporary)  # link() itself does not follow a symlink
        except OSError:
            shutil.copyfile(source, temporary)


def remove_leftovers(folder):
    """Deletes the temporary files in a folder whose writers were killed."""
    for leftover in folder.glob(TEMPORARY.format(16 * "[0-9a-f]")):
        with contextlib.suppress(OSError), open(leftover, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises while the writer lives
            leftover.unlink()


def check_writable(folder):
    """Raises OSError unless files can be written into `folder` or, if it does not exist, its nearest parent."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise OSError(error.errno, f"cannot be written to ({error.strerror}); name another folder",
                      str(folder)) from None


def check_new_file(path):
    """Raises OSError unless the file `path` can be written. Its folder must exist."""
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise OSError(None, "cannot be written; name a file in a folder that exists", str(path))
    check_writable(path.parent)


def check_no_overlap(read, written, flag):
    """Raises OSError if a file of `written` is one of `read`, be it through links."""
    inputs = set(map(os.path.realpath, read))
    for path in written:
        if os.path.realpath(path) in inputs:
            raise OSError(None, f"{flag} would overwrite this file; name another place", str(path))
