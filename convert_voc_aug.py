"""Turns SBD's MATLAB labels into VOC's palette PNGs and writes the lists `aug` and `trainaug`:
`python convert_voc_aug.py data/VOCdevkit data/VOCdevkit/VOCaug --nproc 8`; `--download` fetches both data sets first.

A label is written whole or not at all, and one that is there is not done again, so an interrupted run goes on.
"""
import concurrent.futures
import concurrent.futures.process
import hashlib
import multiprocessing
import os
import signal
import sys
import tarfile
import threading
import urllib.error
import urllib.request
from pathlib import Path

from cli import Parser, run, whole_file, whole_number

NUM_CLASSES = 21
FULL_AUG, FULL_TRAINAUG = 9118, 10582  # ids in the lists made of the full data
TIMEOUT = 60  # seconds without a byte
CHUNK = 2 ** 20

# Address, MD5 (both as in torchvision.datasets' voc.py and sbd.py), and the folder inside the archive to unpack.
VOC_ARCHIVE = ("http://host.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar",
               "6cd6e144f989b92b3379bac3b3de84fd", "VOCdevkit/VOC2012")
SBD_ARCHIVE = ("https://www2.eecs.berkeley.edu/Research/Projects/CS/vision/grouping/semantic_contours/benchmark.tgz",
               "82b4d87ceb2ed10f6038a1cba92111cb", "benchmark_RELEASE/dataset")


def parse_args():
    parser = Parser(prog="convert_voc_aug.py", description="Turn SBD's labels into VOC's form.")
    parser.add_argument("devkit", metavar="DEVKIT", type=Path, help="the folder that holds VOC2012, say data/VOCdevkit")
    parser.add_argument("aug", metavar="AUG", type=Path,
                        help="SBD's folder, with dataset/cls or cls in it, say data/VOCdevkit/VOCaug")
    parser.add_argument("--nproc", type=whole_number(1), default=os.cpu_count(), metavar="N",
                        help="processes (default: %(default)s)")
    parser.add_argument("-o", dest="out_dir", type=Path, metavar="DIR",
                        help="where the PNGs go (default: DEVKIT/VOC2012/SegmentationClassAug, where train.py looks)")
    parser.add_argument("--download", action="store_true",
                        help="fetch VOC 2012 (2 GB) into DEVKIT and SBD (1.4 GB) into AUG first, unless they are there")
    return parser.parse_args()


if __name__ == "__main__":
    ARGS = parse_args()  # before SciPy and NumPy are imported: a usage error answers at once

import numpy as np  # noqa: E402
import scipy.io  # noqa: E402
from PIL import Image  # noqa: E402
from tqdm import tqdm  # noqa: E402

from voc import palette  # noqa: E402


class ConvertError(ValueError):
    """Data that cannot be had or converted; the message is one line for the user."""


def fetch(archive, target):
    """Downloads an archive, checks its MD5 and unpacks the folder it is for to `target`, unless that is there.

    A broken-off download goes on where it was. Raises ConvertError if it fails or the file is not the expected one.
    """
    url, md5, inner = archive
    if target.exists():
        print(f"{target} is there, not downloaded again")
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    file = target.parent / url.rsplit("/", 1)[-1]
    if not file.exists():
        download(url, file)
    if md5_of(file) != md5:
        file.unlink()
        raise ConvertError(f"{url}: the download's MD5 is not {md5}, and it was deleted; try again")
    unpack(file, inner, target)
    file.unlink()


def download(url, file):
    """Fetches a URL into a file, by way of FILE.part, from which a later call goes on."""
    part = file.with_name(file.name + ".part")
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
            resumed = getattr(response, "status", None) == 206  # Partial Content; else the file comes whole
            have = have if resumed else 0
            left = int(response.headers["Content-Length"])
            with open(part, "ab" if resumed else "wb") as out, tqdm(
                    desc=file.name, total=have + left, initial=have, unit="B", unit_scale=True, disable=None) as bar:
                while chunk := response.read(CHUNK):
                    out.write(chunk)
                    bar.update(len(chunk))
                    left -= len(chunk)
    except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
        raise ConvertError(f"{url}: cannot be downloaded ({getattr(error, 'reason', error)}); try again, it goes on "
                           f"where it was, or place the archive at {file}") from None
    if left:
        raise ConvertError(f"{url}: broke off {left} bytes before its end; try again, it goes on where it was")
    part.replace(file)


def md5_of(file):
    digest = hashlib.md5()
    with open(file, "rb") as stream:
        while chunk := stream.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def unpack(file, inner, target):
    """Unpacks the folder `inner` of a tar file as `target`, whole or not at all. Members that would leave the folder,
    and devices and the like, are refused (tarfile's filter "data")."""
    if not hasattr(tarfile, "data_filter"):
        raise ConvertError(f"Python {sys.version.split()[0]} cannot unpack safely; take Python 3.11.4 or later")
    scratch = target.with_name(f".{target.name}.unpacking")
    try:
        with tarfile.open(file) as tar:
            tar.extractall(scratch, tqdm(tar, f"unpacking {file.name}", unit="file", disable=None), filter="data")
    except (tarfile.TarError, EOFError) as error:
        raise ConvertError(f"{file}: does not unpack ({error}); delete it and try again") from None
    if not (scratch / inner).is_dir():
        raise ConvertError(f"{file}: holds no folder {inner}; delete it and try again")
    (scratch / inner).replace(target)


def find_labels(aug):
    """SBD's folder of .mat files, under AUG/dataset or AUG."""
    for folder in (aug / "dataset" / "cls", aug / "cls"):
        if folder.is_dir():
            return folder
    raise ConvertError(f"{aug}: no SBD labels there (no folder dataset/cls or cls); AUG is where SBD was unpacked, "
                       "or use --download")


def read_list(path):
    if not path.is_file():
        raise ConvertError(f"{path}: there is no such list; DEVKIT is the folder that holds VOC2012, "
                           "or use --download")
    try:
        return set(path.read_text(encoding="utf-8-sig").split())
    except UnicodeDecodeError:
        raise ConvertError(f"{path}: the list is not UTF-8 text; save it as that") from None


def read_mat(path):
    """SBD's label of a .mat file: uint8 [H, W], 0..20. Raises ConvertError for what is no such file."""
    try:
        label = scipy.io.loadmat(path, variable_names="GTcls")["GTcls"]["Segmentation"][0, 0]
    except Exception as error:  # SciPy raises whatever the damage leads to
        raise ConvertError(f"{path}: cannot be read as an SBD label ({type(error).__name__}: {error})") from None
    if label.ndim != 2 or label.dtype != np.uint8 or label.size == 0 or label.max() >= NUM_CLASSES:
        raise ConvertError(f"{path}: is no SBD label, which is uint8 [H, W] with values 0..{NUM_CLASSES - 1}")
    return label


def is_done(png, mat):
    """Whether the PNG is newer than its .mat and reads to its end."""
    try:
        with Image.open(png) as image:
            image.load()
        return png.stat().st_mtime >= mat.stat().st_mtime
    except (OSError, SyntaxError):
        return False


def convert(mat, png):
    """Writes the label of a .mat file as a palette PNG. -> the problem, as a line, or None."""
    if is_done(png, mat):
        return None
    try:
        image = Image.fromarray(read_mat(mat))
    except ConvertError as error:
        return str(error)
    image.putpalette(palette().tobytes())
    with whole_file(png) as temporary:
        image.save(temporary, "PNG")
    return None


def start_worker():
    """Ctrl-C reaches the workers, too, but they finish their file; without the main process they end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch():
        multiprocessing.parent_process().join()
        os._exit(1)
    threading.Thread(target=watch, daemon=True).start()


def convert_all(mats, out_dir, processes):
    """Converts the files in parallel. -> {id: problem, a line} of those that could not be."""
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConvertError(f"{out_dir}: labels cannot be written there ({error.strerror}); name another folder by -o"
                           ) from None
    with concurrent.futures.ProcessPoolExecutor(processes, initializer=start_worker) as pool:
        futures = [pool.submit(convert, mat, out_dir / f"{mat.stem}.png") for mat in mats]
        try:
            done = concurrent.futures.as_completed(futures)
            for _ in tqdm(done, "converting", len(futures), unit="label", disable=None):
                pass
            problems = {mat.stem: future.result() for mat, future in zip(mats, futures)}
        except concurrent.futures.process.BrokenProcessPool:
            raise ConvertError("a process of --nproc was killed, perhaps for want of memory; run the same command "
                               "again, it goes on where it was") from None
        except BaseException:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C must not cut the files under way short
            pool.shutdown(cancel_futures=True)
            raise
    return {image_id: problem for image_id, problem in problems.items() if problem}


def write_list(path, ids):
    with whole_file(path) as temporary:
        temporary.write_text("".join(f"{image_id}\n" for image_id in sorted(ids)))


def count_note(name, count, full):
    note = "" if count == full else f" (note: the full data gives {full:,})"
    return f"{name}.txt: {count:,} images{note}"


def main(args):
    if args.download:
        fetch(VOC_ARCHIVE, args.devkit / "VOC2012")
        fetch(SBD_ARCHIVE, args.aug / "dataset")
    lists = args.devkit / "VOC2012" / "ImageSets" / "Segmentation"
    train, val = read_list(lists / "train.txt"), read_list(lists / "val.txt")
    folder = find_labels(args.aug)
    mats = sorted(folder.glob("*.mat"))
    if not mats:
        raise ConvertError(f"{folder}: holds no .mat files; unpack SBD again, or use --download")
    out_dir = args.out_dir or args.devkit / "VOC2012" / "SegmentationClassAug"

    problems = convert_all(mats, out_dir, args.nproc)
    aug = {mat.stem for mat in mats} - problems.keys() - train - val
    write_list(lists / "aug.txt", aug)
    write_list(lists / "trainaug.txt", aug | train)
    print(f"{out_dir}: labels of {len(mats) - len(problems):,} images")
    print(count_note("aug", len(aug), FULL_AUG))
    print(count_note("trainaug", len(aug | train), FULL_TRAINAUG))
    for problem in problems.values():
        print(f"convert_voc_aug.py: error: {problem}", file=sys.stderr)
    if problems:
        print("convert_voc_aug.py: error: the lists leave these out; mend the files and run the same command again",
              file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    run(main, ARGS, "convert_voc_aug.py", ConvertError)
