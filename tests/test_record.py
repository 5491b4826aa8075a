"""Runs of --performance: what they leave, what they may overwrite, and when there is nothing to measure."""

import pytest
from conftest import ROOT, error_line, metrics, read, run, train, train_flags

TRAIN = ROOT / "train.py"


def test_a_second_performance_run_measures_anew(drawn_voc, tmp_path):
    """It writes no checkpoint and names none, so that its folder may be overwritten, by itself and by any other run."""
    work_dir = tmp_path / "run"
    for iterations in (4, 2):
        output = train(drawn_voc, work_dir, "--max_iters", iterations, "--performance").stdout
        assert "best.pth" not in output and "evaluate.py" not in output and output == read(work_dir / "train_0.log")
    assert [line["iter"] for line in metrics(work_dir) if "loss" in line] == [1, 2]
    assert read(work_dir / "run.json").count('"time"') == 1
    assert not list(work_dir.rglob("*.pth")) and (work_dir / "FCN_bs2_1p_acc.log").exists()
    output = train(drawn_voc, work_dir, "--max_iters", 1, "--resume", "auto").stdout
    assert "from random weights\n" in output and (work_dir / "ckpt/best.pth").exists()
    assert [line["iter"] for line in metrics(work_dir)] == [1, 1] and read(work_dir / "run.json").count('"time"') == 1


def test_a_missing_font_is_noted_where_pictures_are_drawn(drawn_voc, tmp_path, monkeypatch, pictures):
    monkeypatch.setattr("visualize.missing_font", lambda names: "no font")
    assert "note: no font\n" in train(drawn_voc, tmp_path / "run", "--max_iters", 1).stdout
    assert "no font" not in train(drawn_voc, tmp_path / "speed", "--max_iters", 1, "--performance").stdout


def test_a_performance_run_overwrites_no_other(drawn_voc, tmp_path):
    train(drawn_voc, tmp_path / "run")
    files = [path for path in tmp_path.rglob("*") if path.name != ".lock"]
    before = [path.stat().st_mtime_ns for path in files]
    line = error_line(TRAIN, *train_flags(drawn_voc, tmp_path / "run"), "--performance")
    assert "holds a run already; " in line and "another folder by --work_dir" in line
    assert [path.stat().st_mtime_ns for path in files] == before


@pytest.mark.parametrize("flags, words", (
    (("--resume", "auto"), "--performance and --resume do not go together"),
    (("--max_iters", 100, "--checkpoint_interval", 1), "--checkpoint_interval 1: pauses so often"),
    (("--max_iters", 100, "--eval_interval", 5), "--eval_interval 5: pauses so often")))
def test_what_leaves_nothing_to_measure_is_a_usage_error(flags, words):
    assert words in run(TRAIN, "--data_path", "d", "--performance", *flags, status=2).stderr
