"""How fast the project is, as ratios against its peers in the same run: `python tests/benchmark.py`.

--loader, --step BACKBONE, --eval and --commands run parts of the table. Each part runs in a process of its own, ours
and the peer's in turns, so that both see the same machine; the figures are medians of the turns. The peers are
mmsegmentation and torchfcn (`bash tests/run.sh --peers` installs them into .venv-peers); without them their columns
stay empty.
"""
import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import types
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")  # or a broken torch_npu breaks `import torch`

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

import evaluate as ev  # noqa: E402
import peers  # noqa: E402
from conftest import REAL_VOC  # noqa: E402
from device import (Processes, choose_device, choose_precision, describe, memory_format, peak_memory,  # noqa: E402
                    place, synchronize)
from drawn_voc import draw_data_set  # noqa: E402
from fcn8s import BACKBONES, FCN8s  # noqa: E402
from train import Trainer, losses_of  # noqa: E402
from voc import IGNORE, VOC, TrainAugmentation, TrainStream, prepare, read_image, train_loader  # noqa: E402

TURNS = 5
COLUMNS = ("work", "ours", "peer or base", "ratio", "goal", "of the ceiling", "peak memory")
MATRIX = 4096  # side of the matrices whose product measures the ceiling of a device
CPU_MATRIX = 1536
SAMPLES = 60  # of a turn of the loader
MEMORY_BATCHES = 1000


def in_turns(*works):
    """Runs functions in turns. -> the median seconds of each; the first turn warms up and does not count."""
    seconds = [[] for _ in works]
    for turn in range(TURNS + 1):
        for work, measured in zip(works, seconds):
            start = time.perf_counter()
            work()
            if turn:
                measured.append(time.perf_counter() - start)
    return [statistics.median(measured) for measured in seconds]


def row(work, ours, unit, peer=None, goal="", ceiling=None, memory=None):
    """A line of the table: rates of ours and of the peer, share of the ceiling, bytes; what is None stays empty."""
    return (work, f"{ours:.4g} {unit}", "" if peer is None else f"{peer:.4g}",
            "" if peer is None else f"{ours / peer:.2f}", goal, "" if ceiling is None else f"{100 * ceiling:.0f}%",
            "" if memory is None else f"{memory / 2 ** 30:.1f} GiB")


# ---- loader

def data_folder(scratch):
    """The real subset, converted, or else a drawn one."""
    devkit = Path(scratch) / "VOCdevkit"
    if REAL_VOC.is_dir():
        shutil.copytree(REAL_VOC / "VOCdevkit", devkit)
    else:
        draw_data_set(scratch, counts={"train": 30, "val": 10, "sbd": 30})
    subprocess.run([sys.executable, ROOT / "convert_voc_aug.py", devkit, devkit / "VOCaug"], check=True,
                   stdout=subprocess.DEVNULL)
    return devkit / "VOC2012"


def bench_loader(device, data):
    torch.set_num_threads(1)
    stream = TrainStream(VOC(data, "trainaug"), TrainAugmentation(512, (2048, 512)), seed=0)
    images = [stream.voc.ids[stream.index(i)] for i in range(SAMPLES)]
    works = [lambda: [stream[i] for i in range(SAMPLES)],
             lambda: [read_image(stream.voc.image_path(image_id)) for image_id in images]]
    if peers.installed():
        pipeline = peers.mmseg_pipeline()
        works.append(lambda: [pipeline(stream.voc.image_path(image_id), stream.voc.label_path(image_id))
                              for image_id in images])
    rates = [SAMPLES / seconds for seconds in in_turns(*works)]
    yield row("training samples, one core; mmsegmentation; ceiling: decoding the JPEG", rates[0], "images/s",
              *rates[2:], goal="4", ceiling=rates[0] / rates[1])

    memory = []
    for i, _ in enumerate(train_loader(stream, 2, 0, 2 * MEMORY_BATCHES, workers=1)):
        if i in (MEMORY_BATCHES // 10, MEMORY_BATCHES - 1):
            worker, = multiprocessing.active_children()
            memory.append(int(Path(f"/proc/{worker.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
    yield row(f"memory of a worker after {MEMORY_BATCHES} batches, and after a tenth of them", memory[1] / 2 ** 20,
              "MiB", memory[0] / 2 ** 20, goal="1.00 (steady)")


# ---- steps

def ceiling(device, dtype):
    """The FLOP/s of a large matrix product or 3x3 convolution, whichever has more: two libraries, which know different
    processors well."""
    side = CPU_MATRIX if device.type == "cpu" else MATRIX
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    channels, height = 256, side // 16
    layer = torch.nn.Conv2d(channels, channels, 3, padding=1, bias=False, device=device, dtype=dtype)
    layer, x = (value.to(memory_format=memory_format(device)) for value in
                (layer, torch.randn(4, channels, height, height, device=device, dtype=dtype)))

    def multiply():
        a @ b
        synchronize(device)

    def convolve():
        with torch.inference_mode():
            layer(x)
        synchronize(device)
    seconds = in_turns(multiply, convolve)
    return max(2 * side ** 3 / seconds[0], 2 * 9 * channels ** 2 * 4 * height ** 2 / seconds[1])


def our_step(backbone, device, images, labels, amp=False):
    """(a function that runs one training iteration as train.py does, but for the loader; its FLOPs)"""
    args = types.SimpleNamespace(lr=1e-3, min_lr=1e-4, power=0.9, momentum=0.9, weight_decay=5e-4, max_iters=10_000,
                                 batch_size=len(images), performance=False, seed=0)
    torch.manual_seed(0)
    trainer = Trainer(args, FCN8s(21, backbone), device, choose_precision(device, amp), Processes(), folder=None)
    augmentation, rng = TrainAugmentation(1, (1, 1)), np.random.default_rng(0)
    batch = {"image": images, "label": labels, "size": torch.tensor([images.shape[-2:]] * len(images)),
             "jitter": torch.stack([augmentation.draw_jitter(rng) for _ in images])}

    def step():
        trainer.step(batch)
        synchronize(device)
    with FlopCounterMode(display=False) as counter:
        step()
    return step, counter.get_total_flops()


def peer_step(loss_of, model, device, images, labels, precision):
    """The same of a peer: its network and loss, the same optimizer and precision, in its own memory layout."""
    model = model.to(device).train()
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, 0.9, weight_decay=5e-4)
    images, labels = prepare(images.to(device)).contiguous(), labels.to(device)

    def step():
        with precision.autocast():
            loss = loss_of(model, images, labels)
        optimizer.zero_grad()
        precision.step(loss, optimizer)
        synchronize(device)
    return step


def torchfcn_loss(model, images, labels):
    return losses_of({"out": model(images)}, labels)[0]


def torchfcn_model():
    import torchfcn.models
    return torchfcn.models.FCN8s()


def random_batch(count, height, width):
    generator = torch.Generator().manual_seed(0)
    return (torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8, generator=generator),
            torch.randint(0, 21, (count, height, width), dtype=torch.uint8, generator=generator))


def bench_step(device, data, backbone):
    """On a CPU small batches, that it takes seconds; on an accelerator the recipe's, in mixed precision."""
    small = device.type == "cpu"
    shape = {"vgg16": (1, 375, 500), "resnet50": (1 if small else 16, 512, 512)}.get(
        backbone, (2, 256, 256) if small else (16, 512, 512))
    images, labels = random_batch(*shape)
    name = f"{backbone} step, {shape[0]} x {shape[1]}x{shape[2]}"
    precision = choose_precision(device, amp=not small)
    ours, flops = our_step(backbone, device, images, labels, amp=not small)
    memory = peak_memory(device)
    peer, goal, against = None, "", "mmsegmentation"
    if backbone == "resnet50":
        peer, goal, against = our_step("resnet50_d8", device, images, labels, amp=not small)[0], "7", "our resnet50_d8"
    elif peers.installed() and backbone == "vgg16":
        peer = peer_step(torchfcn_loss, torchfcn_model(), device, images, labels, precision)
        goal, against = "1.7", "torchfcn"
    elif peers.installed():
        peer = peer_step(peers.mmseg_loss, peers.mmseg_model(backbone), device, images, labels, precision)
        goal = "0.95" if small else "1.5"
    seconds = in_turns(*filter(None, (ours, peer)))
    rates = [shape[0] / each for each in seconds]
    yield row(f"{name}, {precision}" + (f"; {against}" if peer else ""), rates[0], "images/s", *rates[1:], goal=goal,
              ceiling=flops / seconds[0] / ceiling(device, precision.dtype), memory=memory)
    if small and backbone == "resnet50_d8":
        mixed = our_step(backbone, device, images, labels, amp=True)[0]
        rates = [shape[0] / each for each in in_turns(mixed, ours)]
        yield row(f"{name}, bfloat16; its float32", rates[0], "images/s", rates[1], goal="1.6",
                  ceiling=rates[0] / shape[0] * flops / ceiling(device, torch.bfloat16))


# ---- evaluation

def bench_eval(device, data):
    voc, count = VOC(data, "val"), 4 if device.type == "cpu" else 64
    model = place(FCN8s(21), device)
    in_network = []
    forward = model.forward

    def timed(*args):
        synchronize(device)
        start = time.perf_counter()
        outputs = forward(*args)
        synchronize(device)
        in_network.append(time.perf_counter() - start)
        return outputs
    model.forward = timed
    sizes = voc.check(21, count)
    ev.evaluate(model, voc, sizes[:1], (2048, 512), device)  # warms up
    in_network.clear()
    start = time.perf_counter()
    ev.evaluate(model, voc, sizes, (2048, 512), device)
    total = time.perf_counter() - start
    yield row("evaluation outside the network, in % of the time in it", 100 * (total / sum(in_network) - 1), "%",
              goal="under 5%", memory=peak_memory(device))

    label = np.random.default_rng(0).integers(0, 21, (25, 25), np.uint8).repeat(15, 0).repeat(20, 1)  # 375x500
    label[::30] = IGNORE
    guess = np.roll(label, 9, 1).clip(max=20)
    works = [lambda: [ev.confusion_matrix(label, guess, 21) for _ in range(20)]]
    if peers.installed():
        from mmseg.evaluation import IoUMetric
        label_tensor, guess_tensor = torch.from_numpy(label), torch.from_numpy(guess)
        works.append(lambda: [IoUMetric.intersect_and_union(guess_tensor, label_tensor, 21, IGNORE) for _ in range(20)])
    rates = [20 / seconds for seconds in in_turns(*works)]
    yield row("confusion matrix, 500x375; mmsegmentation", rates[0], "images/s", *rates[1:], goal="10")


# ---- commands

def bench_commands(device, data):
    for flags in (["--help"], ["--crop_size", "0"]):
        def command():
            subprocess.run([sys.executable, ROOT / "train.py", *flags], capture_output=True)
        yield row(f"train.py {' '.join(flags)}", in_turns(command)[0], "s", goal="under 0.5 s")


def bench_train(device, data):
    """The whole of train.py on an accelerator, real loader: what a user gets."""
    if device.type == "cpu":
        return
    with tempfile.TemporaryDirectory() as scratch:
        subprocess.run([sys.executable, ROOT / "train.py", "--data_path", data, "--pretrained", "none", "--amp",
                        "--max_iters", "300", "--work_dir", f"{scratch}/run", "--device", device.type, "--workers",
                        str(os.cpu_count())], check=True, stdout=subprocess.DEVNULL)
        lines = [json.loads(line) for line in Path(scratch, "run/metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if "fps" in line][-1]
    yield row("train.py --amp, 16 x 512x512, real loader", last["fps"], "images/s", goal="320 on an H200",
              memory=last["memory"] * 2 ** 20)
    yield row("the same: waiting for data", 100 * last["data_time"] / last["iter_time"], "%", goal="under 2%")


def run_part(part, device_name, data, *arguments):
    return list(part(choose_device(device_name), data, *arguments))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", choices=("auto", "npu", "cuda", "gpu", "cpu"))
    parser.add_argument("--loader", action="store_true")
    parser.add_argument("--step", nargs="*", metavar="BACKBONE", choices=BACKBONES)
    parser.add_argument("--eval", action="store_true")
    parser.add_argument("--commands", action="store_true")
    args = parser.parse_args()
    everything = not (args.loader or args.step is not None or args.eval or args.commands)
    steps = args.step or (BACKBONES if everything or args.step == [] else ())
    parts = [(bench_loader,)] if args.loader or everything else []
    parts += [(bench_step, backbone) for backbone in steps]
    parts += [(bench_eval,)] if args.eval or everything else []
    parts += [(bench_commands,), (bench_train,)] if args.commands or everything else []

    print(f"PyTorch {torch.__version__}, {os.cpu_count()} cores, {describe(choose_device(args.device), args.device)}; "
          f"data: {'the real subset' if REAL_VOC.is_dir() else 'a drawn sample'}; peers "
          f"{'installed' if peers.installed() else 'NOT installed: bash tests/run.sh --peers'}\n")
    print("| " + " | ".join(COLUMNS) + " |\n" + "| --- " * len(COLUMNS) + "|", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        data = data_folder(scratch)
        for part, *arguments in parts:
            # A process of its own: its peak memory is its own, and nothing is warm from another part.
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
                for line in pool.submit(run_part, part, args.device, data, *arguments).result():
                    print("| " + " | ".join(line) + " |", flush=True)


if __name__ == "__main__":
    main()
