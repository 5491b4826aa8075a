"""Opens the training and validation sets, and loads their batches in worker processes.

Shapes: a training batch is a dict of image uint8 [N, crop, crop, 3], label uint8 [N, crop, crop], size int64 [N, 2] and
jitter float32 [N, 5] (see transforms). A validation batch is (indices, (for each scale the images uint8 [N, h, w, 3],
labels uint8 [N, H, W])). Images travel channels last, as they lie in memory: any device takes a copy of them as it is.
"""
import collections
import dataclasses
import math
from pathlib import Path

import numpy as np
from torch.utils.data import DataLoader, Dataset, default_collate

from cli import UserError, first_line, held_signals, start_worker, usable_cores
from transforms import TrainAugmentation, fit_into
from voc import CLASS_NAMES, CLASSES, IGNORE, LISTS, VOC, check_palettes, digest, digest_of, first_of, read_classes

DATA_SET = VOC  # to use another data set, put its class here; VOC's docstring says what it must offer
DEFAULT_FRACTION = 0.2  # of the images with labels, to evaluate on
ORDER_PURPOSE, SAMPLE_PURPOSE, SPLIT_PURPOSE = range(3)  # what a generator of the seed is for
WORKERS = 4  # for each rank, if the cores suffice
BATCH_SHOWN = 16  # images in train_batch.png, at most
DRAWN = "no lists there: split by --seed and --val_fraction"


@dataclasses.dataclass
class TrainingData:
    """What a training runs on.

    classes: their names; train, val: data sets
    lists: {"train": ids, "val": ids} if the data folder holds no lists, for the checkpoint; else None
    origin: where the lists are from; "" for the data folder
    notes: what the user should know of them, each a line
    images: {"train" and "val": a short hash of each image file}; None for a data set without `looks`
    seen: {"train" and "val": what the check saw}: images and pixels, int [256], how many have each value of a label;
        sizes, a Counter of (H, W). {} for a data set without `looks`
    """
    classes: tuple
    train: object
    val: object
    lists: dict | None = None
    origin: str = ""
    notes: tuple = ()
    images: dict | None = None
    seen: dict = dataclasses.field(default_factory=dict)

    def digests(self):
        """The SHA-256 of both lists."""
        return {"train": digest(self.train.ids), "val": digest(self.val.ids)}


def open_training(args, lists=None):
    """Opens the training and validation sets. -> TrainingData

    args: train.py's flags; a --train_split of None is trainaug for VOC's classes, else train
    lists: those of the checkpoint that a run resumes from
    """
    root, notes = Path(args.data_path), []
    names = args.classes or (root / CLASS_NAMES if (root / CLASS_NAMES).is_file() else None)
    classes = read_classes(names) if names else CLASSES
    listed = lists is None and DATA_SET.has_lists(root)
    splits = {"train": args.train_split or ("trainaug" if listed and not names else "train"), "val": args.val_split}
    useless = [f"--{part}_split {split}" for part, split in splits.items() if split != part and not listed]
    if args.val_fraction is not None and (listed or lists):
        useless.append(f"--val_fraction {args.val_fraction}")
    if useless and lists is None:
        raise UserError(f"{useless[0]} has no effect: {root} holds {'' if listed else 'no '}lists; leave it out")
    if listed:
        return TrainingData(classes, DATA_SET(root, splits["train"]), DATA_SET(root, splits["val"]))
    ids, skipped = DATA_SET.labelled(root)
    if lists is None and names is None:
        raise UserError(f"{root}: holds images and labels, but neither lists in {LISTS} nor {CLASS_NAMES}; name your "
                        f"classes, one a line, in {CLASS_NAMES} there or by --classes FILE")
    if lists:
        others, origin = len(set(ids).difference(*lists.values())), "the checkpoint's lists"
        notes += [f"{others} labelled images are in neither of the checkpoint's lists, and not used"] * (others > 0)
        notes += [f"{flag} has no effect: the run keeps the lists of its checkpoint" for flag in useless]
    elif len(ids) < 2:
        raise UserError(f"{root}: holds {len(ids)} images with labels of their names; at least 2 are needed, one to "
                        "train on and one to evaluate on" + (skipped and f"; {skipped}"))
    else:
        lists, origin = split_by_seed(ids, args.val_fraction or DEFAULT_FRACTION, args.seed), DRAWN
        notes += [skipped] * (skipped != "")
    train, val = (DATA_SET(root, part, lists[part]) for part in ("train", "val"))
    return TrainingData(classes, train, val, lists, origin, tuple(notes))


def open_checked(args, lists, ranks):
    """Opens the training and validation sets on every rank. Reads every image and label once on each machine.

    A split that is drawn is changed by what the labels hold, see with_every_class.
    -> (TrainingData, the (H, W) of the validation images). Raises UserError, also if the machines' lists differ.
    """
    data = open_training(args, lists)

    def check():
        _, sizes = (part.check(len(data.classes)) for part in (data.train, data.val))
        looks, found = {**getattr(data.train, "looks", {}), **getattr(data.val, "looks", {})}, {}
        if looks:
            parts = {"train": data.train.ids, "val": data.val.ids}
            if data.origin == DRAWN:
                parts = with_every_class(parts, {name: look.pixels[:IGNORE] > 0 for name, look in looks.items()})
                found = {"lists": parts}
            found |= look_over(data, parts, looks)
            sizes = [looks[name].size for name in parts["val"]]
        return data.digests(), sizes, found

    digests, sizes, found = ranks.once_a_machine(check)
    if digests != data.digests():
        raise UserError(f"{args.data_path}: its lists differ from those of rank 0's machine; copy the same data to "
                        "every machine")
    found |= {part: DATA_SET(args.data_path, part, ids) for part, ids in found.get("lists", {}).items()}
    return dataclasses.replace(data, **found), sizes


def look_over(data, parts, looks):
    """The fields of TrainingData that the check of both lists gives: notes, images, seen.

    parts: {"train": ids, "val": ids}; looks: {id: Look}
    Raises UserError if palettes contradict indices, or no training label has an object.
    """
    check_palettes(list(looks.values()), data.classes)
    train, val, seen, images = data.train.split, data.val.split, {}, {}
    for name, ids in parts.items():
        own = [looks[image_id] for image_id in ids]
        pixels, sizes = np.stack([look.pixels for look in own]), collections.Counter(look.size for look in own)
        seen[name] = {"images": (pixels > 0).sum(0), "pixels": pixels.sum(0), "sizes": sizes}
        images[name] = [look.digest for look in own]
    notes = [*data.notes, *notes_on(train, parts["train"], looks, empty=False),
             *notes_on(val, parts["val"], looks, images["train"])]
    here, there = (seen[name]["images"][:len(data.classes)] for name in ("train", "val"))
    absent = [data.classes[index] for index in np.flatnonzero((here > 0) & (there == 0))]
    if absent:
        notes.append(f"the list '{val}' lacks {first_of(absent, ', ')} of the list '{train}'; take another "
                     "one by --val_split or, where the folder has no lists, by --seed and --val_fraction of a new run")
    alone = [data.classes[index] for index in np.flatnonzero((here == 1) & (there == 0))]
    if alone and data.origin == DRAWN:
        notes.append(f"a single image has {first_of(alone, ', ')}: it is trained on")
    return {"notes": tuple(notes), "images": images, "seen": seen}


def notes_on(split, ids, looks, trained=(), empty=True):
    """What to say of one list, lines of text.

    looks: {id: Look}; trained: the digests of training images; empty: the list may be without any object
    Raises UserError if it may not be, but is.
    """
    counts, trained = collections.Counter(ids), set(trained)
    ids = list(counts)
    kinds = {"stand there twice": [name for name in ids if counts[name] > 1],
             "have labels of 0 and 255 alone, background and 'not labelled'":
                 [name for name in ids if not looks[name].pixels[1:IGNORE].any() and looks[name].pixels[IGNORE]],
             "are trained on: the same files": [name for name in ids if looks[name].digest in trained],
             "are turned or mirrored by EXIF without a change of size; look whether their labels are, too":
                 [name for name in ids if looks[name].turned]}
    notes = [f"the list '{split}': {len(found)} of {len(ids)} images {what}: {first_of(found, ', ')}"
             for what, found in kinds.items() if found]
    images = sum(looks[image_id].pixels > 0 for image_id in ids)
    if not images[1:IGNORE].any():
        hint = ", and 255, which means 'not labelled': the object takes the value 1" if images[IGNORE] else ""
        notes.append(f"{looks[ids[0]].label.parent}: every label of the list '{split}' is all background, 0{hint}")
        if not empty:
            raise UserError(notes[-1])
    return notes


def check_scored(data, classes, count, trained):
    """Checks the first `count` images of a list to score on; trained: the digests of training images. -> (sizes, notes)

    Raises UserError for what `check` finds, for palettes that contradict indices, and for masks of 0 and 255.
    """
    sizes, looks = data.check(len(classes), count), getattr(data, "looks", {})
    if not looks:
        return sizes, []
    check_palettes(list(looks.values()), classes)
    empty = len(sizes) < len(data) or not all(look.pixels[IGNORE] for look in looks.values())
    return sizes, notes_on(data.split, data.ids[:count], looks, trained, empty)


def class_names(args, checkpoint):
    """The names of the classes: of --classes, else the checkpoint's; and a note if those of the data folder are others.

    Raises UserError unless each class has a name.
    """
    names = read_classes(args.classes) if args.classes else checkpoint.names()
    count = checkpoint.num_classes
    if names is None or len(names) != count:
        whose = f"{args.classes} has {len(names)}" if names else "but no names of them"
        raise UserError(f"{args.checkpoint}: has {count} classes, {whose}; pass its own by --classes FILE")
    file = Path(args.data_path, CLASS_NAMES)
    if args.classes or not file.is_file() or read_classes(file) == names:
        return names, None
    return names, f"{file}: has other names than the checkpoint, whose names are used: {first_of(names, ', ')}"


def with_every_class(parts, has):
    """Swaps images between the parts of a drawn split until both have each class, as far as that can be.

    parts: {"train": ids, "val": ids}; has: {id: bool [C], the classes in its label}. A class that one image alone has
    is trained on. Each swap takes the two images after which the parts lack the fewest classes.
    """
    parts = [sorted(part) for part in (parts["train"], parts["val"])]
    total = sum(has[image_id].astype(int) for part in parts for image_id in part)
    wanted = total > 0, total > 1
    while True:
        tables = [np.stack([has[image_id] for image_id in part]).astype(int) for part in parts]
        counts = [table.sum(0) for table in tables]
        lacked = [want & (count == 0) for want, count in zip(wanted, counts, strict=True)]
        swaps = []
        for here, there in ((0, 1), (1, 0)):
            for comes in np.flatnonzero(tables[there] @ lacked[here]):
                change = tables[there][comes] - tables[here]  # of the counts here, by each image that may go
                lacks = (wanted[here] & (counts[here] == -change)).sum(1)
                lacks += (wanted[there] & (counts[there] == change)).sum(1)
                swaps.append((lacks.min(), here, lacks.argmin(), there, comes))
        best, here, goes, there, comes = min(swaps, key=lambda swap: swap[0], default=(math.inf,) * 5)
        if best >= np.sum(lacked):
            return {"train": sorted(parts[0]), "val": sorted(parts[1])}
        parts[here][goes], parts[there][comes] = parts[there][comes], parts[here][goes]


def split_by_seed(ids, fraction, seed):
    """Splits ids at random: {"train": ids, "val": ids}, at least one each."""
    order = np.random.default_rng([seed, SPLIT_PURPOSE]).permutation(len(ids))
    count = min(max(1, round(fraction * len(ids))), len(ids) - 1)
    return {"train": sorted(ids[i] for i in order[count:]), "val": sorted(ids[i] for i in order[:count])}


def open_split(root, split, lists, digests):
    """The data set to score on. -> (it, which images it has, as text)

    lists, digests: those of the checkpoint, or None. Its lists come first where the folder holds their images, so that
    none that was trained on is scored, whatever lists and images the folder was given since. The images are told by
    content; by name, if the checkpoint has no digests.
    """
    own = DATA_SET.has_lists(root)
    if lists and split in lists:
        ids = by_content(root, lists[split], digests[split]) if digests else lists[split]
        data = DATA_SET(root, split, ids or ())
        if ids and (digests or not own or all(path.is_file() for path in data.files())):
            return data, f"images of '{split}' of the checkpoint's lists"
    elif lists and not own:
        raise UserError(f"{root}: has no list '{split}'; the checkpoint holds {', '.join(lists)}")
    if own or not digests:
        return DATA_SET(root, split), f"images of '{split}', a list of the folder"
    ids = DATA_SET.labelled(root)[0]
    if not ids:
        raise UserError(f"{root}: holds no images with labels of their names")
    return DATA_SET(root, split, ids), "images, the whole folder"


def by_content(root, ids, digests):
    """The ids under which a folder holds the images of a list; None if it has less than half of them."""
    data, pairs = DATA_SET(root, "", DATA_SET.labelled(root)[0]), list(zip(ids, digests, strict=True))
    here = {image_id: digest_of(data.image_path(image_id)) for image_id in set(ids).intersection(data.ids)}
    if any(here.get(image_id) != digest for image_id, digest in pairs):  # only then the others are read
        here |= {image_id: digest_of(data.image_path(image_id)) for image_id in set(data.ids).difference(ids)}
    names = {digest: image_id for image_id, digest in sorted(here.items())}
    found = [image_id if here.get(image_id) == digest else names.get(digest) for image_id, digest in pairs]
    enough = 2 * sum(map(bool, found)) >= len(ids)
    return [name or image_id for name, image_id in zip(found, ids, strict=True)] if enough else None


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


def first_samples(data, args, first):
    """Rank 0's batch at sample `first` of the stream, at most BATCH_SHOWN images of it. Changes no random state."""
    stream = TrainStream(data, TrainAugmentation(args.crop_size, args.scale), args.seed)
    return default_collate([stream[first + index] for index in range(min(BATCH_SHOWN, args.batch_size))])


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
        if not any(words in str(error) for words in ("/torch_", "No space left")):  # a file in /dev/shm
            raise
        raise UserError(f"no shared memory is left for batches ({first_line(error)}); give more (docker run "
                        "--shm-size=8g; Kubernetes: an emptyDir of medium Memory at /dev/shm), or --workers 0"
                        ) from None
