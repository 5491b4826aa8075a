"""Data of one's own: layouts, own classes, the split by seed, messages about what is missing."""
import json
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, drawing, error_line, run, state, train, train_flags
from PIL import Image

import visualize
from cli import UserError
from data import digest, open_training, split_by_seed, with_every_class
from metrics import format_table
from train import parse_args
from voc import IGNORE, VOC, palette, read_classes

EVALUATE = ROOT / "evaluate.py"
SCRIPTS = ("ground", "猫", "собака", "owl")


@pytest.fixture(scope="module")
def labelme_export(drawn_voc, tmp_path_factory):
    """What labelme's labelme2voc.py writes, with three classes, and the two lists that the README makes."""
    folder = tmp_path_factory.mktemp("labelme") / "export"
    for name in ("JPEGImages", "SegmentationClass", "SegmentationClassPNG", "ImageSets/Segmentation"):
        (folder / name).mkdir(parents=True)
    to_own = np.full(256, IGNORE, np.uint8)
    to_own[[0, 1, 2, 4]] = 0, 1, 2, 3  # of draw_voc.SHAPES
    ids = sorted(path.stem for path in (drawn_voc / "SegmentationClass").iterdir())
    for image_id in ids:
        shutil.copy(drawn_voc / f"JPEGImages/{image_id}.jpg", folder / f"JPEGImages/my {image_id}.jpg")
        label = to_own[np.asarray(Image.open(drawn_voc / f"SegmentationClass/{image_id}.png"))]
        visualize.save(visualize.class_picture(label, palette()), folder / f"SegmentationClassPNG/my {image_id}.png")
        np.save(folder / f"SegmentationClass/my {image_id}.npy", label.astype(np.int32))
    (folder / "class_names.txt").write_text("_background_\ntriangle\nstar\nred disc")
    for name, part in (("train", ids[3:]), ("val", ids[:3])):
        (folder / f"ImageSets/Segmentation/{name}.txt").write_text("".join(f"my {image_id}\n" for image_id in part))
    return folder


@pytest.fixture(scope="module")
def own_run(labelme_export, tmp_path_factory):
    """A short training on the labelme export, whose class_names.txt is found. -> (its folder, what it printed)"""
    work_dir = tmp_path_factory.mktemp("own") / "run"
    flags = ("--eval_interval", 2, "--tensorboard")
    with drawing():
        return work_dir, train(labelme_export, work_dir, *flags).stdout


def test_a_labelme_export_trains_and_its_classes_are_everywhere(own_run, labelme_export, tmp_path):
    work_dir, output = own_run
    assert "4 classes" in output and "of 'train'" in output
    meta = state(work_dir / "ckpt/best.pth")["meta"]
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
    script = command.index(str(EVALUATE))
    assert shutil.which(command[0]) and Path(shutil.which(command[0])).samefile(sys.executable) and script == 1
    run(*command[script:])
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
    for tag in ("train/loss", "val/mIoU", "train/lr", "val_IoU/triangle"):
        expected = [(line["iter"], line["IoU"]["triangle"] if "IoU/" in tag else line[tag.split("/")[1]])
                    for line in metrics if ("IoU" if "IoU/" in tag else tag.split("/")[1]) in line]
        np.testing.assert_allclose([(event.step, event.value) for event in board.Scalars(tag)], expected, rtol=1e-6)
    assert all("/" in tag for tag in board.Tags()["scalars"])
    for name in ("curves", "confusion", "val_samples"):
        assert [event.step for event in board.Images(name)] == [2, 4]
    assert Image.open(work_dir / "curves.png").size == (1300, 850)
    grid = np.asarray(Image.open(work_dir / "val_samples.png").convert("RGB"))
    assert (grid == palette()[IGNORE]).all(-1).any()  # the labels' void


def test_names_of_classes_keep_the_table_in_columns():
    """A Chinese character is two columns wide in a terminal."""
    scores = {"IoU": [1.0] * 4, "Acc": [float("nan")] * 4}
    for names in (SCRIPTS, ("ground", "猫猫猫猫猫猫猫猫", "a rather long name", "owl")):
        lines = format_table(scores, names).splitlines()
        assert len({len(line) + sum(letter == "猫" for letter in line) for line in lines}) == 1


@pytest.mark.parametrize("content, words", [
    (b" \n", "is empty"),
    (b"ground\nowl\nowl\n", "'owl' twice"), (b"ground\n", "names 1 classes"), (b"\xff\xfea\x00", "not UTF-8"),
    (b"\n".join(b"c%d" % i for i in range(256)), "names 256 classes"), (None, "No such file")])
def test_a_file_of_class_names_that_is_none(tmp_path, content, words):
    path = tmp_path / "names.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=words):
        read_classes(path)
    path.write_bytes("\ufeff__ignore__\r\n_background_\r\n 猫 \r\n\r\n".encode())
    assert read_classes(path) == ("_background_", "猫")


# ---- folders without lists

@pytest.fixture(scope="module")
def unlisted(drawn_voc, tmp_path_factory):
    """images/ and masks/, extensions of every kind and case, and class_names.txt; no lists. -> the folder"""
    folder = tmp_path_factory.mktemp("unlisted") / "data"
    kinds = (".JPG", ".png", ".webp", ".jpeg", ".PNG", ".tif")
    for number, path in enumerate(sorted((drawn_voc / "SegmentationClass").iterdir())):
        name = f"day {number % 2}/{path.stem}"
        for kind in ("images", "masks"):
            (folder / kind / name).parent.mkdir(parents=True, exist_ok=True)
        with Image.open(drawn_voc / f"JPEGImages/{path.stem}.jpg") as image:
            image.save(folder / f"images/{name}{kinds[number % len(kinds)]}")
        shutil.copy(path, folder / f"masks/{name}.PNG")
    (folder / "images/notes.txt").write_text("no image")
    shutil.copy(drawn_voc / "JPEGImages/drawn_sbd_0000.jpg", folder / "images/not labelled.jpg")
    (folder / "class_names.txt").write_text("\n".join(f"class {i}" for i in range(21)))
    return folder


def files(folder):
    return sorted((path, path.stat().st_mtime_ns) for path in folder.rglob("*"))


@pytest.fixture
def own_unlisted(unlisted, tmp_path):
    return shutil.copytree(unlisted, tmp_path / "data")


def test_images_that_swap_names_do_not_leak_into_the_evaluation(own_unlisted, tmp_path):
    work_dir = tmp_path / "run"
    train(own_unlisted, work_dir, "--max_iters", 1)
    lists = state(work_dir / "ckpt/latest.pth")["meta"]["lists"]
    for kind in ("images", "masks"):
        pair = [next((own_unlisted / kind).glob(f"{lists[part][0]}.*")) for part in ("train", "val")]
        contents = [path.read_bytes() for path in pair]
        for path, content in zip(pair, reversed(contents), strict=True):
            path.write_bytes(content)
    line = error_line(ROOT / "train.py", *train_flags(own_unlisted, work_dir), "--resume", "auto")
    assert "was trained on 1 images that now have names of its list to evaluate on" in line


def test_a_split_by_seed_is_said_and_kept_whatever_is_added_later(own_unlisted, tmp_path):
    """It is in the checkpoint, from which --resume and evaluate.py take it. The data folder stays as it is."""
    before, work_dir = files(own_unlisted), tmp_path / "run"
    output = train(own_unlisted, work_dir, "--checkpoint_interval", 2).stdout
    assert "21 classes, 9 images of 'train', 2 of 'val'; no lists there: split by --seed and --val_fraction" in output
    lists = state(work_dir / "ckpt/latest.pth")["meta"]["lists"]
    assert {name: len(ids) for name, ids in lists.items()} == {"train": 9, "val": 2}
    has = {path.relative_to(own_unlisted / "masks").with_suffix(""): np.isin(range(21), np.array(Image.open(path)))
           for path in (own_unlisted / "masks").rglob("*.PNG")}
    drawn = split_by_seed(VOC.labelled(own_unlisted)[0], 0.2, 0)
    assert lists == with_every_class(drawn, {str(name): classes for name, classes in has.items()})
    assert files(own_unlisted) == before
    record = json.loads((work_dir / "run.json").read_text())["starts"][0]["data"]
    assert record["val"]["ids"] == lists["val"] and record["val"]["sha256"] == digest(lists["val"])
    for name in ("aaa", "zzz"):
        shutil.copy(next((own_unlisted / "images").rglob("*.png")), own_unlisted / f"images/{name}.png")
        shutil.copy(next(path for path in (own_unlisted / "masks").rglob("*.PNG")), own_unlisted / f"masks/{name}.png")
    assert split_by_seed(VOC.labelled(own_unlisted)[0], 0.2, 0) != lists
    flags = ("--resume", work_dir / "ckpt/iter_2.pth", "--val_fraction", 0.5)
    whole = train(own_unlisted, tmp_path / "again", *flags).stdout
    assert "note: --val_fraction 0.5 has no effect: the run keeps the lists of its checkpoint\n" in whole
    assert "9 images of 'train', 2 of 'val'" in whole and "holds other images" not in whole
    assert state(tmp_path / "again/ckpt/latest.pth")["meta"]["lists"] == lists
    run(EVALUATE, work_dir / "ckpt/latest.pth", "--data_path", own_unlisted, "--device", "cpu", "--json",
        tmp_path / "scores.json", "--save_dir", tmp_path / "pictures")
    scores, result = (json.loads(path.read_text()) for path in (tmp_path / "scores.json", work_dir / "result.json"))
    assert scores["mIoU"] == result["mIoU"] and scores["images"] == 2
    assert sorted(str(path.relative_to(tmp_path / "pictures/compared").with_suffix(""))
                  for path in (tmp_path / "pictures/compared").rglob("*.png")) == lists["val"]
    assert "the checkpoint holds train, val" in error_line(
        EVALUATE, work_dir / "ckpt/latest.pth", "--data_path", own_unlisted, "--split", "test", "--device", "cpu")


def test_lists_that_a_folder_gets_later_do_not_leak(own_unlisted, tmp_path):
    """What the checkpoint was trained on is never scored, though the folder's val names it; a resumption says whose
    lists it has, and how many images are in neither."""
    train(own_unlisted, tmp_path / "run", "--max_iters", 1)
    lists = state(tmp_path / "run/ckpt/latest.pth")["meta"]["lists"]
    data = VOC(own_unlisted, "val", lists["val"])
    image, label = data.files()[:2]
    shutil.copy(image, own_unlisted / f"images/extra{image.suffix}")
    shutil.copy(label, own_unlisted / f"masks/extra{label.suffix}")
    folder = own_unlisted / "ImageSets/Segmentation"
    folder.mkdir(parents=True)
    (folder / "val.txt").write_text("\n".join(lists["train"]))
    output = run(ROOT / "evaluate.py", tmp_path / "run/ckpt/best.pth", "--data_path", own_unlisted, "--device",
                 "cpu").stdout
    assert f"{len(lists['val'])} images of 'val' of the checkpoint's lists, " in output
    output = train(own_unlisted, tmp_path / "run", "--max_iters", 2, "--resume", "auto").stdout
    assert "of 'val'; the checkpoint's lists\n" in output
    assert "note: 1 labelled images are in neither of the checkpoint's lists, and not used\n" in output
    image.unlink()
    line = error_line(ROOT / "train.py", *train_flags(own_unlisted, tmp_path / "run"), "--resume", "auto")
    assert f"{own_unlisted}: '{lists['val'][0]}': there is no such image in {own_unlisted}/images; restore it" in line
    assert "Split = val\nImages = " in (tmp_path / "run/FCN_bs1_1p_val.log").read_text()


def test_images_without_labels_and_labels_without_images_are_named(own_unlisted, tmp_path):
    first = VOC.labelled(own_unlisted)[0][0]
    VOC(own_unlisted, "", ids=()).label_path(first).rename(own_unlisted / "masks/orphan_mask.png")
    output = train(own_unlisted, tmp_path / "run", "--max_iters", 1).stdout
    assert (f"note: skipped: 2 images without a label of their name ({first}, not labelled); "
            "1 labels without an image (orphan_mask); Pillow does not know the format: ") in output


def test_a_folder_without_lists_is_told_to_make_them_for_a_checkpoint_that_has_none(own_unlisted, drawn_voc, tmp_path):
    train(drawn_voc, tmp_path / "run", "--max_iters", 1)
    content = state(tmp_path / "run/ckpt/best.pth")
    del content["meta"]["images"]  # as before they were in it; else the whole folder is scored
    torch.save(content, tmp_path / "old.pth")
    line = error_line(ROOT / "evaluate.py", tmp_path / "old.pth", "--data_path", own_unlisted)
    assert "val.txt: there is no such list; it takes one image id a line; the lists there: none" in line


def test_a_split_is_of_the_seed_and_the_fraction(unlisted):
    def split(fraction, seed):
        flags = ["--data_path", str(unlisted), "--seed", str(seed)]
        data = open_training(parse_args(flags + ([] if fraction is None else ["--val_fraction", str(fraction)])))
        ids = [*data.train.ids, *data.val.ids]
        assert len(set(ids)) == len(ids) == 11 and "not labelled" not in ids
        return data.val.ids

    assert split(None, 0) == split(0.2, 0) != split(0.2, 1)
    assert [len(split(fraction, 0)) for fraction in (0.01, 0.5, 0.99)] == [1, 6, 10]


def test_images_of_any_format_and_case_are_read(unlisted, drawn_voc):
    data = VOC(unlisted, "all", split_by_seed(VOC.labelled(unlisted)[0], 0.5, 0)["train"])
    assert data.check(21)
    for index, image_id in enumerate(data.ids):
        image, label = data[index]
        with Image.open(drawn_voc / f"SegmentationClass/{image_id.split('/')[1]}.png") as expected:
            assert np.array_equal(label, np.asarray(expected)) and image.shape[1:] == label.shape


def test_what_cannot_be_told_apart_or_is_missing_is_said(own_unlisted, tmp_path):
    def line(*flags):
        return error_line(ROOT / "train.py", *train_flags(own_unlisted, tmp_path / "run"), *flags)

    first = next((own_unlisted / "images/day 0").iterdir())
    shutil.copy(first, first.with_suffix(".bmp"))
    assert "has the same name but for the folder or the extension; keep one" in line()
    first.with_suffix(".bmp").unlink()
    label = next((own_unlisted / "masks/day 0").iterdir())
    other = own_unlisted / "SegmentationClass/day 0" / label.name
    other.parent.mkdir(parents=True)
    shutil.copy(label, other)
    assert f"{other}: {label} has the same name but for the folder or the extension; keep one" in line()
    shutil.rmtree(own_unlisted / "SegmentationClass")
    (own_unlisted / "class_names.txt").rename(tmp_path / "names.txt")
    assert "holds images and labels, but neither lists in ImageSets/Segmentation nor class_names.txt" in line()
    (own_unlisted / "masks").rename(tmp_path / "masks")
    assert "has no folder of labels (SegmentationClass or" in line("--classes", tmp_path / "names.txt")
    (own_unlisted / "masks").mkdir()
    assert "holds 0 images with labels of their names; at least 2 are needed" in line(
        "--classes", tmp_path / "names.txt")
    (own_unlisted / "masks").rmdir()
    (tmp_path / "masks").rename(own_unlisted / "masks")
    lists = own_unlisted / "ImageSets/Segmentation"
    lists.mkdir(parents=True)
    for name in ("train", "val"):
        (lists / f"{name}.txt").write_text("absent\n")
    flags = ("--classes", tmp_path / "names.txt")
    assert f"{lists}/train.txt, line 1: 'absent': there is no such image in {own_unlisted}/images" in line(*flags)
    shutil.copy(first, own_unlisted / f"images/absent{first.suffix}")
    assert f"{own_unlisted}/masks/absent.png: there is no such label; add or restore it" in line(*flags)
    assert "--val_fraction 0.5 has no effect" in line(*flags, "--val_fraction", 0.5)
    (own_unlisted / "images").rename(own_unlisted / "pictures")
    shutil.rmtree(own_unlisted / "ImageSets")
    assert "has no folder of images (JPEGImages or images)" in line(*flags)
    own_unlisted.rename(tmp_path / "elsewhere")
    assert "there is no such folder" in line(*flags)
    assert not (tmp_path / "run").exists()


def test_class_names_of_any_script_do_not_end_a_training_under_an_ascii_locale(own_unlisted, tmp_path):
    names = [f"{SCRIPTS[i % len(SCRIPTS)]} {i}" for i in range(21)]
    (own_unlisted / "class_names.txt").write_text("\n".join(names), encoding="utf-8")
    env = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = run(ROOT / "train.py", *train_flags(own_unlisted, tmp_path / "run"), "--max_iters", 1, env=env, real=True)
    assert "猫" in done.stdout and "猫" in (tmp_path / "run/train_0.log").read_text(encoding="utf-8")
    assert list(state(tmp_path / "run/ckpt/best.pth")["meta"]["classes"]) == names


def test_files_that_begin_with_a_dot_are_no_images(own_unlisted):
    """As macOS leaves `._a.jpg` next to each file that it copies. Nor are those in such a folder, say an editor's."""
    before = VOC.labelled(own_unlisted)
    for path in [*VOC(own_unlisted, "", ids=()).images.iterdir(), *(own_unlisted / "masks").glob("*")]:
        path.with_name(f"._{path.name}").write_bytes(b"resource fork")
    for kind in ("images", "masks"):
        shutil.copytree(own_unlisted / kind, own_unlisted / kind / ".checkpoints")
    assert VOC.labelled(own_unlisted) == before


def test_a_list_that_cannot_be_used_is_an_error(own_unlisted, tmp_path):
    for flag in ("--train_split", "--val_split"):
        line = error_line(ROOT / "train.py", *train_flags(own_unlisted, tmp_path / "run"), flag, "holdout")
        assert f"{flag} holdout has no effect" in line and "holds no lists" in line
