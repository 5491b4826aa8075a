"""Pictures for people: class maps as palette PNGs, overlays, comparisons, sample grids, curves, confusion matrices.

Shapes: an image is uint8 [H, W, 3], RGB, channels last as in Pillow; a label or class map is uint8 [H, W]; `colours`
are uint8 [256, 3], the colour of each class and of IGNORE. Functions return PIL images, which `save` writes.
Drawn over an image, class 0 (the background) is transparent and IGNORE is opaque.
"""
import contextlib
import functools
import io
import itertools
import logging
import math
import warnings

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from files import check_no_overlap, check_writable, remove_leftovers, whole_file
from voc import IGNORE, first_of

OPACITY = 0.55  # of the class colours over an image
OPACITIES = [0] + [round(255 * OPACITY)] * (IGNORE - 1) + [255]  # of each class and of IGNORE, in 255ths
UNDER = 128  # the grey under the colours of a legend, where a picture has the image
WRONG = (220, 40, 30)  # red: the colour of errors, drawn over the image in greys
GREYS = [32 + value * 5 // 8 for value in range(256)]  # the levels of that grey image; they lower its contrast
WHITE, BLACK, FRAME = (255, 255, 255), (0, 0, 0), (120, 120, 120)
TEXT, TITLE = 16, 20  # minimum height of text, and height of a grid's title, in pixels
TEXT_PART = 32  # on large pictures, text is sqrt(area) / TEXT_PART pixels high
OUTLINE_PART = 20  # outlines of classes are 1 / OUTLINE_PART of the text's height wide, at least one pixel
GREYISH = 64  # a colour whose channels differ by less is striped: photographs have areas of such a colour
STRIPE_WIDTH, STRIPE_STEP = 2, 8  # of those stripes, in widths of an outline
LEGEND_WIDTH = 8  # minimum width of a legend, in heights of its text
LEGEND_PART, LEGEND_ROWS = 3, 2  # a legend is at most 1 / LEGEND_PART of a picture's height, or has so many rows
STRIP_PIXELS = 2 ** 22  # overlays are blended in strips of this many pixels, to save memory
PANELS = ("photograph", "label", "prediction")  # and the errors
PANEL_SIDES = (320, 1024)  # minimum and maximum of the longer side of a comparison's panels, in pixels
SAMPLE_BOX = (220, 165)  # maximum width and height of the views in a sample grid, in pixels
BLOCKS = 2  # samples per row of a grid of images with their labels
BAR_LENGTH = 160  # pixels of a bar of 100%
GAP = 6  # pixels between pictures
ROW, COLUMN = 0, 1  # the axis along which `joined` places pictures
JPEG_SIDE, JPEG_QUALITY = 65_500, 90  # the format allows no longer sides

RUNNING_PART = 10  # the running mean of the loss spans 1 / RUNNING_PART of all values
CHART_STYLE = {"text.parse_math": False, "axes.grid": True, "grid.alpha": 0.3, "axes.spines.top": False,
               "axes.spines.right": False, "axes.titlelocation": "left", "figure.constrained_layout.h_pad": 0.1}
CURVES, BAR, NAME = (13, 8.5), 0.2, 30  # inches of the curves, and at least of a class's bar; letters of a name shown
CELL, MATRIX = 0.36, 2.5  # side of a confusion matrix's cell, and the least of the matrix, in inches
ASCII = frozenset(map(chr, range(0x20, 0x7F)))


def save(picture, path):
    """Writes a PIL image as .png or .jpg, completely or not at all. Creates the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jpg":
        picture.thumbnail((JPEG_SIDE, JPEG_SIDE))  # a smaller one stays as it is
    with whole_file(path) as temporary:
        picture.save(temporary, "JPEG" if path.suffix == ".jpg" else "PNG", quality=JPEG_QUALITY)  # PNG ignores this


def picture_files(folder, names, kinds, read):
    """The files of some images' pictures in --save_dir: {name of an image: [path of each kind, say "overlay/{}.jpg"]}.

    What killed writers left there is deleted. Raises OSError if the folder cannot be written to, or a picture would
    overwrite one of another kind or a file of `read`.
    """
    found = {name: [folder / kind.format(name) for kind in kinds] for name in names}
    for files in zip(*found.values(), strict=True):
        check_no_overlap(read, files, f"--save_dir {folder}")
        read = [*read, *files]
    check_writable(folder)
    remove_leftovers({file.parent for files in found.values() for file in files})
    return found


def class_picture(classes, colours):
    """A class map as a palette image. Its pixel values are the classes, as in VOC's labels."""
    picture = Image.fromarray(classes)
    picture.putpalette(colours.tobytes())
    return picture


def overlay(image, classes, names, colours):
    """The image with the class map blended over it, and a legend with each class's share of the pixels."""
    height, width = classes.shape
    font = font_for(names, width, height)
    below = (legend([classes], names, colours, (width, height), font, shares=True) if classes.any()
             else text_line("nothing found", font))
    canvas = Image.new("RGB", (max(width, below.width), height + below.height), WHITE)
    canvas.paste(below, (0, height))
    line, rows = max(1, font.size // OUTLINE_PART), math.ceil(STRIP_PIXELS / width)
    for top in range(0, height, rows):
        above = min(line, top)  # extra rows on both sides continue outlines across strips
        part = slice(top - above, top + rows + line)
        strip = tinted(Image.fromarray(image[part]), classes[part], colours, line)
        canvas.paste(strip.crop((0, above, width, above + min(rows, height - top))), (0, top))
    return canvas


def comparison(image, label, prediction, names, colours):
    """Image, label, prediction and errors side by side, with a legend of their classes."""
    wrong = (label != prediction)[label != IGNORE]
    errors = f"errors: {percent(wrong.mean()) if wrong.size else 'nothing is labelled'}"
    side = min(max(max(label.shape), PANEL_SIDES[0]), PANEL_SIDES[1])
    return sample_grid([("", image, label, prediction)], names, colours, box=(side, side), errors=errors)


def sample_grid(samples, names, colours, title="", box=SAMPLE_BOX, errors="errors"):
    """Samples [(name, image, label, prediction), ...] with their errors, one a row; or [(name, image, label), ...],
    BLOCKS a row; with a legend.

    box: maximum (width, height) of a view; errors: their caption
    """
    font = font_for([*names, *(name for name, *_ in samples)], *box)
    parts = [views(image, maps, box, colours, max(1, font.size // OUTLINE_PART)) for _, image, *maps in samples]
    captions = (*PANELS, errors)[:len(parts[0])]
    heads = [text_line(text, font, WRONG if text == errors else None) for text in captions]
    width = max(view.width for part in (heads, *parts) for view in part)
    blocks = min(BLOCKS, len(samples)) if len(heads) == 2 else 1
    cells = [joined(heads, ROW, GAP, (width, 0))] * blocks
    for (name, *_), part in zip(samples, parts, strict=True):
        row = joined(part, ROW, GAP, (width, 0))
        above = [text_line(fitting(name, "", font, row.width - 2 * font.size), font)] if name else []
        cells.append(joined([*above, row], COLUMN))
    rows = [joined(cells[start:start + blocks], ROW, 4 * GAP) for start in range(0, len(cells), blocks)]
    body, maps = joined(rows, COLUMN, GAP), [classes for _, _, *maps in samples for classes in maps]
    body = joined([body, legend(maps, names, colours, body.size, font)], COLUMN, GAP)
    return joined([text_line(title, ImageFont.load_default(TITLE)), body], COLUMN) if title else body


def views(image, maps, box, colours, line):
    """An image fitted into a box (width, height), and its class maps over it. If these are a label and a prediction,
    also the errors. -> [PIL image, ...]"""
    height, width = image.shape[:2]
    factor = min(box[0] / width, box[1] / height)
    size = [max(1, round(length * factor)) for length in (width, height)]
    image = Image.fromarray(image).resize(size, Image.Resampling.BILINEAR)
    maps = [np.asarray(Image.fromarray(classes).resize(size, Image.Resampling.NEAREST)) for classes in maps]
    shown = [image, *(tinted(image, classes, colours, line) for classes in maps)]
    if len(maps) == 2:
        label, prediction = maps
        errors = image.convert("L").point(GREYS).convert("RGB")
        errors.paste(tuple(colours[IGNORE].tolist()), mask=Image.fromarray(label == IGNORE))
        errors.paste(WRONG, mask=Image.fromarray((label != prediction) & (label != IGNORE)))
        shown.append(errors)
    return shown


def class_bars(shares, names, colours):
    """The classes' shares of the pixels in some lists. shares: {list: float [256], of each value of the labels}"""
    font, total = font_for(names, *SAMPLE_BOX), sum(shares.values())
    fills = {index: tuple(colours[index].tolist()) for index in np.argsort(-total).tolist() if total[index]}
    columns = [[text_line("", font), *(text_line("not labelled" if index == IGNORE else names[index], font, fill)
                                       for index, fill in fills.items())]]
    for name, part in shares.items():
        columns.append([text_line(f"{name}, share of the pixels", font)])
        for index, fill in fills.items():
            bar = Image.new("RGB", (round(BAR_LENGTH * part[index]), font.size), fill)
            columns[-1].append(joined([bar, text_line(percent(part[index]), font)], ROW, 0, (0, 2 * font.size)))
    return joined([joined(column, COLUMN) for column in columns], ROW, GAP)


def tinted(image, classes, colours, line):
    """A PIL image with class colours over it, striped if they are greyish or pale, and outlines `line` pixels wide."""
    picture, layer = image.copy(), class_picture(classes, colours).convert("RGB")
    greyish = np.ptp(colours.astype(int), axis=1) < GREYISH
    greyish[IGNORE] = False
    striped = class_picture(classes, np.where(greyish[:, None], colours ^ 128, colours)).convert("RGB")
    stripes = np.arange(image.width) // line % STRIPE_STEP < STRIPE_WIDTH
    layer.paste(striped, mask=Image.fromarray(np.broadcast_to(stripes, classes.shape)))
    picture.paste(layer, mask=Image.fromarray(classes).point(OPACITIES))
    picture.paste(WHITE, mask=Image.fromarray(outlines(classes, line)))
    return picture


def histogram(classes):
    """How many pixels of a class map have each value: int64 [256]. np.bincount needs 8 times the memory."""
    return np.array(Image.fromarray(classes).histogram())


def outlines(classes, line):
    """Pixels of objects with another class `line` pixels away: bool [H, W]. IGNORE is not another class."""
    found = np.zeros(classes.shape, bool)
    for other, here in ((classes, found), (classes.T, found.T)):
        length = max(0, len(other) - line)
        differs = other[:length] != other[line:]
        differs &= (other[:length] != IGNORE) & (other[line:] != IGNORE)
        here[:length] |= differs
        here[line:] |= differs
    return found & (classes != 0) & (classes != IGNORE)


def percent(share):
    return f"{100 * share:.1f}%" if share == 0 or share >= 0.0005 else "<0.1%"


def legend(maps, names, colours, size, font, shares=False):
    """The classes in some maps, the most frequent first, below a picture of `size` (width, height). It is no wider, and
    those that would make it too high are counted. Class 0 takes no row of its own. `shares` adds those of the pixels"""
    counts = sum(map(histogram, maps))
    width, rows = max(size[0], LEGEND_WIDTH * font.size), [[]]
    ground = Image.new("RGB", (font.size, font.size), (UNDER, UNDER, UNDER))
    for index in sorted(np.flatnonzero(counts).tolist(), key=lambda i: (i == 0, i == IGNORE, -counts[i])):
        name = "not labelled" if index == IGNORE else names[index] if index else f"no colour: {names[0]}"
        share = f" {percent(counts[index] / counts.sum())}" if shares else ""
        square = np.full(ground.size, index, np.uint8)
        square = tinted(ground, square, colours, max(1, font.size // OUTLINE_PART)) if index else None
        entry = text_line(fitting(name, share, font, width - 3 * font.size), font, square)
        if rows[-1] and sum(item.width for item in (*rows[-1], entry)) > width:
            rows.append([])
        rows[-1].append(entry)
    if counts[0] and len(rows[-1]) == 1 < len(rows):
        rows.pop()
    margin = font.size // 4  # of a line of text, too much for a legend
    most = max(LEGEND_ROWS, size[1] // (LEGEND_PART - 1) // (2 * (font.size - margin)))
    if len(rows) > most:
        rows[most - 1:] = [[text_line(f"and {sum(map(len, rows[most - 1:]))} more", font)]]
    return joined([ImageOps.crop(joined(row, ROW), (0, margin)) for row in rows], COLUMN)


def fitting(name, end, font, width):
    """A name and its end, the name cut so that the text takes at most `width` pixels."""
    text, length = name + end, len(name)
    while length and sum(part.getlength(run) for run, part in runs(text, font)) > width:
        length -= 1
        text = f"{name[:length]}...{end}"
    return text


def runs(text, font):
    """[(part of a text, its font), ...]: ASCII has Pillow's own, within other letters only if the font lacks it."""
    if not text.isascii() and ASCII <= installed_fonts().get(font.path, ("", ASCII))[1]:
        return [(text, font)]
    own = ImageFont.load_default(font.size)
    return [("".join(run), own if ascii else font) for ascii, run in itertools.groupby(text, str.isascii)]


def text_line(text, font, square=None):
    """A line of text on white, after a square if there is one: a colour, or a picture of the text's height."""
    size, half = font.size, font.size // 2
    left = 2 * size - half if square else 0
    parts = [(*run, run[1].getlength(run[0])) for run in runs(text, font)]
    picture = Image.new("RGB", (left + round(sum(length for *_, length in parts)) + size, 2 * size), WHITE)
    draw = ImageDraw.Draw(picture)
    if square:
        picture.paste(square, (half, half, half + size, half + size))
        draw.rectangle((half, half, half + size - 1, half + size - 1), None, FRAME)
    left += size / 2
    for run, part, length in parts:
        draw.text((left, size * 1.35), run, BLACK, part, anchor="ls")
        left += length
    return picture


def joined(pictures, axis, gap=0, cell=(0, 0)):
    """Pictures in a ROW or a COLUMN on white, each in the middle of a cell of at least the given (width, height)."""
    spaces = np.array([np.maximum(picture.size, cell) for picture in pictures])
    size = spaces.max(0)
    size[axis] = spaces[:, axis].sum() + gap * (len(pictures) - 1)
    canvas = Image.new("RGB", tuple(size.tolist()), WHITE)
    corner = np.zeros(2, int)
    for picture, space in zip(pictures, spaces, strict=True):
        canvas.paste(picture, tuple((corner + (space - picture.size) // 2).tolist()))
        corner[axis] += space[axis] + gap
    return canvas


@contextlib.contextmanager
def chart_style(names):
    """matplotlib's style, and its fonts for these class names. Yields its Figure."""
    import matplotlib  # here, because it takes a second
    from matplotlib.figure import Figure

    path, _ = font_file(names)
    families = [installed_fonts()[path][0]] if path else []
    with (matplotlib.rc_context({"font.family": ["DejaVu Sans", *families], **CHART_STYLE}),
          warnings.catch_warnings(record=True)):  # of missing letters, which `missing_font` reports
        yield Figure


def draw_curves(metrics, names):
    """Loss, learning rate and mIoU, and after an evaluation the IoU per class. metrics: metrics.jsonl as dicts."""
    tables = [line for line in metrics if any(iou is not None for iou in line.get("IoU", {}).values())]
    with chart_style(names) as figure_of:
        figure = figure_of(figsize=(CURVES[0], max(CURVES[1], BAR * len(names))), layout="constrained")
        panels = figure.subplot_mosaic("LC;MC;RC" if tables else "L;M;R", height_ratios=(3, 3, 2))
        iterations, losses = draw_line(panels["L"], metrics, "loss", "training loss", "tab:blue", alpha=0.4).T
        window = len(losses) // RUNNING_PART
        if window > 1:
            mean = np.convolve(losses, np.full(window, 1 / window), "valid")
            panels["L"].plot(iterations[window - 1:], mean, color="tab:blue", linewidth=2)
            panels["L"].set_title(f"training loss, and its mean over {window} values")
        scores = draw_line(panels["M"], metrics, "mIoU", "validation mIoU, %", "tab:green")
        if len(scores):
            iteration, best = scores[scores[:, 1].argmax()]
            panels["M"].plot(iteration, best, "*", color="tab:green", markersize=13, markeredgecolor="white")
            panels["M"].set_title(f"validation mIoU, %: best {best:.2f} at iteration {iteration:,.0f}")
        draw_line(panels["R"], metrics, "lr", "learning rate", "tab:purple")
        panels["R"].set_xlabel("iteration")
        if tables:
            draw_bars(panels["C"], tables[-1], names)
        figure.savefig(file := io.BytesIO())
    return Image.open(file).convert("RGB")


def draw_line(axes, metrics, key, title, colour, **style):
    """Draws the finite values of `key` on an axis that includes 0. Returns (iteration, value): float [N, 2]."""
    found = [(line["iter"], line[key]) for line in metrics if line.get(key) is not None and math.isfinite(line[key])]
    points = np.array(found, float).reshape(-1, 2)
    axes.plot(*points.T, color=colour, marker="o" if len(found) <= 50 else "", markersize=4, **style)
    axes.set(title=title, xlim=(0, 1.02 * max([1, *(line["iter"] for line in metrics)])),
             ylim=(0, 1.08 * max(points[:, 1], default=0) or 1))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.xaxis.get_major_locator().set_params(integer=True)
    return points


def draw_bars(axes, scores, names):
    """Draws bars of each class's IoU in an evaluation, and a line at its mIoU. Classes that neither labels nor
    predictions have are counted."""
    values, accuracy = scores["IoU"], scores.get("Acc", {})
    shown = sorted((name for name in names if values.get(name) is not None), key=values.get)
    texts = [f"{values[name]:.1f}" if accuracy.get(name, 0) is not None else "not in labels" for name in shown]
    axes.barh(range(len(shown)), [values[name] for name in shown], color="tab:green", alpha=0.6)
    axes.axvline(scores["mIoU"], color="grey", linewidth=0.8, linestyle="--")
    axes.set_yticks(range(len(shown)), [f"{name[:NAME]}  {text}" for name, text in zip(shown, texts, strict=True)])
    axes.grid(False, axis="y")
    left_out = f"{len(names) - len(shown)} of {len(names)} classes: neither in labels nor in predictions"
    axes.set(title=f"IoU per class at iteration {scores['iter']:,}, %; dashed: mIoU {scores['mIoU']:.2f}",
             xlabel=left_out if len(shown) < len(names) else "", xlim=(0, 100),
             ylim=(min(0, len(shown) - 8) - 0.6, len(shown) - 0.4))  # few bars stay slim


def draw_confusion(confusion, names):
    """A confusion matrix [C, C], row: label, column: prediction, in per cent of a row, without classes in neither."""
    counts = np.array(confusion)
    present = np.flatnonzero(counts.sum(0) + counts.sum(1)) if counts.any() else [0]
    counts = counts[np.ix_(present, present)]
    labelled, columns = counts.sum(1, keepdims=True), [names[index][:NAME] for index in present]
    rows = [name if count else f"{name} (not in labels)" for name, count in zip(columns, labelled, strict=True)]
    shares, side = 100 * counts / labelled.clip(min=1), max(MATRIX, CELL * len(present))
    with chart_style(names) as figure_of:
        figure = figure_of(figsize=(side, side), dpi=100)
        axes = figure.add_axes((0, 0, 1, 1))
        axes.imshow(shares, "Greens", vmin=0, vmax=100)
        for row, column in np.argwhere(shares >= 0.5):
            axes.text(column, row, f"{shares[row, column]:.0f}", ha="center", va="center", fontsize="small",
                      color="white" if shares[row, column] > 60 else "black")
        axes.set_xticks(range(len(columns)), columns, rotation=90)
        axes.set_yticks(range(len(rows)), rows)
        axes.tick_params(length=0, labeltop=True, labelbottom=False)
        axes.grid(False)
        axes.set(xlabel="prediction", ylabel="label", title="% of each label's pixels")
        figure.savefig(file := io.BytesIO(), bbox_inches="tight")
    return Image.open(file).convert("RGB")


def missing_font(names):
    """One line that lists the letters of class names that pictures cannot show and names packages, or None."""
    missing = first_of(sorted(font_file(names)[1]), " ")
    return (f"no installed font has all letters of the class names, so pictures show boxes for {missing}; on Debian or "
            "Ubuntu: apt-get install fonts-noto-cjk (Chinese, Japanese, Korean) or fonts-noto (other scripts)"
            if missing else None)


def font_for(names, width, height):
    """Pillow's font for a picture of that size. It is the same for all class names, as far as they are not ASCII."""
    path, _ = font_file(names)
    size = max(TEXT, math.isqrt(width * height) // TEXT_PART)
    return ImageFont.truetype(path, size) if path else ImageFont.load_default(size)


def font_file(names):
    """The font for class names: (path, or None for Pillow's own if all are ASCII; the other letters that it lacks)."""
    letters = {letter for letter in "".join(names) if not letter.isascii() and letter.isprintable()}
    if not letters:
        return None, letters
    fonts = installed_fonts()
    path = max(fonts, key=lambda path: [len(wanted & fonts[path][1]) for wanted in (letters, ASCII)])
    return path, letters - fonts[path][1]


@functools.cache
def installed_fonts():
    """{path: (family, its characters)}: regular faces and sans-serif families first."""
    from matplotlib import font_manager, ft2font

    logging.getLogger(font_manager.__name__).setLevel(logging.ERROR)  # no warnings of families without this weight
    fonts, listed = {}, font_manager.fontManager.ttflist  # `addfont` adds to this list
    for path in sorted(set(font_manager.findSystemFonts()).difference(entry.fname for entry in listed)):
        with contextlib.suppress(Exception):  # unusable fonts raise exceptions of many types
            font_manager.fontManager.addfont(path)  # installed after matplotlib cached its list
    for entry in sorted(listed, key=lambda font: (font.style != "normal", font.weight != 400, "Sans" not in font.name,
                                                  font.name)):
        with contextlib.suppress(OSError, RuntimeError):  # deleted or damaged
            if entry.fname not in fonts and not entry.name.startswith("Last Resort"):
                letters = frozenset(map(chr, ft2font.FT2Font(entry.fname).get_charmap()))
                fonts[entry.fname] = entry.name, letters
    return fonts
