"""A work folder that was copied, shared, interrupted, or written by version 2.0.0 loses no run."""
import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
from unittest import mock

import pytest
import torch
from conftest import (
    ROOT,
    assert_same_run,
    error_line,
    finish,
    left_of,
    metrics,
    read,
    run,
    start,
    state,
    train,
    train_flags,
    wait_for_iteration,
)

from cli import UserError
from files import remove_leftovers, whole_file
from train import train_step

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


def contents(folder):
    """The files of a folder, but for the lock, in which a process writes its number: {path: content}."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


@contextlib.contextmanager
def ending_in_step(number):
    """A context in which a run ends in its number-th step, and saves nothing more."""
    steps = itertools.count(1)

    def step(*args):
        if next(steps) == number:
            raise UserError("the power went off")
        return train_step(*args)

    with mock.patch("train.train_step", step):
        yield


def test_no_file_is_a_link_and_a_copy_resumes(stopped, whole, drawn_voc, tmp_path):
    assert not any(path.is_symlink() for path in whole.rglob("*"))
    subprocess.run(["cp", "-rL", stopped, tmp_path / "copy"], check=True)
    assert "latest.pth, iteration 9\n" in train(drawn_voc, tmp_path / "copy", *AUTO).stdout
    assert_same_run(tmp_path / "copy", whole)


# ---- version 2.0.0

RECIPE = ("backbone", "train_split", "val_split", "crop_size", "scale", "pad_to", "batch_size", "accumulate",
          "max_iters", "lr", "min_lr", "power", "momentum", "weight_decay", "class_weights", "freeze_bn", "seed",
          "sync_bn", "compile")


def make_old(work_dir):
    """Rewrites a folder into the form of version 2.0.0, whose checkpoints and run.json hold a recipe."""
    for path in (work_dir / "ckpt").iterdir():
        checkpoint = state(path)
        meta = checkpoint["meta"]
        args, digests = meta.pop("args"), meta.pop("digests")
        meta["recipe"] = {**{name: args[name] for name in RECIPE}, "ranks": meta.pop("ranks"), "precision": "float32",
                          "train_list": digests["train"], "val_list": digests["val"]}
        torch.save(checkpoint, path)
    record = json.loads((work_dir / "run.json").read_text())
    for entry in record["starts"]:
        del entry["args"]
        entry.update(performance=False, recipe=meta["recipe"], settings={"keep": 3, "performance": False})
    (work_dir / "run.json").write_text(json.dumps(record, indent=2))


def test_a_run_of_version_2_0_0_resumes_bit_equal(stopped, whole, drawn_voc):
    make_old(stopped)
    assert "latest.pth, iteration 9\n" in train(drawn_voc, stopped, *AUTO).stdout  # and nothing has changed
    assert_same_run(stopped, whole)
    starts = json.loads((stopped / "run.json").read_text())["starts"]
    assert "recipe" in starts[0] and starts[1]["args"]["max_iters"] == 12
    meta, usual = (state(folder / "ckpt/latest.pth")["meta"] for folder in (stopped, whole))
    assert meta == usual and "recipe" not in meta


def test_what_differs_from_a_run_of_version_2_0_0_is_said(stopped, drawn_voc):
    make_old(stopped)
    output = train(drawn_voc, stopped, *AUTO, "--max_iters", 10, "--lr", 0.02, "--scale", 192, 64).stdout
    line = next(line for line in output.splitlines() if "latest.pth, iteration 9; " in line)
    assert all(words in line for words in (
        "--max_iters 12 -> 10", "--lr 0.01 -> 0.02", "--scale (256, 64) -> (192, 64)",
        "--val_scale (256, 64) -> (192, 64)"))
    assert line.count("->") == 4
    assert "--seed 0, not 1" in error_line(TRAIN, *train_flags(drawn_voc, stopped), *AUTO, "--seed", 1)


def test_a_checkpoint_of_version_2_0_0_predicts_and_is_a_start(stopped, whole, drawn_voc, tmp_path):
    make_old(stopped)
    image = next((drawn_voc / "JPEGImages").iterdir())
    for folder in (whole, stopped):
        run(ROOT / "predict.py", folder / "ckpt/iter_9.pth", image, "--device", "cpu", "--save_dir",
            tmp_path / f"of_{folder.parent.name}")
    ours, theirs = (contents(tmp_path / f"of_{folder.parent.name}") for folder in (whole, stopped))
    assert list(ours.values()) == list(theirs.values()) and ours
    output = train(drawn_voc, tmp_path / "tuned", "--max_iters", 1, "--pretrained", stopped / "ckpt/best.pth").stdout
    assert "best.pth: a checkpoint of train.py\n" in output


# ---- which checkpoint a run resumes from, and which folders it may overwrite

def test_a_new_folder_resumes_from_the_checkpoint_that_it_began_with(stopped, whole, drawn_voc, tmp_path):
    """As long as it has saved nothing itself."""
    with ending_in_step(3):
        train(drawn_voc, tmp_path / "new", *FLAGS, "--resume", stopped / "ckpt/latest.pth", status=1)
    assert [line["iter"] for line in metrics(tmp_path / "new")] == [10, 11]
    assert "latest.pth, iteration 9\n" in train(drawn_voc, tmp_path / "new", *AUTO).stdout
    last = state(tmp_path / "new/ckpt/latest.pth")["state_dict"]
    assert all(torch.equal(value, last[key]) for key, value in state(whole / "ckpt/latest.pth")["state_dict"].items())


def test_a_folder_that_holds_checkpoints_is_never_taken_for_empty(stopped, drawn_voc):
    """Its latest.pth dangles, as after a copy of links without their targets, and nothing else can be read."""
    for path in (stopped / "ckpt").glob("*.pth"):
        path.unlink()
    (stopped / "ckpt/latest.pth").symlink_to("iter_9.pth")
    before = contents(stopped)
    flags = train_flags(drawn_voc, stopped)
    for more, words in (((), "holds a run already"), (AUTO, "holds no checkpoint that can be read"),
                        (("--performance",), "holds a run already")):
        assert words in error_line(TRAIN, *flags, *more)
    assert contents(stopped) == before
    (stopped / "ckpt/latest.pth").unlink()
    (stopped / "ckpt/best.pth").write_bytes(b"garbage")
    for more, words in (((), "holds a run already"), (AUTO, "holds no checkpoint that can be read")):
        assert words in error_line(TRAIN, *flags, *more)


def test_a_run_without_a_checkpoint_may_be_overwritten(whole, drawn_voc, tmp_path):
    """It has nothing to resume from: its metrics and its log are replaced, whether by --resume auto or not."""
    with ending_in_step(3):
        train(drawn_voc, tmp_path / "run", *FLAGS, "--lr", 0.02, status=1)
    assert [line["iter"] for line in metrics(tmp_path / "run")] == [1, 2]
    with ending_in_step(5):
        train(drawn_voc, tmp_path / "run", *FLAGS, status=1)  # not in the way; this one saves iteration 3
    assert [line["iter"] for line in metrics(tmp_path / "run")] == [1, 2, 3, 4]
    assert read(tmp_path / "run/train_0.log").count("device: ") == 1
    assert "holds a run already" in error_line(TRAIN, *train_flags(drawn_voc, tmp_path / "run"), *FLAGS)
    assert "iteration 3\n" in train(drawn_voc, tmp_path / "run", *AUTO).stdout
    assert_same_run(tmp_path / "run", whole)


def test_resume_in_place_takes_the_newest_checkpoint_only(whole, drawn_voc, tmp_path):
    """An older FILE is an error that asks for another folder, and nothing is touched. The newest is as good as auto."""
    with ending_in_step(8):
        train(drawn_voc, tmp_path / "run", *FLAGS, status=1)
    before, checkpoints = contents(tmp_path / "run"), tmp_path / "run/ckpt"
    for older in (checkpoints / "iter_3.pth", whole / "ckpt/iter_9.pth"):
        line = error_line(TRAIN, *train_flags(drawn_voc, tmp_path / "run"), *FLAGS, "--resume", older)
        assert f"--resume {older}: is not the newest checkpoint" in line and "another folder by --work_dir" in line
    assert contents(tmp_path / "run") == before
    train(drawn_voc, tmp_path / "run", *FLAGS, "--resume", checkpoints / "iter_6.pth")
    assert_same_run(tmp_path / "run", whole)


def test_files_of_other_names_are_left_alone(stopped, whole, drawn_voc):
    others = ("iter_4_good.pth", "iter_04.pth", "iter_.pth", "iter_5.pth.bak", "notes.txt")
    for name in others:
        (stopped / "ckpt" / name).write_text("mine")
    train(drawn_voc, stopped, *AUTO)
    assert_same_run(stopped, whole)
    assert all((stopped / "ckpt" / name).read_text() == "mine" for name in others)


# ---- several processes

def test_a_second_run_in_a_folder_ends_at_once(whole, drawn_voc, tmp_path):
    """And so does one that would resume it, also in torchrun's second attempt. It waits for nobody and touches nothing.
    The lock ends with the first."""
    work_dir = tmp_path / "run"
    process = start(drawn_voc, work_dir, *FLAGS, "--workers", 1)
    wait_for_iteration(process, work_dir, 1)
    process.send_signal(signal.SIGSTOP)
    before = contents(work_dir)
    for attempt, flags in (("0", ()), ("0", ("--resume", "auto")), ("1", ("--resume", "auto"))):
        line = error_line(TRAIN, *train_flags(drawn_voc, work_dir), *flags, env={"TORCHELASTIC_RESTART_COUNT": attempt})
        assert f"{work_dir}: process {process.pid} on " in line and "runs in this folder" in line
    assert contents(work_dir) == before
    process.kill()
    process.wait()
    train(drawn_voc, work_dir, *AUTO)
    assert_same_run(work_dir, whole)
    finish(process, -signal.SIGKILL)


def test_ranks_whose_launcher_was_killed_save_and_end(drawn_voc, tmp_path):
    work_dir = tmp_path / "run"
    process = start(drawn_voc, work_dir, "--device_list", "0,1", "--max_iters", 100_000, "--eval_interval", 100_000)
    wait_for_iteration(process, work_dir, 4)
    process.kill()
    output = finish(process, -signal.SIGKILL)
    assert "stopped by SIGTERM at iteration" in output and "which is saved" in output
    assert not left_of(process)
    assert state(work_dir / "ckpt/latest.pth")["progress"]["iteration"] == metrics(work_dir)[-1]["iter"]


def test_two_writers_of_one_file(tmp_path):
    """Each writes a file of its own, which the cleaning of the folder leaves alone while its writer lives."""
    with whole_file(tmp_path / "name") as ours, whole_file(tmp_path / "name") as theirs:
        assert ours != theirs
        ours.write_text("ours")
        theirs.write_text("theirs")
        remove_leftovers([tmp_path])
    assert (tmp_path / "name").read_text() == "ours" and len(list(tmp_path.iterdir())) == 1  # the last to end


def test_a_link_or_a_pipe_of_a_temporary_files_name_is_left_alone(tmp_path):
    """To open the pipe would wait for a writer, if it had none."""
    folder, names = tmp_path / "run", [f".{digit * 16}.tmp" for digit in "01234"]
    folder.mkdir()
    (tmp_path / "file").write_text("mine")
    os.mkfifo(tmp_path / "pipe")
    os.mkfifo(folder / names[4])
    for name, target in zip(names, ("file", "pipe", "", "absent"), strict=False):
        (folder / name).symlink_to(tmp_path / target)
    (folder / f".{'f' * 16}.tmp").write_text("of a writer that was killed")
    ends = [os.open(path, os.O_RDWR) for path in (tmp_path / "pipe", folder / names[4])]
    remove_leftovers([folder])
    for end in ends:
        os.close(end)
    assert sorted(path.name for path in folder.iterdir()) == names and read(tmp_path / "file") == "mine"


def test_a_link_in_place_of_the_lock_is_not_followed(drawn_voc, tmp_path):
    """Its target would be truncated."""
    (tmp_path / "run").mkdir()
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "run/.lock").symlink_to(tmp_path / "mine")
    line = error_line(TRAIN, *train_flags(drawn_voc, tmp_path / "run"))
    assert f"{tmp_path}/run/.lock: cannot be written (" in line and read(tmp_path / "mine") == "mine"


def test_two_commands_write_into_one_folder(whole, drawn_voc, tmp_path):
    """The second starts and ends while the first writes a picture."""
    command = (ROOT / "evaluate.py", whole / "ckpt/best.pth", "--data_path", drawn_voc, "--device", "cpu", "--workers",
               0, "--save_dir")
    with mock.patch("visualize.whole_file") as writes:
        @contextlib.contextmanager
        def write(path):
            with whole_file(path) as temporary:
                writes.side_effect = whole_file
                run(*command, tmp_path / "both")
                yield temporary

        writes.side_effect = write
        run(*command, tmp_path / "both")
    run(*command, tmp_path / "one")
    one, both = ({path.relative_to(folder): content for path, content in contents(folder).items()}
                 for folder in (tmp_path / "one", tmp_path / "both"))
    assert len(one) == 11 and one == both


# ---- files that were changed or deleted

def test_a_finished_run_without_its_best_checkpoint_keeps_its_score(whole, drawn_voc, tmp_path):
    work_dir = shutil.copytree(whole, tmp_path / "run")
    (work_dir / "ckpt/best.pth").unlink()
    output = train(drawn_voc, work_dir, *AUTO).stdout
    assert "best.pth does not exist any more\n" in output
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
        assert "metrics.jsonl: the file is damaged (" in error_line(TRAIN, *train_flags(drawn_voc, work_dir), *AUTO)
        assert path.read_bytes() == content


def test_a_resumed_run_says_what_is_different(whole, own_drawn_voc, drawn_voc, tmp_path):
    """Scores on other images are not compared with the old ones."""
    lists = own_drawn_voc / "ImageSets/Segmentation"
    for name in ("trainaug", "val"):
        ids = (lists / f"{name}.txt").read_text().split()
        (lists / f"{name}.txt").write_text("\n".join(ids[:-1]) + "\n")
    work_dir = shutil.copytree(whole, tmp_path / "run")
    flags = (*AUTO, "--max_iters", 15, "--amp", "--batch_size", 1, "--accumulate", 2)
    line = next(line for line in train(own_drawn_voc, work_dir, *flags).stdout.splitlines() if ", iteration 12" in line)
    for words in ("the list 'trainaug' holds other images", "the list 'val' holds other images",
                  "--amp False -> True", "--max_iters 12 -> 15", "--batch_size 2 -> 1", "--accumulate 1 -> 2"):
        assert words in line
    scores = {line["iter"]: line["mIoU"] for line in metrics(work_dir) if "mIoU" in line}
    best = max((12, 15), key=scores.get)  # iteration 12 is scored anew
    result = json.loads((work_dir / "result.json").read_text())
    assert result["best_iteration"] == best and result["best_mIoU"] == scores[best]
    assert state(work_dir / "ckpt/best.pth")["progress"]["iteration"] == best


def test_a_record_of_another_shape_is_one_line_and_stays(stopped, drawn_voc):
    for content in (b'{"starts": 5}', b"[1]", b"no JSON", b"\xff"):
        (stopped / "run.json").write_bytes(content)
        assert "run.json: the file is damaged (" in error_line(TRAIN, *train_flags(drawn_voc, stopped), *AUTO)
        assert (stopped / "run.json").read_bytes() == content
