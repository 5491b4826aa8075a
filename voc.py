"""PASCAL VOC 2012 and SBD, and folders in that layout: lists, images, labels, and their check.

Shapes: an image is uint8 [3, H, W], RGB, 0..255; a label uint8 [H, W], a class index or 255 (IGNORE) a pixel.
"""
import contextlib
import hashlib
import os
import shlex
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import Dataset
from tqdm import tqdm

from cli import UserError, usable_cores

CLASSES = ("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
           "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor")
IGNORE = 255  # the void boundary around objects; also what pads a label

CLASS_NAMES = "class_names.txt"  # in the data folder, as labelme2voc writes it
SBD_LISTS = ("aug", "trainaug")  # the lists that convert_voc_aug.py writes
LISTS = Path("ImageSets", "Segmentation")
IMAGE_FOLDERS = ("JPEGImages", "images")  # VOC's name, and the one of most other data
OWN_LABELS, SBD_LABELS = "SegmentationClass", "SegmentationClassAug"
LABEL_FOLDERS = (OWN_LABELS, SBD_LABELS, "SegmentationClassPNG", "masks")  # the third is that of older labelme exports
LABEL_MODES = ("P", "L", "1")  # Pillow's names for an index of up to 8 bits, a grey value of as many, and a single bit
LOSSY = ("JPEG", "MPO", "JPEG2000", "AVIF", "HEIF", "WEBP", "JXL", "jpeg in TIFF", "tiff_jpeg in TIFF")
ORIENTATION = 0x0112  # EXIF's number of it; 1: upright, or none
FACTORS = {"L;2": 85, "L;4": 17}  # by which Pillow multiplies grey values of 2 and of 4 bits
NO_RANGE = ("{}: its values lie in {:g}..{:g}, which does not say what is white; scale all images alike and save "
            "them as 8-bit: Image.fromarray((values * (255 / WHITE)).astype('uint8')), WHITE being the value of white")
HEIC = (".heic", ".heif")  # what phones take
STUBS = ("BUFR", "GRIB", "HDF5", "MPEG")  # formats that Pillow recognises and does not decode
with contextlib.suppress(ImportError):
    import pillow_heif  # by which Pillow reads them
    pillow_heif.register_heif_opener()
Image.MAX_IMAGE_PIXELS = 2 ** 29  # Pillow refuses twice that, 3 GiB of RGB; its own bound would refuse a panorama
SHOWN = 5  # of many problems or files in a message
WITHOUT_PALETTE = """python -c "import pathlib, sys; from PIL import Image; [Image.frombytes('L', i.size, i.tobytes())\
.save(p) for d in sys.argv[1:] for p in pathlib.Path(d).rglob('*{}') for i in [Image.open(p)] if i.mode == 'P']" {}"""


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
    """The lines of a UTF-8 text, stripped, without blank ones; at least one."""
    lines, problem = [], "is empty; it takes one name a line"
    try:
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        problem = getattr(error, "strerror", "is not UTF-8 text; save it as UTF-8")
    if not lines:
        raise UserError(f"{path}: {problem}")
    return lines


def digest(ids):
    """The SHA-256 of a list, as `sha256sum` gives it for a file of one id a line."""
    return hashlib.sha256("".join(f"{image_id}\n" for image_id in ids).encode(errors="surrogateescape")).hexdigest()


def read_classes(path):
    """The names of the classes in a file, one a line, the first the background: a tuple.

    labelme's list may begin with __ignore__, which is no class: its pixels are 255 in the labels.
    """
    names = read_lines(path)
    names = names[1:] if names[:1] == ["__ignore__"] else names
    twice = [name for name in names if names.count(name) > 1]
    if twice or not 2 <= len(names) <= IGNORE:
        problem = f"the class '{twice[0]}' twice" if twice else f"{len(names)} classes"
        raise UserError(f"{path}: names {problem}; it takes 2 to {IGNORE} different names, one a line, the first that "
                        "of the background")
    return tuple(names)


@contextlib.contextmanager
def opened(path, kind):
    """Yields the Pillow image of a file, an "image" or a "label". What goes wrong in the block is a UserError, too."""
    try:
        if path.exists() and not path.is_file():  # reading a pipe would wait for ever
            raise UserError(f"{path}: is no regular file; remove it")
        with Image.open(path) as image:
            yield image
    except FileNotFoundError:
        hint = "convert_voc_aug.py makes it" if path.parent.name == SBD_LABELS else "add or restore it"
        if not path.parent.is_dir():
            hint = "its folder is not there any more; mount or restore it"
        raise UserError(f"{path}: there is no such {kind}; {hint}") from None
    except (UserError, PermissionError):
        raise
    except Exception as error:  # damage makes Pillow raise many types
        raise UserError(f"{path}: the {kind} does not decode ({error}); replace the file{heic_hint([path])}") from None


def read_image(path):
    """The RGB image of a file, upright (EXIF), as uint8 [3, H, W] (channels last in memory)."""
    return decode_image(path)[0]


def decode_image(path):
    """-> (the image, as of read_image; its EXIF orientation, 1 if it has none)"""
    with opened(path, "image") as image:
        deep, orientation = ";16" in raw_mode(image), image.getexif().get(ORIENTATION, 1)
        ImageOps.exif_transpose(image, in_place=True)
        pixels = np.array(to_rgb(image, path))
        if deep and not pixels.any():  # Pillow keeps the upper byte
            raise UserError(NO_RANGE.format(path, 0, 255))
        return torch.from_numpy(pixels).permute(2, 0, 1), orientation


def raw_mode(image):
    """Pillow's name for the values of an opened file as they lie there, as `L;2`; "" where it does not say."""
    codec, _, _, found = image.tile[0] if image.tile else ("", (), 0, "")
    found = found if isinstance(found, tuple) else (found,)
    scaled = codec.startswith("ppm") and found[-1] not in (255, "1;I")  # by the maximum that the file names
    raw = next((arg for arg in found if isinstance(arg, str)), "")
    return raw + (";16" if found[-1] > 255 else ";scaled") if scaled else raw


def to_rgb(image, name="the image"):
    """A Pillow image of any mode as RGB. Transparency is left out; of 16 bits the upper 8 stay, as Pillow does it for
    colours (grey values it would cut off at 255).

    Raises UserError for values that are neither 0..255 nor 16 bits: no image is scaled by its own maximum.
    """
    if image.mode.startswith(("I", "F")):
        # 16-bit values that fit into 12 bits leave their range unused.
        values, (least, most) = np.asarray(image), (1, 255) if image.mode == "F" else (2 ** 12 - 1, 2 ** 16 - 1)
        if not (values.min() >= 0 and least < values.max() <= most):  # nor is NaN
            raise UserError(NO_RANGE.format(name, values.min(), values.max()))
        image = Image.fromarray((values if image.mode == "F" else values // 256).astype(np.uint8))
    elif image.mode == "P":
        image = image.convert("RGBA")  # palettes may have transparent entries, about which Pillow would warn
    return image if image.mode == "RGB" else image.convert("RGB")


def decode_label(path):
    """-> (the class indices, uint8 [H, W], as they lie in the file; its palette [r, g, b, r, g, b, ...], or None)"""
    with opened(path, "label") as image:
        raw = raw_mode(image).removesuffix("R").removesuffix(";")  # an order of bits
        kind = image.format if image.format != "TIFF" else f"{image.info.get('compression')} in TIFF"
        problem = None
        if kind in LOSSY:
            problem = f"is {kind}, a lossy format: its values are wrong around each edge"
        elif image.mode not in LABEL_MODES:
            problem = f"is in colours or another form (mode {image.mode}), not 8-bit class indices"
        elif image.mode != "P" and ";" in raw and raw not in FACTORS:
            problem = f"has other values in the file than Pillow gives ({raw}: white is zero, or a scale)"
        elif getattr(image, "is_animated", False):
            problem = "holds several images, of which Pillow gives the first"
        elif image.getexif().get(ORIENTATION, 1) != 1:
            problem = "is turned or mirrored by EXIF, which some programs read and others ignore"
        if problem:
            raise UserError(f"{path}: the label {problem}; export it anew as a palette or 8-bit grey PNG whose pixel "
                            "values are the classes")
        values = np.array(image).astype(np.uint8, copy=False)
        return torch.from_numpy(values // FACTORS[raw] if raw in FACTORS else values), image.getpalette()


def used_colours(table, used):
    """{index: (r, g, b)} of those of the used indices, IGNORE aside, that have an entry in a palette; {} for one that
    says nothing: none, one of greys, or of a single colour."""
    length = min(len(table or ()) // 3, IGNORE)
    colours = {index: tuple(table[3 * index:3 * index + 3]) for index in used if index < length}
    different = set(colours.values())
    return colours if len(different) > 1 and any(len(set(colour)) > 1 for colour in different) else {}


class Look(NamedTuple):
    """What a check saw of an image and its label."""
    size: tuple  # (H, W)
    pixels: np.ndarray  # int [256]: how many of each value the label has
    colours: dict  # of used_colours
    turned: bool  # EXIF turns or mirrors the image, and its size does not show it
    digest: str  # of the image file
    label: Path


def check_palettes(looks, classes):
    """Raises UserError if the palettes of some labels (a list of Look) contradict their indices: these were renumbered.

    With VOC's classes, a palette of VOC's colours has each at its own index. With others, an index has one colour.
    """
    vocs = {tuple(palette()[index].tolist()): index for index in (*range(len(CLASSES)), IGNORE)}
    known = {index: (colour, None) for colour, index in vocs.items()} if classes == CLASSES else {}
    problems, folders = [], set()
    for look in looks:
        colours = set(look.colours.values())
        if classes == CLASSES and (not colours <= vocs.keys() or len(colours) < len(look.colours)):
            continue
        for index, colour in look.colours.items():
            other, label = known.setdefault(index, (colour, look.label))
            if other != colour:
                problems.append(f"index {index} is {colour} in {look.label}, {other} in {label or 'VOC'}")
                folders |= {str(path.parent) for path in (look.label, label) if path}
                break
    if problems:
        raise UserError(f"{len(problems)} labels have palettes that contradict their indices, which a program may have "
                        f"renumbered: {first_of(problems)}. Export them anew or, where the numbers are right, drop the "
                        f"palettes: {WITHOUT_PALETTE.format(looks[0].label.suffix, shlex.join(sorted(folders)))}")


class VOC(Dataset):
    """The images and labels of one list of a VOC year folder, or of a folder in that layout.

    root: say data/VOCdevkit/VOC2012. Images lie in one of IMAGE_FOLDERS, labels in LABEL_FOLDERS; a file may have any
        extension that Pillow reads. The lists, in ImageSets/Segmentation, name images without extension.
    split: the name of a list. `aug` and `trainaug` take VOC's own label where the id is in VOC's `train`, and SBD's
        otherwise; any other list takes VOC's own label if it exists.
    ids: the ids of the list, where no file holds it

    A data set of another kind offers what this one does: `split`, `ids`, `__len__`, `__getitem__`, `check`, `files` and
    `has_lists`; where that may be false, `labelled`, too. Its class then takes VOC's place in data.py. What is said of
    classes, palettes and copies needs `looks`: after `check`, a Look of each id.

    Raises UserError if the folder or the list is not there.
    """

    def __init__(self, root, split, ids=None):
        self.root, self.split, self.listings, self.looks = Path(root), split, {}, {}
        self.images, *_ = self.folders("images", IMAGE_FOLDERS)
        self.labels = self.folders("labels", LABEL_FOLDERS)
        self.list_file = self.root / LISTS / f"{split}.txt" if ids is None else None
        self.ids = self.read_list(split) if ids is None else as_file_names(ids)
        self.voc_train = set(self.read_list("train")) if split in SBD_LISTS else ()

    def folders(self, kind, names):
        """Those of the folders that are there, at least one."""
        found = [self.root / name for name in names if (self.root / name).is_dir()]
        if not found:
            there = f"has no folder of {kind} ({' or '.join(names)})"
            hint = "--data_path takes a folder such as data/VOCdevkit/VOC2012"
            if (self.root / "VOC2012").is_dir():
                hint = "it holds VOC2012: pass that folder"
            raise UserError(f"{self.root}: {there if self.root.is_dir() else 'there is no such folder'}; {hint}")
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
        walks = [(folder, *walk(folder)) for folder in (data.images, *data.labels)]
        images, *labels = ({id_of(path, folder) for path in files if is_readable(path)} for folder, files, _ in walks)
        labels = set().union(*labels)
        unknown = [path for path in walks[0][1] if not is_readable(path) and id_of(path, data.images) not in images]
        notes = [f"{len(ids)} {kind} ({first_of(sorted(ids), ', ')})"
                 for ids, kind in ((images - labels, "images without a label of their name"),
                                   (labels - images, "labels without an image")) if ids]
        if unknown:
            notes.append(f"Pillow does not know the format: {first_of(list(map(str, unknown)))}{heic_hint(unknown)}")
        notes += [f"{path}, which is read under another name" for _, _, again in walks for path in again]
        return sorted(images & labels), "skipped: " + "; ".join(notes) if notes else ""

    def read_list(self, split):
        """The ids in a list."""
        path = self.root / LISTS / f"{split}.txt"
        if path.is_file():
            return as_file_names(read_lines(path))
        lists = ", ".join(sorted(file.stem for file in path.parent.glob("*.txt"))) or "none"
        hint = f"it takes one image id a line; the lists there: {lists}"
        if split in SBD_LISTS:
            devkit = (self.root.resolve() if self.root.name in ("", "..") else self.root).parent
            command = ["python", "convert_voc_aug.py", str(devkit), str(devkit / "VOCaug")]
            hint = f"make it with: {shlex.join(command)}; data of your own takes --classes FILE"
        raise UserError(f"{path}: there is no such list; {hint}")

    def find(self, image_id, *folders):
        """The file of an id in some folders, whatever its extension, or None."""
        found = []
        for path in (folder / image_id for folder in folders):
            if path.parent not in self.listings:
                files = {}  # {name without extension: [paths]}
                for file in sorted(path.parent.iterdir()) if path.parent.is_dir() else ():
                    if is_readable(file):
                        files.setdefault(file.stem, []).append(file)
                self.listings[path.parent] = files  # at once, as other threads look there
            found += self.listings[path.parent].get(path.name, [])
        if len(found) > 1:
            raise UserError(f"{found[0]}: {found[1]} has the same name but for the folder or the extension; keep one")
        return found[0] if found else None

    def image_path(self, image_id):
        return self.find(image_id, self.images) or self.images / f"{image_id}.jpg"

    def label_path(self, image_id):
        own, sbd = [folder for folder in self.labels if folder.name != SBD_LABELS], [self.root / SBD_LABELS]
        if self.split in SBD_LISTS:
            own, sbd = ([self.root / OWN_LABELS], []) if image_id in self.voc_train else ([], sbd)
        return self.find(image_id, *own) or self.find(image_id, *sbd) or (own + sbd)[0] / f"{image_id}.png"

    def files(self):
        """Every file of the folder that is read."""
        found = [find(image_id) for image_id in self.ids for find in (self.image_path, self.label_path)]
        return [*found, *(self.root / LISTS).glob("*.txt"), *self.root.glob(CLASS_NAMES)]

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        """(image uint8 [3, H, W], label uint8 [H, W])."""
        return self.read(self.ids[index])[:2]

    def read(self, image_id):
        """-> (image, label, EXIF orientation of the image, palette of the label). Raises UserError unless both are of
        one size."""
        path = self.label_path(image_id)
        (image, orientation), (label, table) = decode_image(self.image_path(image_id)), decode_label(path)
        if image.shape[1:] != label.shape:
            hint = "they must be of one size"
            if orientation > 4 and image.shape[:0:-1] == label.shape:
                hint = "EXIF turns the image: turn the label, too, or remove the orientation from the image"
            raise UserError(f"{path}: the label is {label.shape[1]}x{label.shape[0]} pixels, its image "
                            f"{image.shape[2]}x{image.shape[1]}; {hint}")
        return image, label, orientation, table

    def look(self, image_id, num_classes):
        """-> a Look, or what is wrong, as text"""
        try:
            path, (_, label, orientation, table) = self.label_path(image_id), self.read(image_id)
            pixels = np.array(Image.fromarray(label.numpy()).histogram())
            used = np.flatnonzero(pixels).tolist()
            wrong = [value for value in used if num_classes <= value != IGNORE]
            if wrong:
                return (f"{path}: label value {wrong[0]} is no class; valid are 0..{num_classes - 1}, and {IGNORE} for "
                        "pixels to ignore")
            unseen = orientation in (2, 3, 4) or orientation > 4 and label.shape[0] == label.shape[1]
            digest = digest_of(self.image_path(image_id))
            return Look(label.shape, pixels, used_colours(table, used), unseen, digest, path)
        except (UserError, PermissionError) as error:
            return str(error)

    def check_images(self, ids):
        """Raises UserError if some ids have no image, naming the line of the list that has the first of them."""
        absent = [f"'{image_id}'" for image_id in ids if self.find(image_id, self.images) is None]
        if absent:
            where, hint = self.root, "restore it"
            if self.list_file:
                lines = as_file_names(map(str.strip, self.list_file.read_text(encoding="utf-8-sig").splitlines()))
                where = f"{self.list_file}, line {lines.index(absent[0][1:-1]) + 1}"
                hint = "add it, or fix the line: it takes the name of an image, with its sub-folders, without extension"
            raise UserError(f"{where}: {first_of(absent, ', ')}: there is no such image in {self.images}; {hint}")

    def check(self, num_classes, count=None):
        """Decodes the first `count` (default: all) images and labels, in threads, and returns their (H, W).

        So a bad file is found before the first iteration, not hours later. `looks` has what else there is to say.
        Raises UserError, naming the first few, for what __getitem__ cannot read, and for a label value that is neither
        a class nor IGNORE.
        """
        ids = self.ids[:count]
        self.check_images(ids)
        with ThreadPoolExecutor(usable_cores()) as pool:
            found = pool.map(lambda image_id: self.look(image_id, num_classes), ids)
            looks = list(tqdm(found, f"checking {self.split}", len(ids), leave=False, disable=None))
        problems = [look for look in looks if isinstance(look, str)]
        if problems:
            raise UserError(first_of(problems))
        self.looks = dict(zip(ids, looks, strict=True))
        return [look.size for look in looks]


def digest_of(path):
    """A short hash of a file's content."""
    return hashlib.blake2b(path.read_bytes(), digest_size=8).hexdigest()


def as_file_names(ids):
    """Ids of a list as Python decodes the names of files: by the locale, which need not be UTF-8."""
    return [os.fsdecode(image_id.encode(errors="surrogateescape")) for image_id in ids]


def is_readable(path):
    """True if Pillow decodes files of that extension, and it is none of macOS's `._` files."""
    kind = Image.registered_extensions().get(path.suffix.lower())
    return kind in Image.OPEN and kind not in STUBS and not path.name.startswith(".")


def walk(folder):
    """The files in a folder and its sub-folders, sorted, through links, without those whose name begins with a dot. A
    folder that is reached twice, say by a loop, is read under its first name. -> (files, other names of such folders)
    """
    files, again, seen, left = [], [], set(), [folder]
    while left:
        path = left.pop()
        if not path.is_dir():
            files.append(path)
        elif os.path.realpath(path) in seen:
            again.append(path)
        else:
            seen.add(os.path.realpath(path))
            left += sorted((inner for inner in path.iterdir() if not inner.name.startswith(".")), reverse=True)
    return files, again


def id_of(path, folder):
    """The path of a file in a folder, without extension."""
    return str(path.relative_to(folder).with_suffix(""))


def heic_hint(paths):
    return "; for HEIC: pip install pillow-heif" if any(path.suffix.lower() in HEIC for path in paths) else ""
