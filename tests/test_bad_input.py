"""What bad input gets: one line that names the file, the value and a hint; a non-zero status; nothing written."""
import shutil

import numpy as np
import pytest
import torch
from conftest import ROOT, error_line, run, train, train_flags
from PIL import Image

from fcn8s import FCN8s
from train import parse_args

TRAIN, EVALUATE, PREDICT, EXPORT = (ROOT / f"{name}.py" for name in ("train", "evaluate", "predict", "export"))


def save_label(pixels, path):
    Image.fromarray(pixels).save(path)


def no_lists(data, first):
    shutil.rmtree(data / "ImageSets")


def no_trainaug(data, first):
    (data / "ImageSets/Segmentation/trainaug.txt").unlink()


def no_val(data, first):
    (data / "ImageSets/Segmentation/val.txt").unlink()


def empty_list(data, first):
    (data / "ImageSets/Segmentation/val.txt").write_text("\n")


def id_without_image(data, first):
    (data / f"JPEGImages/{first}.jpg").unlink()


def id_without_label(data, first):
    (data / f"SegmentationClass/{first}.png").unlink()


def truncated_image(data, first):
    path = data / f"JPEGImages/{first}.jpg"
    path.write_bytes(path.read_bytes()[:-600])


def label_in_colours(data, first):
    path = data / f"SegmentationClass/{first}.png"
    Image.open(path).convert("RGB").save(path)


def label_value_of_no_class(data, first):
    path = data / f"SegmentationClass/{first}.png"
    pixels = np.array(Image.open(path))
    pixels[0, 0] = 33
    save_label(pixels, path)


def labels_all_background(data, first):
    for path in [*data.glob("SegmentationClass/*.png"), *data.glob("SegmentationClassAug/*.png")]:
        save_label(np.zeros_like(Image.open(path)), path)


def label_of_another_size(data, first):
    path = data / f"SegmentationClass/{first}.png"
    save_label(np.array(Image.open(path))[1:], path)


def list_not_in_utf8(data, first):
    path = data / "ImageSets/Segmentation/val.txt"
    path.write_text(path.read_text(), encoding="utf-16")


SPOILED = [(no_lists, "holds images and labels, but neither lists"), (no_trainaug, "python convert_voc_aug.py"),
           (no_val, "the lists there: aug"),
           (empty_list, "val.txt"), (id_without_image, "'{first}': there is no such image"),
           (id_without_label, "{first}.png"),
           (truncated_image, "{first}.jpg: the image does not decode"),
           (label_in_colours, "{first}.png: the label is in colours"),
           (label_value_of_no_class, "{first}.png: label value 33"), (labels_all_background, "all background"),
           (label_of_another_size, "{first}.png: the label is"), (list_not_in_utf8, "val.txt: is not UTF-8")]


@pytest.mark.parametrize("spoil, words", SPOILED, ids=[spoil.__name__ for spoil, _ in SPOILED])
def test_bad_data_is_found_before_the_first_iteration(own_drawn_voc, tmp_path, spoil, words):
    first = (own_drawn_voc / "ImageSets/Segmentation/train.txt").read_text().split()[2]
    spoil(own_drawn_voc, first)
    line = error_line(TRAIN, *train_flags(own_drawn_voc, tmp_path / "run"))
    assert words.format(first=first) in line and str(own_drawn_voc) in line and line.startswith("train.py: error: ")
    assert not (tmp_path / "run").exists()


def test_a_devkit_in_place_of_its_year_folder_is_pointed_out(drawn_voc, tmp_path):
    assert "it holds VOC2012" in error_line(TRAIN, *train_flags(drawn_voc.parent, tmp_path / "run"))
    assert "there is no such folder" in error_line(TRAIN, *train_flags(tmp_path / "nowhere", tmp_path / "run"))
    (tmp_path / "empty").mkdir()
    line = error_line(TRAIN, *train_flags(tmp_path / "empty", tmp_path / "run"))
    assert "has no folder of images (JPEGImages or images)" in line


@pytest.mark.parametrize("flags, words", [
    (("--crop_size", 0), "--crop_size: takes a whole number of at least 1 and at most 16384, not '0'"),
    (("--crop-size", "big"), "--crop_size: takes a whole number of at least 1 and at most 16384, not 'big'"),
    (("--batch_size", -3), "--batch_size"), (("--batch_size", 2.5), "--batch_size"),
    (("--lr", "nan"), "--lr"), (("--lr", 1e-6), "--min_lr"), (("--scale", 128, 512), "the long side comes first"),
    (("--loss_scale", 128), "no effect without --amp"), (("--opt_level", "O1"), "no effect without --amp"),
    (("--loss_scale", "huge", "--amp"), "--loss_scale"), (("--device", "tpu"), "--device"),
    (("--resume", ""), "--resume: takes a value, not ''"), (("--momentum", 1), "at least 0 and below 1"),
    (("--backbone", "resnet18"), "--backbone"), (("--max_iter", 3), "--max_iter"),
    (("--crop_size", 1_000_000), "--crop_size: takes a whole number of at least 1 and at most 16384, not"),
    (("--batch_size", 1_000_000_000), "--batch_size: takes a whole number of at least 1 and at most 16384, not"),
    (("--sync_bn", "--freeze_bn"), "--sync_bn has no effect with --freeze_bn"),
    (("--class_weights", "no.txt"), "--class_weights: no.txt: No such file or directory (--help lists the flags)")])
def test_flags_that_make_no_sense_are_usage_errors(drawn_voc, tmp_path, flags, words):
    assert words in error_line(TRAIN, *train_flags(drawn_voc, tmp_path / "run"), *flags, status=2)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("resume", ((), ("--resume", "a.pth"), ("--resume", "auto")))
def test_restarts_resume_from_the_folder(capsys, resume):
    flags = ["--data_path", "d", "--device_list", "0,1", "--max_restarts", "2", *resume]
    if "auto" in resume:
        assert parse_args(flags).max_restarts == 2
        return
    with pytest.raises(SystemExit) as ending:
        parse_args(flags)
    assert ending.value.code == 2 and "--max_restarts needs --resume auto" in capsys.readouterr().err


@pytest.mark.parametrize("flags, words", [
    (("--crop_size", 32, "--batch_size", 1), "batch normalisation"),
    (("--amp", "--loss_scale", 128), "needs no loss scale"), (("--device", "npu"), "torch_npu"),
    (("--device_id", 7), "no cpu device 7"), (("--resume", "absent.pth"), "absent.pth"),
    (("--pretrained", "absent.pth"), "absent.pth"), (("--sync_bn",), "--sync_bn is for several NPUs or GPUs")])
def test_flags_that_cannot_take_effect_are_errors(drawn_voc, tmp_path, flags, words):
    assert words in error_line(TRAIN, *train_flags(drawn_voc, tmp_path / "run"), *flags)
    assert not (tmp_path / "run").exists()


def test_lists_of_windows_editors_are_read(own_drawn_voc, tmp_path):
    path = own_drawn_voc / "ImageSets/Segmentation/val.txt"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n\r\n"))
    train(own_drawn_voc, tmp_path / "run", "--max_iters", 1)


def test_an_unwritable_work_folder(drawn_voc, tmp_path):
    (tmp_path / "file").write_text("in the way")
    assert str(tmp_path / "file") in error_line(TRAIN, *train_flags(drawn_voc, tmp_path / "file/run"))


def test_another_runs_folder_and_a_finished_run_are_not_resumed_into(drawn_voc, checkpoint, tmp_path):
    """Nor does `--resume auto` start afresh where the checkpoint it should find was taken away or cut off."""
    train(drawn_voc, tmp_path / "other", "--max_iters", 1)
    flags = (*train_flags(drawn_voc, tmp_path / "other"), "--resume")
    line = error_line(TRAIN, *flags, checkpoint)
    assert f"{checkpoint}: is not the newest checkpoint of {tmp_path / 'other'}, which holds a run" in line
    assert "--work_dir" in line
    (tmp_path / "other/ckpt/iter_1.pth").unlink()
    (tmp_path / "other/ckpt/latest.pth").write_text("cut off")
    assert "holds no checkpoint that can be read" in error_line(TRAIN, *flags, "auto")
    flags = (*train_flags(drawn_voc, tmp_path / "new"), "--max_iters", 1, "--resume", checkpoint)
    assert "nothing is left to train" in error_line(TRAIN, *flags)
    assert not (tmp_path / "new").exists()


def test_resuming_in_a_new_folder_gives_it_a_best_checkpoint(drawn_voc, checkpoint, tmp_path):
    train(drawn_voc, tmp_path / "new", "--max_iters", 2, "--resume", checkpoint)
    assert (tmp_path / "new/ckpt/best.pth").exists()


# ---- checkpoints

@pytest.fixture(scope="module")
def checkpoint(drawn_voc, tmp_path_factory):
    work_dir = tmp_path_factory.mktemp("checkpoint") / "run"
    train(drawn_voc, work_dir, "--max_iters", 1)
    return work_dir / "ckpt/latest.pth"


def changed(checkpoint, path, **meta):
    content = torch.load(checkpoint, weights_only=True)
    content["meta"].update(meta)
    torch.save(content, path)
    return path


def evaluate_error(checkpoint, data, *flags, status=1):
    return error_line(EVALUATE, checkpoint, "--data_path", data, "--device", "cpu", *flags, status=status)


def test_a_truncated_checkpoint(checkpoint, drawn_voc, tmp_path):
    (tmp_path / "cut.pth").write_bytes(checkpoint.read_bytes()[:100_000])
    assert "cut.pth: the file is damaged" in evaluate_error(tmp_path / "cut.pth", drawn_voc)
    assert "cut.pth: the file is damaged" in error_line(
        TRAIN, *train_flags(drawn_voc, tmp_path / "run"), "--resume", tmp_path / "cut.pth")
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_of_another_backbone_or_number_of_classes(checkpoint, drawn_voc, tmp_path):
    flags = train_flags(drawn_voc, tmp_path / "run")
    line = error_line(TRAIN, *flags, "--backbone", "tiny_d8", "--resume", checkpoint)
    assert "has backbone tiny and 21 classes, this run tiny_d8 and 21" in line
    assert "use --backbone tiny" in error_line(TRAIN, *flags, "--backbone", "tiny_d8", "--pretrained", checkpoint)
    other = changed(checkpoint, tmp_path / "19.pth", num_classes=19)
    assert "has backbone tiny and 19 classes, this run tiny and 21" in error_line(TRAIN, *flags, "--resume", other)
    torch.save({"state_dict": FCN8s(19, "tiny").state_dict(), "meta": {"backbone": "tiny", "num_classes": 19}}, other)
    line = evaluate_error(other, drawn_voc)
    assert "has 19 classes, but no names of them; pass its own by --classes FILE" in line
    lying = changed(checkpoint, tmp_path / "d8.pth", backbone="resnet50_d8")
    assert "do not fit" in evaluate_error(lying, drawn_voc)
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_past_the_end_and_one_without_training_state(checkpoint, drawn_voc, tmp_path):
    content = torch.load(checkpoint, weights_only=True)
    torch.save({"state_dict": content["state_dict"], "meta": content["meta"]}, tmp_path / "plain.pth")
    flags = train_flags(drawn_voc, tmp_path / "run")
    assert "--pretrained" in error_line(TRAIN, *flags, "--resume", tmp_path / "plain.pth")
    content["progress"]["iteration"] = 50
    torch.save(content, tmp_path / "late.pth")
    assert "past --max_iters 4" in error_line(TRAIN, *flags, "--resume", tmp_path / "late.pth")


def test_evaluate_names_what_is_wrong_with_its_flags(checkpoint, drawn_voc, tmp_path):
    line = evaluate_error(checkpoint, drawn_voc, "--json", tmp_path / "absent/scores.json")
    assert "absent/scores.json: cannot be written to (No such file or directory); name a file in a folder" in line
    assert "would overwrite this file" in evaluate_error(checkpoint, drawn_voc, "--json", checkpoint)
    assert "would overwrite this file" in error_line(EXPORT, checkpoint, checkpoint)
    assert "--max_images" in evaluate_error(checkpoint, drawn_voc, "--max_images", 0, status=2)
    assert "absent.txt" in evaluate_error(checkpoint, drawn_voc, "--split", "absent")
    assert "absent.pth" in evaluate_error(tmp_path / "absent.pth", drawn_voc)
    torch.save({"state_dict": {}}, tmp_path / "bare.pth")
    assert "bare.pth" in evaluate_error(tmp_path / "bare.pth", drawn_voc)


@pytest.mark.parametrize("script", (TRAIN, EVALUATE, PREDICT, EXPORT, ROOT / "convert_voc_aug.py"))
def test_help_prints_the_flags(script):
    help = run(script, "--help")
    assert help.stdout.startswith(f"usage: {script.name} ") and "--help" in help.stdout and not help.stderr
