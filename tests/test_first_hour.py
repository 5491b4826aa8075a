"""What meets someone with a folder of images: notes, a progress bar, formats, memory, the start by name."""
import hashlib
import io
import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, error_line, read, run, train, train_flags, untrained_checkpoint

import fcn8s
import hubconf
from fcn8s import published as published_networks
from work_dir import WorkDir

NAMES = ["background", "cat", "dog"]
TRAIN = ROOT / "train.py"


@pytest.fixture
def own_data(drawn_voc, tmp_path):
    """Six images with labels, without lists, as a labelling tool exports them."""
    folder = tmp_path / "my_data"
    for name in ("JPEGImages", "SegmentationClass"):
        (folder / name).mkdir(parents=True)
    for number in range(6):
        name = f"drawn_train_{number:04}"
        shutil.copy(drawn_voc / f"JPEGImages/{name}.jpg", folder / f"JPEGImages/{name}.JPG")
        shutil.copy(drawn_voc / f"SegmentationClass/{name}.png", folder / "SegmentationClass")
    (folder / "class_names.txt").write_text("".join(f"class {number}\n" for number in range(21)))
    return folder


def test_on_a_terminal_a_bar_runs_under_the_log_lines(monkeypatch, tmp_path):
    """A line clears the bar, which is drawn anew below it. The log file has the line alone."""
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, terminal)
    with WorkDir(tmp_path, "0") as work_dir:
        work_dir.progress_bar(0, 4)
        work_dir.log("a line")
    assert re.fullmatch(r"\rtraining: +0%.* 0/4 .*\r +\ra line\n\rtraining: +0%.* 0/4 .*\r +\r", terminal.getvalue())
    assert (tmp_path / "train_0.log").read_text() == "a line\n"


@pytest.mark.parametrize("flags, noted", (((), ""), (("--crop_size", 256), ""), (("--crop_size", 257), "tiny at "),
                                          (("--backbone", "tiny_d8"), "tiny_d8 at ")))
def test_what_is_slow_on_a_cpu_is_named_at_the_start(drawn_voc, tmp_path, flags, noted):
    """With flags that end in minutes; before the first iteration."""
    start = train(drawn_voc, tmp_path / "run", *flags, "--max_iters", 1, "--workers", 0).stdout.split("\niter 1/1")[0]
    notes = re.findall("^note: (.*)", start, re.MULTILINE)
    assert len(notes) == bool(noted)
    assert not noted or notes[0].startswith(noted) and "slow on a CPU" in notes[0] and "--backbone resnet50" in notes[0]


def out_of_memory(*args):
    raise torch.OutOfMemoryError("CUDA out of memory.")


@pytest.mark.parametrize("failure", (out_of_memory, lambda *args: torch.empty(2 ** 45)))
@pytest.mark.parametrize("command, words", (
    ("train", "--batch_size 3 --accumulate 2"), ("evaluate", "lower --batch_size or --scale")))
def test_memory_that_runs_out_is_one_line_with_a_hint(monkeypatch, drawn_voc, tmp_path, failure, command, words):
    flags = (TRAIN, *train_flags(drawn_voc, tmp_path / "run"), "--batch_size", 6)
    if command == "evaluate":
        checkpoint = untrained_checkpoint(tmp_path / "a.pth", [f"class {number}" for number in range(21)])
        flags = (ROOT / "evaluate.py", checkpoint, "--device", "cpu", "--data_path", drawn_voc)
    monkeypatch.setattr(fcn8s.FCN8s, "forward", failure)
    line = error_line(*flags)
    assert line.startswith(f"{command}.py: error: memory ran out (") and words in line


def test_errors_of_several_ranks_come_once(drawn_voc, tmp_path):
    line = error_line(TRAIN, *train_flags(drawn_voc, tmp_path / "run"), "--device_list", "0,1", "--crop_size", 32,
                      "--batch_size", 1)
    assert line.startswith("train.py: error: ") and "batch normalisation" in line


def test_what_pillow_does_not_read_is_named(own_data, tmp_path):
    images = own_data / "JPEGImages"
    (images / "drawn_train_0000.json").write_text("{}")  # labelme's, next to its image
    (images / "IMG_1.HEIC").write_bytes(b"")
    output = train(own_data, tmp_path / "run").stdout
    assert (f"note: skipped: Pillow does not know the format: {images / 'IMG_1.HEIC'}; "
            "for HEIC: pip install pillow-heif\n") in output
    for path in images.glob("*.JPG"):
        path.rename(path.with_suffix(".heic"))
    assert "at least 2 are needed" in (line := error_line(TRAIN, *train_flags(own_data, tmp_path / "other")))
    assert "drawn_train_0000.heic" in line and "pip install pillow-heif" in line


READ = """
import sys
from pathlib import Path
from voc import VOC
root = Path(sys.argv[1])
ids, skipped = VOC.labelled(root)
print(len(VOC(root, "all", ids).check(21)), skipped)
"""


def test_heic_is_read_where_its_package_is(own_data, tmp_path):
    """A stand-in for the package, which reads a JPEG of that name."""
    (tmp_path / "pillow_heif.py").write_text("from PIL import Image\ndef register_heif_opener():\n    Image.init()\n"
                                             "    Image.register_extension('JPEG', '.heic')\n")
    next((own_data / "JPEGImages").glob("*.JPG")).rename(own_data / "JPEGImages/drawn_train_0000.HEIC")
    assert run("-c", READ, own_data, env={"PYTHONPATH": str(tmp_path)}).stdout == "6 \n"


def test_a_published_network_is_a_start_by_its_name(monkeypatch, own_data, tmp_path):
    """The small backbone has one here, at a URL of ours; for other classes its heads start afresh. The hash in its name
    is checked."""
    file = untrained_checkpoint(tmp_path / "weights.pth", NAMES)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()[:8]
    for name, start in ((f"tiny-{digest}.pth", "for 3 classes, of which the backbone is taken; the heads start afresh"),
                        ("tiny-00000000.pth", None)):
        row = fcn8s.Backbone(fcn8s.BACKBONES["tiny"].network, voc=f"file://{shutil.copy(file, tmp_path / name)}")
        monkeypatch.setitem(fcn8s.BACKBONES, "tiny", row)
        done = run(TRAIN, *train_flags(own_data, tmp_path / name[:-4]), "--pretrained", "tiny_voc",
                   env={"TORCH_HOME": str(tmp_path / "hub")}, status=0 if start else 1)
        if start:
            assert f"from tiny_voc: a checkpoint of train.py {start}" in done.stdout
            record = json.loads(read(tmp_path / name[:-4] / "run.json"))
            assert start in record["starts"][0]["start"]
        else:
            assert "the download of the weights tiny_voc is damaged" in done.stderr


@pytest.mark.parametrize("name, code", (
    ("weights", "import torch; torch.hub.load(sys.argv[1], 'fcn8s', 'a.pth', source='local')"),
    ("device", "sys.path.append(sys.argv[1]); import inference")))
def test_a_module_of_another_program_in_the_way_is_named(tmp_path, name, code):
    (tmp_path / f"{name}.py").write_text("")
    command = f"import sys; sys.path.insert(0, ''); import {name}; {code}"
    done = subprocess.run([sys.executable, "-c", command, ROOT], cwd=tmp_path, capture_output=True, text=True)
    line = done.stderr.splitlines()[-1]
    assert done.returncode and line.startswith("ImportError") and str(tmp_path / f"{name}.py") in line


def test_torch_hub_loads_networks_with_their_weights(tmp_path):
    """By an entry for each published network, and for a checkpoint."""
    assert all(hasattr(hubconf, name) for name in published_networks())
    checkpoint = untrained_checkpoint(tmp_path / "a.pth", NAMES)
    model = torch.hub.load(str(ROOT), "fcn8s", str(checkpoint), source="local")
    weights = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert not model.training and model(torch.zeros(1, 3, 40, 50))["out"].shape == (1, 3, 40, 50)
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
