"""Trains FCN8s on PASCAL VOC 2012 + SBD, or on data of your own. One card; eight cards; eight cards by torchrun:

    python train.py --data_path data/VOCdevkit/VOC2012 --amp
    python train.py --data_path data/VOCdevkit/VOC2012 --amp --device_list 0,1,2,3,4,5,6,7
    torchrun --nproc_per_node 8 train.py --data_path data/VOCdevkit/VOC2012 --amp

Writes checkpoints, logs, curves and sample pictures to --work_dir; see "Files of a run" in README.md. In this file are
the flags, the recipe (learning rate, losses, step) and `main`: device, data, network and optimizer, loop.
"""
import contextlib
import dataclasses
import importlib.util
import math
import signal
import time
import warnings

from cli import MAX_BATCH, MAX_SIDE, Parser, Stop, UserError, class_weights, number, run  # isort: skip, see cli
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from amp import (
    BatchNormGuard,
    add_precision_flags,
    bn_layers,
    check_precision_flags,
    check_run,
    choose_precision,
    convolutions,
    ddp_settings,
    fused_sgd,
    place,
)
from data import first_samples, open_checked, train_batches, val_batches
from device import add_device_flags, check_device_flags, describe, join_ranks, launch, must_launch, readable_errors
from fcn8s import BACKBONES, DEFAULT_BACKBONE, FCN8s
from inference import Protocol, check_scales, draw, draw_data, evaluate
from metrics import Speed, peak_memory, scores_of
from transforms import prepare, prepare_batch
from voc import CLASS_NAMES, IGNORE, palette
from weights import load_resumed, load_start, resume
from work_dir import memory_hint, open_work_dir

# Flags that shape the result; a checkpoint holds them.
SHAPING = ("backbone", "train_split", "val_split", "crop_size", "scale", "val_scale", "pad_to", "batch_size",
           "accumulate", "max_iters", "lr", "min_lr", "power", "momentum", "weight_decay", "class_weights", "freeze_bn",
           "sync_bn", "compile", "seed", "amp", "opt_level", "loss_scale", "amp_backend", "amp_dtype")
AUX_WEIGHT = 0.4  # of the auxiliary head's loss (mmsegmentation's configs/_base_/models/fcn_r50-d8.py)
MAX_NAN_STEPS = 10  # consecutive steps with a NaN or Inf loss after which the run stops: it does not recover
NAN_INTERVAL = 50  # iterations between two checks for them, which synchronise with the device
PERFORMANCE_ITERS = 1000  # where a performance run stops
not_negative = number(0, math.inf, float)  # an argparse type


# ---- flags; their defaults are the recipe

def parse_args(argv=None):
    parser = Parser("Train FCN8s on PASCAL VOC 2012 + SBD, or on data of your own.",
                    usage="%(prog)s --data_path DIR [flags]")

    essentials = parser.add_argument_group("essentials")
    essentials.add_argument("--data_path", metavar="DIR", required=True,
                            help="a folder in VOC's layout, say data/VOCdevkit/VOC2012")
    essentials.add_argument("--classes", metavar="FILE",
                            help="names of your own classes, one a line, the first the background (default: "
                                 f"{CLASS_NAMES} in the data folder, else VOC's 21)")
    essentials.add_argument("--backbone", default=DEFAULT_BACKBONE, choices=tuple(BACKBONES),
                            help="(default: %(default)s)")
    essentials.add_argument("--pretrained", default="imagenet", metavar="imagenet|none|NAME|FILE",
                            help="the weights to start from; NAME: resnet50_d8_voc or resnet101_d8_voc, trained on VOC "
                                 "(default: %(default)s)")
    essentials.add_argument("--batch_size", type=number(1, MAX_BATCH), default=16, metavar="N",
                            help="images of one card that go through the network at once (default: %(default)s)")
    essentials.add_argument("--max_iters", type=number(1), default=10_000, metavar="N",
                            help="length of the training, in iterations (default: %(default)s)")
    essentials.add_argument("--amp", action="store_true",
                            help="mixed precision: float16 on NPU and CUDA, bfloat16 on a CPU (default: float32)")
    essentials.add_argument("--work_dir", metavar="DIR",
                            help="where the files go (default: output/<device_id>/FCN)")
    essentials.add_argument("--resume", metavar="auto|FILE",
                            help="resume from a checkpoint; auto: from the work folder's latest, if there is one "
                                 "(default: start afresh)")

    data = parser.add_argument_group("data")
    data.add_argument("--train_split", metavar="LIST",
                      help="a list in ImageSets/Segmentation (default: trainaug; train with classes of your own)")
    data.add_argument("--val_split", default="val", metavar="LIST",
                      help="the list to evaluate on (default: %(default)s)")
    data.add_argument("--val_fraction", type=number(0, 1, float, without=(0, 1)), metavar="X",
                      help="if the folder has no lists: the share of its images to evaluate on, drawn by --seed "
                           "(default: 0.2)")
    data.add_argument("--crop_size", type=number(1, MAX_SIDE), default=512, metavar="N",
                      help="side of the training crop, in pixels (default: %(default)s)")
    data.add_argument("--scale", type=number(1, 2 ** 16), nargs=2, metavar=("LONG", "SHORT"), default=(2048, 512),
                      help="fit images into these sides, in pixels; training varies them by 0.5 to 2 "
                           "(default: 2048 512)")
    data.add_argument("--val_scale", type=number(1, 2 ** 16), nargs=2, metavar=("LONG", "SHORT"),
                      help="fit the images to evaluate into these sides (default: those of --scale)")
    data.add_argument("--pad_to", type=number(0, MAX_SIDE), metavar="N",
                      help="and pad them right and bottom to N x N pixels; the Ascend port has --val_scale 512 512 "
                           "--pad_to 512 (default: 0, no padding)")
    data.add_argument("--workers", type=number(0), metavar="N",
                      help="processes that load images, for each card (default: 4, fewer where the cores are few)")

    recipe = parser.add_argument_group("recipe")
    recipe.add_argument("--at_once", action="store_true", help="the --pretrained file holds torchfcn's FCN8sAtOnce")
    recipe.add_argument("--lr", type=not_negative, help="learning rate at the start (default: 0.01; vgg16: 0.001)")
    recipe.add_argument("--min_lr", type=not_negative, default=1e-4, help="and at the end (default: %(default)s)")
    recipe.add_argument("--power", type=not_negative, default=0.9,
                        help="of the polynomial between them (default: %(default)s)")
    recipe.add_argument("--momentum", type=number(0, 1, float, without=(1,)), default=0.9,
                        help="of SGD (default: %(default)s)")
    recipe.add_argument("--weight_decay", type=not_negative, default=5e-4, help="of SGD (default: %(default)s)")
    recipe.add_argument("--accumulate", type=number(1, MAX_BATCH), default=1, metavar="N",
                        help="batches whose gradients make one step, so that an iteration sees N x --batch_size images "
                             "of a card (default: %(default)s)")
    recipe.add_argument("--freeze_bn", action="store_true",
                        help="keep the BN statistics of the weights to start from, for small batches")
    recipe.add_argument("--sync_bn", action="store_true",
                        help="BN statistics over the batches of all NPUs or GPUs (default: each card's own)")
    recipe.add_argument("--compile", action="store_true",
                        help="torch.compile of colours, network and losses, which takes a minute at the start "
                             "(default: off)")
    recipe.add_argument("--class_weights", metavar="FILE", type=class_weights,
                        help="a number for each class, one a line: the weight of its pixels in the loss (default: all "
                             "1)")
    recipe.add_argument("--seed", type=number(0, 2 ** 63 - 1), default=0, metavar="N",
                        help="of all that is random (default: %(default)s)")

    add_device_flags(parser)
    add_precision_flags(parser)

    files = parser.add_argument_group("run and files")
    files.add_argument("--tensorboard", action="store_true",
                       help="write the metrics and pictures for TensorBoard, too, into tensorboard/ there")
    files.add_argument("--log_interval", type=number(1), default=50, metavar="N",
                       help="iterations between log lines (default: %(default)s)")
    files.add_argument("--eval_interval", type=number(1), default=1000, metavar="N",
                       help="iterations between evaluations; the end is always evaluated (default: %(default)s)")
    files.add_argument("--checkpoint_interval", type=number(1), default=1000, metavar="N",
                       help="iterations between checkpoints; the end is always saved (default: %(default)s)")
    files.add_argument("--keep", type=number(1), default=3, metavar="K",
                       help="how many of the newest checkpoints stay, apart from best.pth (default: %(default)s)")
    files.add_argument("--check", action="store_true",
                       help="do all that comes before the first iteration, print what the lists hold, draw data.png "
                            "and train_batch.png, and end")
    files.add_argument("--performance", action="store_true",
                       help="measure speed: stop after 1,000 iterations; files in output/<device_id>/FCN_prof")
    args = parser.parse_args(argv)
    check_flags(parser, args)
    return args


def check_flags(parser, args):
    """Flags that contradict each other are a usage error. Fills in defaults that depend on other flags."""
    check_device_flags(parser, args)
    if args.tensorboard and importlib.util.find_spec("tensorboard") is None:
        parser.error("--tensorboard needs the package tensorboard, which is missing; pip install tensorboard")
    if args.lr is None:
        args.lr = BACKBONES[args.backbone].lr
    check_scales(parser, args, "scale", "val_scale")
    args.val_scale, args.pad_to = args.val_scale or args.scale, args.pad_to or None
    if args.min_lr > args.lr:
        parser.error(f"--min_lr {args.min_lr} is above --lr {args.lr}; the learning rate falls towards it")
    check_precision_flags(parser, args)
    if args.sync_bn and args.freeze_bn:
        parser.error("--sync_bn has no effect with --freeze_bn, which takes no statistics")
    if args.performance and args.resume:
        parser.error("--performance and --resume do not go together: a performance run always starts afresh")
    if args.max_restarts and args.resume != "auto":
        parser.error("--max_restarts needs --resume auto, or a restarted run would find its own folder taken")
    if args.at_once and args.pretrained in ("imagenet", "none"):
        parser.error(f"--at_once has no effect with --pretrained {args.pretrained}")


# ---- the recipe

def learning_rate(iteration, args):
    """Polynomial decay: the rate of the step after `iteration` steps, as in the reference, mmsegmentation 0.10.

    For another schedule, change this function.
    """
    share_left = 1 - iteration / args.max_iters
    return (args.lr - args.min_lr) * share_left ** args.power + args.min_lr


def recipe_lines(args, model):
    """The recipe, for the log. What is changed below, or in transforms.py, is changed here, too."""
    loss = "cross entropy" if model.auxiliary_head is None else f"main + {AUX_WEIGHT} x auxiliary"
    return (f"recipe: SGD, lr {args.lr} to {args.min_lr} by a polynomial of power {args.power}, momentum "
            f"{args.momentum}, weight decay {args.weight_decay}; loss: {loss}\n"
            f"augmentation: fitted into {args.scale[0]}x{args.scale[1]}, times 0.5 to 2; crop {args.crop_size}, flip, "
            "photometric distortion")


def losses_of(outputs, labels, class_weights=None):
    """The loss to minimise and its parts, float32 [3]: total, main, auxiliary (0 without that head).

    outputs: of FCN8s; labels: uint8 [N, H, W]; class_weights: float32 [C], of each class's pixels in the sum
    Cross entropy, summed and divided by the number of pixels. Those labelled IGNORE add 0 to the sum but count in the
    divisor, as in mmsegmentation.
    """
    def cross_entropy(logits):
        loss = F.cross_entropy(logits, labels.long(), class_weights, ignore_index=IGNORE, reduction="sum")
        return loss / labels.numel()

    main = cross_entropy(outputs["out"])
    auxiliary = cross_entropy(outputs["aux"]) if "aux" in outputs else torch.zeros_like(main)
    return torch.stack([main + AUX_WEIGHT * auxiliary, main, auxiliary])


class WithLosses(nn.Module):
    """A network and its losses in one module, so that DistributedDataParallel and torch.compile see both."""

    def __init__(self, model, class_weights=None):
        super().__init__()
        self.model, self.class_weights = model, class_weights

    def forward(self, images, labels):
        return losses_of(self.model(images), labels, self.class_weights)


def train_step(network, batches, optimizer, precision, bn_guard, count=1):
    """Adds up the gradients of some batches and makes one optimizer step.

    network: a WithLosses; batches: an iterable of `count` pairs, images float32 [N, 3, H, W] and labels uint8 [N, H, W]
    A step with NaN or Inf in the loss or the gradients is skipped: it changes neither parameters nor momentum nor BN
    statistics, on any rank.
    -> float32 [5], on the device, without a synchronisation with it: the mean losses (total, main, auxiliary) and 1, or
    zeros if the loss is NaN or Inf; 1 if the step was skipped
    """
    bn_guard.keep()
    optimizer.zero_grad()
    losses = 0
    for index, (images, labels) in enumerate(batches, 1):
        # DistributedDataParallel averages the gradients in the last batch only.
        adds_up = index < count and hasattr(network, "no_sync")
        with network.no_sync() if adds_up else contextlib.nullcontext():
            with precision.autocast():
                part = network(images, labels) * (1 / count)
            # A sum that overflows may have finite gradients: NaN times them makes every rank skip the step.
            precision.backward(part[0] * torch.where(part[0].isfinite(), 1.0, math.nan), optimizer)
        losses = losses + part.detach()
    skipped = precision.step(optimizer)
    bn_guard.restore_if(skipped)
    finite = losses[0].isfinite()
    return torch.cat([torch.where(finite, losses, 0.0), torch.stack([finite, skipped]).float()])


def train_mode(model, freeze_bn):
    """Dropout and BN as in training. With freeze_bn, BN layers use and keep the statistics they have."""
    model.train()
    for layer in bn_layers(model) if freeze_bn else ():
        layer.eval()


@dataclasses.dataclass
class Progress:
    """What a run has done so far. Checkpoints hold it."""
    iteration: int = 0
    evaluated: int = 0  # iteration of the last evaluation
    samples: int = 0  # taken from the stream of training samples
    best: float = -1.0  # mIoU of best.pth
    best_iteration: int = 0  # and its iteration
    sums: list | tuple = (0.0,) * 5  # of train_step's results since the last log line
    skipped: int = 0  # steps, up to the last log line
    seconds: float = 0.0  # of training, of all starts together


# ---- a run

def main(args):
    if must_launch(args):
        return launch(args, __file__)
    ranks = join_ranks(args)
    device, images_per_iteration = ranks.device, args.batch_size * args.accumulate * ranks.count
    last = min(args.max_iters, PERFORMANCE_ITERS) if args.performance else args.max_iters
    precision = choose_precision(device, args.amp, args.opt_level, args.loss_scale, args.amp_backend, args.amp_dtype)
    with Stop(ranks) as stop, open_work_dir(args, ranks) as work_dir, readable_errors(memory_hint(args)):
        start = ranks.share(work_dir.find_start(args.resume))  # other machines need not see the folder; None: afresh

        # data
        data, val_sizes = open_checked(args, start and start.meta.get("lists"), ranks)
        args.train_split, args.val_split = data.train.split, data.val.split
        protocol = Protocol(args.val_scale, pad_to=args.pad_to)
        protocol.check(val_sizes)

        # network and optimizer
        torch.manual_seed(args.seed)
        model = FCN8s(len(data.classes), args.backbone)
        check_run(args, ranks, precision, model, data.classes)
        origin = (load_resumed(model, args, data, ranks, start) if start else
                  load_start(model, args, data.classes, ranks))
        if args.sync_bn:
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # the keys of the state dict stay the same
        model = place(model, device)
        optimizer = fused_sgd(model.parameters(), device, precision, args.lr, args.momentum, args.weight_decay)
        model, optimizer = precision.wrap(model, optimizer)
        bn_guard = BatchNormGuard(model)
        network = WithLosses(model, args.class_weights and torch.tensor(args.class_weights, device=device))
        if ranks.count > 1:
            network = DistributedDataParallel(network, **ddp_settings(device, precision))
        preparing = prepare
        if args.compile:
            warnings.filterwarnings("ignore", module=r"torch\._(dynamo|inductor)")  # advice to those who write them
            network, preparing = (torch.compile(each, dynamic=False) for each in (network, prepare))
        progress = Progress()
        saved = start and resume(args, optimizer, precision, data, start, progress)  # the last checkpoint's iteration
        about = describe(device, args.device)
        if not args.check:
            work_dir.open(start, progress, last, args.tensorboard)
            work_dir.add_record(args, data, about, origin)
        del start  # it holds the weights and the momentum once more
        work_dir.log_start(args, ranks, about, data, protocol, model, precision, last, origin,
                           recipe_lines(args, model))
        if work_dir.writes and (args.check or not args.performance):
            draw_data(work_dir, data, first_samples(data.train, args, progress.samples), model.form, device)
        if args.check:
            return ranks.leave()

        # loop
        began = time.perf_counter() - progress.seconds
        sums = torch.tensor(progress.sums, device=device)  # of train_step's results
        nan_run = longest_nan_run = torch.zeros((), dtype=torch.int32, device=device)  # steps in a row with a NaN loss

        def due(interval):
            return progress.iteration % interval == 0 or progress.iteration == last

        def fail(what):
            resumes = "" if saved is None else " and resume with --resume auto"
            raise UserError(f"{what} at iteration {progress.iteration}; lower --lr{resumes}")

        def save(best=False):
            """Saves a checkpoint, but not while the loss is NaN or Inf: the last good one stays the newest."""
            nonlocal saved
            if nan_run > 0 and progress.iteration == last:
                fail("the last loss is NaN or Inf,")
            if nan_run > 0 or args.performance:
                if not args.performance:
                    work_dir.log(f"no checkpoint at iteration {progress.iteration}: the loss is NaN or Inf")
                return
            if not all(value.isfinite().all() for value in model.state_dict().values()):
                fail("a weight or BN statistic is NaN or Inf")
            progress.sums, progress.seconds = sums.tolist(), time.perf_counter() - began
            meta = {"backbone": args.backbone, "num_classes": model.num_classes, "classes": data.classes,
                    "palette": palette()[:model.num_classes].tolist(), "form": model.form, "scale": protocol.scale,
                    "args": {name: getattr(args, name) for name in SHAPING}, "ranks": ranks.count,
                    "digests": data.digests(), "lists": data.lists, "images": data.images}
            work_dir.save({"state_dict": model.state_dict(), "meta": meta, "optimizer": optimizer.state_dict(),
                           "precision": precision.state_dict(), "progress": dataclasses.asdict(progress)},
                          progress.iteration if due(args.checkpoint_interval) else None, best)
            saved = progress.iteration

        def evaluate_now():
            """Scores the model, saves it with its score, and draws. It was saved before, as a signal may end this."""
            if ranks.count > 1:
                bn_guard.broadcast()
            with stop.at_once(), precision.evaluated(model) as scored:
                batches = val_batches(data.val, val_sizes, protocol, args.workers, ranks)
                scores = scores_of(evaluate(scored, batches, protocol, ranks, total=len(val_sizes) // ranks.count))
                work_dir.log_scores(progress.iteration, scores, data, last)
                progress.evaluated = progress.iteration
                best = scores["mIoU"] > progress.best and not nan_run
                if best:
                    progress.best, progress.best_iteration = scores["mIoU"], progress.iteration
                if not nan_run:
                    save(best)
                if work_dir.writes:
                    draw(work_dir, scored.eval(), data, protocol, device, progress.iteration, scores)
            train_mode(model, args.freeze_bn)

        train_mode(model, args.freeze_bn)
        if progress.evaluated < progress.iteration and due(args.eval_interval):
            evaluate_now()  # a signal interrupted it
        end = progress.samples + (last - progress.iteration) * images_per_iteration
        batches = train_batches(data.train, args, progress.samples, end, ranks)
        speed = Speed(device, images_per_iteration, last - progress.iteration)
        bar = work_dir.progress_bar(progress.iteration, last)
        stop.deferred = True
        while progress.iteration < last:
            waiting = time.perf_counter()
            loaded = [next(batches) for _ in range(args.accumulate)]
            waited = time.perf_counter() - waiting

            for group in optimizer.param_groups:
                group["lr"] = learning_rate(progress.iteration, args)
            # Seeded in each iteration, so that a resumed run draws the same dropout masks as an uninterrupted one.
            seed = np.random.SeedSequence([args.seed, progress.iteration, ranks.rank]).generate_state(1)[0]
            torch.manual_seed(int(seed))
            with convolutions(device, training=True):
                # Each is prepared when its turn comes, so that the device holds one at a time.
                parts = (prepare_batch(batch, model.form, device, preparing) for batch in loaded)
                result = train_step(network, parts, optimizer, precision, bn_guard, args.accumulate)
            sums += result
            nan_run = torch.where(result[3] > 0, 0, nan_run + 1)
            longest_nan_run = torch.maximum(longest_nan_run, nan_run)
            progress.iteration += 1
            progress.samples += images_per_iteration
            speed.count(waited)
            bar.update()

            if due(args.log_interval):
                work_dir.log_losses(progress, sums.tolist(), learning_rate(progress.iteration - 1, args), speed.read(),
                                    peak_memory(device), last, model.auxiliary_head is not None)
                sums.zero_()
            if (due(NAN_INTERVAL) or due(args.log_interval)) and longest_nan_run >= MAX_NAN_STEPS:
                fail(f"the loss was NaN or Inf for {int(longest_nan_run)} steps in a row,")
            stopped = stop.agreed(progress.iteration)
            if stopped or due(args.checkpoint_interval) or due(args.eval_interval):
                save()
                if stopped:
                    work_dir.log(f"stopped by {signal.Signals(stopped).name} at iteration {progress.iteration}"
                                 + (", which is saved; resume with --resume auto" if saved == progress.iteration else
                                    f"; last checkpoint: {'none' if saved is None else f'iteration {saved}'}"))
                    return stop.leave(stopped)
                if due(args.eval_interval):
                    evaluate_now()
                speed.start()
        progress.seconds = time.perf_counter() - began
        work_dir.finish(args, progress, ranks)
        return ranks.leave()


if __name__ == "__main__":
    run(main, parse_args)
