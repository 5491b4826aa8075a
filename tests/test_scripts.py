"""run_1p.sh and run_8p.sh: the commands that they start, shown by a stand-in for Python that prints its arguments."""
import os
import subprocess
import sys

import pytest
from conftest import ROOT


@pytest.fixture
def command(tmp_path):
    """Runs a script where the stand-in is the Python and `cuda` tells what PyTorch sees. -> the arguments it got"""
    def start(script, *arguments, npu=False, cuda=False, **variables):
        folder = tmp_path / f"bin{npu}{cuda}"
        folder.mkdir(exist_ok=True)
        names = {"python": f'case "$*" in *cuda.is_avail*) exit {int(not cuda)} ;; -c*) ;; *) echo "$@" ;; esac'}
        for name, body in {**names, **({"npu-smi": ":"} if npu else {})}.items():
            (folder / name).write_text(f"#!/bin/sh\n{body}\n")
            (folder / name).chmod(0o755)
        done = subprocess.run(["bash", ROOT / script, *arguments], cwd=tmp_path, capture_output=True, text=True, env={
            **os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "PYTHON": "python", **variables})
        assert done.returncode == 0, done.stderr
        return done.stdout.replace(f"{ROOT}/", "").split()
    return start


PORT = ["--val_scale", "512", "512", "--pad_to", "512"]


@pytest.mark.parametrize("there, flags, amp", (
    ({}, (), False), ({"cuda": True}, (), True), ({"npu": True}, (), True), ({"cuda": True}, ("--device=cpu",), False),
    ({"cuda": True}, ("--device", "cpu"), False), ({}, ("--device", "gpu"), True),
    ({}, ("--opt-level=O0",), True)))
def test_run_1p_mixes_precision_where_the_device_is_no_cpu(command, there, flags, amp):
    """train.py's --amp is O1, with loss scale 128 on NPU and a dynamic one on CUDA; the user's flags come last."""
    data = ("--data-path", "data dir", *flags)
    assert command("run_1p.sh", *data, **there) == [
        "train.py", *(["--amp"] if amp else []), *(PORT if there.get("npu") else []), *" ".join(data).split()]


@pytest.mark.parametrize("there, flags, device, amp", (
    ({}, (), "cuda", True), ({"npu": True}, (), "npu", True), ({}, ("--device=cpu",), "cuda", False),
    ({"npu": True}, ("--device", "cpu"), "npu", False), ({"npu": True}, ("--opt_level", "O0"), "npu", True),
    ({}, ("--device=cpu", "--opt_level", "O0"), "cuda", True)))
def test_run_8p_mixes_precision_in_the_same_way(command, there, flags, device, amp):
    """The defaults come before the user's flags, of which the last one counts."""
    data, on_npu = ("--data_path=data", *flags), device == "npu" and "cpu" not in flags
    assert command("run_8p.sh", *data, **there) == [
        "train.py", *(["--amp"] if amp else []), *(PORT if on_npu else []), "--device", device, "--device_list",
        "0,1,2,3,4,5,6,7", *data]


@pytest.mark.parametrize("script", ("run_1p.sh", "run_8p.sh"))
@pytest.mark.parametrize("there, flags, port", (
    ({"npu": True}, (), True), ({}, (), False), ({"cuda": True}, (), False), ({}, ("--device=npu",), True),
    ({"npu": True}, ("--device", "cpu"), False), ({"npu": True}, ("--val-scale", "640", "640"), False),
    ({"npu": True}, ("--scale", "1024", "256"), False), ({"npu": True}, ("--pad_to", "0"), False),
    ({"npu": True}, ("--crop_size=256", "--batch_size", "8"), True)))
def test_on_an_npu_the_evaluation_is_the_ports_unless_the_user_says_another(command, script, there, flags, port):
    """Any of the three flags replaces both defaults: half of them would be an evaluation that nobody asked for."""
    words = command(script, "--data_path=data", *flags, **there)
    given = " ".join(flags).split()
    own = [word for word in words if word not in given]
    assert words[-len(given):] == given or not given
    assert ("--val_scale 512 512 --pad_to 512" in " ".join(own)) == port
    assert port or not set(PORT) & set(own)


@pytest.mark.parametrize("page", ("README.md", "README.zh-CN.md"))
def test_the_commands_of_the_results_evaluate_as_their_rows_say(command, page):
    rows = [line for line in (ROOT / page).read_text().splitlines() if line.startswith("| ") and "`bash run_" in line]
    assert len(rows) == 3
    for row in rows:
        script, *flags = row.split("`bash ")[1].split("`")[0].split()
        words = command(script, *flags, npu=True)
        assert (" ".join(PORT) in " ".join(words)) == ("512x512" in row) and words[0] == "train.py"


@pytest.mark.parametrize("flags, folder", (
    ((), "output/0,1,2,3,4,5,6,7/FCN"), (("--work_dir=runs/a",), "runs/a"), (("--work-dir", "runs/a"), "runs/a"),
    (("--device_list=0,1",), "output/0,1/FCN")))
def test_run_8p_val_scores_the_latest_checkpoint(command, flags, folder):
    passed_on = [flag for flag in flags if "list" in flag]
    assert command("run_8p.sh", *flags, "--val", "--data_path", "data", "--split=val") == [
        "evaluate.py", f"{folder}/ckpt/latest.pth", "--device", "cuda", "--device_list", "0,1,2,3,4,5,6,7", *passed_on,
        "--data_path", "data", "--split=val"]


@pytest.mark.parametrize("script", ("run_1p.sh", "run_8p.sh"))
def test_a_work_dir_of_an_unset_variable_is_one_line(script, tmp_path):
    done = subprocess.run(["bash", ROOT / script, "--val", "--work_dir=", "--data_path=data"], cwd=tmp_path,
                          capture_output=True, text=True, env={**os.environ, "PYTHON": sys.executable})
    assert done.returncode == 1 and done.stderr.endswith(f"{script}: --work_dir takes a value, not ''\n")


@pytest.mark.parametrize("flags", (("--device_id=1",), ("--device-id", "1"), ("--val", "--device_id", "1")))
def test_run_8p_says_that_it_takes_a_list_of_devices(flags, tmp_path):
    done = subprocess.run(["bash", ROOT / "run_8p.sh", "--data_path=data", *flags], cwd=tmp_path, capture_output=True,
                          text=True, env={**os.environ, "PYTHON": sys.executable})
    assert done.returncode == 1 and not done.stdout and done.stderr.count("\n") == 1
    assert "takes --device_list=0,1,.." in done.stderr and "run_1p.sh --device_id=N" in done.stderr


@pytest.mark.parametrize("flags, folder", (
    ((), "output/0/FCN"), (("--work_dir=runs/a",), "runs/a"), (("--work-dir", "runs/a"), "runs/a"),
    (("--device_id=3",), "output/3/FCN")))
def test_run_1p_val_scores_the_latest_checkpoint(command, flags, folder):
    passed_on = [flag for flag in flags if "id" in flag]
    assert command("run_1p.sh", *flags, "--val", "--data_path", "data", "--split=val") == [
        "evaluate.py", f"{folder}/ckpt/latest.pth", *passed_on, "--data_path", "data", "--split=val"]


@pytest.mark.parametrize("npu, flags, folder", (
    (True, (), "output/3/FCN"), (True, ("--device_id=1",), "output/1/FCN"), (True, ("--device=cpu",), "output/0/FCN"),
    (False, ("--device", "npu"), "output/3/FCN"), (False, (), "output/0/FCN")))
def test_run_1p_val_looks_where_ascend_device_id_made_train_write(command, npu, flags, folder):
    assert command("run_1p.sh", "--val", *flags, npu=npu, ASCEND_DEVICE_ID="3")[1] == f"{folder}/ckpt/latest.pth"


def test_run_1p_without_data_shows_every_command(command):
    words = command("run_1p.sh", "--device", "cpu", "--work-dir=w")
    scripts = [word for i, word in enumerate(words) if words[i - 1] == "python" and word.endswith(".py")]
    assert scripts == ["tools/draw_voc.py", "convert_voc_aug.py", "train.py", "evaluate.py", "predict.py"]
    assert words.count("w/ckpt/best.pth") == 4  # shown and run, each twice
    assert "--device_id" not in words  # or it would win over ASCEND_DEVICE_ID
    assert command("run_1p.sh", "--device_id=3").count("--device_id=3") == 2
    assert command("run_1p.sh", "--device_id=3").count("--device_id") == 4  # of evaluate.py and predict.py


@pytest.mark.parametrize("script", ("run_1p.sh", "run_8p.sh", "tests/run.sh"))
def test_a_python_that_is_not_there_is_one_line(script, tmp_path):
    done = subprocess.run(["bash", ROOT / script], cwd=tmp_path, capture_output=True, text=True,
                          env={**os.environ, "PYTHON": "/nope"})
    assert done.returncode == 1 and not done.stdout
    assert done.stderr.endswith(": there is no /nope; set PYTHON to a Python of version 3.10 or later\n")
    assert done.stderr.count("\n") == 1
