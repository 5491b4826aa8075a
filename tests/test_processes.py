"""Several processes, real ones with gloo on the CPU: they train as one, score as one, stop together, and come back."""
import json
import os
import random
import signal

import numpy as np
import pytest
import torch
from conftest import (
    ROOT,
    assert_same_run,
    children_of,
    drawing,
    finish,
    free_port,
    metrics,
    run,
    start,
    state,
    train,
    train_flags,
    wait_for_iteration,
)
from PIL import Image

from data import train_batches
from device import Ranks
from train import parse_args
from voc import VOC

ITERATIONS = 15
FLAGS = ("--max_iters", ITERATIONS, "--checkpoint_interval", 3, "--eval_interval", 6)


@pytest.fixture(scope="module")
def two_ranks(drawn_voc, tmp_path_factory):
    """The folder of a finished run of two processes."""
    work_dir = tmp_path_factory.mktemp("two") / "run"
    with drawing():
        train(drawn_voc, work_dir, *FLAGS, "--device_list", "0,1")
    return work_dir


def test_the_files_of_two_ranks(two_ranks):
    assert sorted(path.name for path in two_ranks.iterdir()) == [
        ".lock", "FCN_bs2_2p_acc.log", "ckpt", "confusion.png", "curves.png", "data.png", "metrics.jsonl",
        "result.json", "run.json", "train_0,1.log", "train_batch.png", "val_samples.png"]
    assert sorted(path.name for path in (two_ranks / "ckpt").iterdir()) == [
        "best.pth", "iter_12.pth", "iter_15.pth", "iter_9.pth", "latest.pth"]  # --keep 3
    assert "RankSize = 2\n" in (two_ranks / "FCN_bs2_2p_acc.log").read_text()


def test_two_machines_are_one_with_all_the_ranks(two_ranks, drawn_voc, own_drawn_voc, tmp_path):
    """Each has a data folder of its own."""
    (own_drawn_voc / "moved").mkdir()  # nothing that a run reads
    where = ("--nnodes", 2, "--master_addr", "127.0.0.1", "--master_port", free_port(), "--device_list", 0)
    machines = [start(folder, tmp_path / f"machine{rank}", *FLAGS, *where, "--node_rank", rank)
                for rank, folder in enumerate((drawn_voc, own_drawn_voc))]
    for machine in machines:
        finish(machine, 0)
    assert_same_run(tmp_path / "machine0", two_ranks)
    assert not (tmp_path / "machine1").exists()  # only rank 0 writes


def test_a_failed_and_a_killed_rank_come_back_and_a_stopped_run_goes_on(two_ranks, drawn_voc, tmp_path):
    """torchrun starts both anew from the latest checkpoint. SIGTERM to one, though, stops both at one iteration, which
    is saved, and the status is the signal's. Resumed with other workers, it is as if nothing happened."""
    work_dir, moment, fault = tmp_path / "run", random.randint(1, 4), tmp_path / "fault"
    print(f"killed after iteration {moment}")  # shown where the test fails
    fault.write_text("bug 1")
    process = start(drawn_voc, work_dir, *FLAGS, "--device_list", "0,1", "--max_restarts", 3, "--resume", "auto",
                    env={"PYTHONPATH": str(ROOT / "tests/faulty"), "FAULT": str(fault)})
    wait_for_iteration(process, work_dir, moment)
    os.kill(random.choice(children_of(process.pid)), signal.SIGKILL)
    wait_for_iteration(process, work_dir, 8)
    os.kill(random.choice(children_of(process.pid)), signal.SIGTERM)
    output = finish(process, 128 + signal.SIGTERM)
    # The first start may fail before or after rank 0 says what it is.
    assert "RuntimeError: a bug" in output and output.count("\ntraining: 15 iterations") in (2, 3)
    assert "stopped by SIGTERM at iteration" in output.splitlines()[-1] and ", which is saved" in output
    stopped_at = state(work_dir / "ckpt/latest.pth")["progress"]["iteration"]
    assert 8 <= stopped_at < ITERATIONS and metrics(work_dir)[-1]["iter"] == stopped_at
    train(drawn_voc, work_dir, *FLAGS, "--device_list", "0,1", "--resume", "auto", "--workers", 1)
    assert_same_run(work_dir, two_ranks)


SCORE = """
import sys
import numpy as np
import torch
from data import val_batches
from device import join_ranks
from fcn8s import FCN8s
from forked_ranks import fork
from inference import Protocol, evaluate
from train import parse_args
from voc import VOC

data, folder, *ports = sys.argv[1:]
args, protocol = parse_args(["--data_path", data, "--device", "cpu"]), Protocol((256, 64))
args.timeout = 60


def score():
    ranks = join_ranks(args)
    torch.manual_seed(0)
    model, voc = FCN8s(21, "tiny"), VOC(data, "val")
    for buffer in model.buffers():
        buffer += ranks.rank  # each has BN statistics of its own
    confusion = evaluate(model, val_batches(voc, voc.check(21), protocol, 1, ranks), protocol, ranks)
    np.save(f"{folder}/{ranks.count}_{ranks.rank}.npy", confusion)
    torch.distributed.destroy_process_group() if ranks.count > 1 else None


for count, port in zip((1, 2, 3, 4), ports, strict=True):
    fork(count, port, score)
"""


def test_1_to_4_ranks_score_every_image_once(drawn_voc, tmp_path):
    (tmp_path / "score.py").write_text(SCORE)
    run(tmp_path / "score.py", drawn_voc, tmp_path, *(free_port() for _ in range(4)), env={"OMP_NUM_THREADS": "1"})
    alone = np.load(tmp_path / "1_0.npy")
    for count in (2, 3, 4):
        for rank in range(count):
            np.testing.assert_array_equal(np.load(tmp_path / f"{count}_{rank}.npy"), alone)
    ids = (drawn_voc / "ImageSets/Segmentation/val.txt").read_text().split()
    labels = [np.array(Image.open(drawn_voc / f"SegmentationClass/{name}.png")) for name in ids]
    assert len(ids) == 5 and alone.sum() == sum((label != 255).sum() for label in labels)


def test_several_ranks_give_the_scores_of_one_and_the_summary(two_ranks, drawn_voc, tmp_path):
    """And those of the training's own evaluation; the scale is the checkpoint's."""
    found, flags = [], ("--data_path", drawn_voc, "--device", "cpu", "--json", tmp_path / "scores.json")
    for cards, devices in ((1, ()), (2, ("--device_list", "0,1"))):
        run(ROOT / "evaluate.py", two_ranks / "ckpt/latest.pth", *flags, *devices)
        scores = json.loads((tmp_path / "scores.json").read_text())
        found.append({name: value for name, value in scores.items() if "second" not in name})
        lines = (two_ranks / f"FCN_bs1_{cards}p_val.log").read_text().splitlines()
        summary = dict(line.split(" = ") for line in lines)
        assert summary["RankSize"] == str(cards) and summary["CaseName"] == f"FCN_bs1_{cards}p_val"
        assert float(summary["mIoU"]) == pytest.approx(metrics(two_ranks)[-1]["mIoU"] / 100, abs=1e-12)
        assert float(summary["ActualFPS"]) == pytest.approx(scores["images_per_second"])
        assert float(summary["E2EValTime"]) >= scores["seconds"] > 0
        assert float(summary["ValTime"]) == pytest.approx(1000 * cards * scores["seconds"] / 5)  # ms, one of each card
    assert found[0] == found[1] and found[0]["images"] == 5 and found[0]["mIoU"] == metrics(two_ranks)[-1]["mIoU"]
    assert not list((two_ranks / "ckpt").glob("*.log"))


def test_two_ranks_train_as_one_of_twice_the_batch(drawn_voc, tmp_path):
    """In two batches, whose gradients add up; of a network without BN, whose statistics are each rank's own."""
    flags = ("--backbone", "tiny_plain", "--max_iters", 5, "--crop_size", 32, "--scale", 128, 32)
    train(drawn_voc, tmp_path / "one", *flags, "--batch_size", 4)
    run(ROOT / "tests/forked_ranks.py", 2, free_port(), "", *train_flags(drawn_voc, tmp_path / "two"), *flags,
        "--batch_size", 1, "--accumulate", 2)
    train(drawn_voc, tmp_path / "start", *flags, "--batch_size", 4, "--max_iters", 1)
    one, two, first = (torch.cat([value.ravel() for value in state(tmp_path / name / "ckpt/latest.pth")[
        "state_dict"].values()]) for name in ("one", "two", "start"))
    assert (one - two).abs().max() <= 1e-5 and (one - first).abs().max() > 1e-3  # parameters went so far


def test_rank_slices_make_up_the_global_batches(drawn_voc):
    args = parse_args(["--data_path", str(drawn_voc), "--crop_size", "32", "--scale", "128", "32", "--seed", "3",
                       "--workers", "0"])
    voc, cpu = VOC(drawn_voc, "trainaug"), torch.device("cpu")

    def batches(batch_size, **place):
        args.batch_size = batch_size
        return list(train_batches(voc, args, 0, 20, Ranks(cpu, **place)))

    whole, *ranks = batches(4), batches(2, rank=0, count=2), batches(2, rank=1, count=2)
    assert len(whole) == len(ranks[0]) == len(ranks[1]) == 5
    for batch, first, second in zip(whole, *ranks, strict=True):
        for key, value in batch.items():
            torch.testing.assert_close(torch.cat([first[key], second[key]]), value, rtol=0, atol=0)
