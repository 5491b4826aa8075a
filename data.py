"""The data of a run: the names of the classes, the lists, and the data set that holds them."""
import dataclasses
import hashlib
from pathlib import Path

import numpy as np

from errors import DataError
from voc import CLASSES, LISTS, VOC, read_classes

DATA_SET = VOC  # to use another data set, put its class here; VOC's docstring says what it must offer
CLASS_NAMES = "class_names.txt"  # in the data folder, as labelme2voc writes it
DEFAULT_FRACTION = 0.2  # of the images with labels, to evaluate on
SPLIT_PURPOSE = 2  # of the seed, beside those of augment.TrainStream


@dataclasses.dataclass
class TrainingData:
    """What a training runs on.

    classes: their names; train, val: data sets
    lists: {"train": ids, "val": ids} where the data folder holds no lists, for the checkpoint; else None
    origin: where the lists are from, in words; "" for the data folder
    skipped: a note on the files that are not used, for a folder without lists; or None
    """
    classes: tuple
    train: object
    val: object
    lists: dict | None
    origin: str = ""
    skipped: str | None = None


def open_training(root, classes_file, train_split, val_split, val_fraction, seed, lists=None):
    """The TrainingData of train.py's flags of these names.

    train_split: None: trainaug for VOC's classes, else train
    lists: those of the checkpoint that a run resumes from
    Raises DataError.
    """
    root = Path(root)
    if classes_file is None and (root / CLASS_NAMES).is_file():
        classes_file = root / CLASS_NAMES
    classes = read_classes(classes_file) if classes_file else CLASSES
    if lists is None and DATA_SET.has_lists(root):
        if val_fraction is not None:
            raise DataError(f"--val_fraction {val_fraction} has no effect: {root} holds lists; leave it out")
        train_split = train_split or ("train" if classes_file else "trainaug")
        return TrainingData(classes, DATA_SET(root, train_split), DATA_SET(root, val_split), None)
    origin, skipped = "the checkpoint's lists", None
    if lists is None:
        origin, skipped = "no lists there: split by --seed and --val_fraction", DATA_SET.skipped(root)
        if classes_file is None:
            raise DataError(f"{root}: " + (DATA_SET.missing(root) or (
                f"holds images and labels, but neither lists in {LISTS} nor {CLASS_NAMES}; name your classes, one a "
                f"line, in {CLASS_NAMES} there or by --classes FILE")))
        for flag, split, usual in (("train", train_split, None), ("val", val_split, "val")):
            if split not in (usual, flag):
                raise DataError(f"--{flag}_split {split} has no effect: {root} holds no lists; make them, or leave it "
                                "out")
        lists = split_by_seed(root, DEFAULT_FRACTION if val_fraction is None else val_fraction, seed)
    elif others := set(DATA_SET.labelled_ids(root)).difference(*lists.values()):
        skipped = f"{len(others)} labelled images are in neither of the checkpoint's lists, and not used"
    return TrainingData(classes, DATA_SET(root, "train", lists["train"]), DATA_SET(root, "val", lists["val"]), lists,
                        origin, skipped)


def split_by_seed(root, fraction, seed):
    """The images with labels, split at random: {"train": ids, "val": ids}, at least one each."""
    ids = DATA_SET.labelled_ids(root)
    if len(ids) < 2:
        problem = (f"{root}: holds {len(ids)} images with labels of their names; at least 2 are needed, one to train "
                   "on and one to evaluate on")
        raise DataError("; ".join(filter(None, [problem, DATA_SET.skipped(root)])))
    order = np.random.default_rng([seed, SPLIT_PURPOSE]).permutation(len(ids))
    count = min(max(1, round(fraction * len(ids))), len(ids) - 1)
    return {"train": sorted(ids[i] for i in order[count:]), "val": sorted(ids[i] for i in order[:count])}


def open_split(root, split, lists=None):
    """The data set of one list, to score on.

    lists: those of the checkpoint, if it holds some. They come first where the folder holds their images, so that none
    that was trained on is scored, whatever lists the folder was given since.
    """
    has_lists = DATA_SET.has_lists(root)
    if lists and split in lists:
        data = DATA_SET(root, split, lists[split])
        if not has_lists or all(path.is_file() for path in data.files()):
            return data
    elif lists and not has_lists:
        raise DataError(f"{root}: has no list '{split}'; the checkpoint holds {', '.join(lists)}")
    return DATA_SET(root, split)


def digest(ids):
    """The SHA-256 of a list, as `sha256sum` gives it for a file of one id a line."""
    return hashlib.sha256("".join(f"{image_id}\n" for image_id in ids).encode()).hexdigest()
