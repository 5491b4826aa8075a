"""Ways to run a training step, against each other: the parts of `python tools/benchmark.py --on_gpu`.

The step is train.py's own, `resnet50_d8` with --amp, on one batch of the data that stays on the device. What is not
the project's way lives here only, put in its place by a patch. A and B take turns, A, B, A, B, each time 15 steps to
warm up and 40 measured; on a CPU a few small steps show that a part works.
"""
import collections
import contextlib
import functools
import math
import multiprocessing
import os
import signal
import statistics
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from unittest import mock

import speeds
import torch
from torch.utils.flop_counter import FlopCounterMode

import fcn8s
import train
import transforms
from amp import bn_layers, choose_precision
from data import open_training, train_batches
from device import Ranks, choose_device
from metrics import peak_memory, synchronize

COLUMNS = ("pair", "way", "ms a step, each turn", "images/s", "peak memory", "loss after 20 steps", "note")
MINUTES = 9  # after which a part is ended
TURNS = 2
LOSS_AT = 20  # steps of the first turn
PROFILED = 10  # steps
GROUPS = (("convolution", ("conv",)), ("BN", ("batch_norm", "batchnorm")),
          ("loss", ("nll_loss", "nllloss", "log_softmax", "logsoftmax", "cross_entropy", "upsample")),
          ("optimizer", ("sgd", "foreach", "amp_update", "amp_foreach")))
RANGES = ("preparation", "optimizer")  # whatever runs within these belongs to them


class Bench:
    """What all parts share: the device, the sizes, and a batch of the data.

    images, side: of the batch; warm_up, measured: steps of a turn
    """

    def __init__(self, device, data):
        self.device, self.data, small = device, data, device.type == "cpu"
        self.images, self.side, self.warm_up, self.measured = (2, 64, 1, 2) if small else (16, 512, 15, 40)
        args = train.parse_args(["--data_path", str(data), "--crop_size", str(self.side), "--batch_size",
                                 str(self.images), "--workers", "0"])
        self.host_batch = next(train_batches(open_training(args).train, args, 0, self.images, Ranks(device)))
        self.batch = {key: value.to(device) for key, value in self.host_batch.items()}

    def training(self, dtype=None):
        mixed = dtype != "float32" and (dtype or self.device.type != "cpu")
        precision = choose_precision(self.device, mixed, backend="native", dtype=dtype if mixed else None)
        return speeds.Training(speeds.BACKBONE, self.device, precision)

    def mark(self):
        """A moment on the device, for `seconds`."""
        if self.device.type == "cpu":
            return time.perf_counter()
        event = getattr(torch, self.device.type).Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start, end):
        return end - start if self.device.type == "cpu" else start.elapsed_time(end) / 1000

    def turn(self, step):
        """Runs a turn of a function that returns its loss, or None.

        -> (median seconds, peak memory above what was held before, the losses [steps])
        """
        if self.device.type != "cpu":
            getattr(torch, self.device.type).reset_peak_memory_stats(self.device)
        held, losses, marks = self.held(), [], []
        for number in range(self.warm_up + self.measured):
            if number >= self.warm_up:
                marks.append(self.mark())
            losses.append(step())
        marks.append(self.mark())
        synchronize(self.device)
        times = [self.seconds(*pair) for pair in zip(marks, marks[1:], strict=False)]
        losses = [float(loss) for loss in losses if loss is not None]
        return statistics.median(times), peak_memory(self.device) - held, losses

    def held(self):
        return 0 if self.device.type == "cpu" else getattr(torch, self.device.type).memory_allocated(self.device)

    def rows(self, pair, turns, notes):
        """Rows of the table. turns: {way: what `turn` gave, for each turn}; notes: {way: text}"""
        for way, results in turns.items():
            times = [seconds for seconds, _, _ in results]
            losses = results[0][2][:LOSS_AT]
            loss = f"{losses[-1]:.4f}" if losses else ""
            loss += f" (after {len(losses)})" if 0 < len(losses) < LOSS_AT else ""
            yield (pair, way, ", ".join(f"{1000 * seconds:.1f}" for seconds in times),
                   f"{self.images / statistics.median(times):.1f}",
                   f"{max(memory for _, memory, _ in results) / 2 ** 30:.2f} GiB", loss, notes.get(way, ""))

    def compare(self, pair, ways, notes=None):
        """Rows of ways to run a step, in turns. ways: {name: (a function that runs a step, a context to run it in)}"""
        turns = {way: [] for way in ways}
        for _ in range(TURNS):
            for way, (step, context) in ways.items():
                with context():
                    turns[way].append(self.turn(step))
        return self.rows(pair, turns, notes or {})


def rows_of(part, device_name, data):
    signal.alarm(60 * MINUTES)
    os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"  # or a second run would not compile
    yield from globals()[part](Bench(choose_device(device_name), data))


def plain(training, batch):
    """train.py's step on a batch. -> a function that returns its loss, on the device"""
    return lambda: training.step(batch)[0]


def patched(module, **names):
    """A function that makes a context in which a module's names stand for something else."""
    return lambda: mock.patch.multiple(module, **names)


# ---- pairs

def cudnn(bench):
    """Each turn in a process of its own: PyTorch keeps the plan that it first chose for a shape, tuned or not
    (aten/src/ATen/native/cudnn/Conv_v8.cpp)."""
    ways = {"no tuning": (False, 10), "benchmark_limit 10, the project's": (True, 10), "benchmark_limit 4": (True, 4)}
    turns = {way: [] for way in ways}
    for _ in range(TURNS):
        for way, flags in ways.items():
            turns[way].append(in_own_process(cudnn_turn, bench.device, bench.data, *flags))
    yield from cudnn_rows(bench, turns)
    # Last, and once: it tries every algorithm, which may take minutes.
    yield from cudnn_rows(bench, {"benchmark_limit 0, all": [
        in_own_process(cudnn_turn, bench.device, bench.data, True, 0)]})


def cudnn_rows(bench, turns):
    first = {way: f"first step {results[0][3]:.1f} s" for way, results in turns.items()}
    return bench.rows("cudnn", {way: [result[:3] for result in results] for way, results in turns.items()}, first)


def in_own_process(work, *arguments):
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


def cudnn_turn(device, data, benchmark, limit):
    """-> what `turn` gives, and the seconds of the first step"""
    signal.alarm(60 * MINUTES // 3)
    bench = Bench(device, data)
    step = plain(bench.training(), bench.batch)
    with patched(train, convolutions=lambda device, training: torch.backends.cudnn.flags(
            enabled=True, benchmark=benchmark, benchmark_limit=limit, allow_tf32=True))():
        seconds, loss = first_step(bench, step)
        median, memory, losses = bench.turn(step)
    return median, memory, [loss, *losses], seconds


def first_step(bench, step):
    """-> (seconds that it took, its loss)"""
    start = time.perf_counter()
    loss = float(step())
    synchronize(bench.device)
    return time.perf_counter() - start, loss


def dtype(bench):
    """On a CPU float32 stands for float16, of which a step takes minutes there."""
    first = "float32" if bench.device.type == "cpu" else "float16"
    return bench.compare("dtype", {name: (plain(bench.training(name), bench.batch), contextlib.nullcontext)
                                   for name in (first, "bfloat16")})


def enlarge(bench):
    logits = torch.randn(2, 21, bench.side // 8, bench.side // 8, device=bench.device)
    size = (bench.side, bench.side)
    ways = {"F.interpolate": fcn8s.interpolate, "two matrix products, the project's": fcn8s.enlarge_by_products}
    worst = (fcn8s.enlarge_by_products(logits, size) - fcn8s.interpolate(logits, size)).abs().max()
    return bench.compare("enlarge", {
        name: (plain(bench.training(), bench.batch), patched(fcn8s, interpolate=way, enlarge_by_products=way))
        for name, way in ways.items()},
        {"two matrix products, the project's": f"values differ by {worst:.1e}"})


def prepare(bench):
    compiled = torch.compile(transforms.prepare)
    arguments = (bench.batch["image"], "unpadded", bench.batch["size"], bench.batch["jitter"])
    seconds, _ = first_step(bench, lambda: compiled(*arguments).sum())
    same = "equal to the bit" if torch.equal(compiled(*arguments), transforms.prepare(*arguments)) else "NOT equal"
    notes = {"compiled": f"compiled in {seconds:.0f} s, {same}"}
    yield from bench.compare("prepare alone", {
        way: (lambda function=function: (function(*arguments), None)[1], contextlib.nullcontext)
        for way, function in (("plain", transforms.prepare), ("compiled", compiled))}, notes)
    yield from bench.compare("prepare", {
        "plain": (plain(bench.training(), bench.batch), contextlib.nullcontext),
        "compiled": (plain(bench.training(), bench.batch), patched(transforms, prepare=compiled))}, notes)


def compile(bench):
    """Whole: colours, network and losses, as --compile does. By blocks: each bottleneck and head, and the losses."""
    torch._dynamo.config.fail_on_recompile_limit_hit = True  # or a block too many would run plain, unsaid
    whole, blocks = bench.training(), bench.training()
    whole.network = torch.compile(whole.network, dynamic=False)
    for module in blocks.model.modules():
        if isinstance(module, fcn8s.Bottleneck | fcn8s.ConvHead):
            module.compile(dynamic=False)
    for layer in bn_layers(blocks.model):
        # Views of one tensor share a version, by which autograd takes a later block's update for one of this block's.
        layer._buffers.update({name: buffer.clone() for name, buffer in layer._buffers.items()})
    losses_of, prepare = (torch.compile(each, dynamic=False) for each in (train.losses_of, transforms.prepare))
    ways = {"plain": (plain(bench.training(), bench.batch), contextlib.nullcontext),
            "whole": (plain(whole, bench.batch), patched(transforms, prepare=prepare)),
            "by blocks": (plain(blocks, bench.batch), patched(train, losses_of=losses_of))}
    notes = {}
    for way, (step, context) in ways.items():
        with context():
            notes[way] = f"first step {first_step(bench, step)[0]:.0f} s"
    return bench.compare("compile", ways, notes)


# ---- where the time goes

def profile(bench):
    """Seconds of the device (on a CPU, of the cores) in each group of operators, over 10 steps."""
    training, kind = bench.training(), bench.device.type
    step = plain(training, bench.batch)
    median = bench.turn(step)[0]
    with FlopCounterMode(display=False) as counter:
        step()
    activities = [torch.profiler.ProfilerActivity.CPU]
    if kind == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with patched(transforms, prepare=in_range("preparation", transforms.prepare))(), mock.patch.object(
            training.optimizer, "step", in_range("optimizer", training.optimizer.step)):
        with torch.profiler.profile(activities=activities) as profiler:
            for _ in range(PROFILED):
                step()
            synchronize(bench.device)
    seconds = collections.Counter()
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CPU:
            # Not self_device_time_total, which may count a range's whole time as well as that of what runs in it.
            own = event.self_cpu_time_total if kind == "cpu" else sum(
                kernel.duration for kernel in event.kernels if kernel.name != event.name)
            seconds[group_of(event)] += own / 1e6
    total = sum(seconds.values()) or math.nan
    for group, spent in seconds.most_common():
        yield ("profile", group, f"{1000 * spent / PROFILED:.2f}", "", "", "", f"{100 * spent / total:.1f}%")
    tera = counter.get_total_flops() / 1e12
    yield ("profile", "all groups", f"{1000 * total / PROFILED:.1f}", "", "", "",
           f"{tera * PROFILED / (seconds['convolution'] or math.nan):.2f} TFLOP/s in convolutions")
    yield ("profile", "the whole step", f"{1000 * median:.1f}", f"{bench.images / median:.1f}", "", "",
           f"{tera:.2f} TFLOP a step, {tera / median:.2f} TFLOP/s")


def in_range(name, function):
    @functools.wraps(function)
    def named(*args, **kwargs):
        with torch.profiler.record_function(name):
            return function(*args, **kwargs)
    return named


def group_of(event):
    """The group of an operator: of a range it runs in, or by its own name or that of one that called it."""
    names = []
    while event is not None:
        names.append(event.name.lower())
        event = event.cpu_parent
    for name in RANGES:
        if name in names:
            return name
    return next((group for name in names for group, parts in GROUPS if any(part in name for part in parts)),
                "elementwise and other")


def waits(bench):
    """Where a step waits for the device, by PyTorch's own count."""
    if bench.device.type != "cuda":
        yield ("waits", "CUDA only", "", "", "", "", "")
        return
    step = plain(bench.training(), bench.host_batch)
    step().item()
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(PROFILED):
            step()
    torch.cuda.set_sync_debug_mode("default")
    found = collections.Counter(f"{warning.filename.rpartition('/')[2]}:{warning.lineno}" for warning in caught
                                if "synchronizing" in str(warning.message))
    for where, times in found.most_common():
        yield ("waits", where, "", "", "", "", f"{times / PROFILED:g} a step")
    if not found:
        yield ("waits", "none", "", "", "", "", f"in {PROFILED} steps")
