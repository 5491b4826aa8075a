"""Puts the tests' small backbones into the table, in every process that has this folder on its PYTHONPATH. Where
$NO_PICTURES is set, a training draws nothing. Without --compile, nothing imports the compiler.

Python imports a module of this name when it starts, in the processes that torchrun starts, too. PyTorch is not imported
for it: a module is changed when the project imports it.
"""
import importlib
import os
import sys
import types
from importlib.machinery import PathFinder

COMPILER = "torch._dynamo"


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


class NoCompiler(types.ModuleType):
    """Stands for torch._dynamo, which an optimizer's first step and DistributedDataParallel import, for a second, to
    call these. They do nothing where nothing is compiled. Asked for anything else, it makes way."""
    graph_break = staticmethod(lambda *arguments: None)
    disable = staticmethod(lambda function, *arguments, **options: function)
    utils = types.SimpleNamespace(get_optimize_ddp_mode=lambda: "ddp_optimizer")  # the default
    trace_rules = types.SimpleNamespace(clear_lru_cache=lambda: None)

    def __getattr__(self, name):
        if sys.modules.get(COMPILER) is self:
            del sys.modules[COMPILER]
        return getattr(importlib.import_module(COMPILER), name)


def leave_compiler_out(torch):
    sys.modules[COMPILER] = torch._dynamo = NoCompiler(COMPILER)


def add_backbones(fcn8s):
    import tiny_network

    for name, network in (("tiny", "Tiny"), ("tiny_d8", "TinyD8"), ("tiny_plain", "TinyPlain")):
        fcn8s.BACKBONES[name] = fcn8s.Backbone(getattr(tiny_network, network))


def draw_nothing(inference):
    inference.draw = inference.draw_data = lambda *arguments: None


CHANGES = {"fcn8s": [add_backbones], "inference": [draw_nothing] if os.environ.get("NO_PICTURES") else [], "voc": []}
if "--compile" not in sys.orig_argv:
    CHANGES["torch"] = [leave_compiler_out]
if "fcn8s" in sys.modules:
    add_backbones(sys.modules["fcn8s"])
else:
    sys.meta_path.insert(0, Changing(CHANGES))
