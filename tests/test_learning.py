"""That the networks learn real images from random weights, and the one-command job its drawn sample."""
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, train


@pytest.fixture(scope="module")
def four_images(real_voc):
    """The list of the first four images of VOC's val in the subset."""
    lists = real_voc / "ImageSets/Segmentation"
    (lists / "four.txt").write_text("\n".join((lists / "val.txt").read_text().split()[:4]) + "\n")
    return real_voc


def learn(data, work_dir, backbone, batch_size, iterations):
    train(data, work_dir, "--backbone", backbone, "--train_split", "four", "--val_split", "four", "--scale", 512, 128,
          "--crop_size", 129, "--batch_size", batch_size, "--max_iters", iterations)
    lines = (work_dir / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines if "loss" in line]
    return json.loads((work_dir / "result.json").read_text()), losses


def test_resnet50_learns_four_real_images(four_images, tmp_path):
    result, _ = learn(four_images, tmp_path / "run", "resnet50", 4, 120)
    assert result["mIoU"] > 60


@pytest.mark.parametrize("backbone", ("resnet50_d8", "resnet101_d8", "vgg16"))
def test_the_loss_falls_in_30_iterations(four_images, tmp_path, backbone):
    _, losses = learn(four_images, tmp_path / "run", backbone, 1, 30)
    assert len(losses) == 30 and sum(losses[-5:]) / 5 < 0.7 * losses[0]


def test_run_1p_without_data_converts_trains_and_evaluates_a_drawn_sample(tmp_path):
    here = Path(sys.executable).parent
    done = subprocess.run(["bash", ROOT / "run_1p.sh"], cwd=tmp_path, capture_output=True, text=True,
                          env={**os.environ, "PYTHON": str(here / "python"), "CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 0, done.stdout + done.stderr
    run = tmp_path / "output/drawn_voc/FCN"
    assert float(re.findall(r"mIoU ([\d.]+)", done.stdout)[-1]) > 60
    assert json.loads((run / "result.json").read_text())["best_mIoU"] > 60
    assert (run / "train_0.log").exists() and "CaseName = FCN_bs4_1p_acc" in (run / "FCN_bs4_1p_acc.log").read_text()


@pytest.mark.parametrize("script", ("run_1p.sh", "run_8p.sh", "tests/run.sh"))
def test_where_an_npu_driver_is_nothing_is_installed(tmp_path, script):
    """The driver's npu-smi on the PATH, and a Python that lacks everything."""
    (tmp_path / "tests").mkdir()
    for name in (script, "find_python.sh"):
        shutil.copy(ROOT / name, tmp_path / name)
    for name, status in (("npu-smi", 0), ("bare-python", 1)):
        (tmp_path / name).write_text(f"#!/bin/sh\nexit {status}\n")
        (tmp_path / name).chmod(0o755)
    done = subprocess.run(["bash", tmp_path / script], cwd=tmp_path, capture_output=True, text=True,
                          env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": "bare-python"})
    assert done.returncode == 1 and not (tmp_path / ".venv").exists()
    assert "nothing is installed; bare-python lacks numpy" in done.stderr and done.stderr.count("\n") == 1


def test_run_1p_passes_flags_and_status_on(drawn_voc, tmp_path):
    command = ["bash", str(ROOT / "run_1p.sh"), f"--data_path={drawn_voc}", "--device_id=0", "--device=cpu"]
    env = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run([*command, "--backbone=resnet50", "--pretrained=none", "--crop-size=64", "--scale", "128",
                           "64", "--batch_size=2", "--max_iters=1", "--performance"], cwd=tmp_path,
                          capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert "None" not in (tmp_path / "output/0/FCN_prof/FCN_bs2_1p_perf.log").read_text()
    assert subprocess.run([*command, "--batch_size=0"], cwd=tmp_path, capture_output=True, env=env).returncode == 2
