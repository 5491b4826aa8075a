"""The files of a run: its lock, its log, metrics.jsonl, checkpoints, and how they survive what happens to a run.

ckpt/ holds iter_<n>.pth, latest.pth, from which `--resume auto` goes on, and best.pth. They are hard links to the same
files, or copies. What a run leaves behind when it is resumed from an older checkpoint goes to ckpt/abandoned_<k>/.
"""
import contextlib
import errno
import fcntl
import io
import json
import math
import os
import re
import socket
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from errors import RunError, WeightsError
from files import check_writable, link_or_copy, remove_leftovers, write_whole
from weights import Checkpoint

OWN_NAME = re.compile(r"iter_(0|[1-9]\d*)\.pth")  # other files in the folder are left alone
DYING_TIME = 30  # seconds that a restarted run waits for the lock of the process it replaces


class WorkFolder:
    """The files of a run. Only rank 0 writes; a checkpoint is there whole or not at all.

    Raises OSError if nothing can be written at `path`.
    """

    def __init__(self, path, device_ids, writes, keep=3):
        self.path, self.writes, self.keep = Path(path), writes, keep
        self.log_path = self.path / f"train_{device_ids}.log"
        self.metrics_path = self.path / "metrics.jsonl"
        self.record_path = self.path / "run.json"
        self.checkpoints = self.path / "ckpt"
        self.latest, self.best = self.checkpoints / "latest.pth", self.checkpoints / "best.pth"
        self.lock_file = self.board = None  # TensorBoard's writer
        if writes:
            check_writable(self.path)

    def lock(self, patience=0):
        """Takes the folder's lock, which ends with this process. Raises RunError, naming the process that holds it,
        after `patience` seconds. A lock of `lockf` is the process's own; forked workers would keep that of `flock`."""
        if not self.writes or self.lock_file or not self.path.is_dir():
            return
        with writing(self.path):
            file = open(self.path / ".lock", "a+")
        end = time.monotonic() + patience
        while True:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if error.errno not in (errno.EACCES, errno.EAGAIN):  # a file system without locks
                    break
            if time.monotonic() > end:
                file.seek(0)
                raise RunError(f"{self.path}: {file.read().strip() or 'another process'} runs in this folder; wait for "
                               "its end, or name another folder by --work_dir")
            time.sleep(0.2)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        self.lock_file = file

    def open_board(self, iteration):
        """Starts to write for TensorBoard, too; what an earlier run wrote there after `iteration` is passed over."""
        from torch.utils.tensorboard import SummaryWriter  # only here: the package may not be there
        if self.writes:
            self.board = SummaryWriter(self.path / "tensorboard", purge_step=iteration + 1)

    # ---- what is there

    def holds_run(self):
        return bool(self.metrics()) or self.holds_checkpoints()

    def holds_checkpoints(self):
        return bool(self.saved()) or any(path.exists() or path.is_symlink() for path in (self.latest, self.best))

    def saved(self):
        """Our own checkpoints: [(number, path)] of iter_<n>.pth, the newest first."""
        matches = ((OWN_NAME.fullmatch(path.name), path) for path in self.checkpoints.glob("iter_*.pth"))
        return sorted(((int(match[1]), path) for match, path in matches if match), reverse=True)

    def newest(self):
        """(file, Checkpoint) of latest.pth, or, if that is damaged, of the newest readable one before it; None if the
        folder holds none. Raises RunError if none can be read."""
        numbers = self.saved()
        if self.latest.is_symlink():  # of an earlier version of this project: higher numbers are of an abandoned branch
            target = OWN_NAME.fullmatch(os.readlink(self.latest))
            numbers = [(number, path) for number, path in numbers if target is None or number <= int(target[1])]
        for path in [self.latest, *(path for _, path in numbers), self.best]:
            if not path.exists():
                continue
            try:
                return path, Checkpoint.read(path)
            except WeightsError as error:
                self.log(f"{error}. Trying the one before it.")
        if self.holds_checkpoints():
            raise RunError(f"{self.checkpoints}: holds no checkpoint to go on from that can be read; name one by "
                           "--resume FILE, or another folder by --work_dir")
        return None

    def metrics(self):
        """The lines of metrics.jsonl as dicts; a last line cut short by a crash is left out."""
        content = self.metrics_path.read_bytes() if self.metrics_path.is_file() else b""
        try:
            lines = content.decode().splitlines(keepends=True)
            metrics = [json.loads(line) for line in lines if line.endswith("\n")]
        except ValueError as error:  # no JSON, or no UTF-8
            raise RunError(f"{self.metrics_path}: damaged ({error}); mend or delete that line") from None
        for number, line in enumerate(metrics, 1):
            if not isinstance(line, dict) or not isinstance(line.get("iter"), int):
                raise RunError(f"{self.metrics_path}: line {number} is no line of metrics; delete it")
        return metrics

    # ---- the beginning of a run

    def clear(self):
        """Deletes what a run wrote, but for its pictures and summaries, which the next one overwrites."""
        if self.writes:
            with writing(self.path):
                for path in (self.record_path, self.metrics_path, self.log_path, self.path / "result.json", self.latest,
                             self.best, *(path for _, path in self.saved())):
                    path.unlink(missing_ok=True)

    def open(self, start, progress):
        """Makes the folders and takes the lock. Where the run goes on from a checkpoint, `latest.pth` becomes that, the
        metrics are cut back to it, and what an abandoned branch left is set aside.

        start: the file of the checkpoint, or None; progress: the run's, whose `best` is reset if best.pth is not of the
        checkpoint's past
        """
        if not self.writes:
            return
        with writing(self.path):
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            if self.lock_file is None:  # there was no folder when the run began
                self.lock()
                if self.holds_run():
                    raise RunError(f"{self.path}: another run began and ended here meanwhile; name another folder by "
                                   "--work_dir")
            for folder in (self.path, self.checkpoints):
                remove_leftovers(folder)
            metrics = self.metrics()
            kept = [line for line in metrics
                    if line["iter"] <= (progress.evaluated if "mIoU" in line else progress.iteration)]
            best_is_past = self.best.is_file() and iteration_of(self.best) <= progress.iteration
            aside = self.free_folder()  # for damaged checkpoints, too
            if start is not None and not same_file(start, self.latest):
                if self.best.is_file() and not best_is_past:
                    move(self.best, aside)
                if len(kept) < len(metrics):
                    aside.mkdir(exist_ok=True)
                    write_whole(aside / "metrics.jsonl", as_lines(metrics))
                link_or_copy(start, self.latest)
            for number, path in self.saved():
                if number > progress.iteration:
                    move(path, aside)
            write_whole(self.metrics_path, as_lines(kept))
        if not best_is_past:
            progress.best, progress.best_iteration = -1.0, 0
        if aside.is_dir():
            self.log(f"checkpoints and metrics after iteration {progress.iteration} are set aside in {aside}")

    def free_folder(self):
        """A folder to set things aside in, which is not there yet."""
        number = 1
        while (self.checkpoints / f"abandoned_{number}").exists():
            number += 1
        return self.checkpoints / f"abandoned_{number}"

    # ---- what a run writes

    def log(self, text):
        if self.writes:
            tqdm.write(text)  # above a progress bar
            sys.stdout.flush()
            if self.path.is_dir():
                self.add(self.log_path, text)

    def add_metrics(self, line):
        if self.writes:
            self.add(self.metrics_path, json.dumps(line))
            for name, value in flat(line).items() if self.board else ():
                self.board.add_scalar(name, value, line["iter"])

    def add(self, path, line):
        with writing(path), open(path, "a", encoding="utf-8") as file:
            file.write(line + "\n")

    def add_record(self, entry):
        """Adds an entry to run.json, which has one for each time the run was started."""
        if self.writes:
            with writing(self.record_path):
                text = json.dumps({"starts": [*self.records(), entry]}, indent=2, ensure_ascii=False)
                write_whole(self.record_path, text + "\n")

    def records(self):
        """The entries of run.json."""
        try:
            entries = json.loads(self.record_path.read_bytes().decode())["starts"]
            if not all(isinstance(entry["performance"], bool) for entry in entries):
                raise ValueError("an entry does not say whether it measured speed")
            return entries
        except FileNotFoundError:
            return []
        except (ValueError, KeyError, TypeError) as error:
            raise RunError(f"{self.record_path}: damaged ({error}); mend or delete it") from None

    def save(self, content, number, best):
        """Writes a checkpoint as latest.pth and iter_<number>.pth, unless `number` is None, and as best.pth if it is
        that; deletes our oldest beyond `keep`. best.pth comes first, as latest.pth says what is in it."""
        if not self.writes:
            return
        names = [self.best] if best else []
        if number is not None:
            names += [self.latest, self.checkpoints / f"iter_{number}.pth"]
        buffer = io.BytesIO()  # not straight to the file: torch.save reports a full disk as a wrong offset
        torch.save(content, buffer)
        with writing(names[-1]):
            write_whole(names[0], buffer.getbuffer())
            for name in names[1:]:
                link_or_copy(names[0], name)
            for _, old in self.saved()[self.keep:]:
                old.unlink()


def iteration_of(path):
    """The iteration that a checkpoint was saved at; infinity if it cannot be read or does not say."""
    try:
        iteration = Checkpoint.read(path).iteration()
    except WeightsError:
        iteration = None
    return math.inf if iteration is None else iteration


def same_file(a, b):
    return Path(b).exists() and os.path.samefile(a, b)


def move(path, folder):
    folder.mkdir(exist_ok=True)
    path.rename(folder / path.name)


def as_lines(metrics):
    return "".join(json.dumps(line) + "\n" for line in metrics)


def flat(line):
    """The numbers of a line of metrics: {name: value}, those of a class as "IoU/<class>"."""
    values = {}
    for name, value in line.items():
        pairs = [(f"{name}/{cls}", number) for cls, number in value.items()] if isinstance(value, dict) else [
            (name, value)]
        values.update((key, number) for key, number in pairs if number is not None and key != "iter")
    return values


@contextlib.contextmanager
def writing(path):
    """Turns an OSError into a RunError that names the file, which that of a full disk does not, and the remedy."""
    try:
        yield
    except OSError as error:
        raise RunError(f"{error.filename or path}: cannot be written ({error.strerror or error}); make room, or name "
                       "another folder by --work_dir") from None
