"""Precision: float32, or mixed precision by PyTorch's own AMP or by apex, and the optimizer step in it."""
import contextlib
import importlib
import importlib.machinery
import importlib.util
import inspect
import math

import torch

from device import place
from errors import DeviceError, first_line
from fcn8s import FCN8s

AMP_DTYPES = {"npu": torch.float16, "cuda": torch.float16, "cpu": torch.bfloat16}
LOSS_SCALES = {"npu": 128.0, "cuda": "dynamic", "cpu": "dynamic"}  # of float16; the Ascend port's is a static 128
GROWTH, BACKOFF, GROWTH_INTERVAL = 2.0, 0.5, 2000  # of a dynamic loss scale, as in PyTorch and apex
NATIVE_LEVELS = ("O0", "O1")  # that PyTorch's own AMP can do; apex has O2 and O3, too
# of apex.amp, used here
APEX_CALLS = ("initialize", "scale_loss", "master_params", "disable_casts", "state_dict", "load_state_dict")


def choose_precision(device, amp=False, opt_level=None, loss_scale=None, backend="auto", dtype=None):
    """The Precision or ApexPrecision for the flags of train.py with these names; None: what is usual on the device.

    opt_level: "O0" to "O3"; loss_scale: a number or "dynamic"; dtype: "float16" or "bfloat16"
    backend: "apex", "native", or "auto": apex for what it alone can do, and on an NPU where it is installed
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
    """Whether PyTorch's own AMP is taken where the user names none.

    NVIDIA's apex synchronises in each step, so on CUDA it is not taken for O1; Ascend's combines the gradients.
    """
    if opt_level not in NATIVE_LEVELS:
        return False
    if opt_level == "O0" or dtype == "bfloat16" or device.type != "npu":
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
    supported = {"cpu": lambda: True, "npu": lambda: torch.npu.is_bf16_supported(),
                 "cuda": lambda: torch.cuda.is_bf16_supported(including_emulation=False)}[device.type]
    if asked == "bfloat16" and not supported():
        raise DeviceError(f"--amp_dtype bfloat16: {device} cannot compute in it; take float16")
    return getattr(torch, asked)


def check_network(precision, device, model):
    """Raises DeviceError if the device lacks an operator of the network in this precision."""
    transposed = any(isinstance(module, torch.nn.ConvTranspose2d) for module in model.modules())
    if device.type == "npu" and precision.dtype is torch.bfloat16 and transposed:
        raise DeviceError(f"--amp_dtype bfloat16: {model.backbone_name} has transposed convolutions, which an NPU does "
                          "not offer in bfloat16 (torch_npu 2.12, table of supported operators); take float16")


def name_of(dtype):
    return str(dtype).removeprefix("torch.")


def fused_sgd(parameters, device, precision, lr, momentum, weight_decay):
    """SGD with the fewest kernel launches on the device."""
    settings = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
    if device.type == "npu":
        return precision.npu_sgd()(parameters, **settings)
    optimizer = torch.optim.SGD(parameters, fused=True, **settings)
    if momentum:
        # It skips a step with infinite gradients by itself. If that is the first one, momentum stays uninitialised
        # (PyTorch 2.15 still). From zeros the first step is the same.
        for parameter in parameters:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


class Precision:
    """float32, or mixed precision by PyTorch's own AMP.

    dtype: what convolutions run in
    loss_scale: a number that stays, or "dynamic": halved when gradients overflow, doubled after 2,000 steps in which
        they do not. Where nothing is scaled it is 1.
    """
    bucket_views = True  # gradients may be views into DistributedDataParallel's buckets

    def __init__(self, device, dtype=torch.float32, loss_scale=1.0):
        self.device, self.dtype = device, dtype
        self.static_scale = None if loss_scale == "dynamic" else float(loss_scale)
        # torch_npu has no kernel for GradScaler.update (aclnnAmpUpdateScale fails, CANN 9.1); this does it there.
        self.arithmetic = ArithmeticScale(device) if device.type == "npu" and self.static_scale is None else None
        # Made for a scale of 1, too: it is what finds the steps with infinite gradients and leaves them out.
        start = {} if self.static_scale is None else {"init_scale": self.static_scale}
        self.scaler = torch.amp.GradScaler(device.type, **start)

    def __str__(self):
        if self.dtype is torch.float16:
            return f"float16 with loss scale {self.static_scale or 'dynamic'}"
        form = {"cuda": "TF32", "npu": "HF32"}.get(self.device.type)
        return name_of(self.dtype) + (f" ({form} in convolutions)" if self.dtype is torch.float32 and form else "")

    def npu_sgd(self):
        """The class of the fused optimizer on an NPU."""
        import torch_npu
        return torch_npu.optim.NpuFusedSGD

    def wrap(self, model, optimizer):
        """(model, optimizer) to train with. Call it after `model.to(device)` and before DistributedDataParallel."""
        return model, optimizer

    def autocast(self):
        if self.dtype is torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    @contextlib.contextmanager
    def evaluated(self, model):
        """Yields the network to evaluate: in float32, with the weights that a checkpoint holds."""
        yield model

    def backward(self, loss, optimizer):
        """Adds the gradients of a loss to those there are."""
        self.scaler.scale(loss).backward()

    def step(self, optimizer):
        """The optimizer step. -> whether it was skipped, as the gradients held Inf or NaN: bool [] on the device

        Without a synchronisation on CUDA; on an NPU GradScaler has one, as the fused SGD there does not skip by itself.
        """
        self.scaler.step(optimizer)
        # PyTorch has no public way to ask. Comparing scales synchronises, and tells nothing of a static one.
        skipped = sum(self.scaler._found_inf_per_device(optimizer).values()) > 0
        # A number or tensor sets the scale, None lets it grow and back off.
        self.scaler.update(self.static_scale if self.arithmetic is None else self.arithmetic.update(skipped))
        return skipped

    def state_dict(self):
        if self.static_scale is not None:
            return {}
        state = self.scaler.state_dict()
        if self.arithmetic is not None:
            state = {**state, "_growth_tracker": int(self.arithmetic.good_steps)}
        return {"scaler": state}

    def load_state_dict(self, state):
        """Loads what `state_dict` gave. The state of another precision is ignored."""
        if self.static_scale is None and "scaler" in state:
            self.scaler.load_state_dict(state["scaler"])
            if self.arithmetic is not None:
                self.arithmetic.load(state["scaler"])


class ArithmeticScale:
    """A dynamic loss scale, updated by plain arithmetic on the device."""

    def __init__(self, device, start=2.0 ** 16):
        self.scale = torch.full((), start, device=device)
        self.good_steps = torch.zeros((), dtype=torch.int32, device=device)

    def update(self, left_out):
        """left_out: bool [] on the device -> the scale of the next step, float32 []"""
        good_steps = torch.where(left_out, 0, self.good_steps + 1)
        grows = good_steps == GROWTH_INTERVAL
        self.scale = torch.where(left_out, self.scale * BACKOFF, torch.where(grows, self.scale * GROWTH, self.scale))
        self.good_steps = torch.where(grows, 0, good_steps)
        return self.scale

    def load(self, state):
        self.scale.fill_(state["scale"])
        self.good_steps.fill_(state["_growth_tracker"])


class ApexPrecision:
    """Mixed precision by apex, NVIDIA's or Ascend's, in float16; the same methods as Precision.

    amp: the module apex.amp; opt_level: O1 casts the inputs of PyTorch's functions; O2 makes the network float16 but
    for BN, and steps float32 master weights; O3 makes it float16 altogether
    """
    dtype = torch.float16
    bucket_views = False  # NVIDIA's O2 detaches gradients, which views forbid

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

    @contextlib.contextmanager
    def evaluated(self, model):
        """Yields the network to evaluate, as evaluate.py would: outside apex's casts, for O2 and O3 a float32 copy."""
        if self.opt_level == "O1":
            with self.amp.disable_casts():  # NVIDIA's fails in O2 and O3, which patch no functions
                yield model
            return
        copy = FCN8s(model.num_classes, model.backbone_name)
        copy.use_form(model.form)
        copy.load_state_dict({key: value.float() if value.is_floating_point() else value
                              for key, value in model.state_dict().items()})
        yield place(copy, next(model.parameters()).device)

    def backward(self, loss, optimizer):
        self.scale_before = self.scale()
        with self.amp.scale_loss(loss, optimizer) as scaled_loss:
            scaled_loss.backward()

    def step(self, optimizer):
        if self.loss_scale == "dynamic":
            # Where apex found an overflow it lowered the scale, and its `optimizer.step` does nothing this once.
            left_out = self.scale() < self.scale_before
        else:
            gradients = [p.grad for p in self.amp.master_params(optimizer) if p.grad is not None]
            left_out = not torch.nn.utils.get_total_norm(gradients, math.inf).isfinite()  # apex does not look
        if self.loss_scale == "dynamic" or not left_out:
            optimizer.step()
        return torch.tensor(left_out, device=next(self.amp.master_params(optimizer)).device)

    def scale(self):
        return self.amp.state_dict()["loss_scaler0"]["loss_scale"]

    def state_dict(self):
        state = {"amp": self.amp.state_dict()} if self.loss_scale == "dynamic" else {}
        if self.opt_level == "O2":  # the network's own weights are these, rounded to float16
            state["master_weights"] = [p.detach() for p in self.amp.master_params(self.optimizer)]
        return state

    def load_state_dict(self, state):
        """Call it before the optimizer's load_state_dict. In O2 its `zero_grad` makes apex create the float32 master
        weights; momentum loaded before would have been rounded to float16."""
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
        raise ImportError(f"apex cannot be imported ({first_line(error)})") from None
    lacking = [name for name in APEX_CALLS if not hasattr(amp, name)]
    if lacking:
        raise ImportError(f"the apex in {apex.origin} lacks amp.{lacking[0]}")
    is_ascends = "combine_grad" in inspect.signature(amp.initialize).parameters
    if is_ascends != (device_type == "npu"):
        raise ImportError(f"the apex in {apex.origin} is {'for NPUs' if is_ascends else 'for CUDA devices'}")
    return amp


def has_module(folders, name):
    return importlib.machinery.PathFinder.find_spec(name, folders) is not None
