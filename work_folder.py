"""The files of a run: its log, metrics.jsonl, checkpoints, result.json and summary.

Apart from train.py, as how a file survives a crash or a full disk is no part of the recipe.
"""
import contextlib
import io
import json
import os
import platform
import shutil
import statistics
from pathlib import Path

import torch

from cli import check_writable, whole_file
from fcn8s import WeightsError, read_checkpoint


class RunError(ValueError):
    """A run that cannot start or go on; the message is one line for the user."""


class WorkFolder:
    """The files of a run. Only rank 0 writes; a checkpoint is there whole or not at all.

    Raises OSError if nothing can be written at `path`.
    """

    def __init__(self, path, device_ids, writes, keep):
        self.path, self.writes, self.keep = Path(path), writes, keep
        self.log_path = self.path / f"train_{device_ids}.log"
        self.metrics_path = self.path / "metrics.jsonl"
        self.checkpoints = self.path / "ckpt"
        self.latest = self.checkpoints / "latest.pth"
        self.board = None  # TensorBoard's writer
        if writes:
            check_writable(self.path)

    def open_board(self, iteration):
        """Starts to write for TensorBoard, too; what an earlier run wrote there after `iteration` is passed over."""
        from torch.utils.tensorboard import SummaryWriter  # only here: the package may not be there
        if self.writes:
            self.board = SummaryWriter(self.path / "tensorboard", purge_step=iteration + 1)

    def holds_run(self):
        return bool(self.metrics()) or self.latest.is_symlink()

    def open(self, iteration, evaluated):
        """Makes the folders, cuts the metrics of an earlier run back to `iteration`, its scores to that last
        `evaluated`, and removes what a process that was killed left half written."""
        if not self.writes:
            return
        kept = [line for line in self.metrics() if line["iter"] <= (evaluated if "mIoU" in line else iteration)]
        with writing(self.path):
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            for leftover in self.checkpoints.glob(".*.tmp"):
                leftover.unlink()
        replace_file(self.metrics_path, "".join(json.dumps(line) + "\n" for line in kept).encode())

    def log(self, text):
        if self.writes:
            print(text, flush=True)
            self.add(self.log_path, text)

    def add_metrics(self, line):
        if self.writes:
            self.add(self.metrics_path, json.dumps(line))
            for name, value in line.items() if self.board else ():
                if value is not None and name != "iter":
                    self.board.add_scalar(name, value, line["iter"])

    def add(self, path, line):
        with writing(path), open(path, "a") as file:
            file.write(line + "\n")

    def metrics(self):
        """The lines of metrics.jsonl as dicts; a last line cut short by a crash is left out."""
        lines = self.metrics_path.read_text().splitlines(keepends=True) if self.metrics_path.is_file() else []
        try:
            metrics = [json.loads(line) for line in lines if line.endswith("\n")]
        except ValueError as error:
            raise RunError(f"{self.metrics_path}: damaged ({error}); mend or delete that line") from None
        for number, line in enumerate(metrics, 1):
            if not isinstance(line, dict) or not isinstance(line.get("iter"), int):
                raise RunError(f"{self.metrics_path}: line {number} is none of a run's; delete it")
        return metrics

    def saved(self):
        """The checkpoints iter_<n>.pth from the newest, to which latest.pth leads, back to the oldest."""
        def number(path):
            return int(path.stem.removeprefix("iter_"))

        newest = number(self.checkpoints / os.readlink(self.latest)) if self.latest.is_symlink() else 0
        # Higher numbers are of a run that was then taken up again from an earlier iteration.
        return sorted((path for path in self.checkpoints.glob("iter_*.pth") if number(path) <= newest),
                      key=number, reverse=True)

    def newest(self):
        """(file, checkpoint) of the newest checkpoint that is whole, or None if there is none yet."""
        for path in self.saved():
            try:
                return path, read_checkpoint(path)
            except WeightsError as error:
                self.log(f"{error}. Trying the one before it.")
        if self.latest.is_symlink():
            raise RunError(f"{self.latest}: leads to {os.readlink(self.latest)}, and neither that nor one before it "
                           "can be read; go on from another one by --resume FILE, or name another folder by --work_dir")
        return None

    def save(self, checkpoint, number, best):
        """Writes a checkpoint as iter_<number>.pth, to which latest.pth leads (unless `number` is None), and as
        best.pth if it is that: then a second name of the same file, where the file system has such."""
        if not self.writes:
            return
        path = self.checkpoints / ("best.pth" if number is None else f"iter_{number}.pth")
        content = io.BytesIO()  # not straight to the file: torch.save reports a full disk as a wrong offset
        torch.save(checkpoint, content)
        replace_file(path, content.getbuffer())
        if number is None:
            return
        temporary = self.checkpoints / ".link.tmp"
        with writing(path):
            temporary.unlink(missing_ok=True)
            if best:
                try:
                    os.link(path, temporary)
                except OSError:
                    shutil.copyfile(path, temporary)
                temporary.replace(self.checkpoints / "best.pth")
            temporary.symlink_to(path.name)
            temporary.replace(self.latest)
            for old in self.saved()[self.keep:]:
                old.unlink()


@contextlib.contextmanager
def writing(path):
    """What goes wrong meanwhile is told with the file, which a full disk does not name, and the remedy."""
    try:
        yield
    except OSError as error:
        raise RunError(f"{path}: cannot be written ({error.strerror or error}); make room, or name another folder by "
                       "--work_dir; --resume auto goes on from the latest checkpoint, if there is one") from None


def replace_file(path, content):
    """Writes bytes so that at any moment the file is the old or the new one, whole, even if the machine fails."""
    with writing(path), whole_file(path) as temporary, open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def write_results(folder, args, progress, cards):
    """result.json and the summary, both from metrics.jsonl."""
    lines = folder.metrics()
    logged = [line for line in lines if "loss" in line]
    scored = [line for line in lines if "mIoU" in line]
    fps = [line["fps"] for line in logged if line["fps"] is not None]
    result = {"iters": progress.iteration, "loss": logged[-1]["loss"], "fps": max(fps, default=None),
              "fps_median": statistics.median(fps) if fps else None,
              **{name: scored[-1][name] for name in ("aAcc", "mIoU", "mAcc")}, "best_mIoU": progress.best}
    replace_file(folder.path / "result.json", (json.dumps(result, indent=2) + "\n").encode())
    write_summary(folder, args, cards, "perf" if args.performance else "acc", {
        "ActualFPS": result["fps"],
        "TrainingTime": result["fps"] and 1000 * args.batch_size * cards / result["fps"],  # ms an iteration
        "mIoU": progress.best / 100, "ActualLoss": result["loss"], "E2ETrainingTime": progress.seconds})
    return result


def write_summary(folder, args, cards, kind, values):
    """FCN_bs<batch>_<cards>p_<kind>.log: `Key = value` lines, as the Ascend port's scripts leave them."""
    case = f"FCN_bs{args.batch_size}_{cards}p_{kind}"
    lines = {"Network": "FCN", "RankSize": cards, "BatchSize": args.batch_size, "DeviceType": platform.machine(),
             "CaseName": case, **values}
    replace_file(folder.path / f"{case}.log", "".join(f"{key} = {value}\n" for key, value in lines.items()).encode())
