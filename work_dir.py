"""The files of a run: lock, log, metrics, checkpoints, run.json, result.json and the Ascend port's summary.

A folder with checkpoints is a run; anything else in it may be overwritten. ckpt/ holds iter_<n>.pth, latest.pth, from
which `--resume auto` resumes, and best.pth. They are hard links to the same files, or copies.
"""
import contextlib
import datetime
import fcntl
import filecmp
import io
import json
import os
import platform
import re
import shlex
import socket
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import files
from cli import Output, UserError
from metrics import MEANS, class_table, for_json, format_table, number, summary
from weights import Checkpoint, intact

OWN_NAME = re.compile(r"iter_(0|[1-9]\d*)\.pth")  # other files in the folder are left alone
PICTURES = ("curves", "confusion", "val_samples")  # .png, drawn at each evaluation
CPU_CROP = 256  # pixels; with a larger one a CPU takes seconds for each image
# Without --amp: a CPU without bfloat16 instructions takes several times as long with it.
CPU_FLAGS = ("--backbone resnet50 --scale 256 128 --crop_size 128 --batch_size 4 --max_iters 400 --eval_interval 100 "
             "--checkpoint_interval 100")


class WorkDir(contextlib.ExitStack):
    """The files of a run. A checkpoint is written whole or not at all. A context manager, which releases the lock.

    device_ids: as in the names of the Ascend port's files; keep: how many of the newest checkpoints stay
    """
    writes = True

    def __init__(self, path, device_ids, keep=3):
        super().__init__()
        self.path, self.keep = Path(path), keep
        self.log_path = self.path / f"train_{device_ids}.log"
        self.metrics_path = self.path / "metrics.jsonl"
        self.record_path = self.path / "run.json"
        self.checkpoints = self.path / "ckpt"
        self.latest, self.best = self.checkpoints / "latest.pth", self.checkpoints / "best.pth"
        self.lock_file = self.board = None  # board: TensorBoard's writer

    # ---- the start of a run

    def find_start(self, resume):
        """The Checkpoint to resume from, or None to start afresh. Takes the lock of an existing folder.

        resume: the --resume flag. Raises UserError rather than overwrite another run.
        """
        if self.path.is_dir():
            self.lock()
        if not self.found():
            return None if resume in (None, "auto") else Checkpoint.read(resume)
        newest = resume and self.newest()
        if resume is None:
            problem = f"{self.path}: holds a run already; resume it by --resume auto, or name"
        elif newest is None:
            problem = f"{self.checkpoints}: holds no checkpoint that can be read; name one by --resume FILE and"
        elif resume != "auto" and not filecmp.cmp(resume, newest.source, False):  # as a copied folder has no hard links
            problem = f"--resume {resume}: is not the newest checkpoint of {self.path}, which holds a run; name"
        else:
            return newest
        raise UserError(f"{problem} another folder by --work_dir")

    def lock(self):
        """Takes the folder's lock, which ends with this process. Raises UserError, naming the process that holds it.

        A lock of `lockf` belongs to one process; forked workers would keep one of `flock`.
        """
        with writing(self.path / ".lock"):  # which is truncated: no link is followed
            descriptor = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
            self.lock_file = self.enter_context(open(descriptor, "r+"))
        try:
            fcntl.lockf(self.lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            self.lock_file.seek(0)
            raise UserError(f"{self.path}: {self.lock_file.read().strip() or 'another process'} runs in this folder; "
                            "wait for its end, or name another folder by --work_dir") from None
        except OSError as error:
            self.log(f"note: the file system of {self.path} has no locks ({error.strerror}); one run at a time")
        self.lock_file.truncate(0)
        self.lock_file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self.lock_file.flush()

    def saved(self):
        """Our own checkpoints: the paths of iter_<n>.pth, the newest first."""
        own = [path for path in self.checkpoints.glob("iter_*.pth") if OWN_NAME.fullmatch(path.name)]
        return sorted(own, key=lambda path: int(OWN_NAME.fullmatch(path.name)[1]), reverse=True)

    def found(self):
        """The paths of all our checkpoints, links that dangle among them, the newest first."""
        return [path for path in (self.latest, *self.saved(), self.best) if os.path.lexists(path)]

    def newest(self):
        """The Checkpoint in latest.pth or, if that is damaged, in the newest readable one before it, or None."""
        for path in filter(Path.exists, self.found()):
            try:
                return Checkpoint.read(path)
            except UserError as error:
                self.log(f"{error}. It is not used.")
        return None

    def open(self, start, progress, last, tensorboard=False):
        """Makes the folders. Starts new files, or truncates metrics.jsonl to the checkpoint the run resumes from.

        start: that Checkpoint, or None; progress: the run's; its best score counts while best.pth exists
        Raises UserError if the run is at its `last` iteration, evaluated, and the folder lacks its scores.
        """
        if progress.evaluated >= last and not any("mIoU" in line for line in self.metrics()):
            raise UserError(f"{start.source}: is of iteration {progress.iteration} of {last}, nothing is left to "
                            "train; raise --max_iters, or score it with evaluate.py")
        with writing(self.path):
            self.checkpoints.mkdir(parents=True, exist_ok=True)
        if self.lock_file is None:  # the folder did not exist when the run began
            self.find_start(None)  # raises if another run began here meanwhile
        with writing(self.path):
            files.remove_leftovers((self.path, self.checkpoints))
            if start is None:
                for path in (self.record_path, self.metrics_path, self.log_path, self.path / "result.json"):
                    path.unlink(missing_ok=True)
            elif start.source != str(self.latest):
                files.link_or_copy(start.source, self.latest)
            kept = [line for line in self.metrics()
                    if line["iter"] <= (progress.evaluated if "mIoU" in line else progress.iteration)]
            files.write_whole(self.metrics_path, "".join(json.dumps(line) + "\n" for line in kept))
        if not self.best.is_file():
            progress.best, progress.best_iteration = -1.0, 0
        if tensorboard:  # what an earlier run wrote there after this iteration is hidden
            from torch.utils.tensorboard import SummaryWriter  # here, as the package is optional
            self.board = self.enter_context(SummaryWriter(self.path / "tensorboard", purge_step=progress.iteration + 1))

    def progress_bar(self, iteration, last):
        """A progress bar on a terminal, below the log lines."""
        return self.enter_context(tqdm(total=last, initial=iteration, desc="training", unit="iter", leave=False,
                                       disable=None))

    # ---- what a run writes

    def log(self, text):
        """Prints a text, above a progress bar, and adds it to the log file once the folder exists."""
        tqdm.write(text)
        if Output.problem:  # a closed pipe or terminal, a full disk
            text += f"\nnote: {Output.problem.strerror}; this log has every line"
            Output.problem = None
        if self.path.is_dir():
            append(self.log_path, text)

    def log_start(self, args, ranks, device, data, protocol, model, precision, last, origin, recipe):
        """What a run is, in the log.

        device: its description; protocol: of its evaluations; last: iteration; origin: of the weights; recipe: lines
        """
        images = args.batch_size * args.accumulate * ranks.count
        batch = " x ".join(str(n) for n in (ranks.count, args.batch_size, args.accumulate)[:2 + (args.accumulate > 1)])
        flags = {"sync_bn": "synchronised BN", "compile": "compiled", "freeze_bn": "frozen BN",
                 "class_weights": "weighted classes"}
        more = "".join(f", {text}" for flag, text in flags.items() if getattr(args, flag))
        notes = list(data.notes)
        if args.freeze_bn and origin == "random weights":
            notes.append("--freeze_bn keeps statistics that no training has set")
        if ranks.device.type == "cpu" and (args.backbone.endswith("_d8") or args.crop_size > CPU_CROP):
            notes.append(f"{args.backbone} at --crop_size {args.crop_size} is slow on a CPU; this ends in minutes: "
                         + CPU_FLAGS)
        self.log("\n".join([
            f"device: {ranks.count} x {device}, {precision}{more}",
            f"network: {args.backbone}, {sum(p.numel() for p in model.parameters()):,} parameters, from {origin}",
            f"data: {args.data_path}, {len(data.classes)} classes, {len(data.train):,} images of '{data.train.split}', "
            f"{len(data.val):,} of '{data.val.split}'" + (data.origin and f"; {data.origin}"),
            f"training: {last:,} iterations of {batch} = {images} images, {last * images / len(data.train):.1f} epochs",
            recipe,
            f"evaluation: images {protocol}",
            f"files: {self.path}", *(f"note: {note}" for note in notes),
            *(data_lines(data) if args.check else [])]))

    def add_metrics(self, line):
        """Adds a line to metrics.jsonl, and its numbers to TensorBoard's file: train/..., val/..., val_IoU/<class>."""
        append(self.metrics_path, json.dumps(line))
        if self.board:
            group = "val" if "mIoU" in line else "train"
            values = {f"{group}/{name}": value for name, value in line.items() if name != "iter"}
            for name in ("IoU", "Acc"):
                values |= {f"val_{name}/{cls}": value for cls, value in line.get(name, {}).items()}
            for tag, value in values.items():
                if isinstance(value, int | float):
                    self.board.add_scalar(tag, value, line["iter"])

    def add_pictures(self, iteration, pictures):
        """Adds PIL images {name: image} to TensorBoard's file."""
        for name, picture in pictures.items() if self.board else ():
            self.board.add_image(name, np.asarray(picture.convert("RGB")), iteration, dataformats="HWC")
            self.board.flush()

    def log_losses(self, progress, sums, rate, speed, memory, last, auxiliary):
        """A log line and its twin in metrics.jsonl: mean losses, speed, memory.

        sums: of train_step's results since the last line; rate: learning rate; speed: of Speed.read; memory: in bytes;
        last: the last iteration; auxiliary: the network has an auxiliary head
        """
        *losses, counted, skipped = sums
        losses = {name: loss / counted if counted else None
                  for name, loss in zip(("loss", "loss_main", "loss_aux")[:2 + auxiliary], losses, strict=False)}
        progress.skipped += int(skipped)
        iteration, memory = progress.iteration, memory / 2 ** 20
        self.add_metrics({"iter": iteration, "lr": rate, **losses, "skipped_steps": progress.skipped, **speed,
                          "memory": memory})
        total, main_loss, *aux = (number(loss, ".4f") for loss in losses.values())
        timing = left = ""  # none of an iteration that warms up
        if speed["iter_time"] is not None:
            timing = "  {fps:.2f} images/s  iter {iter_time:.3f} s, data {data_time:.3f} s".format(**speed)
            left = f"  left {datetime.timedelta(seconds=round((last - iteration) * speed['iter_time']))}"
        self.log(f"iter {iteration}/{last}  lr {rate:.2e}  loss {total}"
                 + (f" (main {main_loss}, aux {aux[0]})" if auxiliary else "") + timing + f"  memory {memory:.0f} MiB"
                 + left + (f"  skipped steps {progress.skipped}" if progress.skipped else ""))

    def log_scores(self, iteration, scores, data, last):
        """The scores of an evaluation, in the log and in metrics.jsonl; at the end the table of classes."""
        self.add_metrics({"iter": iteration, **for_json(scores, data.classes)})
        if iteration == last:
            self.log(format_table(scores, data.classes))
        self.log(f"iter {iteration}/{last}  {data.val.split}: {summary(scores)}")

    def metrics(self):
        """The lines of metrics.jsonl as dicts; a last line cut short by a crash is left out."""
        content = b""
        with contextlib.suppress(FileNotFoundError):
            content = self.metrics_path.read_bytes()
        with intact(self.metrics_path, "fix or delete it"):
            lines = json.loads(b"[%s]" % b",\n".join(content.split(b"\n")[:-1]))
            return [{**line, "iter": int(line["iter"])} for line in lines]

    def save(self, content, number, best):
        """Writes a checkpoint as latest.pth, as iter_<number>.pth unless `number` is None, and as best.pth if it is the
        best; deletes our oldest beyond `keep`. best.pth comes first, as latest.pth says what is in it."""
        names = [self.best] * best + [self.latest]
        names += [] if number is None else [self.checkpoints / f"iter_{number}.pth"]
        buffer = io.BytesIO()  # not straight to the file: torch.save reports a full disk as a wrong offset
        torch.save(on_cpu(content), buffer)
        with writing(names[0]):
            files.write_whole(names[0], buffer.getbuffer())
        for name in names[1:]:
            with writing(name):
                files.link_or_copy(names[0], name)
        for old in self.saved()[self.keep:]:
            old.unlink()

    # ---- what a run was, and its results

    def add_record(self, args, data, device, origin):
        """Adds an entry to run.json: flags, data and versions of this start.

        device: its description; origin: of the weights, as text
        """
        lists = {name: {"list": part.split, "images": len(part), "sha256": data.digests()[name],
                        **({"ids": part.ids} if data.lists else {})}
                 for name, part in (("train", data.train), ("val", data.val))}
        entry = {"time": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
                 "command": shlex.join([Path(sys.executable).name, *sys.argv]), "folder": str(Path.cwd()),
                 "args": vars(args), "start": origin, "device": device, "versions": versions(),
                 "code": output_of("git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty",
                                   "--abbrev=40", "--exclude=*"),  # the commit, and whether files have changed since
                 "data": {"classes": list(data.classes), **lists}}
        with intact(self.record_path, "fix or delete it"):
            entries = json.loads(self.record_path.read_bytes())["starts"] if self.record_path.exists() else []
            content = files.as_json({"starts": [*entries, entry]})
        with writing(self.record_path):
            files.write_whole(self.record_path, content)
        if self.board:
            from torch.utils.tensorboard.summary import hparams  # here, as the package is optional

            # val/mIoU: the score of these flags in TensorBoard's table of runs
            for part in hparams({name: str(value) for name, value in vars(args).items()}, {"val/mIoU": 0.0}):
                self.board.file_writer.add_summary(part)

    def finish(self, args, progress, ranks):
        """Writes result.json and the summary, both from metrics.jsonl, and logs how to look at the run."""
        lines = self.metrics()
        logged = [line for line in lines if "loss" in line]
        scored = [line for line in lines if "mIoU" in line]
        fps = [line["fps"] for line in logged if line["fps"] is not None]
        # That of best.pth; if that was deleted, the highest.
        best = max(scored, key=lambda line: (line["iter"] == progress.best_iteration, line["mIoU"] or 0.0))
        values = {"iters": progress.iteration, "loss": logged[-1]["loss"] if logged else None,
                  "fps": max(fps, default=None), "fps_median": statistics.median(fps) if fps else None,
                  **{name: scored[-1][name] for name in MEANS}, "best_mIoU": best["mIoU"],
                  "best_iteration": best["iter"]}
        files.write_whole(self.path / "result.json", files.as_json({**values, "last": scored[-1], "best": best}))
        images = args.batch_size * args.accumulate * ranks.count
        files.write_summary(self.path, args.backbone, args.batch_size, ranks.count, "acc", {
            "ActualFPS": values["fps"],
            "TrainingTime": values["fps"] and 1000 * images / values["fps"],  # ms an iteration
            "mIoU": best["mIoU"] and best["mIoU"] / 100, "ActualLoss": values["loss"],
            "E2ETrainingTime": progress.seconds})
        rounded = {key: round(value, 4) if isinstance(value, float) else value for key, value in values.items()}
        self.log(f"done: {self.path / 'result.json'}: {json.dumps(rounded)}\n"
                 "to look at: " + ", ".join(str(self.path / f"{name}.png") for name in PICTURES)
                 + (f"; tensorboard --logdir {shlex.quote(str(self.path))}" if self.board else ""))
        if not args.performance:
            command = [sys.executable, Path(sys.argv[0]).with_name("evaluate.py"), self.best, "--data_path",
                       args.data_path, "--split", args.val_split, "--save_dir", self.path / "val"]
            self.log(f"best mIoU {number(best['mIoU'], '.2f')} at iteration {best['iter']}: {self.best}"
                     + ("" if self.best.is_file() else " does not exist any more")
                     + f"\nnext, to see every prediction: {shlex.join(map(str, command))}")


class NoWorkDir(contextlib.ExitStack):
    """In the ranks other than 0 in place of a WorkDir: its methods do nothing."""
    writes = False

    def __getattr__(self, name):
        return lambda *args, **kwargs: None

    def progress_bar(self, iteration, last):
        return tqdm(disable=True)


def open_work_dir(args, ranks):
    """The run's WorkDir, by default output/<devices>/FCN, as the Ascend port names it; in rank 0 alone.

    Raises OSError if nothing can be written there.
    """
    if ranks.rank > 0:
        return NoWorkDir()
    ids = args.device_list or (range(ranks.count) if ranks.count > 1 else [ranks.device.index or 0])
    device_ids = ",".join(map(str, ids))
    path = args.work_dir or Path("output", device_ids, "FCN_prof" if args.performance else "FCN")
    files.check_writable(Path(path))
    work_dir = WorkDir(path, device_ids, args.keep)
    if args.check:  # the log is of a run
        work_dir.log_path = Path(os.devnull)
    return work_dir


# ---- what a run says

def memory_hint(args):
    """What to change if memory runs out."""
    mixed = "" if args.amp else "add --amp; "
    if args.batch_size == 1:
        return mixed + "lower --crop_size" + ("" if args.backbone == "resnet50" else ", or use --backbone resnet50")
    size = max(size for size in range(1, args.batch_size) if args.batch_size % size == 0)
    batches = args.batch_size // size * args.accumulate
    return f"{mixed}--batch_size {size} --accumulate {batches} needs less for the same step"


def data_lines(data):
    """What the lists hold, lines of text: sizes, and the images and pixels of each class."""
    lines, columns = [], {}
    for name, seen in data.seen.items():
        sizes = ", ".join(f"{width}x{height} ({count:,})" for (height, width), count in seen["sizes"].most_common(3))
        lines.append(f"{name}: {len(getattr(data, name)):,} images of {len(seen['sizes']):,} sizes, most often {sizes}")
        for what in ("images", "pixels"):
            values = seen[what][[*range(len(data.classes)), -1]].tolist()  # the last: labelled IGNORE
            columns[f"{name} {what}"] = [f"{value:,}" for value in values]
    return [*lines, class_table((*data.classes, "not labelled"), columns)] if columns else []


def versions():
    """What a result depends on: {name: version, None for what is not there}."""
    return {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__,
            "platform": platform.platform(), "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version() if torch.cuda.is_available() else None,  # asking loads cuDNN
            "driver": output_of("nvidia-smi", "--id=0", "--query-gpu=driver_version", "--format=csv,noheader"),
            "torch_npu": getattr(sys.modules.get("torch_npu"), "__version__", None)}


def output_of(*command):
    """What a command prints; None if it fails or does not exist."""
    try:
        return subprocess.check_output(command, stderr=subprocess.DEVNULL, text=True, timeout=10).strip()
    except (OSError, subprocess.SubprocessError):
        return None


def on_cpu(state):
    """The same nested dicts and lists with all tensors on the CPU, so that any machine can read them."""
    if isinstance(state, torch.Tensor):
        return state.cpu()
    if isinstance(state, dict):
        return {key: on_cpu(value) for key, value in state.items()}
    return [on_cpu(value) for value in state] if isinstance(state, (list, tuple)) else state


def append(path, line):
    with writing(path), open(path, "a", encoding="utf-8", errors="surrogateescape") as file:
        file.write(line + "\n")


def writing(path):
    """A context in which an OSError, that of a full disk among them, names the file and a hint."""
    return files.naming(path, "cannot be written ({}); make room, or name another folder by --work_dir")
