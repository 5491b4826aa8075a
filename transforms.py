"""Training augmentation: scale, crop and flip in the workers, photometric distortion on the device.

Shapes: an image is uint8 [3, H, W], RGB, 0..255; a label uint8 [H, W]. A batch travels as uint8 [N, H, W, 3];
`prepare` makes the network's input of it on the device.
"""
import functools

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from amp import memory_format
from voc import IGNORE

MEAN = (123.675, 116.28, 103.53)  # of ImageNet's RGB values in 0..255
STD = (58.395, 57.12, 57.375)
CAFFE_MEAN = (104.00699, 116.66877, 122.67892)  # BGR, of the original FCN release, which does not divide
LEFT_OUT = -1000.0  # marks a photometric step that is left out; NaN is not reliable on every NPU
HUES = 180  # an 8-bit hue counts two degrees a step


# ---- geometry, in a worker

def scaled_size(height, width, long_side, short_side):
    """(H, W) of an image resized, aspect kept, to fit into (long_side, short_side); at least 1 pixel a side."""
    factor = min(long_side / max(height, width), short_side / min(height, width))
    return max(1, int(height * factor + 0.5)), max(1, int(width * factor + 0.5))


def resize_image(image, size):
    """uint8 [3, H, W] -> uint8 [3, *size]: bilinear, half-pixel centres, no antialiasing, as OpenCV does it."""
    # With these strides PyTorch sees that the image is channels last, and is twice as fast.
    batch = image.permute(1, 2, 0)[None].permute(0, 3, 1, 2)
    return F.interpolate(batch, size, mode="bilinear", align_corners=False)[0]


def fit_into(image, scale):
    """uint8 [3, H, W] resized to fit into (long, short) pixels; None: as it is."""
    return image if scale is None else resize_image(image, scaled_size(*image.shape[1:], *scale))


def source_pixels(side, out):
    """Which of `side` pixels each of the `out` that a label is resized to takes: x takes floor(x side / out)."""
    # OpenCV's order of operations, in float64: where x side / out is whole, rounding decides.
    return (np.arange(out) * (1 / (out / side))).astype(np.int64).clip(max=side - 1)


def count_classes(label, classes, rows, columns):
    """How many pixels of each class label[rows][:, columns] has; rows, columns: rising indices, some of them repeated.
    """
    # Without making the crop: each source pixel counts as often as it would be sampled.
    in_rows, in_columns = np.bincount(rows - rows[0]), np.bincount(columns - columns[0]).astype(np.float32)
    region = label[rows[0]:rows[-1] + 1, columns[0]:columns[-1] + 1]
    return [int(in_rows @ ((region == index).astype(np.float32) @ in_columns)) for index in classes]


class TrainAugmentation:
    """The recipe's augmentation of one sample: scale, crop, flip, and the draws of the photometric distortion.

    crop_size: side of the square crop in pixels; a smaller image is padded right and bottom, image 0, label IGNORE
    scale: (long, short) that an image is fitted into, times a factor drawn from SCALE_RANGE
    """
    SCALE_RANGE = (0.5, 2.0)
    CROP_TRIES = 10  # the last is kept whatever it holds
    LARGEST_CLASS = 0.75  # a crop is redrawn if one class covers this share of its labelled pixels or more
    FLIP_PROBABILITY = 0.5
    STEP_PROBABILITY = 0.5  # of each photometric step
    BRIGHTNESS = 32  # grey levels, plus or minus
    FACTORS = (0.5, 1.5)  # of contrast and of saturation
    HUE = 18  # of 180

    def __init__(self, crop_size, scale):
        self.crop_size, self.scale = crop_size, scale

    def __call__(self, image, label, rng):
        """image uint8 [3, H, W], label uint8 [H, W], rng: numpy Generator -> a dict of

        image uint8 [3, crop, crop], label uint8 [crop, crop], size int64 [2] (the unpadded height and width), and
        jitter float32 [5], for `distort_colours`.
        """
        scaled = self.draw_scaled_size(*label.shape, rng)
        top, left = self.draw_crop(label, scaled, rng)
        label = self.crop_label(label, scaled, top, left)
        height, width = label.shape
        image = resize_image(image, scaled)[:, top:top + height, left:left + width]
        if rng.random() < self.FLIP_PROBABILITY:
            image, label = image.flip(-1), label.flip(-1)
        padded = image.new_zeros(self.crop_size, self.crop_size, 3).permute(2, 0, 1)
        padded[:, :height, :width] = image
        return {"image": padded, "size": torch.tensor([height, width]), "jitter": self.draw_jitter(rng),
                "label": F.pad(label, (0, self.crop_size - width, 0, self.crop_size - height), value=IGNORE)}

    def draw_scaled_size(self, height, width, rng):
        ratio = rng.uniform(*self.SCALE_RANGE)
        return scaled_size(height, width, *(int(side * ratio) for side in self.scale))

    def draw_crop(self, label, scaled, rng):
        """(top, left) of the crop, drawn until it shows more than one class and none of them nearly alone."""
        def draw():
            return [int(rng.integers(max(side - self.crop_size, 0) + 1)) for side in scaled]

        classes = [index for index, count in enumerate(Image.fromarray(label.numpy()).histogram()[:IGNORE]) if count]
        sources = [source_pixels(side, out) for side, out in zip(label.shape, scaled, strict=True)]
        corner = draw()
        for _ in range(self.CROP_TRIES):
            rows, columns = (source[start:start + self.crop_size]
                             for source, start in zip(sources, corner, strict=True))
            counts = count_classes(label.numpy(), classes, rows, columns)
            if sum(map(bool, counts)) > 1 and max(counts) < self.LARGEST_CLASS * sum(counts):
                break
            corner = draw()
        return corner

    def crop_label(self, label, scaled, top, left):
        """The crop at (top, left) of the label resized to `scaled`."""
        rows, columns = (source_pixels(side, out)[start:start + self.crop_size]
                         for side, out, start in zip(label.shape, scaled, (top, left), strict=True))
        source = label.numpy()[rows[0]:rows[-1] + 1]
        return torch.from_numpy(source.take(columns, 1).take(rows - rows[0], 0))

    def draw_jitter(self, rng):
        """float32 [5]: brightness shift, contrast and saturation factors, hue shift, LEFT_OUT for a step left out; and
        1 if contrast comes last, 0 if it comes second."""
        draws = [rng.uniform(-self.BRIGHTNESS, self.BRIGHTNESS), rng.uniform(*self.FACTORS),
                 rng.uniform(*self.FACTORS), rng.integers(-self.HUE, self.HUE)]
        steps = [draw if rng.random() < self.STEP_PROBABILITY else LEFT_OUT for draw in draws]
        return torch.tensor([*steps, rng.integers(2)], dtype=torch.float32)


# ---- colours, on the device

@functools.cache
def constants(device, *rows):
    """Rows of numbers as tensors [len(row), 1, 1] on a device. Cached: a copy to the device synchronises with it."""
    return [torch.tensor(row, device=device)[:, None, None] for row in rows]


def prepare(images, form="unpadded", sizes=None, jitter=None):
    """The network's input: colours distorted (where `jitter` is given), normalised, padding exactly 0.

    images uint8 [N, H, W, 3]; form: the network's; sizes int [N, 2], the height and width in use; jitter float [N, 5]
    -> float32 [N, 3, H, W], in the memory format of the device, on which all of them are
    """
    images = images.permute(0, 3, 1, 2).contiguous(memory_format=memory_format(images.device)).float()
    if jitter is not None:
        images = distort_colours(images, jitter)
    images = normalise(images, form)
    if sizes is not None:
        height, width = images.shape[-2:]
        rows = torch.arange(height, device=images.device) < sizes[:, :1]  # [N, H]
        columns = torch.arange(width, device=images.device) < sizes[:, 1:]  # [N, W]
        images = images * (rows[:, None, :, None] & columns[:, None, None, :])
    return images.contiguous(memory_format=memory_format(images.device))


def prepare_batch(batch, form, device, preparing=None):
    """A batch of data.train_batches -> (images float32 [N, 3, H, W], labels uint8 [N, H, W]), on the device.

    preparing: `prepare`, or what torch.compile made of it
    """
    batch = {key: value.to(device, non_blocking=True) for key, value in batch.items()}
    return (preparing or prepare)(batch["image"], form, batch["size"], batch["jitter"]), batch["label"]


def normalise(images, form):
    """float [N, 3, H, W], RGB, 0..255 -> minus the mean, by the deviation; for the padded forms BGR minus its mean."""
    if form != "unpadded":
        mean, = constants(images.device, CAFFE_MEAN)
        return images.flip(1) - mean
    mean, deviation = constants(images.device, MEAN, STD)
    return (images - mean) / deviation


def visible(inputs, form):
    """The inverse of `normalise`, for people: float [N, 3, H, W] -> NumPy uint8 [N, H, W, 3], RGB."""
    if form != "unpadded":
        images = (inputs + constants(inputs.device, CAFFE_MEAN)[0]).flip(1)
    else:
        mean, deviation = constants(inputs.device, MEAN, STD)
        images = inputs * deviation + mean
    return images.round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()


def distort_colours(images, jitter):
    """The photometric distortion of SSD (Liu et al., ECCV 2016, its data augmentation) as mmsegmentation runs it.

    images float [N, 3, H, W], whole numbers 0..255; jitter float [N, 5] of `draw_jitter` -> the same form. Each step
    clips to 0..255 and drops the fraction, as arithmetic on 8-bit images does.
    """
    brightness, contrast, saturation, hue, contrast_last = jitter[:, :, None, None, None].unbind(1)

    def step(images, amount, changed):
        return torch.where(amount == LEFT_OUT, images, changed)

    second, last = (torch.where(contrast_last == when, contrast, LEFT_OUT) for when in (0, 1))
    images = step(images, brightness, to_byte(images + brightness))
    images = step(images, second, to_byte(images * contrast))
    h, s, v = to_hsv(images)
    images = step(images, saturation, from_hsv(h, to_byte(s * saturation), v))
    h, s, v = to_hsv(images)
    images = step(images, hue, from_hsv(h.add_(hue).remainder_(HUES), s, v))
    return step(images, last, to_byte(images * contrast))


def to_byte(values):
    """Clips to 0..255 and drops the fraction, in place: on a CPU, new memory is what costs, below, too."""
    return values.clamp_(0, 255).floor_()


def to_hsv(images):
    """float [N, 3, H, W], whole numbers 0..255 -> hue (0..179), saturation, value (0..255), each [N, 1, H, W], whole.

    The 8-bit HSV of OpenCV's documentation of colour conversions.
    """
    red, green, blue = images.split(1, 1)
    value = images.amax(1, keepdim=True)
    chroma = value - images.amin(1, keepdim=True)
    saturation = (255 * chroma).div_(value.clamp(min=1)).add_(0.5).floor_()
    sector = torch.where(value == red, green - blue,
                         torch.where(value == green, (blue - red).add_(chroma, alpha=2),
                                     (red - green).add_(chroma, alpha=4)))
    hue = sector.mul_(HUES / 6).div_(chroma.clamp_(min=1)).add_(0.5).floor_()
    return hue.remainder_(HUES), saturation, value


def from_hsv(hue, saturation, value):
    """The inverse of `to_hsv`, its fraction dropped (OpenCV's vector code for 8 bits drops it, too)."""
    # How far each channel falls below the value, as a share of the chroma: 0 and 1 with slopes between, around the
    # hues (of 6) red's 3, where it is all, and green's 2 and blue's 4, where it is nothing.
    centre, sign, shift = constants(hue.device, (3.0, 2.0, 4.0), (-1.0, 1.0, 1.0), (2.0, -1.0, -1.0))
    share = (hue * (6 / HUES) - centre).abs_().mul_(sign).add_(shift).clamp_(0, 1)
    return share.mul_((saturation / 255).mul_(value)).neg_().add_(value).floor_()
