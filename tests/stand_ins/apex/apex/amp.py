"""apex.amp: initialize, scale_loss, master_params, disable_casts, state_dict, load_state_dict; float16 on an NPU.

O1 casts by PyTorch's autocast, from initialize on. O2 and O3 make the network float16, O2 but for BN, and cast what
goes in and comes out. O2 steps float32 master weights, which it makes when they are first needed.
"""
import contextlib

import torch
import torch_npu  # noqa: F401, as Ascend's does: it makes the device
from torch.utils._pytree import tree_map

CASTS = torch.autocast("npu", torch.float16)
STATE = None  # of the one initialize


class State:
    def __init__(self, model, optimizer, opt_level, loss_scale):
        self.model, self.optimizer, self.opt_level = model, optimizer, opt_level
        self.dynamic = loss_scale == "dynamic"
        self.scale = 2.0 ** 16 if self.dynamic else float(loss_scale)
        self.unskipped = 0
        self.masters = {}  # of a float16 parameter, once there are any
        self.skips = False  # the next step
        self.may_step = False  # a backward in scale_loss went before


def initialize(model, optimizer, opt_level="O1", loss_scale=None, verbosity=1, combine_grad=None):
    global STATE
    if STATE is not None:
        raise RuntimeError("amp.initialize should only be called once")
    if isinstance(model, torch.nn.parallel.DistributedDataParallel):
        raise RuntimeError("parallel wrappers should only be applied after amp.initialize")
    elsewhere = [name for name, value in model.state_dict().items() if value.device.type != "npu"]
    if elsewhere:
        raise RuntimeError(f"found {elsewhere[0]} on {model.state_dict()[elsewhere[0]].device}, expected it on an NPU")
    if combine_grad and opt_level not in ("O1", "O2"):
        raise RuntimeError("combine_grad=True should only be set with opt_level O1 or O2")
    optimizer.opt_level = opt_level
    STATE = State(model, optimizer, opt_level, loss_scale or ("dynamic" if opt_level in ("O1", "O2") else 1.0))
    if opt_level == "O1":
        CASTS.__enter__()
    elif opt_level in ("O2", "O3"):
        make_half(model, keep_bn=opt_level == "O2")
    patch_optimizer(optimizer)
    return model, optimizer


def make_half(model, keep_bn):
    for module in model.modules():
        if not (keep_bn and isinstance(module, torch.nn.BatchNorm2d)):
            for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                if tensor.is_floating_point():
                    tensor.data = tensor.data.half()
    forward = model.forward

    def cast(values, dtype):
        return tree_map(lambda value: value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point()
                        else value, values)
    model.forward = lambda *args, **kwargs: cast(forward(*cast(args, torch.float16), **cast(kwargs, torch.float16)),
                                                 torch.float32)


def patch_optimizer(optimizer):
    step, zero_grad = optimizer.step, optimizer.zero_grad

    def new_step():
        if not STATE.may_step:
            raise RuntimeError("optimizer.step without a backward inside amp.scale_loss")
        STATE.may_step = False
        if STATE.skips:
            STATE.skips = False
            return
        with torch.autocast("npu", enabled=False):
            step()
        for parameter, master in STATE.masters.items():
            parameter.data.copy_(master.data)

    def new_zero_grad():
        lazy_masters()
        zero_grad()
        for parameter in STATE.masters:
            parameter.grad = None
    optimizer.step, optimizer.zero_grad = new_step, new_zero_grad


def lazy_masters():
    if STATE.opt_level != "O2" or STATE.masters:
        return
    for group in STATE.optimizer.param_groups:
        for i, parameter in enumerate(group["params"]):
            if parameter.dtype == torch.float16:
                master = parameter.detach().clone().float().requires_grad_()
                group["params"][i] = STATE.masters[parameter] = master
                if parameter in STATE.optimizer.state:
                    STATE.optimizer.state[master] = STATE.optimizer.state.pop(parameter)
    STATE.optimizer.load_state_dict(STATE.optimizer.state_dict())  # casts the momentum


@contextlib.contextmanager
def scale_loss(loss, optimizer):
    if STATE is None or optimizer is not STATE.optimizer:
        raise RuntimeError("amp.initialize must be called with this optimizer before amp.scale_loss")
    lazy_masters()
    if any(not torch.equal(parameter.data, master.data.half()) for parameter, master in STATE.masters.items()):
        raise RuntimeError("the network's weights are not its master weights: something else changed one of them")
    scaled, went_back = loss.float() * STATE.scale, []
    scaled.register_hook(went_back.append)
    yield scaled
    if not went_back:
        raise RuntimeError("no backward of the scaled loss inside amp.scale_loss")
    torch.clear_autocast_cache()  # the casts of the weights before this step
    STATE.may_step, finite = True, True
    halves = {master: parameter for parameter, master in STATE.masters.items()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            source = halves.get(parameter, parameter)
            if source.grad is not None:
                finite = finite and bool(source.grad.isfinite().all())
                if finite or not STATE.dynamic:
                    parameter.grad = source.grad.to(parameter.dtype) / STATE.scale
    if STATE.dynamic:
        update_scale(finite)


@contextlib.contextmanager
def disable_casts():
    if STATE.opt_level != "O1":
        raise AttributeError("'AmpState' object has no attribute 'handle'")  # made with the casts
    with torch.autocast("npu", enabled=False):
        yield


def update_scale(finite):
    """As apex's: halved by an overflow, whose step is skipped; doubled after 2,000 steps without."""
    STATE.skips = not finite
    STATE.unskipped = STATE.unskipped + 1 if finite else 0
    if not finite:
        STATE.scale /= 2
    elif STATE.unskipped == 2000:
        STATE.scale, STATE.unskipped = STATE.scale * 2, 0


def master_params(optimizer):
    for group in optimizer.param_groups:
        yield from group["params"]


def state_dict():
    return {"loss_scaler0": {"loss_scale": STATE.scale, "unskipped": STATE.unskipped}}


def load_state_dict(state):
    STATE.scale, STATE.unskipped = state["loss_scaler0"]["loss_scale"], state["loss_scaler0"]["unskipped"]
