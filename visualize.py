"""Pictures for people: class maps as palette PNGs, overlays, comparisons with the label, sample grids, curves.

Shapes: an image is uint8 [H, W, 3], RGB, channels last as in Pillow; a label or class map is uint8 [H, W]; `colours`
are uint8 [256, 3], the colour of each class and of IGNORE. Functions return PIL images, which `save` writes.
Drawn over an image, class 0 (the background) is transparent and IGNORE is opaque.
"""
import contextlib
import functools
import io
import logging
import math
import warnings

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from files import whole_file
from voc import IGNORE

OPACITY = 0.55  # of the class colours over an image
OPACITIES = [0] + [round(255 * OPACITY)] * (IGNORE - 1) + [255]  # of each class and of IGNORE, in 255ths
UNDER = 128  # the grey under the colours of a legend, where a picture has the image
WRONG = (220, 40, 30)  # red: the colour of errors, drawn over the image in greys
GREYS = [32 + value * 5 // 8 for value in range(256)]  # the levels of that grey image; they lower its contrast
WHITE, BLACK, FRAME = (255, 255, 255), (0, 0, 0), (120, 120, 120)
TEXT, TITLE = 16, 20  # minimum height of text, and height of a grid's title, in pixels
TEXT_PART = 32  # on large pictures, text is sqrt(area) / TEXT_PART pixels high
OUTLINE_PART = 20  # outlines of classes are 1 / OUTLINE_PART of the text's height wide, at least one pixel
STRIP_PIXELS = 2 ** 22  # overlays are blended in strips of this many pixels, to save memory
PANEL_SIDES = (320, 1024)  # minimum and maximum of the longer side of a comparison's panels, in pixels
SAMPLE_BOX = (240, 200)  # maximum width and height of the views in a sample grid, in pixels
SAMPLE_COLOURS, SAMPLE_STEP = 192, 3  # a grid is reduced to this many colours, chosen from every third pixel
BLOCKS = 2  # samples per row of a grid
GAP = 6  # pixels between pictures
ROW, COLUMN = 0, 1  # the axis along which `joined` places pictures
JPEG_SIDE, JPEG_QUALITY = 65_500, 90  # the format allows no longer sides

RUNNING_PART = 10  # the running mean of the loss spans 1 / RUNNING_PART of all values
CHART_STYLE = {
    "figure.constrained_layout.w_pad": 0.1, "figure.constrained_layout.h_pad": 0.1, "text.parse_math": False,
    "axes.grid": True, "grid.alpha": 0.3, "axes.spines.top": False, "axes.spines.right": False,
    "axes.titlelocation": "left"}
BARS, BAR_NAME = 40, 30  # a bar chart shows at most this many classes, and this many letters of a name

ASCII = frozenset(map(chr, range(0x20, 0x7F)))
LETTERS_SHOWN = 8  # a note on missing letters shows at most this many


def save(picture, path):
    """Writes a PIL image as .png or .jpg, completely or not at all. Creates the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = "JPEG" if path.suffix == ".jpg" else "PNG"
    factor = JPEG_SIDE / max(picture.size)
    if kind == "JPEG" and factor < 1:
        picture = picture.resize([max(1, int(length * factor)) for length in picture.size])
    with whole_file(path) as temporary:
        picture.save(temporary, kind, quality=JPEG_QUALITY)  # PNG ignores the quality


def class_picture(classes, colours):
    """A class map as a palette image. Its pixel values are the classes, as in VOC's labels."""
    picture = Image.fromarray(classes)
    picture.putpalette(colours.tobytes())
    return picture


def overlay(image, classes, names, colours):
    """The image with the class map blended over it, and a legend with each class's share of the pixels."""
    height, width = classes.shape
    font = font_for(names, width, height)
    if classes.any():
        below = legend([classes], names, colours, width, font, shares=True)
    else:
        below = text_line("nothing found", font)
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
    share = percent(wrong.mean()) if wrong.size else "nothing is labelled"
    side = min(max(max(label.shape), PANEL_SIDES[0]), PANEL_SIDES[1])
    font = font_for(names, side, side)
    panels, _ = views(image, label, prediction, (side, side), colours, max(1, font.size // OUTLINE_PART))
    captions = [text_line(text, font) for text in ("photograph", "label", "prediction")]
    captions.append(text_line(f"errors: {share}", font, WRONG))
    width = max(part.width for part in (*panels, *captions))
    body = joined([joined(parts, ROW, GAP, (width, 0)) for parts in (captions, panels)], COLUMN)
    return joined([body, legend([label, prediction], names, colours, body.width, font)], COLUMN)


def sample_grid(samples, names, colours, title):
    """Label, prediction and errors of samples [(image, label, prediction), ...] in a grid: an image of mode P."""
    font = font_for(names, *SAMPLE_BOX)
    parts = [views(*sample, SAMPLE_BOX, colours, 1) for sample in samples]
    cell = [max(panels[0].size[axis] for panels, _ in parts) for axis in (0, 1)]
    captions = [text_line("label", font), text_line("prediction", font), text_line("errors", font, WRONG)]
    head = joined(captions, ROW, GAP, (cell[0], 0))
    cells = [joined(panels[1:], ROW, GAP, cell) for panels, _ in parts]
    rows = [cells[start:start + BLOCKS] for start in range(0, len(cells), BLOCKS)]
    body = joined([joined(row, ROW, 4 * GAP) for row in ([head] * len(rows[0]), *rows)], COLUMN, GAP)
    below = legend([classes for _, maps in parts for classes in maps], names, colours, body.width, font)
    picture = joined([text_line(title, font.font_variant(size=TITLE)), body, below], COLUMN)
    return few_colours(picture, (WRONG, WHITE, tuple(colours[IGNORE].tolist())))


def views(image, label, prediction, box, colours, line):
    """A sample fitted into a box (width, height): [image, label over it, prediction over it, errors], small maps."""
    height, width = label.shape
    factor = min(box[0] / width, box[1] / height)
    size = [max(1, round(length * factor)) for length in (width, height)]
    image = Image.fromarray(image).resize(size, Image.Resampling.BILINEAR)
    label, prediction = (np.asarray(Image.fromarray(classes).resize(size, Image.Resampling.NEAREST))
                         for classes in (label, prediction))
    errors = image.convert("L").point(GREYS).convert("RGB")
    errors.paste(tuple(colours[IGNORE].tolist()), mask=Image.fromarray(label == IGNORE))
    errors.paste(WRONG, mask=Image.fromarray((label != prediction) & (label != IGNORE)))
    overlays = [tinted(image, classes, colours, line) for classes in (label, prediction)]
    return [image, *overlays, errors], (label, prediction)


def tinted(image, classes, colours, line):
    """A PIL image with class colours over it and outlines `line` pixels wide."""
    picture = image.copy()
    picture.paste(class_picture(classes, colours).convert("RGB"), mask=Image.fromarray(classes).point(OPACITIES))
    picture.paste(WHITE, mask=Image.fromarray(outlines(classes, line)))
    return picture


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


def few_colours(picture, kept):
    """An RGB image reduced to mode P. The colours `kept` stay exact, and no other colour becomes one of them."""
    part = picture.resize([math.ceil(side / SAMPLE_STEP) for side in picture.size], Image.Resampling.NEAREST)
    chosen = part.quantize(SAMPLE_COLOURS, Image.Quantize.MAXCOVERAGE, kmeans=1)
    reduced = picture.quantize(palette=chosen, dither=Image.Dither.NONE)
    palette = np.resize(np.array(reduced.getpalette(), np.uint8), (256, 3))  # repeats it up to 256
    pixels, indices = np.asarray(picture), np.array(reduced)
    for index, colour in enumerate(kept, SAMPLE_COLOURS):
        palette[(palette == colour).all(-1), 2] ^= 1
        palette[index] = colour
        indices[(pixels == colour).all(-1)] = index
    return class_picture(indices, palette)


def percent(share):
    return f"{100 * share:.1f}%" if share == 0 or share >= 0.0005 else "<0.1%"


def legend(maps, names, colours, width, font, shares=False):
    """The classes in some maps, in lines of at most `width` pixels. `shares` adds their shares and sorts by them."""
    counts = sum(np.array(Image.fromarray(classes).histogram()) for classes in maps)  # np.bincount needs 8 x the memory
    opacity = np.array(OPACITIES)[:, None] / 255
    blended = np.round(colours * opacity + UNDER * (1 - opacity)).astype(int).tolist()
    lines = [[]]
    for index in sorted(np.flatnonzero(counts), key=lambda i: (i == 0, i == IGNORE, -counts[i] * shares)):
        text = "not labelled" if index == IGNORE else names[index] if index else f"no colour: {names[0]}"
        text += f" {percent(counts[index] / counts.sum())}" if shares else ""
        entry = text_line(text, font, tuple(blended[index]) if index else None)
        if lines[-1] and sum(item.width for item in lines[-1]) + entry.width > width:
            lines.append([])
        lines[-1].append(entry)
    return joined([joined(line, ROW) for line in lines], COLUMN)


def text_line(text, font, colour=None):
    """A line of text on white, after a square of the colour if there is one. ASCII has Pillow's own font."""
    size, half = font.size, font.size // 2
    font = ImageFont.load_default(size) if text.isascii() else font
    left = 2 * size - half if colour else 0
    picture = Image.new("RGB", (left + round(font.getlength(text)) + size, 2 * size), WHITE)
    draw = ImageDraw.Draw(picture)
    if colour:
        draw.rectangle((half, half, half + size - 1, half + size - 1), colour, FRAME)
    draw.text((left + size / 2, size * 1.35), text, BLACK, font, anchor="ls")
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


def draw_curves(metrics, names):
    """Loss, learning rate and mIoU, and after two evaluations the IoU per class. metrics: metrics.jsonl as dicts."""
    import matplotlib  # here, because it takes a second
    from matplotlib.figure import Figure

    tables = [line for line in metrics if line.get("IoU")]
    path, _ = font_file(names)
    families = [installed_fonts()[path]] if path else []
    with matplotlib.rc_context({"font.family": ["DejaVu Sans", *families], **CHART_STYLE}):
        figure = Figure(figsize=(13, 8.5), dpi=100, layout="constrained")
        panels = figure.subplot_mosaic("LC;MC;RC" if len(tables) > 1 else "L;M;R", height_ratios=(3, 3, 2))
        draw_losses(panels["L"], metrics)
        scores = draw_line(panels["M"], metrics, "mIoU", "validation mIoU, %", "tab:green")
        if len(scores):
            iteration, best = scores[scores[:, 1].argmax()]
            panels["M"].set_title(f"validation mIoU, %: best {best:.2f} at iteration {iteration:,.0f}")
            panels["M"].axhline(best, color="grey", linewidth=0.8, linestyle="--")
            panels["M"].plot(iteration, best, "*", color="tab:green", markersize=13, markeredgecolor="white")
        draw_line(panels["R"], metrics, "lr", "learning rate", "tab:purple")
        panels["R"].set_xlabel("iteration")
        if len(tables) > 1:
            draw_bars(panels["C"], tables, names)
        with warnings.catch_warnings(record=True):  # of missing letters, which `missing_font` reports
            figure.savefig(file := io.BytesIO())
    return Image.open(file).convert("RGB")


def draw_line(axes, metrics, key, title, colour, **style):
    """Draws the finite values of `key` on an axis that includes 0. Returns (iteration, value): float [N, 2]."""
    found = [(line["iter"], line[key]) for line in metrics if line.get(key) is not None and math.isfinite(line[key])]
    points = np.array(found, float).reshape(-1, 2)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set(title=title, xlim=(0, 1.02 * max([1, *(line["iter"] for line in metrics)])))
    if found:
        axes.plot(*points.T, color=colour, marker="o" if len(found) <= 50 else "", markersize=4, **style)
        axes.set_ylim(0, 1.08 * points[:, 1].max() or 1)
    else:
        axes.text(0.5, 0.5, "none yet", transform=axes.transAxes, ha="center", va="center", color="grey")
        axes.set_yticks([])
    return points


def draw_losses(axes, metrics):
    """Draws the losses and their running mean, on a logarithmic scale if they vary enough and are positive."""
    window = max(1, sum(line.get("loss") is not None for line in metrics) // RUNNING_PART)
    title = "training loss" + (f", and its mean over {window} values" if window > 1 else "")
    iterations, losses = draw_line(axes, metrics, "loss", title, "tab:blue", alpha=0.3 if window > 1 else 1).T
    if window > 1:
        sums = np.cumsum([0, *losses])
        axes.plot(iterations[window - 1:], (sums[window:] - sums[:-window]) / window, color="tab:blue", linewidth=2)
    if losses.size and losses.max() > 5 * losses.min() > 0:  # enough for two ticks of 1, 2, 5, 10, ...
        axes.set_yscale("log", subs=(2, 5))
        axes.yaxis.set(major_formatter="{x:g}", minor_formatter="{x:g}")
        axes.set_ylim(losses.min() / 1.1, losses.max() * 1.1)


def draw_bars(axes, tables, names):
    """Draws bars of each class's IoU in the last evaluation, and marks of its IoU in the one with the best mIoU."""
    last, best = tables[-1], max(tables, key=lambda line: line.get("mIoU") or 0)
    values, marks = last["IoU"], best["IoU"]
    shown = sorted(names, key=lambda name: -1 if values.get(name) is None else values[name])
    title = f"IoU per class at iteration {last['iter']:,}, %"
    if len(shown) > BARS:
        title += f" ({BARS // 2} best and worst)"
        shown = [*shown[:BARS // 2], None, *shown[-BARS // 2:]]
    axes.barh(range(len(shown)), [values.get(name) or 0 for name in shown], color="tab:green", alpha=0.6)
    if best is not last:
        axes.plot([marks.get(name) for name in shown], range(len(shown)), "k|", markersize=9)
        axes.set_xlabel(f"| at the best mIoU, iteration {best['iter']:,}")
    for row, name in enumerate(shown):
        text = "" if name is None else "absent" if values.get(name) is None else f"{values[name]:.1f}"
        axes.text(101, row, text, va="center", fontsize="small", color="dimgrey")
    labels = ["..." if name is None else name if len(name) <= BAR_NAME else f"{name[:BAR_NAME]}..." for name in shown]
    axes.set_yticks(range(len(shown)), labels, fontsize="small")
    axes.grid(False, axis="y")
    axes.set(title=title, xlim=(0, 100), ylim=(min(0, len(shown) - 8) - 0.6, len(shown) - 0.4))  # few bars stay slim


def missing_font(names):
    """One line that lists the letters of class names that pictures cannot show and names packages, or None."""
    _, missing = font_file(names)
    if not missing:
        return None
    shown = " ".join(sorted(missing)[:LETTERS_SHOWN]) + (" ..." if len(missing) > LETTERS_SHOWN else "")
    return (f"no installed font has all letters of the class names, so pictures show boxes for {shown}; on Debian or "
            "Ubuntu: apt-get install fonts-noto-cjk (Chinese, Japanese, Korean) or fonts-noto (other scripts)")


def font_for(names, width, height):
    """Pillow's font for a picture of that size. It is the same for all class names, as far as they are not ASCII."""
    path, _ = font_file(names)
    size = max(TEXT, math.isqrt(width * height) // TEXT_PART)
    return ImageFont.truetype(path, size) if path else ImageFont.load_default(size)


def font_file(names):
    """The font for class names: (path, or None for Pillow's own if all are ASCII; the set of letters it lacks)."""
    letters = {letter for name in names if not name.isascii() for letter in name if letter.isprintable()}
    if not letters:
        return None, letters
    other = letters - ASCII
    path = max(installed_fonts(), key=lambda path: (len(other & charmap(path)), len(ASCII & charmap(path))))
    return path, letters - charmap(path)


@functools.cache
def installed_fonts():
    """{path: family}: regular faces and sans-serif families first."""
    from matplotlib import font_manager

    logging.getLogger(font_manager.__name__).setLevel(logging.ERROR)  # no warnings of families without this weight
    known = {entry.fname for entry in font_manager.fontManager.ttflist}
    for path in sorted(set(font_manager.findSystemFonts()) - known):  # installed after matplotlib cached its list
        with contextlib.suppress(Exception):  # unusable fonts raise exceptions of many types
            font_manager.fontManager.addfont(path)
    entries = [entry for entry in font_manager.fontManager.ttflist
               if not entry.name.startswith("Last Resort") and getattr(entry, "index", 0) == 0]
    entries.sort(key=lambda entry: (entry.style != "normal", entry.weight != 400, "Sans" not in entry.name, entry.name))
    return {entry.fname: entry.name for entry in entries}


@functools.cache
def charmap(path):
    """The characters of a font."""
    from matplotlib.ft2font import FT2Font

    with contextlib.suppress(OSError, RuntimeError):  # deleted or damaged
        return frozenset(map(chr, FT2Font(path).get_charmap()))
    return frozenset()
