"""What people look at: class maps as palette PNGs, overlays, comparisons with the label, grids of samples.

Shapes: an image is uint8 [H, W, 3], RGB, channels last as Pillow has it; a label or class map uint8 [H, W]; `colours`
are uint8 [256, 3], the colour of each class and of IGNORE. What a function here returns, `save` writes.
Over a photograph, class 0 (the background) has no colour, and IGNORE hides what is below it: it always looks the same.
"""
import math

import numpy as np
from PIL import Image, ImageDraw

from files import whole_file
from fonts import font_runs, letters_of
from voc import IGNORE

OPACITY = 0.55  # of the class colours over a photograph
OPACITIES = [0] + [round(255 * OPACITY)] * (IGNORE - 1) + [255]  # of each class and of IGNORE, in 255ths
UNDER = 128  # the grey that a legend's colours lie on, in place of a photograph
WRONG = (220, 40, 30)  # red, over a photograph in greys
GREYS = [32 + value * 5 // 8 for value in range(256)]  # of that photograph; its contrast is lowered
WHITE, BLACK, FRAME = (255, 255, 255), (0, 0, 0), (120, 120, 120)
TEXT, TITLE = 16, 20  # height of the letters in pixels, at least, and of a grid's title
TEXT_PART = 32  # on large pictures the height of the letters is the square root of the area over this
OUTLINE_PART = 20  # the lines around the classes are the height of the letters over this, and at least a pixel
STRIP_PIXELS = 2 ** 22  # an overlay is made in strips of so many, to need little memory
PANEL_SIDES = (320, 1024)  # the long side of a comparison's panels is brought between these, in pixels
SAMPLE_BOX = (240, 200)  # width and height that the pictures in a grid of samples are fitted into, in pixels
SAMPLE_COLOURS, SAMPLE_STEP = 192, 3  # a grid has so many colours, for a small file; each third pixel chooses them
BLOCKS = 2  # samples beside each other in a grid
GAP = 6  # pixels between pictures
JPEG_SIDE, JPEG_QUALITY = 65_500, 90  # a JPEG cannot have longer sides


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
        above = min(line, top)  # extra rows on both sides, so that outlines continue across strips
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
    """bool [H, W]: pixels with another class `line` pixels away; none of class 0, and none at IGNORE, a line itself."""
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
