"""train.py as a command: what it writes, that evaluate.py agrees with it, that a resumed run is the same run."""
import json
import re
import shutil
import sys

import pytest
import torch
from conftest import ROOT, drawing, error_line, metrics, run, state, timeless, train, train_flags

from data import batch_order
from train import losses_of, parse_args

FLAGS = ("--max_iters", 8, "--eval_interval", 5, "--checkpoint_interval", 3)
AUTO = (*FLAGS, "--resume", "auto")


@pytest.fixture(scope="module")
def finished(drawn_voc, tmp_path_factory):
    """A run of 8 iterations; with --resume auto it starts afresh in a new folder. -> (its folder, what it printed)"""
    work_dir = tmp_path_factory.mktemp("finished") / "run"
    with drawing():
        return work_dir, train(drawn_voc, work_dir, *AUTO).stdout


def test_files_and_log_lines(finished):
    work_dir, output = finished
    assert sorted(p.name for p in work_dir.iterdir()) == [
        ".lock", "FCN_bs2_1p_acc.log", "ckpt", "confusion.png", "curves.png", "data.png", "metrics.jsonl",
        "result.json", "run.json", "train_0.log", "train_batch.png", "val_samples.png"]
    assert sorted(p.name for p in (work_dir / "ckpt").iterdir()) == [
        "best.pth", "iter_3.pth", "iter_6.pth", "iter_8.pth", "latest.pth"]  # that of 5 was saved as latest.pth only
    assert (work_dir / "train_0.log").read_text() == output
    for words in (r"tiny, 158,711 parameters, from random weights", r"1 x cpu", r"12 images of 'trainaug'",
                  r"8 iterations of 1 x 2 = 2 images, 1.3 epochs",
                  r"iter 8/8  lr \S+  loss [\d.]+  "
                  r"[\d.]+ images/s  iter [\d.]+ s, data [\d.]+ s  memory \d+ MiB  left 0:00:00"):
        assert re.search(words, output), words


def test_the_start_of_a_run_logs_its_recipe(finished, drawn_voc, tmp_path):
    """Optimizer, schedule, losses and augmentation, with the numbers of the flags."""
    flags = ("--lr", 0.02, "--min_lr", 0.003, "--power", 0.7, "--momentum", 0.8, "--weight_decay", 0.0006,
             "--crop_size", 32, "--scale", 192, 48, "--max_iters", 1, "--backbone", "tiny_d8")
    other = train(drawn_voc, tmp_path / "run", *flags).stdout
    assert (tmp_path / "run/train_0.log").read_text() == other
    for output, recipe, augmentation in (
            (finished[1], ("0.01", "0.0001", "0.9", "0.9", "0.0005"), ("256x64", "0.5", "2", "64")),
            (other, ("0.02", "0.003", "0.7", "0.8", "0.0006", "0.4"), ("192x48", "0.5", "2", "32"))):
        before_training = output[:output.index("\niter 1/")].splitlines()
        lines = {line.split(": ")[0]: line for line in before_training}
        assert sorted(re.findall(r"\d+\.\d+", lines["recipe"])) == sorted(recipe)
        assert re.findall(r"\d+x\d+|[\d.]+", lines["augmentation"]) == list(augmentation)
        assert all(word in lines["recipe"] for word in ("SGD", "momentum", "weight decay", "polynomial"))
        assert ("auxiliary" in lines["recipe"]) == (output is other)  # tiny has no such head
        assert all(word in lines["augmentation"] for word in ("crop", "flip", "photometric distortion"))


def test_result_and_summary_come_from_the_metrics(finished):
    work_dir, _ = finished
    lines = metrics(work_dir)
    logged = [line for line in lines if "loss" in line]
    scored = [line for line in lines if "mIoU" in line]
    assert [line["iter"] for line in logged] == list(range(1, 9)) and [line["iter"] for line in scored] == [5, 8]
    assert [line["fps"] is None for line in logged] == [True] * 5 + [False] * 3  # the first five are a warm-up
    result = json.loads((work_dir / "result.json").read_text())
    assert result["iters"] == 8 and result["loss"] == logged[-1]["loss"]
    assert result["fps"] == max(line["fps"] for line in logged[5:])
    assert {name: result[name] for name in ("aAcc", "mIoU", "mAcc")} == {
        name: scored[-1][name] for name in ("aAcc", "mIoU", "mAcc")}
    summary = dict(line.split(" = ") for line in (work_dir / "FCN_bs2_1p_acc.log").read_text().splitlines())
    assert list(summary) == ["Network", "Backbone", "RankSize", "BatchSize", "DeviceType", "CaseName", "ActualFPS",
                             "TrainingTime", "mIoU", "ActualLoss", "E2ETrainingTime"]
    assert float(summary["mIoU"]) == pytest.approx(max(line["mIoU"] for line in scored) / 100)
    assert float(summary["TrainingTime"]) == pytest.approx(1000 * 2 / result["fps"])
    assert summary["CaseName"] == "FCN_bs2_1p_acc" and summary["RankSize"] == "1"


def test_learning_rate_is_the_polynomial(finished):
    expected = [(0.01 - 1e-4) * (1 - i / 8) ** 0.9 + 1e-4 for i in range(8)]
    assert [line["lr"] for line in metrics(finished[0]) if "lr" in line] == pytest.approx(expected, rel=1e-12)


def test_checkpoints_say_what_they_are_of(finished):
    best, latest = (state(finished[0] / "ckpt" / f"{name}.pth") for name in ("best", "latest"))
    assert latest["meta"]["backbone"] == "tiny" and latest["meta"]["num_classes"] == 21
    assert list(latest["meta"]["scale"]) == [256, 64] and latest["meta"]["classes"][20] == "tvmonitor"
    assert latest["progress"]["iteration"] == 8 and latest["progress"]["samples"] == 16
    scored = {line["iter"]: line["mIoU"] for line in metrics(finished[0]) if "mIoU" in line}
    assert best["progress"]["iteration"] == max(scored, key=lambda i: (scored[i], -i))


def test_evaluate_prints_the_score_of_the_training(finished, drawn_voc, tmp_path):
    run(ROOT / "evaluate.py", finished[0] / "ckpt/latest.pth", "--data_path", drawn_voc, "--device", "cpu",
        "--json", tmp_path / "scores.json")
    scores = json.loads((tmp_path / "scores.json").read_text())
    result = json.loads((finished[0] / "result.json").read_text())
    assert {name: scores[name] for name in ("aAcc", "mIoU", "mAcc")} == {
        name: result[name] for name in ("aAcc", "mIoU", "mAcc")}


def test_a_resumed_run_is_the_same_run(finished, drawn_voc, tmp_path):
    """From iteration 3 of 8, in a folder of its own, with another number of workers: the same parameters, bit by bit,
    and the same log, though log lines are at 4 and 8, and so straddle the checkpoint. Its tensors lie contiguous in
    memory, as those of an NPU do, not channels last."""
    flags = (*FLAGS, "--log_interval", 4, "--workers", 2)
    train(drawn_voc, tmp_path / "whole", *flags)
    checkpoint = state(tmp_path / "whole/ckpt/iter_3.pth")
    for momentum in checkpoint["optimizer"]["state"].values():
        momentum["momentum_buffer"] = momentum["momentum_buffer"].contiguous()
    checkpoint["state_dict"] = {key: value.contiguous() for key, value in checkpoint["state_dict"].items()}
    torch.save(checkpoint, tmp_path / "contiguous.pth")
    output = train(drawn_voc, tmp_path / "part", *flags, "--workers", 0, "--resume", tmp_path / "contiguous.pth").stdout
    assert f"from {tmp_path / 'contiguous.pth'}, iteration 3\n" in output  # and nothing has changed
    whole, part, logged_more = (state(folder / "ckpt/latest.pth") for folder in (
        tmp_path / "whole", tmp_path / "part", finished[0]))
    for other in (part, logged_more):
        assert all(torch.equal(value, other["state_dict"][key]) for key, value in whole["state_dict"].items())
    assert timeless(metrics(tmp_path / "part")) == timeless(metrics(tmp_path / "whole"))


def test_resume_auto_continues_in_the_folder_and_cuts_the_metrics_back(finished, drawn_voc, tmp_path):
    work_dir = shutil.copytree(finished[0], tmp_path / "run")
    (work_dir / "ckpt/iter_8.pth").unlink()
    shutil.copy(work_dir / "ckpt/iter_6.pth", work_dir / "ckpt/latest.pth")  # as if killed after iteration 8's metrics
    with open(work_dir / "metrics.jsonl", "a") as file:
        file.write('{"iter": 9, "lo')
    train(drawn_voc, work_dir, *AUTO)
    assert timeless(metrics(work_dir)) == timeless(metrics(finished[0]))
    before = state(work_dir / "ckpt/latest.pth")["state_dict"]
    again = train(drawn_voc, work_dir, *AUTO).stdout  # nothing left to do
    assert timeless(metrics(work_dir)) == timeless(metrics(finished[0])) and "result.json" in again
    assert "\niter " not in again
    finished_state, after = (state(folder / "ckpt/latest.pth")["state_dict"] for folder in (finished[0], work_dir))
    assert all(torch.equal(value, before[key]) and torch.equal(value, after[key])
               for key, value in finished_state.items())


def test_a_run_entry_has_all_flags(finished, drawn_voc):
    """run.json has an entry for each start; its "args" are train.py's flags with their values."""
    entry, = json.loads((finished[0] / "run.json").read_text())["starts"]
    args = vars(parse_args([str(flag) for flag in (*train_flags(drawn_voc, finished[0]), *AUTO)]))
    args.update(train_split="trainaug")  # the default for VOC's classes
    args = json.loads(json.dumps(args))  # which has no tuples
    assert entry["args"] == args
    assert entry["start"] == "random weights" and entry["data"]["train"]["images"] == 12
    assert {"time", "command", "folder", "device", "versions", "code"} <= entry.keys()


def test_a_folder_that_holds_a_run_is_not_touched(finished, drawn_voc):
    def files():  # but for the lock, in which a process writes its number
        return {path: path.stat().st_mtime_ns for path in finished[0].rglob("*") if path.name != ".lock"}

    before = files()
    assert "--resume auto" in error_line(ROOT / "train.py", *train_flags(drawn_voc, finished[0]))
    assert files() == before


def test_default_folders_are_those_of_the_port(drawn_voc, tmp_path):
    flags = [flag for flag in train_flags(drawn_voc, "unused") if flag not in ("--work_dir", "unused")]
    run(ROOT / "train.py", *flags, "--max-iters", 1, cwd=tmp_path)
    assert (tmp_path / "output/0/FCN/result.json").exists()
    run(ROOT / "train.py", *flags, "--max_iters", 1, "--performance", cwd=tmp_path)
    assert (tmp_path / "output/0/FCN_prof/FCN_bs2_1p_acc.log").exists()


def test_mixed_precision_on_a_cpu_is_bfloat16(drawn_voc, tmp_path):
    plain = train(drawn_voc, tmp_path / "plain", "--max_iters", 3).stdout
    mixed = train(drawn_voc, tmp_path / "mixed", "--max_iters", 3, "--amp").stdout
    level0 = train(drawn_voc, tmp_path / "level0", "--max_iters", 3, "--amp", "--opt_level", "O0").stdout
    assert "bfloat16" in mixed and "float32" in plain and "float32" in level0
    a, b, c = (timeless(metrics(tmp_path / name)) for name in ("plain", "mixed", "level0"))
    assert a == c and a != b and a[0]["loss"] == pytest.approx(b[0]["loss"], rel=0.02)


def test_fine_tuning_starts_from_a_checkpoint_of_ours(finished, drawn_voc, tmp_path):
    output = train(drawn_voc, tmp_path / "run", "--max_iters", 1, "--pretrained", finished[0] / "ckpt/best.pth").stdout
    assert "best.pth: a checkpoint of train.py" in output
    assert metrics(tmp_path / "run")[0]["loss"] < metrics(finished[0])[0]["loss"]


def test_ignored_pixels_count_in_the_denominator():
    """By hand: 4 pixels, 2 of them void, uniform logits over 3 classes: 2 log(3) / 4."""
    labels = torch.tensor([[[0, 255], [255, 2]]], dtype=torch.uint8)
    outputs = {"out": torch.zeros(1, 3, 2, 2), "aux": torch.zeros(1, 3, 2, 2)}
    expected = torch.tensor(3.0).log() / 2
    torch.testing.assert_close(losses_of(outputs, labels), torch.stack([1.4 * expected, expected, expected]))


def test_the_batches_of_a_long_training_are_not_made_in_memory():
    """Three million iterations on 8 cards, resumed from the second million: only what is asked for is computed."""
    batches = batch_order(first=2 ** 20 * 128, last=3_000_000 * 128, batch_size=16, rank=7, world_size=8)
    assert [next(batches), next(batches)] == [range(start, start + 16) for start in (
        2 ** 20 * 128 + 112, 2 ** 20 * 128 + 240)]
    assert len(list(batch_order(first=0, last=40 * 128, batch_size=8, accumulate=2, rank=7, world_size=8))) == 80


@pytest.mark.parametrize("flag", ("--train_split", "--val_split", "--data_path", "--classes", "--pretrained",
                                  "--work_dir", "--resume", "--addr", "--local_addr", "--class_weights"))
def test_an_empty_value_is_a_usage_error(drawn_voc, tmp_path, flag):
    """As an unset variable of a shell gives it."""
    line = error_line(ROOT / "train.py", *train_flags(drawn_voc, tmp_path / "run"), flag, "", status=2)
    assert f"{flag}: takes a value, not ''" in line and not (tmp_path / "run").exists()


def test_a_picture_that_cannot_be_drawn_does_not_end_a_training(drawn_voc, tmp_path, monkeypatch, pictures):
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # its import fails
    output = train(drawn_voc, tmp_path / "run", "--max_iters", 1).stdout
    assert "could not be drawn: import of matplotlib" in output and (tmp_path / "run/result.json").exists()


def test_an_empty_folder_to_convert_into_is_a_usage_error(tmp_path):
    assert "takes a value, not ''" in error_line(ROOT / "convert_voc_aug.py", tmp_path, tmp_path, "-o", "", status=2)
