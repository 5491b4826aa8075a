"""visualize.py: the files, the colours and text of the pictures, the fonts, and the values of the curves."""
import ctypes
import runpy
import sys

import numpy as np
import pytest
from fontTools.ttLib import TTFont
from PIL import Image, ImageFont, ImageOps

import visualize

IGNORE = visualize.IGNORE
NAMES = ("ground", "cat", "dog", "owl")
MAROON = (128, 0, 0)


def colours():
    """uint8 [256, 3]: no two alike, none grey."""
    table = np.stack([np.arange(256), 255 - np.arange(256), np.full(256, 7)], axis=1).astype(np.uint8)
    table[1] = MAROON
    table[IGNORE] = 224, 224, 192
    return table


def noise(height, width, seed=0):
    """An image, uint8 [height, width, 3], without white and pure colours."""
    return np.random.default_rng(seed).integers(30, 220, (height, width, 3), dtype=np.uint8)


def has(pixels, colour):
    """bool [H, W]: which of some RGB pixels are of one colour."""
    return (np.asarray(pixels) == np.asarray(colour)).all(-1)


def seen(colour):
    return tuple(np.round(np.array(colour) * visualize.OPACITIES[1] / 255 +
                          visualize.UNDER * (1 - visualize.OPACITIES[1] / 255)).astype(int))


def texts(monkeypatch):
    """The list of all texts drawn from now on."""
    drawn, draw = [], visualize.text_line
    monkeypatch.setattr(visualize, "text_line", lambda text, *style: (drawn.append(text), draw(text, *style))[1])
    return drawn


# ---- files

def test_a_picture_is_saved_whole_or_not_at_all(tmp_path):
    path = tmp_path / "made/folder/a.png"
    visualize.save(Image.new("RGB", (4, 3), (1, 2, 3)), path)
    assert np.asarray(Image.open(path)).tolist() == [[[1, 2, 3]] * 4] * 3
    before = path.read_bytes()
    with pytest.raises(OSError):
        visualize.save(Image.new("CMYK", (4, 3)), path)  # which PNG has not
    assert path.read_bytes() == before and [entry.name for entry in path.parent.iterdir()] == ["a.png"]


def test_a_jpeg_has_no_longer_sides_than_the_format_allows(tmp_path):
    visualize.save(Image.new("RGB", (70_000, 200)), tmp_path / "a.jpg")
    with Image.open(tmp_path / "a.jpg") as saved:
        assert saved.format == "JPEG" and saved.size == (65_500, 187)


def test_a_class_picture_holds_the_classes_and_shows_their_colours(tmp_path):
    classes = np.arange(256, dtype=np.uint8).reshape(16, 16)
    visualize.save(visualize.class_picture(classes, colours()), tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as saved:
        assert saved.mode == "P" and np.array_equal(np.asarray(saved), classes)
        assert np.array_equal(np.asarray(saved.convert("RGB")), colours()[classes])


# ---- overlay

def test_an_overlay_blends_the_classes_outlines_them_and_leaves_the_background():
    image, classes = noise(120, 400), np.zeros((120, 400), np.uint8)
    classes[20:60, 30:80], classes[20:60, 80:130], classes[80:90, 10:40] = 1, 2, IGNORE
    pixels = np.asarray(visualize.overlay(image, classes, NAMES, colours()))[:120, :400]
    assert np.array_equal(pixels[classes == 0], image[classes == 0])
    assert has(pixels[classes == IGNORE], colours()[IGNORE]).all()
    inside = np.zeros_like(classes, bool)
    inside[21:59, 31:79] = inside[21:59, 81:129] = True
    blend = image * (1 - visualize.OPACITY) + colours()[classes] * visualize.OPACITY
    assert np.abs(pixels - blend)[inside].max() <= 1.5
    assert has(pixels, visualize.WHITE)[(classes > 0) & (classes != IGNORE) & ~inside].all()


def test_the_not_labelled_border_of_an_object_is_its_outline():
    classes = np.zeros((60, 60), np.uint8)
    classes[10:50, 10:50], classes[14:46, 14:46] = IGNORE, 1
    assert not visualize.outlines(classes, 1).any() and visualize.outlines(np.minimum(classes, 1), 1).any()


def test_an_overlays_legend_shows_the_colour_that_is_seen_and_the_shares(monkeypatch):
    image, classes, drawn = noise(100, 300), np.zeros((100, 300), np.uint8), texts(monkeypatch)
    classes[:50, :30], classes[50:, :150], classes[99, 299] = 1, 2, 3
    below = np.asarray(visualize.overlay(image, classes, NAMES, colours()))[100:]
    assert has(below, seen(MAROON)).sum() == (visualize.TEXT - 2) ** 2 and not has(below, MAROON).any()
    assert drawn == ["dog 25.0%", "cat 5.0%", "owl <0.1%", "no colour: ground 70.0%"]


def test_an_overlay_in_which_nothing_is_found_says_so(monkeypatch):
    drawn, image = texts(monkeypatch), noise(50, 200)
    picture = visualize.overlay(image, np.zeros((50, 200), np.uint8), NAMES, colours())
    assert drawn == ["nothing found"] and np.array_equal(np.asarray(picture)[:50], image)


def test_the_strips_of_an_overlay_do_not_show(monkeypatch):
    image, classes = noise(90, 70), np.random.default_rng(1).integers(0, 3, (90, 70), dtype=np.uint8)
    classes = np.kron(classes[::9, ::7], np.ones((9, 7), np.uint8))
    monkeypatch.setattr(visualize, "OUTLINE_PART", 5)  # lines of three pixels
    whole = np.asarray(visualize.overlay(image, classes, NAMES, colours()))
    for rows in (1, 2, 13):
        monkeypatch.setattr(visualize, "STRIP_PIXELS", rows * 70)
        assert np.array_equal(np.asarray(visualize.overlay(image, classes, NAMES, colours())), whole)


def test_text_and_outlines_grow_with_the_image():
    small, large = (visualize.font_for(NAMES, side, side).size for side in (100, 4000))
    assert small == visualize.TEXT and large == 4000 // visualize.TEXT_PART
    classes = np.zeros((1500, 1500), np.uint8)
    classes[500:1000, 500:1000] = 1
    picture = visualize.overlay(np.full((1500, 1500, 3), 90, np.uint8), classes, NAMES, colours())
    row = has(np.asarray(picture)[750], visualize.WHITE)
    assert row.sum() == 2 * (1500 // visualize.TEXT_PART // visualize.OUTLINE_PART) == 4


@pytest.mark.parametrize("height, width", [(1, 1), (1, 3000), (3000, 1), (2, 2)])
def test_images_of_any_shape_are_drawn(height, width):
    image, classes = noise(height, width), np.ones((height, width), np.uint8)
    assert visualize.overlay(image, classes, NAMES, colours()).height > height
    assert visualize.comparison(image, classes, classes, NAMES, colours()).width > 4 * 80
    for maps in ((classes, classes), (classes,)):
        assert visualize.sample_grid([("a", image, *maps)], NAMES, colours(), "title").width > 2 * 80


def test_eighty_megapixels_take_less_than_a_gigabyte_more():
    def memory(name):
        line = next(line for line in open("/proc/self/status") if line.startswith(name))
        return int(line.split()[1]) / 2 ** 20  # GiB

    image, classes = np.broadcast_to(np.uint8(90), (10_000, 8_000, 3)), np.zeros((10_000, 8_000), np.uint8)
    classes[2000:6000, 3000:5000] = 1
    ctypes.CDLL(None).malloc_trim(0)  # or memory that other tests have freed serves, and nothing is added
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak is measured anew
    before = memory("VmRSS")
    visualize.overlay(image, classes, NAMES, colours())
    assert 0.2 < memory("VmHWM") - before < 1


@pytest.mark.parametrize("size", ((128, 170), (300, 200), (500, 375), (375, 500), (1500, 2000)))
@pytest.mark.parametrize("names", ([f"a class with a long name {number}" for number in range(60)],
                                   [f"{'猫狗鳥' * (number % 3 + 1)}{number}" for number in range(60)]))
def test_a_legend_of_sixty_classes_is_no_wider_than_the_image_and_a_third_of_the_picture(monkeypatch, size, names):
    """What has no room is counted: all classes are named, or in that number."""
    width, height = size
    classes = np.random.default_rng(0).integers(0, 60, (height // 10, width // 10)).astype(np.uint8)
    classes = np.asarray(Image.fromarray(classes).resize(size, Image.Resampling.NEAREST))
    drawn = texts(monkeypatch)
    picture = visualize.overlay(noise(height, width), classes, names, colours())
    assert picture.width == width and height < picture.height <= 1.5 * height
    hidden = [int(text.split()[1]) for text in drawn if text.startswith("and ")]
    frames = has(np.asarray(picture)[height:], visualize.FRAME)
    side = visualize.font_for(names, width, height).size
    shown = np.lib.stride_tricks.sliding_window_view(frames, side, axis=1).all(-1).sum() / 2  # upper and lower edges
    count = len(np.unique(classes)) - 1  # the background, which has no square, may be among those counted
    assert shown + (hidden[-1] if hidden else 0) in (count, count + 1) and shown > 1


def test_the_background_takes_no_row_of_its_own(monkeypatch):
    """It is left out where it would need one, but not where there is nothing else."""
    classes = np.zeros((170, 128), np.uint8)
    classes[:90] = 1
    picture = visualize.overlay(noise(170, 128), classes, ("a long name", "cat"), colours())
    assert picture.size == (128, 170 + 24)
    drawn = texts(monkeypatch)
    visualize.comparison(noise(20, 30), classes[90:110, :30], classes[90:110, :30], NAMES, colours())
    assert drawn[-1] == "no colour: ground"


@pytest.mark.parametrize("colour", ((128, 128, 128), (250, 240, 230), (20, 30, 20), (128, 0, 0)))
def test_a_grey_or_pale_class_differs_from_an_area_of_its_own_colour(monkeypatch, colour):
    """By stripes, which no strip of the picture interrupts; in the legend, too. A colourful one has none."""
    table, image = colours(), np.full((90, 120, 3), colour, np.uint8)
    table[1] = colour
    classes = np.zeros((90, 120), np.uint8)
    classes[20:70, 20:100] = 1
    picture = np.asarray(visualize.overlay(image, classes, NAMES, table)).astype(int)
    inside = np.abs(picture[22:68, 22:98] - colour).max(-1) > 50
    square = picture[90:].reshape(-1, 3)
    striped = max(colour) - min(colour) < visualize.GREYISH
    assert 0.15 < inside.mean() < 0.35 if striped else not inside.any()
    assert (len(np.unique(square[(square != 255).any(-1)], axis=0)) > 3) or not striped
    monkeypatch.setattr(visualize, "STRIP_PIXELS", 13 * 120)
    assert np.array_equal(np.asarray(visualize.overlay(image, classes, NAMES, table)), picture)


def test_digits_are_drawn_where_the_font_of_the_names_has_none(install):
    """As Debian's fonts-droid-fallback: Pillow's own font draws them, next to the names' letters."""
    install(Sans="猫")
    font = visualize.font_for(["猫"], 100, 100)
    assert visualize.text_line("猫 5%", font).width == pytest.approx(
        sum(visualize.text_line(text, font).width for text in ("猫", " 5%")) - font.size, abs=1)
    assert not np.array_equal(ink("猫1", font), ink("猫2", font))


# ---- comparison

def panels_of(picture, image):
    """The four panels of a comparison whose panels have the image's own size."""
    pixels = np.asarray(picture)
    height, width = image.shape[:2]
    top = next(row for row in range(100) if np.array_equal(pixels[row:row + height, :width], image))
    return [pixels[top:top + height, left:left + width]
            for left in range(0, 4 * (width + visualize.GAP) - visualize.GAP, width + visualize.GAP)]


def test_a_comparison_shows_exactly_the_wrong_pixels_in_one_colour(monkeypatch):
    rng, drawn, side = np.random.default_rng(0), texts(monkeypatch), visualize.PANEL_SIDES[0]
    image = noise(side, side)
    image[:9] = visualize.WRONG  # red in the image is no error
    label, prediction = (rng.choice([0, 1, 3], (side, side)).astype(np.uint8) for _ in range(2))
    label[40:80] = IGNORE
    plain, labelled, predicted, errors = panels_of(
        visualize.comparison(image, label, prediction, NAMES, colours()), image)
    wrong = (label != prediction) & (label != IGNORE)
    assert np.array_equal(has(errors, visualize.WRONG), wrong)
    for panel in (labelled, errors):
        assert np.array_equal(has(panel, colours()[IGNORE]), label == IGNORE)
    assert np.array_equal(labelled[label == 0], image[label == 0])
    assert np.array_equal(predicted[prediction == 0], image[prediction == 0])
    share = 100 * wrong.sum() / (label != IGNORE).sum()
    assert drawn == ["photograph", "label", "prediction", f"errors: {share:.1f}%",
                     "cat", "owl", "not labelled", "no colour: ground"]


def test_a_comparison_without_any_labelled_pixel_says_so(monkeypatch):
    drawn, label = texts(monkeypatch), np.full((30, 40), IGNORE, np.uint8)
    pixels = visualize.comparison(noise(30, 40), label, np.ones_like(label), NAMES, colours())
    assert "errors: nothing is labelled" in drawn
    assert has(pixels, visualize.WRONG).sum() == (visualize.TEXT - 2) ** 2  # the caption's square


def test_a_comparison_of_a_large_image_is_small_and_of_a_small_one_legible():
    for side, panel in ((40, visualize.PANEL_SIDES[0]), (3000, visualize.PANEL_SIDES[1])):
        image, classes = noise(side, side), np.ones((side, side), np.uint8)
        picture = visualize.comparison(image, classes, classes, NAMES, colours())
        assert picture.width == 4 * panel + 3 * visualize.GAP


# ---- grid of samples

def samples(sizes):
    """[(name, image, label, prediction), ...]: of one colour; a quarter of each prediction is wrong."""
    made = []
    for height, width in sizes:
        image = np.full((height, width, 3), (60, 120, 70), np.uint8)
        label = np.zeros((height, width), np.uint8)
        label[:height // 2] = 1
        prediction = label.copy()
        prediction[:, :width // 2] = 1
        label[:, -width // 4:] = IGNORE
        made.append((f"of {height} x {width}", image, label, prediction))
    return made


STEP = visualize.SAMPLE_BOX[0] + visualize.GAP
TOP = 2 * visualize.TITLE + 4 * visualize.TEXT + visualize.GAP  # of the first sample: below title, captions and name


def cells_of(pixels, top, height):
    """The four cells of a row of a grid."""
    return [pixels[top:top + height, left:left + visualize.SAMPLE_BOX[0]] for left in range(0, 4 * STEP, STEP)]


def test_a_grid_has_a_row_for_each_image_whatever_its_aspect():
    """Image, label, prediction and errors: columns of one width, with each picture in the middle of its own."""
    grid = np.asarray(visualize.sample_grid(samples([(100, 120), (400, 100), (50, 600)]), NAMES, colours(), "title"))
    width, height = visualize.SAMPLE_BOX
    assert grid.shape[1] == 4 * STEP - visualize.GAP
    top = TOP
    for size in ((198, 165), (41, 165), (220, 18)):
        for cell in cells_of(grid, top, size[1]):
            x, y, right, lower = Image.fromarray(~has(cell, visualize.WHITE)).getbbox()
            assert abs(right - x - size[0]) <= 1 and (y, lower) == (0, size[1]) and abs(x + right - width) <= 1
        top += size[1] + visualize.GAP + 2 * visualize.TEXT
    assert size[1] < height


def test_a_grid_shows_the_image_the_wrong_pixels_and_those_not_labelled():
    name, image, label, prediction = samples([(165, 220)])[0]
    image[:] = noise(165, 220)
    grid = visualize.sample_grid([(name, image, label, prediction)], NAMES, colours(), "title")
    plain, labelled, predicted, errors = cells_of(np.asarray(grid), TOP, 165)
    assert np.array_equal(plain, image) and np.abs(labelled.astype(int) - image).max() > 40
    assert np.array_equal(has(errors, visualize.WRONG), (label != prediction) & (label != IGNORE))
    assert not any(has(cell, visualize.WRONG).any() for cell in (plain, labelled, predicted))
    for cell in (labelled, errors):
        assert np.array_equal(has(cell, colours()[IGNORE]), label == IGNORE)


def test_a_grid_has_its_title_captions_names_and_legend(monkeypatch):
    drawn = texts(monkeypatch)
    visualize.sample_grid(samples([(50, 50)] * 3), NAMES, colours(), "iteration 1,000, mIoU 34.56")
    assert drawn[:4] == ["photograph", "label", "prediction", "errors"] and drawn.count("of 50 x 50") == 3
    assert sorted(set(drawn[4:])) == sorted(["of 50 x 50", "cat", "not labelled", "no colour: ground",
                                             "iteration 1,000, mIoU 34.56"])


def test_a_grid_of_images_with_their_labels_has_two_in_a_row(monkeypatch):
    """Their names are on one level, whatever the shapes; a last one has a row of its own."""
    drawn, shown = texts(monkeypatch), [sample[:3] for sample in samples([(165, 220), (165, 100), (80, 220)])]
    grid = np.asarray(visualize.sample_grid(shown, NAMES, colours(), "title"))
    assert drawn[:2] == ["photograph", "label"] and "prediction" not in drawn
    second = 2 * STEP + 3 * visualize.GAP
    assert np.array_equal(grid[TOP:TOP + 165, :220], shown[0][1])
    assert np.array_equal(grid[TOP:TOP + 165, second + 60:second + 160], shown[1][1])
    assert np.array_equal(grid[TOP + 165 + visualize.GAP + 2 * visualize.TEXT:][:80, :220], shown[2][1])


# ---- letters

def ink(text, font):
    """What is drawn of a text: uint8 [H, W], cropped."""
    picture = ImageOps.invert(visualize.text_line(text, font).convert("L"))
    return np.asarray(picture.crop(picture.getbbox()))


def make_font(path, family, letters):
    """Writes a font in which the letters look like A, B, ..."""
    from matplotlib import get_data_path

    font = TTFont(f"{get_data_path()}/fonts/ttf/DejaVuSans.ttf")
    font["cmap"].tables = [table for table in font["cmap"].tables if table.platformID == 3 and table.format == 4]
    font["cmap"].tables[0].cmap = {ord(letter): look for letter, look in zip(letters, "ABCDEF", strict=False)}
    font["name"].names = []
    font["name"].setName(family, 1, 3, 1, 0x409)
    font.save(path)


@pytest.fixture
def install(tmp_path, monkeypatch):
    """A function that installs made fonts {family: letters}, next to matplotlib's own. Returns their paths."""
    from matplotlib import font_manager

    def installed(**fonts):
        paths = {family: str(tmp_path / f"{family}.ttf") for family in fonts}
        for family, letters in fonts.items():
            make_font(paths[family], family, letters)
        monkeypatch.setattr(font_manager.fontManager, "ttflist", list(own))
        monkeypatch.setattr(font_manager, "findSystemFonts", lambda: list(paths.values()))
        visualize.installed_fonts.cache_clear()
        return list(paths.values())

    own = [entry for entry in font_manager.fontManager.ttflist if "mpl-data" in entry.fname]
    yield installed
    visualize.installed_fonts.cache_clear()


def font_path(names):
    return visualize.font_for(names, 100, 100).path


def test_all_names_are_drawn_in_the_font_with_the_most_of_their_letters(install):
    partial, complete = install(Sans="猫", Serif="猫狗")
    assert font_path(["ground", "猫"]) == partial and font_path(["ground", "猫", "狗"]) == complete
    assert font_path(["猫", "狗", "鳥"]) == complete
    assert "DejaVuSans.ttf" in font_path(["vélo", "собака"])
    font = visualize.font_for(["猫", "狗", "鳥"], 1000, 1000)
    assert len({ink(letter, font).tobytes() for letter in "猫狗鳥"}) == 3


def test_the_names_of_images_are_drawn_if_those_of_the_classes_are_ascii(install):
    install(Sans="猫狗")
    (_, *sample), = samples([(165, 220)])
    assert visualize.sample_grid([("猫", *sample)], NAMES, colours(), "title") != visualize.sample_grid(
        [("狗", *sample)], NAMES, colours(), "title")


def test_ascii_texts_have_pillows_own_font_even_if_that_of_the_names_has_no_ascii(install):
    install(Sans="猫")
    own, other = ImageFont.load_default(32), visualize.font_for(["猫"], 1024, 1024)
    assert own.size == other.size and np.array_equal(ink("cat 5%", own), ink("cat 5%", other))
    assert visualize.missing_font(["猫", "cat", "猫 1"]) is None


def test_a_note_lists_the_letters_that_no_font_has_and_packages(install):
    install()
    assert visualize.missing_font(["cat", "vélo", "собака"]) is None
    line = visualize.missing_font(["ground", "猫", "ひ 한"])
    assert "\n" not in line and "boxes for ひ 猫 한;" in line
    assert "apt-get install fonts-noto-cjk" in line and "fonts-noto (other" in line
    many = visualize.missing_font(["".join(map(chr, range(0x4E00, 0x4F00)))])
    assert len(many) < len(line) + 30 and "and 251 more" in many


def test_a_note_lists_the_letters_that_the_font_of_the_names_lacks(install):
    install(Sans="猫狗", Serif="ক")
    assert "boxes for ক;" in visualize.missing_font(["猫", "狗", "ক"])


def test_a_font_that_was_deleted_or_is_damaged_is_not_used(install, tmp_path):
    install(Deleted="猫", Damaged="猫")
    (tmp_path / "Damaged.ttf").write_bytes(b"no font")
    visualize.installed_fonts()
    visualize.installed_fonts.cache_clear()
    (tmp_path / "Deleted.ttf").unlink()
    assert visualize.missing_font(["猫"])


def test_ascii_names_need_no_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # an import raises
    own = runpy.run_path(visualize.__file__)
    assert own["missing_font"](NAMES) is None
    assert own["overlay"](noise(20, 30), np.ones((20, 30), np.uint8), NAMES, colours()).height > 20


def test_curves_fall_back_to_the_font_of_the_names(install):
    def drawn(name):
        metrics = [evaluation(i, 50.0, {"cat": 40.0, name: 60.0}) for i in (1, 2)]
        return visualize.draw_curves(metrics, ("cat", name)).tobytes()

    install(Second="猫狗")
    assert drawn("猫") == drawn("A") and drawn("狗") == drawn("B") != drawn("鳥")


# ---- curves

def drawn_axes(monkeypatch, metrics, names=NAMES):
    """The axes of the curves, by their letter in the mosaic, and the image."""
    from matplotlib.figure import Figure
    axes, mosaic = {}, Figure.subplot_mosaic
    monkeypatch.setattr(Figure, "subplot_mosaic", lambda *args, **kwargs: (
        axes.update(mosaic(*args, **kwargs)), axes)[1])
    picture = visualize.draw_curves(metrics, names)
    monkeypatch.undo()
    return axes, picture


def evaluation(iteration, miou, iou=None):
    return {"iter": iteration, "mIoU": miou, "aAcc": 80.0, "mAcc": 50.0, **({"IoU": iou} if iou else {})}


def test_curves_follow_the_numbers(monkeypatch):
    metrics = [{"iter": i, "lr": 0.01 * (1 - i / 600), "loss": None if i == 7 else 60 / (20 + i)}
               for i in range(1, 601)]
    metrics += [evaluation(200, 30.0), evaluation(400, 34.56), evaluation(600, 33.0)]
    axes, picture = drawn_axes(monkeypatch, metrics)
    raw, mean = axes["L"].get_lines()
    assert len(raw.get_xdata()) == 599 and 7 not in raw.get_xdata() and axes["L"].get_ylim()[0] == 0
    window = 599 // visualize.RUNNING_PART
    assert np.allclose(mean.get_ydata()[-1], np.mean([60 / (20 + i) for i in range(601 - window, 601)]))
    assert mean.get_xdata()[-1] == 600 and raw.get_alpha() < 0.5 and mean.get_alpha() is None
    assert axes["M"].get_lines()[0].get_xydata().tolist() == [[200, 30], [400, 34.56], [600, 33]]
    assert "34.56" in axes["M"].get_title("left") and "400" in axes["M"].get_title("left")
    assert np.allclose(axes["R"].get_lines()[0].get_ydata(), [0.01 * (1 - i / 600) for i in range(1, 601)])
    pixels = np.asarray(picture).astype(int)
    rows, columns = np.nonzero((pixels[..., 2] - pixels[..., 0] > 120) & (pixels[..., 1] > 90))  # the blue mean
    left, right = (rows[(columns > start * picture.width) & (columns < (start + 0.1) * picture.width)].mean()
                   for start in (0.1, 0.8))
    assert left < right - 20  # it falls


def test_iou_per_class_is_shown_from_the_first_evaluation_on(monkeypatch):
    """With the mIoU as a line. Classes in neither labels nor predictions are counted; others have their IoU, or a text
    if the labels have none of them."""
    first = evaluation(10, 40.0, {"ground": 90.0, "cat": 10.0, "dog": 20.0, "owl": None})
    last = {**evaluation(20, 35.0, {"ground": 80.0, "cat": 0.0, "dog": 0.0, "owl": None}),
            "Acc": {"ground": 99.0, "cat": 0.0, "dog": None, "owl": None}}
    axes, _ = drawn_axes(monkeypatch, [evaluation(5, 1.0)])
    assert "C" not in axes
    axes, _ = drawn_axes(monkeypatch, [first])
    assert [bar.get_width() for bar in axes["C"].patches] == [10, 20, 90]
    assert [set(line.get_xdata()) for line in axes["C"].get_lines()] == [{40.0}]
    axes, _ = drawn_axes(monkeypatch, [first, last])
    assert [label.get_text() for label in axes["C"].get_yticklabels()] == [
        "cat  0.0", "dog  not in labels", "ground  80.0"]
    assert [bar.get_width() for bar in axes["C"].patches] == [0, 0, 80]
    assert [set(line.get_xdata()) for line in axes["C"].get_lines()] == [{35.0}]
    assert "iteration 20" in axes["C"].get_title("left") and "mIoU 35.00" in axes["C"].get_title("left")
    assert "1 of 4 classes: neither" in axes["C"].get_xlabel()


@pytest.mark.parametrize("count", (2, 21, 60))
def test_a_confusion_matrix_shows_each_labels_pixels_in_per_cent(monkeypatch, count):
    """Rows of present classes, normalised by hand; one class is predicted alone, one is in neither."""
    from matplotlib.figure import Figure
    rng, add, axes = np.random.default_rng(count), Figure.add_axes, []
    confusion = rng.integers(1, 1000, (count + 2, count + 2))
    confusion[count], confusion[count + 1], confusion[:, count + 1] = 0, 0, 0
    names = [f"class {number}" for number in range(count + 2)]
    monkeypatch.setattr(Figure, "add_axes", lambda *args: (axes.append(add(*args)), axes[-1])[1])
    picture = visualize.draw_confusion(confusion.tolist(), names)
    monkeypatch.undo()
    assert [label.get_text() for label in axes[0].get_xticklabels()] == names[:-1]
    assert [label.get_text() for label in axes[0].get_yticklabels()] == [
        *names[:-2], f"{names[-2]} (not in labels)"]
    shown = np.asarray(axes[0].images[0].get_array())
    np.testing.assert_allclose(shown[:count].sum(1), 100)
    np.testing.assert_allclose(shown[:count], 100 * confusion[:count, :count + 1] / confusion[:count].sum(1)[:, None])
    assert not shown[count].any()
    for text in axes[0].texts:
        column, row = text.get_position()
        assert text.get_text() == f"{shown[row, column]:.0f}" and shown[row, column] >= 0.5
    assert 350 < min(picture.size) and max(picture.size) < 2600


def test_a_confusion_matrix_of_nothing_is_drawn():
    assert visualize.draw_confusion(np.zeros((4, 4), int), NAMES).width > 200


@pytest.mark.parametrize("count", (2, 60, 200))
def test_curves_are_as_high_as_the_bars_of_their_classes_need(monkeypatch, count):
    names = tuple(f"$\\bad {i}$ " + 50 * "x" for i in range(count))  # no formulas
    metrics = [evaluation(1, 50.0, {name: 0.5 * k for k, name in enumerate(names)})]
    axes, picture = drawn_axes(monkeypatch, metrics, names)
    assert [bar.get_width() for bar in axes["C"].patches] == [*np.arange(count) / 2]
    labels = axes["C"].get_yticklabels()
    assert max(len(label.get_text()) for label in labels) < 40
    boxes = [label.get_window_extent() for label in labels]
    assert all(below.y1 < above.y1 and below.y1 < above.y0 + 4 for below, above in zip(boxes, boxes[1:], strict=False))
    assert picture.size == (1300, max(850, 20 * count))


@pytest.mark.parametrize("metrics", [
    [], [{"iter": 1, "lr": 0.01, "loss": 2.0}], [{"iter": 1, "lr": 0.0, "loss": None}], [evaluation(1, 0.0)],
    [{"iter": 3, "loss": float("nan")}, evaluation(3, float("nan"))]])
def test_curves_of_next_to_nothing_are_drawn(metrics):
    picture = visualize.draw_curves(metrics, NAMES)
    assert picture.mode == "RGB" and picture.size == (1300, 850) and len(picture.getcolors(10 ** 6)) > 2
