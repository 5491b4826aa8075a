"""A run of train.py, assembled: device, data, network and trainer, and what it logs at its start and its end."""
import dataclasses
import importlib.util
import json
import os
import shlex
import shutil
import signal
import sys
from pathlib import Path

import torch

import advice
from augment import TrainAugmentation, TrainStream
from data import digest, open_training
from device import choose_device, describe, memory_errors
from errors import DataError, RunError
from fcn8s import FCN8s
from fonts import missing_font
from inference import Protocol
from launch import BEGUN
from loader import default_workers
from precision import ApexPrecision, check_network, choose_precision
from processes import Processes, exit_status, note
from record import start_record, write_results
from resume import find_start, load_resumed, resume
from scores import number
from trainer import Intervals, Trainer
from weights import Checkpoint, load_imagenet
from work_folder import WorkFolder

RANDOM = "random weights"
PERFORMANCE_ITERS = 1000  # where a performance run stops
COMPILERS = {  # of torch.compile: C++ for a CPU's kernels, C for Triton's launchers
    "cpu": (os.environ.get("CXX") or "g++",), "cuda": (os.environ.get("CC") or "gcc", "clang"),
    "npu": (os.environ.get("CC") or "gcc", "clang")}


@dataclasses.dataclass(frozen=True)
class Settings:
    """Where and how a training runs; nothing here shapes its result. The fields are train.py's flags of these names."""
    data_path: str
    classes: str | None
    val_fraction: float | None
    pretrained: str
    at_once: bool
    resume: str | None
    work_dir: str | None
    workers: int | None
    device: str
    device_id: int | None
    device_list: list | None
    timeout: int
    amp: bool
    opt_level: str | None
    loss_scale: object
    amp_backend: str | None
    amp_dtype: str | None
    tensorboard: bool
    log_interval: int
    eval_interval: int
    checkpoint_interval: int
    keep: int
    performance: bool


def train(recipe, settings):
    """A whole run. -> the exit status"""
    processes = Processes()
    with processes.failing_together(), memory_errors(advice.of_memory(recipe, settings.amp)):
        stopped = run(recipe, settings, processes)
        if not stopped:
            processes.leave()
            return 0
        status = exit_status(stopped)
        processes.report_failure()  # a rank that is still in a step must not wait for this one
        return status


def run(recipe, settings, processes):
    """-> the number of the signal that stopped the run, or 0"""
    device = choose_device(settings.device, settings.device_id)
    precision = choose_precision(device, settings.amp, settings.opt_level, settings.loss_scale,
                                 settings.amp_backend or "auto", settings.amp_dtype)
    check_device(recipe, device, precision, processes)
    folder = work_folder(settings, device, processes)
    start = find_start(settings, folder) if folder.writes else None
    processes.join(device, settings.timeout)
    start = processes.share(start)  # the other machines need not see the folder
    data, val_sizes = open_data(recipe, settings, start and start[1].meta.get("lists"), processes)
    recipe = dataclasses.replace(recipe, train_split=data.train.split, ranks=processes.count, precision=str(precision),
                                 train_list=digest(data.train.ids), val_list=digest(data.val.ids))
    check_class_weights(recipe, data.classes)
    Protocol(recipe.scale, pad_to=recipe.pad_to).check(val_sizes)

    torch.manual_seed(recipe.seed)
    model = FCN8s(len(data.classes), recipe.backbone)
    check_network(precision, device, model)
    check_bn(recipe, model)
    origin = load_start(model, recipe, settings, data.classes, start)
    intervals = Intervals(settings.log_interval, settings.eval_interval, settings.checkpoint_interval,
                          last_iteration(recipe, settings))
    trainer = Trainer(recipe, model, device, precision, processes, folder, intervals, data.classes, data.lists)
    if start is not None:
        resume(trainer, *start)
    if settings.performance and start is None:
        folder.lock()  # the folder may be new since find_start
        folder.clear()  # find_start saw that it holds nothing else
    folder.open(start and start[0], trainer.progress)
    del start  # it holds the weights and the momentum once more
    if note(BEGUN):
        note(BEGUN).touch()
    if settings.tensorboard:
        folder.open_board(trainer.progress.iteration)
    what = describe(device, settings.device)
    folder.add_record(start_record(recipe, settings, data, what, origin))
    folder.log(start_lines(trainer, settings, data, what, origin))
    for advised in advice.at_start(recipe, intervals, device, len(data.train), settings.performance):
        folder.log(f"note: {advised}")

    stream = TrainStream(data.train, TrainAugmentation(recipe.crop_size, recipe.scale), recipe.seed)
    workers = default_workers(processes.here) if settings.workers is None else settings.workers
    stopped = trainer.train(stream, data.val, val_sizes, workers)
    if stopped:
        folder.log(stop_line(trainer, stopped, settings.performance))
    elif folder.writes:
        folder.log(end_lines(settings, folder, recipe, write_results(folder, recipe, trainer.progress,
                                                                     settings.performance)))
    return stopped


def last_iteration(recipe, settings):
    return min(recipe.max_iters, PERFORMANCE_ITERS) if settings.performance else recipe.max_iters


def work_folder(settings, device, processes):
    """The run's WorkFolder, by default output/<devices>/FCN, as the Ascend port names it."""
    if settings.device_list:
        device_ids = ",".join(settings.device_list)
    else:
        device_ids = ",".join(map(str, range(processes.count))) if processes.count > 1 else str(device.index or 0)
    path = settings.work_dir or Path("output", device_ids, "FCN_prof" if settings.performance else "FCN")
    return WorkFolder(path, device_ids, processes.rank == 0, settings.keep)


def open_data(recipe, settings, lists, processes):
    """(the TrainingData, the (H, W) of the images to evaluate on). Every image and label is read once."""
    def open_here():
        return open_training(settings.data_path, settings.classes, recipe.train_split, recipe.val_split,
                             settings.val_fraction, recipe.seed, lists)

    def check():
        data = open_here()
        data.train.check(len(data.classes))
        return data.val.check(len(data.classes)), (data.train.ids, data.val.ids)

    val_sizes, ids = processes.once_a_machine(check)
    data = open_here()  # each machine has its own --data_path
    if (data.train.ids, data.val.ids) != ids:
        raise DataError(f"{settings.data_path}: its lists differ from those of rank 0's machine; copy the same data to "
                        "every machine")
    return data, val_sizes


def check_class_weights(recipe, classes):
    if recipe.class_weights and len(recipe.class_weights) != len(classes):
        raise RunError(f"--class_weights: names {len(recipe.class_weights)} numbers, the data has {len(classes)} "
                       "classes; it takes one for each")


def check_device(recipe, device, precision, processes):
    """Raises RunError for what of the recipe cannot be had on the device, in the precision, or alone."""
    if isinstance(precision, ApexPrecision) and (recipe.accumulate > 1 or recipe.compile):
        flag = "compile" if recipe.compile else f"accumulate {recipe.accumulate}"
        raise RunError(f"--{flag} does not go with apex; take --amp_backend native")
    if recipe.sync_bn and (device.type == "cpu" or processes.count == 1):
        where = "a CPU, where PyTorch has none" if device.type == "cpu" else "one card, which has none to share with"
        raise RunError(f"--sync_bn: not on {where}; leave it out")
    if recipe.compile and recipe.sync_bn:
        raise RunError("--compile does not go with --sync_bn, at which torch.compile breaks the graph (PyTorch issue "
                       "161302); leave one out")
    if recipe.compile and not any(map(shutil.which, COMPILERS[device.type])):
        raise RunError(f"--compile needs a compiler ({' or '.join(COMPILERS[device.type])}) on {device.type}; install "
                       "one, or leave it out")
    if recipe.compile and device.type != "cpu" and importlib.util.find_spec("triton") is None:
        raise RunError(f"--compile needs the package triton on {device.type}; install it, or leave it out")


def check_bn(recipe, model):
    """BN cannot train on a single value a channel; the deepest features have the fewest."""
    normalised = any(isinstance(module, torch.nn.BatchNorm2d) for module in model.modules())
    if recipe.sync_bn and not normalised:
        raise RunError(f"--sync_bn has no effect: {recipe.backbone} has no BN; leave it out")
    stride = max(model.backbone.strides)
    if normalised and not recipe.freeze_bn and recipe.batch_size == 1 and recipe.crop_size <= stride:
        raise RunError(f"--crop_size {recipe.crop_size} with --batch_size 1 leaves batch normalisation one value a "
                       f"channel; --crop_size takes more than {stride} then")


def load_start(model, recipe, settings, classes, start):
    """Loads the weights to start from: of `start`, as find_start returns it, or --pretrained. -> their origin"""
    if start is not None:
        return load_resumed(model, recipe, classes, *start)
    if settings.pretrained == "none":
        return RANDOM
    if settings.pretrained == "imagenet":
        return load_imagenet(model)
    return Checkpoint.read(settings.pretrained, recipe.backbone, settings.at_once).start(model, classes)


def start_lines(trainer, settings, data, device, origin):
    """What a run is, in a few lines."""
    recipe, last = trainer.recipe, trainer.intervals.last
    parameters = sum(p.numel() for p in trainer.model.parameters())
    batch = f"{recipe.ranks} x {recipe.batch_size}" + (f" x {recipe.accumulate}" if recipe.accumulate > 1 else "")
    split = f"; {data.origin}" if data.origin else ""
    font = missing_font(data.classes)
    more = (", synchronised BN" if recipe.sync_bn else "") + (", compiled" if recipe.compile else "")
    more += (", frozen BN" if recipe.freeze_bn else "") + (", weighted classes" if recipe.class_weights else "")
    frozen = "--freeze_bn keeps statistics that no training has set" if recipe.freeze_bn and origin == RANDOM else None
    return (f"device: {recipe.ranks} x {device}, {trainer.precision}{more}\n"
            f"network: {recipe.backbone}, {parameters:,} parameters, from {origin}\n"
            f"data: {settings.data_path}, {len(data.classes)} classes, {len(data.train):,} images of "
            f"'{data.train.split}', {len(data.val):,} of '{data.val.split}'{split}\n"
            f"training: {last:,} iterations of {batch} = {recipe.images_per_iteration} images, "
            f"{last * recipe.images_per_iteration / len(data.train):.1f} epochs\n"
            f"files: {trainer.folder.path}"
            + "".join(f"\nnote: {note}" for note in (font, data.skipped, frozen) if note))


def stop_line(trainer, number, performance):
    """How a stopped run ended, and what was saved."""
    where = f"stopped by {signal.Signals(number).name} at iteration {trainer.progress.iteration}"
    if performance:
        return f"{where}; the next --performance run measures anew"
    if trainer.saved is None:
        return f"{where}; no checkpoint was saved yet"
    if trainer.saved == trainer.progress.iteration:
        return f"{where}, which is saved; --resume auto goes on from there"
    return f"{where}; the last checkpoint is of iteration {trainer.saved}, from which --resume auto goes on"


def end_lines(settings, folder, recipe, result):
    """How a run ended, where its files are, and the command that shows what it can do."""
    python = "python" if shutil.which("python") == sys.executable else sys.executable
    shown = {key: round(value, 4) if isinstance(value, float) else value
             for key, value in result.items() if key not in ("last", "best")}
    best = f"best mIoU {number(result['best_mIoU'], '.2f')} at iteration {result['best_iteration']}: {folder.best}"
    if not folder.best.is_file():
        best += " is not there any more"
    command = [python, Path(sys.argv[0]).with_name("evaluate.py"), folder.best, "--data_path", settings.data_path,
               "--split", recipe.val_split, "--save_dir", folder.path / "val"]
    return (f"done: {folder.path / 'result.json'}: {json.dumps(shown)}\n{best}\n"
            f"to look at: {folder.path / 'curves.png'}, {folder.path / 'val_samples.png'}\n"
            f"next, to see every prediction: {shlex.join(map(str, command))}")
