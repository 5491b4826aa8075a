"""The training, top to bottom: the recipe, its learning rate and losses, a step, and the loop around it."""
import contextlib
import dataclasses
import datetime
import inspect
import math
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

import batchnorm
import curves
import pictures
from augment import BatchOrder, prepare, train_batches
from device import convolutions, on_cpu, peak_memory, pins_memory, place, to_device
from errors import RunError, first_line
from inference import Protocol, classify, evaluate
from palette import palette
from precision import fused_sgd
from processes import StoppedWaiting, StopSignal
from scores import for_json, format_table, number, scores_of, summary
from speed import Pace, Speed
from voc import IGNORE

AUX_WEIGHT = 0.4  # of the auxiliary head's loss (mmsegmentation's configs/_base_/models/fcn_r50-d8.py)
VAL_SAMPLES = 6  # images in val_samples.png
MAX_NAN_STEPS = 10  # consecutive steps with a NaN or Inf loss after which the run stops: it does not recover
NAN_INTERVAL = 50  # iterations between two checks for them, which synchronise with the device


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Everything that shapes the result of a training; it travels in the checkpoints. The fields are train.py's flags
    of these names, where their units and defaults stand, and

    ranks: the world size
    precision: in words
    train_list, val_list: the SHA-256 of the lists of images
    """
    backbone: str
    train_split: str
    val_split: str
    crop_size: int
    scale: tuple
    pad_to: int | None
    batch_size: int
    accumulate: int
    max_iters: int
    lr: float
    min_lr: float
    power: float
    momentum: float
    weight_decay: float
    class_weights: tuple | None
    freeze_bn: bool
    seed: int
    sync_bn: bool = False
    compile: bool = False
    ranks: int = 1
    precision: str = "float32"
    train_list: str = ""
    val_list: str = ""

    @property
    def images_per_iteration(self):
        """On all cards."""
        return self.batch_size * self.accumulate * self.ranks


@dataclasses.dataclass(frozen=True)
class Intervals:
    """How many iterations lie between two log lines, evaluations and checkpoints, and the run's last iteration."""
    log: int
    evaluation: int
    checkpoint: int
    last: int


@dataclasses.dataclass
class Progress:
    """What a run has done so far; it travels in the checkpoints."""
    iteration: int = 0
    evaluated: int = 0  # the iteration of the last evaluation
    samples: int = 0  # of the stream
    best: float = -1.0  # mIoU of best.pth
    best_iteration: int = 0  # and its iteration
    sums: list = (0.0,) * 5  # since the last log line, of what Trainer.step returns
    skipped: int = 0  # steps that were left out, up to the last log line
    seconds: float = 0.0


def learning_rate(iteration, recipe):
    """Polynomial decay: the rate of the step after `iteration` steps, as in the reference, mmsegmentation 0.10.

    To use another schedule, change this function.
    """
    share_left = 1 - iteration / recipe.max_iters
    return (recipe.lr - recipe.min_lr) * share_left ** recipe.power + recipe.min_lr


def losses_of(outputs, labels, class_weights=None):
    """The loss to minimise and its parts, float32 [3]: total, main, auxiliary (0 where there is no such head).

    outputs: of FCN8s; labels uint8 [N, H, W]; class_weights: float32 [C], of each class's pixels in the sum
    Cross entropy, summed and divided by the number of pixels. Those labelled IGNORE add 0 to the sum but count in the
    divisor, as in mmsegmentation.
    """
    def cross_entropy(logits):
        loss = F.cross_entropy(logits, labels.long(), class_weights, ignore_index=IGNORE, reduction="sum")
        return loss / labels.numel()

    main = cross_entropy(outputs["out"])
    auxiliary = cross_entropy(outputs["aux"]) if "aux" in outputs else torch.zeros_like(main)
    return torch.stack([main + AUX_WEIGHT * auxiliary, main, auxiliary])


class WithLosses(torch.nn.Module):
    """A network and its losses in one module, so that torch.compile sees both: images, labels -> as `losses_of`."""

    def __init__(self, model, class_weights):
        super().__init__()
        self.model, self.class_weights = model, class_weights

    def forward(self, images, labels):
        return losses_of(self.model(images), labels, self.class_weights)


class Trainer:
    """A training: the network with its optimizer, on a device among ranks, and its progress.

    model: an FCN8s with the weights to start from; folder: the WorkFolder; classes: their names
    lists: {"train": ids, "val": ids} where the data folder holds no lists, for the checkpoints
    """

    def __init__(self, recipe, model, device, precision, processes, folder, intervals, classes, lists=None):
        self.lists = lists
        self.recipe, self.device, self.precision, self.processes = recipe, device, precision, processes
        self.folder, self.intervals, self.classes = folder, intervals, classes
        if recipe.sync_bn:  # the keys of the state dict stay the same
            model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
        model = place(model, device)
        optimizer = fused_sgd([p for p in model.parameters() if p.requires_grad], device, precision, recipe.lr,
                              recipe.momentum, recipe.weight_decay)
        self.model, self.optimizer = precision.wrap(model, optimizer)
        self.statistics = batchnorm.RunningStatistics(self.model)
        class_weights = torch.tensor(recipe.class_weights, device=device) if recipe.class_weights else None
        self.network = WithLosses(self.model, class_weights)
        if processes.count > 1:
            self.network = DistributedDataParallel(self.network, **ddp_settings(device, precision))
        if recipe.compile:
            self.network = torch.compile(self.network, dynamic=False)
        self.train_mode()
        self.protocol = Protocol(recipe.scale, pad_to=recipe.pad_to)
        self.progress = Progress()
        self.saved = None  # the iteration of the last checkpoint
        self.nan_run = torch.zeros((), dtype=torch.int32, device=device)  # NaN steps in a row, until now
        self.longest_nan_run = self.nan_run  # of the run

    def train_mode(self):
        self.model.train()
        if self.recipe.freeze_bn:
            batchnorm.freeze(self.model)

    def resume(self, training):
        """Goes on from a checkpoint's training state; the model has its weights already."""
        self.precision.load_state_dict(training["precision"])
        # The momentum is the checkpoint's, param_groups are this run's: another device takes another form of SGD.
        own = self.optimizer.state_dict()
        self.optimizer.load_state_dict({**training["optimizer"], "param_groups": own["param_groups"]})
        for parameter, state in self.optimizer.state.items():
            if state.get("momentum_buffer") is not None:
                # Fused SGD reads parameter and momentum in storage order, which differs between devices.
                state["momentum_buffer"] = torch.empty_like(parameter).copy_(state["momentum_buffer"])
        self.progress = Progress(**training["progress"])
        self.saved = self.progress.iteration

    def train(self, stream, val_data, val_sizes, workers):
        """Trains to the end, or until a signal asks to stop. -> that signal's number, or 0"""
        progress, intervals = self.progress, self.intervals
        stop, stopped = StopSignal(self.processes, self.device), 0
        self.started = time.perf_counter() - progress.seconds
        self.sums = torch.tensor(progress.sums, device=self.device)
        batches = self.batches(stream, workers)
        pace = Pace(self.folder, self.device, progress.iteration, intervals.last)
        try:
            if progress.evaluated < progress.iteration and self.due(intervals.evaluation):
                stopped = self.evaluate(val_data, val_sizes, workers, stop)  # a stop interrupted it
            speed = Speed(self.recipe.images_per_iteration, self.device, intervals.last - progress.iteration)
            pace.since = time.perf_counter()
            while progress.iteration < intervals.last and not stopped:
                waiting_since = time.perf_counter()
                step_batches = [stop.wait_for(batches) for _ in range(self.recipe.accumulate)]
                waited = time.perf_counter() - waiting_since
                self.sums += self.step(step_batches)
                progress.iteration += 1
                progress.samples += self.recipe.images_per_iteration
                speed.count(waited)
                pace.count()
                if self.due(intervals.log):
                    self.log(self.sums.tolist(), speed.read())
                    self.sums.zero_()
                    speed.start()
                if self.due(NAN_INTERVAL) or self.due(intervals.log):
                    self.check_nan()
                stopped = stop.agreed(progress.iteration)
                if stopped or self.due(intervals.checkpoint):
                    self.save(progress.iteration)  # before an evaluation, which may take long
                    speed.start()
                if self.due(intervals.evaluation) and not stopped:
                    stopped = self.evaluate(val_data, val_sizes, workers, stop)
                    speed.start()
        except StoppedWaiting:
            stopped = stop.number
            self.save(progress.iteration)
        finally:
            pace.bar.close()
        return stopped if progress.evaluated < intervals.last else 0

    def batches(self, stream, workers):
        """An iterator over the rest of this rank's batches."""
        recipe, progress, processes = self.recipe, self.progress, self.processes
        last = progress.samples + (self.intervals.last - progress.iteration) * recipe.images_per_iteration
        order = BatchOrder(progress.samples, last, recipe.batch_size, recipe.accumulate, processes.rank,
                           processes.count)
        return iter(train_batches(stream, order, workers, pins_memory(self.device)))

    def due(self, interval):
        return self.progress.iteration % interval == 0 or self.progress.iteration == self.intervals.last

    def step(self, batches):
        """One iteration: the gradients of some batches of `train_batches`, then one optimizer step.

        A step with NaN or Inf in the loss or the gradients is skipped: it changes neither parameters nor momentum nor
        BN statistics, on any rank.
        -> float32 [5], on the device, without a synchronisation with it: the mean losses (total, main, auxiliary) and
        1, or zeros if the loss is NaN or Inf; 1 if the step was skipped
        """
        recipe, iteration = self.recipe, self.progress.iteration
        # Seeded in each iteration, so that a resumed run draws the same dropout masks as an uninterrupted one.
        seed = np.random.SeedSequence([recipe.seed, iteration, self.processes.rank]).generate_state(1)[0]
        torch.manual_seed(int(seed))
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(iteration, recipe)
        self.statistics.keep()
        self.optimizer.zero_grad()
        losses = 0
        with convolutions(self.device, training=True):
            for number, batch in enumerate(batches, 1):
                with self.exchanging_gradients(number == len(batches)):
                    losses = losses + self.gradients_of(to_device(batch, self.device), 1 / len(batches))
        skipped = self.precision.step(self.optimizer)
        self.statistics.restore_if(skipped)
        finite = losses[0].isfinite()
        self.nan_run = torch.where(finite, 0, self.nan_run + 1)
        self.longest_nan_run = torch.maximum(self.longest_nan_run, self.nan_run)
        return torch.cat([torch.where(finite, losses, 0.0), torch.stack([finite, skipped]).float()])

    def exchanging_gradients(self, last):
        """A context: DistributedDataParallel averages the gradients in the last batch of a step only."""
        if last or self.processes.count == 1:
            return contextlib.nullcontext()
        return self.network.no_sync()

    def gradients_of(self, batch, weight):
        """Adds the gradients of a batch's loss times `weight`. -> its losses times `weight`, float32 [3]"""
        images = prepare(batch["image"], self.model.form, batch["size"], batch["jitter"])
        with self.precision.autocast():
            losses = self.network(images, batch["label"]) * weight
        # A sum that overflows may have finite gradients: NaN times them makes every rank skip the step.
        self.precision.backward(losses[0] * torch.where(losses[0].isfinite(), 1.0, math.nan), self.optimizer)
        return losses.detach()

    def log(self, sums, speed):
        """A log line and its twin in metrics.jsonl, of the mean losses.

        sums: of what `step` returned, since the last line
        """
        *losses, counted, skipped = sums
        names = ("loss", "loss_main", "loss_aux")
        losses = {name: loss / counted if counted else None for name, loss in zip(names, losses, strict=True)}
        self.progress.skipped += int(skipped)
        iteration, rate = self.progress.iteration, learning_rate(self.progress.iteration - 1, self.recipe)
        memory = peak_memory(self.device) / 2 ** 20
        self.folder.add_metrics({"iter": iteration, "lr": rate, **losses, "skipped_steps": self.progress.skipped,
                                 **speed, "memory": memory})
        total, main, auxiliary = (number(loss, ".4f") for loss in losses.values())
        left = "-"
        if speed["iter_time"] is not None:
            left = datetime.timedelta(seconds=round((self.intervals.last - iteration) * speed["iter_time"]))
        self.folder.log(f"iter {iteration}/{self.intervals.last}  lr {rate:.2e}  loss {total} (main {main}, "
                        f"aux {auxiliary})  {number(speed['fps'], '.2f')} images/s  iter "
                        f"{number(speed['iter_time'], '.3f')} s, data {number(speed['data_time'], '.3f')} s  "
                        f"memory {memory:.0f} MiB  left {left}"
                        + (f"  skipped steps {self.progress.skipped}" if self.progress.skipped else ""))

    def check_nan(self):
        """Raises RunError after MAX_NAN_STEPS consecutive steps whose loss was NaN or Inf."""
        if self.longest_nan_run >= MAX_NAN_STEPS:
            raise RunError(f"the loss was NaN or Inf for {int(self.longest_nan_run)} steps in a row, at iteration "
                           f"{self.progress.iteration}; lower --lr{self.way_back()}")

    def way_back(self):
        """How to go on after an error, in words."""
        return "" if self.saved is None else f", or go on from one of {self.folder.checkpoints} by --resume"

    def evaluate(self, val_data, val_sizes, workers, stop):
        """Scores the model, and saves it if it is the best so far. On a signal it saves and returns without a score;
        the resumed run evaluates again. -> the signal's number, or 0"""
        iteration, last = self.progress.iteration, self.intervals.last
        if self.processes.count > 1:
            self.statistics.broadcast()
        with self.precision.evaluated(self.model) as model:
            confusion = evaluate(model, val_data, val_sizes, self.protocol, self.device, workers, self.processes,
                                 stop=stop)
        stopped = stop.agreed()
        if stopped:
            self.save(iteration)
            return stopped
        scores = scores_of(confusion)
        self.folder.add_metrics({"iter": iteration, **for_json(scores, self.classes)})
        if iteration == last:
            self.folder.log(format_table(scores, self.classes))
        self.folder.log(f"iter {iteration}/{last}  {self.recipe.val_split}: {summary(scores)}")
        self.progress.evaluated = iteration
        improved = scores["mIoU"] > self.progress.best and not self.nan_run  # else `save` would refuse it
        if improved:
            self.progress.best, self.progress.best_iteration = scores["mIoU"], iteration
        saves = self.due(self.intervals.checkpoint) and not self.nan_run  # once more, now with the score
        if improved or saves:
            self.save(iteration if saves else None, improved)
        if self.folder.writes:
            try:
                self.draw(val_data, scores)
            except Exception as error:  # a failed plot does not end a training of hours
                self.folder.log(f"curves.png or val_samples.png could not be drawn: {first_line(error)}")
        self.train_mode()
        return 0

    def draw(self, val_data, scores):
        """Writes curves.png, and val_samples.png: the same few validation images each time, spread over the list."""
        pictures.save(curves.draw(self.folder.metrics(), self.classes), self.folder.path / "curves.png")
        samples = []
        with self.precision.evaluated(self.model) as model:
            model.eval()
            for index in np.unique(np.linspace(0, len(val_data) - 1, VAL_SAMPLES).round().astype(int)):
                image, label = val_data[index]
                prediction = classify(model, image, self.protocol, self.device)
                samples.append((image.permute(1, 2, 0).numpy(), label.numpy(), prediction))
        title = f"iteration {self.progress.iteration:,}, mIoU {number(scores['mIoU'], '.2f')}"
        grid = pictures.sample_grid(samples, self.classes, palette(), title)
        pictures.save(grid, self.folder.path / "val_samples.png")
        if self.folder.board:
            self.folder.board.add_image("val_samples", np.asarray(grid.convert("RGB")), self.progress.iteration,
                                        dataformats="HWC")
            self.folder.board.flush()

    def save(self, iteration, best=False):
        """Writes a checkpoint, as iter_<iteration>.pth unless that is None. Skipped while the loss is NaN or Inf, so
        that the last good one stays the newest. Raises RunError if a value of the network is NaN or Inf."""
        if self.nan_run > 0 and self.progress.iteration == self.intervals.last:
            raise RunError(f"the loss is NaN or Inf at the end, iteration {self.progress.iteration}; lower --lr"
                           + self.way_back())
        if self.nan_run > 0:
            self.folder.log(f"no checkpoint at iteration {self.progress.iteration}: the loss is NaN or Inf")
            return
        if not all(value.isfinite().all() for value in self.model.state_dict().values()):
            raise RunError(f"a weight or BN statistic is NaN or Inf at iteration {self.progress.iteration}; lower --lr"
                           + self.way_back())
        self.progress.sums, self.progress.seconds = self.sums.tolist(), time.perf_counter() - self.started
        if self.folder.writes:
            self.folder.save(on_cpu({"state_dict": self.model.state_dict(), "meta": self.meta(),
                                     "optimizer": self.optimizer.state_dict(),
                                     "precision": self.precision.state_dict(),
                                     "progress": dataclasses.asdict(self.progress)}), iteration, best)
        if iteration is not None:
            self.saved = iteration

    def meta(self):
        """What a checkpoint says about the network and the run."""
        return {"backbone": self.model.backbone_name, "num_classes": self.model.num_classes,
                "classes": self.classes, "palette": palette()[:len(self.classes)].tolist(), "form": self.model.form,
                "scale": self.recipe.scale, "recipe": dataclasses.asdict(self.recipe), "lists": self.lists}


def ddp_settings(device, precision):
    """The arguments of DistributedDataParallel.

    Buffers are not broadcast before each forward, as in the reference (mmengine: broadcast_buffers=False): every card
    has BN statistics of its own, and an evaluation takes rank 0's. Gradients are views into the buckets, which saves a
    copy, but not on an NPU, whose fused SGD keeps all gradients as one tensor of its own.
    """
    parameters = inspect.signature(DistributedDataParallel).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in parameters else "broadcast_buffers"  # since PyTorch 2.13
    return {name: False, "gradient_as_bucket_view": device.type != "npu" and precision.bucket_views}
