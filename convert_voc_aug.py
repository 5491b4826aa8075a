"""Converts SBD's MATLAB labels to VOC's palette PNGs and writes the lists aug.txt and trainaug.txt:

    python convert_voc_aug.py data/VOCdevkit data/VOCdevkit/VOCaug --nproc 8

`--download` fetches both data sets first. An interrupted download or conversion resumes with the same command.
"""
import cli  # isort: skip  # it checks that the packages below are installed

import hashlib
import http.client
import multiprocessing
import shutil
import tarfile
import urllib.request
from concurrent.futures.process import BrokenProcessPool, ProcessPoolExecutor

import numpy as np
import scipy.io
from PIL import Image
from tqdm import tqdm

from files import check_writable, remove_leftovers, whole_file, write_whole
from voc import CLASSES, LISTS, OWN_LABELS, SBD_LABELS, palette, read_lines

FULL_COUNTS = {"aug": 9118, "trainaug": 10582}  # ids in the lists that the full data gives

# URL, MD5 (both from voc.py and sbd.py of torchvision.datasets) and the folder to unpack.
VOC_ARCHIVE = ("http://host.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar",
               "6cd6e144f989b92b3379bac3b3de84fd", "VOCdevkit/VOC2012")
SBD_ARCHIVE = ("https://www2.eecs.berkeley.edu/Research/Projects/CS/vision/grouping/semantic_contours/benchmark.tgz",
               "82b4d87ceb2ed10f6038a1cba92111cb", "benchmark_RELEASE/dataset")
TIMEOUT = 60  # seconds without a byte
CHUNK = 2 ** 20  # bytes


def parse_args(argv=None):
    parser = cli.Parser(prog="convert_voc_aug.py", description="Convert SBD's labels to VOC's format.")
    parser.add_argument("devkit", metavar="DEVKIT", type=cli.file_path,
                        help="the folder that holds VOC2012, say data/VOCdevkit")
    parser.add_argument("aug", metavar="AUG", type=cli.file_path,
                        help="SBD's folder, which holds dataset/cls or cls, say data/VOCdevkit/VOCaug")
    parser.add_argument("--nproc", type=cli.number(1, 1024), default=cli.usable_cores(), metavar="N",
                        help="worker processes (default: the CPU cores, here %(default)s)")
    parser.add_argument("-o", dest="out_dir", type=cli.file_path, metavar="DIR",
                        help="folder of the PNGs (default: DEVKIT/VOC2012/SegmentationClassAug, where train.py looks)")
    parser.add_argument("--download", action="store_true",
                        help="first download VOC 2012 (2 GB) to DEVKIT and SBD (1.4 GB) to AUG, unless they exist")
    return parser.parse_args(argv)


def main(args):
    voc = args.devkit / "VOC2012"
    if args.download:
        fetch(VOC_ARCHIVE, voc)
        fetch(SBD_ARCHIVE, args.aug / "dataset")
    lists = voc / LISTS
    if not lists.is_dir():
        raise cli.UserError(f"{lists}: there is no such folder; DEVKIT must hold VOC2012, which --download fetches")
    train, val = (set(read_lines(lists / f"{name}.txt")) for name in ("train", "val"))
    mats = sorted(args.aug.glob("dataset/cls/*.mat")) or sorted(args.aug.glob("cls/*.mat"))
    if not mats:
        raise cli.UserError(f"{args.aug}: holds no .mat files in dataset/cls or cls; AUG must hold SBD, which "
                            "--download fetches")
    out_dir = args.out_dir or voc / SBD_LABELS
    if out_dir.resolve() == (voc / OWN_LABELS).resolve():
        raise cli.UserError(f"{out_dir}: holds VOC's own labels, which SBD's would overwrite; name another folder "
                            "with -o")
    for folder in (lists, out_dir):
        check_writable(folder)
    out_dir.mkdir(parents=True, exist_ok=True)
    remove_leftovers([out_dir])

    convert_all(mats, out_dir, args.nproc)
    print(f"{out_dir}: labels of {len(mats):,} images")
    aug = {mat.stem for mat in mats} - train - val
    for name, ids in (("aug", aug), ("trainaug", aug | train)):
        write_whole(lists / f"{name}.txt", "".join(f"{image_id}\n" for image_id in sorted(ids)))
        full = FULL_COUNTS[name]
        note = "" if len(ids) == full else f" (note: the full data gives {full:,})"
        print(f"{name}.txt: {len(ids):,} images{note}")
    return 0


# ---- conversion

def convert_all(mats, out_dir, processes):
    """Converts the files in parallel.

    After an exception `cli.run` kills the workers. Ctrl-C therefore does not wait for a worker that hangs.
    """
    fork = multiprocessing.get_context("fork")  # the workers share the imports, which take seconds
    pool = ProcessPoolExecutor(min(processes, len(mats)), fork, cli.start_worker)
    try:
        with cli.held_signals():
            futures = [pool.submit(convert, mat, out_dir / f"{mat.stem}.png") for mat in mats]
        for future in tqdm(futures, "converting", unit="label", disable=None):
            future.result()
    except BrokenProcessPool:
        raise cli.UserError("a worker process was killed, perhaps because memory ran out; run the same command again "
                            "with a smaller --nproc to convert the remaining labels") from None
    pool.shutdown()


def convert(mat, png):
    """Converts a .mat file to a palette PNG unless that is done. Raises UserError if it holds no label."""
    if is_done(mat, png):
        return
    try:
        label = scipy.io.loadmat(mat, variable_names="GTcls")["GTcls"]["Segmentation"][0, 0]
    except Exception as error:  # SciPy raises many types on a damaged file
        raise cli.UserError(f"{mat}: cannot be read as an SBD label ({type(error).__name__}: "
                            f"{cli.first_line(error)}); unpack SBD again") from None
    if label.ndim != 2 or label.dtype != np.uint8 or label.size == 0 or label.max() >= len(CLASSES):
        raise cli.UserError(f"{mat}: is not an SBD label, which is uint8 [H, W] with values 0..{len(CLASSES) - 1}; "
                            "delete it")
    image = Image.fromarray(label)
    image.putpalette(palette().tobytes())
    with whole_file(png) as temporary:
        image.save(temporary, "PNG")


def is_done(mat, png):
    """True if the PNG is not older than the .mat file and can be decoded."""
    try:
        with Image.open(png) as image:
            image.load()
        return png.stat().st_mtime >= mat.stat().st_mtime
    except Exception:  # Pillow raises many types on a damaged file
        return False


# ---- download

def fetch(archive, target):
    """Downloads an archive (URL, MD5, folder) and unpacks its folder as `target`, unless that exists."""
    url, md5, inner = archive
    if target.exists():
        print(f"{target} exists, so it is not downloaded")
        return
    placed = target.parent / url.rsplit("/", 1)[-1]  # by the user
    part = placed.with_name(placed.name + ".part")  # with which the next call resumes if this one is interrupted
    file = placed if placed.exists() else part
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if file == part:
            receive(url, part)
        if md5_of(file) != md5:
            raise cli.UserError(f"{file}: its MD5 is not {md5}; run the same command again, which resumes a download, "
                                "or delete the file if that does not help")
        unpack(file, inner, target)
    except (OSError, http.client.HTTPException, tarfile.TarError) as error:  # also URLError
        raise cli.UserError(f"{url}: cannot be downloaded and unpacked as {target} ({cli.first_line(error)}); run the "
                            f"same command again to resume, or place the archive at {placed}") from None
    file.unlink()


def receive(url, part):
    """Downloads the bytes of a URL that the file `part` lacks."""
    # The last byte once more, or the server would refuse to send no bytes.
    start = max(0, part.stat().st_size - 1) if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
        if response.status != http.HTTPStatus.PARTIAL_CONTENT:
            start = 0  # the server sends the whole file
        total = start + int(response.headers["Content-Length"] or 0)  # a server may not know it
        with open(part, "ab") as out, tqdm.wrapattr(
                response, "read", total, desc=part.stem, initial=start, disable=None) as source:
            out.truncate(start)
            shutil.copyfileobj(source, out, CHUNK)


def md5_of(file):
    digest = hashlib.md5()
    with open(file, "rb") as stream:
        while chunk := stream.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def unpack(file, inner, target):
    """Unpacks the folder `inner` of a tar file as `target`, whole or not at all."""
    scratch = target.with_name(f".{target.name}.unpacking")
    shutil.rmtree(scratch, ignore_errors=True)  # left by a process that was killed
    try:
        with tarfile.open(file) as tar:
            # It refuses members that would be written outside the folder. Python before 3.10.12 lacks it.
            tar.extraction_filter = getattr(tarfile, "data_filter", None)
            tar.extractall(scratch, tqdm(tar, f"unpacking {file.name}", unit="file", disable=None))
        (scratch / inner).replace(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


if __name__ == "__main__":
    cli.run(main, parse_args)
