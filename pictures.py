"""What people look at: class maps as palette PNGs, overlays, comparisons with the label, samples, training curves.

Shapes: an image is uint8 [H, W, 3], RGB, channels last as Pillow has it; a label or class map uint8 [H, W]; `colours`
are uint8 [256, 3], the colour of each class and of IGNORE. What a function here returns, `save` writes.
"""
import functools
import math

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from cli import whole_file
from voc import IGNORE

OPACITY = 0.55  # of the class colours over a photograph
WRONG = (220, 40, 30)  # red, over a photograph in greys
WHITE, BLACK = (255, 255, 255), (0, 0, 0)
TEXT = 16  # height of the letters in pixels, at least
TEXT_PART = 32  # on large pictures they are that part of the side of a square of the same area
PANEL_SIDES = (320, 1024)  # the long side of a comparison's panels is brought between these, in pixels
SAMPLE_SIDE = 240  # of the pictures in a grid of samples, in pixels
GAP = 6  # pixels between pictures
JPEG_SIDE, JPEG_QUALITY = 65_500, 90  # a JPEG cannot have longer sides
MARKED_POINTS = 50  # a curve of more has no mark for each
# Pillow's own letters are Latin; class names in Chinese, Japanese or Korean need one of these, where the system has it.
CJK_FONTS = ("NotoSansCJK-Regular.ttc", "wqy-microhei.ttc", "msyh.ttc", "simhei.ttf", "PingFang.ttc")


def save(picture, path):
    """Writes a PIL image as a .png or .jpg, whole or not at all, and makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as temporary:
        if path.suffix == ".jpg":
            picture.thumbnail((JPEG_SIDE, JPEG_SIDE))
            picture.save(temporary, "JPEG", quality=JPEG_QUALITY)
        else:
            picture.save(temporary, "PNG")


def class_picture(classes, colours):
    """A class map as a palette PNG: its pixel values are the classes, as in VOC's labels."""
    picture = Image.fromarray(classes)
    picture.putpalette(colours.tobytes())
    return picture


def overlay(image, classes, names, colours):
    """The photograph, the classes found blended over it, and a legend with the share of the pixels each takes.

    The first class, the background, stays as it is.
    """
    photograph = Image.fromarray(image)
    blended = Image.blend(photograph, Image.fromarray(colours[classes]), OPACITY)
    picture = Image.composite(blended, photograph, Image.fromarray(classes != 0))
    counts = np.bincount(classes.ravel(), minlength=256)
    entries = [(f"{names[index]} {percent(counts[index] / classes.size)}", colours[index])
               for index in np.argsort(-counts, kind="stable") if index and counts[index]]
    return stack([picture, legend(entries or [(f"only {names[0]}", colours[0])], picture.width,
                                  text_size(*picture.size))])


def comparison(image, label, prediction, names, colours):
    """Photograph, label, prediction and errors side by side, with a legend of the classes in them."""
    labelled = label != IGNORE
    wrong = labelled & (label != prediction)
    greys = np.asarray(Image.fromarray(image).convert("L"))[..., None] // 2 + np.array([112, 112, 112], np.uint8)
    errors = np.where(wrong[..., None], np.uint8(WRONG), np.where(labelled[..., None], greys, np.uint8(WHITE)))
    share = percent(wrong.sum() / labelled.sum()) if labelled.any() else "nothing is labelled"
    side = min(max(max(label.shape), PANEL_SIDES[0]), PANEL_SIDES[1])
    panels = zip(("photograph", "label", "prediction", f"errors (red): {share}"),
                 (image, colours[label], colours[prediction], errors))
    size = text_size(side, side)
    row = beside([stack([text_line(caption, size), fitted(pixels, side, smooth=pixels is image)])
                  for caption, pixels in panels])
    return stack([row, legend(entries_of([label, prediction], names, colours), row.width, size)])


def sample_grid(samples, names, colours):
    """Rows of image, label and prediction, two samples a row, with a legend of the classes in them.

    samples: list of (image, label, prediction)
    """
    def row_of(image, label, prediction):
        cell = beside([fitted(pixels, SAMPLE_SIDE, smooth=pixels is image)
                       for pixels in (image, colours[label], colours[prediction])])
        return on_white(cell, 3 * (SAMPLE_SIDE + GAP) - GAP, cell.height)

    cells = [row_of(*sample) for sample in samples]
    rows = [beside(cells[start:start + 2], 4 * GAP) for start in range(0, len(cells), 2)]
    caption = text_line("each: photograph, label, prediction", TEXT)
    maps = [classes for _, *both in samples for classes in both]
    return stack([caption, *rows, legend(entries_of(maps, names, colours), rows[0].width, TEXT)], GAP)


def percent(share):
    return f"{100 * share:.1f}%" if share == 0 or share >= 0.0005 else "<0.1%"


def entries_of(maps, names, colours):
    """The legend's entries for the classes in some class maps or labels: [(text, colour), ...]."""
    present = np.flatnonzero(sum(np.bincount(classes.ravel(), minlength=256) for classes in maps))
    return [("left out" if index == IGNORE else names[index], colours[index]) for index in present]


def fitted(pixels, side, smooth):
    """An image resized, aspect kept, so that its long side is `side`; class colours are not mixed (`smooth` off)."""
    picture = Image.fromarray(pixels)
    factor = side / max(picture.size)
    size = [max(1, round(length * factor)) for length in picture.size]
    return picture.resize(size, Image.Resampling.BILINEAR if smooth else Image.Resampling.NEAREST)


def text_size(width, height):
    """The height of letters on a picture, all in pixels."""
    return max(TEXT, math.isqrt(width * height) // TEXT_PART)


@functools.lru_cache
def font(size, ascii_only):
    """Letters `size` pixels high."""
    for name in () if ascii_only else CJK_FONTS:
        try:
            return ImageFont.truetype(name, size)
        except OSError:
            pass
    return ImageFont.load_default(size)


def text_line(text, size):
    """A text on white, as an RGB image."""
    letters = font(size, text.isascii())
    picture = Image.new("RGB", (round(letters.getlength(text)) + size, 2 * size), WHITE)
    ImageDraw.Draw(picture).text((size // 2, size), text, BLACK, letters, anchor="lm")
    return picture


def legend(entries, width, size):
    """Colour squares with their texts on white, in as many lines as the width, in pixels, asks for.

    entries: [(text, colour), ...]; size: the height of the letters in pixels
    """
    lines = [[]]
    for text, colour in entries:
        square = Image.new("RGB", (size, size), BLACK)
        square.paste(tuple(int(value) for value in colour), (1, 1, size - 1, size - 1))
        entry = beside([on_white(square, size + size // 2, 2 * size), text_line(text, size)], 0)
        if lines[-1] and sum(item.width for item in lines[-1]) + entry.width > width:
            lines.append([])
        lines[-1].append(entry)
    return stack([beside(line, 0) for line in lines])


def on_white(picture, width, height):
    """A picture in the middle of a white one of at least its size."""
    canvas = Image.new("RGB", (max(width, picture.width), max(height, picture.height)), WHITE)
    canvas.paste(picture, ((canvas.width - picture.width) // 2, (canvas.height - picture.height) // 2))
    return canvas


def beside(pictures, gap=GAP):
    """Pictures in a row on white, upper edges level."""
    canvas = Image.new("RGB", (sum(picture.width for picture in pictures) + gap * (len(pictures) - 1),
                               max(picture.height for picture in pictures)), WHITE)
    left = 0
    for picture in pictures:
        canvas.paste(picture, (left, 0))
        left += picture.width + gap
    return canvas


def stack(pictures, gap=0):
    """Pictures in a column on white, left edges level."""
    canvas = Image.new("RGB", (max(picture.width for picture in pictures),
                               sum(picture.height for picture in pictures) + gap * (len(pictures) - 1)), WHITE)
    top = 0
    for picture in pictures:
        canvas.paste(picture, (0, top))
        top += picture.height + gap
    return canvas


def curves(metrics):
    """Loss and mIoU over the iterations, as an RGB image; `metrics`: the lines of metrics.jsonl as dicts."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # only here: it takes a second to load
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), dpi=100, layout="constrained")  # inches
    canvas = FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2, sharex=True)
    losses = [(line["iter"], line["loss"]) for line in metrics if "loss" in line]
    scores = [(line["iter"], line["mIoU"]) for line in metrics if "mIoU" in line]
    for axes, points, title, colour in zip(panels, (losses, scores), ("training loss", "validation mIoU, %"),
                                           ("tab:blue", "tab:green")):
        axes.plot([iteration for iteration, _ in points], [value for _, value in points], color=colour,
                  marker="o" if len(points) <= MARKED_POINTS else "", markersize=4)
        axes.set(title=title, xlabel="iteration", xlim=(0, None), ylim=(0, None))
        axes.grid(alpha=0.3)
    iteration, best = max(scores, key=lambda point: point[1])
    panels[1].set_title(f"validation mIoU, %: best {best:.2f} at iteration {iteration:,}")
    panels[1].set_ylim(0, min(100, max(1, 1.1 * best)))
    panels[1].axhline(best, color="grey", linewidth=0.8, linestyle="--")
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
