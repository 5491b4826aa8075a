"""That the networks learn real images from random weights, and the one-command job its drawn sample."""
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, environment, give_memory_back, metrics, train


@pytest.fixture
def learn(real_voc, tmp_path):
    """Trains on the first four images of VOC's val in the subset, or the first, as a performance run: it writes no
    checkpoint, which takes longer than the steps. -> its folder"""
    lists = real_voc / "ImageSets/Segmentation"
    for name, count in (("one", 1), ("four", 4)):
        (lists / f"{name}.txt").write_text("\n".join((lists / "val.txt").read_text().split()[:count]) + "\n")

    def start(*flags):
        train(real_voc, tmp_path / "run", "--train_split", "four", "--val_split", "four", "--performance", *flags)
        return tmp_path / "run"
    yield start
    give_memory_back()


def test_resnet50_learns_four_real_images(learn):
    """All background is an mIoU of 16."""
    run = learn("--backbone", "resnet50", "--batch_size", 4, "--max_iters", 20)
    assert json.loads((run / "result.json").read_text())["mIoU"] > 30


@pytest.mark.parametrize("backbone, size, steps, flags", (
    ("resnet50_d8", 32, 4, ()), ("resnet101_d8", 32, 4, ()), ("resnet50", 64, 4, ()),
    ("vgg16", 224, 2, ("--train_split", "one", "--batch_size", 1, "--scale", 448, 224, "--momentum", 0))))
def test_the_loss_of_each_backbone_falls_on_real_images(learn, backbone, size, steps, flags):
    """vgg16 on maps of 7 x 7: on smaller ones, oneDNN takes 4 to 17 s for the gradient of its fc6."""
    run = learn("--backbone", backbone, "--crop_size", size, "--max_iters", steps, "--val_scale", 256, 64, *flags)
    losses = [line["loss"] for line in metrics(run) if "loss" in line]
    assert len(losses) == steps and losses[-1] < 0.9 * losses[0]


def test_run_1p_without_data_converts_trains_and_evaluates_a_drawn_sample(tmp_path):
    """A sixth of its iterations is enough to tell."""
    here = Path(sys.executable).parent
    command = ["bash", ROOT / "run_1p.sh", "--max_iters", "30"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True,
                          env={**environment(), "PYTHON": str(here / "python"), "CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 0, done.stdout + done.stderr
    run = tmp_path / "output/drawn_voc/FCN"
    assert float(re.findall(r"mIoU ([\d.]+)", done.stdout)[-1]) > 60
    assert json.loads((run / "result.json").read_text())["best_mIoU"] > 60
    assert (run / "train_0.log").exists() and "CaseName = FCN_bs4_1p_acc" in (run / "FCN_bs4_1p_acc.log").read_text()


@pytest.mark.parametrize("script", ("run_1p.sh", "run_8p.sh", "tests/run.sh"))
def test_where_an_npu_driver_is_nothing_is_installed(tmp_path, script):
    """The driver's npu-smi on the PATH, and a Python that lacks everything."""
    (tmp_path / "tests").mkdir()
    for name in (script, "env_npu.sh"):
        shutil.copy(ROOT / name, tmp_path / name)
    for name, body in (("npu-smi", ""), ("bare-python", "echo numpy; exit 1")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    done = subprocess.run(["bash", tmp_path / script], cwd=tmp_path, capture_output=True, text=True,
                          env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": "bare-python"})
    assert done.returncode == 1 and not (tmp_path / ".venv").exists()
    assert "nothing is installed; bare-python lacks numpy" in done.stderr and done.stderr.count("\n") == 1


def test_run_1p_passes_flags_and_status_on(drawn_voc, tmp_path):
    command = ["bash", str(ROOT / "run_1p.sh"), f"--data_path={drawn_voc}", "--device_id=0", "--device=cpu"]
    env = environment({"PYTHON": sys.executable})
    done = subprocess.run([*command, "--backbone=tiny", "--pretrained=none", "--crop-size=64", "--scale", "128",
                           "64", "--batch_size=2", "--max_iters=1", "--performance"], cwd=tmp_path,
                          capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert "None" not in (tmp_path / "output/0/FCN_prof/FCN_bs2_1p_acc.log").read_text()
    assert subprocess.run([*command, "--batch_size=0"], cwd=tmp_path, capture_output=True, env=env).returncode == 2
