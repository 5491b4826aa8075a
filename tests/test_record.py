"""Runs of --performance: what they may overwrite, and when there is nothing to measure."""
import pytest
from conftest import ROOT, error_line, metrics, read, run, train, train_flags

TRAIN = ROOT / "train.py"


def test_a_second_performance_run_measures_anew(drawn_voc, tmp_path):
    """In the same folder, which is that of another run no more than it can be resumed."""
    for iterations in (4, 2):
        train(drawn_voc, tmp_path / "run", "--max_iters", iterations, "--performance")
    assert [line["iter"] for line in metrics(tmp_path / "run") if "loss" in line] == [1, 2]
    assert read(tmp_path / "run/train_0.log").count("device: ") == read(tmp_path / "run/run.json").count('"time"') == 1
    assert {path.name for path in (tmp_path / "run/ckpt").iterdir()} == {"iter_2.pth", "latest.pth", "best.pth"}
    for flags in ((), ("--resume", "auto")):
        line = error_line(TRAIN, *train_flags(drawn_voc, tmp_path / "run"), *flags)
        assert "holds a --performance run, which cannot be resumed" in line


def test_a_performance_run_overwrites_no_other(drawn_voc, tmp_path):
    train(drawn_voc, tmp_path / "run")
    files = [path for path in tmp_path.rglob("*") if path.name != ".lock"]
    before = [path.stat().st_mtime_ns for path in files]
    line = error_line(TRAIN, *train_flags(drawn_voc, tmp_path / "run"), "--performance")
    assert "holds a run already; name another folder" in line
    assert [path.stat().st_mtime_ns for path in files] == before


@pytest.mark.parametrize("flags, words", (
    (("--resume", "auto"), "--performance and --resume do not go together"),
    (("--max_iters", 100, "--checkpoint_interval", 1), "--checkpoint_interval 1: pauses so often"),
    (("--max_iters", 100, "--eval_interval", 5), "--eval_interval 5: pauses so often")))
def test_what_leaves_nothing_to_measure_is_a_usage_error(flags, words):
    assert words in run(TRAIN, "--data_path", "d", "--performance", *flags, status=2).stderr
