"""What meets someone with a folder of photographs: notes on the length of a run, formats, memory, the start by name."""
import hashlib
import io
import json
import re
import shutil
import sys

import pytest
import torch
from conftest import ROOT, error_line, metrics, read, run, train, train_flags, untrained_checkpoint

import advice
import hubconf
import speed
from backbones import published as published_networks
from train import from_args, parse_args
from trainer import Intervals, Recipe
from work_folder import WorkFolder

NAMES = ["background", "cat", "dog"]
TRAIN = ROOT / "train.py"


@pytest.fixture
def own_data(drawn_voc, tmp_path):
    """Six photographs with labels of three classes, without lists, as a labelling tool exports them."""
    folder = tmp_path / "my_data"
    for name in ("JPEGImages", "SegmentationClass"):
        (folder / name).mkdir(parents=True)
    for number in range(6):
        name = f"drawn_train_{number:04}"
        shutil.copy(drawn_voc / f"JPEGImages/{name}.jpg", folder / f"JPEGImages/{name}.JPG")
        shutil.copy(drawn_voc / f"SegmentationClass/{name}.png", folder / "SegmentationClass")
    (folder / "class_names.txt").write_text("".join(f"class {number}\n" for number in range(21)))
    return folder


def test_the_first_line_comes_after_the_first_iteration_with_the_time_left(drawn_voc, tmp_path):
    output = train(drawn_voc, tmp_path / "run", "--log_interval", 2).stdout
    assert output.index("iter 1/4 took ") < output.index("iter 2/4  lr ")
    assert [line["iter"] for line in metrics(tmp_path / "run") if "loss" in line] == [2, 4]


def test_on_a_terminal_a_bar_runs_under_the_log_lines(monkeypatch, tmp_path):
    """A line clears the bar, which is drawn anew below it. The log file has the line alone."""
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, terminal)
    folder = WorkFolder(tmp_path, "0", writes=True)
    pace = speed.Pace(folder, torch.device("cpu"), 0, 4)
    folder.log("a line")
    pace.bar.close()
    assert re.fullmatch(r"\rtraining: +0%.* 0/4 .*\r +\ra line\n\rtraining: +0%.* 0/4 .*\r +\r", terminal.getvalue())
    assert (tmp_path / "train_0.log").read_text() == "a line\n"


@pytest.mark.parametrize("seconds, said", ((100, True), (1, False)))
def test_a_run_of_more_than_a_day_says_what_shortens_it(monkeypatch, seconds, said):
    lines, clock = [], iter(range(0, 10 ** 6, seconds))

    class Folder:
        writes, log = True, lines.append

    monkeypatch.setattr(speed.time, "perf_counter", lambda: next(clock))
    pace = speed.Pace(Folder, torch.device("cpu"), 1000, 3000)
    for _ in range(10):
        pace.count()
    assert lines[0].startswith("iter 1001/3000 took ") and len(lines) == 1 + said
    assert not said or ("1 day, " in lines[1] and "--backbone resnet50" in lines[1])


@pytest.mark.parametrize("device, changes, intervals, images, words", (
    ("cpu", {}, (50, 1000, 1000, 10_000), 10_000, ["resnet50_d8 at --crop_size 512 is slow on a CPU"]),
    ("cpu", {"backbone": "resnet50", "crop_size": 256}, (50, 1000, 1000, 10_000), 10_000, []),
    ("cuda", {}, (50, 1000, 1000, 10_000), 16, ["10,000 epochs of 16 images"]),
    ("cuda", {}, (50, 1000, 1000, 800), 10_000, ["no evaluation (--eval_interval 1000), no checkpoint"]),
    ("cuda", {}, (50, 100, 100, 800), 10_000, [])))
def test_what_does_not_fit_the_run_is_named_at_its_start(device, changes, intervals, images, words):
    recipe = from_args(Recipe, parse_args(["--data_path", "d"] + [
        text for flag, value in changes.items() for text in (f"--{flag}", str(value))]))
    notes = advice.at_start(recipe, Intervals(*intervals), torch.device(device), images, performance=False)
    assert len(notes) == len(words) and all(word in note for word, note in zip(words, notes, strict=True))


def test_notes_come_with_the_first_lines(drawn_voc, tmp_path):
    output = train(drawn_voc, tmp_path / "run", "--eval_interval", 2).stdout
    assert "note: no checkpoint (--checkpoint_interval 1000) before the end at iteration 4" in output


CHANGED = """
import runpy, sys, types
{code}
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def changed_by(code, folder):
    """A script that runs code, then the command that is its arguments."""
    (folder / "script.py").write_text(CHANGED.format(code=code))
    return folder / "script.py"


@pytest.mark.parametrize("failure", ("raise torch.OutOfMemoryError('CUDA out of memory.')",
                                     "torch.empty(2 ** 45)"))
@pytest.mark.parametrize("command, words", (
    ("train", "--batch_size 3 --accumulate 2"), ("evaluate", "lower --batch_size or --scale")))
def test_memory_that_runs_out_is_one_line_with_the_remedy(drawn_voc, tmp_path, failure, command, words):
    script = changed_by(f"import torch, fcn8s\ndef forward(self, images, size=None):\n    {failure}\n"
                        "fcn8s.FCN8s.forward = forward", tmp_path)
    flags = (TRAIN, *train_flags(drawn_voc, tmp_path / "run"), "--batch_size", 6)
    if command == "evaluate":
        checkpoint = untrained_checkpoint(tmp_path / "a.pth", [f"class {number}" for number in range(21)])
        flags = (ROOT / "evaluate.py", checkpoint, "--device", "cpu", "--data_path", drawn_voc)
    line = error_line(script, *flags)
    assert line.startswith(f"{command}.py: error: memory ran out (") and words in line


def test_errors_of_several_ranks_come_once(drawn_voc, tmp_path):
    """Before they meet, and after."""
    for flags in (("--amp", "--loss_scale", 2), ("--crop_size", 32, "--batch_size", 1)):
        line = error_line(TRAIN, *train_flags(drawn_voc, tmp_path / "run"), "--device_list", "0,1", *flags)
        assert line.startswith("train.py: error: ") and "resume" not in line


def test_what_pillow_does_not_read_is_named(own_data, tmp_path):
    photographs = own_data / "JPEGImages"
    (photographs / "drawn_train_0000.json").write_text("{}")  # labelme's, beside its photograph
    (photographs / "IMG_1.HEIC").write_bytes(b"")
    output = train(own_data, tmp_path / "run").stdout
    assert (f"note: skipped: Pillow does not know the format: {photographs / 'IMG_1.HEIC'}; "
            "for HEIC: pip install pillow-heif\n") in output
    for path in photographs.glob("*.JPG"):
        path.rename(path.with_suffix(".heic"))
    assert "at least 2 are needed" in (line := error_line(TRAIN, *train_flags(own_data, tmp_path / "other")))
    assert "drawn_train_0000.heic" in line and "pip install pillow-heif" in line


def test_heic_is_read_where_its_package_is(own_data, tmp_path):
    script = changed_by("from PIL import Image\ndef register():\n    Image.init()\n"
                        "    Image.register_extension('JPEG', '.heic')\n"
                        "sys.modules['pillow_heif'] = types.SimpleNamespace(register_heif_opener=register)", tmp_path)
    next((own_data / "JPEGImages").glob("*.JPG")).rename(own_data / "JPEGImages/drawn_train_0000.HEIC")
    output = run(script, TRAIN, *train_flags(own_data, tmp_path / "run")).stdout
    assert "5 images of 'train', 1 of 'val'" in output and "skipped" not in output


def test_a_published_network_is_a_start_by_its_name(own_data, tmp_path):
    """The small backbone has one here, at a URL of ours; for other classes its heads start afresh. The hash in its name
    is checked."""
    file = untrained_checkpoint(tmp_path / "weights.pth", NAMES)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()[:8]
    for name, start in ((f"tiny-{digest}.pth", "for 3 classes, of which the backbone is taken; the heads start afresh"),
                        ("tiny-00000000.pth", None)):
        script = changed_by("from backbones import BACKBONES, Backbone\nBACKBONES['tiny'] = Backbone("
                            f"'tiny_network.Tiny', voc='file://{shutil.copy(file, tmp_path / name)}')", tmp_path)
        done = run(script, TRAIN, *train_flags(own_data, tmp_path / name[:-4]), "--pretrained", "tiny_voc",
                   env={"TORCH_HOME": str(tmp_path / "hub")}, status=0 if start else 1)
        if start:
            assert f"from tiny_voc: a checkpoint of train.py {start}" in done.stdout
            record = json.loads(read(tmp_path / name[:-4] / "run.json"))
            assert start in record["starts"][0]["start"]
        else:
            assert "the download of the weights tiny_voc is damaged" in done.stderr


def test_torch_hub_loads_networks_with_their_weights(tmp_path):
    """By an entry for each published network, and for a checkpoint."""
    assert all(hasattr(hubconf, name) for name in published_networks())
    checkpoint = untrained_checkpoint(tmp_path / "a.pth", NAMES)
    model = torch.hub.load(str(ROOT), "fcn8s", str(checkpoint), source="local")
    weights = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert not model.training and model(torch.zeros(1, 3, 40, 50))["out"].shape == (1, 3, 40, 50)
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
