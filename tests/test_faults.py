"""What a run survives, and that the rest ends with one clear line and without a hang."""
import os
import random
import shutil
import signal
import socket

import pytest
import torch
from conftest import (
    ROOT,
    assert_same_run,
    error_line,
    finish,
    metrics,
    run,
    start,
    state,
    train,
    train_flags,
    wait_for_iteration,
)

from train import parse_args

TRAIN = ROOT / "train.py"
FLAGS = ("--max_iters", 20, "--checkpoint_interval", 4, "--eval_interval", 10)


@pytest.fixture(scope="module")
def whole(drawn_voc, tmp_path_factory):
    """The folder of a run to which nothing happened."""
    work_dir = tmp_path_factory.mktemp("whole") / "run"
    train(drawn_voc, work_dir, *FLAGS)
    return work_dir


def test_a_killed_and_a_stopped_run_go_on_as_if_nothing_happened(whole, drawn_voc, tmp_path):
    """SIGKILL at a random moment; then Ctrl-C, which a terminal sends to the processes that load images, too."""
    work_dir, moment = tmp_path / "run", random.randint(1, 8)
    print(f"killed after iteration {moment}")  # shown where the test fails
    process = start(drawn_voc, work_dir, *FLAGS)
    wait_for_iteration(process, work_dir, moment)
    process.kill()
    finish(process, -signal.SIGKILL)
    process = start(drawn_voc, work_dir, *FLAGS, "--resume", "auto", "--workers", 1)
    wait_for_iteration(process, work_dir, 11)  # 10 is evaluated, where a signal ends the run without a line
    os.killpg(process.pid, signal.SIGINT)
    assert "stopped by SIGINT at iteration" in finish(process, 128 + signal.SIGINT)
    stopped_at = state(work_dir / "ckpt/latest.pth")["progress"]["iteration"]
    assert 11 <= stopped_at < 20 and metrics(work_dir)[-1]["iter"] == stopped_at
    train(drawn_voc, work_dir, *FLAGS, "--resume", "auto")
    assert_same_run(work_dir, whole)


@pytest.mark.parametrize("iteration, ranks", [(3, 2), (5, 1)])
def test_a_stop_during_an_evaluation_puts_it_off(iteration, ranks, drawn_voc, tmp_path):
    """Between two checkpoints, of two processes, of which one gets the signal; and at the end of the run, which then
    goes on as if nothing happened."""
    work_dir, fault = tmp_path / "run", tmp_path / "fault"
    devices = ("--device_list", "0,1", "--max_restarts", 2) if ranks > 1 else ()
    flags = ("--max_iters", 5, "--eval_interval", iteration, "--checkpoint_interval", 4, *devices, "--resume", "auto")
    fault.write_text(f"stop {ranks - 1}")
    process = start(drawn_voc, work_dir, *flags, env={"PYTHONPATH": str(ROOT / "tests/faulty"), "FAULT": str(fault)})
    output = finish(process, 128 + signal.SIGTERM)
    assert "Traceback" not in output and "error" not in output and output.count("train.py: stopped by SIGTERM\n") == 1
    assert state(work_dir / "ckpt/latest.pth")["progress"]["iteration"] == iteration
    assert f'"iter": {iteration}, "aAcc"' not in (work_dir / "metrics.jsonl").read_text()
    if ranks == 1:
        train(drawn_voc, work_dir, *flags)
        train(drawn_voc, tmp_path / "whole", *flags)
        assert_same_run(work_dir, tmp_path / "whole")


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_it_used(whole, drawn_voc, tmp_path):
    work_dir = shutil.copytree(whole, tmp_path / "run")
    for name in ("latest.pth", "iter_20.pth"):  # one file, where they are hard links
        content = bytearray((work_dir / "ckpt" / name).read_bytes())
        content[len(content) // 2] ^= 1  # one bit
        (work_dir / "ckpt" / name).write_bytes(content)
    output = train(drawn_voc, work_dir, *FLAGS, "--resume", "auto").stdout
    assert "latest.pth: the file is damaged" in output and "iter_20.pth: the file is damaged" in output
    assert "iter_16.pth, iteration 16\n" in output
    assert_same_run(work_dir, whole)


def test_another_batch_size_is_said_and_another_seed_refused(whole, drawn_voc, tmp_path):
    flags = (*FLAGS, "--resume", whole / "ckpt/iter_16.pth")
    assert "--seed 0, not 1" in error_line(TRAIN, *train_flags(drawn_voc, tmp_path / "run"), *flags, "--seed", 1)
    (tmp_path / "names.txt").write_text("\n".join(map(str, range(21))))
    assert "its classes have other names (background, aeroplane" in error_line(
        TRAIN, *train_flags(drawn_voc, tmp_path / "run"), *flags, "--classes", tmp_path / "names.txt",
        "--train_split", "trainaug")
    output = train(drawn_voc, tmp_path / "run", *flags, "--batch_size", 3, "--max_iters", 18).stdout
    assert "iter_16.pth, iteration 16; --batch_size 2 -> 3; --max_iters 20 -> 18\n" in output
    assert state(tmp_path / "run/ckpt/latest.pth")["progress"]["samples"] == 32 + 2 * 3


SAVE = """
import dataclasses, os, random, resource, signal, sys, time
from pathlib import Path
import torch
from train import Progress
from work_dir import WorkDir

def content(number):
    return {"state_dict": {"backbone.x": torch.full((300_000,), float(number))}, "optimizer": {"state": {}},
            "meta": {"backbone": "resnet50", "args": {"seed": 0}, "ranks": 1, "digests": {"train": "", "val": ""}},
            "precision": {}, "progress": dataclasses.asdict(Progress(number))}

folder = WorkDir(Path(sys.argv[1]), "0", keep=2)
last, start = 0, None
for kill in range(20):
    folder.open(start, Progress(last), last + 10 ** 6)
    child = os.fork()
    if child == 0:
        number = last
        while True:
            number += 1
            folder.save(content(number), number, True)
    time.sleep(random.uniform(0.005, 0.05))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    start = folder.newest()
    if start is None:
        assert last == 0
        continue
    number = start.iteration()
    assert Path(start.source).name in ("latest.pth", "best.pth") and number >= last
    assert (start.state["backbone.x"] == number).all() and len(folder.saved()) <= 3
    last = number
print("the last is", last)

folder.open(start, Progress(last), last + 10 ** 6)
resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))  # as if the disk were full
try:
    folder.save(content(last + 1), last + 1, True)
except OSError as error:
    print(f"{error.filename}: {error.strerror}")
assert folder.newest().iteration() == last
assert not list(folder.checkpoints.glob(".*"))
"""


def test_20_kills_while_saving_and_a_full_disk_leave_the_latest_checkpoint_whole(tmp_path):
    (tmp_path / "save.py").write_text(SAVE)
    output = run(tmp_path / "save.py", tmp_path / "run", env={"PYTHONPATH": str(ROOT)}).stdout
    last, message = output.splitlines()
    number = int(last.split()[-1])
    assert number > 0
    assert message.startswith(f"{tmp_path}/run/ckpt/best.pth: cannot be written (File too large); make")


def test_an_unwritable_work_folder_is_found_before_the_data_are_read(tmp_path):
    line = error_line(ROOT / "train.py", *train_flags(tmp_path / "no_data", "/proc/run"))
    assert line.startswith("train.py: error: /proc/run: cannot be written to")


def test_an_unmounted_data_folder_is_told_from_a_missing_image(own_drawn_voc, tmp_path):
    from cli import UserError
    from voc import read_image
    with pytest.raises(UserError, match="there is no such image"):
        read_image(own_drawn_voc / "JPEGImages/absent.jpg")
    (own_drawn_voc / "JPEGImages").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="its folder is not there any more; mount or restore it"):
        read_image(own_drawn_voc / "JPEGImages/absent.jpg")


def test_a_port_in_use_and_a_master_that_does_not_answer(drawn_voc, tmp_path):
    flags = (*train_flags(drawn_voc, tmp_path / "run"), "--device_list", "0")
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"port {port} is in use on this machine; name another by --master_port" in error_line(
            TRAIN, *flags, "--master_port", port)
    machines = (*flags, "--nnodes", 2, "--addr", "127.0.0.1", "--master_port", port, "--timeout", 2)
    for rank in (0, 1):  # machine 0 waits for the other, machine 1 for machine 0
        done = run(TRAIN, *machines, "--node_rank", rank, status=1)
        assert done.stdout == f"waiting for 2 machines at 127.0.0.1:{port}, at most 2 s\n"
        assert f"could not meet the other machines at 127.0.0.1:{port} within 2 s" in done.stderr
        assert done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("flags, words", [
    (("--addr", "10.0.0.1"), "no effect without --device_list"), (("--timeout", 5), "no effect without --device_list"),
    (("--device_list", "0,1", "--device_id", 0), "each process has its own device"),
    (("--device_list", "0,0"), "each device once"), (("--device_list", "0,x"), "--device_list"),
    (("--device_list", "0", "--node_rank", 1), "--nnodes"),
    (("--device_list", "0", "--nnodes", 2, "--node_rank", 0), "--master_addr")])
def test_flags_of_several_processes_that_make_no_sense(drawn_voc, flags, words, capsys):
    with pytest.raises(SystemExit) as ended:
        parse_args(["--data_path", str(drawn_voc), *map(str, flags)])
    assert ended.value.code == 2 and words in capsys.readouterr().err


def test_devices_set_by_hand_win_over_the_list(monkeypatch, capsys):
    from device import visible_devices
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    monkeypatch.delenv("ASCEND_RT_VISIBLE_DEVICES", raising=False)
    assert visible_devices("cuda", ["0", "1", "2"]) == ["4", "5"] == os.environ["CUDA_VISIBLE_DEVICES"].split(",")
    assert "CUDA_VISIBLE_DEVICES=4,5 is set, it wins over --device_list 0,1,2" in capsys.readouterr().err
    monkeypatch.setenv("ASCEND_RT_VISIBLE_DEVICES", "")  # so that it is taken back afterwards
    monkeypatch.delenv("ASCEND_RT_VISIBLE_DEVICES")
    assert visible_devices("npu", ["2", "3"]) == ["2", "3"] == os.environ["ASCEND_RT_VISIBLE_DEVICES"].split(",")
    assert visible_devices("cpu", ["0", "1", "2"]) == ["0", "1", "2"] and capsys.readouterr().err == ""


def test_a_run_that_was_not_scored_at_its_end_goes_on(drawn_voc, tmp_path):
    """Killed in its only evaluation: the last checkpoint is there, and no score."""
    train(drawn_voc, tmp_path / "whole", "--max_iters", 3)
    work_dir = shutil.copytree(tmp_path / "whole", tmp_path / "run")
    last = state(work_dir / "ckpt/latest.pth")
    last["progress"].update(evaluated=0, best=-1.0, best_iteration=0)
    for path in (work_dir / "ckpt").iterdir():
        path.unlink()
    for name in ("latest.pth", "iter_3.pth"):
        torch.save(last, work_dir / "ckpt" / name)
    lines = (work_dir / "metrics.jsonl").read_text().splitlines(keepends=True)
    (work_dir / "metrics.jsonl").write_text("".join(line for line in lines if "mIoU" not in line))
    (work_dir / "result.json").unlink()
    train(drawn_voc, work_dir, "--max_iters", 3, "--resume", "auto")
    assert_same_run(work_dir, tmp_path / "whole")
    train(drawn_voc, tmp_path / "elsewhere", "--max_iters", 3, "--resume", tmp_path / "whole/ckpt/iter_3.pth", status=1)
