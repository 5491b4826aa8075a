"""The confusion matrix, its scores and their table; the speed of a training."""
import math
import resource
import time
import unicodedata

import numpy as np
import torch

WARM_UP_ITERS = 5  # that a measurement of speed leaves out: they choose kernels and fill caches
MEANS = ("aAcc", "mIoU", "mAcc")


def confusion_matrix(label, prediction, num_classes):
    """uint8 [H, W] each -> int64 [C, C], row: the label's class, column: the predicted one. What is labelled with no
    class, say IGNORE, is left out."""
    pairs, length = label.int().mul_(num_classes).add_(prediction).ravel(), 256 * num_classes
    if label.device.type == "cpu":  # torch.bincount takes int32 on a CPU, twice as fast as NumPy's int64
        counts = torch.bincount(pairs, minlength=length)
    else:  # bincount synchronises with the device, to learn the largest number
        counts = torch.zeros(length, dtype=torch.int64, device=label.device)
        counts.scatter_add_(0, pairs.long(), torch.ones_like(pairs, dtype=torch.int64))
    return counts.reshape(-1, num_classes)[:num_classes]


def scores_of(confusion):
    """The metrics of a confusion matrix (NumPy), in per cent; a class that is 0/0 is NaN and left out of the mean.

    -> dict: aAcc, correct / labelled pixels; Acc [C], correct / the label's pixels, and its mean mAcc; IoU [C],
    correct / (label's + predicted - correct pixels), and its mean mIoU (Long et al., section 4); confusion, the counts
    """
    correct, labelled, predicted = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
    with np.errstate(invalid="ignore"):
        accuracy = 100 * correct / labelled
        iou = 100 * correct / (labelled + predicted - correct)
        overall = 100 * correct.sum() / labelled.sum()
    return {"aAcc": float(overall), "mIoU": mean_of(iou), "mAcc": mean_of(accuracy), "IoU": iou.tolist(),
            "Acc": accuracy.tolist(), "confusion": confusion.tolist()}


def mean_of(values):
    """The mean of the values that are not NaN; NaN if none is."""
    values = values[~np.isnan(values)]
    return float(values.mean()) if values.size else math.nan


def number(value, style):
    """A number as text; `-` for None and NaN."""
    return "-" if value is None or math.isnan(value) else format(value, style)


def for_json(scores, names):
    """`scores_of`'s result as JSON takes it: NaN is None, and the scores of a class go by its name."""
    def finite(value):
        return None if math.isnan(value) else value

    return {name: finite(value) if name in MEANS else value if name == "confusion" else
            dict(zip(names, map(finite, value), strict=True)) for name, value in scores.items()}


def format_table(scores, classes):
    """The scores of each class as a table in text; `-` for NaN."""
    return class_table(classes, {name: [number(value, ".2f") for value in scores[name]] for name in ("IoU", "Acc")})


def class_table(classes, columns):
    """A table in text: a line for each class. columns: {title: texts}"""
    def wide(name):  # Chinese characters and the like are two columns wide
        return sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in name)

    width = max(14, *(wide(name) + 2 for name in classes))
    cells = []
    for title, texts in columns.items():
        length = max(8, *(len(text) + 2 for text in (title, *texts)))
        cells.append([f"{text:>{length}}" for text in (title, *texts)])
    rows = zip(("class", *classes), *cells, strict=True)
    return "\n".join("".join((name, " " * (width - wide(name)), *row)) for name, *row in rows)


def summary(scores):
    """The three means as text; `-` for NaN."""
    return "  ".join(f"{name} {number(scores[name], '.2f')}" for name in MEANS)


def synchronize(device):
    """Waits until the device has finished its queued work, so that a clock can be read."""
    getattr(torch, device.type).synchronize(device)


def peak_memory(device):
    """The most memory that tensors held on the device, in bytes. On a CPU, the most that the process held."""
    if device.type == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
    return getattr(torch, device.type).max_memory_allocated(device)


class Speed:
    """Images per second and the wait for data between two log lines, without the run's first iterations and its pauses.

    iterations: of the run; one that is shorter than the warm-up has a speed, if a slow one
    """

    def __init__(self, device, images_per_iteration, iterations):
        self.device, self.images = device, images_per_iteration
        self.skip = min(WARM_UP_ITERS, iterations - 1)
        self.start()

    def start(self):
        """Begins to count anew."""
        synchronize(self.device)
        self.iterations, self.waited, self.since = 0, 0.0, time.perf_counter()

    def count(self, waited):
        """Counts an iteration, of which `waited` seconds went by before its batch was loaded."""
        self.iterations += 1
        self.waited += waited
        if self.skip:
            self.skip -= 1
            self.start()

    def read(self):
        """dict: fps (images/s), iter_time and data_time (seconds an iteration); None each if nothing was counted.
        Begins to count anew."""
        iterations, waited, since = self.iterations, self.waited, self.since
        self.start()
        if not iterations:
            return {"fps": None, "iter_time": None, "data_time": None}
        seconds = (self.since - since) / iterations
        return {"fps": self.images / seconds, "iter_time": seconds, "data_time": waited / iterations}
