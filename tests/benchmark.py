"""How fast the project is, as ratios against its peers in the same run: `python tests/benchmark.py`.

--loader, --step BACKBONE, --eval and --commands run parts of the table. Each part runs in a process of its own, ours
and the peer's in turns, so that both see the same machine; the figures are medians of the turns. The peers are
mmsegmentation and torchfcn (`bash tests/run.sh --peers` installs them into .venv-peers); without them their columns
stay empty. --on_gpu [PART...] compares ways to run a step on a GPU with each other instead; on a CPU it shows, with a
few small steps, that each part works. --update writes the table into docs/speed.md.
"""
import argparse
import datetime
import multiprocessing
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs/speed.md"
ON_GPU = ("cudnn", "dtype", "enlarge", "prepare", "compile", "transfer", "profile", "waits")  # functions of on_gpu.py


def main():
    sys.path.insert(0, str(ROOT))
    os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")  # or a broken torch_npu breaks `import torch`
    from backbones import BACKBONES
    args = parse_args(tuple(BACKBONES))
    name = "speed" if args.on_gpu is None else "on_gpu"
    lines = []
    for line in table(args):
        print(line, flush=True)
        lines.append(line)
    if args.update:
        update(name, lines)


def parse_args(backbones):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", choices=("auto", "npu", "cuda", "gpu", "cpu"))
    parser.add_argument("--data", metavar="DIR", help="as train.py's --data_path (default: the tests' own)")
    parser.add_argument("--loader", action="store_true")
    parser.add_argument("--step", nargs="*", metavar="BACKBONE", choices=backbones)
    parser.add_argument("--eval", action="store_true")
    parser.add_argument("--commands", action="store_true")
    parser.add_argument("--on_gpu", nargs="*", metavar="PART", choices=ON_GPU, help=", ".join(ON_GPU))
    parser.add_argument("--update", action="store_true")
    args = parser.parse_args()
    everything = not (args.loader or args.step is not None or args.eval or args.commands)
    args.step = args.step or (backbones if everything or args.step == [] else ())
    args.parts = [("loader",)] if args.loader or everything else []
    args.parts += [("steps", backbone) for backbone in args.step]
    args.parts += [("evaluation",)] if args.eval or everything else []
    args.parts += [("commands",), ("training",)] if args.commands or everything else []
    if args.on_gpu is not None:
        args.parts = [(part,) for part in args.on_gpu or ON_GPU]
    return args


def table(args):
    """Runs the parts. -> the lines, in Markdown, as they come: what was measured on, and a row for each figure"""
    import on_gpu
    import speeds
    module = speeds if args.on_gpu is None else on_gpu
    yield f"{revision()}, {datetime.date.today()}. {speeds.machine(args.device)}"
    yield ""
    yield markdown(module.COLUMNS)
    yield "| " + " | ".join(["---"] * len(module.COLUMNS)) + " |"
    with tempfile.TemporaryDirectory() as scratch:
        data = args.data or speeds.data_folder(scratch)
        for part, *arguments in args.parts:
            # A process of its own: its peak memory is its own, and nothing is warm from another part.
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
                try:
                    yield from map(markdown, pool.submit(module.run_part, part, args.device, data, *arguments).result())
                except BrokenProcessPool:
                    yield markdown([part, "ended by its time limit or for want of memory"])


def markdown(cells):
    return "| " + " | ".join(cells) + " |"


def revision():
    def git(*command):
        return subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    return f"Commit {git('rev-parse', '--short', 'HEAD')}" + (" with changes" if git("status", "--porcelain") else "")


def update(name, lines):
    """Puts lines between the two marks of that name in docs/speed.md."""
    start, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    before, rest = DOCUMENT.read_text(encoding="utf-8").split(start)
    text = "\n".join([start, *lines, end])
    DOCUMENT.write_text(before + text + rest.split(end)[1], encoding="utf-8")


if __name__ == "__main__":
    main()
