"""Variables that a scheduler sets or leaves empty, machines of their own, and Windows."""
import shutil

import pytest
from conftest import ROOT, error_line, finish, free_port, run, start, train_flags

from train import parse_args

TRAIN = ROOT / "train.py"
ELSEWHERE = """
import argparse, importlib.util, logging, multiprocessing, runpy, subprocess, sys, tempfile
sys.platform = {platform!r}
sys.modules.update(fcntl=None, resource=None)  # which are not there
sys.path.insert(0, {folder!r})
sys.argv = {command!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("environment, words", [
    ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 is set, but RANK is ''"),
    ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}, "but MASTER_PORT is ''"),
    ({"WORLD_SIZE": "two", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "WORLD_SIZE=two")])
def test_a_part_of_a_schedulers_variables_is_one_line(environment, words, drawn_voc, tmp_path):
    for script in (TRAIN, ROOT / "evaluate.py"):
        command = train_flags(drawn_voc, tmp_path / "run") if script == TRAIN else ("file", "--data_path", drawn_voc)
        line = error_line(script, *command, status=2, env=environment)
        assert words in line and "unset WORLD_SIZE" in line


def test_flags_of_the_launcher_are_refused_where_torchrun_was_called_by_hand(drawn_voc, tmp_path):
    environment = {"TORCHELASTIC_RUN_ID": "none", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2",
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    arguments = ["--data_path", str(drawn_voc), "--device_list", "0,1", "--nnodes", "1"]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        with pytest.raises(SystemExit) as ended:
            parse_args(arguments)
        assert ended.value.code == 2
        patch.setenv("PET_SIGNALS_TO_HANDLE", "SIGTERM")  # as `launch` does
        assert parse_args(arguments).nnodes == 1


@pytest.mark.parametrize("environment", ({"WORLD_SIZE": ""}, {"WORLD_SIZE": "1"}, {"WORLD_SIZE": "", "RANK": ""}))
def test_an_empty_variable_is_none(environment, drawn_voc, tmp_path):
    run(TRAIN, *train_flags(drawn_voc, tmp_path / "run"), "--max_iters", 1, env=environment)


def test_an_address_that_is_empty_starts_no_run(drawn_voc, tmp_path):
    flags = ("--device_list", "0", "--nnodes", 2, "--node_rank", 0, "--addr", "")
    assert "--addr" in error_line(TRAIN, *train_flags(drawn_voc, tmp_path / "run"), *flags, status=2)


def test_two_machines_read_their_own_data_folders(drawn_voc, tmp_path):
    """One whose lists differ says so. That equal ones make one run is in test_processes.py."""
    copy = shutil.copytree(drawn_voc.parent, tmp_path / "VOCdevkit") / "VOC2012"
    names = copy / "ImageSets/Segmentation/val.txt"
    names.write_text("\n".join(names.read_text().split()[:-1]))
    where = ("--nnodes", 2, "--addr", "127.0.0.1", "--master_port", free_port(), "--device_list", 0)
    first, second = (start(folder, tmp_path / f"run{rank}", *where, "--node_rank", rank)
                     for rank, folder in enumerate((drawn_voc, copy)))
    assert f"{copy}: its lists differ from those of rank 0's machine" in finish(second, 1)
    finish(first, 1)


@pytest.mark.parametrize("script, platform", [(script, "win32") for script in (
    "train.py", "evaluate.py", "predict.py", "export.py", "convert_voc_aug.py")] + [("train.py", "darwin")])
def test_on_windows_and_macos_a_command_is_one_line(script, platform, tmp_path):
    """Python says so by sys.platform, and lacks modules of POSIX or, on macOS, what Linux alone has."""
    (tmp_path / "other.py").write_text(ELSEWHERE.format(folder=str(ROOT), platform=platform,
                                                        command=[str(ROOT / script), "--help"]))
    assert "runs on Linux; on Windows, use WSL2; on macOS, a Linux container" in error_line(tmp_path / "other.py")


def test_a_variable_that_hides_all_devices_is_named(drawn_voc, tmp_path):
    """What the user has hidden stays so: --device auto trains on the CPU."""
    flags = (*train_flags(drawn_voc, tmp_path / "run"), "--device_list", "0,1", "--max_iters", 1)
    reason = "PyTorch sees no CUDA device (CUDA_VISIBLE_DEVICES is '{}')"
    line = error_line(TRAIN, *flags, "--device", "cuda", env={"CUDA_VISIBLE_DEVICES": ""}, real=True)
    assert f"--device cuda: {reason.format('')}; --device auto" in line
    done = run(TRAIN, *flags, "--device", "auto", env={"CUDA_VISIBLE_DEVICES": "-1"}, real=True)
    assert "device: 2 x cpu (" in done.stdout and reason.format("-1") in done.stdout and not done.stderr


def test_a_device_package_that_breaks_pytorchs_import_is_not_loaded(drawn_voc, tmp_path):
    """PyTorch loads such packages by itself when it is imported, by the launcher, too."""
    (tmp_path / "broken.py").write_text("raise ImportError('no libraries')")
    (tmp_path / "broken-1.dist-info").mkdir()
    (tmp_path / "broken-1.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1\n")
    (tmp_path / "broken-1.dist-info/entry_points.txt").write_text("[torch.backends]\nbroken = broken:load\n")
    run(TRAIN, *train_flags(drawn_voc, tmp_path / "run"), "--device_list", 0, "--max_iters", 1,
        env={"PYTHONPATH": str(tmp_path)})
