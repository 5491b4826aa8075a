"""Which device a run is on, together with which other processes, and in which precision."""
import contextlib
import datetime
import functools
import importlib.machinery
import importlib.util
import inspect
import math
import os
import platform
import resource
import signal
import sys

import torch
import torch.distributed as dist

BACKENDS = {"npu": "hccl", "cuda": "nccl", "cpu": "gloo"}  # of the process group, in the order of --device auto
AMP_DTYPES = {"npu": torch.float16, "cuda": torch.float16, "cpu": torch.bfloat16}
STOP_INTERVAL = 10  # iterations between two looks at whether some rank is asked to stop
LARGE_WEIGHT = 2 ** 25  # values; only vgg16's fc6 has more, 2 ** 26.6
LOSS_SCALES = {"npu": 128.0, "cuda": "dynamic", "cpu": "dynamic"}  # of float16; the Ascend port's is a static 128
NATIVE_LEVELS = ("O0", "O1")  # that PyTorch's own AMP can do; apex has O2 and O3, too
APEX_CALLS = ("initialize", "scale_loss", "master_params", "state_dict", "load_state_dict")  # of apex.amp, used here


class DeviceError(ValueError):
    """A device or precision that cannot be had; the message is one line for the user."""


def choose_device(name="auto", device_id=None):
    """The torch.device for a --device flag: npu, cuda (or gpu), cpu; `auto` takes the first of these that is there.

    device_id: which of several; None: the one of this process's local rank. There is one CPU, which processes share.
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
        index = 0 if name == "cpu" else Processes().local_rank
    if index >= count:
        raise DeviceError(f"there is no {name} device {index}; there are {count}, counted from 0; change --device_id "
                          "or the number of processes")
    if name == "cpu":
        return torch.device("cpu")
    device = torch.device(name, index)
    getattr(torch, name).set_device(device)
    return device


@functools.cache  # a second import of a torch_npu that failed would fail otherwise
def problem(kind):
    """Why there is no device of a kind (npu or cuda), in one line; None if there is one."""
    if kind == "cuda":
        return None if torch.cuda.is_available() else "PyTorch sees no CUDA device"
    if importlib.util.find_spec("torch_npu") is None:
        return "torch_npu is not installed"
    try:
        import torch_npu  # noqa: F401, registers the device type
    except Exception as error:  # without CANN's libraries it raises whatever its parts raise
        return f"torch_npu cannot be imported ({(str(error) or repr(error)).splitlines()[0]})"
    return None if torch.npu.is_available() else "torch_npu sees no NPU"


def describe(device, asked):
    """The device in words. asked: the --device flag; for `auto`, why it is none of those that come first."""
    if device.type == "cpu":
        what = f"{platform.machine()}, {torch.get_num_threads()} threads"
    else:
        what = getattr(torch, device.type).get_device_name(device)
    kinds = list(BACKENDS)
    passed_over = kinds[:kinds.index(device.type)] if asked == "auto" else []
    return f"{device} ({'; '.join([what, *(f'no {kind}: {problem(kind)}' for kind in passed_over)])})"


def synchronize(device):
    """Waits until the device has done what was asked of it; a clock read before that tells nothing."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize(device)


def peak_memory(device):
    """The most memory that tensors held on the device, on a CPU the most the process held; in bytes."""
    if device.type == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
    return getattr(torch, device.type).max_memory_allocated(device)


def memory_format(device):
    """How a network's weights lie in memory: channels last, in which convolutions are faster, but not on an NPU, whose
    operators take contiguous tensors alone, so that torch_npu would copy every other."""
    return torch.contiguous_format if device.type == "npu" else torch.channels_last


def place(model, device):
    """Moves a network to the device, its weights in the memory format that is fastest there, and returns it."""
    model = model.to(device, memory_format=memory_format(device))
    if device.type == "cpu":
        # oneDNN leaves gradients contiguous: to turn round those of vgg16's fc6, 400 MB, is a sixth of a step.
        for parameter in model.parameters():
            if parameter.numel() > LARGE_WEIGHT:
                parameter.data = parameter.data.contiguous()
    return model


def pins_memory(device):
    """Whether batches go through page-locked memory, from which they are copied while the device computes."""
    return device.type != "cpu"


def on_cpu(state):
    """The same nested dicts and lists with all tensors on the CPU, so that any machine can read them."""
    if isinstance(state, torch.Tensor):
        return state.cpu()
    if isinstance(state, dict):
        return {key: on_cpu(value) for key, value in state.items()}
    return [on_cpu(value) for value in state] if isinstance(state, (list, tuple)) else state


def check_fits(count, what):
    """Raises DeviceError if `count` float32 numbers would not even fit into the machine's memory: a slip of the key."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if 4 * count > memory:
        raise DeviceError(f"{what} takes {4 * count / 2 ** 30:,.0f} GiB, this machine has {memory / 2 ** 30:.0f}; "
                          "take less")


class Processes:
    """The processes of one run, as torchrun started them: this one's rank and their number; alone, rank 0 of 1."""

    def __init__(self):
        self.rank = int(os.environ.get("RANK", 0))
        self.local_rank = int(os.environ.get("LOCAL_RANK", 0))
        self.count = int(os.environ.get("WORLD_SIZE", 1))

    def join(self, device, timeout):
        """Meets the other processes; after `timeout` seconds without an answer, now or later, a process ends.

        Raises DeviceError if they cannot be reached.
        """
        if self.count == 1:
            return
        limit = datetime.timedelta(seconds=timeout)
        # After a restart torchrun's store still holds the addresses of the dead, on which gloo would wait.
        attempt = f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"
        try:
            store = dist.PrefixStore(attempt, next(dist.rendezvous("env://", timeout=limit))[0])
            dist.init_process_group(BACKENDS[device.type], store=store, rank=self.rank, world_size=self.count,
                                    timeout=limit)
        except (dist.DistError, RuntimeError) as error:
            where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            raise DeviceError(f"rank {self.rank} could not meet the other processes at {where} within {timeout} s "
                              f"({str(error).splitlines()[0]})") from None

    def leave(self):
        if self.count > 1:
            dist.destroy_process_group()

    def share(self, value):
        """Rank 0's value, in every process; what the others pass is not looked at."""
        values = [value]
        if self.count > 1:
            dist.broadcast_object_list(values, 0)
        return values[0]

    def once_a_machine(self, work):
        """What `work` returns in rank 0, in every process; it runs in the first one of each machine.

        What it raises there, a ValueError or OSError, ends them all: as that where it happened, silently elsewhere.
        """
        if self.count == 1:
            return work()
        result = error = None
        if self.local_rank == 0:
            try:
                result = work()
            except (ValueError, OSError) as problem:
                error = problem
        failed = [None] * self.count
        dist.all_gather_object(failed, error is not None)
        if any(failed):
            self.leave()
            if error is not None:
                raise error
            sys.exit(1)
        return self.share(result)

    def add_up(self, array, device):
        """The sum over all processes of a NumPy array."""
        if self.count == 1:
            return array
        total = torch.from_numpy(array).to(device)
        dist.all_reduce(total)
        return total.cpu().numpy()

    def share_buffers(self, model):
        """Gives every process rank 0's BN statistics; parameters are equal already."""
        if self.count > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)


class StopSignal:
    """SIGTERM or Ctrl-C, on which the processes of a run stop together, and not before they have saved.

    From its creation on such a signal only leaves a note.
    """

    def __init__(self, processes, device):
        self.processes, self.device = processes, device
        self.number = 0
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.note)

    def note(self, number, frame):
        self.number = number

    def agreed(self, iteration=0):
        """The signal's number if the run is to stop now, after this iteration, else 0; the same in every process, as
        one that went on alone would wait for the others in vain.

        Asking the others waits for the device, so accelerators are asked every STOP_INTERVAL iterations only.
        """
        if self.processes.count == 1:
            return self.number
        if self.device.type != "cpu" and iteration % STOP_INTERVAL:
            return 0
        number = torch.tensor([self.number], device=self.device)
        dist.all_reduce(number, dist.ReduceOp.MAX)
        return int(number)


def fused_sgd(parameters, device, precision, lr, momentum, weight_decay):
    """SGD in the form that updates all parameters in the fewest steps that the device has to be told."""
    settings = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
    if device.type == "npu":
        return precision.npu_sgd()(parameters, **settings)
    optimizer = torch.optim.SGD(parameters, fused=True, **settings)
    if momentum:
        # It leaves out a step with infinite gradients by itself, and if that is the first one, starts the next from
        # momentum that nobody set (PyTorch 2.15 still). From 0 the first step is the same.
        for parameter in parameters:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def choose_precision(device, amp=False, opt_level=None, loss_scale=None, backend="auto", dtype=None):
    """The Precision or ApexPrecision for the flags of train.py with these names; None: what is usual on the device.

    opt_level: "O0" to "O3"; loss_scale: a number or "dynamic"; backend: "apex", "native", or "auto", apex where it is
    installed; dtype: "float16" or "bfloat16".
    Raises DeviceError for what cannot be had, or would have no effect.
    """
    if not amp:
        return Precision(device)
    opt_level = opt_level or "O1"
    native = backend == "native" or (backend == "auto" and prefers_native(device, opt_level, dtype))
    if native and opt_level not in NATIVE_LEVELS:
        raise DeviceError(f"--opt_level {opt_level} needs apex; --amp_backend native has {' and '.join(NATIVE_LEVELS)}")
    dtype = amp_dtype(device, opt_level, native, dtype)
    if loss_scale is not None and dtype is not torch.float16:
        raise DeviceError(f"--loss_scale {loss_scale}: {name_of(dtype)} on {device.type} needs no loss scale; leave it "
                          "out")
    if loss_scale is None:
        loss_scale = LOSS_SCALES[device.type] if dtype is torch.float16 else 1.0
    if native:
        return Precision(device, dtype, loss_scale)
    try:
        return ApexPrecision(find_apex(device.type), opt_level, loss_scale)
    except ImportError as error:
        raise DeviceError(f"--opt_level {opt_level} by apex: {error}; PyTorch's own AMP has O1: --amp_backend native"
                          ) from None


def prefers_native(device, opt_level, dtype):
    """Whether PyTorch's own AMP does it: what it alone can, and all it can where there is no apex for the device."""
    if opt_level not in NATIVE_LEVELS:
        return False
    if opt_level == "O0" or dtype == "bfloat16":
        return True
    try:
        find_apex(device.type)
    except ImportError:
        return True
    return False


def amp_dtype(device, opt_level, native, asked):
    """The torch.dtype that convolutions run in; asked: the --amp_dtype flag, or None. Raises DeviceError."""
    if opt_level == "O0":
        if asked is not None:
            raise DeviceError(f"--amp_dtype {asked} has no effect with --opt_level O0, which mixes nothing; take O1")
        return torch.float32
    if asked is None:
        return AMP_DTYPES[device.type] if native else torch.float16
    if asked == "bfloat16" and not native:
        raise DeviceError("--amp_dtype bfloat16: apex mixes in float16 alone; take --amp_backend native and O1")
    if asked == "bfloat16" and device.type != "cpu" and not getattr(torch, device.type).is_bf16_supported():
        raise DeviceError(f"--amp_dtype bfloat16: {device} cannot compute in it; take float16")
    return getattr(torch, asked)


def name_of(dtype):
    return str(dtype).removeprefix("torch.")


class Precision:
    """float32, or mixed precision by PyTorch's own AMP.

    dtype: what convolutions run in; loss_scale: a number that stays, or "dynamic": halved when gradients overflow,
    doubled after 2,000 steps in which they do not. Where nothing is scaled it is 1.
    """

    def __init__(self, device, dtype=torch.float32, loss_scale=1.0):
        self.device_type, self.dtype = device.type, dtype
        self.static_scale = None if loss_scale == "dynamic" else float(loss_scale)
        # Made for a scale of 1, too: it is what finds the steps with infinite gradients and leaves them out.
        start = {} if self.static_scale is None else {"init_scale": self.static_scale}
        self.scaler = torch.amp.GradScaler(device.type, **start)

    def __str__(self):
        if self.dtype is torch.float16:
            return f"float16 with loss scale {self.static_scale or 'dynamic'}"
        return name_of(self.dtype)

    def npu_sgd(self):
        """The class of the fused optimizer on an NPU."""
        import torch_npu
        return torch_npu.optim.NpuFusedSGD

    def wrap(self, model, optimizer):
        """The two to train with, for a model that is on its device, before it is wrapped in DistributedDataParallel."""
        return model, optimizer

    def autocast(self):
        if self.dtype is torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device_type, self.dtype)

    def step(self, loss, optimizer):
        """Backward and optimizer step. -> whether it was left out, as its gradients held Inf or NaN: bool [] on the
        device, so that nobody has to wait for it."""
        self.scaler.scale(loss).backward()
        self.scaler.step(optimizer)
        # PyTorch has no public way to ask; comparing scales waits for the device, and tells nothing of a static one.
        left_out = sum(self.scaler._found_inf_per_device(optimizer).values()) > 0
        self.scaler.update(self.static_scale)  # a number sets the scale, None lets it grow and back off
        return left_out

    def state_dict(self):
        return {"scaler": self.scaler.state_dict()} if self.static_scale is None else {}

    def load_state_dict(self, state):
        """Takes over what state_dict of the same precision gave; from another one there is nothing to take over."""
        if self.static_scale is None and "scaler" in state:
            self.scaler.load_state_dict(state["scaler"])


class ApexPrecision:
    """Mixed precision by apex, NVIDIA's or Ascend's, in float16; the same methods as Precision.

    amp: the module apex.amp; opt_level: O1 casts the inputs of PyTorch's functions; O2 makes the network float16 but
    for BN, and steps float32 master weights; O3 makes it float16 altogether
    """

    def __init__(self, amp, opt_level, loss_scale):
        self.amp, self.opt_level, self.loss_scale = amp, opt_level, loss_scale
        self.optimizer = None
        # Ascend's handles all gradients, and all parameters, as one tensor, but only in these.
        self.combines = "combine_grad" in inspect.signature(amp.initialize).parameters and opt_level in ("O1", "O2")

    def __str__(self):
        return f"apex {self.opt_level} with loss scale {self.loss_scale}"

    def npu_sgd(self):
        if not self.combines:
            return torch.optim.SGD
        return importlib.import_module("apex.optimizers").NpuFusedSGD

    def wrap(self, model, optimizer):
        more = {"combine_grad": True} if self.combines else {}
        model, self.optimizer = self.amp.initialize(model, optimizer, opt_level=self.opt_level,
                                                    loss_scale=self.loss_scale, verbosity=0, **more)
        return model, self.optimizer

    def autocast(self):
        return contextlib.nullcontext()  # apex casts by itself

    def step(self, loss, optimizer):
        before = self.scale()
        with self.amp.scale_loss(loss, optimizer) as scaled_loss:
            scaled_loss.backward()
        if self.loss_scale == "dynamic":
            left_out = self.scale() < before  # apex found an overflow; its `optimizer.step` does nothing this once
        else:
            gradients = [p.grad for p in self.amp.master_params(optimizer) if p.grad is not None]
            left_out = not torch.nn.utils.get_total_norm(gradients, math.inf).isfinite()  # apex does not look
        if self.loss_scale == "dynamic" or not left_out:
            optimizer.step()
        return torch.tensor(left_out, device=loss.device)

    def scale(self):
        return self.amp.state_dict()["loss_scaler0"]["loss_scale"]

    def state_dict(self):
        state = {"amp": self.amp.state_dict()} if self.loss_scale == "dynamic" else {}
        if self.opt_level == "O2":  # the network's own weights are these, rounded to float16
            state["master_weights"] = [p.detach() for p in self.amp.master_params(self.optimizer)]
        return state

    def load_state_dict(self, state):
        """To be called before the optimizer's, whose momentum it would round to float16 in O2."""
        if self.loss_scale == "dynamic" and "amp" in state:
            self.amp.load_state_dict(state["amp"])
        if self.opt_level == "O2" and "master_weights" in state:
            self.optimizer.zero_grad()  # apex makes the master weights when they are first needed
            for weight, saved in zip(self.amp.master_params(self.optimizer), state["master_weights"], strict=True):
                weight.data.copy_(saved)


def find_apex(device_type):
    """The module apex.amp of the apex that is installed, if it has one and is made for the device.

    Three packages go by that name, so it is told by what it offers; an unrelated one is not even imported.
    Raises ImportError with one line that says what was found instead.
    """
    if device_type == "cpu":
        raise ImportError("apex needs an NPU or a CUDA device")
    apex = importlib.util.find_spec("apex")
    folders = apex and apex.submodule_search_locations
    if not apex:
        raise ImportError("apex is not installed")
    if not has_module(folders, "amp"):
        if has_module(folders, "optimizers"):
            raise ImportError(f"the apex in {apex.origin} has no amp, which NVIDIA took out in May 2025")
        raise ImportError(f"the apex in {apex.origin} is PyPI's unrelated package of that name; uninstall it")
    try:
        amp = importlib.import_module("apex.amp")
    except Exception as error:  # an apex of another PyTorch raises whatever its parts raise
        raise ImportError(f"apex cannot be imported ({(str(error) or repr(error)).splitlines()[0]})") from None
    lacking = [name for name in APEX_CALLS if not hasattr(amp, name)]
    if lacking:
        raise ImportError(f"the apex in {apex.origin} lacks amp.{lacking[0]}")
    is_ascends = "combine_grad" in inspect.signature(amp.initialize).parameters
    if is_ascends != (device_type == "npu"):
        raise ImportError(f"the apex in {apex.origin} is {'for NPUs' if is_ascends else 'for CUDA devices'}")
    return amp


def has_module(folders, name):
    return importlib.machinery.PathFinder.find_spec(name, folders) is not None
