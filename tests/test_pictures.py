"""What people look at: predictions for photographs of every kind, overlays, comparisons, curves; own classes; ONNX."""
import json
import shlex
import shutil
import subprocess

import numpy as np
import pytest
import torch
from conftest import ROOT, error_line, run, train, train_flags, untrained_checkpoint
from PIL import Image

import evaluate as ev
import pictures
from fcn8s import FCN8s
from voc import IGNORE, DataError, palette, prepare, read_classes

EVALUATE = ROOT / "evaluate.py"
ERRORS = (OSError, DataError, ev.ExportError, ev.WeightsError)
ANIMALS = ("ground", "猫", "sheep dog", "owl")
ORIENTATION, TURN_RIGHT = 0x0112, 6  # EXIF: to be shown turned by 90 degrees clockwise


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return untrained_checkpoint(tmp_path_factory.mktemp("network") / "animals.pth", ANIMALS)


def evaluate(monkeypatch, *arguments):
    """evaluate.py with these arguments, in this process, which saves the seconds that loading PyTorch takes."""
    monkeypatch.setattr("sys.argv", ["evaluate.py", *map(str, arguments)])
    return ev.main(ev.parse_args())


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
    """The same picture in eleven kinds of file has one class map; what is no image is skipped, with status 1."""
    folder, out = tmp_path / "mine", tmp_path / "out"
    folder.mkdir()
    kinds = save_kinds(folder)
    Image.fromarray(photograph(300, 1)).save(folder / "thin.jpg")
    Image.fromarray(photograph(1, 2000)).save(folder / "flat.jpg")
    Image.fromarray(photograph(1, 1)).save(folder / "dot.png")
    Image.new("L", (70_000, 1)).save(folder / "longer than a JPEG.png")
    (folder / ".hidden").write_text("passed over")
    (folder / "notes.txt").write_text("no image")
    (folder / "cut.jpg").write_bytes((folder / "flat.jpg").read_bytes()[:300])
    shutil.copy(folder / "plain.png", folder / "plain.tif")
    done = run(EVALUATE, checkpoint, "--images", folder, "--save-dir", out, "--overlay", "--device", "cpu", status=1)

    skipped = done.stderr.splitlines()
    assert len(skipped) == 3 and all(line.startswith("evaluate.py: skipped: ") for line in skipped), done.stderr
    for name, words in (("notes.txt", "does not decode"), ("cut.jpg", "does not decode"), ("plain.tif", "plain.png")):
        assert any(name in line and words in line for line in skipped), name
    labelled = sorted([*kinds, "thin", "flat", "dot", "longer than a JPEG"])
    assert f"{len(labelled)} of {len(labelled) + 3} photographs" in done.stdout and len(kinds) == 11
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


def test_eighty_megapixels_are_labelled_at_their_size_in_little_memory(checkpoint, tmp_path):
    """The logits of such a photograph alone would take 6.7 GB. (VmHWM and not ru_maxrss, which a process inherits from
    the one that started it.)"""
    Image.new("L", (10_000, 8_000), 120).save(tmp_path / "huge.jpg")
    with_peak = """import atexit, runpy, sys
atexit.register(lambda: print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))))
sys.argv.pop(0)
runpy.run_path(sys.argv[0], run_name="__main__")"""
    output = run("-c", with_peak, EVALUATE, checkpoint, "--images", tmp_path / "huge.jpg", "--save_dir",
                 tmp_path / "out", "--device", "cpu").stdout
    with Image.open(tmp_path / "out/huge.png") as classes:
        assert classes.size == (10_000, 8_000) and classes.mode == "P"
    assert int(output.split()[-2]) / 2 ** 20 < 3  # GiB, of which PyTorch and the photograph take 1


def test_flags_of_pictures_that_cannot_take_effect_are_errors(checkpoint, drawn_voc, tmp_path, monkeypatch):
    for flags, words in (
            ((), "one of the arguments --data_path --images --export is required"),
            (("--images", ROOT), "--images needs --save_dir"), (("--data_path", drawn_voc, "--overlay"), "--save_dir"),
            (("--images", ROOT, "--data_path", drawn_voc), "not allowed with"),
            (("--images", ROOT, "--save_dir", tmp_path, "--json", "x.json"),
             "--json has no effect without --data_path"),
            (("--export", tmp_path / "x.onnx", "--flip"), "--flip has no effect with --export"),
            (("--data_path", drawn_voc, "--export_size", 8, 8), "--export_size has no effect without --export")):
        assert words in error_line(EVALUATE, checkpoint, *flags, status=2)
    image = tmp_path / "image.png"
    Image.new("RGB", (8, 8)).save(image)
    overlay = tmp_path / "made/overlay/image.jpg"
    overlay.parent.mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(overlay)
    (tmp_path / "names.txt").write_text("ground\nowl\n")
    for flags, words in (
            (("--images", tmp_path / "absent", "--save_dir", tmp_path / "out"), "absent: there is no such photograph"),
            (("--images", image, "--save_dir", tmp_path), "holds what is read"),
            (("--images", overlay, "--save_dir", tmp_path / "made", "--overlay"), "holds what is read"),
            (("--images", image, "--save_dir", image / "out"), "nothing can be written there"),
            (("--images", tmp_path / "names.txt", "--save_dir", tmp_path / "out"),
             "names.txt: the image does not decode"),
            (("--images", image, "--save_dir", tmp_path / "out", "--classes", tmp_path / "names.txt"),
             "has 2; name its own")):
        with pytest.raises(ERRORS, match=words):
            evaluate(monkeypatch, checkpoint, "--device", "cpu", *flags)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["image.png", "made", "names.txt"]


def test_an_overlay_blends_the_classes_found_and_names_them():
    image, classes = photograph(200, 300), np.zeros((200, 300), np.uint8)
    classes[50:100, 60:120] = 2
    picture = np.asarray(pictures.overlay(image, classes, ANIMALS, palette()))
    assert picture.shape[0] > 200 and picture.shape[1] == 300
    same = (picture[:200] == image).all(-1)
    assert same[classes == 0].all()
    blend = image * (1 - pictures.OPACITY) + palette()[2] * pictures.OPACITY
    assert np.abs(picture[:200].astype(float) - blend)[classes == 2].max() <= 1
    assert (picture[200:] == palette()[2]).all(-1).any() and not (picture[200:] == palette()[1]).all(-1).any()


def test_a_comparison_shows_exactly_the_wrong_pixels_in_red():
    rng = np.random.default_rng(0)
    side = pictures.PANEL_SIDES[0]
    image = photograph(side, side)
    label, prediction = (rng.choice([0, 1, 3], (side, side)).astype(np.uint8) for _ in range(2))
    label[:40] = IGNORE
    picture = np.asarray(pictures.comparison(image, label, prediction, ANIMALS, palette()))
    top = next(row for row in range(60) if (picture[row:row + side, :side] == image).all())
    step = side + pictures.GAP
    panels = [picture[top:top + side, left:left + side] for left in range(0, 4 * step, step)]
    assert np.array_equal(panels[1], palette()[label]) and np.array_equal(panels[2], palette()[prediction])
    assert np.array_equal((panels[3] == pictures.WRONG).all(-1), (label != prediction) & (label != IGNORE))


def test_curves_follow_the_numbers():
    """A loss that falls in a straight line is drawn as one: the blue pixels sink from left to right."""
    metrics = [{"iter": i, "loss": 1 - i / 1000} for i in range(1, 1000)] + [{"iter": 500, "mIoU": 12.5}]
    picture = np.asarray(pictures.curves(metrics)).astype(int)
    rows, columns = np.nonzero((picture[..., 2] - picture[..., 0] > 100))
    assert columns.size > 500 and columns.max() < picture.shape[1] / 2
    assert np.corrcoef(rows, columns)[0, 1] > 0.99


# ---- own classes

@pytest.fixture(scope="module")
def labelme_export(drawn_voc, tmp_path_factory):
    """What labelme's labelme2voc.py writes, with three classes, and the two lists that the README makes."""
    folder = tmp_path_factory.mktemp("labelme") / "export"
    for name in ("JPEGImages", "SegmentationClass", "SegmentationClassPNG", "ImageSets/Segmentation"):
        (folder / name).mkdir(parents=True)
    to_own = np.full(256, IGNORE, np.uint8)
    to_own[[0, 1, 3, 7]] = 0, 1, 2, 3
    ids = sorted(path.stem for path in (drawn_voc / "SegmentationClass").iterdir())
    for image_id in ids:
        shutil.copy(drawn_voc / f"JPEGImages/{image_id}.jpg", folder / f"JPEGImages/my {image_id}.jpg")
        label = to_own[np.asarray(Image.open(drawn_voc / f"SegmentationClass/{image_id}.png"))]
        pictures.save(pictures.class_picture(label, palette()), folder / f"SegmentationClassPNG/my {image_id}.png")
        np.save(folder / f"SegmentationClass/my {image_id}.npy", label.astype(np.int32))
    (folder / "class_names.txt").write_text("_background_\ntriangle\nstar\nred disc")
    for name, part in (("train", ids[3:]), ("val", ids[:3])):
        (folder / f"ImageSets/Segmentation/{name}.txt").write_text("".join(f"my {image_id}\n" for image_id in part))
    return folder


@pytest.fixture(scope="module")
def own_run(labelme_export, tmp_path_factory):
    """A short training on the labelme export, with TensorBoard. -> (its folder, what it printed)"""
    work_dir = tmp_path_factory.mktemp("own") / "run"
    flags = ("--classes", labelme_export / "class_names.txt", "--eval_interval", 2, "--tensorboard")
    return work_dir, train(labelme_export, work_dir, *flags).stdout


def test_a_labelme_export_trains_and_its_classes_are_everywhere(own_run, labelme_export, tmp_path):
    work_dir, output = own_run
    assert "4 classes" in output and "of 'train'" in output
    meta = torch.load(work_dir / "ckpt/best.pth", weights_only=True)["meta"]
    assert list(meta["classes"]) == ["_background_", "triangle", "star", "red disc"] and meta["num_classes"] == 4
    assert meta["palette"] == palette()[:4].tolist()
    done = run(EVALUATE, work_dir / "ckpt/best.pth", "--data_path", labelme_export, "--device", "cpu",
               "--json", tmp_path / "scores.json")
    for name in meta["classes"]:
        assert f"\n{name} " in output and f"\n{name} " in done.stdout
    assert list(json.loads((tmp_path / "scores.json").read_text())["classes"]) == list(meta["classes"])


def test_the_last_line_is_a_command_that_shows_the_predictions(own_run, labelme_export):
    work_dir, output = own_run
    command = shlex.split(output.strip().splitlines()[-1].split(": ", 1)[1])
    subprocess.run(command, check=True, capture_output=True)
    ids = (labelme_export / "ImageSets/Segmentation/val.txt").read_text().splitlines()
    assert sorted(path.stem for path in work_dir.glob("val/compared/*.png")) == ids
    assert all(Image.open(work_dir / f"val/{image_id}.png").size ==
               Image.open(labelme_export / f"JPEGImages/{image_id}.jpg").size for image_id in ids)


def test_a_run_draws_its_curves_and_samples_and_tells_tensorboard(own_run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    work_dir, _ = own_run
    board = EventAccumulator(str(work_dir / "tensorboard"))
    board.Reload()
    metrics = [json.loads(line) for line in (work_dir / "metrics.jsonl").read_text().splitlines()]
    for name in ("loss", "mIoU", "lr"):
        expected = [(line["iter"], line[name]) for line in metrics if name in line]
        np.testing.assert_allclose([(event.step, event.value) for event in board.Scalars(name)], expected, rtol=1e-6)
    assert [event.step for event in board.Images("val_samples")] == [2, 4]
    assert Image.open(work_dir / "curves.png").size == (1100, 400)
    grid = np.asarray(Image.open(work_dir / "val_samples.png"))
    assert grid.shape[1] == 2 * (3 * pictures.SAMPLE_SIDE + 2 * pictures.GAP) + 4 * pictures.GAP
    assert (grid == palette()[IGNORE]).all(-1).any()  # the labels' void


def test_names_of_classes_keep_the_table_in_columns():
    """A Chinese character is two columns wide in a terminal."""
    scores = {"IoU": [1.0] * 4, "Acc": [float("nan")] * 4}
    for names in (ANIMALS, ("ground", "猫猫猫猫猫猫猫猫", "a rather long name", "owl")):
        lines = ev.format_table(scores, names).splitlines()
        assert len({len(line) + sum(letter == "猫" for letter in line) for line in lines}) == 1


def test_a_picture_that_cannot_be_drawn_does_not_end_a_training(drawn_voc, tmp_path):
    (tmp_path / "matplotlib").mkdir()
    (tmp_path / "matplotlib/__init__.py").write_text("raise ImportError('no matplotlib today')")
    done = run(ROOT / "train.py", *train_flags(drawn_voc, tmp_path / "run"), "--max_iters", 1,
               env={"PYTHONPATH": str(tmp_path)})
    assert "could not be drawn: no matplotlib today" in done.stdout and (tmp_path / "run/result.json").exists()


@pytest.mark.parametrize("content, words", [
    (b"ground\nowl\nowl\n", "'owl' twice"), (b"ground\n", "names 1 classes"), (b"\xff\xfea\x00", "not UTF-8"),
    (b"\n".join(b"c%d" % i for i in range(256)), "names 256 classes"), (None, "no such file")])
def test_a_file_of_class_names_that_is_none(labelme_export, tmp_path, content, words):
    path = tmp_path / "names.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=words):
        read_classes(path)
    path.write_bytes("\ufeff__ignore__\r\n_background_\r\n 猫 \r\n\r\n".encode())
    assert read_classes(path) == ("_background_", "猫")


# ---- ONNX

def onnx_logits(path, images):
    import onnxruntime
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert session.get_modelmeta().custom_metadata_map["classes"].split("\n") == list(ANIMALS)
    return session.run(None, {"images": images.numpy()})[0]


@pytest.mark.parametrize("backbone, size", [("resnet50", None), ("resnet50_d8", None), ("resnet50", (40, 56))])
def test_an_exported_network_is_the_network(tmp_path, monkeypatch, capfd, backbone, size):
    """At sizes it was not checked at, where it takes any."""
    torch.manual_seed(0)
    model = FCN8s(4, backbone)
    for parameter in model.decode_head.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    torch.save({"state_dict": model.state_dict(), "meta": {"backbone": backbone, "classes": ANIMALS}},
               tmp_path / "net.pth")
    size_flags = ("--export_size", *size) if size else ()
    evaluate(monkeypatch, tmp_path / "net.pth", "--export", tmp_path / "net.onnx", *size_flags)
    output = capfd.readouterr()
    assert "ONNX Runtime agrees with PyTorch" in output.out and output.err == ""
    for shape in ((1, 3, *size),) if size else ((1, 3, 71, 90), (3, 3, 1, 8)):
        images = torch.randint(0, 256, shape).float()
        with torch.no_grad():
            expected = model.eval()(prepare(images))["out"]
        assert expected.abs().max() > 1e-3
        np.testing.assert_allclose(onnx_logits(tmp_path / "net.onnx", images), expected, rtol=1e-4,
                                   atol=1e-4 * float(expected.abs().max()))
    if size:
        with pytest.raises(Exception, match="[Dd]imension"):
            onnx_logits(tmp_path / "net.onnx", torch.zeros(1, 3, 64, 64))


def test_an_export_says_what_is_missing_and_leaves_nothing(checkpoint, tmp_path):
    assert "no file can be written there" in error_line(EVALUATE, checkpoint, "--export", tmp_path / "absent/net.onnx")
    (tmp_path / "start.py").write_text("import runpy, sys\nsys.modules['onnx'] = sys.modules['tensorboard'] = None\n"
                                       "sys.argv.pop(0)\nsys.path.insert(0, sys.argv[0].rsplit('/', 1)[0])\n"
                                       "runpy.run_path(sys.argv[0], run_name='__main__')\n")
    assert "pip install onnx" in error_line(
        tmp_path / "start.py", EVALUATE, checkpoint, "--export", tmp_path / "net.onnx")
    assert "pip install tensorboard" in error_line(
        tmp_path / "start.py", ROOT / "train.py", "--data_path", tmp_path, "--tensorboard", status=2)
    assert [path.name for path in tmp_path.iterdir()] == ["start.py"]
