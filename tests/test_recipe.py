"""The flags of the recipe that change a step: gradients over several batches, frozen BN, weights of classes."""
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, error_line, metrics, run, state, timeless, train, train_flags
from spoiled_steps import spoiled

import train as train_module
from train import losses_of
from voc import IGNORE

TRAIN = ROOT / "train.py"
STEPS = ("--max_iters", 4, "--batch_size", 4, "--freeze_bn")


def weights(work_dir):
    return state(work_dir / "ckpt/latest.pth")["state_dict"]


def assert_close(ours, theirs, tolerance):
    for key, value in weights(ours).items():
        torch.testing.assert_close(value, weights(theirs)[key], rtol=tolerance, atol=tolerance)


@pytest.fixture(scope="module")
def one_batch(drawn_voc, tmp_path_factory):
    """The folder of a run whose batches of 4 images go through the network as a whole."""
    work_dir = tmp_path_factory.mktemp("one") / "run"
    train(drawn_voc, work_dir, *STEPS)
    return work_dir


@pytest.mark.parametrize("flags", [("--batch_size", 2, "--accumulate", 2), ("--batch_size", 1, "--accumulate", 4)],
                         ids=str)
def test_accumulated_batches_are_one_batch(drawn_voc, one_batch, tmp_path, flags):
    """With frozen BN, whose statistics would be those of each batch, the steps are the same, and so is the log."""
    output = train(drawn_voc, tmp_path, *STEPS, *flags).stdout
    assert "= 4 images" in output
    assert_close(tmp_path, one_batch, 1e-5)
    losses = [[line["loss"] for line in metrics(folder) if "loss" in line] for folder in (one_batch, tmp_path)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_the_device_holds_one_of_the_accumulated_batches_at_a_time(drawn_voc, tmp_path, monkeypatch):
    alive, prepare, most = set(), train_module.prepare_batch, []

    def preparing(*arguments):
        images, labels = prepare(*arguments)
        alive.add(number := len(most))
        weakref.finalize(images, alive.discard, number)
        most.append(len(alive))
        return images, labels
    monkeypatch.setattr("train.prepare_batch", preparing)
    train(drawn_voc, tmp_path, "--accumulate", 4, "--max_iters", 1)
    assert len(most) == 4 and max(most) <= 2  # the one before is let go of once its successor is there


def test_an_accumulating_run_resumes_exactly(drawn_voc, tmp_path):
    flags = ("--accumulate", 2, "--max_iters", 4, "--checkpoint_interval", 2)
    train(drawn_voc, tmp_path / "whole", *flags)
    train(drawn_voc, tmp_path / "part", *flags, "--resume", tmp_path / "whole/ckpt/iter_2.pth")
    whole, part = weights(tmp_path / "whole"), weights(tmp_path / "part")
    assert all(torch.equal(value, whole[key]) for key, value in part.items())
    # Two log lines and an evaluation.
    assert timeless(metrics(tmp_path / "part")) == timeless(metrics(tmp_path / "whole"))[-3:]
    output = train(drawn_voc, tmp_path / "other", *flags, "--accumulate", 1, "--resume",
                   tmp_path / "whole/ckpt/iter_2.pth").stdout
    assert "--accumulate 2 -> 1" in output
    samples = [state(tmp_path / f"{name}/ckpt/latest.pth")["progress"]["samples"] for name in ("whole", "other")]
    assert samples == [16, 8 + 4]


def test_an_infinite_gradient_in_one_batch_undoes_the_whole_step(drawn_voc, tmp_path):
    """The second batch of step 2 is spoiled: the run ends with the weights, momentum and BN statistics of step 1."""
    flags = (*train_flags(drawn_voc, tmp_path / "run"), "--accumulate", 2, "--max_iters", 2, "--checkpoint_interval", 1)
    with spoiled("gradient inf 4"):
        run(TRAIN, *flags)
    first, second = (state(tmp_path / f"run/ckpt/iter_{number}.pth") for number in (1, 2))
    assert all(torch.equal(value, second["state_dict"][key]) for key, value in first["state_dict"].items())
    for number, values in first["optimizer"]["state"].items():
        assert torch.equal(values["momentum_buffer"], second["optimizer"]["state"][number]["momentum_buffer"])
    assert [line["skipped_steps"] for line in metrics(tmp_path / "run") if "loss" in line] == [0, 1]


def test_frozen_bn_keeps_its_statistics_and_still_learns(drawn_voc, tmp_path):
    train(drawn_voc, tmp_path / "start", "--max_iters", 1)
    start = tmp_path / "start/ckpt/latest.pth"
    train(drawn_voc, tmp_path / "frozen", "--freeze_bn", "--pretrained", start, "--eval_interval", 2)
    before, after = weights(tmp_path / "start"), weights(tmp_path / "frozen")
    for key, value in before.items():
        assert torch.equal(value, after[key]) == ("running" in key or "batches" in key or "upscore" in key), key


def test_class_weights_weigh_the_sum_and_not_the_number_of_pixels():
    rng = np.random.default_rng(0)
    logits = torch.from_numpy(rng.normal(size=(2, 3, 5, 7)).astype(np.float32))
    labels = torch.from_numpy(rng.choice([0, 1, 2, IGNORE], (2, 5, 7)).astype(np.uint8))
    weight = torch.tensor([0.5, 2.0, 3.0])
    probability = F.softmax(logits, 1).numpy()
    expected = sum(-float(weight[c]) * np.log(probability[n, c, y, x])
                   for (n, y, x), c in np.ndenumerate(labels.numpy()) if c != IGNORE) / labels.numel()
    assert losses_of({"out": logits}, labels, weight)[0].item() == pytest.approx(expected, rel=1e-5)


def test_class_weights_of_a_file_change_the_training(drawn_voc, tmp_path):
    (tmp_path / "weights.txt").write_text("".join("0.1\n" if i == 0 else "1\n" for i in range(21)))
    train(drawn_voc, tmp_path / "plain", "--max_iters", 1)
    train(drawn_voc, tmp_path / "weighted", "--max_iters", 1, "--class_weights", tmp_path / "weights.txt")
    plain, weighted = (metrics(tmp_path / name)[0]["loss"] for name in ("plain", "weighted"))
    assert weighted < 0.9 * plain
    (tmp_path / "short.txt").write_text("1\n2\n")
    flags = train_flags(drawn_voc, tmp_path / "run")
    assert "names 2 numbers, the data has 21 classes" in error_line(TRAIN, *flags, "--class_weights",
                                                                     tmp_path / "short.txt")
    (tmp_path / "short.txt").write_text("one\n")
    assert "not 'one'" in error_line(TRAIN, *flags, "--class_weights", tmp_path / "short.txt", status=2)
    assert not (tmp_path / "run").exists()


def test_the_ports_evaluation_while_training_is_evaluate_pys(drawn_voc, tmp_path):
    flags = ("--scale", 64, 64, "--pad_to", 64)
    train(drawn_voc, tmp_path / "run", "--max_iters", 2, *flags)
    evaluate = (ROOT / "evaluate.py", tmp_path / "run/ckpt/latest.pth", "--data_path", drawn_voc, "--device", "cpu")
    score = metrics(tmp_path / "run")[-1]["mIoU"]
    for given in (flags, ()):  # without them they are the checkpoint's
        output = run(*evaluate, *given).stdout
        assert "fitted into 64x64, padded to 64x64, " in output and f"mIoU {score:.2f}" in output
    assert "do not fit" in error_line(TRAIN, *train_flags(drawn_voc, tmp_path / "other"), "--pad_to", 64)
