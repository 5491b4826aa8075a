"""What people look at: class maps as palette PNGs, overlays, comparisons with the label, samples, training curves.

Shapes: an image is uint8 [H, W, 3], RGB, channels last as Pillow has it; a label or class map uint8 [H, W]; `colours`
are uint8 [256, 3], the colour of each class and of IGNORE. What a function here returns, `save` writes.
Over a photograph, class 0 (the background) has no colour, and IGNORE hides what is below it: it always looks the same.
"""
import contextlib
import functools
import io
import itertools
import logging
import math
import unicodedata
import warnings

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from files import whole_file
from voc import IGNORE

OPACITY = 0.55  # of the class colours over a photograph
OPACITIES = [0] + [round(255 * OPACITY)] * (IGNORE - 1) + [255]  # of each class and of IGNORE, in 255ths
UNDER = 128  # the grey that a legend's colours lie on, in place of a photograph
WRONG = (220, 40, 30)  # red, over a photograph in greys
GREYS = [32 + value * 5 // 8 for value in range(256)]  # of that photograph; its contrast is lowered
WHITE, BLACK, FRAME = (255, 255, 255), (0, 0, 0), (120, 120, 120)
TEXT, TITLE = 16, 20  # height of the letters in pixels, at least, and of a grid's title
TEXT_PART = 32  # on large pictures they are that part of the side of a square of the same area
OUTLINE_PART = 20  # the lines around the classes are that part of the letters, and a pixel at least
STRIP_PIXELS = 2 ** 22  # an overlay is made in strips of so many, to need little memory
PANEL_SIDES = (320, 1024)  # the long side of a comparison's panels is brought between these, in pixels
SAMPLE_BOX = (240, 200)  # width and height that the pictures in a grid of samples are fitted into, in pixels
SAMPLE_COLOURS, SAMPLE_STEP = 192, 3  # a grid has so many colours, for a small file; each third pixel chooses them
BLOCKS = 2  # samples beside each other in a grid
GAP = 6  # pixels between pictures
JPEG_SIDE, JPEG_QUALITY = 65_500, 90  # a JPEG cannot have longer sides
PILLOW = "Pillow's own"  # font, which has ASCII's letters and few more
ODD_FONTS = ("Last Resort", "cm", "STIX")  # matplotlib's own: letters as boxes, and letters of formulas
CJK = ("CJK", "HIRAGANA", "KATAKANA", "HANGUL", "BOPOMOFO", "IDEOGRAPHIC", "FULLWIDTH")  # in names of characters
LETTERS_SHOWN = 8  # of those that no font has
MARKED_POINTS = 50  # a curve of more has no mark for each
RUNNING_PART = 30  # the running mean of the loss takes that part of all its values
CHART_SIZE = (13, 8.5)  # inches, of 100 pixels
CHART_STYLE = {"axes.grid": True, "grid.alpha": 0.3, "axes.spines.top": False, "axes.spines.right": False}
BARS, BAR_NAME = 40, 30  # of more classes, a chart shows the best and the worst; of longer names, the first letters


def save(picture, path):
    """Writes a PIL image as a .png or .jpg, whole or not at all, and makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as temporary:
        if path.suffix == ".jpg":
            factor = JPEG_SIDE / max(picture.size)
            if factor < 1:
                picture = picture.resize([max(1, int(length * factor)) for length in picture.size])
            picture.save(temporary, "JPEG", quality=JPEG_QUALITY)
        else:
            picture.save(temporary, "PNG")


def class_picture(classes, colours):
    """A class map as a palette PNG: its pixel values are the classes, as in VOC's labels."""
    picture = Image.fromarray(classes)
    picture.putpalette(colours.tobytes())
    return picture


def overlay(image, classes, names, colours):
    """The photograph with the classes found blended over it, and a legend with the share of the pixels each takes."""
    height, width = classes.shape
    size = text_size(width, height)
    counts = histogram(classes)
    entries = entries_of(counts, names, colours, shares=True) if counts[1:].any() else [("nothing found", None)]
    below = legend(entries, width, size)
    canvas = Image.new("RGB", (max(width, below.width), height + below.height), WHITE)
    canvas.paste(below, (0, height))
    line, rows = max(1, size // OUTLINE_PART), math.ceil(STRIP_PIXELS / width)
    for top in range(0, height, rows):
        above = min(line, top)  # rows more, above and below, in which an outline may begin
        part = slice(top - above, top + rows + line)
        strip = tinted(Image.fromarray(image[part]), classes[part], colours, line)
        canvas.paste(strip.crop((0, above, width, above + min(rows, height - top))), (0, top))
    return canvas


def comparison(image, label, prediction, names, colours):
    """Photograph, label, prediction and errors side by side, with a legend of the classes in them."""
    labelled = np.count_nonzero(label != IGNORE)
    wrong = np.count_nonzero((label != prediction) & (label != IGNORE))
    side = min(max(max(label.shape), PANEL_SIDES[0]), PANEL_SIDES[1])
    photograph, *maps = fitted(image, label, prediction, (side, side))
    size = text_size(side, side)
    panels = photograph, *three_views(photograph, *maps, colours, max(1, size // OUTLINE_PART))
    share = percent(wrong / labelled) if labelled else "nothing is labelled"
    captions = [text_line(text, size) for text in ("photograph", "label", "prediction")]
    captions.append(legend_entry(f"errors: {share}", WRONG, size))
    width = max(photograph.width, *(caption.width for caption in captions))
    row = beside([joined([on_white(part, width, part.height) for part in column])
                  for column in zip(captions, panels, strict=True)])
    return joined([row, legend(entries_of(histogram(label) + histogram(prediction), names, colours), row.width, size)])


def sample_grid(samples, names, colours, title):
    """Label, prediction and errors of samples [(image, label, prediction), ...] in a grid: an image of mode P."""
    parts = [fitted(*sample, SAMPLE_BOX) for sample in samples]
    cell = [max(photograph.size[axis] for photograph, *_ in parts) for axis in (0, 1)]
    captions = [text_line("label", TEXT), text_line("prediction", TEXT), legend_entry("errors", WRONG, TEXT)]
    captions = [on_white(caption, cell[0], caption.height) for caption in captions]
    cells = [beside([on_white(view, *cell) for view in three_views(*part, colours, 1)]) for part in parts]
    rows = [cells[start:start + BLOCKS] for start in range(0, len(cells), BLOCKS)]
    head = beside([beside(captions)] * len(rows[0]), 4 * GAP)
    body = joined([head, *(beside(row, 4 * GAP) for row in rows)], GAP)
    counts = sum(histogram(classes) for _, *both in parts for classes in both)
    picture = joined([text_line(title, TITLE), body, legend(entries_of(counts, names, colours), body.width, TEXT)])
    return few_colours(picture, (WRONG, WHITE, tuple(colours[IGNORE].tolist())))


def three_views(photograph, label, prediction, colours, line):
    """The label and the prediction over a photograph (a PIL image), and the errors, as PIL images of its size."""
    errors = photograph.convert("L").point(GREYS).convert("RGB")
    errors.paste(tuple(colours[IGNORE].tolist()), mask=Image.fromarray(label == IGNORE))
    errors.paste(WRONG, mask=Image.fromarray((label != prediction) & (label != IGNORE)))
    return [*(tinted(photograph, classes, colours, line) for classes in (label, prediction)), errors]


def tinted(photograph, classes, colours, line):
    """A photograph (a PIL image) with class colours and outlines `line` pixels wide: a PIL image."""
    picture = photograph.copy()
    picture.paste(class_picture(classes, colours).convert("RGB"), mask=Image.fromarray(classes).point(OPACITIES))
    picture.paste(WHITE, mask=Image.fromarray(outlines(classes, line)))
    return picture


def outlines(classes, line):
    """bool [H, W]: pixels of a class within `line` pixels of another; not of 0, and not at IGNORE, a line itself."""
    found = np.zeros(classes.shape, bool)
    for other, here in ((classes, found), (classes.T, found.T)):
        length = max(0, len(other) - line)
        differs = other[:length] != other[line:]
        differs &= (other[:length] != IGNORE) & (other[line:] != IGNORE)
        here[:length] |= differs
        here[line:] |= differs
    found &= (classes != 0) & (classes != IGNORE)
    return found


def fitted(image, label, prediction, box):
    """(a PIL image, label, prediction), resized, aspect kept, to fit into a (width, height)."""
    height, width = label.shape
    factor = min(box[0] / width, box[1] / height)
    size = [max(1, round(length * factor)) for length in (width, height)]
    maps = [np.asarray(Image.fromarray(part).resize(size, Image.Resampling.NEAREST)) for part in (label, prediction)]
    return Image.fromarray(image).resize(size, Image.Resampling.BILINEAR), *maps


def few_colours(picture, kept):
    """An RGB image as one of mode P with few colours. Those in `kept` stay exact, and no other becomes one of them."""
    part = picture.resize([math.ceil(side / SAMPLE_STEP) for side in picture.size], Image.Resampling.NEAREST)
    chosen = part.quantize(SAMPLE_COLOURS, Image.Quantize.MAXCOVERAGE, kmeans=1)
    reduced = picture.quantize(palette=chosen, dither=Image.Dither.NONE)
    palette = np.resize(np.array(reduced.getpalette(), np.uint8), (256, 3))  # repeats it up to 256
    pixels, indices = np.asarray(picture), np.array(reduced)
    for number, colour in enumerate(kept, SAMPLE_COLOURS):
        palette[(palette == colour).all(-1), 2] ^= 1
        palette[number] = colour
        indices[(pixels == colour).all(-1)] = number
    return class_picture(indices, palette)


def histogram(classes):
    """How many pixels each class has: int [256]. NumPy's bincount would take eight times the memory."""
    return np.array(Image.fromarray(classes).histogram())


def percent(share):
    return f"{100 * share:.1f}%" if share == 0 or share >= 0.0005 else "<0.1%"


def entries_of(counts, names, colours, shares=False):
    """The legend's entries: [(text, the colour that is seen over grey, or None for the background), ...].

    counts: pixels of each class and of IGNORE, int [256]; shares: name them, too, and begin with the largest
    """
    opacity = np.array(OPACITIES)[:, None] / 255
    seen = np.round(colours * opacity + UNDER * (1 - opacity)).astype(int).tolist()
    order = np.argsort(-counts, kind="stable") if shares else range(256)
    entries = []
    for index in sorted(order, key=lambda index: (index == 0, index == IGNORE)):
        if counts[index]:
            text = "not labelled" if index == IGNORE else names[index] if index else f"no colour: {names[0]}"
            text += f" {percent(counts[index] / counts.sum())}" if shares else ""
            entries.append((text, tuple(seen[index]) if index else None))
    return entries


def legend(entries, width, size):
    """Colour squares and texts, [(text, colour or None), ...], in as many lines as the width, in pixels, asks for."""
    lines = [[]]
    for text, colour in entries:
        entry = text_line(text, size) if colour is None else legend_entry(text, colour, size)
        if lines[-1] and sum(item.width for item in lines[-1]) + entry.width > width:
            lines.append([])
        lines[-1].append(entry)
    return joined([beside(line, 0) for line in lines])


def legend_entry(text, colour, size):
    """A colour square and a text on white."""
    square = Image.new("RGB", (size, size), FRAME)
    square.paste(colour, (1, 1, size - 1, size - 1))
    return beside([on_white(square, 2 * size, 2 * size), text_line(text, size)], -(size // 2))


def text_size(width, height):
    """The height of letters on a picture, all in pixels."""
    return max(TEXT, math.isqrt(width * height) // TEXT_PART)


def text_line(text, size):
    """A text on white, as an RGB image."""
    runs = [(letters_of(path, size), part) for path, part in font_runs(text)]
    width = sum(letters.getlength(part) for letters, part in runs)
    picture = Image.new("RGB", (round(width) + size, 2 * size), WHITE)
    left = size / 2
    for letters, part in runs:
        ImageDraw.Draw(picture).text((left, size * 1.35), part, BLACK, letters, anchor="ls")
        left += letters.getlength(part)
    return picture


def on_white(picture, width, height):
    """A picture in the middle of a white one of at least its size."""
    canvas = Image.new("RGB", (max(width, picture.width), max(height, picture.height)), WHITE)
    canvas.paste(picture, ((canvas.width - picture.width) // 2, (canvas.height - picture.height) // 2))
    return canvas


def joined(pictures, gap=0, down=True):
    """Pictures in a column on white, left edges level; with `down` off in a row, upper edges level."""
    axis, sizes = int(down), np.array([picture.size for picture in pictures])
    size = sizes.max(0)
    size[axis] = sizes[:, axis].sum() + gap * (len(pictures) - 1)
    canvas = Image.new("RGB", tuple(size.tolist()), WHITE)
    position = [0, 0]
    for picture in pictures:
        canvas.paste(picture, tuple(position))
        position[axis] += picture.size[axis] + gap
    return canvas


def beside(pictures, gap=GAP):
    return joined(pictures, gap, down=False)


def missing_font(names):
    """None, or one line for the user: letters of the names that no font here can draw, and packages that bring one."""
    missing = sorted({letter for name in names for letter in shaped(name) if not font_with(frozenset(letter))})
    wanted = {"fonts-noto-cjk" if unicodedata.name(letter, "").startswith(CJK) else "fonts-noto" for letter in missing}
    shown = " ".join(missing[:LETTERS_SHOWN]) + (" ..." if len(missing) > LETTERS_SHOWN else "")
    return (f"no font here has {shown}, so pictures show boxes instead; on Debian or Ubuntu: "
            f"apt-get install {' '.join(sorted(wanted))}") if missing else None


def font_runs(text):
    """[(a font, a part of the text), ...]: one font where one has all letters; PILLOW's where none has them."""
    whole = font_with(shaped(text))
    fonts = [whole or font_with(shaped(letter)) or PILLOW for letter in text]
    return [(font, "".join(letter for _, letter in run))
            for font, run in itertools.groupby(zip(fonts, text, strict=True), key=lambda pair: pair[0])]


def shaped(text):
    """The characters of a text that a font must have."""
    return frozenset(letter for letter in text if letter.isprintable())


@functools.cache
def font_with(letters):
    """The first font that has all of some letters: a path, PILLOW, or None."""
    if all(letter.isascii() for letter in letters):
        return PILLOW
    return next((path for path in installed_fonts() if letters <= letters_in(path)), None)


@functools.cache
def installed_fonts():
    """{path: family} of the plainest face of each family, those without serifs first."""
    from matplotlib import font_manager  # only here: matplotlib takes a second to load

    logging.getLogger(font_manager.__name__).setLevel(logging.ERROR)  # it would warn of families without this weight
    known = {entry.fname for entry in font_manager.fontManager.ttflist}
    for path in sorted(set(font_manager.findSystemFonts()) - known):  # installed after matplotlib made its list
        with contextlib.suppress(Exception):  # whatever a font that cannot be used leads to
            font_manager.fontManager.addfont(path)
    entries = [entry for entry in font_manager.fontManager.ttflist
               if not entry.name.startswith(ODD_FONTS) and getattr(entry, "index", 0) == 0]
    entries.sort(key=lambda entry: (entry.style != "normal", entry.weight != 400, "Sans" not in entry.name, entry.name))
    families = {}
    for entry in entries:
        families.setdefault(entry.name, entry.fname)
    return {path: family for family, path in families.items()}


@functools.cache
def letters_in(path):
    """The characters of a font."""
    from matplotlib.ft2font import FT2Font

    with contextlib.suppress(OSError, RuntimeError):  # a font that is no longer there, or damaged
        return frozenset(map(chr, FT2Font(path).get_charmap()))
    return frozenset()


@functools.cache
def letters_of(path, size):
    """Pillow's font of letters `size` pixels high."""
    return ImageFont.load_default(size) if path == PILLOW else ImageFont.truetype(path, size)


def curves(metrics, names):
    """Loss, learning rate, mIoU, and IoU per class after two evaluations; metrics: metrics.jsonl's lines as dicts."""
    import matplotlib
    from matplotlib.figure import Figure

    tables = [line for line in metrics if line.get("IoU")]
    fonts = {installed_fonts()[path]: None for name in names for path, _ in font_runs(name) if path != PILLOW}
    with matplotlib.rc_context({"font.family": ["DejaVu Sans", *fonts], "text.parse_math": False, **CHART_STYLE}):
        figure = Figure(figsize=CHART_SIZE, dpi=100, layout="constrained")
        figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
        panels = figure.subplot_mosaic("LC;MC;RC" if len(tables) > 1 else "L;M;R", height_ratios=(3, 3, 2))
        draw_losses(panels["L"], metrics)
        scores = draw_line(panels["M"], metrics, "mIoU", "validation mIoU, %", "tab:green")
        if len(scores):
            iteration, best = scores[scores[:, 1].argmax()]
            panels["M"].set_title(f"validation mIoU, %: best {best:.2f} at iteration {iteration:,.0f}", loc="left")
            panels["M"].axhline(best, color="grey", linewidth=0.8, linestyle="--")
            panels["M"].plot(iteration, best, "*", color="tab:green", markersize=13, markeredgecolor="white")
        draw_line(panels["R"], metrics, "lr", "learning rate", "tab:purple")
        panels["R"].set_xlabel("iteration")
        if len(tables) > 1:
            draw_bars(panels["C"], tables, names)
        with warnings.catch_warnings(record=True):  # of letters that no font has; `missing_font` says it better
            figure.savefig(file := io.BytesIO())
    return Image.open(file).convert("RGB")


def draw_line(axes, metrics, key, title, colour, **style):
    """Draws the finite numbers under `key` from 0 on; each has a mark if they are few. -> them: float [N, 2]"""
    found = [(line["iter"], line[key]) for line in metrics if line.get(key) is not None and math.isfinite(line[key])]
    points = np.array(found, float).reshape(-1, 2)
    axes.set_title(title, loc="left")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlim(0, 1.02 * max([1, *(line["iter"] for line in metrics)]))
    if found:
        axes.plot(*points.T, color=colour, marker="o" if len(found) <= MARKED_POINTS else "", markersize=4, **style)
        axes.set_ylim(0, 1.08 * points[:, 1].max() or 1)
    else:
        axes.text(0.5, 0.5, "none yet", transform=axes.transAxes, ha="center", va="center", color="grey")
        axes.set_yticks([])
    return points


def draw_losses(axes, metrics):
    """The losses, faint, and their running mean, on a logarithmic scale where they allow it."""
    window = max(1, sum(line.get("loss") is not None for line in metrics) // RUNNING_PART)
    title = "training loss" + (f", and its mean over {window} values" if window > 1 else "")
    iterations, losses = draw_line(axes, metrics, "loss", title, "tab:blue", alpha=0.3 if window > 1 else 1).T
    if window > 1:
        sums = np.cumsum([0, *losses])
        axes.plot(iterations[window - 1:], (sums[window:] - sums[:-window]) / window, color="tab:blue", linewidth=2)
    if losses.size and losses.max() > 5 * losses.min() > 0:  # which leaves two marks of 1, 2, 5, 10, ... at least
        axes.set_yscale("log", subs=(2, 5))
        axes.yaxis.set(major_formatter="{x:g}", minor_formatter="{x:g}")
        axes.set_ylim(losses.min() / 1.1, losses.max() * 1.1)


def draw_bars(axes, tables, names):
    """Bars of each class's IoU in the last of some evaluation lines, with marks of that with the best mIoU."""
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
    axes.set_title(title, loc="left")
    axes.set(xlim=(0, 100), ylim=(min(0, len(shown) - BARS // 2) - 0.6, len(shown) - 0.4))
