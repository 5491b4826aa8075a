"""The parts of tools/benchmark.py: each function yields rows of its table."""
import functools
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import peers
import torch
from draw_voc import draw_data_set
from torch.utils.flop_counter import FlopCounterMode

import train
from amp import BatchNormGuard, choose_precision, fused_sgd, memory_format, place
from data import TrainStream, train_batches, val_batches
from device import Ranks, choose_device, describe
from fcn8s import FCN8s
from inference import Protocol, evaluate
from metrics import confusion_matrix, peak_memory, scores_of, synchronize
from transforms import TrainAugmentation, prepare, resize_image
from voc import CLASSES, IGNORE, VOC, read_image

ROOT = Path(__file__).resolve().parent.parent
REAL_VOC = Path(os.environ.get("FCN8S_VOC", ROOT.parent / "shared/voc"))  # as tests/conftest.py
TURNS = 5
BACKBONE, SCALE = "resnet50_d8", (2048, 512)  # the recipe's
COLUMNS = ("work", "ours", "peer or base", "ratio", "of the ceiling", "peak memory")
MATRIX = 4096  # side of the matrices whose product measures the ceiling of a device
CPU_MATRIX, CPU_SIDE = 1536, 256  # that matrix's, and the images' of a step
CPU_MIXES = torch.backends.cpu.get_cpu_capability() != "AVX2"  # there a step in bfloat16 takes minutes
SAMPLES = 60  # of a turn of the loader
MEMORY_BATCHES = 1000


def rows_of(part, device_name, data, *arguments):
    yield from globals()[part](choose_device(device_name), data, *arguments)


def machine(device_name):
    """A description of what the figures were measured on."""
    return (f"PyTorch {torch.__version__}, {os.cpu_count()} cores, "
            f"{describe(choose_device(device_name), device_name)}; peers "
            f"{'installed' if peers.installed() else 'NOT installed: bash tests/run.sh --peers'}.")


def in_turns(*works):
    """Runs functions in turns. -> the median seconds of each; the first turn warms up and does not count."""
    seconds = [[] for _ in works]
    for turn in range(TURNS + 1):
        for work, measured in zip(works, seconds, strict=True):
            start = time.perf_counter()
            work()
            if turn:
                measured.append(time.perf_counter() - start)
    return [statistics.median(measured) for measured in seconds]


def row(work, ours, unit, peer=None, ceiling=None, memory=None):
    """A line of the table: rates of ours and of the peer, share of the ceiling, bytes; what is None stays empty."""
    return (work, f"{ours:.4g} {unit}", "" if peer is None else f"{peer:.4g}",
            "" if peer is None else f"{ours / peer:.2f}", "" if ceiling is None else f"{100 * ceiling:.0f}%",
            "" if memory is None else f"{memory / 2 ** 30:.1f} GiB")


# ---- loader

def data_folder(scratch):
    """The real subset, converted, or else a drawn one. -> its year folder"""
    devkit = Path(scratch) / "VOCdevkit"
    if REAL_VOC.is_dir():
        shutil.copytree(REAL_VOC / "VOCdevkit", devkit)
    else:
        draw_data_set(scratch, counts={"train": 30, "val": 10, "sbd": 30})
    subprocess.run([sys.executable, ROOT / "convert_voc_aug.py", devkit, devkit / "VOCaug"], check=True,
                   stdout=subprocess.DEVNULL)
    return devkit / "VOC2012"


def loader(device, data):
    torch.set_num_threads(1)
    args = train.parse_args(["--data_path", str(data), "--batch_size", "2", "--workers", "1"])
    voc = VOC(data, "trainaug")
    stream = TrainStream(voc, TrainAugmentation(args.crop_size, args.scale), args.seed)
    images = [voc.ids[stream.index(i)] for i in range(SAMPLES)]
    works = [lambda: [stream[i] for i in range(SAMPLES)],
             lambda: [read_image(voc.image_path(image_id)) for image_id in images]]
    if peers.installed():
        pipeline = peers.mmseg_pipeline()
        works.append(lambda: [pipeline(voc.image_path(image_id), voc.label_path(image_id)) for image_id in images])
    rates = [SAMPLES / seconds for seconds in in_turns(*works)]
    yield row("training samples, one core; mmsegmentation; ceiling: decoding the JPEG", rates[0], "images/s",
              *rates[2:], ceiling=rates[0] / rates[1])

    memory = []
    for i, _ in enumerate(train_batches(voc, args, 0, MEMORY_BATCHES * args.batch_size, Ranks(device))):
        if i in (MEMORY_BATCHES // 10, MEMORY_BATCHES - 1):
            worker, = multiprocessing.active_children()
            memory.append(int(Path(f"/proc/{worker.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
    yield row(f"memory of a worker after {MEMORY_BATCHES} batches, and after a tenth of them", memory[1] / 2 ** 20,
              "MiB", memory[0] / 2 ** 20)


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


def random_batch(count, height, width, device):
    """A batch as the loader gives it, in page-locked memory where training uses it."""
    generator, rng = torch.Generator().manual_seed(0), np.random.default_rng(0)
    augmentation = TrainAugmentation(1, (1, 1))
    batch = {"image": torch.randint(0, 256, (count, height, width, 3), dtype=torch.uint8, generator=generator),
             "label": torch.randint(0, 21, (count, height, width), dtype=torch.uint8, generator=generator),
             "size": torch.tensor([[height, width]] * count),
             "jitter": torch.stack([augmentation.draw_jitter(rng) for _ in range(count)])}
    return {key: value.pin_memory() for key, value in batch.items()} if device.type != "cpu" else batch


class Training:
    """A network of random weights, and train.py's step on one batch."""

    def __init__(self, backbone, device, precision):
        args = train.parse_args(["--data_path", "-", "--backbone", backbone])
        torch.manual_seed(0)
        model = place(FCN8s(len(CLASSES), backbone), device).train()
        optimizer = fused_sgd([p for p in model.parameters() if p.requires_grad], device, precision, args.lr,
                              args.momentum, args.weight_decay)
        self.device, self.precision = device, precision
        self.model, self.optimizer = precision.wrap(model, optimizer)
        self.bn_guard, self.network = BatchNormGuard(self.model), train.WithLosses(self.model)

    def step(self, batch):
        """-> what train_step returns: the losses come first"""
        with train.convolutions(self.device, training=True):
            parts = [train.prepare_batch(batch, self.model.form, self.device)]
            return train.train_step(self.network, parts, self.optimizer, self.precision, self.bn_guard)


def ours(backbone, device, batch, precision):
    """(a function that runs one iteration as train.py does, but for the loader; one that runs the network alone:
    forward, losses, backward and optimizer; the FLOPs of a step)"""
    training = Training(backbone, device, precision)
    alone = network_alone(lambda images, labels: training.network(images, labels)[0], training.optimizer, device,
                          batch, precision, memory_format(device))

    def step():
        training.step(batch)
        synchronize(device)
    with FlopCounterMode(display=False) as counter:
        step()
    return step, alone, counter.get_total_flops()


def theirs(loss_of, model, device, batch, precision):
    """The same two functions of a peer: its network and loss, and the same transfer, preparation, optimizer and
    precision; in its own memory format."""
    model = model.to(device).train()
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, 0.9, weight_decay=5e-4)

    def step():
        images, labels = train.prepare_batch(batch, "unpadded", device)
        update(lambda: loss_of(model, images.contiguous(), labels), optimizer, device, precision)
    return step, network_alone(lambda images, labels: loss_of(model, images, labels), optimizer, device, batch,
                               precision, torch.contiguous_format)


def network_alone(loss_of, optimizer, device, batch, precision, layout):
    images, labels = train.prepare_batch(batch, "unpadded", device)
    images = images.contiguous(memory_format=layout)
    return lambda: update(lambda: loss_of(images, labels), optimizer, device, precision)


def update(loss_of, optimizer, device, precision):
    """One iteration from the prepared images on, in a process that cuDNN tunes for, as both recipes ask it to."""
    optimizer.zero_grad()
    with train.convolutions(device, training=True):
        with precision.autocast():
            loss = loss_of()
        precision.backward(loss, optimizer)
    precision.step(optimizer)
    synchronize(device)


def torchfcn_loss(model, images, labels):
    return train.losses_of({"out": model(images)}, labels)[0]


def peer_of(backbone):
    """(name, loss, network) of the peer that has such a network, or None."""
    if backbone not in ("vgg16", *peers.DEPTHS) or not peers.installed():
        return None
    if backbone == "vgg16":
        import torchfcn.models
        return "torchfcn", torchfcn_loss, torchfcn.models.FCN8s()
    return "mmsegmentation", peers.mmseg_loss, peers.mmseg_model(backbone)


def steps(device, data, backbone):
    """On a CPU small batches, that it takes seconds; on an accelerator the recipe's, in mixed precision."""
    small = device.type == "cpu"
    shape = {"vgg16": (1, 375, 500), "resnet50": (1 if small else 16, 512, 512)}.get(
        backbone, (2, CPU_SIDE, CPU_SIDE) if small else (16, 512, 512))
    batch = random_batch(*shape, device)
    yield from step_rows(backbone, shape, batch, device, lambda: choose_precision(device, amp=not small))
    if backbone == BACKBONE and (CPU_MIXES or not small):
        yield from step_rows(backbone, shape, batch, device,
                             lambda: choose_precision(device, amp=True, dtype="bfloat16"))


def step_rows(backbone, shape, batch, device, new_precision):
    """Two rows: the whole step, and the network alone."""
    precision, peer = new_precision(), peer_of(backbone)
    *work, flops = ours(backbone, device, batch, precision)
    against, other = "", (None, None)
    if backbone == "resnet50":
        against = "; our resnet50_d8"
        other = ours("resnet50_d8", device, batch, new_precision())[:2]
    elif peer:
        against = f"; {peer[0]}"
        other = theirs(*peer[1:], device, batch, new_precision())
    most = ceiling(device, precision.dtype)
    for name, our_work, other_work in zip(("step", "network alone"), work, other, strict=True):
        seconds = in_turns(*filter(None, (our_work, other_work)))
        rates = [shape[0] / each for each in seconds]
        yield row(f"{backbone} {name}, {shape[0]} x {shape[1]}x{shape[2]}, {precision}{against}", rates[0], "images/s",
                  *rates[1:], ceiling=flops / seconds[0] / most, memory=peak_memory(device))


# ---- evaluation

class Timed(torch.nn.Module):
    """A network that counts the seconds spent in it."""

    def __init__(self, model, device):
        super().__init__()
        self.model, self.device, self.seconds = model, device, 0.0
        self.num_classes, self.form = model.num_classes, model.form

    def forward(self, *inputs):
        synchronize(self.device)
        start = time.perf_counter()
        outputs = self.model(*inputs)
        synchronize(self.device)
        self.seconds += time.perf_counter() - start
        return outputs


def evaluation(device, data):
    """Ways to evaluate against one image at a time in float32, the default on a CPU."""
    voc, count = VOC(data, "val"), 4 if device.type == "cpu" else 64
    model = place(calibrated(FCN8s(21, BACKBONE), voc), device)
    sizes = voc.check(21, count)
    ways = {"`--amp`": {"amp": True}} if CPU_MIXES or device.type != "cpu" else {}
    if device.type != "cpu":
        ways["float32"] = {}
    plain = functools.partial(score, model, voc, sizes, device, batch_size=1)
    base = plain()
    for name, how in ways.items():
        way = functools.partial(score, model, voc, sizes, device, **how)
        confusion = way()
        rates = [count / seconds for seconds in in_turns(way, plain)]
        difference = abs(mean_iou(confusion) - mean_iou(base))
        yield row(f"evaluation, {BACKBONE}, {name}, mIoU differs by {difference:.3f}; one image at a time in float32",
                  rates[0], "images/s", rates[1], memory=peak_memory(device))
    network = Timed(model, device)
    score(network, voc, sizes[:1], device)  # warms up
    network.seconds, start = 0.0, time.perf_counter()
    score(network, voc, sizes, device)
    total = time.perf_counter() - start
    yield row("evaluation outside the network, in % of the time in it", 100 * (total / network.seconds - 1), "%")
    yield from confusion_row()


def calibrated(model, voc):
    """Gives BN the statistics of real images, without which an untrained network predicts one class."""
    images = torch.stack([resize_image(voc[index][0], (256, 256)) for index in range(4)]).permute(0, 2, 3, 1)
    with torch.no_grad():
        model.train()(prepare(images))
        torch.nn.init.normal_(model.decode_head.conv_seg.weight, std=0.1)
    return model


def score(network, voc, sizes, device, **how):
    """The confusion matrix of the first images."""
    protocol, ranks = Protocol(SCALE, **how), Ranks(device)
    return evaluate(network, val_batches(voc, sizes, protocol, None, ranks), protocol, ranks)


def mean_iou(confusion):
    return scores_of(confusion)["mIoU"]


def confusion_row():
    label = np.random.default_rng(0).integers(0, 21, (25, 25), np.uint8).repeat(15, 0).repeat(20, 1)  # 375x500
    label[::30] = IGNORE
    label, guess = torch.from_numpy(label), torch.from_numpy(np.roll(label, 9, 1).clip(max=20))
    works = [lambda: [confusion_matrix(label, guess, 21) for _ in range(20)]]
    if peers.installed():
        from mmseg.evaluation import IoUMetric
        works.append(lambda: [IoUMetric.intersect_and_union(guess, label, 21, IGNORE) for _ in range(20)])
    rates = [20 / seconds for seconds in in_turns(*works)]
    yield row("confusion matrix, 500x375; mmsegmentation", rates[0], "images/s", *rates[1:])


# ---- commands

def commands(device, data):
    command = functools.partial(subprocess.run, [sys.executable, ROOT / "train.py", "--help"], capture_output=True)
    yield row("`train.py --help`", in_turns(command)[0], "s")


def training(device, data):
    """The whole of train.py on an accelerator, real loader: what a user gets."""
    if device.type == "cpu":
        return
    with tempfile.TemporaryDirectory() as scratch:
        subprocess.run([sys.executable, ROOT / "train.py", "--data_path", data, "--pretrained", "none", "--amp",
                        "--max_iters", "300", "--work_dir", f"{scratch}/run", "--device", device.type], check=True,
                       stdout=subprocess.DEVNULL)
        lines = [json.loads(line) for line in Path(scratch, "run/metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if "fps" in line][-1]
    yield row("`train.py --amp`, 16 x 512x512, real loader", last["fps"], "images/s",
              memory=last["memory"] * 2 ** 20)
    yield row("the same: waiting for data", 100 * last["data_time"] / last["iter_time"], "%")
