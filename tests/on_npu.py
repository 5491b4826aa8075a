"""Tests that need the software NPU in their own process; test_device.py runs them, with the stand-ins on PYTHONPATH.

The stand-in of apex fails on what apex's documentation calls wrong use; then, that ApexPrecision uses it right.
"""
import importlib
from types import SimpleNamespace

import pytest
import software_npu
import torch
import torch_npu  # makes the software NPU
from apex import amp, optimizers

import batchnorm
import inference
import train
import trainer
from device import convolutions
from fcn8s import FCN8s
from inference import Protocol, evaluate
from precision import ApexPrecision, Precision, choose_precision, fused_sgd

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
        self.module, self.settings = module, settings


def test_ddp_comes_after_initialize(monkeypatch):
    monkeypatch.setattr(torch.nn.parallel, "DistributedDataParallel", Wrapper)
    model = network()
    with pytest.raises(RuntimeError, match="after amp.initialize"):
        amp.initialize(Wrapper(model), sgd_of(model))
    monkeypatch.setattr(trainer, "DistributedDataParallel", Wrapper)
    trains = make_trainer(choose_precision(NPU, True, "O2"), ranks=2)
    assert isinstance(trains.network, Wrapper) and trains.network.module.model is trains.model
    assert trains.network.settings == trainer.ddp_settings(NPU, trains.precision)
    assert trains.model.decode_head.score_fr.weight.dtype == torch.float16
    assert amp.STATE.optimizer is trains.optimizer


def make_trainer(precision, ranks=1, backbone="tiny"):
    """A Trainer on the NPU, of a network that is not trained but answers otherwise from pixel to pixel."""
    torch.manual_seed(0)
    model = FCN8s(21, backbone)
    for name, parameter in model.named_parameters():
        if "score_" in name or "conv_seg" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    recipe = train.from_args(trainer.Recipe, train.parse_args(["--data_path", "unused", "--backbone", backbone]))
    return trainer.Trainer(recipe, model, NPU, precision, SimpleNamespace(count=ranks, rank=0), None, None, ())


@pytest.mark.parametrize("opt_level", ("O1", "O2", "O3"))
def test_training_with_apex_evaluates_the_network_that_evaluate_py_would(opt_level):
    """In float32, though apex casts in training; the logits are equal to the bit."""
    trains = make_trainer(choose_precision(NPU, True, opt_level))
    images = torch.randn(1, 3, 64, 96).to(NPU)
    trains.model.eval()
    theirs = FCN8s(21, "tiny").eval()
    theirs.load_state_dict({key: value.cpu().float() for key, value in trains.model.state_dict().items()})
    with torch.no_grad():
        with trains.precision.evaluated(trains.model) as model:
            ours = model.eval()(images)["out"]
        with torch.autocast("npu", enabled=False):
            expected = theirs.to(NPU)(images)["out"]
        assert torch.equal(ours.cpu(), expected.cpu())
        assert not torch.equal(trains.model(images)["out"].float().cpu(), expected.cpu())  # casts as before


def test_what_a_real_npu_lacks_is_refused():
    with pytest.raises(RuntimeError, match="isnan"):
        torch.ones(2).to(NPU).isnan()
    images = torch.ones(1, 2, 4, 4).to(NPU)
    with torch.autocast("npu", torch.bfloat16), pytest.raises(RuntimeError, match="convolution of torch.bfloat16"):
        torch.nn.ConvTranspose2d(2, 2, 2).to(NPU)(images)
    scaler, weight = torch.amp.GradScaler("npu"), torch.nn.Parameter(torch.ones(2).to(NPU))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    scaler.scale(weight.sum()).backward()
    scaler.step(optimizer)
    with pytest.raises(RuntimeError, match="_amp_update_scale_"):
        scaler.update()
    with pytest.raises(RuntimeError, match="contiguous on the CPU"):
        torch.zeros(1, 4, 4, 3, dtype=torch.uint8).permute(0, 3, 1, 2).to(NPU)


def batch_of(size):
    """As `train_batches` gives it."""
    return {"image": torch.randint(0, 256, (2, size, size, 3), dtype=torch.uint8),
            "label": torch.zeros(2, size, size, dtype=torch.uint8), "size": torch.full((2, 2), size),
            "jitter": torch.tensor([[5.0, 1.1, 0.9, 3.0, 0.0], [-1000.0, 0.9, -1000.0, 5.0, 1.0]])}


def test_a_step_copies_nothing_but_the_batch_to_the_device():
    """Constants are there since the first one."""
    trains = make_trainer(Precision(NPU))
    trains.step([batch_of(32)])
    software_npu.waits.clear()
    trains.step([batch_of(32)])
    # GradScaler waits once, as torch_npu's fused SGD does not skip a step by itself.
    assert sorted(software_npu.waits) == ["aten::_local_scalar_dense"] + 4 * ["to npu:0"]


def test_evaluation_waits_for_the_device_no_more_for_more_images():
    torch.manual_seed(0)
    model = make_trainer(Precision(NPU)).model

    def waits(count):
        data = [(torch.randint(0, 256, (3, 40, 50), dtype=torch.uint8), torch.ones(40, 50, dtype=torch.uint8))] * count
        software_npu.waits.clear()
        confusion = evaluate(model, data, [(40, 50)] * count, Protocol((64, 32)), NPU, workers=0)
        assert confusion[1].sum() == confusion.sum() == count * 40 * 50
        return [what for what in software_npu.waits if what != "to npu:0"]
    assert waits(10) == waits(1) != []


def test_evaluation_runs_images_together_with_bn_folded(monkeypatch):
    seen, predict = [], inference.predict
    monkeypatch.setattr(inference, "predict", lambda model, images, protocol: (
        seen.append((len(images), len(batchnorm.layers(model)))), predict(model, images, protocol))[1])
    data = [(torch.zeros(3, 40, 50, dtype=torch.uint8), torch.ones(40, 50, dtype=torch.uint8))] * 10
    evaluate(make_trainer(Precision(NPU)).model, data, [(40, 50)] * 10, Protocol((64, 32)), NPU, workers=0)
    assert seen == [(8, 0), (2, 0)]


def test_evaluation_is_in_float32_and_training_in_hf32():
    seen = []
    for training in (True, False):
        with convolutions(NPU, training):
            seen.append(torch.npu.conv.allow_hf32)
    assert seen == [True, False] and torch.npu.conv.allow_hf32


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
        precision.backward(loss, optimizer)
        left_out = precision.step(optimizer)
        unchanged = all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
        assert left_out.device == NPU and bool(left_out) == unchanged == (factor != 1.0)
        if factor == 1.0:
            plain_sgd.zero_grad()
            with torch.autocast("npu", enabled=False):
                loss_of(plain).backward()
            plain_sgd.step()
    for ours, theirs in zip(amp.master_params(optimizer), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.float().cpu(), theirs.cpu(), rtol=0.05, atol=0.005)
    assert precision.scale() == (128.0 if loss_scale == 128.0 else 2.0 ** 14)  # halved twice


def test_the_fused_optimizer_of_torch_npu():
    precision = choose_precision(NPU)
    assert type(fused_sgd(list(network().parameters()), NPU, precision, **SETTINGS)) is torch_npu.optim.NpuFusedSGD
