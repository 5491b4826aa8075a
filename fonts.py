"""Fonts for the names of classes in any script: which of those installed have the letters, and what is missing."""
import contextlib
import functools
import itertools
import logging
import unicodedata

from PIL import ImageFont

PILLOW = "Pillow's own"  # font, which has ASCII's letters and few more
ODD_FONTS = ("Last Resort", "cm", "STIX")  # matplotlib's own: letters as boxes, and letters of formulas
CJK = ("CJK", "HIRAGANA", "KATAKANA", "HANGUL", "BOPOMOFO", "IDEOGRAPHIC", "FULLWIDTH")  # in names of characters
LETTERS_SHOWN = 8  # of those that no font has


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
