"""The Ascend port's evaluation: against one by hand, as a protocol of its own beside the training's scale."""
import json

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, error_line, metrics, run, state, train, train_flags
from PIL import Image

import transforms
from fcn8s import FCN8s
from voc import CLASSES, IGNORE

TRAIN, EVALUATE, PREDICT = (ROOT / name for name in ("train.py", "evaluate.py", "predict.py"))
MEAN, STD = np.float32((123.675, 116.28, 103.53)), np.float32((58.395, 57.12, 57.375))  # mmsegmentation's, RGB


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """Two thirds of a short training are its pictures."""
    monkeypatch.setattr("train.draw", lambda *arguments: None)


# ---- by hand

def resized_by_opencv(image, size):
    """As transforms.resize_image."""
    array = np.ascontiguousarray(image.permute(1, 2, 0).numpy())
    return torch.from_numpy(cv2.resize(array, size[::-1], interpolation=cv2.INTER_LINEAR)).permute(2, 0, 1)


def padded_evaluation(model, voc, ids):
    """The mIoU in per cent: the long side to 512, padded to 512x512, the logits cropped at stride 8, enlarged twice."""
    confusion, scores = np.zeros((21, 21), np.int64), []
    model.decode_head.conv_seg.register_forward_hook(lambda *arguments: scores.append(arguments[-1]))
    for name in ids:
        image = cv2.cvtColor(cv2.imread(str(voc / f"JPEGImages/{name}.jpg")), cv2.COLOR_BGR2RGB)
        label = np.array(Image.open(voc / f"SegmentationClass/{name}.png"))
        height, width = (int(side * 512 / max(label.shape) + 0.5) for side in label.shape)
        padded = np.zeros((512, 512, 3), np.float32)
        padded[:height, :width] = (cv2.resize(image, (width, height)).astype(np.float32) - MEAN) / STD
        with torch.no_grad():
            model(torch.from_numpy(padded).permute(2, 0, 1)[None])
        logits = scores.pop()
        assert logits.shape == (1, 21, 64, 64)
        logits = logits[..., :-(-height // 8), :-(-width // 8)]
        for size in ((height, width), label.shape):
            logits = F.interpolate(logits, size, mode="bilinear", align_corners=False)
        known = label != IGNORE
        np.add.at(confusion, (label[known], logits[0].argmax(0).numpy()[known]), 1)
    union = confusion.sum(0) + confusion.sum(1) - confusion.diagonal()
    return 100 * np.mean(confusion.diagonal()[union > 0] / union[union > 0])


def test_the_padded_evaluation_is_the_one_by_hand(real_voc, tmp_path, monkeypatch):
    """Equal where both have OpenCV's pixels. PyTorch's resize rounds twice: a fifth of its pixels are a grey level off.
    """
    torch.manual_seed(0)
    model = FCN8s(21, "tiny_d8").eval()
    torch.nn.init.normal_(model.decode_head.conv_seg.weight, std=0.1)
    torch.save({"state_dict": model.state_dict(), "meta": {
        "backbone": "tiny_d8", "num_classes": 21, "classes": CLASSES, "scale": (512, 512), "args": {"pad_to": 512}}},
        tmp_path / "net.pth")
    ids = (real_voc / "ImageSets/Segmentation/val.txt").read_text().split()[:4]
    expected = padded_evaluation(model, real_voc, ids)
    photograph = torch.from_numpy(np.array(Image.open(real_voc / f"JPEGImages/{ids[0]}.jpg"))).permute(2, 0, 1)
    plain, found, pixels = transforms.resize_image, {}, []
    for name, resize in (("OpenCV", resized_by_opencv), ("PyTorch", plain)):
        monkeypatch.setattr(transforms, "resize_image", resize)
        output = run(EVALUATE, tmp_path / "net.pth", "--data_path", real_voc, "--max_images", len(ids), "--device",
                     "cpu", "--json", tmp_path / "scores.json").stdout
        assert "fitted into 512x512, padded to 512x512" in output
        found[name] = json.loads((tmp_path / "scores.json").read_text())["mIoU"]
        pixels.append(transforms.fit_into(photograph, (512, 512)).int())
    assert found["OpenCV"] == pytest.approx(expected, abs=1e-6) and expected > 1
    assert found["PyTorch"] == pytest.approx(expected, abs=0.01)
    assert (pixels[0] - pixels[1]).abs().max() == 1


# ---- a protocol of its own

def losses(work_dir):
    return [line["loss"] for line in metrics(work_dir) if "loss" in line]


def test_val_scale_changes_the_evaluation_and_not_the_training(drawn_voc, tmp_path):
    """The checkpoint carries the protocol: evaluate.py and predict.py take it, and --pad_to 0 undoes the padding."""
    plain, port, flags = tmp_path / "plain", tmp_path / "port", ("--val_scale", 64, 48, "--pad_to", 72)
    started = train(drawn_voc, plain).stdout
    assert "\nevaluation: images fitted into 256x64\n" in started
    started = train(drawn_voc, port, *flags).stdout
    assert "\nevaluation: images fitted into 64x48, padded to 72x72\n" in started
    assert "augmentation: fitted into 256x64, " in started
    assert losses(plain) == losses(port)
    first, second = (state(folder / "ckpt/latest.pth") for folder in (plain, port))
    assert all(torch.equal(value, second["state_dict"][key]) for key, value in first["state_dict"].items())
    assert [second["meta"]["args"][name] for name in ("scale", "val_scale", "pad_to")] == [[256, 64], [64, 48], 72]
    assert first["meta"]["args"]["val_scale"] == [256, 64] and first["meta"]["args"]["pad_to"] is None

    checkpoint, data = port / "ckpt/latest.pth", ("--data_path", drawn_voc, "--device", "cpu")
    score = metrics(port)[-1]["mIoU"]
    output = run(EVALUATE, checkpoint, *data, "--json", tmp_path / "scores.json").stdout
    assert "fitted into 64x48, padded to 72x72, " in output
    assert json.loads((tmp_path / "scores.json").read_text())["mIoU"] == score
    for given, words in (((), "64x48, padded to 72x72, "), (("--pad_to", 0), "64x48, on "),
                         (("--pad_to", 80), "64x48, padded to 80x80, "), (("--scale", 80, 80), "80x80, on ")):
        assert f"fitted into {words}" in run(EVALUATE, checkpoint, *data, *given).stdout
        photograph = drawn_voc / "JPEGImages/drawn_val_0000.jpg"
        labelled = run(PREDICT, checkpoint, photograph, "--save_dir", tmp_path / "labelled", "--device", "cpu", *given)
        assert f"fitted into {words}" in labelled.stdout


def test_pad_to_0_is_no_padding_and_flags_that_do_not_fit_are_one_line(drawn_voc, tmp_path):
    flags = train_flags(drawn_voc, tmp_path / "run")
    assert "evaluation: images fitted into 256x64\n" in run(TRAIN, *flags, "--pad_to", 64, "--pad_to", 0).stdout
    other = train_flags(drawn_voc, tmp_path / "other")
    assert "--val_scale 32 64: the long side comes first" in error_line(TRAIN, *other, "--val_scale", 32, 64, status=2)
    line = error_line(TRAIN, *other, "--val_scale", 80, 80, "--pad_to", 64)
    assert "--pad_to 64: images of up to 80 pixels a side do not fit" in line and "--val_scale" in line


def test_a_resumed_run_says_a_new_protocol_and_compares_no_scores_of_two(drawn_voc, tmp_path):
    """Also one that was saved before there was --val_scale."""
    train(drawn_voc, tmp_path / "run", "--max_iters", 2)
    for path in (tmp_path / "run/ckpt").iterdir():
        checkpoint = state(path)
        checkpoint["meta"]["args"].pop("val_scale", None)  # its names are links to one file
        checkpoint["progress"]["best"] = 99.0
        torch.save(checkpoint, path)
    resume = ("--resume", "auto", "--max_iters", 3)
    output = train(drawn_voc, tmp_path / "run", *resume).stdout
    assert "val_scale" not in output and state(tmp_path / "run/ckpt/latest.pth")["progress"]["best"] == 99.0
    output = train(drawn_voc, tmp_path / "run", *resume, "--max_iters", 4, "--val_scale", 64, 64, "--pad_to", 64).stdout
    assert "--val_scale (256, 64) -> (64, 64)" in output and "--pad_to None -> 64" in output
    best = state(tmp_path / "run/ckpt/best.pth")["progress"]
    assert best["best_iteration"] == 4 and best["best"] == metrics(tmp_path / "run")[-1]["mIoU"]
