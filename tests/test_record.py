"""Runs of --performance: what they leave, what they may overwrite, and that they measure."""
import json

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


def test_a_performance_run_does_not_resume():
    words = "--performance and --resume do not go together"
    assert words in run(TRAIN, "--data_path", "d", "--performance", "--resume", "auto", status=2).stderr


def test_a_run_that_pauses_often_has_a_speed(drawn_voc, tmp_path):
    train(drawn_voc, tmp_path, "--performance", "--max_iters", 7, "--eval_interval", 1)
    assert json.loads(read(tmp_path / "result.json"))["fps"] > 0
