"""Several processes, real ones with gloo on the CPU: they train as one, score as one, stop together, and come back."""
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

ITERATIONS = 15
FLAGS = ("--max_iters", ITERATIONS, "--checkpoint_interval", 3, "--eval_interval", 6)


@pytest.fixture(scope="module")
def two_ranks(drawn_voc, tmp_path_factory):
    """The folder of a finished run of two processes."""
    work_dir = tmp_path_factory.mktemp("two") / "run"
    train(drawn_voc, work_dir, *FLAGS, "--device_list", "0,1")
    return work_dir


def test_the_files_of_two_ranks(two_ranks):
    assert sorted(path.name for path in two_ranks.iterdir()) == [
        ".lock", "FCN_bs2_2p_acc.log", "ckpt", "curves.png", "metrics.jsonl", "result.json", "run.json",
        "train_0,1.log", "val_samples.png"]
    assert sorted(path.name for path in (two_ranks / "ckpt").iterdir()) == [
        "best.pth", "iter_12.pth", "iter_15.pth", "iter_9.pth", "latest.pth"]  # --keep 3
    assert "RankSize = 2\n" in (two_ranks / "FCN_bs2_2p_acc.log").read_text()


def test_two_machines_are_one_with_all_the_ranks(two_ranks, drawn_voc, tmp_path):
    where = ("--nnodes", 2, "--master_addr", "127.0.0.1", "--master_port", free_port(), "--device_list", 0)
    machines = [start(drawn_voc, tmp_path / f"machine{rank}", *FLAGS, *where, "--node_rank", rank) for rank in (0, 1)]
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
    process = start(drawn_voc, work_dir, *FLAGS, "--device_list", "0,1", "--max_restarts", 3,
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


# Processes by a fork, so that PyTorch is imported once: fork(count, port, work) calls work(Processes) in each. What
# starts threads, such as a network, comes after the fork, as threads do not survive it.
FORK = """
import os, sys, torch
from precision import Precision
from processes import Processes

CPU = torch.device("cpu")


def fork(count, port, work):
    children = []
    for rank in range(count):
        child = os.fork()
        if child == 0:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count), MASTER_PORT=str(port),
                              MASTER_ADDR="127.0.0.1")
            processes = Processes()
            processes.join(CPU, 60)
            work(processes)
            processes.leave()
            os._exit(0)
        children.append(child)
    assert all(os.waitpid(child, 0)[1] == 0 for child in children)


"""

SCORE = FORK + """
import numpy as np
from fcn8s import FCN8s
from inference import Protocol, evaluate
from voc import VOC

data, folder, *ports = sys.argv[1:]


def score(processes):
    torch.manual_seed(0)
    model, voc = FCN8s(21, "tiny"), VOC(data, "val")
    sizes = voc.check(21)
    for buffer in model.buffers():
        buffer += processes.rank  # each has BN statistics of its own
    confusion = evaluate(model, voc, sizes, Protocol((256, 64)), CPU, 1, processes)
    np.save(f"{folder}/{processes.count}_{processes.rank}.npy", confusion)


for count, port in zip((1, 2, 3, 4), ports, strict=True):
    fork(count, port, score)
"""

STEPS = FORK + """
import dataclasses
import fcn8s
from augment import TrainAugmentation, TrainStream
from train import from_args, parse_args
from trainer import Intervals, Recipe, Trainer
from voc import CLASSES, VOC

port, *sys.argv[1:] = sys.argv[1:]
args = parse_args()
recipe = from_args(Recipe, args)
stream = TrainStream(VOC(args.data_path, "trainaug"), TrainAugmentation(args.crop_size, args.scale), args.seed)


def network():
    torch.manual_seed(args.seed)
    return fcn8s.FCN8s(21, args.backbone)


def flat(model):
    return torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()])


def steps(processes):
    part = dataclasses.replace(recipe, batch_size=4 // processes.count, ranks=processes.count)
    trainer = Trainer(part, network(), CPU, Precision(CPU), processes, None, Intervals(5, 5, 5, 5), CLASSES)
    for batch in trainer.batches(stream, 0):
        trainer.step([batch])
        trainer.progress.iteration += 1
    assert trainer.progress.iteration == 5
    if processes.rank == 0:
        torch.save(flat(trainer.model), f"{args.work_dir}_{processes.count}.pth")


for count in (1, 2):
    fork(count, port, steps)
one, two = (torch.load(f"{args.work_dir}_{count}.pth") for count in (1, 2))
print(*(float((one - other).abs().max()) for other in (two, flat(network()))))
"""


def run_script(script, folder, *arguments):
    (folder / "script.py").write_text(script)
    return run(folder / "script.py", *arguments, env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}).stdout


def test_1_to_4_ranks_score_every_image_once(drawn_voc, tmp_path):
    run_script(SCORE, tmp_path, drawn_voc, tmp_path, *(free_port() for _ in range(4)))
    alone = np.load(tmp_path / "1_0.npy")
    for count in (2, 3, 4):
        for rank in range(count):
            np.testing.assert_array_equal(np.load(tmp_path / f"{count}_{rank}.npy"), alone)
    ids = (drawn_voc / "ImageSets/Segmentation/val.txt").read_text().split()
    labels = [np.array(Image.open(drawn_voc / f"SegmentationClass/{name}.png")) for name in ids]
    assert len(ids) == 5 and alone.sum() == sum((label != 255).sum() for label in labels)


def test_evaluate_scores_by_all_ranks(two_ranks, drawn_voc):
    flags = ("--data_path", drawn_voc, "--device", "cpu")  # the scale is the checkpoint's
    run(ROOT / "evaluate.py", two_ranks / "ckpt/latest.pth", *flags, "--device_list", "0,1")
    lines = (two_ranks / "ckpt/FCN_bs1_2p_val.log").read_text().splitlines()
    summary = dict(line.split(" = ") for line in lines)
    assert float(summary["mIoU"]) == pytest.approx(metrics(two_ranks)[-1]["mIoU"] / 100, abs=1e-12)
    assert float(summary["E2EValTime"]) >= float(summary["ValTime"]) > 0 and summary["CaseName"] == "FCN_bs1_2p_val"


def test_two_ranks_train_as_one_of_twice_the_batch(drawn_voc, tmp_path):
    """Of a network without BN, whose statistics are each rank's own."""
    flags = ("--backbone", "tiny_plain", "--max_iters", 5, "--crop_size", 32, "--scale", 128, 32)
    difference, way = map(float, run_script(STEPS, tmp_path, free_port(), *train_flags(drawn_voc, tmp_path / "run"),
                                            *flags).split())
    assert difference <= 1e-5 and way > 1e-3  # parameters went so far from where they started


def test_rank_slices_make_up_the_global_batches(drawn_voc):
    from augment import BatchOrder, TrainAugmentation, TrainStream, train_batches
    from voc import VOC
    stream = TrainStream(VOC(drawn_voc, "trainaug"), TrainAugmentation(32, (128, 32)), seed=3)
    whole = list(train_batches(stream, BatchOrder(0, 20, 4), 0))
    ranks = [list(train_batches(stream, BatchOrder(0, 20, 2, rank=rank, world_size=2), 0)) for rank in (0, 1)]
    assert len(whole) == len(ranks[0]) == len(ranks[1]) == 5
    for batch, first, second in zip(whole, *ranks, strict=True):
        for key, value in batch.items():
            torch.testing.assert_close(torch.cat([first[key], second[key]]), value, rtol=0, atol=0)
