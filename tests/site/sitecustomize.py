"""Puts the tests' small backbones into the table, in every process that has this folder on its PYTHONPATH.

Python imports a module of this name when it starts, in the processes that torchrun starts, too. PyTorch is not imported
for it: the rows are added when the project imports fcn8s.
"""
import sys
from importlib.machinery import PathFinder


class AddingBackbones:
    """An importer, of fcn8s alone, that adds rows to its table."""

    def find_spec(self, name, path=None, target=None):
        spec = PathFinder.find_spec(name, path) if name == "fcn8s" else None
        if spec:
            load = spec.loader.exec_module
            spec.loader.exec_module = lambda module: (load(module), add_backbones(module))
        return spec


def add_backbones(fcn8s):
    import tiny_network

    for name, network in (("tiny", "Tiny"), ("tiny_d8", "TinyD8"), ("tiny_plain", "TinyPlain")):
        fcn8s.BACKBONES[name] = fcn8s.Backbone(getattr(tiny_network, network))


if "fcn8s" in sys.modules:
    add_backbones(sys.modules["fcn8s"])
else:
    sys.meta_path.insert(0, AddingBackbones())
