"""pictures.py: what is written, where the colours go, which letters are drawn, and which numbers the curves show."""
import numpy as np
import pytest
from PIL import Image, ImageOps

import curves
import fonts
import pictures

IGNORE = pictures.IGNORE
NAMES = ("ground", "cat", "dog", "owl")
MAROON = (128, 0, 0)


def colours():
    """uint8 [256, 3]: no two alike, none grey."""
    table = np.stack([np.arange(256), 255 - np.arange(256), np.full(256, 7)], axis=1).astype(np.uint8)
    table[1] = MAROON
    table[IGNORE] = 224, 224, 192
    return table


def photograph(height, width, seed=0):
    """uint8 [height, width, 3], noise that has neither white nor pure colours."""
    return np.random.default_rng(seed).integers(30, 220, (height, width, 3), dtype=np.uint8)


def has(pixels, colour):
    """bool [H, W]: which of some RGB pixels are of one colour."""
    return (np.asarray(pixels) == np.asarray(colour)).all(-1)


def seen(colour):
    return tuple(np.round(np.array(colour) * pictures.OPACITIES[1] / 255 +
                          pictures.UNDER * (1 - pictures.OPACITIES[1] / 255)).astype(int))


def texts(monkeypatch):
    """The list of all texts drawn from now on."""
    drawn, draw = [], pictures.text_line
    monkeypatch.setattr(pictures, "text_line", lambda text, size: (drawn.append(text), draw(text, size))[1])
    return drawn


# ---- files

def test_a_picture_is_saved_whole_or_not_at_all(tmp_path):
    path = tmp_path / "made/folder/a.png"
    pictures.save(Image.new("RGB", (4, 3), (1, 2, 3)), path)
    assert np.asarray(Image.open(path)).tolist() == [[[1, 2, 3]] * 4] * 3
    before = path.read_bytes()
    with pytest.raises(OSError):
        pictures.save(Image.new("CMYK", (4, 3)), path)  # which PNG has not
    assert path.read_bytes() == before and [entry.name for entry in path.parent.iterdir()] == ["a.png"]


def test_a_jpeg_has_no_longer_sides_than_the_format_allows(tmp_path):
    picture = Image.new("RGB", (70_000, 2))
    pictures.save(picture, tmp_path / "a.jpg")
    with Image.open(tmp_path / "a.jpg") as saved:
        assert saved.format == "JPEG" and saved.size == (65_500, 1)
    assert picture.size == (70_000, 2)


def test_a_class_picture_holds_the_classes_and_shows_their_colours(tmp_path):
    classes = np.arange(256, dtype=np.uint8).reshape(16, 16)
    pictures.save(pictures.class_picture(classes, colours()), tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as saved:
        assert saved.mode == "P" and np.array_equal(np.asarray(saved), classes)
        assert np.array_equal(np.asarray(saved.convert("RGB")), colours()[classes])


# ---- overlay

def test_an_overlay_blends_the_classes_outlines_them_and_leaves_the_background():
    image, classes = photograph(120, 400), np.zeros((120, 400), np.uint8)
    classes[20:60, 30:80], classes[20:60, 80:130], classes[80:90, 10:40] = 1, 2, IGNORE
    pixels = np.asarray(pictures.overlay(image, classes, NAMES, colours()))[:120, :400]
    assert np.array_equal(pixels[classes == 0], image[classes == 0])
    assert has(pixels[classes == IGNORE], colours()[IGNORE]).all()
    inside = np.zeros_like(classes, bool)
    inside[21:59, 31:79] = inside[21:59, 81:129] = True
    blend = image * (1 - pictures.OPACITY) + colours()[classes] * pictures.OPACITY
    assert np.abs(pixels - blend)[inside].max() <= 1.5
    assert has(pixels, pictures.WHITE)[(classes > 0) & (classes != IGNORE) & ~inside].all()


def test_the_not_labelled_border_of_an_object_is_its_outline():
    classes = np.zeros((60, 60), np.uint8)
    classes[10:50, 10:50], classes[14:46, 14:46] = IGNORE, 1
    assert not pictures.outlines(classes, 1).any() and pictures.outlines(np.minimum(classes, 1), 1).any()


def test_an_overlays_legend_shows_the_colour_that_is_seen_and_the_shares(monkeypatch):
    image, classes, drawn = photograph(100, 300), np.zeros((100, 300), np.uint8), texts(monkeypatch)
    classes[:50, :30], classes[50:, :150], classes[99, 299] = 1, 2, 3
    below = np.asarray(pictures.overlay(image, classes, NAMES, colours()))[100:]
    assert has(below, seen(MAROON)).sum() == (pictures.TEXT - 2) ** 2 and not has(below, MAROON).any()
    assert drawn == ["dog 25.0%", "cat 5.0%", "owl <0.1%", "no colour: ground 70.0%"]


def test_an_overlay_in_which_nothing_is_found_says_so(monkeypatch):
    drawn, image = texts(monkeypatch), photograph(50, 200)
    picture = pictures.overlay(image, np.zeros((50, 200), np.uint8), NAMES, colours())
    assert drawn == ["nothing found"] and np.array_equal(np.asarray(picture)[:50], image)


def test_the_strips_of_an_overlay_do_not_show(monkeypatch):
    image, classes = photograph(90, 70), np.random.default_rng(1).integers(0, 3, (90, 70), dtype=np.uint8)
    classes = np.kron(classes[::9, ::7], np.ones((9, 7), np.uint8))
    monkeypatch.setattr(pictures, "OUTLINE_PART", 5)  # lines of three pixels
    whole = np.asarray(pictures.overlay(image, classes, NAMES, colours()))
    for rows in (1, 2, 13):
        monkeypatch.setattr(pictures, "STRIP_PIXELS", rows * 70)
        assert np.array_equal(np.asarray(pictures.overlay(image, classes, NAMES, colours())), whole)


def test_letters_and_outlines_grow_with_the_photograph():
    small, large = (pictures.text_size(side, side) for side in (100, 4000))
    assert small == pictures.TEXT and large == 4000 // pictures.TEXT_PART
    classes = np.zeros((1500, 1500), np.uint8)
    classes[500:1000, 500:1000] = 1
    picture = pictures.overlay(np.full((1500, 1500, 3), 90, np.uint8), classes, NAMES, colours())
    row = has(np.asarray(picture)[750], pictures.WHITE)
    assert row.sum() == 2 * (pictures.text_size(1500, 1500) // pictures.OUTLINE_PART) == 4


@pytest.mark.parametrize("height, width", [(1, 1), (1, 3000), (3000, 1), (2, 2)])
def test_photographs_of_any_shape_are_drawn(height, width):
    image, classes = photograph(height, width), np.ones((height, width), np.uint8)
    assert pictures.overlay(image, classes, NAMES, colours()).height > height
    assert pictures.comparison(image, classes, classes, NAMES, colours()).width > 4 * 80
    assert pictures.sample_grid([(image, classes, classes)], NAMES, colours(), "title").mode == "P"


def test_eighty_megapixels_take_less_than_a_gigabyte_more():
    def memory(name):
        line = next(line for line in open("/proc/self/status") if line.startswith(name))
        return int(line.split()[1]) / 2 ** 20  # GiB

    image, classes = np.broadcast_to(np.uint8(90), (10_000, 8_000, 3)), np.zeros((10_000, 8_000), np.uint8)
    classes[2000:6000, 3000:5000] = 1
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak is measured anew
    before = memory("VmRSS")
    pictures.overlay(image, classes, NAMES, colours())
    assert 0.2 < memory("VmHWM") - before < 1


# ---- comparison

def panels_of(picture, image):
    """The four panels of a comparison whose panels are of the photograph's own size."""
    pixels = np.asarray(picture)
    height, width = image.shape[:2]
    top = next(row for row in range(100) if np.array_equal(pixels[row:row + height, :width], image))
    return [pixels[top:top + height, left:left + width]
            for left in range(0, 4 * (width + pictures.GAP) - pictures.GAP, width + pictures.GAP)]


def test_a_comparison_shows_exactly_the_wrong_pixels_in_one_colour(monkeypatch):
    rng, drawn, side = np.random.default_rng(0), texts(monkeypatch), pictures.PANEL_SIDES[0]
    image = photograph(side, side)
    image[:9] = pictures.WRONG  # a red photograph is no error
    label, prediction = (rng.choice([0, 1, 3], (side, side)).astype(np.uint8) for _ in range(2))
    label[40:80] = IGNORE
    plain, labelled, predicted, errors = panels_of(
        pictures.comparison(image, label, prediction, NAMES, colours()), image)
    wrong = (label != prediction) & (label != IGNORE)
    assert np.array_equal(has(errors, pictures.WRONG), wrong)
    for panel in (labelled, errors):
        assert np.array_equal(has(panel, colours()[IGNORE]), label == IGNORE)
    assert np.array_equal(labelled[label == 0], image[label == 0])
    assert np.array_equal(predicted[prediction == 0], image[prediction == 0])
    share = 100 * wrong.sum() / (label != IGNORE).sum()
    assert drawn == ["photograph", "label", "prediction", f"errors: {share:.1f}%",
                     "cat", "owl", "not labelled", "no colour: ground"]


def test_a_comparison_without_any_labelled_pixel_says_so(monkeypatch):
    drawn, label = texts(monkeypatch), np.full((30, 40), IGNORE, np.uint8)
    pixels = pictures.comparison(photograph(30, 40), label, np.ones_like(label), NAMES, colours())
    assert "errors: nothing is labelled" in drawn
    assert has(pixels, pictures.WRONG).sum() == (pictures.TEXT - 2) ** 2  # the caption's square


def test_a_comparison_of_a_large_photograph_is_small_and_of_a_small_one_legible():
    for side, panel in ((40, pictures.PANEL_SIDES[0]), (3000, pictures.PANEL_SIDES[1])):
        image, classes = photograph(side, side), np.ones((side, side), np.uint8)
        picture = pictures.comparison(image, classes, classes, NAMES, colours())
        assert picture.width == 4 * panel + 3 * pictures.GAP


# ---- grid of samples

def samples(sizes):
    """[(image, label, prediction), ...]: smooth photographs, of which the prediction has a quarter wrong."""
    made = []
    for height, width in sizes:
        image = np.full((height, width, 3), (60, 120, 70), np.uint8)
        label = np.zeros((height, width), np.uint8)
        label[:height // 2] = 1
        prediction = label.copy()
        prediction[:, :width // 2] = 1
        label[:, -width // 4:] = IGNORE
        made.append((image, label, prediction))
    return made


def test_a_grid_is_regular_whatever_the_photographs_aspects():
    """Cells of one size, from the left and the top, with each photograph in the middle of its own."""
    grid = np.asarray(pictures.sample_grid(samples([(100, 120), (400, 100), (50, 600)]), NAMES, colours(),
                                           "title").convert("RGB"))
    width, height = pictures.SAMPLE_BOX
    step = width + pictures.GAP
    assert grid.shape[1] == 2 * (3 * step - pictures.GAP) + 4 * pictures.GAP
    top = 2 * pictures.TITLE + 2 * pictures.TEXT + pictures.GAP
    for row, block, size in ((0, 0, (240, 200)), (0, 1, (50, 200)), (1, 0, (240, 20))):
        for column in range(3):
            left = block * (3 * step + 3 * pictures.GAP) + column * step
            upper = top + row * (height + pictures.GAP)
            ink = Image.fromarray(~has(grid[upper:upper + height, left:left + width], pictures.WHITE))
            x, y, right, lower = ink.getbbox()
            assert abs(right - x - size[0]) <= 1 and abs(lower - y - size[1]) <= 1
            assert abs(x + right - width) <= 1 and abs(y + lower - height) <= 1
    assert has(grid[top + height + pictures.GAP:, 3 * step + 4 * pictures.GAP:], pictures.WHITE).all()  # no fourth


def test_a_grid_shows_the_wrong_pixels_and_those_not_labelled_in_one_colour_each():
    """Of its few colours these stay exact, and no photograph has them."""
    image, label, prediction = samples([(200, 240)])[0]
    image[:] = photograph(200, 240) // 8 * np.array([0, 1, 1], np.uint8) + np.array([218, 40, 28], np.uint8)
    grid = pictures.sample_grid([(image, label, prediction)], NAMES, colours(), "title")
    pixels, top = np.asarray(grid.convert("RGB")), 2 * pictures.TITLE + 2 * pictures.TEXT + pictures.GAP
    cells = [pixels[top:top + 200, left:left + 240] for left in (0, 246, 492)]
    assert np.array_equal(has(cells[2], pictures.WRONG), (label != prediction) & (label != IGNORE))
    assert not has(cells[0], pictures.WRONG).any() and not has(cells[1], pictures.WRONG).any()
    for cell in (cells[0], cells[2]):
        assert np.array_equal(has(cell, colours()[IGNORE]), label == IGNORE)


def test_a_grid_has_its_title_captions_and_legend(monkeypatch):
    drawn = texts(monkeypatch)
    pictures.sample_grid(samples([(50, 50)] * 3), NAMES, colours(), "iteration 1,000, mIoU 34.56")
    assert sorted(drawn) == sorted(["iteration 1,000, mIoU 34.56", "label", "prediction", "errors", "cat",
                                    "not labelled", "no colour: ground"])


def test_the_file_of_a_grid_is_a_fraction_of_a_true_colour_one(tmp_path, monkeypatch):
    made = samples([(375, 500)] * 6)
    for number, (image, _, _) in enumerate(made):
        small = Image.fromarray(photograph(30, 40, number))
        image[:] = np.asarray(small.resize((500, 375), Image.Resampling.BICUBIC))
    pictures.save(pictures.sample_grid(made, NAMES, colours(), "title"), tmp_path / "few.png")
    monkeypatch.setattr(pictures, "few_colours", lambda picture, kept: picture)
    pictures.save(pictures.sample_grid(made, NAMES, colours(), "title"), tmp_path / "all.png")
    few, everything = (Image.open(tmp_path / name).convert("RGB") for name in ("few.png", "all.png"))
    assert np.abs(np.asarray(few).astype(int) - np.asarray(everything)).mean() < 6  # it still looks the same
    assert (tmp_path / "few.png").stat().st_size < (tmp_path / "all.png").stat().st_size / 2


# ---- letters

def ink(text):
    """uint8 [H, W], cropped: what is drawn of a text."""
    picture = ImageOps.invert(pictures.text_line(text, 32).convert("L"))
    return np.asarray(picture.crop(picture.getbbox()))


@pytest.fixture
def only_dejavu(monkeypatch):
    """A system whose one font, matplotlib's own, has no Chinese."""
    path = next(path for path, family in fonts.installed_fonts().items() if family == "DejaVu Sans")
    monkeypatch.setattr(fonts, "installed_fonts", lambda: {path: "DejaVu Sans"})
    fonts.font_with.cache_clear()
    yield path
    fonts.font_with.cache_clear()


def test_letters_that_pillow_lacks_come_from_a_font_that_has_them(only_dejavu):
    assert fonts.font_runs("cat 5%") == [(fonts.PILLOW, "cat 5%")]
    assert fonts.font_runs("vélo, собака") == [(only_dejavu, "vélo, собака")]
    assert fonts.font_runs("кот 猫 cat") == [(only_dejavu, "кот"), (fonts.PILLOW, " 猫 cat")]
    letters = [ink(letter) for letter in "собака"]
    assert len({letter.tobytes() for letter in letters}) == 5  # of two a's, one is drawn


def test_the_user_hears_which_letters_no_font_has_and_what_brings_one(only_dejavu):
    assert fonts.missing_font(["cat", "vélo", "собака"]) is None
    line = fonts.missing_font(["ground", "猫", "ひ 한"])
    assert "\n" not in line and all(letter in line for letter in "猫ひ한") and line.endswith(" fonts-noto-cjk")
    assert fonts.missing_font(["\U00013000"]).endswith(" fonts-noto")
    assert fonts.missing_font(["猫\U00013000"]).endswith(" fonts-noto fonts-noto-cjk")
    many = fonts.missing_font(["".join(map(chr, range(0x4E00, 0x4F00)))])
    assert len(many) < 200 and "..." in many


def test_ascii_names_do_not_load_matplotlib(monkeypatch):
    fonts.font_with.cache_clear()
    monkeypatch.setattr(fonts, "installed_fonts", lambda: pytest.fail("asked for fonts"))
    assert fonts.missing_font(NAMES) is None and ink("cat").any()


def test_curves_use_the_same_fonts_as_the_pictures(monkeypatch, only_dejavu):
    import matplotlib
    from matplotlib.figure import Figure
    families, mosaic = [], Figure.subplot_mosaic
    monkeypatch.setattr(curves, "installed_fonts", lambda: {only_dejavu: "Own Family"})
    monkeypatch.setattr(Figure, "subplot_mosaic", lambda *args, **kwargs: (
        families.extend(matplotlib.rcParams["font.family"]), mosaic(*args, **kwargs))[1])
    curves.draw([], ("ground", "собака"))
    assert families == ["DejaVu Sans", "Own Family"]


# ---- curves

def drawn_axes(monkeypatch, metrics, names=NAMES):
    """The axes of the curves, by their letter in the mosaic, and the image."""
    from matplotlib.figure import Figure
    axes, mosaic = {}, Figure.subplot_mosaic
    monkeypatch.setattr(Figure, "subplot_mosaic", lambda *args, **kwargs: (
        axes.update(mosaic(*args, **kwargs)), axes)[1])
    picture = curves.draw(metrics, names)
    monkeypatch.undo()
    return axes, picture


def evaluation(iteration, miou, iou=None):
    return {"iter": iteration, "mIoU": miou, "aAcc": 80.0, "mAcc": 50.0, **({"IoU": iou} if iou else {})}


def test_curves_follow_the_numbers(monkeypatch):
    metrics = [{"iter": i, "lr": 0.01 * (1 - i / 600), "loss": None if i == 7 else 500 / i} for i in range(1, 601)]
    metrics += [evaluation(200, 30.0), evaluation(400, 34.56), evaluation(600, 33.0)]
    axes, picture = drawn_axes(monkeypatch, metrics)
    raw, mean = axes["L"].get_lines()
    assert len(raw.get_xdata()) == 599 and 7 not in raw.get_xdata() and axes["L"].get_yscale() == "log"
    window = 600 // curves.RUNNING_PART - 1
    assert np.allclose(mean.get_ydata()[-1], np.mean([500 / i for i in range(601 - window, 601)]))
    assert mean.get_xdata()[-1] == 600 and raw.get_alpha() < 0.5 and mean.get_alpha() is None
    assert axes["M"].get_lines()[0].get_xydata().tolist() == [[200, 30], [400, 34.56], [600, 33]]
    assert "34.56" in axes["M"].get_title("left") and "400" in axes["M"].get_title("left")
    assert np.allclose(axes["R"].get_lines()[0].get_ydata(), [0.01 * (1 - i / 600) for i in range(1, 601)])
    pixels = np.asarray(picture).astype(int)
    rows, columns = np.nonzero((pixels[..., 2] - pixels[..., 0] > 120) & (pixels[..., 1] > 90))  # the blue mean
    left, right = (rows[(columns > start * picture.width) & (columns < (start + 0.1) * picture.width)].mean()
                   for start in (0.1, 0.8))
    assert left < right - 20  # it falls


def test_a_loss_that_hardly_changes_or_touches_zero_has_a_linear_axis(monkeypatch):
    for losses in ((3.5, 3.2, 3.4), (3.5, 0.0)):
        axes, _ = drawn_axes(monkeypatch, [{"iter": i, "loss": loss} for i, loss in enumerate(losses)])
        assert axes["L"].get_yscale() == "linear" and axes["L"].get_ylim()[0] == 0


def test_iou_per_class_is_shown_after_two_evaluations(monkeypatch):
    first = evaluation(10, 40.0, {"ground": 90.0, "cat": 10.0, "dog": 20.0, "owl": None})
    last = evaluation(20, 35.0, {"ground": 80.0, "cat": 12.0, "dog": 11.0, "owl": None})
    axes, _ = drawn_axes(monkeypatch, [evaluation(5, 1.0), first])
    assert "C" not in axes
    axes, _ = drawn_axes(monkeypatch, [first, last])
    assert [label.get_text() for label in axes["C"].get_yticklabels()] == ["owl", "dog", "cat", "ground"]
    assert [bar.get_width() for bar in axes["C"].patches] == [0, 11, 12, 80]
    assert [text.get_text() for text in axes["C"].texts] == ["absent", "11.0", "12.0", "80.0"]
    assert list(axes["C"].get_lines()[0].get_xdata())[1:] == [20, 10, 90] and "10" in axes["C"].get_xlabel()


def test_of_two_hundred_classes_the_best_and_the_worst_are_shown(monkeypatch):
    names = tuple(f"$\\bad {i}$ " + 50 * "x" for i in range(200))  # no formulas
    metrics = [evaluation(i, 50.0, {name: 0.5 * k for k, name in enumerate(names)}) for i in (1, 2)]
    axes, _ = drawn_axes(monkeypatch, metrics, names)
    widths = [bar.get_width() for bar in axes["C"].patches]
    assert widths == [*np.arange(20) / 2, 0, *np.arange(180, 200) / 2]
    assert max(len(label.get_text()) for label in axes["C"].get_yticklabels()) < 40


@pytest.mark.parametrize("metrics", [
    [], [{"iter": 1, "lr": 0.01, "loss": 2.0}], [{"iter": 1, "lr": 0.0, "loss": None}], [evaluation(1, 0.0)],
    [{"iter": 3, "loss": float("nan")}, evaluation(3, float("nan"))]])
def test_curves_of_next_to_nothing_are_drawn(metrics):
    picture = curves.draw(metrics, NAMES)
    assert picture.mode == "RGB" and picture.size == (1300, 850) and len(picture.getcolors(10 ** 6)) > 2
