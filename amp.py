"""Precision: float32, or mixed precision by PyTorch's own AMP or by apex; the optimizer, its step, and BN statistics.

A step whose loss or gradients hold NaN or Inf is skipped: it changes neither parameters, momentum nor BN statistics.
"""
import contextlib
import importlib
import importlib.machinery
import importlib.util
import inspect
import math
import os
import shutil

import torch
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from cli import UserError, first_line, number
from device import place
from fcn8s import FCN8s

# (device, backend) -> the dtype of mixed precision, the loss scale of float16. The Ascend port's is a static 128.
DEFAULTS = {("npu", "apex"): (torch.float16, 128.0), ("npu", "native"): (torch.float16, 128.0),
            ("cuda", "apex"): (torch.float16, "dynamic"), ("cuda", "native"): (torch.float16, "dynamic"),
            ("cpu", "native"): (torch.bfloat16, "dynamic")}
AMP_DTYPES = {device: dtype for (device, backend), (dtype, _) in DEFAULTS.items() if backend == "native"}
NATIVE_LEVELS = ("O0", "O1")  # of PyTorch's own AMP; apex has O2 and O3 as well
# of apex.amp, used here
APEX_CALLS = ("initialize", "scale_loss", "master_params", "disable_casts", "state_dict", "load_state_dict")
STATISTICS = ("running_mean", "running_var")
COMPILERS = {  # of torch.compile: C++ for a CPU's kernels, C for Triton's launchers
    "cpu": (os.environ.get("CXX") or "g++",), "cuda": (os.environ.get("CC") or "gcc", "clang"),
    "npu": (os.environ.get("CC") or "gcc", "clang")}
MAX_LOSS_SCALE = 2 ** 24  # where apex's dynamic one stops


# ---- flags

def add_precision_flags(parser):
    """The flags that refine --amp."""
    group = parser.add_argument_group("precision")
    group.add_argument("--opt_level", choices=("O0", "O1", "O2", "O3"),
                       help="of --amp: O0 mixes nothing, O1 operation by operation; O2 (float16 weights with "
                            "float32 ones) and O3 (all float16) need apex (default: O1)")
    group.add_argument("--loss_scale", type=loss_scale, metavar="X|dynamic",
                       help="of --amp in float16 (default: 128 on NPU, else dynamic)")
    group.add_argument("--amp_backend", choices=("auto", "apex", "native"),
                       help="of --amp: native is PyTorch's own; auto takes apex for O2 and O3, and on an NPU where "
                            "it is installed (default: auto)")
    group.add_argument("--amp_dtype", choices=("float16", "bfloat16"),
                       help="of --amp (default: float16 on NPU and CUDA, bfloat16 on a CPU)")


def loss_scale(text):
    return text if text == "dynamic" else number(0, MAX_LOSS_SCALE, float, without=(0,))(text)


def check_precision_flags(parser, args):
    for flag in ("opt_level", "loss_scale", "amp_backend", "amp_dtype"):
        if getattr(args, flag) is not None and not args.amp:
            parser.error(f"--{flag} {getattr(args, flag)} has no effect without --amp")


# ---- precision

def choose_precision(device, amp=False, opt_level=None, loss_scale=None, backend=None, dtype=None):
    """The Precision or ApexPrecision for the flags of train.py with these names; None: the device's default.

    opt_level: "O0" to "O3"; loss_scale: a number or "dynamic"; dtype: "float16" or "bfloat16"
    backend: "apex", "native", or "auto" (default): apex for what it alone can do, and on an NPU where it is installed
    Raises UserError for what does not exist on the device, or would have no effect.
    """
    if not amp:
        return Precision(device)
    level, backend, apex, missing = opt_level or "O1", backend or "auto", None, None
    try:
        # On CUDA, auto takes apex for O2 and O3 alone, as NVIDIA's waits for the device in each step.
        if backend == "apex" or backend == "auto" and (level not in NATIVE_LEVELS or (
                device.type == "npu" and level == "O1" and dtype != "bfloat16")):
            apex = find_apex(device.type)
    except ImportError as error:
        missing = error
    problem = None
    if missing and (backend == "apex" or level not in NATIVE_LEVELS):
        problem = f"--opt_level {level} by apex: {missing}; PyTorch's own AMP has O1: --amp_backend native"
    if level not in NATIVE_LEVELS and backend == "native":
        problem = f"--opt_level {level} needs apex; --amp_backend native has {' and '.join(NATIVE_LEVELS)}"
    if dtype == "bfloat16" and (backend == "apex" or level not in NATIVE_LEVELS):
        problem = "--amp_dtype bfloat16: apex mixes in float16 alone; use --amp_backend native and O1"
    if dtype is not None and level == "O0":
        problem = f"--amp_dtype {dtype} has no effect with --opt_level O0, which mixes nothing; use O1"
    if dtype == "bfloat16" and not has_bfloat16(device):
        problem = f"--amp_dtype bfloat16: {device} cannot compute in it; use float16"
    if problem:
        raise UserError(problem)
    usual, usual_scale = DEFAULTS[device.type, "apex" if apex else "native"]
    dtype = torch.float32 if level == "O0" else getattr(torch, dtype) if dtype else usual
    if loss_scale is not None and dtype is not torch.float16:
        raise UserError(f"--loss_scale {loss_scale}: {name_of(dtype)} on {device.type} needs no loss scale; leave it "
                        "out")
    if dtype is torch.float16:
        loss_scale = loss_scale or usual_scale
    if apex:
        return ApexPrecision(apex, level, loss_scale or 1.0)
    if device.type == "npu" and loss_scale == "dynamic":  # aclnnAmpUpdateScale fails (torch_npu 2.15, CANN 9.1)
        raise UserError("--loss_scale dynamic: PyTorch's own AMP has none on an NPU; use a number, or apex")
    return Precision(device, dtype, loss_scale or 1.0)


def has_bfloat16(device):
    """True if the device computes in bfloat16."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" or torch.npu.is_bf16_supported()


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


def ddp_settings(device, precision):
    """The arguments of DistributedDataParallel.

    Buffers are not broadcast before each forward, as in the reference (mmengine: broadcast_buffers=False): every card
    has BN statistics of its own, and an evaluation takes rank 0's. Gradients are views into the buckets, which saves a
    copy, but not on an NPU, whose fused SGD keeps all gradients as one tensor of its own.
    """
    parameters = inspect.signature(DistributedDataParallel).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in parameters else "broadcast_buffers"  # since PyTorch 2.13
    return {name: False, "gradient_as_bucket_view": device.type != "npu" and precision.bucket_views}


def check_run(args, ranks, precision, model, classes):
    """Raises UserError for flags that the device, the precision, the network or the data do not allow."""
    kind, stride = ranks.device.type, max(model.backbone.strides)
    apex, one_value = isinstance(precision, ApexPrecision), args.batch_size == 1 and args.crop_size <= stride
    compiler = any(map(shutil.which, COMPILERS[kind]))
    transposed = any(isinstance(module, torch.nn.ConvTranspose2d) for module in model.modules())
    problems = {
        f"--accumulate {args.accumulate} does not go with apex; use --amp_backend native": apex and args.accumulate > 1,
        "--compile does not go with apex; use --amp_backend native": apex and args.compile,
        "--sync_bn: not on a CPU, where PyTorch has none; leave it out": args.sync_bn and kind == "cpu",
        "--sync_bn: not on one card, which has none to share with; leave it out": args.sync_bn and ranks.count == 1,
        "--compile does not go with --sync_bn, at which torch.compile breaks the graph (PyTorch issue 161302); leave "
        "one out": args.compile and args.sync_bn,
        f"--compile needs a compiler ({' or '.join(COMPILERS[kind])}) on {kind}; install one, or leave it out":
            args.compile and not compiler,
        f"--compile needs the package triton on {kind}; install it, or leave it out":
            args.compile and kind != "cpu" and importlib.util.find_spec("triton") is None,
        f"--sync_bn has no effect: {args.backbone} has no BN; leave it out": args.sync_bn and not bn_layers(model),
        f"--crop_size {args.crop_size} with --batch_size 1 leaves batch normalisation one value a channel; --crop_size "
        f"takes more than {stride} then": one_value and bn_layers(model) and not args.freeze_bn,
        f"--amp_dtype bfloat16: {args.backbone} has transposed convolutions, which an NPU does not offer in bfloat16 "
        "(torch_npu 2.12, table of supported operators); use float16":
            kind == "npu" and precision.dtype is torch.bfloat16 and transposed,
        f"--class_weights: names {len(args.class_weights or ())} numbers, the data has {len(classes)} classes; it "
        "takes one for each": args.class_weights and len(args.class_weights) != len(classes)}
    for problem, exists in problems.items():
        if exists:
            raise UserError(problem)


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
        they do not. 1 without scaling.
    """
    bucket_views = True  # gradients may be views into DistributedDataParallel's buckets

    def __init__(self, device, dtype=torch.float32, loss_scale=1.0):
        self.device, self.dtype = device, dtype
        self.static_scale = None if loss_scale == "dynamic" else float(loss_scale)
        # With a scale of 1, too: GradScaler finds the steps with infinite gradients and skips them.
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
        """Adds the gradients of a loss to the existing ones."""
        self.scaler.scale(loss).backward()

    def step(self, optimizer):
        """The optimizer step. -> bool [] on the device: whether it was skipped, as the gradients held Inf or NaN

        Without a synchronisation on CUDA. On an NPU GradScaler has one, as the fused SGD there does not skip by itself.
        """
        self.scaler.step(optimizer)
        # PyTorch has no public way to ask. Comparing scales synchronises, and tells nothing of a static one.
        skipped = sum(self.scaler._found_inf_per_device(optimizer).values()) > 0
        self.scaler.update(self.static_scale)  # None lets a dynamic scale grow and back off
        return skipped

    def state_dict(self):
        return {"scaler": self.scaler.state_dict()} if self.static_scale is None else {}

    def load_state_dict(self, state):
        """Loads what `state_dict` returned. The state of another precision is ignored."""
        if self.static_scale is None and "scaler" in state:
            self.scaler.load_state_dict(state["scaler"])


class ApexPrecision:
    """Mixed precision by apex, NVIDIA's or Ascend's, in float16; with the methods of Precision.

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


# ---- batch normalisation

def bn_layers(model):
    """The BN layers of a model that keep running statistics."""
    return [module for module in model.modules() if isinstance(module, _BatchNorm) and module.running_mean is not None]


class BatchNormGuard:
    """The running statistics of a model's BN layers, as views of one tensor, so that one operation reaches all.

    Create it after the last `model.to`, which replaces the buffers.
    """

    def __init__(self, model):
        parts = [(layer, name) for layer in bn_layers(model) for name in STATISTICS]
        counts = [(layer, "num_batches_tracked") for layer in bn_layers(model)]
        self.tensors = [flatten(part) for part in (parts, counts) if part]
        self.kept = []

    def keep(self):
        """Saves a copy of the statistics."""
        self.kept = [tensor.clone() for tensor in self.tensors]

    def restore_if(self, condition):
        """Restores the copy if `condition` is true, a bool tensor [] on the device; without a synchronisation."""
        for tensor, kept in zip(self.tensors, self.kept, strict=True):
            tensor.copy_(torch.where(condition, kept, tensor))

    def broadcast(self):
        """Gives every rank the statistics of rank 0."""
        for tensor in self.tensors:
            torch.distributed.broadcast(tensor, 0)


def flatten(parts):
    """Moves buffers, (module, name) each, into one new tensor, of which they become views. -> that tensor"""
    values = [getattr(module, name) for module, name in parts]
    flat = torch.cat([value.reshape(-1) for value in values])
    start = 0
    for (module, name), value in zip(parts, values, strict=True):
        module._buffers[name] = flat[start:start + value.numel()].view(value.shape)
        start += value.numel()
    return flat
