"""Puts the tests' small backbones into the table, in every process that has this folder on its PYTHONPATH. Where
$NO_PICTURES is set, a training draws nothing.

Python imports a module of this name when it starts, in the processes that torchrun starts, too. PyTorch is not imported
for it: a module is changed when the project imports it.
"""
import os
import sys
from importlib.machinery import PathFinder


class Changing:
    """An importer, of a few modules alone, that changes them after their import."""

    def __init__(self, changes):
        self.changes = changes  # {module: [function, ...]}

    def find_spec(self, name, path=None, target=None):
        spec = PathFinder.find_spec(name, path) if name in self.changes else None
        if spec:
            load = spec.loader.exec_module
            spec.loader.exec_module = lambda module: [
                change(module) for change in (load, *self.changes[name])]
        return spec


def add_backbones(fcn8s):
    import tiny_network

    for name, network in (("tiny", "Tiny"), ("tiny_d8", "TinyD8"), ("tiny_plain", "TinyPlain")):
        fcn8s.BACKBONES[name] = fcn8s.Backbone(getattr(tiny_network, network))


def draw_nothing(inference):
    inference.draw = inference.draw_data = lambda *arguments: None


CHANGES = {"fcn8s": [add_backbones], "inference": [draw_nothing] if os.environ.get("NO_PICTURES") else [], "voc": []}
if "fcn8s" in sys.modules:
    add_backbones(sys.modules["fcn8s"])
else:
    sys.meta_path.insert(0, Changing(CHANGES))
