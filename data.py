"""Opens the training and validation sets, and loads their batches in worker processes.

Shapes: a training batch is a dict of image uint8 [N, crop, crop, 3], label uint8 [N, crop, crop], size int64 [N, 2] and
jitter float32 [N, 5] (see transforms). A validation batch is (indices, (for each scale the images uint8 [N, h, w, 3],
labels uint8 [N, H, W])). Images travel channels last, as they lie in memory: any device takes a copy of them as it is.
"""
import dataclasses
import math
from pathlib import Path

import numpy as np
from torch.utils.data import DataLoader, Dataset, default_collate

from cli import UserError, first_line, held_signals, start_worker, usable_cores
from transforms import TrainAugmentation, fit_into
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
    skipped: a note on the files that are not used, for a folder without lists; or ""
    """
    classes: tuple
    train: object
    val: object
    lists: dict | None = None
    origin: str = ""
    skipped: str = ""

    def digests(self):
        """The SHA-256 of both lists."""
        return {"train": digest(self.train.ids), "val": digest(self.val.ids)}


def open_training(args, lists=None):
    """Opens the training and validation sets. -> TrainingData

    args: train.py's flags; a --train_split of None is trainaug for VOC's classes, else train
    lists: those of the checkpoint that a run resumes from
    """
    root = Path(args.data_path)
    classes_file = args.classes or (root / CLASS_NAMES if (root / CLASS_NAMES).is_file() else None)
    classes = read_classes(classes_file) if classes_file else CLASSES
    if lists is None and DATA_SET.has_lists(root):
        if args.val_fraction is not None:
            raise UserError(f"--val_fraction {args.val_fraction} has no effect: {root} holds lists; leave it out")
        train_split = args.train_split or ("train" if classes_file else "trainaug")
        return TrainingData(classes, DATA_SET(root, train_split), DATA_SET(root, args.val_split))
    ids, skipped = DATA_SET.labelled(root)
    if lists is None:
        if classes_file is None:
            raise UserError(f"{root}: holds images and labels, but neither lists in {LISTS} nor {CLASS_NAMES}; name "
                            f"your classes, one a line, in {CLASS_NAMES} there or by --classes FILE")
        for name, split in (("train", args.train_split or "train"), ("val", args.val_split)):
            if split != name:
                raise UserError(f"--{name}_split {split} has no effect: {root} holds no lists; make them, or leave it "
                                "out")
        if len(ids) < 2:
            raise UserError(f"{root}: holds {len(ids)} images with labels of their names; at least 2 are needed, one "
                            "to train on and one to evaluate on" + (skipped and f"; {skipped}"))
        lists = split_by_seed(ids, args.val_fraction or DEFAULT_FRACTION, args.seed)
        origin = "no lists there: split by --seed and --val_fraction"
    else:
        others = len(set(ids).difference(*lists.values()))
        skipped = f"{others} labelled images are in neither of the checkpoint's lists, and not used" if others else ""
        origin = "the checkpoint's lists"
    train, val = (DATA_SET(root, split, lists[split]) for split in ("train", "val"))
    return TrainingData(classes, train, val, lists, origin, skipped)


def open_checked(args, lists, ranks):
    """Opens the training and validation sets on every rank. Reads every image and label once on each machine.

    -> (TrainingData, the (H, W) of the validation images). Raises UserError, also if the machines' lists differ.
    """
    data = open_training(args, lists)

    def check():
        data.train.check(len(data.classes))
        return data.val.check(len(data.classes)), data.digests()

    val_sizes, digests = ranks.once_a_machine(check)
    if digests != data.digests():
        raise UserError(f"{args.data_path}: its lists differ from those of rank 0's machine; copy the same data to "
                        "every machine")
    return data, val_sizes


def split_by_seed(ids, fraction, seed):
    """Splits ids at random: {"train": ids, "val": ids}, at least one each."""
    order = np.random.default_rng([seed, SPLIT_PURPOSE]).permutation(len(ids))
    count = min(max(1, round(fraction * len(ids))), len(ids) - 1)
    return {"train": sorted(ids[i] for i in order[count:]), "val": sorted(ids[i] for i in order[:count])}


def open_split(root, split, lists):
    """The data set of one list, to score on.

    lists: those of the checkpoint, or None. They come first where the folder holds their images, so that none that was
    trained on is scored, whatever lists the folder was given since.
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
            rng = np.random.default_rng([self.seed, ORDER_PURPOSE, epoch])
            self.epoch, self.order = epoch, rng.permutation(len(self.data))
        return int(self.order[offset])

    def __getitem__(self, position):
        rng = np.random.default_rng([self.seed, SAMPLE_PURPOSE, position])
        sample = self.augmentation(*self.data[self.index(position)], rng)
        return {**sample, "image": sample["image"].permute(1, 2, 0)}


def batch_order(first, last, batch_size, accumulate=1, rank=0, world_size=1):
    """Yields the positions of the stream that one rank loads, from `first` up to `last`, batch by batch.

    Iteration i is positions [i S, (i + 1) S), where S = batch_size * accumulate * world_size; rank r takes the r-th
    slice, in `accumulate` batches of `batch_size`, the images of one rank that go through the network at once.
    """
    length = batch_size * accumulate
    for start in range(first + rank * length, last, world_size * length):
        for position in range(start, start + length, batch_size):
            yield range(position, position + batch_size)


def train_batches(data, args, first, last, ranks):
    """An iterator over this rank's training batches from sample `first` to sample `last` of the stream."""
    stream = TrainStream(data, TrainAugmentation(args.crop_size, args.scale), args.seed)
    order = batch_order(first, last, args.batch_size, args.accumulate, ranks.rank, ranks.count)
    return batches_of(stream, order, args.workers, ranks)


# ---- validation batches

class ScaledImages(Dataset):
    """The images of a data set at each of some scales, uint8 [h, w, 3], with their label in the original size."""

    def __init__(self, data, scales):
        self.data, self.scales = data, scales

    def __getitem__(self, index):
        image, label = self.data[index]
        return [fit_into(image, scale).permute(1, 2, 0) for scale in self.scales], label


def val_batches(data, sizes, protocol, workers, ranks):
    """An iterator over this rank's share of the validation batches, the images of a batch of one size.

    sizes: (H, W) of the first len(sizes) images of the list, which are loaded; protocol: an inference.Protocol
    """
    order = one_size_batches(sizes, protocol.batch_on(ranks.device), protocol.pixels_together())
    order = order[ranks.rank::ranks.count]
    return zip(order, batches_of(ScaledImages(data, protocol.scales()), order, workers, ranks), strict=True)


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

def batches_of(dataset, order, workers, ranks):
    """An iterator over the batches of a data set; an error in a worker is raised with its traceback as the message.

    order: an iterable of lists of indices; workers: how many processes load, 0: this one; None: the default
    """
    if workers is None:
        workers = max(1, min(WORKERS, usable_cores() // ranks.here))
    loader = DataLoader(dataset, batch_sampler=order, num_workers=workers, worker_init_fn=start_worker,
                        collate_fn=collate, pin_memory=ranks.device.type != "cpu",
                        multiprocessing_context="fork" if workers else None)  # forkserver since Python 3.14
    with held_signals():
        return iter(loader)


def collate(samples):
    """Stacks the tensors of samples, in a worker into shared memory at once, as `default_collate` does.

    The queue's thread would do it later: an error there loses the batch, for which the run then waits.
    """
    try:
        return default_collate(samples)
    except RuntimeError as error:
        if "/torch_" not in str(error):  # a file in /dev/shm
            raise
        raise UserError(f"no shared memory is left for batches ({first_line(error)}); give more (docker run "
                        "--shm-size=8g), or --workers 0") from None
