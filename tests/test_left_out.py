"""A step that is left out, as its loss or gradients are NaN or Inf, leaves no trace."""
import pytest
import torch
from conftest import ROOT, free_port, metrics, run, state, train_flags
from spoiled_steps import spoiled

EACH = ("--checkpoint_interval", 1, "--eval_interval", 4, "--keep", 9)


def train(data, work_dir, plan, *flags, status=0):
    """A training, some of whose steps go wrong. -> the finished command"""
    with spoiled(plan):
        return run(ROOT / "train.py", *train_flags(data, work_dir), *flags, status=status)


def skipped(work_dir):
    return [line["skipped_steps"] for line in metrics(work_dir) if "loss" in line]


def same_network(work_dir, one, other):
    """Whether two checkpoints have the same parameters, BN statistics and momentum."""
    a, b = (state(work_dir / f"ckpt/iter_{number}.pth") for number in (one, other))
    momentum = [[values["momentum_buffer"] for values in part["optimizer"]["state"].values()] for part in (a, b)]
    return all(torch.equal(value, b["state_dict"][key]) for key, value in a["state_dict"].items()) and all(
        torch.equal(*pair) for pair in zip(*momentum, strict=True))


@pytest.mark.parametrize("amp", ((), ("--amp",)))
def test_infinite_gradients_change_nothing(amp, drawn_voc, tmp_path):
    train(drawn_voc, tmp_path / "run", "gradient inf 3", *EACH, *amp)
    assert same_network(tmp_path / "run", 2, 3) and not same_network(tmp_path / "run", 3, 4)


def test_a_forward_that_is_nan_changes_no_statistics(drawn_voc, tmp_path):
    """The run continues as one whose statistics were finite in that step, and its loss alone NaN."""
    networks = []
    for what in ("input", "loss"):
        train(drawn_voc, tmp_path / what, f"{what} nan 3", *EACH)
        networks.append(state(tmp_path / what / "ckpt/iter_4.pth")["state_dict"])
    assert all(value.isfinite().all() and torch.equal(value, networks[1][key]) for key, value in networks[0].items())


def test_a_loss_that_overflows_with_finite_gradients_changes_nothing(drawn_voc, tmp_path):
    train(drawn_voc, tmp_path / "run", "sum inf 2", *EACH)
    assert skipped(tmp_path / "run") == [0, 1, 1, 1]
    networks = [state(tmp_path / f"run/ckpt/iter_{number}.pth")["state_dict"] for number in (1, 3, 4)]
    train(drawn_voc, tmp_path / "twin", "loss nan 2", *EACH)
    twin = [state(tmp_path / f"twin/ckpt/iter_{number}.pth")["state_dict"] for number in (1, 3, 4)]
    assert all(torch.equal(value, b[key]) for a, b in zip(networks, twin, strict=True) for key, value in a.items())


def test_a_step_is_left_out_on_all_ranks(drawn_voc, tmp_path):
    """Though only rank 1, whose network no checkpoint holds, has NaN, in step 3 in a gradient, in step 5 in all: rank 0
    neither takes these steps nor keeps their statistics, and the steps after them are whole."""
    run(ROOT / "tests/forked_ranks.py", 2, free_port(), "gradient nan 3/1; input nan 5/1",
        *train_flags(drawn_voc, tmp_path / "run"), *EACH, "--max_iters", 6, "--eval_interval", 6)
    assert [same_network(tmp_path / "run", number, number + 1) for number in range(2, 6)] == [True, False, True, False]
    assert skipped(tmp_path / "run") == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("log_interval, iteration", ((4, 12), (1000, 50)))
def test_ten_nan_steps_end_the_run_at_the_next_log_line(log_interval, iteration, drawn_voc, tmp_path):
    """At the latest after 50 iterations."""
    steps = ",".join(map(str, range(2, 100)))
    done = train(drawn_voc, tmp_path / "run", f"loss nan {steps}", "--max_iters", 100, "--log_interval", log_interval,
                 status=1)
    assert done.stderr.startswith("train.py: error: the loss was NaN or Inf for")
    assert f"at iteration {iteration};" in done.stderr and len(done.stderr.splitlines()) == 1


def test_a_loss_that_stays_nan_stops_the_run_and_spares_the_checkpoints(drawn_voc, tmp_path):
    """NaN from step 3 on, but for step 5, after which the count begins anew: ten in a row are full at step 15. The
    checkpoints asked for meanwhile are not written, but for the one of step 5."""
    steps = ",".join(str(step) for step in range(3, 25) if step != 5)
    done = train(drawn_voc, tmp_path / "run", f"loss nan {steps}", "--max_iters", 24, "--checkpoint_interval", 1,
                 "--eval_interval", 24, status=1)
    assert done.stderr.startswith("train.py: error: the loss was NaN or Inf for 10 steps in a row, at iteration 15;")
    assert len(done.stderr.splitlines()) == 1
    losses = [line["loss"] for line in metrics(tmp_path / "run") if "loss" in line]
    assert [number for number, loss in enumerate(losses, 1) if loss is not None] == [1, 2, 5]
    assert skipped(tmp_path / "run")[-1] == 12
    names = sorted(path.name for path in (tmp_path / "run/ckpt").glob("iter_*"))
    assert names == ["iter_1.pth", "iter_2.pth", "iter_5.pth"]
    last = state(tmp_path / "run/ckpt/latest.pth")
    assert last["progress"]["iteration"] == 5 and all(v.isfinite().all() for v in last["state_dict"].values())


def test_the_message_after_a_signal_says_what_was_saved(drawn_voc, tmp_path):
    flags = ("--checkpoint_interval", 2, "--max_iters", 9)
    done = train(drawn_voc, tmp_path / "run", "loss nan 3,4!", *flags, status=143)
    last = done.stdout.splitlines()[-1]
    assert last.startswith("stopped by SIGTERM at iteration 4;") and last.endswith("iteration 2")
    assert state(tmp_path / "run/ckpt/latest.pth")["progress"]["iteration"] == 2
    done = train(drawn_voc, tmp_path / "none", "loss nan 1!", *flags, status=143)
    assert done.stdout.splitlines()[-1] == "stopped by SIGTERM at iteration 1; last checkpoint: none"
