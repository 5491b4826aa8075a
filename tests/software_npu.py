"""A software NPU: a device type "npu" whose tensors' values lie in CPU memory, so that the NPU path runs without one.

PyTorch lets a device be registered in Python. Each operation on such tensors is handed to the CPU tensors behind them,
so the numbers are those of the CPU. As on a real device, an operation on tensors of two devices is an error, autocast
casts by lists, and nothing leaves the device unasked. What real NPUs lack is refused. `stand_ins/npu/torch_npu` is the
package around it.
"""
import contextlib
import itertools
import os
import resource
import types

import torch
import torch.distributed as dist
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

# What autocast runs in lower precision, and what in float32: from torch_npu's lists, the operations of the networks.
LOWERED = ("conv2d", "conv_transpose2d.input", "linear", "matmul")
RAISED = ("cross_entropy_loss", "nll_loss", "nll_loss2d", "log_softmax.int", "softmax.int", "pow.Tensor_Scalar")
# A CPU is very slow at these in float16. In float32 and then rounded they are what an NPU computes, which adds so, too.
SLOW_IN_HALF = ("aten::convolution", "aten::convolution_backward")
# These may bring values from one device to another.
MOVING = ("aten::_to_copy", "aten::copy_", "aten::_copy_from")
# What fails on a real one, or is not reliable on each: the kernel of GradScaler.update (CANN 9.1), NaN on an 910A.
LACKING = ("aten::_amp_update_scale_", "aten::isnan")
# These make the process wait until the device has done what was asked of it.
WAITING = ("aten::_local_scalar_dense", "aten::bincount", "aten::nonzero")
waits = []  # the names of the operations that waited, and "to npu:0", "to cpu"


class NpuModule(types.ModuleType):
    """`torch.npu`: what device.py, torch.amp and torch.random ask of it."""
    conv = types.SimpleNamespace(allow_hf32=True)

    def is_available(self):
        return True

    def is_initialized(self):
        return True

    def _is_in_bad_fork(self):
        return False

    def manual_seed_all(self, seed):
        torch.default_generator.manual_seed(seed)

    current = 0

    def device_count(self):
        """$SOFTWARE_NPUS (1) or, as CANN counts, those of ASCEND_RT_VISIBLE_DEVICES before the first that is not there.
        """
        there = [str(number) for number in range(int(os.environ.get("SOFTWARE_NPUS", "1")))]
        visible = os.environ.get("ASCEND_RT_VISIBLE_DEVICES", ",".join(there)).split(",")
        return len(list(itertools.takewhile(lambda number: number in there, visible)))

    def current_device(self):
        return self.current

    def set_device(self, device):
        index = torch.device(device).index
        if index >= self.device_count():
            raise RuntimeError(f"there is no {device}")
        self.current = index

    def device(self, device):
        return contextlib.nullcontext()

    def synchronize(self, device=None):
        pass

    def get_amp_supported_dtype(self):
        return [torch.float16, torch.bfloat16]

    def is_bf16_supported(self):
        return True

    def max_memory_allocated(self, device=None):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def get_device_name(self, device=None):
        return "software NPU"

    utils = types.SimpleNamespace(is_support_inf_nan=lambda: not os.environ.get("SOFTWARE_NPU_IS_910A"))


class Hccl(dist.ProcessGroup):
    """Collective operations on the tensors behind, by gloo."""

    def __init__(self, store, rank, size, timeout):
        super().__init__(rank, size)
        self.gloo = dist.ProcessGroupGloo(store, rank, size, timeout)

    def allreduce(self, tensors, options=None):
        return Done(self.gloo.allreduce(tree_map(to_raw, tensors), options or dist.AllreduceOptions()), tensors)

    def broadcast(self, tensors, options):
        return Done(self.gloo.broadcast(tree_map(to_raw, tensors), options), tensors)

    def allgather(self, outputs, tensors, options=None):
        return Done(self.gloo.allgather(*tree_map(to_raw, (outputs, tensors)), options or dist.AllgatherOptions()),
                    outputs)


class Done(dist._Work):
    """A collective operation that has ended."""

    def __init__(self, work, result):
        super().__init__()
        work.wait()
        self.future = torch.futures.Future()
        self.future.set_result(result)

    def wait(self, timeout=None):
        return True

    def get_future(self):
        return self.future


class NpuTensor(torch.Tensor):
    """Says that it is on npu:0; `raw` is the CPU tensor with its values.

    PyTorch counts one device of a kind that is made in Python. A rank whose device is npu:1 has its tensors there, too.
    """
    @staticmethod
    def __new__(cls, raw):
        with torch.inference_mode(False):  # a view made in that mode keeps the version of its base
            tensor = torch.Tensor._make_wrapper_subclass(
                cls, raw.size(), strides=raw.stride(), storage_offset=raw.storage_offset(), dtype=raw.dtype,
                layout=raw.layout, device=torch.device("npu:0"), requires_grad=raw.requires_grad)
        tensor.raw = raw
        return tensor

    @property
    def data(self):
        return torch.Tensor.data.__get__(self)

    @data.setter
    def data(self, other):
        torch.Tensor.data.__set__(self, other)
        self.raw = other.raw

    def __deepcopy__(self, memo):  # PyTorch's own looks for memory behind the tensor
        copy = self.detach().clone()
        return torch.nn.Parameter(copy, self.requires_grad) if isinstance(self, torch.nn.Parameter) else copy

    def tolist(self):  # PyTorch refuses it for subclasses
        waits.append("to cpu")
        return self.raw.tolist()

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        to_cpu = kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cpu"
        leaves = tree_leaves((args, kwargs))
        ours = {id(leaf.raw): leaf for leaf in leaves if isinstance(leaf, NpuTensor)}
        name = operation._schema.name
        strangers = [leaf for leaf in leaves if type(leaf) is torch.Tensor and leaf.dim() > 0]
        if ours and strangers and name not in MOVING:
            raise RuntimeError(f"{name}: expected all tensors to be on npu:0, but one is on {strangers[0].device}")
        if name == "aten::copy_" and ours and type(args[1]) is torch.Tensor:
            waits.append("to npu:0")
        refuse(name, args)
        args, kwargs = tree_map(to_raw, (args, kwargs))
        if name in WAITING or to_cpu:
            waits.append("to cpu" if to_cpu else name)
        if name in SLOW_IN_HALF and args[0].dtype is torch.float16:
            result = tree_map(to_half, operation(*tree_map(to_float, args), **kwargs))
        else:
            result = operation(*args, **kwargs)
        if any(tensor.raw.shape != tensor.shape for tensor in ours.values()):
            raise NotImplementedError(f"{name} changes a shape in place, of which a wrapped tensor hears nothing")
        if to_cpu:
            return result

        def wrap(value):  # an operation in place gives back the very tensor it was given
            if not isinstance(value, torch.Tensor):
                return value
            return ours[id(value)] if id(value) in ours else NpuTensor(value)
        return tree_map(wrap, result)


def refuse(name, args):
    """Raises RuntimeError for what a real NPU lacks."""
    transposed = name == "aten::convolution" and args[6]
    if name == "aten::copy_" and type(args[1]) is torch.Tensor and args[1].dim() == 4 and not args[1].is_contiguous():
        raise RuntimeError("torch_npu would make this batch contiguous on the CPU, out of page-locked memory")
    if name in LACKING or (transposed and args[0].dtype is torch.bfloat16):
        raise RuntimeError(f"an NPU does not offer {name} of {args[0].dtype}" + (", transposed" if transposed else ""))


def to_raw(value):
    if isinstance(value, NpuTensor):
        return value.raw
    return torch.device("cpu") if isinstance(value, torch.device) and value.type == "npu" else value


def to_float(value):
    return value.float() if isinstance(value, torch.Tensor) else value


def to_half(value):
    return value.half() if isinstance(value, torch.Tensor) else value


def cast_inputs(operation, dtype_of):
    """The operation on inputs that autocast has cast; `dtype_of` says to what."""
    def cast(*args, **kwargs):
        inside = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)
        with torch._C._ExcludeDispatchKeyGuard(inside):
            return operation(*(arg.to(dtype_of()) if isinstance(arg, torch.Tensor) and arg.is_floating_point() else arg
                               for arg in args), **kwargs)
    return cast


def register():
    """Makes "npu" a device of this process. -> the registrations, which last as long as somebody holds them"""
    _setup_privateuseone_for_python_backend("npu", backend_module=NpuModule("torch.npu"))
    dist.Backend.register_backend("hccl", Hccl, devices=["npu"])
    aten, others = torch.library.Library("aten", "IMPL"), torch.library.Library("_", "IMPL")
    aten.impl("empty.memory_format", lambda size, dtype=None, layout=None, device=None, pin_memory=None,
              memory_format=None: NpuTensor(torch.empty(size, dtype=dtype)), "PrivateUse1")
    aten.impl("empty_strided", lambda size, stride, dtype=None, layout=None, device=None, pin_memory=None:
              NpuTensor(torch.empty_strided(size, stride, dtype=dtype)), "PrivateUse1")

    for name in ("arange", "arange.start", "arange.start_step"):
        aten.impl(name, lambda *numbers, dtype=None, layout=None, device=None, pin_memory=None:
                  NpuTensor(torch.arange(*numbers, dtype=dtype)), "PrivateUse1")

    def copy_from(source, target, non_blocking=False):
        to_raw(target).copy_(to_raw(source))
        return target
    aten.impl("_copy_from", copy_from, "PrivateUse1")
    # Page-locked memory, which the DataLoader asks for: here any memory will do.
    aten.impl("is_pinned", lambda tensor, device=None: False, "CPU")
    aten.impl("_pin_memory", lambda tensor, device=None: tensor.clone(), "CPU")

    others.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    for names, dtype_of in ((LOWERED, lambda: torch.get_autocast_dtype("npu")), (RAISED, lambda: torch.float32)):
        for name in names:
            packet, _, overload = name.partition(".")
            operation = getattr(getattr(torch.ops.aten, packet), overload or "default")
            aten.impl(name, cast_inputs(operation, dtype_of), "AutocastPrivateUse1")
    return aten, others
