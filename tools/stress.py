"""Disturbs two runs, of 1 and 2 ranks, at random moments, and compares them with undisturbed twins.

`python tools/stress.py [--moments 100] [--seed 0]`; 100 take about half an hour. After each moment every process must
be gone, and the newest checkpoint must be no older than before. At the end parameters, metrics and result must be the
twins'.
"""
import argparse
import collections
import contextlib
import filecmp
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # as pytest's pythonpath
sys.path.insert(1, str(Path(__file__).resolve().parent.parent / "tests"))
from conftest import ROOT, assert_same_run, children_of, fill_pipe, finish, left_of, run, start
from draw_voc import draw_data_set

from cli import UserError
from weights import Checkpoint
from work_dir import WorkDir

STEP = 6  # iterations at most between the start of a run and its moment
LIMIT = 60  # seconds after which a process is said to hang; torchrun kills one after 30
KINDS = ("SIGKILL to the process", "SIGKILL to a worker", "SIGKILL to a rank", "SIGTERM to the process",
         "SIGINT to the process", "SIGTERM to all", "SIGINT to the group", "SIGTERM to a rank",
         "SIGKILL to a new worker's parent", "SIGHUP to all", "SIGTERM to the process, after SIGHUP under nohup",
         "SIGTERM to the process, its output full", "SIGTERM to the process, its output closed",
         "a copy is resumed", "the newest is damaged", "an older file is refused")
KILLED = {"the process": (-9,), "a rank": (137,), "a worker": (1, 0),  # exit statuses; 0: it was not needed any more
          "a new worker's parent": (-9, 137)}


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
        work_dir = WorkDir(self.path, "0")
        work_dir.log_path = Path(os.devnull)
        return work_dir

    def iteration(self):
        """That of the newest whole checkpoint, or 0."""
        found = self.folder.newest()
        return found.iteration() if found else 0

    def end(self):
        finish(self.start(self.path, "--resume", "auto"), 0)
        assert_same_run(self.path, self.twin)

    def disturb(self, kind):
        """One moment. -> whether it was possible"""
        other = {"a copy is resumed": self.copy, "the newest is damaged": self.damage,
                 "an older file is refused": self.resume_older}
        if kind in other:
            return other[kind]()
        name, _, rest = kind.split(maxsplit=2)
        whom, _, how = rest.partition(", ")
        return (whom != "a rank" or self.ranks == 2) and self.signal(signal.Signals[name], whom, how)

    def copy(self):
        self.copies += 1
        old, self.path = self.path, self.path.with_name(f"copy{self.ranks}_{self.copies}")
        if old.is_dir():
            subprocess.run(["cp", "-rL", old, self.path], check=True)
            shutil.rmtree(old)
        return self.path.is_dir()

    def older(self):
        """The whole checkpoints that are not the newest."""
        newest = self.folder.newest()
        return [path for path in self.folder.saved()
                if whole(path) and not filecmp.cmp(path, newest.source, False)]  # a copied folder has no hard links

    def damage(self):
        """Flips a bit of the newest checkpoint, where another one is whole."""
        if not self.older():
            return False
        newest = Path(self.folder.newest().source)
        content = bytearray(newest.read_bytes())
        content[self.rng.randrange(len(content))] ^= 1
        with open(newest, "r+b") as file:  # in place, as it may have several names
            file.write(content)
        return self.iteration() >= 0

    def resume_older(self):
        """Resuming in place from a file that is not the newest must change nothing."""
        def content():
            return {path: path.read_bytes() for path in self.path.rglob("*")
                    if path.is_file() and path.name != ".lock" and path.suffix != ".log"}
        older, before = self.older(), content()
        if not older:
            return False
        output = finish(self.start(self.path, "--resume", self.rng.choice(older)), 1)
        assert "is not the newest checkpoint" in output and content() == before, output
        return True

    def signal(self, number, whom, how):
        before, restarts = self.iteration(), self.rng.randint(0, 1) if self.ranks == 2 else 0
        hangup = signal.signal(signal.SIGHUP, signal.SIG_IGN if "nohup" in how else signal.SIG_DFL)
        process = self.start(self.path, "--resume", "auto", *(("--max_restarts", restarts) if restarts else ()),
                             *(("--workers", 2) if "new" in whom else ()))
        signal.signal(signal.SIGHUP, hangup)
        trains = self.wait_for_worker(process) if "new" in whom else self.wait(process)
        with contextlib.suppress(OSError):  # it ended
            self.prepare(process, how)
        sent, since = process.poll() is None and self.send(process, number, whom), time.monotonic()
        # A rank that got SIGTERM before it trained may be restarted, too.
        restarted = sent and restarts and (whom in ("a worker", "a new worker's parent") or whom == "a rank" and not (
            number == signal.SIGTERM and trains))
        if restarted:
            self.wait(process)
            since = time.monotonic()
        if restarted or not sent:
            process.terminate()
        if "output" in how:
            process.wait(LIMIT)  # without reading
        output = "" if process.stdout.closed else process.communicate(timeout=LIMIT)[0]
        self.longest = max(self.longest, time.monotonic() - since)
        assert not left_of(process), f"{left_of(process)} are left\n{output}"
        assert "Traceback" not in output or "KeyboardInterrupt" in output, output
        assert self.iteration() >= before, f"iteration {before} is lost\n{output}"
        expected = KILLED[whom] if number == signal.SIGKILL else (128 + number, -number)
        assert not sent or restarted or process.returncode in expected or "KeyboardInterrupt" in output, (
            f"status {process.returncode}\n{output}")
        return sent

    def wait(self, process):
        """Returns at a random moment: after some iterations, or while the run still starts. -> whether it trains"""
        lines = len(self.folder.metrics()) + self.rng.randint(1, STEP)
        end = time.monotonic() + (self.rng.uniform(0, 5) if self.rng.random() < 0.2 else LIMIT)
        while process.poll() is None and len(self.folder.metrics()) < lines and time.monotonic() < end:
            time.sleep(0.01)
        return len(self.folder.metrics()) >= lines

    def wait_for_worker(self, process):
        """Returns as soon as a rank has a child."""
        while process.poll() is None and not any(map(children_of, self.rank_ids(process))):
            pass

    def rank_ids(self, process):
        return children_of(process.pid) if self.ranks == 2 else [process.pid]

    def prepare(self, process, how):
        """What happens outside of the run before its signal."""
        if "nohup" in how:
            self.send(process, signal.SIGHUP, "all")
        elif "closed" in how:
            process.stdout.close()
        elif "full" in how:
            fill_pipe(f"/proc/{process.pid}/fd/1")

    def send(self, process, number, whom):
        """-> whether there was a process to send the signal to"""
        ranks = self.rank_ids(process)
        targets = {"the process": [process.pid], "the group": [-process.pid], "a rank": ranks,
                   "a worker": [worker for rank in ranks for worker in children_of(rank)],
                   "a new worker's parent": [rank for rank in ranks if children_of(rank)],
                   "all": family(process.pid)}[whom]  # the group: a terminal's Ctrl-C; all: as Slurm does
        sent = False
        for target in targets if whom == "all" else targets and [self.rng.choice(targets)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(target, number)
                sent = True
        return sent


def family(pid):
    """The ids of a process and of all that descend from it."""
    return [pid, *(one for child in children_of(pid) for one in family(child))]


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
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a script's `python tools/stress.py &` ignores it
    rng, done, since = random.Random(args.seed), collections.Counter(), time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        devkit = draw_data_set(Path(folder), counts={"train": 6, "val": 5, "sbd": 6})
        run(ROOT / "convert_voc_aug.py", devkit, devkit / "VOCaug")
        runs = [Disturbed(Path(folder), devkit / "VOC2012", ranks, 2 * args.moments + 20, rng) for ranks in (1, 2)]
        while done.total() < args.moments:
            disturbed, kind = rng.choice(runs), rng.choice(KINDS)
            print(f"{done.total() + 1:3}  {disturbed.ranks} ranks  {kind}", end="", flush=True)
            possible = disturbed.disturb(kind)
            done[kind, disturbed.ranks] += bool(possible)
            print(f"{'' if possible else ': not possible'}; iteration {disturbed.iteration()}", flush=True)
        for disturbed in runs:
            disturbed.end()
    print("\n1 rank  2 ranks  what was done")
    for kind in KINDS:
        print(f"{done[kind, 1]:6}  {done[kind, 2]:7}  {kind}")
    print(f"{done.total()} moments in {(time.monotonic() - since) / 60:.0f} minutes; the last process of a run was "
          f"gone after {max(run.longest for run in runs):.1f} s at most; parameters, metrics and result are the twins'")


if __name__ == "__main__":
    main()
