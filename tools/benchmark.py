"""How fast the project is, as ratios against its peers in the same run: `python tools/benchmark.py`.

--loader, --step BACKBONE, --eval and --commands run parts of the table. Each part runs in a process of its own, ours
and the peer's in turns, so that both see the same machine; the figures are medians of the turns. The peers are
mmsegmentation and torchfcn (`bash tests/run.sh --peers` installs them into .venv-peers); without them their columns
stay empty. --on_gpu [PART...] compares ways to run a step on a GPU with each other instead; on a CPU it shows, with a
few small steps, that each part works. --update writes the table into docs/speed.md.
"""
import argparse
import contextlib
import datetime
import importlib
import multiprocessing
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs/speed.md"
ON_GPU = ("cudnn", "dtype", "enlarge", "prepare", "compile", "profile", "waits")  # functions of on_gpu.py


def main():
    sys.path.insert(0, str(ROOT))
    os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")  # or a broken torch_npu breaks `import torch`
    from fcn8s import BACKBONES
    args = parse_args(tuple(BACKBONES))
    name = "speed" if args.on_gpu is None else "on_gpu"
    lines = []
    for line in table(args.parts, args.device, args.data, on_gpu=args.on_gpu is not None):
        print(line, flush=True)
        lines.append(line)
        if args.update:  # after each, as a later part may be ended
            update(name, lines)


def parse_args(backbones):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", choices=("auto", "npu", "cuda", "gpu", "cpu"))
    parser.add_argument("--data", metavar="DIR", help="as train.py's --data_path (default: a small sample)")
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


def table(parts, device, data, on_gpu):
    """Runs parts, a name and arguments each. -> the lines, in Markdown, as they come: what was measured on, and a row
    for each figure"""
    import speeds
    module = importlib.import_module("on_gpu") if on_gpu else speeds
    yield f"{revision()}, {datetime.date.today()}. {speeds.machine(device)}"
    yield ""
    yield markdown(module.COLUMNS)
    yield "| " + " | ".join(["---"] * len(module.COLUMNS)) + " |"
    with tempfile.TemporaryDirectory() as scratch:
        data = data or speeds.data_folder(scratch)
        for part, *arguments in parts:
            yield from map(markdown, rows_of(module.__name__, part, device, data, *arguments))


def rows_of(module, part, *arguments):
    """The rows of a part as they come, from a process of its own: its peak memory is its own, and nothing is warm from
    another part. Of one that fails, the rows before that and one that says so."""
    context = multiprocessing.get_context("spawn")
    reader, writer = context.Pipe(duplex=False)
    process = context.Process(target=send_rows, args=(writer, module, part, *arguments))
    process.start()
    writer.close()
    with contextlib.suppress(EOFError):
        while True:
            yield reader.recv()
    process.join()
    if process.exitcode:
        yield (part, f"ended with status {process.exitcode}: its time limit, want of memory, or the error above")


def send_rows(writer, module, part, *arguments):
    for row in importlib.import_module(module).rows_of(part, *arguments):
        writer.send(row)


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
