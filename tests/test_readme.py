"""The commands of README.md: those that need only this machine run, the others pass the real argument parser."""
import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, run, untrained_checkpoint

from voc import CLASSES

THEMSELVES = ("bash run_1p.sh", "bash run_1p.sh --device=npu", "python tests/benchmark.py",
              "bash tests/run.sh")  # what takes minutes, and these tests
ABSENT = {"data/VOCdevkit": "VOC 2012", "pip install": "network", "_voc --": "network", "run_8p.sh": "eight cards",
          "train.py --data_path": "network, for the ImageNet weights"}
# Of tests/run.sh, TensorBoard and tests/benchmark.py.
OTHERS_FLAGS = {"--peers", "--logdir", "--loader", "--step", "--eval", "--commands"}


def commands(name):
    """The lines of the indented blocks of a README."""
    return [line.strip() for line in (ROOT / name).read_text().splitlines() if line.startswith("    ")]


def needs(command):
    """What a command needs that is absent here, or None."""
    return next((what for words, what in ABSENT.items() if words in command), None)


ASCENDS = ("npu-smi", "source ", "python3 -c 'import")  # steps that only a machine with an NPU can check
COMMANDS = [command for command in commands("README.md")
            if command not in THEMSELVES and not command.startswith(ASCENDS)]


@pytest.fixture(scope="module")
def clone(drawn_voc, tmp_path_factory):
    """A folder like a clone's, with what the README takes for granted: photographs, a labelme export, networks."""
    folder = tmp_path_factory.mktemp("clone")
    for path in (*ROOT.glob("*.py"), *ROOT.glob("*.txt")):
        (folder / path.name).symlink_to(path)
    untrained_checkpoint(folder / "output/0/FCN/ckpt/best.pth", CLASSES)
    untrained_checkpoint(folder / "output/drawn_voc/FCN/ckpt/best.pth", CLASSES)
    untrained_checkpoint(folder / "output/my_data/ckpt/best.pth", ("_background_", *map(str, range(1, 21))))
    (folder / "output/drawn_voc/VOCdevkit").symlink_to(drawn_voc.parent)
    shutil.copytree(drawn_voc / "JPEGImages", folder / "my_data/JPEGImages",
                    ignore=lambda _, names: [name for name in names if "_sbd_" in name])
    shutil.copytree(drawn_voc / "SegmentationClass", folder / "my_data/SegmentationClassPNG")
    shutil.copytree(folder / "my_data/JPEGImages", folder / "my_photos")
    (folder / "python").write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    (folder / "python").chmod(0o755)
    return folder


def test_local_commands_run_and_write_what_the_readme_says(clone):
    local = [command for command in COMMANDS if not needs(command)]
    assert len(local) >= 9
    for command in local:
        done = subprocess.run(["bash", "-c", command], cwd=clone, capture_output=True, text=True,
                              env={**os.environ, "PATH": f"{clone}:{os.environ['PATH']}"})
        assert done.returncode == 0 and done.stderr == "", f"{command}\n{done.stdout}\n{done.stderr}"
    lists = [(clone / f"my_data/ImageSets/Segmentation/{name}.txt").read_text().split() for name in ("train", "val")]
    photographs = sorted(path.stem for path in (clone / "my_photos").iterdir())
    assert sorted(sum(lists, [])) == photographs and len(lists[0]) > len(lists[1]) > 0
    assert sorted(path.stem for path in clone.glob("my_labels/overlay/*.jpg")) == photographs
    assert len(list(clone.glob("output/drawn_voc/val/compared/*.png"))) == 5
    assert (clone / "model.onnx").exists() and (clone / "model_512.onnx").exists()


@pytest.mark.parametrize("command", [command for command in COMMANDS if needs(command)])
def test_commands_that_need_what_is_absent_pass_their_parser(command, monkeypatch):
    words = shlex.split(command)
    if words[:2] == ["pip", "install"]:
        assert "-r" not in words or (ROOT / words[-1]).is_file()
        return
    assert (ROOT / words[1]).is_file()
    recipe = ["--device_list", "0,1,2,3,4,5,6,7", *([] if "--val" in words else ["--amp"])]
    script = {"run_1p.sh": ["train"], "run_8p.sh": ["train", *recipe]}.get(words[1], [words[1].removesuffix(".py")])
    for name in ("ASCEND_RT_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.setenv(name, "")  # as --device_list would set them
    monkeypatch.setattr("sys.argv", [*script, *words[2:]])
    importlib.import_module(script[0]).parse_args()


def test_both_languages_have_the_same_commands_flags_and_pictures():
    assert commands("README.zh-CN.md") == commands("README.md")
    english, chinese = ((ROOT / name).read_text() for name in ("README.md", "README.zh-CN.md"))
    for pattern in (r"--\w+", r"\]\((docs/[^)]*)\)"):
        assert sorted(re.findall(pattern, english)) == sorted(re.findall(pattern, chinese)), pattern
    for pattern in (r"^#+ ", r"^\|", r"^    "):  # headings, rows of tables, commands
        assert len(re.findall(pattern, english, re.M)) == len(re.findall(pattern, chinese, re.M)), pattern
    for picture in re.findall(r"\]\((docs/[^)]*)\)", english):
        assert (ROOT / picture).stat().st_size <= 200_000


def test_every_flag_that_the_readme_names_is_there():
    helps = "".join(run(ROOT / script, "--help").stdout for script in ("train.py", "evaluate.py", "convert_voc_aug.py"))
    named = {flag.replace("-", "_").replace("__", "--", 1) for flag in
             re.findall(r"--[a-z][a-z_-]+", (ROOT / "README.md").read_text())}
    assert named - OTHERS_FLAGS - {"--data_path"} <= set(re.findall(r"--[a-z_]+", helps)), named
