"""A work folder that was copied, shared, interrupted, or written by an earlier version loses no run."""
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import (
    ROOT,
    assert_same_run,
    environment,
    error_line,
    finish,
    left_of,
    metrics,
    run,
    start,
    start_python,
    state,
    train,
    train_flags,
    wait_for_iteration,
)

TRAIN = ROOT / "train.py"
FLAGS = ("--max_iters", 12, "--checkpoint_interval", 3, "--eval_interval", 6)
AUTO = (*FLAGS, "--resume", "auto")


@pytest.fixture(scope="module")
def whole(drawn_voc, tmp_path_factory):
    """The folder of a run to which nothing happened."""
    work_dir = tmp_path_factory.mktemp("whole") / "run"
    train(drawn_voc, work_dir, *FLAGS)
    return work_dir


@pytest.fixture
def stopped(whole, tmp_path):
    """The folder of that run as it was after iteration 9."""
    work_dir = shutil.copytree(whole, tmp_path / "run")
    (work_dir / "result.json").unlink()
    (work_dir / "ckpt/iter_12.pth").unlink()
    shutil.copy(work_dir / "ckpt/iter_9.pth", work_dir / "ckpt/latest.pth")
    return work_dir


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_no_file_is_a_link_and_a_copy_goes_on(stopped, whole, drawn_voc, tmp_path):
    assert not any(path.is_symlink() for path in whole.rglob("*"))
    run("-c", "import subprocess, sys; subprocess.run(['cp', '-rL', *sys.argv[1:]], check=True)", stopped,
        tmp_path / "copy")
    assert "latest.pth, iteration 9\n" in train(drawn_voc, tmp_path / "copy", *AUTO).stdout
    assert_same_run(tmp_path / "copy", whole)


@pytest.mark.parametrize("links", (True, False))
def test_a_folder_of_the_version_before_goes_on(links, stopped, whole, drawn_voc, tmp_path):
    """Its latest.pth is a symlink, or was one before it was copied; its checkpoints say less."""
    for path in (stopped / "ckpt").iterdir():
        checkpoint = state(path)
        del checkpoint["progress"]["best_iteration"], checkpoint["meta"]["lists"]
        recipe = checkpoint["meta"]["recipe"]
        checkpoint["meta"].update({name: recipe[name] for name in ("seed", "ranks", "batch_size")}, recipe={
            name: recipe[name] for name in ("train_split", "crop_size", "scale", "max_iters", "lr", "min_lr", "power",
                                            "momentum", "weight_decay")})
        torch.save(checkpoint, path)
    for name in (".lock", "run.json"):
        (stopped / name).unlink()
    (stopped / "ckpt/latest.pth").unlink()
    if links:
        shutil.copy(stopped / "ckpt/iter_9.pth", stopped / "ckpt/iter_12.pth")  # of a branch that was left
        (stopped / "ckpt/latest.pth").symlink_to("iter_9.pth")
    assert ", iteration 9\n" in train(drawn_voc, stopped, *AUTO).stdout
    assert_same_run(stopped, whole)
    assert not (stopped / "ckpt/latest.pth").is_symlink()


def test_a_new_folder_goes_on_from_a_link_in_another(stopped, whole, drawn_voc, tmp_path):
    (stopped / "ckpt/latest.pth").unlink()
    (stopped / "ckpt/latest.pth").symlink_to("iter_9.pth")
    process = start(drawn_voc, tmp_path / "new", *FLAGS, "--max_iters", 10_000, "--checkpoint_interval", 10_000,
                    "--eval_interval", 10_000, "--resume", stopped / "ckpt/latest.pth")
    wait_for_iteration(process, tmp_path / "new", 10)
    process.kill()
    finish(process, -signal.SIGKILL)
    train(drawn_voc, tmp_path / "new", *AUTO)  # from what was linked, as nothing was saved
    last = state(tmp_path / "new/ckpt/latest.pth")["state_dict"]
    assert all(torch.equal(value, last[key]) for key, value in state(whole / "ckpt/latest.pth")["state_dict"].items())


def test_a_folder_that_holds_checkpoints_is_never_taken_for_empty(stopped, drawn_voc):
    """Its latest.pth dangles, as after a copy without links' targets, and nothing else can be read."""
    for path in (stopped / "ckpt").glob("*.pth"):
        path.unlink()
    (stopped / "ckpt/latest.pth").symlink_to("iter_9.pth")
    assert "holds no checkpoint to go on from that can be read" in run(
        TRAIN, *train_flags(drawn_voc, stopped), *AUTO, status=1).stderr
    (stopped / "ckpt/latest.pth").unlink()
    (stopped / "ckpt/best.pth").write_bytes(b"garbage")
    assert "holds no checkpoint to go on from" in error_line(TRAIN, *train_flags(drawn_voc, stopped), *AUTO)


def test_files_of_other_names_are_left_alone(stopped, whole, drawn_voc):
    others = ("iter_4_good.pth", "iter_04.pth", "iter_.pth", "iter_5.pth.bak", "notes.txt")
    for name in others:
        (stopped / "ckpt" / name).write_text("mine")
    train(drawn_voc, stopped, *AUTO)
    assert_same_run(stopped, whole)
    assert all((stopped / "ckpt" / name).read_text() == "mine" for name in others)


def test_auto_follows_the_branch_that_was_resumed_last(whole, drawn_voc, tmp_path):
    """From an older FILE, killed before its next save. What came after FILE is set aside, which --keep does not see."""
    work_dir = shutil.copytree(whole, tmp_path / "run")
    flags = (*FLAGS, "--lr", 0.02, "--checkpoint_interval", 100)
    process = start(drawn_voc, work_dir, *flags, "--resume", work_dir / "ckpt/iter_6.pth")
    aside = work_dir / "ckpt/abandoned_1"
    while process.poll() is None and "are set aside in" not in (work_dir / "train_0.log").read_text():
        os.sched_yield()
    wait_for_iteration(process, work_dir, 7)
    process.kill()
    finish(process, -signal.SIGKILL)
    output = (work_dir / "train_0.log").read_text()
    assert f"checkpoints and metrics after iteration 6 are set aside in {aside}\n" in output
    output = train(drawn_voc, work_dir, *FLAGS, "--lr", 0.02, "--resume", "auto").stdout
    assert "latest.pth, iteration 6\n" not in output and "latest.pth, iteration 6; --lr 0.01 -> 0.02\n" in output
    train(drawn_voc, tmp_path / "twin", *FLAGS, "--lr", 0.02, "--resume", whole / "ckpt/iter_6.pth")
    new, twin = (state(folder / "ckpt/latest.pth")["state_dict"] for folder in (work_dir, tmp_path / "twin"))
    assert all(torch.equal(value, twin[key]) for key, value in new.items())
    assert [line["iter"] for line in metrics(work_dir) if "loss" in line] == list(range(1, 13))
    assert {"iter_9.pth", "iter_12.pth", "metrics.jsonl"} <= set(names(aside))
    assert metrics(whole) == [json.loads(line) for line in (aside / "metrics.jsonl").read_text().splitlines()]
    assert {"iter_6.pth", "iter_9.pth", "iter_12.pth"} <= set(names(work_dir / "ckpt"))


def test_a_second_run_in_a_folder_ends_at_once(whole, drawn_voc, tmp_path):
    """And so does one that would go on in it; it waits for nobody. The first is not disturbed."""
    work_dir = tmp_path / "run"
    process = start(drawn_voc, work_dir, "--max_iters", 10_000, "--eval_interval", 10_000)
    wait_for_iteration(process, work_dir, 1)
    for flags in ((), ("--resume", "auto")):
        line = error_line(TRAIN, *train_flags(drawn_voc, work_dir), *flags)
        assert f"{work_dir}: process {process.pid} on " in line and "runs in this folder" in line
    process.terminate()
    assert ", which is saved" in finish(process, 128 + signal.SIGTERM)
    shutil.rmtree(work_dir)
    process = start(drawn_voc, work_dir, *FLAGS)
    wait_for_iteration(process, work_dir, 1)
    process.kill()  # the lock dies with it, though workers of it may live on for seconds
    process.wait()
    train(drawn_voc, work_dir, *AUTO)
    assert_same_run(work_dir, whole)
    finish(process, -signal.SIGKILL)


HOLDER = """
import os, sys
from work_folder import WorkFolder
WorkFolder(sys.argv[1], "0", True).lock()
print("holds", flush=True)
os.read(int(sys.argv[2]), 1)
"""


def test_a_restart_waits_for_a_dying_holder(stopped, whole, drawn_voc, tmp_path):
    (tmp_path / "holder.py").write_text(HOLDER)
    reader, writer = os.pipe()
    with subprocess.Popen([sys.executable, tmp_path / "holder.py", stopped, str(reader)], env=environment(),
                          pass_fds=[reader], stdout=subprocess.PIPE) as holder:
        holder.stdout.readline()
        process = start(drawn_voc, stopped, *FLAGS, env={"TORCHELASTIC_RESTART_COUNT": "1"})
        while process.poll() is None and str(stopped / ".lock") not in files_of(process):
            os.sched_yield()
        os.write(writer, b".")
    finish(process, 0)
    assert_same_run(stopped, whole)


def files_of(process):
    """The files that a process holds open."""
    with contextlib.suppress(OSError):
        return [os.readlink(file) for file in Path("/proc", str(process.pid), "fd").iterdir()]
    return []


def test_ranks_whose_launcher_was_killed_save_and_end(drawn_voc, tmp_path):
    work_dir, flags = tmp_path / "run", (*FLAGS, "--max_iters", 40, "--device_list", "0,1")
    process = start(drawn_voc, work_dir, *flags, "--max_iters", 100_000, "--eval_interval", 100_000)
    wait_for_iteration(process, work_dir, 4)
    process.kill()
    output = finish(process, -signal.SIGKILL)
    assert "stopped by SIGTERM at iteration" in output and "which is saved" in output
    assert not left_of(process, work_dir)
    assert state(work_dir / "ckpt/latest.pth")["progress"]["iteration"] == metrics(work_dir)[-1]["iter"]


def test_two_commands_write_into_one_folder(whole, drawn_voc, tmp_path):
    from files import whole_file
    with whole_file(tmp_path / "name") as ours, whole_file(tmp_path / "name") as theirs:
        assert ours != theirs
    command = (ROOT / "evaluate.py", whole / "ckpt/best.pth", "--data_path", drawn_voc, "--device", "cpu", "--save_dir")
    both = [start_python((*command, tmp_path / "both"), ROOT, None, False, merged=True) for _ in range(2)]
    for process in both:
        finish(process, 0)
    run(*command, tmp_path / "one")
    files = {path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.png")}
    assert len(files) == 10 and files == {
        path.relative_to(tmp_path / "both") for path in (tmp_path / "both").rglob("*.*")}
    assert all((tmp_path / "one" / file).read_bytes() == (tmp_path / "both" / file).read_bytes() for file in files)


def test_a_finished_run_without_its_best_checkpoint_keeps_its_score(whole, drawn_voc, tmp_path):
    work_dir = shutil.copytree(whole, tmp_path / "run")
    (work_dir / "ckpt/best.pth").unlink()
    output = train(drawn_voc, work_dir, *AUTO).stdout
    assert "best.pth is not there any more" in output
    assert_same_run(work_dir, whole)


def test_metrics_that_lack_a_part_or_are_no_text(whole, drawn_voc, tmp_path):
    work_dir = shutil.copytree(whole, tmp_path / "run")
    path, lines = work_dir / "metrics.jsonl", (whole / "metrics.jsonl").read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if "mIoU" in line))
    train(drawn_voc, work_dir, *AUTO)
    result = json.loads((work_dir / "result.json").read_text())
    assert result["loss"] is result["fps"] is None and result["mIoU"] is not None
    path.write_text("".join(line for line in lines if "mIoU" not in line))
    assert "nothing is left to train" in error_line(TRAIN, *train_flags(drawn_voc, work_dir), *AUTO)
    for content in (b'{"iter": 1, "loss": \xff}\n', b"[1]\n", b"no JSON\n"):
        path.write_bytes(content)
        assert "metrics.jsonl: " in error_line(TRAIN, *train_flags(drawn_voc, work_dir), *AUTO)


def test_a_resumed_run_says_what_is_different(whole, own_drawn_voc, drawn_voc, tmp_path):
    """Scores on other images are not compared with the old ones."""
    lists = own_drawn_voc / "ImageSets/Segmentation"
    for name in ("trainaug", "val"):
        ids = (lists / f"{name}.txt").read_text().split()
        (lists / f"{name}.txt").write_text("\n".join(ids[:-1]) + "\n")
    work_dir = shutil.copytree(whole, tmp_path / "run")
    output = train(own_drawn_voc, work_dir, *AUTO, "--max_iters", 15, "--amp").stdout
    line = next(line for line in output.splitlines() if ", iteration 12" in line)
    for words in ("the list 'trainaug' holds other images", "the list 'val' holds other images",
                  "precision float32 -> bfloat16", "--max_iters 12 -> 15"):
        assert words in line
    assert json.loads((work_dir / "result.json").read_text())["best_iteration"] == 15
    assert state(work_dir / "ckpt/best.pth")["progress"]["iteration"] == 15


def test_a_record_of_another_shape_is_one_line_and_stays(stopped, drawn_voc):
    for content in ('{"starts": 5}', '[1]', '{"starts": [{}]}', '{"starts": [{"performance": "no"}]}'):
        (stopped / "run.json").write_text(content)
        assert "run.json: damaged (" in error_line(TRAIN, *train_flags(drawn_voc, stopped), *AUTO)
        assert (stopped / "run.json").read_text() == content
