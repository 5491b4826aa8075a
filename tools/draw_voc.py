"""Draws a small data set in VOC's layout, with an SBD part, for those who have no VOC at hand:
`python tools/draw_voc.py DIR` makes DIR/VOCdevkit/VOC2012, with class names of its own, and DIR/VOCdevkit/VOCaug.

Shapes on textured backgrounds; each class is one shape in one family of colours, with a void boundary around it, as in
VOC. Of the SBD ids some are in VOC's train and val, so that convert_voc_aug.py has something to exclude.
"""
import argparse
from pathlib import Path

import numpy as np
import scipy.io
from PIL import Image, ImageDraw, ImageFilter

# The classes 1, 2, ... and their colours; class 0 is the background
SHAPES = {"triangle": (70, 110, 220), "star": (235, 200, 60), "bar": (60, 170, 80), "disc": (215, 60, 60),
          "square": (160, 80, 190)}
VOID = 255
VOID_WIDTH = 2  # pixels
COUNTS = {"train": 48, "val": 24, "sbd": 48}
SHARED = 4  # SBD ids that are in VOC's train, and as many in its val
SIDES = (96, 161)


def outline(kind, centre, radius, angle):
    """The corners of a shape, or of a disc's polygon, as [(x, y), ...]."""
    turns = {"triangle": [0, 1 / 3, 2 / 3], "square": [0, 1 / 4, 2 / 4, 3 / 4], "bar": [0.05, 0.45, 0.55, 0.95],
             "star": [i / 10 for i in range(10)], "disc": [i / 40 for i in range(40)]}[kind]
    radii = [radius * (0.45 if kind == "star" and i % 2 else 1) for i in range(len(turns))]
    return [(centre[0] + r * np.cos(2 * np.pi * turn + angle), centre[1] + r * np.sin(2 * np.pi * turn + angle))
            for r, turn in zip(radii, turns, strict=True)]


def texture(rng, width, height):
    """A background: blurred noise of a random grain around a random greyish colour."""
    noise = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
    noise = noise.filter(ImageFilter.GaussianBlur(rng.uniform(0.5, 3)))
    return np.asarray(noise, np.float64) * 0.5 + rng.uniform(40, 110) + rng.uniform(-12, 12, 3)


def draw(rng):
    """One image and its label: uint8 [H, W, 3], uint8 [H, W]."""
    width, height = rng.integers(*SIDES, 2)
    pixels, label = texture(rng, width, height), Image.new("L", (width, height))
    for _ in range(rng.integers(1, 4)):
        index = int(rng.choice(len(SHAPES)))
        kind, colour = list(SHAPES.items())[index]
        radius = rng.uniform(0.18, 0.4) * min(width, height)
        corners = outline(kind, (rng.uniform(0, width), rng.uniform(0, height)), radius, rng.uniform(0, 2 * np.pi))
        mask = Image.new("L", (width, height))
        ImageDraw.Draw(mask).polygon(corners, fill=1)
        shade = np.array(colour) * rng.uniform(0.8, 1.15) + rng.normal(0, 12, (height, width, 1))
        pixels = np.where(np.asarray(mask)[..., None] == 1, shade, pixels)
        ImageDraw.Draw(label).polygon(corners, fill=index + 1)
        ImageDraw.Draw(label).line([*corners, corners[0]], fill=VOID, width=VOID_WIDTH)
    return pixels.clip(0, 255).astype(np.uint8), np.asarray(label)


def draw_data_set(folder, seed=0, counts=COUNTS):
    """Writes the data set under `folder`, the same for the same seed, and returns its VOCdevkit folder."""
    rng = np.random.default_rng(seed)
    devkit = Path(folder) / "VOCdevkit"
    voc, sbd = devkit / "VOC2012", devkit / "VOCaug" / "dataset"
    for path in (voc / "JPEGImages", voc / "SegmentationClass", voc / "ImageSets" / "Segmentation", sbd / "cls"):
        path.mkdir(parents=True, exist_ok=True)
    ids = {part: [f"drawn_{part}_{i:04}" for i in range(count)] for part, count in counts.items()}
    for part, names in ids.items():
        for name in names:
            image, label = draw(rng)
            Image.fromarray(image).save(voc / "JPEGImages" / f"{name}.jpg", quality=95)
            if part == "sbd":
                write_mat(sbd / "cls" / f"{name}.mat", label)
            else:
                Image.fromarray(label).save(voc / "SegmentationClass" / f"{name}.png")
                if name in names[:SHARED]:
                    write_mat(sbd / "cls" / f"{name}.mat", label)
    for part, names in {**ids, "trainval": ids["train"] + ids["val"]}.items():
        if part != "sbd":
            (voc / "ImageSets" / "Segmentation" / f"{part}.txt").write_text("\n".join(names) + "\n")
    return devkit


def write_mat(path, label):
    """SBD's form of a label; SBD has no void."""
    label = np.where(label == VOID, 0, label).astype(np.uint8)
    scipy.io.savemat(path, {"GTcls": {"Segmentation": label, "CategoriesPresent": np.unique(label[label > 0])}})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Draw a small data set in VOC's layout.")
    parser.add_argument("folder", metavar="DIR")
    made = draw_data_set(parser.parse_args().folder)
    (made / "VOC2012" / "class_names.txt").write_text("\n".join(["background", *SHAPES]) + "\n")
    print(f"drew {sum(COUNTS.values())} images: {made}")
