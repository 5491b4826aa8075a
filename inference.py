"""From an image to its class map, and from a data set to its confusion matrix.

Shapes: an image is uint8 [3, H, W], RGB; a label or class map uint8 [H, W]; logits float [C, h, w]; C classes.
"""
import dataclasses
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch.utils.data import Dataset
from tqdm import tqdm

from augment import prepare, resize_image, scaled_size
from batchnorm import fold
from device import choose_device, convolutions, pins_memory, place
from errors import DataError
from loader import Batches, stack_images
from precision import AMP_DTYPES, name_of
from scores import confusion_matrix
from voc import read_image, to_rgb
from weights import Checkpoint

STRIP_VALUES = 2 ** 26  # logits that are enlarged at once: 256 MiB of float32
TOGETHER = 8  # images that run at once on an accelerator, which a single one does not fill
TOGETHER_PIXELS = TOGETHER * 2 ** 20  # of all of them at most: 8 images of 2048x512


@dataclasses.dataclass(frozen=True)
class Protocol:
    """How images go through the network.

    scale: (long, short) sides that an image is fitted into, in pixels, aspect kept; None: its own size
    ratios: of the scale; the softmax of all of them is averaged
    flip: likewise averages over the image and its mirror image
    pad_to: the network sees the image padded right and bottom to that side, in pixels; None: as it is
    slide: (crop, stride) in pixels: windows, whose logits are averaged where they overlap; None: the whole image
    batch_size: images of one shape that run together; None: 1 on a CPU, else TOGETHER
    amp: mixed precision, in AMP_DTYPES of the device; else float32
    """
    scale: tuple | None = None
    ratios: tuple = (1.0,)
    flip: bool = False
    pad_to: int | None = None
    slide: tuple | None = None
    batch_size: int | None = None
    amp: bool = False

    def with_scale_of(self, checkpoint):
        """The same; a scale of None becomes the checkpoint's, with the padding that it was evaluated with."""
        if self.scale:
            return self
        whole_image = not self.slide and self.ratios == (1.0,)
        pad_to = self.pad_to or (checkpoint.pad_to() if whole_image else None)
        return dataclasses.replace(self, scale=checkpoint.scale(), pad_to=pad_to)

    def batch_on(self, device):
        return self.batch_size or (1 if device.type == "cpu" else TOGETHER)

    def precision(self, device):
        """In words."""
        return name_of(AMP_DTYPES[device.type]) if self.amp else "float32"

    def scales(self):
        """The (long, short) of each ratio; None for the image's own size."""
        if self.scale is None:
            return [None]
        return [tuple(int(side * ratio) for side in self.scale) for ratio in self.ratios]

    def check_scales(self):
        """Raises DataError for ratios that cannot be."""
        if self.ratios != (1.0,) and self.scale is None:
            raise DataError("--ratios are multiples of a scale; add --scale LONG SHORT")
        for scale in self.scales():
            if scale and min(scale) < 1:
                raise DataError(f"--ratios: {min(self.ratios)} of {self.scale[0]}x{self.scale[1]} leaves no pixel; "
                                "take a larger one")

    def check(self, sizes):
        """Raises DataError if images of these (H, W) cannot go through."""
        self.check_scales()
        for scale in self.scales():
            largest = max(max(size if scale is None else scaled_size(*size, *scale)) for size in sizes)
            if self.pad_to and largest > self.pad_to:
                raise DataError(f"--pad_to {self.pad_to}: images of up to {largest} pixels a side do not fit; add "
                                f"--scale {self.pad_to} {self.pad_to}, or pad to more")

    def __str__(self):
        size = f"fitted into {self.scale[0]}x{self.scale[1]}" if self.scale else "of their own size"
        return size + (f", padded to {self.pad_to}x{self.pad_to}" if self.pad_to else "")


class Predictor:
    """A trained network that labels photographs.

    checkpoint: a file, or the name of a published network; backbone, at_once: see weights.Checkpoint.read
    device: see device.choose_device; protocol: a Protocol; a scale of None is the checkpoint's
    After the constructor, `names` are the classes' (numbers where the file has none) and `colours` uint8 [256, 3].
    """

    def __init__(self, checkpoint, device="auto", device_id=None, backbone=None, at_once=False,
                 protocol=Protocol()):
        self.device = choose_device(device, device_id)
        self.checkpoint = Checkpoint.read(checkpoint, backbone, at_once)
        model = self.checkpoint.network()
        self.names = self.checkpoint.names() or tuple(f"class {number}" for number in range(model.num_classes))
        self.colours = self.checkpoint.colours()
        self.protocol = protocol.with_scale_of(self.checkpoint)
        self.protocol.check_scales()
        self.model = fold(place(model, self.device).eval())

    def __call__(self, photograph):
        """photograph: a file, a PIL image (both are turned upright, EXIF), or uint8 [H, W, 3] RGB

        -> its class map, NumPy uint8 [H, W]
        """
        if isinstance(photograph, Image.Image):
            photograph = np.array(to_rgb(ImageOps.exif_transpose(photograph)))
        if isinstance(photograph, np.ndarray):
            if photograph.dtype != np.uint8 or photograph.ndim != 3 or photograph.shape[2] != 3:
                raise DataError(f"an array is uint8 [H, W, 3], not {photograph.dtype} {list(photograph.shape)}")
            image = torch.from_numpy(photograph).permute(2, 0, 1)
        else:
            image = read_image(Path(photograph))
        return classify(self.model, image, self.protocol, self.device)


def classify(model, image, protocol, device):
    """The class map of one image: uint8 NumPy [H, W]. `model` is in evaluation mode."""
    protocol.check([tuple(image.shape[1:])])
    scaled = [stack_images([fit_into(image, scale)]) for scale in protocol.scales()]
    return class_maps(model, scaled, image.shape[1:], protocol, device)[0].cpu().numpy()


class ScaledImages(Dataset):
    """The images of a data set at each of some scales, uint8 [3, h, w], with their label in the original size."""

    def __init__(self, data, scales):
        self.data, self.scales = data, scales

    def __getitem__(self, index):
        image, label = self.data[index]
        return [fit_into(image, scale) for scale in self.scales], label


def fit_into(image, scale):
    """uint8 [3, H, W] resized to fit into (long, short) pixels; None: as it is."""
    return image if scale is None else resize_image(image, scaled_size(*image.shape[1:], *scale))


def stack_scaled(samples):
    """Samples of one original size -> (a uint8 [N, h, w, 3] for each scale, labels uint8 [N, H, W])."""
    images, labels = zip(*samples, strict=True)
    return [stack_images(one_scale) for one_scale in zip(*images, strict=True)], torch.stack(labels)


def one_shape_batches(sizes, batch_size, pixels=math.inf):
    """Lists of indices of images that have one size: up to `batch_size`, and up to `pixels` pixels or one image."""
    groups = {}
    for index, size in enumerate(sizes):
        groups.setdefault(size, []).append(index)
    batches = []
    for (height, width), group in groups.items():
        count = int(max(1, min(batch_size, pixels // (height * width))))
        batches += [group[start:start + count] for start in range(0, len(group), count)]
    return batches


def evaluate(model, data, sizes, protocol, device, workers, processes=None, each=None, stop=None):
    """The confusion matrix of a data set, over all ranks.

    sizes: (H, W) of the first len(sizes) images of the list, which are scored, split among the ranks
    each: called with the index of each image and its class map, NumPy uint8 [H, W]
    stop: a StopSignal; when a stop is asked for, the matrix is returned unfinished
    -> int64 [C, C], row: the label's class, column: the predicted one; the pixels labelled IGNORE are left out
    """
    rank, count = (processes.rank, processes.count) if processes else (0, 1)
    was_training = model.training
    network = fold(model.eval())
    pixels = TOGETHER_PIXELS if protocol.scale is None and protocol.batch_size is None else math.inf
    order = one_shape_batches(sizes, protocol.batch_on(device), pixels)[rank::count]
    batches = iter(Batches(ScaledImages(data, protocol.scales()), order, stack_scaled, workers, pins_memory(device)))
    confusion = torch.zeros(model.num_classes, model.num_classes, dtype=torch.int64, device=device)
    with tqdm(total=sum(map(len, order)), desc="evaluating", unit="image", leave=False, disable=None) as progress:
        for indices in order:
            scaled, labels = stop.wait_for(batches) if stop else next(batches)
            if stop and stop.number:
                break
            predictions = class_maps(network, scaled, labels.shape[1:], protocol, device)
            labels = labels.to(device, non_blocking=True)
            for index, label, prediction in zip(indices, labels, predictions, strict=True):
                confusion += confusion_matrix(label, prediction, model.num_classes)
                if each is not None:
                    each(index, prediction.cpu().numpy())
                progress.update()
    model.train(was_training)
    return processes.add_up(confusion.cpu().numpy(), device) if processes else confusion.cpu().numpy()


def class_maps(model, scaled, size, protocol, device):
    """The class maps of images of one size: a list of uint8 [*size], on the device.

    scaled: for each scale of the protocol the images, uint8 [N, h, w, 3]
    """
    views = [view for images in scaled for view in predict(model, images.to(device, non_blocking=True), protocol)]
    return [class_map([view[i] for view in views], tuple(size)) for i in range(len(scaled[0]))]


@torch.inference_mode()
def predict(model, images, protocol):
    """The network's logits of images uint8 [N, h, w, 3] of one scale: a list of [N, C, h, w], of the images and, with
    `flip`, of their mirror images, mirrored back."""
    size, pad_to = tuple(images.shape[1:3]), protocol.pad_to
    inputs = prepare(images, model.form)
    if pad_to:
        inputs = F.pad(inputs, (0, pad_to - size[1], 0, pad_to - size[0]))

    def logits_of(inputs):
        logits = slide_windows(model, inputs, *protocol.slide) if protocol.slide else model(inputs, size)["out"]
        return logits.float()

    kind = images.device.type
    with convolutions(images.device, training=False), torch.autocast(kind, AMP_DTYPES[kind], enabled=protocol.amp):
        views = [logits_of(inputs)]
        if protocol.flip:
            # With padding, the mirror image is padded on the right, too.
            mirrored = torch.cat([inputs[..., :size[1]].flip(-1), inputs[..., size[1]:]], -1)
            views.append(logits_of(mirrored).flip(-1))
    return views


def slide_windows(model, inputs, crop, stride):
    """Logits [N, C, h, w] averaged over windows of crop x crop pixels; the last of a row or column is moved inside."""
    tops, lefts = ([max(min(start, side - crop), 0) for start in
                    range(0, max(math.ceil((side - crop) / stride), 0) * stride + 1, stride)]
                   for side in inputs.shape[-2:])
    total, count = 0, torch.zeros(inputs.shape[-2:], device=inputs.device)
    for top in tops:
        for left in lefts:
            window = inputs[..., top:top + crop, left:left + crop]
            logits = model(window)["out"].float()
            if isinstance(total, int):
                total = logits.new_zeros(*logits.shape[:2], *inputs.shape[-2:])
            total[..., top:top + crop, left:left + crop] += logits
            count[top:top + crop, left:left + crop] += 1
    return total / count


@torch.inference_mode()
def class_map(views, size):
    """The most likely class of each pixel: logits [C, h, w] -> uint8 [*size]; of several, by the mean of their softmax.

    The logits are enlarged bilinearly (align_corners=False) strip by strip, as those of a large photograph at its
    original size would not fit into memory.
    """
    strip = max(1, STRIP_VALUES // (views[0].shape[0] * size[1]))
    parts = []
    for top in range(0, size[0], strip):
        rows = torch.arange(top, min(top + strip, size[0]), device=views[0].device)
        scores = enlarge_rows(views[0], rows, size)
        if len(views) > 1:
            scores = sum((enlarge_rows(view, rows, size).softmax(0) for view in views[1:]), scores.softmax(0))
        parts.append(scores.argmax(0).byte())
    return torch.cat(parts)


def enlarge_rows(logits, rows, size):
    """Some rows of logits [C, h, w] enlarged to `size`: [C, len(rows), size[1]]. First each row from the two it lies
    between, then its columns."""
    height = logits.shape[1]
    source = ((rows + 0.5) * (height / size[0]) - 0.5).clamp(min=0)
    upper = source.long()
    lower = (upper + 1).clamp(max=height - 1)
    scores = torch.lerp(logits[:, upper], logits[:, lower], (source - upper)[:, None].to(logits.dtype))
    return F.interpolate(scores[None], (len(rows), size[1]), mode="bilinear", align_corners=False)[0]
