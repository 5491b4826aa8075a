"""predict.py: photographs of every kind, folders, links, pipes and damage; what it writes, and what it never does."""
import csv
import os
import shutil
import warnings

import numpy as np
import pytest
from conftest import ROOT, error_line, run, untrained_checkpoint
from PIL import Image

from cli import UserError
from inference import Predictor
from voc import CLASSES, read_image

PREDICT = ROOT / "predict.py"
ANIMALS = ("ground", "猫", "sheep dog", "owl")
ORIENTATION, TURN_RIGHT = 0x0112, 6  # EXIF: to be shown turned by 90 degrees clockwise


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return untrained_checkpoint(tmp_path_factory.mktemp("network") / "animals.pth", ANIMALS)


def predict(checkpoint, *arguments, status=0, cwd=ROOT):
    return run(PREDICT, checkpoint, *arguments, "--device", "cpu", status=status, cwd=cwd)


def names(folder, pattern="*"):
    """The files under a folder, sorted, by their paths in it."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob(pattern) if path.is_file())


@pytest.fixture
def trip(tmp_path):
    """A folder with photographs, also in sub-folders. -> the folder"""
    folder = tmp_path / "trip"
    for number, name in enumerate(("a.JPG", "day 1/a.png", "day 1/b.webp", "day 2/deep/c.jpeg")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(photograph(20, 30, number)).save(folder / name)
    return folder


def photograph(height, width, seed=0):
    """uint8 [H, W, 3], smooth and in few grey levels, so that every file format keeps it."""
    noise = np.random.default_rng(seed).integers(0, 8, (6, 6), dtype=np.uint8) * 32
    picture = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
    return np.repeat(np.asarray(picture)[..., None] // 16 * 16, 3, axis=2)


def save_kinds(folder):
    """The same 40 x 60 photograph in every kind of file. -> their names"""
    pixels = photograph(40, 60)
    image, grey = Image.fromarray(pixels), pixels[..., 0]
    alpha = Image.fromarray(np.full((40, 60), 90, np.uint8))
    exif = Image.Exif()
    exif[ORIENTATION] = TURN_RIGHT
    image.rotate(90, expand=True).save(folder / "turned.png", exif=exif)
    image.save(folder / "plain.png")
    image.convert("L").save(folder / "grey.bmp")
    Image.merge("LA", (image.convert("L"), alpha)).save(folder / "grey_alpha.png")
    Image.merge("RGBA", (*image.split(), alpha)).save(folder / "alpha.png")
    image.convert("CMYK").save(folder / "cmyk.tif")
    image.quantize(64).save(folder / "palette.png", transparency=bytes(range(60)))
    image.quantize(64).save(folder / "animated.gif")
    Image.fromarray(grey.astype(np.uint16) * 257).save(folder / "sixteen.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(folder / "sixteen_tiff.tif")
    image.save(folder / "webp.webp", lossless=True)
    return sorted(path.stem for path in folder.iterdir())


def test_photographs_of_every_kind_are_labelled_alike_and_others_named(checkpoint, tmp_path):
    """The same picture in eleven kinds of file has one class map; what is damaged is named, with status 1."""
    folder, out = tmp_path / "mine", tmp_path / "out"
    folder.mkdir()
    kinds = save_kinds(folder)
    Image.fromarray(photograph(300, 1)).save(folder / "thin.jpg")
    Image.fromarray(photograph(1, 2000)).save(folder / "flat.jpg")
    Image.fromarray(photograph(1, 1)).save(folder / "dot.png")
    Image.new("L", (70_000, 1)).save(folder / "longer than a JPEG.png")
    (folder / ".hidden").write_text("skipped")
    (folder / "notes.txt").write_text("no image")
    (folder / "cut.jpg").write_bytes((folder / "flat.jpg").read_bytes()[:300])
    shutil.copy(folder / "plain.png", folder / "plain.tif")
    done = predict(checkpoint, folder, "--save-dir", out, "--overlay", status=1)

    errors = done.stderr.splitlines()
    assert len(errors) == 2 and all(line.startswith("predict.py: error: ") for line in errors), done.stderr
    for name, words in (("cut.jpg", "does not decode"), ("plain.tif", "the names of those of")):
        assert any(name in line and words in line for line in errors), name
    assert f"skipped, Pillow does not know its format: {folder}/notes.txt\n" in done.stdout
    assert ".hidden" not in done.stdout
    labelled = sorted([*kinds, "thin", "flat", "dot", "longer than a JPEG"])
    assert f"{len(labelled)} photographs labelled; pictures in {out}" in done.stdout and len(kinds) == 11
    assert sorted(path.stem for path in out.glob("*.png")) == labelled
    assert sorted(path.stem for path in out.glob("overlay/*.jpg")) == labelled

    maps = {path.stem: Image.open(path) for path in out.glob("*.png")}
    expected = np.asarray(maps["plain"])
    assert expected.shape == (40, 60) and len(np.unique(expected)) > 1 and expected.max() < len(ANIMALS)
    for kind in kinds:
        assert np.array_equal(np.asarray(maps[kind]), expected), kind
    assert [maps[name].size for name in ("thin", "flat", "dot")] == [(1, 300), (2000, 1), (1, 1)]
    assert maps["plain"].mode == "P"
    assert maps["plain"].getpalette()[:12] == [200, 0, 5, 200, 10, 5, 200, 20, 5, 200, 30, 5]


def test_folders_are_mirrored_and_save_dir_inside_is_left_out(checkpoint, trip):
    out = trip / "labelled"
    expected = ["a.png", "day 1/a.png", "day 1/b.png", "day 2/deep/c.png"]
    for _ in range(2):  # the second time, there are pictures inside
        done = predict(checkpoint, trip, "--save_dir", out, "--overlay")
        assert "4 photographs labelled" in done.stdout and "skipped" not in done.stdout
        assert names(out, "*.png") == expected
        assert names(out / "overlay") == [name.replace(".png", ".jpg") for name in expected]


def test_save_dir_may_be_the_folder_around_that_of_the_photographs(checkpoint, trip):
    predict(checkpoint, "day 1", "day 2", "--save_dir", ".", cwd=trip)
    assert names(trip, "*.png") == ["a.png", "b.png", "day 1/a.png", "deep/c.png"]


def test_unknown_formats_are_listed_and_heic_gets_a_hint(checkpoint, trip, tmp_path):
    (trip / "day 1/notes.txt").write_text("no image")
    (trip / "IMG_1.HEIC").write_bytes(b"ftypheic")
    output = predict(checkpoint, trip, "--save_dir", tmp_path / "out").stdout
    for name in ("day 1/notes.txt", "IMG_1.HEIC"):
        assert f"skipped, Pillow does not know its format: {trip / name}" in output
    assert output.count("for HEIC: pip install pillow-heif") == 1 and "4 photographs labelled" in output


def test_an_error_line_names_the_file_and_the_reason(checkpoint, trip, tmp_path):
    """A link that leads nowhere is in no list; the system's errors have no number."""
    (trip / "lost.jpg").symlink_to(tmp_path / "absent.jpg")
    out = tmp_path / "out"
    (out / "day 1/b.png").mkdir(parents=True)
    (out / "day 2").write_text("a file where a folder would go")
    done = predict(checkpoint, trip, "--save_dir", out, status=1)
    assert sorted(done.stderr.splitlines()) == [
        f"predict.py: error: {out}/day 1/b.png: Is a directory",
        f"predict.py: error: {out}/day 2/deep: Not a directory",
        f"predict.py: error: {trip}/lost.jpg: there is no such image; add or restore it"]
    assert "2 photographs labelled" in done.stdout


def test_what_cannot_be_labelled_is_an_error_line_and_the_others_are_done(checkpoint, trip, tmp_path):
    """Damage in a folder, a text file that is named, and a pipe, on which reading would wait for ever."""
    (trip / "day 1/b.webp").write_bytes(b"garbage")
    os.mkfifo(trip / "pipe.jpg")
    notes = tmp_path / "notes.txt"
    notes.write_text("no image")
    done = predict(checkpoint, trip, notes, "--save_dir", tmp_path / "out", status=1)
    assert "3 photographs labelled" in done.stdout
    errors = done.stderr.splitlines()
    assert len(errors) == 3 and all(line.startswith("predict.py: error: ") for line in errors)
    for path, words in ((trip / "day 1/b.webp", "does not decode"), (trip / "pipe.jpg", "is no regular file"),
                        (notes, "does not decode")):
        assert any(f"{path}: " in line and words in line for line in errors), path
    assert names(tmp_path / "out") == ["a.png", "day 1/a.png", "day 2/deep/c.png"]


def test_heic_alone_and_files_that_pillow_cannot_read_are_told_with_the_remedy(checkpoint, tmp_path):
    folder = tmp_path / "trip"
    folder.mkdir()
    for name in ("IMG_1.HEIC", "scan.pdf", "film.mpg"):
        (folder / name).write_bytes(b"of a phone")
    line = error_line(PREDICT, checkpoint, folder, "--save_dir", tmp_path / "out", "--device", "cpu")
    assert "holds no photographs that Pillow reads; skipped" in line and "pip install pillow-heif" in line
    Image.fromarray(photograph(20, 30)).save(folder / "a.png")
    done = run(PREDICT, checkpoint, folder, "--save_dir", tmp_path / "out", "--device", "cpu")
    assert "\n1 photograph, " in done.stdout and "1 photograph labelled" in done.stdout
    assert done.stdout.count("skipped, Pillow does not know") == 3


def test_an_array_of_another_form_is_one_line(checkpoint):
    with pytest.raises(UserError, match=r"an array is uint8 \[H, W, 3\], not float64 \[4, 4\]"):
        Predictor(checkpoint, "cpu")(np.zeros((4, 4)))


def test_a_name_as_long_as_names_can_be_does_not_end_the_job(checkpoint, trip, tmp_path):
    """253 bytes with `.jp2`: that of its class map is as long; that of one of 255 bytes with `.webp` is shorter."""
    source = trip / "a.JPG"
    for name in ("x" * 249 + ".jpg", "é" * 124 + "y.jpg"):
        shutil.copy(source, trip / name)
        assert len(name.encode()) == 253
    done = predict(checkpoint, trip, "--save_dir", tmp_path / "out", "--overlay")
    assert "6 photographs labelled" in done.stdout and len(names(tmp_path / "out/overlay")) == 6


def test_the_csv_has_the_share_of_each_class_in_each_photograph(checkpoint, trip, tmp_path):
    (trip / "a.JPG").write_bytes(b"garbage")
    predict(checkpoint, trip, "--save_dir", tmp_path / "out", "--csv", tmp_path / "shares.csv", status=1)
    with open(tmp_path / "shares.csv", encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["photograph", *ANIMALS]
    assert [row[0] for row in rows] == [str(trip / name) for name in
                                        ("day 1/a.png", "day 1/b.webp", "day 2/deep/c.jpeg")]
    for row, name in zip(rows, names(tmp_path / "out"), strict=True):
        classes = np.asarray(Image.open(tmp_path / "out" / name))
        shares = np.bincount(classes.ravel(), minlength=4) / classes.size
        np.testing.assert_allclose([float(share) for share in row[1:]], shares, atol=1e-6)


def test_no_photograph_is_ever_overwritten(checkpoint, trip, tmp_path):
    """Nor through links, in either direction; nor by the CSV."""
    before = {path: path.read_bytes() for path in trip.rglob("*") if path.is_file()}
    links, made = tmp_path / "links", tmp_path / "made"
    links.mkdir()
    made.mkdir()
    (links / "linked.jpg").symlink_to(trip / "day 1/a.png")
    (made / "a.png").symlink_to(trip / "day 1/a.png")
    for flags in ((trip, "--save_dir", trip), (trip / "day 1/a.png", "--save_dir", trip / "day 1"),
                  (links, trip / "day 1/a.png", "--save_dir", trip / "day 1"),
                  (links / "linked.jpg", trip / "day 1/a.png", "--save_dir", made)):
        line = error_line(PREDICT, checkpoint, *flags, "--device", "cpu")
        assert "would overwrite" in line and "name another place" in line
    for file in (trip / "day 1/a.png", checkpoint):
        assert "would overwrite" in error_line(PREDICT, checkpoint, trip, "--save_dir", tmp_path / "out", "--csv", file,
                                               "--device", "cpu")
    assert {path: path.read_bytes() for path in trip.rglob("*") if path.is_file()} == before


def test_a_photograph_is_decoded_once(checkpoint, trip, tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr("inference.read_image", lambda path: (read.append(path), read_image(path))[1])
    predict(checkpoint, trip, "--save_dir", tmp_path / "out", "--overlay", "--csv", tmp_path / "shares.csv")
    assert sorted(read) == sorted(path for path in trip.rglob("*") if path.is_file()) and len(read) == 4


def test_flags_of_predict_that_make_no_sense_are_one_line(checkpoint, trip, tmp_path):
    out = ("--save_dir", tmp_path / "out", "--device", "cpu")
    (tmp_path / "empty").mkdir()
    for flags, words, status in (
            ((trip,), "--save_dir", 2), (out, "PHOTO_OR_FOLDER", 2), (("", *out), "takes a value, not ''", 2),
            ((trip, *out, "--csv", ""), "takes a value, not ''", 2), ((trip, "--save_dir", ""), "not ''", 2),
            ((trip, *out, "--slide", 32, 48), "CROP comes first", 2),
            ((tmp_path / "absent", *out), "absent: there is no such photograph or folder", 1),
            ((tmp_path / "empty", *out), "empty: holds no photographs that Pillow reads", 1),
            ((trip, *out, "--csv", tmp_path / "absent/x.csv"), "absent/x.csv: cannot be written", 1),
            ((trip, "--device", "cpu", "--save_dir", trip / "a.JPG/out"), "cannot be written", 1)):
        assert words in error_line(PREDICT, checkpoint, *flags, status=status), flags
    assert not (tmp_path / "out").exists()


def test_twenty_megapixels_are_labelled_at_their_size_in_little_memory(tmp_path):
    """The logits of such a photograph alone would take 1.7 GB. (VmHWM and not ru_maxrss, which a process inherits from
    the one that started it.)"""
    checkpoint = untrained_checkpoint(tmp_path / "net.pth", CLASSES)
    Image.new("L", (5_000, 4_000), 120).save(tmp_path / "huge.jpg")
    with_peak = """import atexit, runpy, sys
atexit.register(lambda: print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))))
sys.argv.pop(0)
runpy.run_path(sys.argv[0], run_name="__main__")"""
    output = run("-c", with_peak, PREDICT, checkpoint, tmp_path / "huge.jpg", "--save_dir", tmp_path / "out",
                 "--device", "cpu").stdout
    with Image.open(tmp_path / "out/huge.png") as classes:
        assert classes.size == (5_000, 4_000) and classes.mode == "P"
    assert int(output.split()[-2]) / 2 ** 20 < 1.8  # GiB; with the logits at once it is 2.3


def test_a_photograph_of_another_ones_stem_is_not_overwritten(checkpoint, tmp_path):
    """a.png is left out, as its pictures would have the names of a.jpg's, but it is read from where those would go."""
    for name in ("a.jpg", "a.png"):
        Image.fromarray(photograph(20, 30)).save(tmp_path / name)
    before = (tmp_path / "a.png").read_bytes()
    line = error_line(PREDICT, checkpoint, tmp_path, "--save_dir", tmp_path, "--device", "cpu")
    assert "would overwrite" in line and (tmp_path / "a.png").read_bytes() == before


def test_a_turned_photograph_is_upright_as_a_file_and_as_an_image(checkpoint, tmp_path):
    exif = Image.Exif()
    exif[ORIENTATION] = TURN_RIGHT
    Image.fromarray(photograph(20, 30)).save(tmp_path / "turned.png", exif=exif)
    predictor = Predictor(checkpoint, "cpu")
    with Image.open(tmp_path / "turned.png") as image:
        assert predictor(image).shape == (30, 20)
        assert np.array_equal(predictor(image), predictor(tmp_path / "turned.png"))


def test_labels_of_a_data_set_are_not_overwritten(checkpoint, own_drawn_voc):
    """Other photographs may be labelled into that folder."""
    folder = own_drawn_voc / "SegmentationClass"
    before = {path: path.read_bytes() for path in folder.iterdir()}
    images = sorted((own_drawn_voc / "JPEGImages").glob("drawn_val_*.jpg"))
    line = error_line(PREDICT, checkpoint, *images, "--save_dir", folder, "--device", "cpu")
    assert f"--save_dir {folder} would overwrite this file" in line
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_arrays_of_any_layout_are_labelled(checkpoint, drawn_voc):
    """Say OpenCV's BGR turned to RGB, and one that cannot be written to."""
    predictor = Predictor(checkpoint, "cpu")
    image = np.array(Image.open(drawn_voc / "JPEGImages/drawn_val_0000.jpg"))
    turned, locked = np.ascontiguousarray(image[:, :, ::-1])[:, :, ::-1], image.copy()
    locked.flags.writeable = False
    with warnings.catch_warnings(action="error"):
        for array in (turned, locked):
            assert np.array_equal(predictor(array), predictor(image))
    with pytest.raises(UserError, match="uint8"):
        predictor(image[:0])
