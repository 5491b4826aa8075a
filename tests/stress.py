"""Disturbs two runs, of 1 and 2 ranks, at random moments, and compares them with undisturbed twins.

`python tests/stress.py [--moments 100] [--seed 0]`; 100 take up to half an hour. After each moment every process must
be gone and something whole must be there to go on from; at the end parameters, metrics and result must be the twins'.
"""
import argparse
import collections
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # pytest's pythonpath
from conftest import ROOT, assert_same_run, children_of, finish, left_of, pytest_unconfigure, run, start
from drawn_voc import draw_data_set

from errors import UserError
from weights import Checkpoint
from work_folder import WorkFolder

STEP = 6  # iterations at most between the start of a run and its moment
LIMIT = 60  # seconds after which what is still there is said to hang
KINDS = ("SIGKILL to the process", "SIGKILL to a worker", "SIGKILL to a rank", "SIGTERM to the process",
         "SIGINT to the process", "SIGTERM to the group", "SIGINT to the group", "SIGTERM to a rank",
         "a copy goes on", "the newest is damaged", "an older file is resumed")


class Disturbed:
    """A run of some iterations that is disturbed again and again."""

    def __init__(self, folder, data, ranks, iterations, rng):
        self.path, self.data, self.ranks, self.rng = folder / f"run{ranks}", data, ranks, rng
        self.copies, self.longest = 0, 0.0  # seconds from a moment until every process was gone
        self.flags = ("--max_iters", iterations, "--checkpoint_interval", 4, "--eval_interval", 25,
                      *(("--device_list", "0,1") if ranks == 2 else ()))
        self.twin = folder / f"twin{ranks}"
        finish(self.start(self.twin), 0)

    def start(self, path, *flags):
        return start(self.data, path, *self.flags, "--workers", self.rng.randint(0, 2), *flags)

    @property
    def folder(self):
        return WorkFolder(self.path, "0", writes=False)

    def iteration(self):
        """That of the checkpoint to go on from. Raises RunError if there are some but none is whole."""
        found = self.folder.newest()
        return found[1].iteration() if found else 0

    def end(self):
        finish(self.start(self.path, "--resume", "auto"), 0)
        assert_same_run(self.path, self.twin)

    def disturb(self, kind):
        """One moment. -> whether there was what it is about"""
        if kind == "a copy goes on":
            return self.copy()
        if kind == "the newest is damaged":
            return self.damage()
        if kind == "an older file is resumed":
            saved = self.folder.saved()
            return bool(saved) and self.run("SIGKILL to the process", self.rng.choice(saved)[1])
        return self.run(kind)

    def copy(self):
        self.copies += 1
        old, self.path = self.path, self.path.with_name(f"copy{self.ranks}_{self.copies}")
        if old.is_dir():
            subprocess.run(["cp", "-rL", old, self.path], check=True)
            shutil.rmtree(old)
        return self.path.is_dir()

    def damage(self):
        """Flips a bit of the newest checkpoint, where another one is whole."""
        found = self.folder.newest()
        if not any(whole(path) and not os.path.samefile(path, found[0]) for _, path in self.folder.saved()):
            return False
        with open(found[0], "r+b") as file:
            place = self.rng.randrange(os.path.getsize(found[0]))
            file.seek(place)
            byte = file.read(1)[0]
            file.seek(place)
            file.write(bytes([byte ^ 1]))
        return self.iteration() >= 0

    def run(self, kind, file="auto"):
        before = self.iteration()
        restarts = self.rng.randint(0, 1) if self.ranks == 2 else 0
        process = self.start(self.path, "--resume", file, *(("--max_restarts", restarts) if restarts else ()))
        self.wait(process)
        sent, since = process.poll() is None and self.send(process, kind), time.monotonic()
        if sent and restarts and kind in ("SIGKILL to a worker", "SIGKILL to a rank"):
            self.wait(process)
            since = time.monotonic()
        if not sent or restarts and kind.startswith("SIGKILL to a"):
            process.terminate()
        output, _ = process.communicate(timeout=LIMIT)
        self.longest = max(self.longest, time.monotonic() - since)
        assert not left_of(process, self.path), f"{left_of(process, self.path)} are left\n{output}"
        assert "Traceback" not in output or "KeyboardInterrupt" in output, output
        assert self.iteration() >= before or file != "auto", f"iteration {before} is lost\n{output}"
        return sent

    def wait(self, process):
        """Returns at a random moment: after some more iterations, or while the run still starts."""
        lines = len(self.folder.metrics()) + self.rng.randint(1, STEP)
        end = time.monotonic() + (self.rng.uniform(0, 5) if self.rng.random() < 0.2 else LIMIT)
        while process.poll() is None and len(self.folder.metrics()) < lines and time.monotonic() < end:
            time.sleep(0.01)

    def send(self, process, kind):
        """-> whether there was a process to send the signal to"""
        name, _, whom = kind.split(maxsplit=2)
        ranks = children_of(process.pid) if self.ranks == 2 else [process.pid]
        targets = {"a rank": ranks if self.ranks == 2 else [], "the process": [process.pid], "the group": [process.pid],
                   "a worker": [worker for rank in ranks for worker in children_of(rank)]}[whom]
        try:
            (os.killpg if whom == "the group" else os.kill)(self.rng.choice(targets), signal.Signals[name])
        except (IndexError, ProcessLookupError):  # it is not there yet, or not there any more
            return False
        return True


def whole(path):
    try:
        return bool(Checkpoint.read(path))
    except UserError:
        return False


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moments", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    rng, done, since = random.Random(args.seed), collections.Counter(), time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        devkit = draw_data_set(Path(folder), counts={"train": 6, "val": 5, "sbd": 6})
        run(ROOT / "convert_voc_aug.py", devkit, devkit / "VOCaug")
        runs = [Disturbed(Path(folder), devkit / "VOC2012", ranks, 2 * args.moments + 20, rng) for ranks in (1, 2)]
        while done.total() < args.moments:
            disturbed, kind = rng.choice(runs), rng.choice(KINDS)
            print(f"{done.total() + 1:3}  {disturbed.ranks} ranks  {kind}", end="", flush=True)
            there = disturbed.disturb(kind)
            done[kind, disturbed.ranks] += bool(there)
            print(f"{'' if there else ': there was none'}; iteration {disturbed.iteration()}", flush=True)
        for disturbed in runs:
            disturbed.end()
    print("\n1 rank  2 ranks  what was done")
    for kind in KINDS:
        print(f"{done[kind, 1]:6}  {done[kind, 2]:7}  {kind}")
    print(f"{done.total()} moments in {(time.monotonic() - since) / 60:.0f} minutes; the last process of a run was "
          f"gone after {max(run.longest for run in runs):.1f} s at most; parameters, metrics and result are the twins'")


if __name__ == "__main__":
    try:
        main()
    finally:
        pytest_unconfigure()
