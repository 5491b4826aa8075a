"""A step that is left out, as its loss or gradients are NaN or Inf, leaves no trace."""
import pytest
import torch
from conftest import ROOT, metrics, run, state, train_flags

SPOIL, TRAIN = ROOT / "tests/spoiled_steps.py", ROOT / "train.py"
EACH = ("--checkpoint_interval", 1, "--eval_interval", 1, "--keep", 9)


def train(data, work_dir, what, value, steps, *flags, ranks=1, status=0):
    """-> the finished command"""
    starter = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", ranks) if ranks > 1 else ()
    return run(*starter, SPOIL, what, value, steps, TRAIN, *train_flags(data, work_dir), *flags, status=status)


def same_network(work_dir, one, other):
    """Whether two checkpoints have the same parameters, BN statistics and momentum."""
    a, b = (state(work_dir / f"ckpt/iter_{number}.pth") for number in (one, other))
    momentum = [[values["momentum_buffer"] for values in part["optimizer"]["state"].values()] for part in (a, b)]
    return all(torch.equal(value, b["state_dict"][key]) for key, value in a["state_dict"].items()) and all(
        torch.equal(*pair) for pair in zip(*momentum, strict=True))


@pytest.mark.parametrize("amp", ((), ("--amp",)))
def test_infinite_gradients_change_nothing(amp, drawn_voc, tmp_path):
    train(drawn_voc, tmp_path / "run", "gradient", "inf", "3", *EACH, *amp)
    assert same_network(tmp_path / "run", 2, 3) and not same_network(tmp_path / "run", 3, 4)


def test_a_forward_that_is_nan_changes_no_statistics(drawn_voc, tmp_path):
    """The run goes on as one whose statistics were finite in that step, and its loss alone NaN."""
    networks = []
    for what in ("input", "loss"):
        train(drawn_voc, tmp_path / what, what, "nan", "3", *EACH)
        networks.append(state(tmp_path / what / "ckpt/iter_4.pth")["state_dict"])
    assert all(value.isfinite().all() and torch.equal(value, networks[1][key]) for key, value in networks[0].items())


def test_a_loss_that_overflows_with_finite_gradients_changes_nothing(drawn_voc, tmp_path):
    train(drawn_voc, tmp_path / "run", "sum", "inf", "2", *EACH)
    assert [line["skipped_steps"] for line in metrics(tmp_path / "run") if "loss" in line] == [0, 1, 1, 1]
    networks = [state(tmp_path / f"run/ckpt/iter_{number}.pth")["state_dict"] for number in (1, 3, 4)]
    train(drawn_voc, tmp_path / "twin", "loss", "nan", "2", *EACH)
    twin = [state(tmp_path / f"twin/ckpt/iter_{number}.pth")["state_dict"] for number in (1, 3, 4)]
    assert all(torch.equal(value, b[key]) for a, b in zip(networks, twin, strict=True) for key, value in a.items())


@pytest.mark.parametrize("what", ("gradient", "input"))
def test_a_step_is_left_out_on_all_ranks(what, drawn_voc, tmp_path):
    """Though only rank 1, whose network no checkpoint holds, has NaN: rank 0 neither takes the step nor keeps its
    statistics, and later steps are whole."""
    train(drawn_voc, tmp_path / "run", what, "nan", "3/1", *EACH, ranks=2)
    assert same_network(tmp_path / "run", 2, 3) and not same_network(tmp_path / "run", 3, 4)
    assert [line["skipped_steps"] for line in metrics(tmp_path / "run") if "loss" in line] == [0, 0, 1, 1]


@pytest.mark.parametrize("log_interval, iteration", ((4, 12), (1000, 50)))
def test_ten_nan_steps_end_the_run_at_the_next_log_line(log_interval, iteration, drawn_voc, tmp_path):
    """At the latest after 50 iterations."""
    steps = ",".join(map(str, range(2, 100)))
    done = train(drawn_voc, tmp_path / "run", "loss", "nan", steps, "--max_iters", 100, "--log_interval", log_interval,
                 status=1)
    assert done.stderr.startswith("train.py: error: the loss was NaN or Inf for")
    assert f"at iteration {iteration};" in done.stderr and len(done.stderr.splitlines()) == 1


def test_the_message_after_a_signal_says_what_was_saved(drawn_voc, tmp_path):
    flags = ("--checkpoint_interval", 2, "--max_iters", 9)
    done = train(drawn_voc, tmp_path / "run", "loss", "nan", "3,4!", *flags, status=143)
    assert done.stdout.splitlines()[-1] == (
        "stopped by SIGTERM at iteration 4; the last checkpoint is of iteration 2, from which --resume auto goes on")
    assert state(tmp_path / "run/ckpt/latest.pth")["progress"]["iteration"] == 2
    done = train(drawn_voc, tmp_path / "none", "loss", "nan", "1!", *flags, status=143)
    assert done.stdout.splitlines()[-1] == "stopped by SIGTERM at iteration 1; no checkpoint was saved yet"
