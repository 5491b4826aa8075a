"""From an image to its class map, and from a data set to its confusion matrix.

Shapes: an image is uint8 [3, H, W], RGB; a label or class map uint8 [H, W]; logits float [C, h, w]; C classes.
"""
import dataclasses
import itertools
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from tqdm import tqdm

import visualize
from amp import AMP_DTYPES, convolutions, name_of, place
from cli import MAX_SIDE, UserError, first_line, number
from device import choose_device
from metrics import confusion_matrix
from transforms import fit_into, prepare, prepare_batch, scaled_size, visible
from voc import palette, read_image, to_rgb
from weights import Checkpoint

STRIP_VALUES = 2 ** 26  # logits that are enlarged at once: 256 MiB of float32
VAL_SAMPLES, DATA_SAMPLES = 6, 4  # images in val_samples.png, and of each list in data.png
TOGETHER = 8  # images that run at once on an accelerator, which a single one does not fill
TOGETHER_PIXELS = TOGETHER * 2 ** 20  # of all of them at most: 8 images of 2048x512


def add_protocol_flags(parser):
    """The flags that say how images go through the network. -> their group"""
    how = parser.add_argument_group("how the images go through the network")
    how.add_argument("--scale", type=number(1, 2 ** 16), nargs=2, metavar=("LONG", "SHORT"),
                     help="fit each image into these sides, in pixels (default: the checkpoint's; 2048 512 for "
                          "mmsegmentation's, the image's own size for torchfcn's)")
    how.add_argument("--pad_to", type=number(0, MAX_SIDE), metavar="N",
                     help="pad each image right and bottom to N x N pixels, so that every shape is the same; 0: no "
                          "padding (default: the checkpoint's; with --scale, --ratios or --slide none)")
    how.add_argument("--ratios", type=number(0, 100, float, without=(0,)), nargs="+", metavar="R", default=(1.0,),
                     help="average over these multiples of the scale, say 0.5 0.75 1.0 1.25 1.5 1.75 (default: 1)")
    how.add_argument("--flip", action="store_true", help="average over each image and its mirror image")
    how.add_argument("--slide", type=number(1, MAX_SIDE), nargs=2, metavar=("CROP", "STRIDE"),
                     help="average over windows of CROP x CROP pixels, STRIDE pixels apart (default: the whole image)")
    how.add_argument("--amp", action="store_true",
                     help="mixed precision: float16 on NPU and CUDA, bfloat16 on a CPU (default: float32)")
    return how


def check_protocol(parser, args):
    """Values that make no sense together are a usage error."""
    check_scales(parser, args, "scale")
    if args.slide and args.slide[0] < args.slide[1]:
        parser.error(f"--slide {args.slide[0]} {args.slide[1]}: the stride is longer than the window, pixels would be "
                     "left out; CROP comes first")
    if args.slide and args.pad_to:
        parser.error("--pad_to and --slide do not go together: a window is of one shape already")


def check_scales(parser, args, *flags):
    """The long side comes first, or it is a usage error. Two values become a tuple."""
    for flag in flags:
        sides = getattr(args, flag)
        if sides and sides[0] < sides[1]:
            parser.error(f"--{flag} {sides[0]} {sides[1]}: the long side comes first")
        setattr(args, flag, sides and tuple(sides))


@dataclasses.dataclass(frozen=True)
class Protocol:
    """How images go through the network.

    scale: (long, short) sides that an image is fitted into, in pixels, aspect kept; None: its own size
    ratios: of the scale; the softmax of all of them is averaged
    flip: average over the image and its mirror image as well
    pad_to: the network sees the image padded right and bottom to that side, in pixels; None, 0: as it is
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

    @classmethod
    def of(cls, args):
        """The protocol that the flags of `add_protocol_flags` give."""
        return cls(**{field.name: getattr(args, field.name, field.default) for field in dataclasses.fields(cls)})

    def with_scale_of(self, checkpoint):
        """The same, but a scale of None becomes the checkpoint's. Then, without windows or ratios, a pad_to of None
        becomes its padding, too; one of 0 stays. Raises UserError for ratios without a scale."""
        if self.scale:
            return self
        scale, pad_to, whole = checkpoint.scale(), self.pad_to, list(self.ratios) == [1]
        if scale is None and not whole:
            raise UserError("--ratios are multiples of a scale; add --scale LONG SHORT")
        if pad_to is None and whole and not self.slide:
            pad_to = checkpoint.meta.get("args", {}).get("pad_to")
        return dataclasses.replace(self, scale=scale, pad_to=pad_to)

    def batch_on(self, device):
        return self.batch_size or (1 if device.type == "cpu" else TOGETHER)

    def pixels_together(self):
        """How many pixels the images of a batch may have together."""
        return TOGETHER_PIXELS if self.scale is None and self.batch_size is None else math.inf

    def precision(self, device):
        """The name of what the network computes in."""
        return name_of(AMP_DTYPES[device.type]) if self.amp else "float32"

    def scales(self):
        """The (long, short) of each ratio, at least a pixel; None for the image's own size."""
        return [self.scale and tuple(max(1, int(side * ratio)) for side in self.scale) for ratio in self.ratios]

    def check(self, sizes):
        """Raises UserError if images of these (H, W) cannot go through."""
        largest = max(max(scaled_size(*size, *scale) if scale else size) for scale in self.scales() for size in sizes)
        if self.pad_to and largest > self.pad_to:
            raise UserError(f"--pad_to {self.pad_to}: images of up to {largest} pixels a side do not fit; add "
                            f"--scale {self.pad_to} {self.pad_to} (train.py: --val_scale), or pad to more")

    def __str__(self):
        size = f"fitted into {self.scale[0]}x{self.scale[1]}" if self.scale else "of their own size"
        return size + (f", padded to {self.pad_to}x{self.pad_to}" if self.pad_to else "")


def network_on(checkpoint, device):
    """The network of a weights.Checkpoint on a device, in evaluation mode."""
    return place(checkpoint.network(), device).eval()


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
        self.model = network_on(self.checkpoint, self.device)
        self.names = self.checkpoint.names() or tuple(f"class {number}" for number in range(self.model.num_classes))
        self.colours = self.checkpoint.colours()
        self.protocol = protocol.with_scale_of(self.checkpoint)

    def __call__(self, photograph):
        """photograph: a file, a PIL image (both are turned upright, EXIF), or uint8 [H, W, 3] RGB

        -> its class map, NumPy uint8 [H, W]
        """
        return classify(self.model, image_of(photograph), self.protocol, self.device)

    def overlay(self, photograph):
        """The photograph under the class colours, with a legend: a PIL image, as `predict.py --overlay` writes it."""
        image = image_of(photograph).permute(1, 2, 0).numpy()
        return visualize.overlay(image, self(image), self.names, self.colours)

    def probabilities(self, photograph):
        """The probability of each class in each pixel: NumPy float16 [C, H, W].

        It takes 500 MB for 12 megapixels and 21 classes. The strips in which it is computed take as much again.
        """
        return classify(self.model, image_of(photograph), self.protocol, self.device, probabilities)


def image_of(photograph):
    """What a Predictor takes as uint8 [3, H, W], RGB. Raises UserError if there is none."""
    if isinstance(photograph, Image.Image):
        photograph = np.array(to_rgb(ImageOps.exif_transpose(photograph)))
    if isinstance(photograph, np.ndarray):
        if photograph.dtype != np.uint8 or photograph.ndim != 3 or photograph.shape[2] != 3 or not photograph.size:
            raise UserError(f"an array is uint8 [H, W, 3], not {photograph.dtype} {list(photograph.shape)}")
        # A copy: PyTorch takes no negative strides, as of [..., ::-1], and nothing read-only.
        return torch.from_numpy(np.array(photograph)).permute(2, 0, 1)
    return read_image(Path(photograph))


def classify(model, image, protocol, device, answer=None):
    """The class map of one image: uint8 NumPy [H, W]; or another `answer`. `model` is in evaluation mode."""
    protocol.check([tuple(image.shape[1:])])
    scaled = [fit_into(image, scale).permute(1, 2, 0)[None].contiguous() for scale in protocol.scales()]
    return answers(model, scaled, image.shape[1:], protocol, device, answer or class_map)[0].cpu().numpy()


def evaluate(model, batches, protocol, ranks, each=None, total=None):
    """The confusion matrix of a data set, over all ranks.

    batches: an iterable of data.val_batches; total: how many images this rank has, for the progress bar
    each: called with the index of each image and its class map, NumPy uint8 [H, W]
    -> int64 [C, C], row: the label's class, column: the predicted one; the pixels labelled IGNORE are left out
    """
    device, was_training = ranks.device, model.training
    model.eval()
    confusion = torch.zeros(model.num_classes, model.num_classes, dtype=torch.int64, device=device)
    with tqdm(total=total, desc="evaluating", unit="image", leave=False, disable=None) as progress:
        for indices, (scaled, labels) in batches:
            predictions = answers(model, scaled, labels.shape[1:], protocol, device, class_map)
            labels = labels.to(device, non_blocking=True)
            for index, label, prediction in zip(indices, labels, predictions, strict=True):
                confusion += confusion_matrix(label, prediction, model.num_classes)
                if each is not None:
                    each(index, prediction.cpu().numpy())
                progress.update()
    model.train(was_training)
    return ranks.sum(confusion).cpu().numpy()


def answers(model, scaled, size, protocol, device, answer):
    """`answer`, class_map or probabilities, for each image of some of one size, as a list.

    scaled: for each scale of the protocol the images, uint8 [N, h, w, 3]
    """
    views = [view for images in scaled for view in predict(model, images.to(device, non_blocking=True), protocol)]
    return [answer([view[i] for view in views], tuple(size)) for i in range(len(scaled[0]))]


@torch.inference_mode()
def predict(model, images, protocol):
    """The network's logits of images uint8 [N, h, w, 3] of one scale: a list of [N, C, h, w], of the images and, with
    `flip`, of their mirror images, mirrored back."""
    size, inputs, views = tuple(images.shape[1:3]), prepare(images, model.form), []
    kind = images.device.type
    with convolutions(images.device, training=False), torch.autocast(kind, AMP_DTYPES[kind], enabled=protocol.amp):
        for mirrored in (False, True)[:1 + protocol.flip]:
            view = inputs.flip(-1) if mirrored else inputs
            if protocol.pad_to:
                view = F.pad(view, (0, protocol.pad_to - size[1], 0, protocol.pad_to - size[0]))
            logits = slide_windows(model, view, *protocol.slide) if protocol.slide else model(view, size)["out"]
            views.append((logits.flip(-1) if mirrored else logits).float())
    return views


def slide_windows(model, inputs, crop, stride):
    """Logits [N, C, h, w] averaged over windows of crop x crop pixels; the last of a row or column is moved inside."""
    tops, lefts = ([max(min(start, side - crop), 0) for start in
                    range(0, max(math.ceil((side - crop) / stride), 0) * stride + 1, stride)]
                   for side in inputs.shape[-2:])
    total = inputs.new_zeros(len(inputs), model.num_classes, *inputs.shape[-2:])
    count = torch.zeros_like(total[0, 0])
    for top, left in itertools.product(tops, lefts):
        window = ..., slice(top, top + crop), slice(left, left + crop)
        total[window] += model(inputs[window])["out"]
        count[window] += 1
    return total / count


@torch.inference_mode()
def class_map(views, size):
    """The most likely class of each pixel: logits [C, h, w] -> uint8 [*size]. Several: by the mean of their softmax."""
    # Of the first maximum, as argmax, which is slow on a CPU.
    return torch.cat([scores.max(0).indices.byte() for _, scores in strips(views, size)])


@torch.inference_mode()
def probabilities(views, size):
    """The mean softmax of logits [C, h, w]: float16 [C, *size], on the CPU."""
    found = torch.empty(len(views[0]), *size, dtype=torch.float16)
    for top, scores in strips(views, size):
        found[:, top:top + scores.shape[1]] = scores / len(views) if len(views) > 1 else scores.softmax(0)
    return found


def strips(views, size):
    """Yields (first row, scores [C, rows, size[1]]) of strips of an image: logits, or the sum of the views' softmax.

    The logits are enlarged bilinearly (align_corners=False) strip by strip, as those of a large photograph at its
    original size would not fit into memory.
    """
    strip = max(1, STRIP_VALUES // (views[0].shape[0] * size[1]))
    for top in range(0, size[0], strip):
        rows = torch.arange(top, min(top + strip, size[0]), device=views[0].device)
        scores = enlarge_rows(views[0], rows, size)
        if len(views) > 1:
            scores = sum((enlarge_rows(view, rows, size).softmax(0) for view in views[1:]), scores.softmax(0))
        yield top, scores


def enlarge_rows(logits, rows, size):
    """Some rows of logits [C, h, w] enlarged to `size`: [C, len(rows), size[1]]. First the rows, then the columns."""
    height = logits.shape[1]
    source = ((rows + 0.5) * (height / size[0]) - 0.5).clamp(min=0)
    upper = source.long()
    lower = (upper + 1).clamp(max=height - 1)
    scores = torch.lerp(logits[:, upper], logits[:, lower], (source - upper)[:, None].to(logits.dtype))
    return F.interpolate(scores[None], (len(rows), size[1]), mode="bilinear", align_corners=False)[0]


# ---- pictures of a run

def spread(data, count):
    """A few samples, spread over a list: [(id, image uint8 [H, W, 3], label uint8 [H, W]), ...]"""
    indices = np.unique(np.linspace(0, len(data) - 1, count).round().astype(int))
    return [(data.ids[index], image.permute(1, 2, 0).numpy(), label.numpy())
            for index, (image, label) in ((index, data[index]) for index in indices)]


def draw_data(work_dir, data, batch, form, device):
    """Writes data.png, of the lists, and train_batch.png, of a training batch as the network of that form sees it.

    A drawing that fails is a log line, here and below: it does not end a training of hours.
    """
    font = visualize.missing_font(data.classes)
    if font:
        work_dir.log(f"note: {font}")
    try:
        images, labels = prepare_batch(batch, form, device)
        samples = [("", *sample) for sample in zip(visible(images, form), labels.cpu().numpy(), strict=True)]
        title = "the first training batch, as the network sees it"
        picture = visualize.sample_grid(samples, data.classes, palette(), title)
        visualize.save(picture, work_dir.path / "train_batch.png")
        samples = [(f"{part.split}: {name}", *maps) for part in (data.train, data.val)
                   for name, *maps in spread(part, DATA_SAMPLES)]
        pictures = [visualize.sample_grid(samples, data.classes, palette(), "images of both lists")]
        if data.seen:
            shares = {name: seen["pixels"] / seen["pixels"].sum() for name, seen in data.seen.items()}
            pictures.insert(0, visualize.class_bars(shares, data.classes, palette()))
        visualize.save(visualize.joined(pictures, visualize.COLUMN), work_dir.path / "data.png")
    except Exception as error:
        work_dir.log(f"data.png or train_batch.png could not be drawn: {first_line(error)}")


def draw(work_dir, model, data, protocol, device, iteration, scores):
    """Writes curves.png, confusion.png, and val_samples.png: the same few images each time, spread over the list."""
    try:
        samples = [(name, image, label, classify(model, torch.from_numpy(image).permute(2, 0, 1), protocol, device))
                   for name, image, label in spread(data.val, VAL_SAMPLES)]
        title = f"iteration {iteration:,}, mIoU {scores['mIoU']:.2f}"
        pictures = {"curves": visualize.draw_curves(work_dir.metrics(), data.classes),
                    "confusion": visualize.draw_confusion(scores["confusion"], data.classes),
                    "val_samples": visualize.sample_grid(samples, data.classes, palette(), title)}
        for name, picture in pictures.items():
            visualize.save(picture, work_dir.path / f"{name}.png")
        work_dir.add_pictures(iteration, pictures)
    except Exception as error:
        work_dir.log(f"the pictures of iteration {iteration} could not be drawn: {first_line(error)}")
