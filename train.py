"""Trains FCN8s on PASCAL VOC 2012 + SBD: `python train.py --data_path data/VOCdevkit/VOC2012`.

Writes into the work folder: train_<device_id>.log and metrics.jsonl (a line each --log_interval iterations and each
evaluation), curves.png and val_samples.png (at each evaluation), ckpt/iter_<n>.pth, ckpt/latest.pth, ckpt/best.pth,
result.json, and FCN_bs<batch>_<cards>p_acc.log.
"""
import importlib.util
import os
import sys

from cli import BACKBONES, Parser, non_negative, not_empty, positive, run, whole_number
from launch import add_launch_flags, check_launch, device_list, launch

PERFORMANCE_ITERS = 1000  # where a performance run stops
LEARNING_RATES = {"vgg16": 1e-3}  # without BN the recipe's rate is too high
DEFAULT_LEARNING_RATE = 1e-2
DEFAULT_SCALE = (2048, 512)
DEFAULT_TIMEOUT = 600  # seconds, NCCL's; enough for rank 0 to write a checkpoint while the others wait
RECIPE_FLAGS = ("train_split", "crop_size", "scale", "max_iters", "lr", "min_lr", "power", "momentum", "weight_decay")
TRAINING_FLAGS = (*(flag for flag in RECIPE_FLAGS if flag != "scale"), "pretrained", "at_once", "seed", "amp",
                  "opt_level", "loss_scale", "amp_backend", "amp_dtype", "tensorboard", "log_interval", "eval_interval",
                  "checkpoint_interval", "keep", "max_restarts")  # that have no effect with --val
MAX_LOSS_SCALE = 2 ** 24  # where apex's dynamic one stops, too


def parse_args():
    parser = Parser(prog="train.py", description="Train FCN8s on PASCAL VOC 2012 + SBD, or on data of your own.",
                    usage="%(prog)s --data_path DIR [flags]")

    essentials = parser.add_argument_group("essentials")
    essentials.add_argument("--data_path", metavar="DIR", required=True, type=not_empty,
                            help="a folder in VOC's layout, say data/VOCdevkit/VOC2012")
    essentials.add_argument("--classes", metavar="FILE", type=not_empty,
                            help="names of your own classes, one a line, the first the background (default: VOC's 21)")
    essentials.add_argument("--backbone", default="resnet50_d8", choices=BACKBONES,
                            help="(default: %(default)s)")
    essentials.add_argument("--pretrained", default="imagenet", metavar="imagenet|none|FILE", type=not_empty,
                            help="the weights to start from (default: %(default)s)")
    essentials.add_argument("--batch_size", type=whole_number(1), default=16, metavar="N",
                            help="images of one card (default: %(default)s)")
    essentials.add_argument("--max_iters", type=whole_number(1), default=10_000, metavar="N",
                            help="length of the training, in iterations (default: %(default)s)")
    essentials.add_argument("--device", default="auto", choices=("auto", "npu", "cuda", "gpu", "cpu"),
                            help="auto takes an NPU, else CUDA, else the CPU (default: %(default)s)")
    essentials.add_argument("--amp", action="store_true",
                            help="mixed precision: float16 on NPU and CUDA, bfloat16 on a CPU (default: float32)")
    essentials.add_argument("--work_dir", metavar="DIR", type=not_empty,
                            help="where the files go (default: output/<device_id>/FCN)")
    essentials.add_argument("--resume", metavar="auto|FILE", type=not_empty,
                            help="go on from a checkpoint; auto: from the work folder's latest, if there is one "
                                 "(default: start afresh)")

    data = parser.add_argument_group("data")
    data.add_argument("--train_split", metavar="LIST",
                      help="a list in ImageSets/Segmentation (default: trainaug; train with --classes)")
    data.add_argument("--val_split", default="val", metavar="LIST",
                      help="the list to evaluate on (default: %(default)s)")
    data.add_argument("--crop_size", type=whole_number(1), default=512, metavar="N",
                      help="side of the training crop, in pixels (default: %(default)s)")
    data.add_argument("--scale", type=whole_number(1), nargs=2, metavar=("LONG", "SHORT"),
                      help="fit images into these sides, in pixels; training varies them by 0.5 to 2 "
                           "(default: 2048 512; with --val the checkpoint's)")
    data.add_argument("--workers", type=whole_number(0), default=min(4, os.cpu_count()), metavar="N",
                      help="processes that load images (default: %(default)s)")

    model = parser.add_argument_group("network")
    model.add_argument("--at_once", action="store_true", help="the --pretrained file holds torchfcn's FCN8sAtOnce")

    recipe = parser.add_argument_group("recipe")
    recipe.add_argument("--lr", type=non_negative, help="learning rate at the start (default: 0.01; vgg16: 0.001)")
    recipe.add_argument("--min_lr", type=non_negative, default=1e-4, help="and at the end (default: %(default)s)")
    recipe.add_argument("--power", type=non_negative, default=0.9,
                        help="of the polynomial between them (default: %(default)s)")
    recipe.add_argument("--momentum", type=non_negative, default=0.9, help="of SGD (default: %(default)s)")
    recipe.add_argument("--weight_decay", type=non_negative, default=5e-4, help="of SGD (default: %(default)s)")
    recipe.add_argument("--seed", type=whole_number(0, 2 ** 63 - 1), default=0, metavar="N",
                        help="of all that is random (default: %(default)s)")

    device = parser.add_argument_group("device and precision")
    device.add_argument("--device_id", type=whole_number(0), metavar="N",
                        help="which of the devices (default: 0; torchrun deals them out)")
    device.add_argument("--device_list", type=device_list, metavar="0,1,..",
                        help="several devices, a process for each, started by torchrun; of --device cpu the numbers "
                             "only count")
    device.add_argument("--timeout", type=whole_number(1), metavar="SECONDS",
                        help=f"how long a process waits for the others before it ends (default: {DEFAULT_TIMEOUT})")
    device.add_argument("--opt_level", choices=("O0", "O1", "O2", "O3"),
                        help="of --amp: O0 mixes nothing, O1 operation by operation; O2 (float16 weights beside "
                             "float32 ones) and O3 (all float16) need apex (default: O1)")
    device.add_argument("--loss_scale", type=loss_scale, metavar="X|dynamic",
                        help="of --amp in float16 (default: 128 on NPU, else dynamic)")
    device.add_argument("--amp_backend", choices=("auto", "apex", "native"),
                        help="of --amp: native is PyTorch's own; auto takes apex where it is installed (default: auto)")
    device.add_argument("--amp_dtype", choices=("float16", "bfloat16"),
                        help="of --amp (default: float16 on NPU and CUDA, bfloat16 on a CPU)")

    files = parser.add_argument_group("run and files")
    files.add_argument("--tensorboard", action="store_true",
                       help="write the metrics and pictures for TensorBoard, too, into tensorboard/ there")
    files.add_argument("--log_interval", type=whole_number(1), default=50, metavar="N",
                       help="iterations between log lines (default: %(default)s)")
    files.add_argument("--eval_interval", type=whole_number(1), default=1000, metavar="N",
                       help="iterations between evaluations; the end is always evaluated (default: %(default)s)")
    files.add_argument("--checkpoint_interval", type=whole_number(1), default=1000, metavar="N",
                       help="iterations between checkpoints; the end is always saved (default: %(default)s)")
    files.add_argument("--keep", type=whole_number(1), default=3, metavar="K",
                       help="how many of the newest checkpoints stay, beside best.pth (default: %(default)s)")
    kind = files.add_mutually_exclusive_group()
    kind.add_argument("--performance", action="store_true",
                      help=f"measure speed: stop after {PERFORMANCE_ITERS} iterations; files in "
                           "output/<device_id>/FCN_prof")
    kind.add_argument("--val", action="store_true",
                      help="do not train: score the work folder's latest checkpoint (or --resume FILE) on --val_split")
    add_launch_flags(parser)
    args = parser.parse_args()

    check_launch(parser, args)
    for flag in TRAINING_FLAGS if args.val else ():
        if getattr(args, flag) != parser.get_default(flag):
            parser.error(f"--{flag} has no effect with --val, which does not train")

    args.train_split = args.train_split or ("train" if args.classes else "trainaug")
    if args.tensorboard and importlib.util.find_spec("tensorboard") is None:
        parser.error("--tensorboard needs the package tensorboard, which is not there; pip install tensorboard")
    if args.lr is None:
        args.lr = LEARNING_RATES.get(args.backbone, DEFAULT_LEARNING_RATE)
    if args.scale is None and not args.val:
        args.scale = DEFAULT_SCALE
    if args.scale and args.scale[0] < args.scale[1]:
        parser.error(f"--scale {args.scale[0]} {args.scale[1]}: the long side comes first")
    if args.momentum >= 1:
        parser.error(f"--momentum {args.momentum}: takes less than 1, or the steps grow without end")
    if args.min_lr > args.lr:
        parser.error(f"--min_lr {args.min_lr} is above --lr {args.lr}; the learning rate falls towards it")
    for flag in ("opt_level", "loss_scale", "amp_backend", "amp_dtype"):
        if getattr(args, flag) is not None and not args.amp:
            parser.error(f"--{flag} {getattr(args, flag)} has no effect without --amp")
    if args.at_once and args.pretrained in ("imagenet", "none"):
        parser.error(f"--at_once has no effect with --pretrained {args.pretrained}")
    args.timeout = args.timeout or DEFAULT_TIMEOUT
    return args


def loss_scale(text):
    return text if text == "dynamic" else positive(text, MAX_LOSS_SCALE)


if __name__ == "__main__":
    ARGS = parse_args()  # before PyTorch is imported, which takes seconds: a usage error answers at once
os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")  # or a broken torch_npu breaks `import torch`
if __name__ == "__main__" and ARGS.launch:
    sys.exit(launch(ARGS, __file__))

import contextlib  # noqa: E402
import dataclasses  # noqa: E402
import datetime  # noqa: E402
import json  # noqa: E402
import re  # noqa: E402
import shlex  # noqa: E402
import shutil  # noqa: E402
import signal  # noqa: E402
import time  # noqa: E402
from pathlib import Path  # noqa: E402

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch.nn.parallel import DistributedDataParallel  # noqa: E402

import pictures  # noqa: E402
from device import (DeviceError, Processes, StopSignal, check_fits, choose_device, choose_precision,  # noqa: E402
                    describe, fused_sgd, memory_format, on_cpu, peak_memory, pins_memory, place, synchronize)
from evaluate import classify, evaluate, format_table, scores_of, summary  # noqa: E402
from fcn8s import (FCN8s, WeightsError, first_line, load_exactly, load_imagenet, load_weights,  # noqa: E402
                   read_checkpoint, unwrap)
from voc import (CLASSES, IGNORE, VOC, DataError, TrainAugmentation, TrainStream, palette, prepare,  # noqa: E402
                 read_classes, train_loader)
from work_folder import RunError, WorkFolder, write_results, write_summary  # noqa: E402

AUX_WEIGHT = 0.4  # of the auxiliary head's loss
VAL_SAMPLES = 6  # images in val_samples.png
MAX_NAN_STEPS = 10  # in a row with a loss that is no number; after so many nothing gets better by itself
WARM_UP_ITERS = 5  # left out of the FPS: the first iterations choose kernels and fill caches


def learning_rate(iteration, args):
    """Polynomial decay: the rate of the step after `iteration` steps, as in the reference."""
    return (args.lr - args.min_lr) * (1 - iteration / args.max_iters) ** args.power + args.min_lr


def losses_of(outputs, labels):
    """The loss to minimise and its parts, float32 [3]: total, main, auxiliary (0 where there is no such head).

    outputs: of FCN8s; labels uint8 [N, H, W]. Cross entropy; pixels labelled IGNORE add nothing to the sum but count
    in the mean, as in the reference.
    """
    def cross_entropy(logits):
        return F.cross_entropy(logits, labels.long(), ignore_index=IGNORE, reduction="sum") / labels.numel()

    main = cross_entropy(outputs["out"])
    auxiliary = cross_entropy(outputs["aux"]) if "aux" in outputs else torch.zeros_like(main)
    return torch.stack([main + AUX_WEIGHT * auxiliary, main, auxiliary])


class Speed:
    """Images per second and waiting for data between two log lines, without the first of a run's `iterations` and
    without the pauses for evaluation and saving."""

    def __init__(self, images_per_iteration, device, iterations):
        self.images, self.device = images_per_iteration, device
        self.skip = min(WARM_UP_ITERS, iterations - 1)  # a shorter run has a speed, too, if a slow one
        self.start()

    def start(self):
        """Begins to count anew."""
        self.iterations, self.waited, self.since = 0, 0.0, time.perf_counter()

    def count(self, waited):
        """One iteration is done; `waited` seconds of it went by before its batch was there."""
        self.iterations += 1
        self.waited += waited
        if self.skip:
            self.skip -= 1
            synchronize(self.device)
            self.start()

    def read(self):
        """dict: fps (images/s), iter_time and data_time (seconds an iteration); None each if nothing was counted."""
        if not self.iterations:
            return {"fps": None, "iter_time": None, "data_time": None}
        synchronize(self.device)
        seconds = (time.perf_counter() - self.since) / self.iterations
        return {"fps": self.images / seconds, "iter_time": seconds, "data_time": self.waited / self.iterations}


@dataclasses.dataclass
class Progress:
    """What a run has done so far; it travels in the checkpoints."""
    iteration: int = 0
    evaluated: int = 0  # the iteration of the last evaluation
    samples: int = 0  # of the stream
    best: float = -1.0  # mIoU
    sums: list = (0.0,) * 5  # since the last log line, of what Trainer.step returns
    skipped: int = 0  # steps that were left out, up to the last log line
    seconds: float = 0.0


class Trainer:
    """A run: the model with its optimizer, on a device among processes, and its progress."""

    def __init__(self, args, model, device, precision, processes, folder, classes=CLASSES):
        self.classes = classes  # their names
        self.args, self.device, self.precision, self.processes, self.folder = args, device, precision, processes, folder
        model = place(model, device).train()
        optimizer = fused_sgd([p for p in model.parameters() if p.requires_grad], device, precision, args.lr,
                              args.momentum, args.weight_decay)
        self.model, self.optimizer = precision.wrap(model, optimizer)
        # Without gradient_as_bucket_view on an NPU: its fused SGD keeps all gradients as one tensor of its own.
        self.network = DistributedDataParallel(self.model, gradient_as_bucket_view=device.type != "npu"
                                               ) if processes.count > 1 else self.model
        self.images = args.batch_size * processes.count  # of an iteration
        self.last = min(args.max_iters, PERFORMANCE_ITERS) if args.performance else args.max_iters
        self.progress = Progress()
        self.nan_run = torch.zeros((), dtype=torch.int32, device=device)  # steps in a row, until now
        self.longest_nan_run = self.nan_run  # of the run

    def resume(self, checkpoint):
        """Goes on where the checkpoint was saved; the model has its weights already."""
        self.precision.load_state_dict(checkpoint["precision"])
        # The momentum is the checkpoint's, the settings are this run's: its device may want another form of SGD.
        own = self.optimizer.state_dict()
        self.optimizer.load_state_dict({**checkpoint["optimizer"], "param_groups": own["param_groups"]})
        for parameter, state in self.optimizer.state.items():
            if state.get("momentum_buffer") is not None:
                # A fused SGD goes through memory as it lies, and on another device it lay in another order.
                state["momentum_buffer"] = torch.empty_like(parameter).copy_(state["momentum_buffer"])
        self.progress = Progress(**checkpoint["progress"])
        if not (self.folder.checkpoints / "best.pth").exists():
            self.progress.best = Progress.best  # a run that goes on in a new folder gets a best.pth of its own

    def train(self, stream, val_data, val_sizes):
        """Trains to the end, or until a signal asks to stop. -> that signal's number, or 0"""
        args, progress = self.args, self.progress
        stop, stopped = StopSignal(self.processes, self.device), 0
        self.started = time.perf_counter() - progress.seconds
        self.sums = torch.tensor(progress.sums, device=self.device)
        if progress.evaluated < progress.iteration and self.due(args.eval_interval):
            stopped = self.evaluate(val_data, val_sizes, stop)  # the stop came before its end
        to_come = (self.last - progress.iteration) * self.images
        batches = iter(train_loader(stream, args.batch_size, progress.samples, progress.samples + to_come, args.workers,
                                    self.processes.rank, self.processes.count, pins_memory(self.device)))
        speed = Speed(self.images, self.device, self.last - progress.iteration)
        while progress.iteration < self.last and not stopped:
            waiting_since = time.perf_counter()
            batch = next(batches)
            waited = time.perf_counter() - waiting_since
            self.sums += self.step(batch)
            progress.iteration += 1
            progress.samples += self.images
            speed.count(waited)
            if self.due(args.log_interval):
                self.log(self.sums.tolist(), speed.read())
                self.sums.zero_()
                speed.start()
            stopped = stop.agreed(progress.iteration)
            if stopped or self.due(args.checkpoint_interval):
                self.save(progress.iteration)  # before an evaluation, which may take long
                speed.start()
            if self.due(args.eval_interval) and not stopped:
                stopped = self.evaluate(val_data, val_sizes, stop)
                speed.start()
        return stopped if progress.evaluated < self.last else 0

    def due(self, interval):
        return self.progress.iteration % interval == 0 or self.progress.iteration == self.last

    def step(self, batch):
        """One iteration on a batch of `train_loader`. A step with infinite gradients is left out.

        -> float32 [5], on the device: the losses (total, main, auxiliary) and 1, or zeros where the loss is no number;
        1 if the step was left out. Nobody waits for it: log and save read it.
        """
        args, iteration = self.args, self.progress.iteration
        # Nothing random outlives an iteration, so that a resumed run draws what an uninterrupted one draws.
        seed = np.random.SeedSequence([args.seed, iteration, self.processes.rank]).generate_state(1)[0]
        torch.manual_seed(int(seed))
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(iteration, args)
        batch = {key: value.to(self.device, non_blocking=True) for key, value in batch.items()}
        layout = memory_format(self.device)
        images = batch["image"].contiguous(memory_format=layout)
        images = prepare(images, self.model.form, batch["size"], batch["jitter"])
        with self.precision.autocast():
            outputs = self.network(images.contiguous(memory_format=layout))
            losses = losses_of(outputs, batch["label"])
        self.optimizer.zero_grad()
        left_out = self.precision.step(losses[0], self.optimizer)
        losses = losses.detach()
        is_number = losses[0].isfinite()
        self.nan_run = torch.where(is_number, 0, self.nan_run + 1)
        self.longest_nan_run = torch.maximum(self.longest_nan_run, self.nan_run)
        return torch.cat([torch.where(is_number, losses, 0.0), torch.stack([is_number, left_out]).float()])

    def log(self, sums, speed):
        """A log line and its twin in metrics.jsonl, of the mean losses; stops the run if those are no numbers any more.

        sums: of what `step` returned, since the last line
        """
        *losses, counted, skipped = sums
        names = ("loss", "loss_main", "loss_aux")
        losses = {name: loss / counted if counted else None for name, loss in zip(names, losses)}
        self.progress.skipped += int(skipped)
        iteration, rate = self.progress.iteration, learning_rate(self.progress.iteration - 1, self.args)
        memory = peak_memory(self.device) / 2 ** 20
        self.folder.add_metrics({"iter": iteration, "lr": rate, **losses, "skipped_steps": self.progress.skipped,
                                 **speed, "memory": memory})
        total, main, auxiliary = ("-" if loss is None else format(loss, ".4f") for loss in losses.values())
        fps, per_iteration, data_time = ("-" if value is None else format(value, style) for value, style in
                                         zip(speed.values(), (".2f", ".3f", ".3f")))
        left = "-"
        if speed["iter_time"] is not None:
            left = datetime.timedelta(seconds=round((self.last - iteration) * speed["iter_time"]))
        self.folder.log(f"iter {iteration}/{self.last}  lr {rate:.2e}  loss {total} (main {main}, "
                        f"aux {auxiliary})  {fps} images/s  iter {per_iteration} s, data {data_time} s  "
                        f"memory {memory:.0f} MiB  left {left}"
                        + (f"  skipped steps {self.progress.skipped}" if self.progress.skipped else ""))
        if self.longest_nan_run >= MAX_NAN_STEPS:
            raise RunError(f"the loss was no number for {int(self.longest_nan_run)} steps in a row, at iteration "
                           f"{iteration}; lower --lr, or go on from one of {self.folder.checkpoints} by --resume")

    def evaluate(self, val_data, val_sizes, stop):
        """Scores the model, and saves it if it is the best so far. A signal ends it without a score, after a checkpoint
        from which it will be done. -> that signal's number, or 0"""
        iteration = self.progress.iteration
        confusion = evaluate(self.model, val_data, val_sizes, self.args.scale, self.device, workers=self.args.workers,
                             processes=self.processes, stop=stop)
        stopped = stop.agreed()
        if stopped:
            self.save(iteration)
            return stopped
        scores = scores_of(confusion)
        self.folder.add_metrics({"iter": iteration, **{name: scores[name] for name in ("aAcc", "mIoU", "mAcc")}})
        if iteration == self.last:
            self.folder.log(format_table(scores, self.classes))
        self.folder.log(f"iter {iteration}/{self.last}  {self.args.val_split}: {summary(scores)}")
        self.progress.evaluated = iteration
        improved = scores["mIoU"] > self.progress.best and not self.nan_run  # else `save` would refuse it
        if improved:
            self.progress.best = scores["mIoU"]
        saves = self.due(self.args.checkpoint_interval) and not self.nan_run  # once more, now with the score
        if improved or saves:
            self.save(iteration if saves else None, improved)
        if self.folder.writes:
            try:
                self.draw(val_data)
            except Exception as error:  # a training of hours does not end for want of a picture
                self.folder.log(f"curves.png or val_samples.png could not be drawn: {first_line(error)}")
            self.model.train()
        return 0

    def draw(self, val_data):
        """Writes curves.png, and val_samples.png: the same few validation images each time, spread over the list."""
        pictures.save(pictures.curves(self.folder.metrics()), self.folder.path / "curves.png")
        self.model.eval()
        samples = []
        for index in np.unique(np.linspace(0, len(val_data) - 1, VAL_SAMPLES).round().astype(int)):
            image, label = val_data[index]
            prediction = classify(self.model, image, self.args.scale, self.device)
            samples.append((image.permute(1, 2, 0).numpy(), label.numpy(), prediction))
        grid = pictures.sample_grid(samples, self.classes, palette())
        pictures.save(grid, self.folder.path / "val_samples.png")
        if self.folder.board:
            self.folder.board.add_image("val_samples", np.asarray(grid), self.progress.iteration, dataformats="HWC")
            self.folder.board.flush()

    def save(self, number, best=False):
        """Writes a checkpoint; one of a network that has come to nothing would only hide the last good one."""
        self.progress.sums, self.progress.seconds = self.sums.tolist(), time.perf_counter() - self.started
        if self.nan_run > 0 and self.progress.iteration == self.last:
            raise RunError(f"the loss is no number at the end, iteration {self.last}; lower --lr, or go on from one of "
                           f"{self.folder.checkpoints} by --resume")
        if self.nan_run > 0:
            self.folder.log(f"no checkpoint at iteration {self.progress.iteration}: the loss is no number")
            return
        if not all(value.isfinite().all() for value in self.model.state_dict().values()):
            raise RunError(f"a weight or BN statistic is no number at iteration {self.progress.iteration}; lower --lr, "
                           f"or go on from one of {self.folder.checkpoints} by --resume")
        meta = {"backbone": self.model.backbone_name, "num_classes": self.model.num_classes,
                "classes": self.classes, "palette": palette()[:len(self.classes)].tolist(), "form": self.model.form,
                "scale": self.args.scale, "seed": self.args.seed, "ranks": self.processes.count,
                "batch_size": self.args.batch_size,
                "recipe": {flag: getattr(self.args, flag) for flag in RECIPE_FLAGS}}
        self.folder.save(on_cpu({"state_dict": self.model.state_dict(), "meta": meta,
                                 "optimizer": self.optimizer.state_dict(), "precision": self.precision.state_dict(),
                                 "progress": dataclasses.asdict(self.progress)}), number, best)


def find_resume(args, folder):
    """(file, checkpoint) to go on from, or None to start afresh."""
    restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"  # by torchrun, as a process died
    if args.resume == "auto" or restarted or args.val and not args.resume:
        found = folder.newest()
        if found is None and args.val:
            raise RunError(f"{folder.path}: holds no checkpoint to score; train first, or name one by --resume FILE")
        if found is not None or args.resume in (None, "auto"):
            return found
    own = args.resume is not None and Path(args.resume).resolve().parent == folder.checkpoints.resolve()
    if folder.holds_run() and not (own or restarted or args.val):
        raise RunError(f"{folder.path}: holds a run already; go on with it by --resume auto, "
                       "or name another folder by --work_dir")
    return args.resume and (args.resume, read_checkpoint(args.resume))


def load_start(model, args, classes, start, ranks):
    """Loads the weights to start from: of `start`, as find_resume returns it, or --pretrained. -> their origin"""
    if start is None:
        if args.pretrained == "none":
            return "random weights"
        if args.pretrained == "imagenet":
            load_imagenet(model)
            return "ImageNet weights"
        return load_weights(model, args.pretrained, at_once=args.at_once).origin

    resume, checkpoint = start
    state, meta = unwrap(checkpoint)
    if not {"state_dict", "optimizer", "precision", "progress"} <= checkpoint.keys():
        raise WeightsError(f"{resume}: holds no training state; start from its weights with --pretrained {resume}")
    for key, ours in (("backbone", model.backbone_name), ("num_classes", model.num_classes)):
        if meta.get(key) != ours:
            raise WeightsError(f"{resume}: has {key} {meta.get(key)}, this run {ours}; they must be the same to resume")
    if tuple(meta.get("classes", classes)) != tuple(classes):
        raise WeightsError(f"{resume}: its classes have other names ({', '.join(meta['classes'])}); give them by "
                           f"--classes, or start from its weights with --pretrained {resume}")
    progress = dict(checkpoint["progress"])
    origin = f"{resume}, iteration {progress.get('iteration')}"
    model.use_form(meta.get("form", "unpadded"))
    load_exactly(model, state, resume)
    if args.val:
        return origin
    if meta.get("seed") != args.seed:
        raise RunError(f"{resume}: is of a run with --seed {meta.get('seed')}, not {args.seed}; a run keeps its seed")
    if progress.get("iteration", 0) > args.max_iters:
        raise RunError(f"{resume}: is of iteration {progress['iteration']}, past --max_iters {args.max_iters}")
    if (meta.get("ranks"), meta.get("batch_size")) != (ranks, args.batch_size):
        origin += (f"; an iteration had {meta.get('ranks')} x {meta.get('batch_size')} images and now has "
                   f"{ranks} x {args.batch_size}, from sample {progress.get('samples')} on")
    was, now = meta.get("recipe", {}), {flag: getattr(args, flag) for flag in RECIPE_FLAGS}
    changed = [f"--{flag} {was[flag]} -> {now[flag]}" for flag in was if flag in now and was[flag] != now[flag]]
    return origin + "".join(f"; {change}" for change in changed)


def open_data(args):
    """The names of the classes, the VOC to train on and the one to evaluate on, all read once, and the latter's sizes."""
    classes = read_classes(args.classes) if args.classes else CLASSES
    train_data, val_data = VOC(args.data_path, args.train_split), VOC(args.data_path, args.val_split)
    train_data.check(len(classes))
    return classes, train_data, val_data, val_data.check(len(classes))


def check_batch(args, stride):
    """BN cannot train on a single value a channel; the deepest features have the fewest."""
    if args.backbone != "vgg16" and args.batch_size == 1 and args.crop_size <= stride:
        raise RunError(f"--crop_size {args.crop_size} with --batch_size 1 leaves batch normalisation one value a "
                       f"channel; --crop_size takes more than {stride} then")


def work_folder(args, device, processes):
    if args.device_list:
        device_ids = ",".join(args.device_list)
    else:
        device_ids = ",".join(map(str, range(processes.count))) if processes.count > 1 else str(device.index or 0)
    path = args.work_dir or Path("output", device_ids, "FCN_prof" if args.performance else "FCN")
    return WorkFolder(path, device_ids, processes.rank == 0, args.keep)


def start_lines(args, trainer, origin, train_images, val_images):
    """What a run is, in a few lines."""
    parameters = sum(p.numel() for p in trainer.model.parameters())
    cards = trainer.processes.count
    return (f"device: {cards} x {describe(trainer.device, args.device)}, {trainer.precision}\n"
            f"network: {args.backbone}, {parameters:,} parameters, from {origin}\n"
            f"data: {args.data_path}, {len(trainer.classes)} classes, {train_images:,} images of '{args.train_split}', "
            f"{val_images:,} of '{args.val_split}'\n"
            f"training: {trainer.last:,} iterations of {cards} x {args.batch_size} = {trainer.images} images, "
            f"{trainer.last * trainer.images / train_images:.1f} epochs\n"
            f"files: {trainer.folder.path}")


def end_lines(args, folder, result):
    """How a run ended, where its files are, and the command that shows what it can do."""
    python = "python" if shutil.which("python") == sys.executable else sys.executable
    command = [python, Path(sys.argv[0]).with_name("evaluate.py"), folder.checkpoints / "best.pth",
               "--data_path", args.data_path, "--split", args.val_split, "--save_dir", folder.path / "val"]
    return (f"done: {folder.path / 'result.json'}: {json.dumps(result)}\n"
            f"best mIoU {result['best_mIoU']:.2f}: {folder.checkpoints / 'best.pth'}\n"
            f"to look at: {folder.path / 'curves.png'}, {folder.path / 'val_samples.png'}\n"
            f"next, to see every prediction: {shlex.join(map(str, command))}")


def train(args, processes):
    """A whole run. -> the exit status"""
    device = choose_device(args.device, args.device_id)
    precision = choose_precision(device, args.amp, args.opt_level, args.loss_scale, args.amp_backend or "auto",
                                 args.amp_dtype)
    folder = work_folder(args, device, processes)
    start = find_resume(args, folder) if folder.writes else None

    processes.join(device, args.timeout)
    start = processes.share(start)  # the other machines need not see the folder
    classes, train_data, val_data, val_sizes = processes.once_a_machine(lambda: open_data(args))
    stream = TrainStream(train_data, TrainAugmentation(args.crop_size, args.scale), args.seed)

    torch.manual_seed(args.seed)
    model = FCN8s(len(classes), args.backbone)
    check_batch(args, model.backbone.stride)
    check_fits(3 * args.batch_size * args.crop_size ** 2,
               f"--batch_size {args.batch_size} at --crop_size {args.crop_size}")
    origin = load_start(model, args, classes, start, processes.count)
    trainer = Trainer(args, model, device, precision, processes, folder, classes)
    if start is not None:
        resume, checkpoint = start
        try:
            trainer.resume(checkpoint)
        except (AttributeError, KeyError, TypeError, ValueError) as error:  # whatever a state of another kind leads to
            raise WeightsError(f"{resume}: its training state does not fit ({first_line(error)}); start from its "
                               f"weights with --pretrained {resume}") from None
        if folder.writes and trainer.progress.iteration >= trainer.last and not folder.metrics():
            raise RunError(f"{resume}: is of iteration {trainer.progress.iteration} of {trainer.last}, nothing is left "
                           "to train; raise --max_iters, or score it with evaluate.py")
    folder.open(trainer.progress.iteration, trainer.progress.evaluated)
    if args.tensorboard:
        folder.open_board(trainer.progress.iteration)
    folder.log(start_lines(args, trainer, origin, len(train_data), len(val_data)))
    stopped = trainer.train(stream, val_data, val_sizes)
    if stopped:
        folder.log(f"stopped by {signal.Signals(stopped).name} at iteration {trainer.progress.iteration}, which is "
                   "saved; --resume auto goes on from there")
        return 128 + stopped  # as shells report a signal
    if folder.writes:
        result = write_results(folder, args, trainer.progress, processes.count)
        folder.log(end_lines(args, folder, result))
    return 0


def validate(args, processes):
    """--val: scores the latest checkpoint, the images split among the cards. -> the exit status"""
    started = time.perf_counter()
    device = choose_device(args.device, args.device_id)
    folder = work_folder(args, device, processes)
    start = find_resume(args, folder) if folder.writes else None
    processes.join(device, args.timeout)
    start = processes.share(start)
    meta = unwrap(start[1])[1]
    classes = read_classes(args.classes) if args.classes else tuple(meta.get("classes", CLASSES))
    scale = args.scale or tuple(meta.get("scale", DEFAULT_SCALE))
    data = VOC(args.data_path, args.val_split)
    sizes = processes.once_a_machine(lambda: data.check(len(classes)))
    model = FCN8s(len(classes), args.backbone)
    origin = load_start(model, args, classes, start, processes.count)

    since = time.perf_counter()
    confusion = evaluate(place(model, device), data, sizes, scale, device, workers=args.workers, processes=processes)
    seconds, scores = time.perf_counter() - since, scores_of(confusion)
    folder.log(f"{format_table(scores, classes)}\n{origin}, on {processes.count} x {describe(device, args.device)}: "
               f"{args.val_split}: {summary(scores)}  ({len(data) / seconds:.2f} images/s)")
    if folder.writes:
        write_summary(folder, args, processes.count, "val", {
            **{name: scores[name] / 100 for name in ("aAcc", "mIoU", "mAcc")}, "ValTime": seconds,
            "E2EValTime": time.perf_counter() - started})
    return 0


def main(args):
    processes = Processes()
    with faults_named(processes):
        status = (validate if args.val else train)(args, processes)
        processes.leave()
    return status


@contextlib.contextmanager
def faults_named(processes):
    """The RuntimeErrors that a lost process leads to become RunErrors; others are bugs and keep their traceback."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        if "DataLoader worker" in str(error):
            raise RunError(f"rank {processes.rank}: a process that loads images died ({first_line(error)}); if memory "
                           "ran out, lower --workers; --resume auto goes on from the latest checkpoint") from None
        if processes.count > 1 and re.search("gloo|nccl|hccl|socket", str(error), re.IGNORECASE):
            raise RunError(f"rank {processes.rank}: lost the other processes ({first_line(error).split('. ')[0]}); the "
                           "one that failed first says why") from None
        raise


if __name__ == "__main__":
    run(main, ARGS, "train.py", (DataError, DeviceError, RunError, WeightsError, torch.OutOfMemoryError))
