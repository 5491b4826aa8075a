"""The Ascend port's way: its padded evaluation against one by hand, --val_scale, its scripts, files and keys here."""
import json
import re
import subprocess
import sys

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, environment, error_line, free_port, metrics, run, state, train, train_flags
from PIL import Image

import transforms
from fcn8s import FCN8s
from voc import CLASSES, IGNORE

TRAIN, EVALUATE, PREDICT = (ROOT / name for name in ("train.py", "evaluate.py", "predict.py"))
MEAN, STD = np.float32((123.675, 116.28, 103.53)), np.float32((58.395, 57.12, 57.375))  # mmsegmentation's, RGB


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
    ids = (real_voc / "ImageSets/Segmentation/val.txt").read_text().split()[:3]
    expected = padded_evaluation(model, real_voc, ids)
    photograph = torch.from_numpy(np.array(Image.open(real_voc / f"JPEGImages/{ids[0]}.jpg"))).permute(2, 0, 1)
    plain, found, pixels = transforms.resize_image, {}, []
    for name, resize, *flags in (("OpenCV", resized_by_opencv), ("PyTorch", plain),
                                 ("unpadded", resized_by_opencv, "--pad_to", 0)):
        monkeypatch.setattr(transforms, "resize_image", resize)
        output = run(EVALUATE, tmp_path / "net.pth", "--data_path", real_voc, "--max_images", len(ids), "--device",
                     "cpu", "--json", tmp_path / "scores.json", *flags).stdout
        assert ("fitted into 512x512, padded to 512x512" in output) == (not flags)
        found[name] = json.loads((tmp_path / "scores.json").read_text())["mIoU"]
        pixels.append(transforms.fit_into(photograph, (512, 512)).int())
    assert found["OpenCV"] == pytest.approx(expected, abs=1e-6) and expected > 0
    assert found["PyTorch"] == pytest.approx(expected, abs=0.01)
    assert found["unpadded"] != pytest.approx(expected, abs=1e-4)
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
    # A finished run is scored anew.
    flags = ("--max_iters", 4, "--val_scale", 96, 64, "--pad_to", 96)
    train(drawn_voc, tmp_path / "run", "--resume", "auto", *flags)
    run(EVALUATE, tmp_path / "run/ckpt/latest.pth", "--data_path", drawn_voc, "--device", "cpu", "--json",
        tmp_path / "scores.json")
    scored = [line["mIoU"] for line in metrics(tmp_path / "run") if line["iter"] == 4 and "mIoU" in line]
    assert scored == [json.loads((tmp_path / "scores.json").read_text())["mIoU"]]
    assert json.loads((tmp_path / "run/result.json").read_text())["best_mIoU"] == scored[0]


# ---- the port's scripts, files and keys

PAGE, TWIN = ((ROOT / f"docs/{name}").read_text() for name in ("ascend.md", "ascend.zh-CN.md"))
SCRIPTS = [f"train_{kind}_{cards}" for kind in ("full", "performance") for cards in ("1p", "8p")] + [
    "train_val_8p", "train_performance_multinodes"]
SMALL = ("--backbone=tiny", "--pretrained=none", "--scale", 64, 32, "--crop_size=32", "--max_iters=6",
         "--log_interval=1")


def mapped(page):
    """{the port's script: (its flags, our command)} of a page's table."""
    rows = re.findall(r"^\| `(\w+)\.sh ([^`]*)` \| `(bash [^`]*)` \|$", page, re.M)
    return {script: (flags.split(), command.split()) for script, flags, command in rows}


def in_table(page, start):
    """The inline codes of the table row that begins with one."""
    return re.findall(r"`([^`]+)`", re.search(rf"^\| `{re.escape(start)}.*$", page, re.M)[0])


@pytest.fixture(scope="module")
def port(drawn_voc, tmp_path_factory):
    """The folder in which the right-hand commands have run, in the table's order but --val last."""
    folder = tmp_path_factory.mktemp("port")
    values = {"DIR": drawn_voc, "N": 0, "M": 2, "IP": "127.0.0.1", "P": free_port(), "B": 2}

    def start(command, *flags):
        words = [re.sub(r"=([A-Z]+)$", lambda found: f"={values[found[1]]}", word) for word in command]
        words[1] = ROOT / words[1]
        return subprocess.Popen([*map(str, (*words, "--device=cpu", *flags))], cwd=folder, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                env=environment({"PYTHON": sys.executable}))
    for script, (_, command) in sorted(mapped(PAGE).items(), key=lambda row: "val" in row[0]):
        flags = () if "val" in script else SMALL if "multinodes" in script else (*SMALL, "--batch_size=2")
        if "multinodes" in script:
            processes = []
            for values["R"] in (0, 1):
                processes.append(start(command, *flags, "--device_list=0"))
        else:
            processes = [start(command, *flags, *(("--device_list=0,1",) if "8p" in script else ()))]
        for process in processes:
            output = process.communicate()[0]
            assert process.returncode == 0, f"{script}: {output}"
    return folder / "output"


def test_each_script_of_the_port_has_a_command_with_all_its_flags(port):
    """Which ran: see `port`. The files are where the port's are."""
    rows = mapped(PAGE)
    assert sorted(rows) == sorted(SCRIPTS) and rows == mapped(TWIN)
    assert all(set(flags) <= set(command) for flags, command in rows.values())
    summaries = sorted(str(path.relative_to(port)) for path in port.rglob("*.log"))
    assert summaries == [
        "0,1/FCN/FCN_bs1_2p_val.log", "0,1/FCN/FCN_bs2_2p_acc.log", "0,1/FCN/train_0,1.log",
        "0,1/FCN_prof/FCN_bs2_2p_acc.log", "0,1/FCN_prof/train_0,1.log",
        "0/FCN/FCN_bs2_1p_acc.log", "0/FCN/train_0.log",
        "0/FCN_prof/FCN_bs2_1p_acc.log", "0/FCN_prof/FCN_bs2_2p_acc.log", "0/FCN_prof/train_0.log"]
    assert {path.parent.parent.name for path in port.rglob("*.pth")} == {"FCN"}


def test_the_summaries_have_the_keys_and_units_of_the_page(port):
    def summary(path):
        return dict(line.split(" = ") for line in (port / path).read_text().splitlines())
    trained, scored = summary("0,1/FCN/FCN_bs2_2p_acc.log"), summary("0,1/FCN/FCN_bs1_2p_val.log")
    both = {"Network", "RankSize", "BatchSize", "DeviceType", "CaseName"}
    for page in (PAGE, TWIN):
        for start, found, own in (("FCN_bs16_8p_acc.log", trained, {"Backbone"}),
                                  ("FCN_bs8_8p_val.log", scored, {"Backbone", "Split", "Images"})):
            assert {*in_table(page, start)[1:], *both, *own} == found.keys()
    lines = metrics(port / "0,1/FCN")
    fps = max(line["fps"] for line in lines if line.get("fps"))
    assert float(trained["ActualFPS"]) == fps and float(trained["TrainingTime"]) == pytest.approx(4000 / fps)
    assert float(trained["mIoU"]) == float(scored["mIoU"]) == lines[-1]["mIoU"] / 100
    assert float(scored["ValTime"]) == pytest.approx(2000 / float(scored["ActualFPS"]))


def test_the_pages_greps_find_what_the_ports_scripts_look_for(port):
    log, lines = port / "0,1/FCN/train_0,1.log", metrics(port / "0,1/FCN")
    for page in (PAGE, TWIN):
        for start, expected in (("fps:", [line["fps"] for line in lines if line.get("fps")]),
                                ("mIoU:", [line["mIoU"] for line in lines if "mIoU" in line])):
            grep = next(code for code in in_table(page, start) if code.startswith("grep "))
            found = subprocess.run(["bash", "-c", grep.replace("LOG", f"'{log}'")], capture_output=True, text=True)
            assert found.stdout.split() == [f"{value:.2f}" for value in expected] != []
