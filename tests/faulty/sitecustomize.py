"""Makes reading an image fail once, as the file $FAULT says when it is there.

`bug R`: in rank R or a worker of it, it raises a RuntimeError; `kill R`: kills its process; `block R`: never returns.
"""
import os
import runpy
import signal
import sys
import time
from importlib.machinery import PathFinder
from pathlib import Path

runpy.run_path(str(Path(__file__).parents[1] / "site/sitecustomize.py"))


class Spoiling:
    """An importer, of voc alone, that wraps its read_image."""

    def find_spec(self, name, path=None, target=None):
        spec = PathFinder.find_spec(name, path) if name == "voc" else None
        if spec:
            load = spec.loader.exec_module
            spec.loader.exec_module = lambda module: (load(module), spoil(module))
        return spec


def spoil(voc):
    def read_image(path, read=voc.read_image):
        fault = Path(os.environ["FAULT"])
        kind, rank = fault.read_text().split() if fault.is_file() else ("", "")
        if rank != os.environ.get("RANK", "0"):
            return read(path)
        fault.unlink(missing_ok=True)
        if kind == "bug":
            raise RuntimeError("a bug")
        if kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        return time.sleep(1000)

    voc.read_image = read_image


sys.meta_path.insert(0, Spoiling())
