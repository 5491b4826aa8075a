"""Precisions: optimizer steps with infinite gradients, loss scales, flags that cannot take effect, which apex it is."""
import sys
from types import SimpleNamespace

import pytest
import torch
import torch._dynamo  # noqa: F401, sets a variable, which the first optimizer of a process would do in a test

from amp import Precision, check_run, choose_precision, find_apex, fused_sgd
from cli import UserError
from device import Ranks
from fcn8s import FCN8s
from train import parse_args

CPU, CUDA = torch.device("cpu"), torch.device("cuda")  # no CUDA device is touched
NPU = SimpleNamespace(type="npu")


@pytest.mark.parametrize("dtype, loss_scale, optimizers_device", [
    (torch.float32, 1.0, CPU), (torch.bfloat16, 1.0, CPU), (torch.float16, 128.0, CPU), (torch.float16, "dynamic", CPU),
    (torch.float32, 1.0, CUDA), (torch.float16, "dynamic", CUDA)])
def test_infinite_gradients_change_no_parameter(dtype, loss_scale, optimizers_device):
    """Two bad steps among three good ones, against plain SGD that only sees the good ones. The first is bad: PyTorch's
    fused SGD would go on from momentum that nobody set. (That one, for CUDA, runs on CPU tensors, too.)"""
    torch.manual_seed(0)
    inputs, weights = torch.randn(8, 5), torch.randn(3, 5)
    ours, plain = (torch.nn.Parameter(weights.clone()) for _ in range(2))
    precision = Precision(CPU, dtype, loss_scale)
    settings = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
    optimizer = fused_sgd([ours], optimizers_device, precision, **settings)
    plain_sgd = torch.optim.SGD([plain], **settings)
    for factor in (float("inf"), 1.0, 1.0, float("nan"), 1.0):
        before = ours.detach().clone()
        optimizer.zero_grad()
        with precision.autocast():
            loss = torch.nn.functional.linear(inputs, ours).float().square().mean() * factor
        precision.backward(loss, optimizer)
        left_out = precision.step(optimizer)
        assert bool(left_out) == torch.equal(ours, before) == (factor != 1.0)
        if factor == 1.0:
            plain_sgd.zero_grad()
            torch.nn.functional.linear(inputs, plain).square().mean().backward()
            plain_sgd.step()
    torch.testing.assert_close(ours, plain, **({} if dtype is torch.float32 else {"rtol": 0.02, "atol": 0.01}))
    assert precision.scaler.get_scale() == (2.0 ** 14 if loss_scale == "dynamic" else loss_scale)


def test_a_dynamic_scale_grows():
    weight = torch.nn.Parameter(torch.ones(1))
    precision = Precision(CPU, torch.float16, "dynamic")
    precision.scaler.set_growth_interval(2)
    optimizer = fused_sgd([weight], CPU, precision, lr=0.1, momentum=0.9, weight_decay=0.0)
    for _ in range(4):
        optimizer.zero_grad()
        precision.backward(weight.square().sum(), optimizer)
        precision.step(optimizer)
    assert precision.scaler.get_scale() == 2.0 ** 18


@pytest.mark.parametrize("flags, words", [
    ({"opt_level": "O2", "backend": "native"}, "--opt_level O2 needs apex; --amp_backend native has O0 and O1"),
    ({"opt_level": "O3"}, "--opt_level O3 by apex: apex needs an NPU or a CUDA device"),
    ({"backend": "apex"}, "apex needs an NPU or a CUDA device"),
    ({"loss_scale": 128.0}, "--loss_scale 128.0: bfloat16 on cpu needs no loss scale"),
    ({"loss_scale": 2.0, "dtype": "bfloat16"}, "needs no loss scale"),
    ({"loss_scale": 2.0, "opt_level": "O0"}, "--loss_scale 2.0: float32 on cpu needs no loss scale"),
    ({"dtype": "float16", "opt_level": "O0"}, "--amp_dtype float16 has no effect with --opt_level O0"),
    ({"dtype": "bfloat16", "opt_level": "O2"}, "apex mixes in float16 alone")])
def test_precision_flags_that_cannot_take_effect(flags, words):
    with pytest.raises(UserError) as caught:
        choose_precision(CPU, amp=True, **flags)
    assert words in str(caught.value) and "\n" not in str(caught.value)


APEX_AMP = "def initialize(model, optimizer): pass"


@pytest.mark.parametrize("kind, files, words", [
    ("npu", {"__init__": "raise SystemError('pyramid')"}, "(pyramid); PyPI's apex is an unrelated package"),
    ("cuda", {"optimizers": ""}, "(No module named 'apex.amp'); PyPI's apex is an unrelated package, and NVIDIA took"),
    ("cuda", {"__init__": "import torch._six", "amp": ""}, "cannot be imported (No module named 'torch._six')"),
    ("npu", {"amp": APEX_AMP}, "is for CUDA devices"),
    ("cuda", {"amp": APEX_AMP.replace("optimizer)", "optimizer, combine_grad=None)")}, "is for NPUs"),
    ("cuda", {"amp": APEX_AMP}, None)])
def test_apex_is_told_by_what_it_offers(tmp_path, monkeypatch, kind, files, words):
    forget_apex()
    (tmp_path / "apex").mkdir()
    for name, text in {"__init__": "", **files}.items():
        (tmp_path / f"apex/{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    amp, missing = find_apex(kind)
    if words is None:
        assert amp.__name__ == "apex.amp" and missing is None
    else:
        assert amp is None and words in missing and "\n" not in missing
    forget_apex()


@pytest.mark.parametrize("flags", [{}, {"backend": "native"}])
def test_a_dynamic_scale_on_an_npu_is_for_apex(flags):
    """GradScaler's kernel fails there; apex is not installed here."""
    with pytest.raises(UserError, match="--loss_scale dynamic: PyTorch's own AMP has none on an NPU"):
        choose_precision(NPU, amp=True, loss_scale="dynamic", **flags)


@pytest.mark.filterwarnings("ignore:.*GradScaler is enabled")
def test_on_cuda_apex_is_for_what_it_alone_can_do(tmp_path, monkeypatch):
    """Where it is installed: NVIDIA's waits for the device in each step."""
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex/__init__.py").write_text("")
    (tmp_path / "apex/amp.py").write_text(APEX_AMP)
    monkeypatch.syspath_prepend(tmp_path)
    forget_apex()
    assert str(choose_precision(CUDA, True)) == "float16 with loss scale dynamic"  # PyTorch's own
    for options in ({"opt_level": "O2"}, {"opt_level": "O3"}, {"opt_level": "O1", "backend": "apex"}):
        assert str(choose_precision(CUDA, True, **options)).startswith(f"apex {options['opt_level']} with")
    forget_apex()


def test_bfloat16_on_an_npu_is_for_networks_without_transposed_convolutions():
    bfloat16 = SimpleNamespace(dtype=torch.bfloat16)

    def check(device, backbone):
        args = parse_args(["--data_path", "unused", "--backbone", backbone])
        check_run(args, Ranks(device), bfloat16, FCN8s(2, backbone), ("background", "thing"))
    with pytest.raises(UserError, match="tiny has transposed convolutions.*torch_npu 2.12"):
        check(NPU, "tiny")
    check(NPU, "tiny_d8")
    check(CPU, "tiny")


@pytest.mark.filterwarnings("ignore:.*GradScaler is enabled")
def test_the_log_says_that_float32_on_cuda_is_tf32_in_convolutions():
    assert str(Precision(CUDA)) == "float32 (TF32 in convolutions)" and str(Precision(CPU)) == "float32"


@pytest.mark.parametrize("backbone", ("tiny", "tiny_d8"))
def test_logits_are_enlarged_in_float32(backbone):
    """In which the loss and the gradients of single pixels are."""
    with torch.autocast("cpu", torch.bfloat16):
        assert FCN8s(21, backbone)(torch.randn(1, 3, 64, 64))["out"].dtype is torch.float32


def forget_apex():
    for name in [name for name in sys.modules if name.partition(".")[0] == "apex"]:
        del sys.modules[name]
