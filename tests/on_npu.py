"""Tests that need the software NPU in their own process; test_device.py runs them, with the stand-ins on PYTHONPATH.

The stand-in of apex fails on what apex's documentation calls wrong use; then, that ApexPrecision uses it right.
"""
import importlib
from types import SimpleNamespace

import pytest
import torch
import torch_npu  # noqa: F401, makes the software NPU
from apex import amp, optimizers

import train
from device import ApexPrecision, choose_precision, fused_sgd

NPU = torch.device("npu:0")
SETTINGS = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3}


@pytest.fixture(autouse=True)
def fresh_amp():
    yield
    if amp.STATE is not None and amp.STATE.opt_level == "O1":
        amp.CASTS.__exit__(None, None, None)
    importlib.reload(amp)


def network(device=NPU):
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Conv2d(4, 2, 3)).to(device)


def sgd_of(model):
    return torch.optim.SGD(model.parameters(), **SETTINGS)


def loss_of(model, factor=1.0):
    torch.manual_seed(1)
    return (model(torch.randn(2, 3, 8, 8).to(NPU)).float() ** 2).mean() * factor


def test_tensors_of_two_devices_do_not_mix():
    with pytest.raises(RuntimeError, match="expected all tensors to be on npu:0"):
        torch.ones(2).to(NPU) + torch.ones(2)
    assert (torch.ones(2).to(NPU) + torch.tensor(1.0)).cpu().tolist() == [2, 2]


def test_initialize_twice_fails():
    model = network()
    amp.initialize(model, sgd_of(model), loss_scale=128.0)
    with pytest.raises(RuntimeError, match="once"):
        amp.initialize(model, sgd_of(model), loss_scale=128.0)


class Wrapper(torch.nn.Module):
    """In place of DistributedDataParallel, which would want other processes."""
    def __init__(self, module, **settings):
        super().__init__()
        self.module = module


def test_ddp_comes_after_initialize(monkeypatch):
    monkeypatch.setattr(torch.nn.parallel, "DistributedDataParallel", Wrapper)
    model = network()
    with pytest.raises(RuntimeError, match="after amp.initialize"):
        amp.initialize(Wrapper(model), sgd_of(model))
    monkeypatch.setattr(train, "DistributedDataParallel", Wrapper)
    args = SimpleNamespace(batch_size=1, max_iters=1, performance=False, **SETTINGS)
    precision, two = choose_precision(NPU, True, "O2"), SimpleNamespace(count=2)
    trainer = train.Trainer(args, network("cpu"), NPU, precision, two, folder=None)
    assert isinstance(trainer.network, Wrapper) and trainer.network.module is trainer.model
    assert trainer.model[0].weight.dtype == torch.float16 and amp.STATE.optimizer is trainer.optimizer


def test_a_model_on_the_cpu_fails():
    model = network("cpu")
    with pytest.raises(RuntimeError, match="expected it on an NPU"):
        amp.initialize(model, sgd_of(model))


def test_backward_outside_scale_loss_fails():
    model = network()
    model, optimizer = amp.initialize(model, sgd_of(model), loss_scale=128.0)
    loss_of(model).backward()
    with pytest.raises(RuntimeError, match="without a backward inside"):
        optimizer.step()
    with pytest.raises(RuntimeError, match="no backward of the scaled loss"):
        with amp.scale_loss(loss_of(model), optimizer):
            loss_of(model).backward()


def test_weights_changed_beside_the_master_weights_fail():
    model = network()
    model, optimizer = amp.initialize(model, sgd_of(model), opt_level="O2", loss_scale=128.0)
    optimizer.zero_grad()
    with torch.no_grad():
        model[0].weight.mul_(2)
    with pytest.raises(RuntimeError, match="not its master weights"):
        with amp.scale_loss(loss_of(model), optimizer) as scaled:
            scaled.backward()


def test_apex_fused_optimizer_without_amp_fails():
    model = network()
    with pytest.raises(RuntimeError, match="should be used with AMP"):
        optimizers.NpuFusedSGD(model.parameters(), **SETTINGS).step()


@pytest.mark.parametrize("opt_level, loss_scale", [("O1", 128.0), ("O1", "dynamic"), ("O2", 128.0), ("O2", "dynamic"),
                                                   ("O3", 128.0), ("O3", "dynamic")])
def test_apex_steps_as_float32_does_and_leaves_out_the_infinite(opt_level, loss_scale):
    precision = choose_precision(NPU, True, opt_level, loss_scale, "apex")
    assert isinstance(precision, ApexPrecision) and str(precision) == f"apex {opt_level} with loss scale {loss_scale}"
    model = network()
    model, optimizer = precision.wrap(model, fused_sgd(list(model.parameters()), NPU, precision, **SETTINGS))
    assert isinstance(optimizer, torch.optim.SGD if opt_level == "O3" else optimizers.NpuFusedSGD)
    plain = network()
    plain_sgd = sgd_of(plain)
    for factor in (float("inf"), 1.0, 1.0, float("nan"), 1.0):
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.zero_grad()
        with precision.autocast():
            loss = loss_of(model, factor)
        left_out = precision.step(loss, optimizer)
        unchanged = all(torch.equal(p, old) for p, old in zip(model.parameters(), before))
        assert left_out.device == NPU and bool(left_out) == unchanged == (factor != 1.0)
        if factor == 1.0:
            plain_sgd.zero_grad()
            with torch.autocast("npu", enabled=False):
                loss_of(plain).backward()
            plain_sgd.step()
    for ours, theirs in zip(amp.master_params(optimizer), plain.parameters()):
        torch.testing.assert_close(ours.float().cpu(), theirs.cpu(), rtol=0.05, atol=0.005)
    assert precision.scale() == (128.0 if loss_scale == 128.0 else 2.0 ** 14)  # halved twice


def test_the_fused_optimizer_of_torch_npu():
    precision = choose_precision(NPU)
    assert type(fused_sgd(list(network().parameters()), NPU, precision, **SETTINGS)) is torch_npu.optim.NpuFusedSGD
