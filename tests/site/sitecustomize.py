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

COMPILER, META_KERNELS = "torch._dynamo", "torch._meta_registrations"


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


class StandIn(types.ModuleType):
    """Stands for a module of PyTorch's compiler, and has what is asked of that where nothing is compiled. Asked for
    anything else, it makes way."""

    def __init__(self, name, **known):
        super().__init__(name)
        vars(self).update(known)

    def __getattr__(self, name):
        if name.startswith("__") and name != "__path__":  # of a search through all modules
            raise AttributeError(name)
        for part in (COMPILER, META_KERNELS):
            if isinstance(sys.modules.get(part), StandIn):
                del sys.modules[part]
        importlib.import_module(META_KERNELS)  # before the compiler, as PyTorch does: they import each other
        return getattr(importlib.import_module(self.__name__), name)


def leave_compiler_out(torch):
    """An optimizer's first step and DistributedDataParallel import it, for a second, to call these. PyTorch itself
    imports operators without values, for a third of one; with them comes the class of generators."""
    utils = StandIn(f"{COMPILER}.utils", get_optimize_ddp_mode=lambda: "ddp_optimizer")  # the default
    rules = StandIn(f"{COMPILER}.trace_rules", clear_lru_cache=lambda: None)
    sys.modules[COMPILER] = torch._dynamo = StandIn(
        COMPILER, graph_break=lambda *arguments: None, disable=lambda function, *arguments, **options: function,
        utils=utils, trace_rules=rules)
    if hasattr(torch._C, "_set_generator_metaclass"):  # since PyTorch 2.13
        torch._C._set_generator_metaclass(importlib.import_module("torch._custom_class_base").CustomClassBaseMeta)


def add_backbones(fcn8s):
    import tiny_network

    for name, network in (("tiny", "Tiny"), ("tiny_d8", "TinyD8"), ("tiny_plain", "TinyPlain")):
        fcn8s.BACKBONES[name] = fcn8s.Backbone(getattr(tiny_network, network))


def draw_nothing(inference):
    inference.draw = inference.draw_data = lambda *arguments: None


CHANGES = {"fcn8s": [add_backbones], "inference": [draw_nothing] if os.environ.get("NO_PICTURES") else [], "voc": []}
if "--compile" not in sys.orig_argv:
    CHANGES["torch"] = [leave_compiler_out]
    sys.modules.setdefault(META_KERNELS, StandIn(META_KERNELS))
sys.modules.setdefault("cuda", None)  # NVIDIA's bindings, which PyTorch tries to import and can do without
if "fcn8s" in sys.modules:
    add_backbones(sys.modules["fcn8s"])
else:
    sys.meta_path.insert(0, Changing(CHANGES))
