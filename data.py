"""Opens the training and validation sets, and loads their batches in worker processes.

Shapes: a training batch is a dict of image uint8 [N, crop, crop, 3], label uint8 [N, crop, crop], size int64 [N, 2] and
jitter float32 [N, 5] (see transforms). A validation batch is (indices, for each scale the images uint8 [N, h, w, 3],
labels uint8 [N, H, W]).
"""
import dataclasses
import functools
import math
from pathlib import Path

import numpy as np
import torch
from torch.utils._pytree import tree_map_only
from torch.utils.data import DataLoader, Dataset, default_collate, get_worker_info

from cli import UserError, first_line, held_signals, start_worker, usable_cores
from transforms import TrainAugmentation, fit_into, stack_images
from voc import CLASSES, LISTS, VOC, digest, read_classes

DATA_SET = VOC  # to use another data set, put its class here; VOC's docstring says what it must offer
CLASS_NAMES = "class_names.txt"  # in the data folder, as labelme2voc writes it
DEFAULT_FRACTION = 0.2  # of the images with labels, to evaluate on
ORDER_PURPOSE, SAMPLE_PURPOSE, SPLIT_PURPOSE = range(3)  # what a generator of the seed is for
WORKERS = 4  # for each rank, if the cores suffice


@dataclasses.dataclass
class TrainingData:
    """What a training runs on.

    classes: their names; train, val: data sets
    lists: {"train": ids, "val": ids} if the data folder holds no lists, for the checkpoint; else None
    origin: where the lists are from; "" for the data folder
    skipped: a note on the files that are not used, for a folder without lists; or None
    """
    classes: tuple
    train: object
    val: object
    lists: dict | None
    origin: str = ""
    skipped: str | None = None

    def check(self):
        """Reads every image and label once. Raises UserError for a bad one. -> the (H, W) of the val images"""
        self.train.check(len(self.classes))
        return self.val.check(len(self.classes))

    def digests(self):
        """The SHA-256 of both lists."""
        return {"train": digest(self.train.ids), "val": digest(self.val.ids)}


def open_training(args, lists=None):
    """Opens the training and validation sets. -> TrainingData

    args: train.py's flags; a --train_split of None is trainaug for VOC's classes, else train
    lists: those of the checkpoint that a run resumes from
    Raises UserError.
    """
    root, classes_file = Path(args.data_path), args.classes
    if classes_file is None and (root / CLASS_NAMES).is_file():
        classes_file = root / CLASS_NAMES
    classes = read_classes(classes_file) if classes_file else CLASSES
    if lists is None and DATA_SET.has_lists(root):
        if args.val_fraction is not None:
            raise UserError(f"--val_fraction {args.val_fraction} has no effect: {root} holds lists; leave it out")
        train_split = args.train_split or ("train" if classes_file else "trainaug")
        return TrainingData(classes, DATA_SET(root, train_split), DATA_SET(root, args.val_split), None)
    origin, skipped = "the checkpoint's lists", None
    if lists is None:
        origin, skipped = "no lists there: split by --seed and --val_fraction", DATA_SET.skipped(root)
        if classes_file is None:
            raise UserError(f"{root}: " + (DATA_SET.missing(root) or (
                f"holds images and labels, but neither lists in {LISTS} nor {CLASS_NAMES}; name your classes, one a "
                f"line, in {CLASS_NAMES} there or by --classes FILE")))
        for flag, split, usual in (("train", args.train_split, None), ("val", args.val_split, "val")):
            if split not in (usual, flag):
                raise UserError(f"--{flag}_split {split} has no effect: {root} holds no lists; make them, or leave it "
                                "out")
        lists = split_by_seed(root, args.val_fraction or DEFAULT_FRACTION, args.seed)
    elif others := set(DATA_SET.labelled_ids(root)).difference(*lists.values()):
        skipped = f"{len(others)} labelled images are in neither of the checkpoint's lists, and not used"
    return TrainingData(classes, DATA_SET(root, "train", lists["train"]), DATA_SET(root, "val", lists["val"]), lists,
                        origin, skipped)


def open_checked(args, lists, ranks):
    """Opens the training and validation sets on every rank. Reads every image and label once on each machine.

    -> (TrainingData, the (H, W) of the validation images). Raises UserError, also if the machines' lists differ.
    """
    data = open_training(args, lists)
    val_sizes, digests = ranks.once_a_machine(lambda: (data.check(), data.digests()))
    if digests != data.digests():
        raise UserError(f"{args.data_path}: its lists differ from those of rank 0's machine; copy the same data to "
                        "every machine")
    return data, val_sizes


def split_by_seed(root, fraction, seed):
    """The images with labels, split at random: {"train": ids, "val": ids}, at least one each."""
    ids = DATA_SET.labelled_ids(root)
    if len(ids) < 2:
        problem = (f"{root}: holds {len(ids)} images with labels of their names; at least 2 are needed, one to train "
                   "on and one to evaluate on")
        raise UserError("; ".join(filter(None, [problem, DATA_SET.skipped(root)])))
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
        raise UserError(f"{root}: has no list '{split}'; the checkpoint holds {', '.join(lists)}")
    return DATA_SET(root, split)


# ---- training batches

class TrainStream(Dataset):
    """The endless stream of training samples: one random permutation of the images after another.

    A sample is a function of (seed, position in the stream) alone, so that a run depends neither on the number of
    workers and ranks nor on where it was resumed.
    """

    def __init__(self, data, augmentation, seed):
        self.data, self.augmentation, self.seed = data, augmentation, seed
        self.epoch, self.order = None, None

    def index(self, position):
        """Which image of the list stands at a position of the stream."""
        epoch, offset = divmod(position, len(self.data))
        if epoch != self.epoch:
            self.epoch, self.order = epoch, self.rng(ORDER_PURPOSE, epoch).permutation(len(self.data))
        return int(self.order[offset])

    def rng(self, purpose, number):
        """A generator for each epoch's order and for each position's augmentation."""
        return np.random.default_rng([self.seed, purpose, number])

    def __getitem__(self, position):
        return self.augmentation(*self.data[self.index(position)], self.rng(SAMPLE_PURPOSE, position))


class BatchOrder:
    """Which positions of the stream one rank loads, batch by batch. Iteration i is positions [i S, (i + 1) S), where
    S = batch_size * accumulate * world_size; rank r takes the r-th slice, in `accumulate` batches.

    batch_size: images of one rank that go through the network at once
    first, last: positions; the last one is not included
    """

    def __init__(self, first, last, batch_size, accumulate=1, rank=0, world_size=1):
        self.slice = batch_size * accumulate
        self.starts = range(first + rank * self.slice, last, world_size * self.slice)
        self.batch_size = batch_size

    def __len__(self):
        return len(self.starts) * (self.slice // self.batch_size)

    def __iter__(self):
        for start in self.starts:
            for position in range(start, start + self.slice, self.batch_size):
                yield range(position, position + self.batch_size)


def train_batches(data, args, first, last, ranks):
    """An iterator over this rank's training batches from sample `first` to sample `last` of the stream."""
    stream = TrainStream(data, TrainAugmentation(args.crop_size, args.scale), args.seed)
    order = BatchOrder(first, last, args.batch_size, args.accumulate, ranks.rank, ranks.count)
    return batches_of(stream, order, stack_samples, args.workers, ranks)


def stack_samples(samples):
    """Samples of `TrainAugmentation` as one batch: a dict of the same keys, each [N, ...]."""
    rest = [{key: value for key, value in sample.items() if key != "image"} for sample in samples]
    return {"image": stack_images([sample["image"] for sample in samples]), **default_collate(rest)}


# ---- validation batches

class ScaledImages(Dataset):
    """The images of a data set at each of some scales, uint8 [3, h, w], with their label in the original size."""

    def __init__(self, data, scales):
        self.data, self.scales = data, scales

    def __getitem__(self, index):
        image, label = self.data[index]
        return index, [fit_into(image, scale) for scale in self.scales], label


def stack_scaled(samples):
    """Samples of one original size -> a validation batch."""
    indices, images, labels = zip(*samples, strict=True)
    return indices, [stack_images(one_scale) for one_scale in zip(*images, strict=True)], torch.stack(labels)


def val_batches(data, sizes, protocol, workers, ranks):
    """An iterator over this rank's share of the validation batches, the images of a batch of one size.

    sizes: (H, W) of the first len(sizes) images of the list, which are loaded; protocol: an inference.Protocol
    """
    order = one_size_batches(sizes, protocol.batch_on(ranks.device), protocol.pixels_together())
    return batches_of(ScaledImages(data, protocol.scales()), order[ranks.rank::ranks.count], stack_scaled, workers,
                      ranks)


def one_size_batches(sizes, batch_size, pixels=math.inf):
    """Lists of indices of images that have one size: up to `batch_size`, and up to `pixels` pixels or one image."""
    groups = {}
    for index, size in enumerate(sizes):
        groups.setdefault(size, []).append(index)
    batches = []
    for (height, width), group in groups.items():
        count = int(max(1, min(batch_size, pixels // (height * width))))
        batches += [group[start:start + count] for start in range(0, len(group), count)]
    return batches


# ---- loading

def batches_of(dataset, order, collate, workers, ranks):
    """An iterator over the batches of a data set.

    order: lists of indices; collate: samples -> batch; workers: how many processes load, 0: this one; None: the default
    Raises what the data set raises. In a worker, that error has the worker's traceback as its message.
    """
    if workers is None:
        workers = max(1, min(WORKERS, usable_cores() // ranks.here))
    loader = DataLoader(dataset, batch_sampler=order, num_workers=workers, worker_init_fn=start_worker,
                        collate_fn=functools.partial(shared, collate), pin_memory=ranks.device.type != "cpu",
                        multiprocessing_context="fork" if workers else None)  # forkserver since Python 3.14
    with held_signals():
        return iter(loader)


def shared(collate, samples):
    """A collate function that puts its batch into shared memory at once, in a worker.

    The queue's thread would do it later: an error there loses the batch, for which the run then waits.
    """
    batch = collate(samples)
    if get_worker_info() is None:
        return batch
    try:
        return tree_map_only(torch.Tensor, torch.Tensor.share_memory_, batch)
    except RuntimeError as error:
        raise UserError(f"no shared memory is left for batches ({first_line(error)}); give more (docker run "
                        "--shm-size=8g), or --workers 0") from None
