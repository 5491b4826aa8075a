"""PASCAL VOC 2012 and SBD, and folders in that layout: lists, images, labels, and their check.

Shapes: an image is uint8 [3, H, W], RGB, 0..255; a label uint8 [H, W], a class index or 255 (IGNORE) a pixel.
"""
import contextlib
import functools
import hashlib
import os
import shlex
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import Dataset
from tqdm import tqdm

from cli import UserError, usable_cores

CLASSES = ("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
           "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor")
IGNORE = 255  # the void boundary around objects; also what pads a label

SBD_LISTS = ("aug", "trainaug")  # the lists that convert_voc_aug.py writes
LISTS = Path("ImageSets", "Segmentation")
IMAGE_FOLDERS = ("JPEGImages", "images")  # VOC's name, and the one of most other data
OWN_LABELS, SBD_LABELS = "SegmentationClass", "SegmentationClassAug"
LABEL_FOLDERS = (OWN_LABELS, SBD_LABELS, "SegmentationClassPNG", "masks")  # the third is that of older labelme exports
LABEL_MODES = ("P", "L")  # Pillow's names for an 8-bit index and an 8-bit grey image
HEIC = (".heic", ".heif")  # what phones take
STUBS = ("BUFR", "GRIB", "HDF5", "MPEG")  # formats that Pillow recognises and does not decode
with contextlib.suppress(ImportError):
    import pillow_heif  # by which Pillow reads them
    pillow_heif.register_heif_opener()
Image.MAX_IMAGE_PIXELS = 2 ** 29  # Pillow refuses twice that, 3 GiB of RGB; its own bound would refuse a panorama
SHOWN = 5  # of many problems or files in a message


def palette():
    """VOC's colour map as uint8 [256, 3]: bits 0, 1, 2 of the index go to the top bits of R, G, B, then bits 3, 4, 5...

    The rule of VOCcode/VOClabelcolormap.m in VOC's development kit.
    """
    index = np.arange(256)[:, None]
    colour = np.zeros((256, 3), np.int64)
    for bit in range(8):
        colour |= (index >> 3 * bit + np.arange(3) & 1) << 7 - bit
    return colour.astype(np.uint8)


def first_of(texts, separator="; "):
    """The first few of some texts, as one line."""
    more = [f"and {len(texts) - SHOWN} more"] if len(texts) > SHOWN else []
    return separator.join([*texts[:SHOWN], *more])


def read_lines(path):
    """The lines of a UTF-8 text, stripped, without blank ones."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not UTF-8 text; save it as UTF-8") from None
    return [line.strip() for line in lines if line.strip()]


def digest(ids):
    """The SHA-256 of a list, as `sha256sum` gives it for a file of one id a line."""
    return hashlib.sha256("".join(f"{image_id}\n" for image_id in ids).encode(errors="surrogateescape")).hexdigest()


def read_classes(path):
    """The names of the classes in a file, one a line, the first the background: a tuple.

    labelme's list may begin with __ignore__, which is no class: its pixels are 255 in the labels.
    """
    names = read_lines(path)
    names = names[1:] if names[:1] == ["__ignore__"] else names
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise UserError(f"{path}: names the class '{twice}' twice; each has a name of its own")
    if not 2 <= len(names) <= IGNORE:
        raise UserError(f"{path}: names {len(names)} classes; it takes 2 to {IGNORE}, one a line, the first the "
                        "background")
    return tuple(names)


@contextlib.contextmanager
def opened(path, kind):
    """Yields the Pillow image of a file, an "image" or a "label". What goes wrong in the block is a UserError, too."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # reading a pipe would wait for ever
            raise UserError(f"{path}: is no regular file; remove it")
        with Image.open(path) as image:
            yield image
    except FileNotFoundError:
        hint = "add it, or take its id out of the list"
        if path.parent.name == SBD_LABELS:
            hint = "convert_voc_aug.py makes it"
        elif not path.parent.is_dir():
            hint = "its folder is not there any more; mount or restore it"
        raise UserError(f"{path}: there is no such {kind}; {hint}") from None
    except (UserError, PermissionError):
        raise
    except Exception as error:  # damage makes Pillow raise many types
        raise UserError(f"{path}: the {kind} does not decode ({error}); replace the file{heic_hint([path])}") from None


def read_image(path):
    """The RGB image of a file, upright (EXIF), as uint8 [3, H, W] (channels last in memory)."""
    with opened(path, "image") as image:
        ImageOps.exif_transpose(image, in_place=True)
        return torch.from_numpy(np.array(to_rgb(image))).permute(2, 0, 1)


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
    with opened(path, "label") as image:
        if image.mode not in LABEL_MODES:
            raise UserError(f"{path}: the label is in colours or another form (mode {image.mode}), not 8-bit class "
                            "indices; save it as a palette or 8-bit grey PNG whose pixel values are the classes")
        return torch.from_numpy(np.array(image))


class VOC(Dataset):
    """The images and labels of one list of a VOC year folder, or of a folder in that layout.

    root: say data/VOCdevkit/VOC2012. Images lie in one of IMAGE_FOLDERS, labels in LABEL_FOLDERS; a file may have any
        extension that Pillow reads. The lists, in ImageSets/Segmentation, name images without extension.
    split: the name of a list. `aug` and `trainaug` take VOC's own label where the id is in VOC's `train`, and SBD's
        otherwise; any other list takes VOC's own label if it exists.
    ids: the ids of the list, where no file holds it

    A data set of another kind offers what this one does: `split`, `ids`, `__len__`, `__getitem__`, `check`, `files` and
    `has_lists`; where that may be false, `labelled`, too. Its class then takes VOC's place in data.py.

    Raises UserError if the folder or the list is not there.
    """

    def __init__(self, root, split, ids=None):
        self.root, self.split, self.listings = Path(root), split, {}
        if (self.root / "VOC2012").is_dir():
            raise UserError(f"{root}: holds no data itself; it holds VOC2012: pass that folder")
        if not self.root.is_dir():
            raise UserError(f"{root}: there is no such folder; --data_path takes one such as data/VOCdevkit/VOC2012")
        self.images, *_ = self.folders("images", IMAGE_FOLDERS)
        self.labels = self.folders("labels", LABEL_FOLDERS)
        if ids is None and not self.has_lists(root):
            raise UserError(f"{root}: has no lists in {LISTS}; write {split}.txt there, an image id a line")
        self.ids = self.read_list(split) if ids is None else as_file_names(ids)
        self.voc_train = set(self.read_list("train")) if split in SBD_LISTS else ()

    def folders(self, kind, names):
        """Those of the folders that are there, at least one."""
        found = [self.root / name for name in names if (self.root / name).is_dir()]
        if not found:
            raise UserError(f"{self.root}: has no folder of {kind} ({' or '.join(names)}); --data_path takes a folder "
                            "that has")
        return found

    @staticmethod
    def has_lists(root):
        """True if the folder has lists (ImageSets/Segmentation)."""
        return (Path(root) / LISTS).is_dir()

    @classmethod
    def labelled(cls, root):
        """For a folder without lists: the ids, sorted, of the images that have a label, with those in sub-folders; and
        a note on what is left out, or "".

        The note names images without a label, labels without an image, and files that Pillow does not read, but for
        those with the name of an image, as labelme's JSON has.
        """
        data = cls(root, "", ids=())
        images, labels = ids_in(data.images), set().union(*map(ids_in, data.labels))
        unknown = [path for path in sorted(data.images.rglob("*")) if path.is_file() and not path.name.startswith(".")
                   and path.suffix.lower() not in readable_suffixes() and id_of(path, data.images) not in images]
        notes = [f"{len(ids)} {kind} ({first_of(sorted(ids), ', ')})"
                 for ids, kind in ((images - labels, "images without a label of their name"),
                                   (labels - images, "labels without an image")) if ids]
        if unknown:
            notes.append(f"Pillow does not know the format: {first_of(list(map(str, unknown)))}{heic_hint(unknown)}")
        return sorted(images & labels), "skipped: " + "; ".join(notes) if notes else ""

    def read_list(self, split):
        """The ids in a list."""
        path = self.root / LISTS / f"{split}.txt"
        if not path.is_file():
            devkit = (self.root.resolve() if self.root.name in ("", "..") else self.root).parent
            if split in SBD_LISTS:
                command = ["python", "convert_voc_aug.py", str(devkit), str(devkit / "VOCaug")]
                hint = f"make it with: {shlex.join(command)}; data of your own takes --classes FILE"
            else:
                hint = "the lists there: " + ", ".join(sorted(p.stem for p in path.parent.glob("*.txt")))
            raise UserError(f"{path}: there is no such list; {hint}")
        ids = read_lines(path)
        if not ids:
            raise UserError(f"{path}: the list is empty; it takes one image id a line")
        return as_file_names(ids)

    def find(self, folder, image_id):
        """The file of an id in a folder, whatever its extension, or None."""
        path = folder / image_id
        if path.parent not in self.listings:
            self.listings[path.parent] = readable_files(path.parent)
        found = self.listings[path.parent].get(path.name, [])
        if len(found) > 1:
            raise UserError(f"{found[0]}: {found[1].name} has the same name but for the extension; keep one")
        return found[0] if found else None

    def image_path(self, image_id):
        return self.find(self.images, image_id) or self.images / f"{image_id}.jpg"

    def label_path(self, image_id):
        folders = self.labels
        if self.split in SBD_LISTS:
            folders = [self.root / (OWN_LABELS if image_id in self.voc_train else SBD_LABELS)]
        found = (self.find(folder, image_id) for folder in folders)
        return next(filter(None, found), folders[0] / f"{image_id}.png")

    def files(self):
        """Every file that is read."""
        return [path for image_id in self.ids for path in (self.image_path(image_id), self.label_path(image_id))]

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        """(image uint8 [3, H, W], label uint8 [H, W])."""
        image_id = self.ids[index]
        image, label = read_image(self.image_path(image_id)), read_label(self.label_path(image_id))
        if image.shape[1:] != label.shape:
            raise UserError(f"{self.label_path(image_id)}: the label is {label.shape[1]}x{label.shape[0]} pixels, "
                            f"its image {image.shape[2]}x{image.shape[1]}; they must be of one size")
        return image, label

    def check(self, num_classes, count=None):
        """Decodes the first `count` (default: all) images and labels, in threads, and returns their (H, W).

        So a bad file is found before the first iteration, not hours later.
        Raises UserError, naming the first few, for what __getitem__ cannot read, for a label value that is neither a
        class nor IGNORE, and if no label of the whole list holds anything but background.
        """
        def look(index):
            """(what is wrong or None, (H, W), whether there is anything but background)"""
            try:
                label = self[index][1].numpy()
            except (UserError, PermissionError) as error:
                return str(error), None, False
            values = np.flatnonzero(np.bincount(label.ravel(), minlength=256)[:IGNORE])
            wrong = values[values >= num_classes]
            problem = (f"{self.label_path(self.ids[index])}: label value {wrong[0]} is no class; valid are "
                       f"0..{num_classes - 1}, and {IGNORE} for pixels to ignore") if wrong.size else None
            return problem, label.shape, values.any()

        indices = range(len(self))[:count]
        with ThreadPoolExecutor(usable_cores()) as pool:
            looks = list(tqdm(pool.map(look, indices), f"checking {self.split}", len(indices), leave=False,
                              disable=None))
        problems = [problem for problem, _, _ in looks if problem]
        if problems:
            raise UserError(first_of(problems))
        if len(indices) == len(self) and not any(foreground for _, _, foreground in looks):
            raise UserError(f"{self.label_path(self.ids[0]).parent}: every label of the list '{self.split}' is all "
                            "background; labels take the class indices as pixel values")
        return [size for _, size, _ in looks]


def readable_files(folder):
    """{name without extension: [paths]} of the files in a folder that Pillow reads, by their extensions."""
    files = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.suffix.lower() in readable_suffixes() and not path.name.startswith("."):
            files.setdefault(path.stem, []).append(path)
    return files


def as_file_names(ids):
    """Ids of a list as Python decodes the names of files: by the locale, which need not be UTF-8."""
    return [os.fsdecode(image_id.encode(errors="surrogateescape")) for image_id in ids]


def ids_in(folder):
    """The ids of the files in a folder and its sub-folders that Pillow reads."""
    return {id_of(path, folder) for path in folder.rglob("*")
            if path.suffix.lower() in readable_suffixes() and not path.name.startswith(".")}


def id_of(path, folder):
    """The path of a file in a folder, without extension."""
    return str(path.relative_to(folder).with_suffix(""))


@functools.cache
def readable_suffixes():
    """The extensions, in lower case, of the formats that Pillow decodes."""
    Image.init()
    return {suffix for suffix, kind in Image.EXTENSION.items() if kind in Image.OPEN and kind not in STUBS}


def heic_hint(paths):
    return "; for HEIC: pip install pillow-heif" if any(path.suffix.lower() in HEIC for path in paths) else ""
