"""PASCAL VOC 2012 and SBD: which images and labels, the training augmentation, and the stream of training samples.

Shapes: an image is uint8 [3, H, W], RGB, 0..255; a label uint8 [H, W], a class index or 255 (IGNORE) a pixel.
Batches travel as uint8; `prepare` turns one into the network's input on the device it was moved to.
"""
import os
import shlex
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset, default_collate
from tqdm import tqdm

CLASSES = ("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
           "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor")
IGNORE = 255  # the void boundary around objects; also what pads a label
MEAN = (123.675, 116.28, 103.53)  # of ImageNet's RGB values in 0..255
STD = (58.395, 57.12, 57.375)
CAFFE_MEAN = (104.00699, 116.66877, 122.67892)  # BGR, of the original FCN release, which does not scale

SBD_LISTS = ("aug", "trainaug")  # the lists that convert_voc_aug.py writes
LABEL_MODES = ("P", "L")  # Pillow's names for an 8-bit index and an 8-bit grey image
LABELME_FOLDER = "SegmentationClassPNG"  # where older releases of labelme's export have the labels
Image.MAX_IMAGE_PIXELS = 2 ** 29  # Pillow refuses twice that, 3 GiB of RGB; its own bound would refuse a panorama
PROBLEMS_SHOWN = 5


class DataError(ValueError):
    """Data that cannot be used; the message is one line for the user."""

    def __init__(self, message):
        # A DataLoader worker raises its exception anew with a whole traceback as the message: keep the last line.
        super().__init__(message.rsplit("DataError: ", 1)[-1].strip())


def first_of(problems):
    """The first few of some problems, as one line."""
    more = len(problems) - PROBLEMS_SHOWN
    return "; ".join(problems[:PROBLEMS_SHOWN]) + (f"; and {more} more" if more > 0 else "")


def palette():
    """VOC's colour map as uint8 [256, 3]: bits 0, 1, 2 of the index go to the top bits of R, G, B, then bits 3, 4, 5...

    The rule of VOCcode/VOClabelcolormap.m in VOC's development kit.
    """
    index = np.arange(256)[:, None]
    colour = np.zeros((256, 3), np.int64)
    for bit in range(8):
        colour |= (index >> 3 * bit + np.arange(3) & 1) << 7 - bit
    return colour.astype(np.uint8)


def read_classes(path):
    """The names of the classes in a file, one a line, the first the background: a tuple.

    labelme's list may begin with __ignore__, which is no class: its pixels are 255 in the labels.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file of class names") from None
    except UnicodeDecodeError:
        raise DataError(f"{path}: the class names are not UTF-8 text; save them as that") from None
    names = [line.strip() for line in lines if line.strip()]
    names = names[1:] if names[:1] == ["__ignore__"] else names
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise DataError(f"{path}: names the class '{twice}' twice; each has a name of its own")
    if not 2 <= len(names) <= IGNORE:
        raise DataError(f"{path}: names {len(names)} classes; it takes 2 to {IGNORE}, one a line, the first the "
                        "background")
    return tuple(names)


def read_image(path):
    """The RGB image of a file, upright (EXIF), as uint8 [3, H, W] (channels last in memory)."""
    try:
        with Image.open(path) as image:
            ImageOps.exif_transpose(image, in_place=True)
            pixels = np.array(to_rgb(image))
    except FileNotFoundError:
        remedy = ("there is no such image; add it, or take its id out of the list" if path.parent.is_dir() else
                  "its folder is not there any more; mount or restore it")
        raise DataError(f"{path}: {remedy}") from None
    except Exception as error:  # Pillow raises whatever the damage leads to
        raise DataError(f"{path}: the image does not decode ({error}); replace the file") from None
    return torch.from_numpy(pixels).permute(2, 0, 1)


def to_rgb(image):
    """A Pillow image of any mode as RGB. Transparency is left out; of 16 bits the upper 8 stay, as Pillow does it for
    colours (grey values it would cut off at 255)."""
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).clip(0, 2 ** 16 - 1) // 256).astype(np.uint8))
    elif image.mode == "P":
        image = image.convert("RGBA")  # palettes may have transparent entries, about which Pillow would warn
    return image if image.mode == "RGB" else image.convert("RGB")


def read_label(path):
    """The class indices of a label file, uint8 [H, W]."""
    try:
        with Image.open(path) as image:
            if image.mode not in LABEL_MODES:
                raise DataError(f"{path}: the label is in colours or another form (mode {image.mode}), not 8-bit class "
                                "indices; save it as a palette or 8-bit grey PNG whose pixel values are the classes")
            return torch.from_numpy(np.array(image))
    except FileNotFoundError:
        remedy = "convert_voc_aug.py makes it" if path.parent.name == "SegmentationClassAug" else "add it"
        raise DataError(f"{path}: there is no such label; {remedy}, or take its id out of the list") from None
    except DataError:
        raise
    except Exception as error:  # as above
        raise DataError(f"{path}: the label does not decode ({error}); replace the file") from None


class VOC(Dataset):
    """The images and labels of one list in ImageSets/Segmentation of a VOC year folder.

    root: the year folder, say data/VOCdevkit/VOC2012
    split: the name of a list. The lists `aug` and `trainaug` take VOC's own label (SegmentationClass) where the id is
        in VOC's `train` and SBD's (SegmentationClassAug) otherwise; any other list takes VOC's own where there is one.
    Raises DataError if the folder or the list is not there.
    """

    def __init__(self, root, split):
        self.root, self.split = Path(root), split
        lists = self.root / "ImageSets" / "Segmentation"
        if not lists.is_dir():
            hint = ("; it holds VOC2012: pass that folder" if (self.root / "VOC2012").is_dir() else
                    "; --data_path takes a VOC year folder such as data/VOCdevkit/VOC2012")
            raise DataError(f"{self.root}: no VOC data there (no folder ImageSets/Segmentation){hint}")
        self.ids = self._read_list(split)
        self.voc_train = set(self._read_list("train")) if split in SBD_LISTS else ()

    def _read_list(self, split):
        path = self.root / "ImageSets" / "Segmentation" / f"{split}.txt"
        if not path.is_file():
            devkit = (self.root.resolve() if self.root.name in ("", "..") else self.root).parent
            if split in SBD_LISTS:
                command = ["python", "convert_voc_aug.py", str(devkit), str(devkit / "VOCaug")]
                remedy = f"make it with: {shlex.join(command)}; data of your own takes --classes FILE"
            else:
                remedy = "the lists there: " + ", ".join(sorted(p.stem for p in path.parent.glob("*.txt")))
            raise DataError(f"{path}: there is no such list; {remedy}")
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError:
            raise DataError(f"{path}: the list is not UTF-8 text; save it as that") from None
        ids = [line.strip() for line in lines if line.strip()]
        if not ids:
            raise DataError(f"{path}: the list is empty; it takes one image id a line")
        return ids

    def image_path(self, image_id):
        return self.root / "JPEGImages" / f"{image_id}.jpg"

    def label_path(self, image_id):
        own, sbd, labelme = (self.root / folder / f"{image_id}.png"
                             for folder in ("SegmentationClass", "SegmentationClassAug", LABELME_FOLDER))
        if self.split in SBD_LISTS:
            return own if image_id in self.voc_train else sbd
        return next((path for path in (own, sbd, labelme) if path.exists()), own)

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        """(image uint8 [3, H, W], label uint8 [H, W])."""
        image_id = self.ids[index]
        image, label = read_image(self.image_path(image_id)), read_label(self.label_path(image_id))
        if image.shape[1:] != label.shape:
            raise DataError(f"{self.label_path(image_id)}: the label is {label.shape[1]}x{label.shape[0]} pixels, "
                            f"its image {image.shape[2]}x{image.shape[1]}; they must be of one size")
        return image, label

    def check(self, num_classes, count=None):
        """Decodes the first `count` (default: all) images and labels, in threads, and returns their (H, W).

        A bad file is so found before the first iteration, not hours later (and the files are then in the page cache).
        Raises DataError, naming the first few, for what __getitem__ cannot read, for a label value that is neither a
        class nor IGNORE, and if no label of the whole list holds anything but background.
        """
        def look(index):
            try:
                image, label = self[index]
            except DataError as error:
                return str(error), None, False
            values = np.flatnonzero(np.bincount(label.numpy().ravel(), minlength=256))
            wrong = values[(values >= num_classes) & (values != IGNORE)]
            problem = wrong.size and (f"{self.label_path(self.ids[index])}: label value {wrong[0]} is no class; "
                                      f"it takes 0..{num_classes - 1}, and {IGNORE} for pixels to leave out")
            return problem, label.shape, bool(((values > 0) & (values != IGNORE)).any())

        count = len(self) if count is None else min(count, len(self))
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            looks = list(tqdm(pool.map(look, range(count)), f"checking {self.split}", count, leave=False, disable=None))
        problems = [problem for problem, _, _ in looks if problem]
        if problems:
            raise DataError(first_of(problems))
        if count == len(self) and not any(foreground for _, _, foreground in looks):
            raise DataError(f"{self.label_path(self.ids[0]).parent}: every label of the list '{self.split}' is all "
                            "background; labels take the class indices as pixel values")
        return [tuple(shape) for _, shape, _ in looks]


def scaled_size(height, width, long_side, short_side):
    """(H, W) of an image resized, aspect kept, to fit into (long_side, short_side); at least 1 pixel a side."""
    factor = min(long_side / max(height, width), short_side / min(height, width))
    return max(1, int(height * factor + 0.5)), max(1, int(width * factor + 0.5))


def resize_image(image, size):
    """uint8 [3, H, W] -> uint8 [3, *size]: bilinear, half-pixel centres, no antialiasing, as OpenCV does it."""
    batch = image.permute(1, 2, 0)[None].permute(0, 3, 1, 2)  # strides by which PyTorch sees that channels are last:
    return F.interpolate(batch, size, mode="bilinear", align_corners=False)[0]  # it is then twice as fast


def source_pixels(side, out):
    """Which of `side` pixels each of the `out` that a label is resized to takes: x takes floor(x side / out).

    The order of the operations, in float64, is OpenCV's: where x side / out is whole, rounding decides.
    """
    return (np.arange(out) * (1 / (out / side))).astype(np.int64).clip(max=side - 1)


def count_classes(label, classes, rows, columns):
    """How many pixels of each class label[rows][:, columns] has; rows, columns: rising indices, some of them repeated.

    Instead of making it, this counts each pixel of the label as often as it would be taken: less work, and exact.
    """
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
        sources = [source_pixels(side, out) for side, out in zip(label.shape, scaled)]
        corner = draw()
        for _ in range(self.CROP_TRIES):
            rows, columns = (source[start:start + self.crop_size] for source, start in zip(sources, corner))
            counts = count_classes(label.numpy(), classes, rows, columns)
            if sum(map(bool, counts)) > 1 and max(counts) < self.LARGEST_CLASS * sum(counts):
                break
            corner = draw()
        return corner

    def crop_label(self, label, scaled, top, left):
        """The crop at (top, left) of the label resized to `scaled`."""
        rows, columns = (source_pixels(side, out)[start:start + self.crop_size]
                         for side, out, start in zip(label.shape, scaled, (top, left)))
        source = label.numpy()[rows[0]:rows[-1] + 1]
        return torch.from_numpy(source.take(columns, 1).take(rows - rows[0], 0))

    def draw_jitter(self, rng):
        """float32 [5]: brightness shift, contrast and saturation factors, hue shift, NaN for a step left out; and 1 if
        contrast comes last, 0 if it comes second."""
        draws = [rng.uniform(-self.BRIGHTNESS, self.BRIGHTNESS), rng.uniform(*self.FACTORS),
                 rng.uniform(*self.FACTORS), rng.integers(-self.HUE, self.HUE)]
        steps = [draw if rng.random() < self.STEP_PROBABILITY else np.nan for draw in draws]
        return torch.tensor([*steps, rng.integers(2)], dtype=torch.float32)


class TrainStream(Dataset):
    """The endless stream of training samples: one random permutation of the images after another.

    A sample is a function of (seed, position in the stream) alone, so that a run depends neither on the number of
    workers and ranks nor on where it was resumed.
    """

    def __init__(self, voc, augmentation, seed):
        self.voc, self.augmentation, self.seed = voc, augmentation, seed
        self.epoch, self.order = None, None

    def index(self, position):
        """Which image of the list stands at a position of the stream."""
        epoch, offset = divmod(position, len(self.voc))
        if epoch != self.epoch:
            self.epoch, self.order = epoch, self.rng(0, epoch).permutation(len(self.voc))
        return int(self.order[offset])

    def rng(self, purpose, number):
        """An own generator for each epoch's order (purpose 0) and each position's augmentation (purpose 1)."""
        return np.random.default_rng([self.seed, purpose, number])

    def __getitem__(self, position):
        return self.augmentation(*self.voc[self.index(position)], self.rng(1, position))


def train_loader(stream, batch_size, first, last, workers, rank=0, world_size=1, pin_memory=False):
    """Batches of one rank: global batch i is positions [i B, (i + 1) B) of the stream, rank r takes its r-th slice.

    batch_size: images of one rank (B is world_size times that); first, last: positions, the last one not included.
    """
    batches = [range(start, start + batch_size)
               for start in range(first + rank * batch_size, last, world_size * batch_size)]
    return DataLoader(stream, batch_sampler=batches, num_workers=workers, pin_memory=pin_memory,
                      collate_fn=stack_samples, worker_init_fn=leave_signals)


def stack_samples(samples):
    """Samples of `TrainAugmentation` as one batch: a dict of the same keys, each [N, ...]."""
    rest = [{key: value for key, value in sample.items() if key != "image"} for sample in samples]
    return {"image": stack_images([sample["image"] for sample in samples]), **default_collate(rest)}


def stack_images(images):
    """Images [3, H, W] of one size -> [N, 3, H, W], channels last in memory as they are: to turn that round takes
    fifteen times as long."""
    return torch.stack([image.permute(1, 2, 0) for image in images]).permute(0, 3, 1, 2)


def leave_signals(worker):
    """A process that loads images leaves SIGTERM and Ctrl-C, which reach it too, to the one that trains: the last
    batches before the stop must still come. It ends with that one."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def prepare(images, form="unpadded", sizes=None, jitter=None):
    """The network's input: colours distorted (where `jitter` is given), normalised, padding exactly 0.

    images uint8 [N, 3, H, W]; form: the network's; sizes int [N, 2], the height and width in use; jitter float [N, 5]
    -> float32 [N, 3, H, W], RGB, or BGR for the forms of the original release. All on the images' device.
    """
    images = images.float()
    if jitter is not None:
        images = distort_colours(images, jitter)
    mean, std = (MEAN, STD) if form == "unpadded" else (CAFFE_MEAN, (1.0, 1.0, 1.0))
    if form != "unpadded":
        images = images.flip(1)
    mean, std = (torch.tensor(values, device=images.device)[:, None, None] for values in (mean, std))
    images = (images - mean) / std
    if sizes is not None:
        height, width = images.shape[-2:]
        rows = torch.arange(height, device=images.device) < sizes[:, :1]  # [N, H]
        columns = torch.arange(width, device=images.device) < sizes[:, 1:]  # [N, W]
        images = images * (rows[:, None, :, None] & columns[:, None, None, :])
    return images


def distort_colours(images, jitter):
    """The photometric distortion of SSD (Liu et al., ECCV 2016, its data augmentation) as mmsegmentation runs it.

    images float [N, 3, H, W], whole numbers 0..255; jitter float [N, 5] of `draw_jitter` -> the same form. Each step
    clips to 0..255 and drops the fraction, as arithmetic on 8-bit images does.
    """
    brightness, contrast, saturation, hue, contrast_last = jitter[:, :, None, None, None].unbind(1)

    def step(images, amount, changed):
        return torch.where(amount.isnan(), images, changed)

    def change_contrast(images, when):
        return step(images, torch.where(when, contrast, torch.nan), to_byte(images * contrast))

    images = step(images, brightness, to_byte(images + brightness))
    images = change_contrast(images, contrast_last == 0)
    h, s, v = to_hsv(images)
    images = step(images, saturation, from_hsv(h, to_byte(s * saturation), v))
    h, s, v = to_hsv(images)
    images = step(images, hue, from_hsv(h.add_(hue).remainder_(HUES), s, v))
    return change_contrast(images, contrast_last == 1)


HUES = 180  # an 8-bit hue counts two degrees a step
# The functions below work in place on what they made or were given for that: on a CPU, new memory is what costs.


def to_byte(values):
    """Clips to 0..255 and drops the fraction, in place."""
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
    centre, sign, shift = (torch.tensor(three, device=hue.device)[:, None, None]
                           for three in ((3.0, 2.0, 4.0), (-1.0, 1.0, 1.0), (2.0, -1.0, -1.0)))
    share = (hue * (6 / HUES) - centre).abs_().mul_(sign).add_(shift).clamp_(0, 1)
    return share.mul_((saturation / 255).mul_(value)).neg_().add_(value).floor_()
