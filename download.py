"""Downloads an archive, checks its MD5 and unpacks a folder of it."""
import contextlib
import fcntl
import hashlib
import http
import http.client
import os
import shutil
import sys
import tarfile
import urllib.error
import urllib.request

from tqdm import tqdm

from errors import UserError, first_line
from files import check_writable

TIMEOUT = 60  # seconds without a byte
CHUNK = 2 ** 20  # bytes
NOTHING_LEFT = http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE  # the file ends where the wanted range begins, or before


class DownloadError(UserError):
    """An archive that cannot be downloaded, or is not the expected one."""


def fetch(archive, target):
    """Downloads an archive and unpacks its folder as `target`, unless that exists. `archive`: (URL, MD5, folder)."""
    url, md5, inner = archive
    if not hasattr(tarfile, "data_filter"):
        raise DownloadError(f"Python {sys.version.split()[0]} cannot unpack safely; take a newer release")
    if not target.parent.is_dir():
        check_writable(target.parent)
        target.parent.mkdir(parents=True, exist_ok=True)
    with locked(target.parent):
        if target.exists():
            print(f"{target} exists, so it is not downloaded")
            return
        file = target.parent / url.rsplit("/", 1)[-1]
        try:
            if not file.exists():
                download(url, md5, file)
            elif md5_of(file) != md5:
                raise DownloadError(f"{file}: its MD5 is not {md5}; delete it and try again")
            unpack(file, inner, target)
        except OSError as error:  # of the disk, say that it is full; those of the network are DownloadErrors by now
            raise OSError(error.errno, error.strerror or str(error), str(error.filename or file)) from None
        file.unlink()


@contextlib.contextmanager
def locked(folder):
    """Makes other commands that would download into a folder wait, so that they find the result."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def download(url, md5, file):
    """Fetches a URL to `file` by way of FILE.part, which a later call continues. Starts over if that is of another
    version. Raises DownloadError if the whole has another MD5."""
    part = file.with_name(file.name + ".part")
    continued = True
    while continued:
        continued = receive(url, part)
        if md5_of(part) == md5:
            part.replace(file)
            return
        part.unlink()
    raise DownloadError(f"{url}: the download's MD5 is not {md5}, so it broke off or is another file; it was deleted, "
                        f"try again, or place the archive at {file}")


def receive(url, part):
    """Downloads what the file `part` lacks. Returns whether its old content was kept."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    with contextlib.closing(on_network(part, url, urllib.request.urlopen, request, timeout=TIMEOUT)) as response:
        if have and response.status == NOTHING_LEFT:
            return True
        continued = have > 0 and response.status == http.HTTPStatus.PARTIAL_CONTENT  # else the file comes whole
        have = have if continued else 0
        length = response.headers.get("Content-Length", "")  # servers that make the answer on the fly send none
        total = have + int(length) if length.isdecimal() else None
        with open(part, "ab" if continued else "wb") as out, tqdm(
                desc=part.stem, total=total, initial=have, unit="B", unit_scale=True, disable=None) as bar:
            while chunk := on_network(part, url, response.read, CHUNK):
                out.write(chunk)
                bar.update(len(chunk))
                have += len(chunk)
    if total and have < total:
        raise DownloadError(f"{url}: broke off {total - have} bytes before its end; try again, which continues it")
    return continued


def on_network(part, url, call, *args, **kwargs):
    """Calls `call`, whose errors become DownloadErrors; a response of status NOTHING_LEFT is returned."""
    try:
        return call(*args, **kwargs)
    except urllib.error.HTTPError as error:
        if error.code == NOTHING_LEFT:
            return error
        reason = f"HTTP {error.code} {error.reason}"
    except (OSError, http.client.HTTPException) as error:  # URLError is an OSError
        reason = first_line(getattr(error, "reason", error))
    raise DownloadError(f"{url}: cannot be downloaded ({reason}); try again, which continues it, or place the archive "
                        f"at {part.with_suffix('')}")


def md5_of(file):
    digest = hashlib.md5()
    with open(file, "rb") as stream:
        while chunk := stream.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def unpack(file, inner, target):
    """Unpacks the folder `inner` of a tar file as `target`, whole or not at all. tarfile's filter "data" refuses
    members that would leave the folder, devices and the like."""
    scratch = target.with_name(f".{target.name}.unpacking")
    shutil.rmtree(scratch, ignore_errors=True)  # of an unpacking that was killed
    try:
        with tarfile.open(file) as tar:
            tar.extractall(scratch, tqdm(tar, f"unpacking {file.name}", unit="file", disable=None), filter="data")
        if not (scratch / inner).is_dir():
            raise DownloadError(f"{file}: holds no folder {inner}; delete it and try again")
        (scratch / inner).replace(target)
    except (tarfile.TarError, EOFError) as error:
        raise DownloadError(f"{file}: does not unpack ({first_line(error)}); delete it and try again") from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
