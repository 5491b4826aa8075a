"""That each part of tools/benchmark.py runs, on a tiny network and few steps; its figures are not looked at."""
import functools

import benchmark
import on_gpu
import pytest
import speeds
import torch

CPU = torch.device("cpu")


@pytest.fixture
def nothing_stays_behind():
    """Replaces the check of conftest.py: torch.compile keeps a pool of threads, and sets variables, as OpenCV does."""


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(speeds, "BACKBONE", "tiny_d8")
    monkeypatch.setattr(speeds, "SCALE", (256, 64))
    monkeypatch.setattr(speeds, "TURNS", 1)
    monkeypatch.setattr(on_gpu, "TURNS", 1)
    monkeypatch.setattr(speeds, "CPU_MATRIX", 256)
    monkeypatch.setattr(speeds, "CPU_SIDE", 64)
    monkeypatch.setattr(on_gpu, "cudnn_turn", lambda device, data, *flags: (1.0, 0, [1.0], 1.0))
    monkeypatch.setattr(on_gpu, "in_own_process", lambda work, *arguments: on_gpu.cudnn_turn(*arguments))
    # C++ code would take a minute; test_speed.py compiles some.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))


@pytest.mark.parametrize("part", benchmark.ON_GPU)
def test_each_part_compares_ways_to_run_a_step(part, short, drawn_voc):
    rows = list(getattr(on_gpu, part)(on_gpu.Bench(CPU, drawn_voc)))
    assert len(rows) >= 2 or part == "waits"
    assert all(len(row) == len(on_gpu.COLUMNS) for row in rows)


def test_a_step_and_an_evaluation_are_measured(short, drawn_voc):
    rows = [*speeds.steps(CPU, drawn_voc, "tiny_d8"), *speeds.evaluation(CPU, drawn_voc)]
    assert [row[0].split(",")[0] for row in rows] == [
        *["tiny_d8 step", "tiny_d8 network alone"] * (2 if speeds.CPU_MIXES else 1),
        *["evaluation"] * speeds.CPU_MIXES, "evaluation outside the network", "confusion matrix"]
    assert all(len(row) == len(speeds.COLUMNS) for row in rows)


def test_a_part_that_fails_keeps_the_rows_before_it(drawn_voc):
    """As the child that measures does: of a data folder that is not there."""
    rows = list(benchmark.rows_of("on_gpu", "waits", "cpu", drawn_voc / "absent"))
    assert rows == [("waits", "ended with status 1: its time limit, want of memory, or the error above")]
    assert [row[:2] for row in benchmark.rows_of("on_gpu", "waits", "cpu", drawn_voc)] == [("waits", "CUDA only")]
