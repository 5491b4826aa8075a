"""SBD's labels in VOC's form: MATLAB files to palette PNGs, and the lists `aug` and `trainaug`."""
import concurrent.futures
import concurrent.futures.process
import contextlib
import multiprocessing
import os
import signal
import threading

import numpy as np
import scipy.io
from PIL import Image
from tqdm import tqdm

from cli import kill_children
from download import fetch
from errors import DataError, RunError, first_line
from files import check_writable, read_lines, remove_leftovers, whole_file, write_whole
from palette import palette

NUM_CLASSES = 21
FULL_AUG, FULL_TRAINAUG = 9118, 10582  # ids in the lists made of the full data
STOPS = {signal.SIGINT, signal.SIGTERM}

# Address, MD5 (both as in torchvision.datasets' voc.py and sbd.py), and the folder inside the archive to unpack.
VOC_ARCHIVE = ("http://host.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar",
               "6cd6e144f989b92b3379bac3b3de84fd", "VOCdevkit/VOC2012")
SBD_ARCHIVE = ("https://www2.eecs.berkeley.edu/Research/Projects/CS/vision/grouping/semantic_contours/benchmark.tgz",
               "82b4d87ceb2ed10f6038a1cba92111cb", "benchmark_RELEASE/dataset")


def fetch_archives(devkit, aug):
    """Downloads VOC 2012 into the folder `devkit` and SBD into `aug`, unless they are there."""
    fetch(VOC_ARCHIVE, devkit / "VOC2012")
    fetch(SBD_ARCHIVE, aug / "dataset")


def convert_data_set(devkit, aug, out_dir, processes):
    """Converts the labels under `aug` and writes the lists of `devkit`. Returns a line for each .mat that is bad."""
    lists = devkit / "VOC2012" / "ImageSets" / "Segmentation"
    train, val = read_list(lists / "train.txt"), read_list(lists / "val.txt")
    folder = find_labels(aug)
    mats = sorted(folder.glob("*.mat"))
    if not mats:
        raise DataError(f"{folder}: holds no .mat files; unpack SBD again, or use --download")
    out_dir = out_dir or devkit / "VOC2012" / "SegmentationClassAug"
    if out_dir.resolve() == (devkit / "VOC2012" / "SegmentationClass").resolve():
        raise DataError(f"{out_dir}: SBD's labels would overwrite VOC's own there; name another folder by -o")
    for written in (lists, out_dir):
        check_writable(written)
    out_dir.mkdir(parents=True, exist_ok=True)
    remove_leftovers(out_dir)

    problems = convert_all(mats, out_dir, processes)
    extra = {mat.stem for mat in mats} - problems.keys() - train - val
    write_list(lists / "aug.txt", extra)
    write_list(lists / "trainaug.txt", extra | train)
    print(f"{out_dir}: labels of {len(mats) - len(problems):,} images")
    print(count_note("aug", len(extra), FULL_AUG))
    print(count_note("trainaug", len(extra | train), FULL_TRAINAUG))
    return list(problems.values())


def read_list(path):
    if not path.is_file():
        raise DataError(f"{path}: there is no such list; DEVKIT is the folder that holds VOC2012, or use --download")
    return set(read_lines(path))


def find_labels(aug):
    """SBD's folder of .mat files, under AUG/dataset or AUG."""
    for folder in (aug / "dataset" / "cls", aug / "cls"):
        if folder.is_dir():
            return folder
    raise DataError(f"{aug}: no SBD labels there (no folder dataset/cls or cls); AUG is where SBD was unpacked, "
                    "or use --download")


def convert_all(mats, out_dir, processes):
    """Converts the files in parallel. Returns {id: problem} of those that are no labels; kills the workers on an
    exception."""
    # fork: the workers share this process's imports, which take longer than many labels
    pool = concurrent.futures.ProcessPoolExecutor(
        min(processes, len(mats)), multiprocessing.get_context("fork"), start_worker)
    problems = {}
    with pool:
        try:
            with blocked_stops():
                futures = {pool.submit(convert, mat, out_dir / f"{mat.stem}.png"): mat.stem for mat in mats}
            done = concurrent.futures.as_completed(futures)
            for future in tqdm(done, "converting", len(futures), unit="label", disable=None):
                if future.result():
                    problems[futures[future]] = future.result()
        except BaseException as error:
            signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)  # the command ends now: a second Ctrl-C would only disturb
            kill_children()
            if isinstance(error, concurrent.futures.process.BrokenProcessPool):
                raise RunError("a process of --nproc was killed, perhaps because memory ran out; run the same command "
                               "again, with a smaller --nproc; it keeps the labels that are done") from None
            raise
    return dict(sorted(problems.items()))


@contextlib.contextmanager
def blocked_stops():
    """Holds SIGINT and SIGTERM back for the block. A worker forked in it never receives them: it is killed instead."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def start_worker():
    """Ends the worker when the main process does, say by SIGKILL."""
    def watch():
        multiprocessing.parent_process().join()
        os._exit(1)
    threading.Thread(target=watch, daemon=True).start()


def convert(mat, png):
    """Writes the label of a .mat file as a palette PNG, unless it is done. Returns the problem, a line, or None."""
    if is_done(png, mat):
        return None
    try:
        image = Image.fromarray(read_mat(mat))
    except DataError as error:
        return str(error)
    image.putpalette(palette().tobytes())
    with whole_file(png) as temporary:
        image.save(temporary, "PNG")
    return None


def is_done(png, mat):
    """Whether the PNG is newer than its .mat and can be read to its end."""
    try:
        if not (png.is_file() and mat.is_file() and png.stat().st_mtime >= mat.stat().st_mtime):
            return False
        with Image.open(png) as image:
            image.load()
        return True
    except Exception:  # Pillow raises whatever the damage leads to
        return False


def read_mat(path):
    """SBD's label of a .mat file: uint8 [H, W], 0..20. Raises DataError if it holds none."""
    if not path.is_file():  # opening a FIFO would wait for ever
        raise DataError(f"{path}: is not a file; delete it, or unpack SBD again")
    if len(path.stem.split()) != 1 or not path.stem.isprintable():  # the lists are split at white space
        raise DataError(f"{path}: its name is no image id; rename or delete it")
    try:
        label = scipy.io.loadmat(path, variable_names="GTcls")["GTcls"]["Segmentation"][0, 0]
    except Exception as error:  # SciPy raises whatever the damage leads to
        raise DataError(f"{path}: cannot be read as an SBD label ({type(error).__name__}: {first_line(error)}); "
                        "unpack SBD again") from None
    if label.ndim != 2 or label.dtype != np.uint8 or label.size == 0 or label.max() >= NUM_CLASSES:
        raise DataError(f"{path}: is no SBD label, which is uint8 [H, W] with values 0..{NUM_CLASSES - 1}")
    return label


def write_list(path, ids):
    write_whole(path, "".join(f"{image_id}\n" for image_id in sorted(ids)))


def count_note(name, count, full):
    note = "" if count == full else f" (note: the full data gives {full:,})"
    return f"{name}.txt: {count:,} images{note}"
