"""Precision: float32, or mixed precision by PyTorch's own AMP or by apex; the optimizer, its step, and BN
statistics; the memory format.

A step whose loss or gradients hold NaN or Inf is skipped: it changes neither parameters, momentum nor BN statistics.
"""
import contextlib
import copy
import importlib
import importlib.util
import inspect
import math
import os
import pkgutil
import shutil

import torch
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from cli import UserError, first_line, number

# By default: what mixed precision computes in, and the loss scale of float16; the Ascend port's is 128.
AMP_DTYPES = {"npu": torch.float16, "cuda": torch.float16, "cpu": torch.bfloat16}
LOSS_SCALES = {"npu": 128.0, "cuda": "dynamic", "cpu": "dynamic"}
LARGE_WEIGHT = 2 ** 25  # values; only vgg16's fc6 has more, 2 ** 26.6


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
    """An argparse type: "dynamic", or a number up to where apex's dynamic one stops."""
    return text if text == "dynamic" else number(0, 2 ** 24, float, without=(0,))(text)


def check_precision_flags(parser, args):
    for flag in ("opt_level", "loss_scale", "amp_backend", "amp_dtype"):
        if getattr(args, flag) is not None and not args.amp:
            parser.error(f"--{flag} {getattr(args, flag)} has no effect without --amp")


# ---- precision

def choose_precision(device, amp=False, opt_level=None, loss_scale=None, backend=None, dtype=None):
    """The Precision or ApexPrecision for the flags of train.py with these names; None: the device's default.

    opt_level: "O0" to "O3"; loss_scale: a number or "dynamic"; dtype: "float16" or "bfloat16"
    backend: "apex", "native", or "auto" (default): apex for O2 and O3, and on an NPU where it is installed
    Raises UserError for what does not exist on the device, or would have no effect.
    """
    if not amp:
        return Precision(device)
    level, backend = opt_level or "O1", backend or "auto"
    needs_apex = backend == "apex" or level in ("O2", "O3")
    # On CUDA, auto takes apex for O2 and O3 alone, as NVIDIA's waits for the device in each step.
    prefers_apex = backend == "auto" and device.type == "npu" and level == "O1" and dtype != "bfloat16"
    apex, missing = find_apex(device.type) if needs_apex or prefers_apex else (None, None)
    computes = torch.float32 if level == "O0" else getattr(torch, dtype) if dtype else AMP_DTYPES[device.type]
    refuse({
        f"--amp_dtype {dtype} has no effect with --opt_level O0, which mixes nothing; use O1": dtype and level == "O0",
        "--amp_dtype bfloat16: apex mixes in float16 alone; use --amp_backend native and O1":
            dtype == "bfloat16" and needs_apex,
        f"--amp_dtype bfloat16: {device} cannot compute in it; use float16":
            dtype == "bfloat16" and not computes_bfloat16(device),
        f"--opt_level {level} needs apex; --amp_backend native has O0 and O1": needs_apex and backend == "native",
        f"--opt_level {level} by apex: {missing}; PyTorch's own AMP has O1: --amp_backend native":
            needs_apex and missing,
        f"--loss_scale {loss_scale}: {name_of(computes)} on {device.type} needs no loss scale; leave it out":
            loss_scale and computes is not torch.float16,
        "--loss_scale dynamic: PyTorch's own AMP has none on an NPU; use a number, or apex":
            loss_scale == "dynamic" and device.type == "npu" and not apex})  # aclnnAmpUpdateScale fails (CANN 9.1)
    loss_scale = loss_scale or (LOSS_SCALES[device.type] if computes is torch.float16 else 1.0)
    return ApexPrecision(device, apex, level, loss_scale) if apex else Precision(device, computes, loss_scale)


def computes_bfloat16(device):
    """True if the device computes in bfloat16; older GPUs emulate it slowly."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" or torch.npu.is_bf16_supported()


def refuse(problems):
    """Raises UserError for the first problem that exists. problems: {message: whether it exists}"""
    for problem, exists in problems.items():
        if exists:
            raise UserError(problem)


def memory_format(device):
    """Channels last, in which convolutions are faster, except on an NPU: its operators take contiguous tensors alone,
    so that torch_npu would copy every other."""
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


@contextlib.contextmanager
def convolutions(device, training):
    """A context: how cuDNN, or an NPU, computes convolutions.

    In training every crop has one shape: cuDNN tries its algorithms once (mmsegmentation's cudnn_benchmark). Float32
    convolutions use TF32 there, on an NPU HF32, as PyTorch and torch_npu do. In evaluation float32 is float32.
    """
    with contextlib.ExitStack() as stack:
        if device.type == "cuda":
            cudnn = torch.backends.cudnn
            stack.enter_context(cudnn.flags(
                enabled=True, benchmark=training, benchmark_limit=cudnn.benchmark_limit,
                deterministic=cudnn.deterministic, allow_tf32=training and cudnn.allow_tf32))
        elif device.type == "npu":
            stack.callback(setattr, torch.npu.conv, "allow_hf32", torch.npu.conv.allow_hf32)
            torch.npu.conv.allow_hf32 = training and torch.npu.conv.allow_hf32
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
    kind, stride, has_bn = ranks.device.type, max(model.backbone.strides), bool(bn_layers(model))
    several, apex = kind != "cpu" and ranks.count > 1, isinstance(precision, ApexPrecision)
    transposed = any(isinstance(module, torch.nn.ConvTranspose2d) for module in model.modules())
    compiler = os.environ.get("CXX") or "g++" if kind == "cpu" else os.environ.get("CC") or "gcc"
    compiles = shutil.which(compiler) and (kind == "cpu" or importlib.util.find_spec("triton"))
    refuse({
        "--accumulate and --compile do not go with apex; use --amp_backend native":
            apex and (args.accumulate > 1 or args.compile),
        "--sync_bn is for several NPUs or GPUs, and for a backbone with BN; leave it out":
            args.sync_bn and not (several and has_bn),
        "--compile does not go with --sync_bn, at which torch.compile breaks the graph (PyTorch issue 161302); leave "
        "one out": args.compile and args.sync_bn,
        f"--compile needs {compiler}{' and triton' * (kind != 'cpu')} on {kind}; install it, or leave it out":
            args.compile and not compiles,
        f"--crop_size {args.crop_size} with --batch_size 1 leaves batch normalisation one value a channel; --crop_size "
        f"takes more than {stride} then":
            has_bn and not args.freeze_bn and args.batch_size == 1 and args.crop_size <= stride,
        f"--amp_dtype bfloat16: {args.backbone} has transposed convolutions, which an NPU does not offer in bfloat16 "
        "(torch_npu 2.12, table of supported operators); use float16":
            kind == "npu" and precision.dtype is torch.bfloat16 and transposed,
        f"--class_weights: names {len(args.class_weights or ())} numbers, the data has {len(classes)} classes; it "
        "takes one for each": args.class_weights and len(args.class_weights) != len(classes)})


def name_of(dtype):
    return str(dtype).removeprefix("torch.")


def fused_sgd(parameters, device, precision, lr, momentum, weight_decay):
    """SGD with the fewest kernel launches on the device, for those parameters that are trained."""
    parameters = [parameter for parameter in parameters if parameter.requires_grad]
    settings = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
    if device.type == "npu":
        return pkgutil.resolve_name(precision.npu_sgd)(parameters, **settings)
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
    npu_sgd = "torch_npu.optim:NpuFusedSGD"  # the class of the optimizer on an NPU
    bucket_views = True  # gradients may be views into DistributedDataParallel's buckets

    def __init__(self, device, dtype=torch.float32, loss_scale=1.0):
        self.device, self.dtype = device, dtype
        self.static_scale = None if loss_scale == "dynamic" else float(loss_scale)
        # With a scale of 1, too: GradScaler finds the steps with infinite gradients and skips them.
        self.scaler = torch.amp.GradScaler(device.type, init_scale=self.static_scale or 2.0 ** 16)

    def __str__(self):
        if self.dtype is torch.float16:
            return f"float16 with loss scale {self.static_scale or 'dynamic'}"
        form = {"cuda": "TF32", "npu": "HF32"}.get(self.device.type)
        return name_of(self.dtype) + (f" ({form} in convolutions)" if self.dtype is torch.float32 and form else "")

    def wrap(self, model, optimizer):
        """(model, optimizer) to train with. Call it after `model.to(device)` and before DistributedDataParallel."""
        return model, optimizer

    def autocast(self):
        if self.dtype is torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def evaluated(self, model):
        """A context with the network to evaluate: in float32, with the weights that a checkpoint holds."""
        return contextlib.nullcontext(model)

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

    amp: the module apex.amp
    opt_level: O1 casts the inputs of PyTorch's functions; O2 makes the network float16 but for BN, and steps float32
        master weights; O3 makes it float16 altogether
    """
    dtype = torch.float16
    bucket_views = False  # NVIDIA's O2 detaches gradients, which views forbid

    def __init__(self, device, amp, opt_level, loss_scale):
        self.device, self.amp, self.opt_level, self.loss_scale = device, amp, opt_level, loss_scale
        # Ascend's handles all gradients, and all parameters, as one tensor, but only in these.
        self.combines = device.type == "npu" and opt_level in ("O1", "O2")
        self.npu_sgd = "apex.optimizers:NpuFusedSGD" if self.combines else "torch.optim:SGD"

    def __str__(self):
        return f"apex {self.opt_level} with loss scale {self.loss_scale}"

    def wrap(self, model, optimizer):
        more = {"combine_grad": True} if self.combines else {}
        model, self.optimizer = self.amp.initialize(model, optimizer, opt_level=self.opt_level,
                                                    loss_scale=self.loss_scale, verbosity=0, **more)
        return model, self.optimizer

    def autocast(self):
        return contextlib.nullcontext()  # apex casts by itself

    @contextlib.contextmanager
    def evaluated(self, model):
        """A context with the network as evaluate.py has it: outside apex's casts, for O2 and O3 a float32 copy."""
        if self.opt_level == "O1":
            with self.amp.disable_casts():  # NVIDIA's fails in O2 and O3, which patch no functions
                yield model
        else:
            scored = copy.deepcopy(model).float()
            vars(scored).pop("forward", None)  # apex's, which casts what goes through the original
            yield scored

    def backward(self, loss, optimizer):
        self.scale_before = self.scale()
        with self.amp.scale_loss(loss, optimizer) as scaled_loss:
            scaled_loss.backward()

    def step(self, optimizer):
        if self.loss_scale == "dynamic":
            # Where apex found an overflow it lowered the scale, and its `optimizer.step` does nothing this once.
            skipped = self.scale() < self.scale_before
        else:
            gradients = [p.grad for p in self.amp.master_params(optimizer) if p.grad is not None]
            skipped = not torch.nn.utils.get_total_norm(gradients, math.inf).isfinite()  # apex does not look
        if self.loss_scale == "dynamic" or not skipped:
            optimizer.step()
        return torch.tensor(skipped, device=self.device)

    def scale(self):
        return self.amp.state_dict()["loss_scaler0"]["loss_scale"]

    def state_dict(self):
        state = {"amp": self.amp.state_dict()} if self.loss_scale == "dynamic" else {}
        if self.opt_level == "O2":  # the network's own weights are these, rounded to float16
            state["master_weights"] = [p.detach() for p in self.amp.master_params(self.optimizer)]
        return state

    def load_state_dict(self, state):
        """Call it before the optimizer's load_state_dict, whose momentum apex would round to float16 in O2."""
        if self.loss_scale == "dynamic" and "amp" in state:
            self.amp.load_state_dict(state["amp"])
        if self.opt_level == "O2" and "master_weights" in state:
            self.optimizer.zero_grad()  # makes apex create the float32 master weights
            for weight, saved in zip(self.amp.master_params(self.optimizer), state["master_weights"], strict=True):
                weight.data.copy_(saved)


def find_apex(device_type):
    """(the module apex.amp, None), or (None, why there is none for the device). Three packages go by the name of apex:
    Ascend's is for NPUs, NVIDIA's for CUDA devices, PyPI's is unrelated."""
    if device_type == "cpu":
        return None, "apex needs an NPU or a CUDA device"
    if importlib.util.find_spec("apex") is None:
        return None, "apex is not installed"
    try:
        amp = importlib.import_module("apex.amp")
        is_ascends = "combine_grad" in inspect.signature(amp.initialize).parameters
    except Exception as error:  # an apex of another PyTorch raises whatever its parts raise
        return None, (f"apex.amp cannot be imported ({first_line(error)}); PyPI's apex is an unrelated package, and "
                      "NVIDIA took amp out in May 2025")
    if is_ascends != (device_type == "npu"):
        return None, f"the installed apex is for {'NPUs' if is_ascends else 'CUDA devices'}"
    return amp, None


# ---- batch normalisation

def bn_layers(model):
    """The BN layers of a model that keep running statistics."""
    return [module for module in model.modules() if isinstance(module, _BatchNorm) and module.running_mean is not None]


class BatchNormGuard:
    """The running statistics of a model's BN layers, as views of one tensor, so that one operation reaches all.

    Create it after the last `model.to`, which replaces the buffers.
    """

    def __init__(self, model):
        layers, self.tensors = bn_layers(model), []
        for names in (("running_mean", "running_var"), ("num_batches_tracked",)) if layers else ():
            buffers = [getattr(layer, name) for layer in layers for name in names]
            self.tensors.append(parameters_to_vector(buffers))
            vector_to_parameters(self.tensors[-1], buffers)  # makes each a view

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
