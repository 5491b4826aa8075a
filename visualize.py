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
GREYISH = 64  # a colour whose channels differ by less is hatched: photographs have areas of such a colour
HATCH_WIDTH, HATCH_STEP = 2, 8  # of the lines of that hatching, in widths of an outline
LEGEND_WIDTH = 8  # minimum width of a legend, in heights of its text
LEGEND_PART = 3  # a legend is at most 1 / LEGEND_PART of a picture's height, but has a row
STRIP_PIXELS = 2 ** 22  # overlays are blended in strips of this many pixels, to save memory
PANELS = ("photograph", "label", "prediction")  # and the errors
PANEL_SIDES = (320, 1024)  # minimum and maximum of the longer side of a comparison's panels, in pixels
SAMPLE_BOX = (220, 165)  # maximum width and height of the views in a sample grid, in pixels
SAMPLE_COLOURS, SAMPLE_STEP = 192, 3  # a grid is reduced to this many colours, chosen from every third pixel
BLOCKS = 2  # samples per row of a grid of images with their labels
BAR_LENGTH = 160  # pixels of a bar of 100%
GAP = 6  # pixels between pictures
ROW, COLUMN = 0, 1  # the axis along which `joined` places pictures
JPEG_SIDE, JPEG_QUALITY = 65_500, 90  # the format allows no longer sides

RUNNING_PART = 10  # the running mean of the loss spans 1 / RUNNING_PART of all values
CHART_STYLE = {
    "figure.constrained_layout.w_pad": 0.1, "figure.constrained_layout.h_pad": 0.1, "text.parse_math": False,
    "axes.grid": True, "grid.alpha": 0.3, "axes.spines.top": False, "axes.spines.right": False,
    "axes.titlelocation": "left"}
BARS, NAME = 40, 30  # a bar chart shows at most this many classes, and charts this many letters of a name
CELL, MATRIX = 0.36, 2.5  # side of a confusion matrix's cell, and the least of the matrix, in inches

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
        below = legend([classes], names, colours, (width, height), font, shares=True)
    else:
        below = text_line("nothing found", font)
    canvas = Image.new("RGB", (max(width, below.width), height + below.height), WHITE)
    canvas.paste(below, (0, height))
    line, rows = max(1, font.size // OUTLINE_PART), math.ceil(STRIP_PIXELS / width)
    for top in range(0, height, rows):
        above = min(line, top)  # extra rows on both sides continue outlines across strips
        part = slice(top - above, top + rows + line)
        strip = tinted(Image.fromarray(image[part]), classes[part], colours, line, top - above)
        canvas.paste(strip.crop((0, above, width, above + min(rows, height - top))), (0, top))
    return canvas


def comparison(image, label, prediction, names, colours):
    """Image, label, prediction and errors side by side, with a legend of their classes."""
    wrong = (label != prediction)[label != IGNORE]
    share = percent(wrong.mean()) if wrong.size else "nothing is labelled"
    side = min(max(max(label.shape), PANEL_SIDES[0]), PANEL_SIDES[1])
    font = font_for(names, side, side)
    panels, _ = views(image, label, prediction, (side, side), colours, max(1, font.size // OUTLINE_PART))
    captions = [*(text_line(text, font) for text in PANELS), text_line(f"errors: {share}", font, WRONG)]
    width = max(part.width for part in (*panels, *captions))
    body = joined([joined(parts, ROW, GAP, (width, 0)) for parts in (captions, panels)], COLUMN)
    return joined([body, legend([label, prediction], names, colours, body.size, font)], COLUMN)


def sample_grid(samples, names, colours, title):
    """Image, label, prediction and errors of samples [(name, image, label, prediction), ...]: an image of mode P."""
    font = font_for(names, *SAMPLE_BOX)
    parts = [views(*sample, SAMPLE_BOX, colours, max(1, font.size // OUTLINE_PART)) for _, *sample in samples]
    captions = [*(text_line(text, font) for text in PANELS), text_line("errors", font, WRONG)]
    width = max(part.width for part in (*captions, *(panel for panels, _ in parts for panel in panels)))
    rows = [joined(captions, ROW, GAP, (width, 0))]
    for (name, *_), (panels, _) in zip(samples, parts, strict=True):
        row = joined(panels, ROW, GAP, (width, 0))
        rows += [text_line(fitting(name, "", font, row.width - 2 * font.size), font), row]
    body = joined(rows, COLUMN)
    below = legend([classes for _, maps in parts for classes in maps], names, colours, body.size, font)
    picture = joined([text_line(title, font.font_variant(size=TITLE)), body, below], COLUMN)
    return few_colours(picture, (WRONG, WHITE, tuple(colours[IGNORE].tolist())))


def class_bars(shares, names, colours):
    """The classes' shares of the pixels in some lists. shares: {list: float [256], of each value of the labels}"""
    font, table = font_for(names, *SAMPLE_BOX), np.stack(list(shares.values()))
    present = [index for index in np.argsort(-table.sum(0)).tolist() if table[:, index].any()][:BARS]
    entries = [text_line("not labelled" if index == IGNORE else names[index], font, tuple(colours[index].tolist()))
               for index in present]
    left, line = max(entry.width for entry in entries), 2 * font.size
    picture = Image.new("RGB", (left + len(shares) * 2 * BAR_LENGTH, (1 + len(present)) * line), WHITE)
    for column, (name, part) in enumerate(shares.items()):
        at = left + column * 2 * BAR_LENGTH
        picture.paste(text_line(f"{name}, share of the pixels", font), (at, 0))
        for top, index, entry in zip(range(line, picture.height, line), present, entries, strict=True):
            end = at + round(BAR_LENGTH * part[index])
            picture.paste(entry, (0, top))
            picture.paste(tuple(colours[index].tolist()), (at, top + line // 4, end, top + line * 3 // 4))
            picture.paste(text_line(percent(part[index]), font), (end, top))
    return picture


def image_grid(samples, names, colours, title):
    """Images with their labels over them, in a grid. samples: [(name, image, label), ...]"""
    font, cells = font_for(names, *SAMPLE_BOX), []
    for name, image, label in samples:
        panels, _ = views(image, label, label, SAMPLE_BOX, colours, 1)
        row = joined(panels[:2], ROW, GAP)
        cells.append(joined([row, text_line(fitting(name, "", font, row.width - 2 * font.size), font)], COLUMN))
    cell = np.max([part.size for part in cells], axis=0)
    rows = [joined(cells[start:start + BLOCKS], ROW, 4 * GAP, cell) for start in range(0, len(cells), BLOCKS)]
    body = joined([text_line(title, font.font_variant(size=TITLE)), *rows], COLUMN, GAP)
    return joined([body, legend([label for _, _, label in samples], names, colours, body.size, font)], COLUMN)


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


def tinted(image, classes, colours, line, top=0):
    """A PIL image with class colours over it, hatched if they are greyish or pale, and outlines `line` pixels wide. The
    image is a strip of a picture, from row `top`."""
    picture, layer = image.copy(), class_picture(classes, colours).convert("RGB")
    hatched = np.ptp(colours.astype(int), axis=1) < GREYISH
    hatched[[0, IGNORE]] = False
    if hatched[histogram(classes) > 0].any():
        contrast = np.where(colours.mean(1, keepdims=True) < UNDER, WHITE, BLACK)
        lines = np.where(hatched[:, None], contrast, colours).astype(np.uint8)
        rows, columns = np.ogrid[top:top + image.height, :image.width]
        mask = (rows + columns) // line % HATCH_STEP < HATCH_WIDTH
        layer.paste(class_picture(classes, lines).convert("RGB"), mask=Image.fromarray(mask))
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


def legend(maps, names, colours, size, font, shares=False):
    """The classes in some maps, below a picture of `size` (width, height). It is no wider, and those that would make it
    too high are counted. Class 0 takes no row of its own. `shares` adds the classes' shares and sorts by them."""
    counts = sum(map(histogram, maps))
    width, rows = max(size[0], LEGEND_WIDTH * font.size), [[]]
    ground = Image.new("RGB", (font.size, font.size), (UNDER, UNDER, UNDER))
    for index in sorted(np.flatnonzero(counts), key=lambda i: (i == 0, i == IGNORE, -counts[i] * shares)):
        name = "not labelled" if index == IGNORE else names[index] if index else f"no colour: {names[0]}"
        share = f" {percent(counts[index] / counts.sum())}" if shares else ""
        square = np.full(ground.size, index, np.uint8)
        square = tinted(ground, square, colours, max(1, font.size // OUTLINE_PART)) if index else None
        entry = text_line(fitting(name, share, font, width - 3 * font.size), font, square)
        if rows[-1] and sum(item.width for item in (*rows[-1], entry)) > width:
            if index == 0:
                break
            rows.append([])
        rows[-1].append(entry)
    margin = font.size // 4  # of a line of text, too much for a legend
    most = max(1, size[1] // (LEGEND_PART - 1) // (2 * (font.size - margin)))
    hidden, rows = sum(map(len, rows[most:])), rows[:most]
    while hidden and sum(item.width for item in (*rows[-1], text_line(f"and {hidden} more", font))) > width:
        rows[-1].pop()
        hidden += 1
    rows[-1] += [text_line(f"and {hidden} more", font)] if hidden else []
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
    if not text.isascii() and ASCII <= charmap(font.path):
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
    families = [installed_fonts()[path]] if path else []
    with (matplotlib.rc_context({"font.family": ["DejaVu Sans", *families], **CHART_STYLE}),
          warnings.catch_warnings(record=True)):  # of missing letters, which `missing_font` reports
        yield Figure


def draw_curves(metrics, names):
    """Loss, learning rate and mIoU, and after an evaluation the IoU per class. metrics: metrics.jsonl as dicts."""
    tables = [line for line in metrics if any(iou is not None for iou in line.get("IoU", {}).values())]
    with chart_style(names) as figure_of:
        figure = figure_of(figsize=(13, 8.5), dpi=100, layout="constrained")
        panels = figure.subplot_mosaic("LC;MC;RC" if tables else "L;M;R", height_ratios=(3, 3, 2))
        draw_losses(panels["L"], metrics)
        scores = draw_line(panels["M"], metrics, "mIoU", "validation mIoU, %", "tab:green")
        if len(scores):
            iteration, best = scores[scores[:, 1].argmax()]
            panels["M"].set_title(f"validation mIoU, %: best {best:.2f} at iteration {iteration:,.0f}")
            panels["M"].axhline(best, color="grey", linewidth=0.8, linestyle="--")
            panels["M"].plot(iteration, best, "*", color="tab:green", markersize=13, markeredgecolor="white")
        draw_line(panels["R"], metrics, "lr", "learning rate", "tab:purple")
        panels["R"].set_xlabel("iteration")
        if tables:
            draw_bars(panels["C"], tables, names)
        figure.savefig(file := io.BytesIO())
    return Image.open(file).convert("RGB")


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
    """Draws bars of each class's IoU in the last evaluation, a line at its mIoU, and marks of the IoU in the evaluation
    with the best mIoU. Classes that neither labels nor predictions have are counted."""
    last, best = tables[-1], max(tables, key=lambda line: line.get("mIoU") or 0)
    values, marks, accuracy = last["IoU"], best["IoU"], last.get("Acc", {})
    shown = sorted((name for name in names if values.get(name) is not None), key=values.get)
    below = [f"| at the best mIoU, iteration {best['iter']:,}"] if best is not last else []
    if len(shown) < len(names):
        below.append(f"{len(names) - len(shown)} of {len(names)} classes: neither in labels nor in predictions")
    title = f"IoU per class at iteration {last['iter']:,}, %"
    if len(shown) > BARS:
        title += f" ({BARS // 2} best and worst)"
        shown = [*shown[:BARS // 2], None, *shown[-BARS // 2:]]
    axes.barh(range(len(shown)), [values.get(name) or 0 for name in shown], color="tab:green", alpha=0.6)
    if best is not last:
        axes.plot([marks.get(name) for name in shown], range(len(shown)), "k|", markersize=9)
    for row, name in enumerate(shown):
        text = "" if name is None else f"{values[name]:.1f}" if accuracy.get(name, 0) is not None else "not in labels"
        axes.text(101, row, text, va="center", fontsize="small", color="dimgrey")
    if last.get("mIoU") is not None:
        axes.axvline(last["mIoU"], color="grey", linewidth=0.8, linestyle="--", label=f"mIoU {last['mIoU']:.2f}")
        axes.legend(loc="lower right")
    axes.set_yticks(range(len(shown)), ["..." if name is None else name[:NAME] for name in shown], fontsize="small")
    axes.grid(False, axis="y")
    axes.set(title=title, xlabel="\n".join(below), xlim=(0, 100),
             ylim=(min(0, len(shown) - 8) - 0.6, len(shown) - 0.4))  # few bars stay slim


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
