"""The device: which one is there, what it is called, how memory lies on it."""
import contextlib
import functools
import importlib.util
import os
import platform
import resource

import torch

from errors import DeviceError, RunError, first_line

KINDS = ("npu", "cuda", "cpu")  # in the order of --device auto
LARGE_WEIGHT = 2 ** 25  # values; only vgg16's fc6 has more, 2 ** 26.6


def choose_device(name="auto", device_id=None):
    """The torch.device for a --device flag: npu, cuda (or gpu), cpu; `auto` takes the first of these that is there.

    device_id: which of several; None: the one of this process's local rank. There is one CPU, which ranks share.
    Raises DeviceError if a named device is not there.
    """
    name = "cuda" if name == "gpu" else name
    missing = {kind: problem(kind) for kind in ("npu", "cuda") if name in (kind, "auto")}
    if name == "auto":
        name = next((kind for kind, why in missing.items() if why is None), "cpu")
    elif missing.get(name):
        raise DeviceError(f"--device {name}: {missing[name]}; --device auto takes what is there")
    count = 1 if name == "cpu" else getattr(torch, name).device_count()
    index = device_id
    if index is None:
        index = 0 if name == "cpu" else int(os.environ.get("LOCAL_RANK", 0))
    if index >= count:
        raise DeviceError(f"there is no {name} device {index}; there are {count}, counted from 0; change --device_id "
                          "or the number of processes")
    if name == "cpu":
        return torch.device("cpu")
    device = torch.device(name, index)
    getattr(torch, name).set_device(device)
    if name == "npu" and not sees_overflows():
        raise DeviceError(f"--device npu: {device} has no INF/NAN mode, without which overflows go unseen; it is not "
                          "supported, take --device cpu")
    return device


def sees_overflows():
    """Whether the NPU computes Inf and NaN where numbers overflow; an Ascend 910A does not."""
    utils = getattr(torch.npu, "utils", None)  # where torch_npu documents the question; it lacks it in some versions
    return getattr(utils, "is_support_inf_nan", lambda: True)()


@functools.cache  # a second import of a broken torch_npu raises another error
def problem(kind):
    """Why there is no device of a kind (npu or cuda), in one line; None if there is one."""
    if kind == "cuda":
        return None if torch.cuda.is_available() else "PyTorch sees no CUDA device"
    if importlib.util.find_spec("torch_npu") is None:
        return "torch_npu is not installed"
    try:
        import torch_npu  # noqa: F401, registers the device type
    except Exception as error:  # without CANN's libraries it raises whatever its parts raise
        return f"torch_npu cannot be imported ({first_line(error)})"
    return None if torch.npu.is_available() else "torch_npu sees no NPU"


def describe(device, asked):
    """The device in words. asked: the --device flag; for `auto`, why it is none of those that come first."""
    if device.type == "cpu":
        what = f"{platform.machine()}, {torch.get_num_threads()} threads"
    else:
        what = getattr(torch, device.type).get_device_name(device)
    passed_over = KINDS[:KINDS.index(device.type)] if asked == "auto" else []
    return f"{device} ({'; '.join([what, *(f'no {kind}: {problem(kind)}' for kind in passed_over)])})"


def synchronize(device):
    """Waits until the device has finished its queued work, for a clock to mean something."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize(device)


def peak_memory(device):
    """The most memory that tensors held on the device, on a CPU the most the process held; in bytes."""
    if device.type == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
    return getattr(torch, device.type).max_memory_allocated(device)


def memory_format(device):
    """Channels last, in which convolutions are faster, but not on an NPU, whose operators take contiguous tensors
    alone, so that torch_npu would copy every other."""
    return torch.contiguous_format if device.type == "npu" else torch.channels_last


def place(model, device):
    """Moves a network to the device, its weights in the memory format that is fastest there, and returns it."""
    model = model.to(device, memory_format=memory_format(device))
    if device.type == "cpu":
        # oneDNN leaves gradients contiguous: to convert those of vgg16's fc6, 400 MB, is a sixth of a step.
        for parameter in model.parameters():
            if parameter.numel() > LARGE_WEIGHT:
                parameter.data = parameter.data.contiguous()
    return model


def pins_memory(device):
    """Whether batches go through page-locked memory, from which they are copied while the device computes."""
    return device.type != "cpu"


def to_device(batch, device):
    """A batch's tensors on the device, without waiting for the copies where the memory is page-locked."""
    return {key: value.to(device, non_blocking=True) for key, value in batch.items()}


@contextlib.contextmanager
def memory_errors(remedy):
    """Turns an out-of-memory error into a RunError. On a CPU, and in some versions of torch_npu, that is a bare
    RuntimeError, which only its text tells."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        named = ("DefaultCPUAllocator: can't allocate memory", "NPU out of memory")
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(words in str(error) for words in named):
            raise RunError(f"memory ran out ({first_line(error)}); {remedy}") from None
        raise


@contextlib.contextmanager
def convolutions(device, training):
    """A context: how cuDNN, or an NPU, computes convolutions.

    In training every crop has one shape: cuDNN tries its algorithms once (mmsegmentation's cudnn_benchmark). Float32
    convolutions use TF32 there, on an NPU HF32, the defaults of PyTorch and torch_npu (torch.npu.conv.allow_hf32, in
    Ascend Extension for PyTorch's API reference). In evaluation shapes vary, and float32 is float32.
    """
    if device.type == "cuda":
        cudnn = torch.backends.cudnn
        with cudnn.flags(enabled=True, benchmark=training, benchmark_limit=cudnn.benchmark_limit,
                         deterministic=cudnn.deterministic, allow_tf32=training and cudnn.allow_tf32):
            yield
    elif device.type == "npu" and hasattr(torch.npu, "conv"):
        before = torch.npu.conv.allow_hf32
        torch.npu.conv.allow_hf32 = training and before
        try:
            yield
        finally:
            torch.npu.conv.allow_hf32 = before
    else:
        yield


def on_cpu(state):
    """The same nested dicts and lists with all tensors on the CPU, so that any machine can read them."""
    if isinstance(state, torch.Tensor):
        return state.cpu()
    if isinstance(state, dict):
        return {key: on_cpu(value) for key, value in state.items()}
    return [on_cpu(value) for value in state] if isinstance(state, (list, tuple)) else state
