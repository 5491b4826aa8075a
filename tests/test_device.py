"""Devices and precisions: the NPU path on tests/software_npu.py, apex on its stand-in, steps that go wrong."""
import json
import os
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, error_line, run, train_flags

from device import DeviceError, Precision, choose_precision, find_apex, fused_sgd
from test_train import metrics, state

CPU, CUDA = torch.device("cpu"), torch.device("cuda")  # no CUDA device is touched
SPOIL = ROOT / "tests/spoiled_steps.py"
needs_software_npu = pytest.mark.skipif(
    not hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this PyTorch cannot register a device in Python")


def beside(*stand_ins):
    """The environment in which the packages of these folders in stand_ins/ are installed."""
    folders = [ROOT, ROOT / "tests", *(ROOT / "tests/stand_ins" / name for name in stand_ins)]
    return {"PYTHONPATH": os.pathsep.join(map(str, folders)), "OMP_NUM_THREADS": "1"}


CONTIGUOUS = """
import runpy, sys, torch, device
device.memory_format = lambda device: torch.contiguous_format
sys.argv.pop(0)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def tiny_train(data, work_dir, *flags, spoil=(), env=None, status=0):
    """Three iterations on crops of 32 pixels, on an NPU; `spoil`: arguments of spoiled_steps.py."""
    command = [ROOT / "train.py", *train_flags(data, work_dir), "--device", "npu", "--scale", 64, 32, "--crop_size", 32,
               "--max_iters", 3, *flags]
    before = (SPOIL, *spoil) if spoil and spoil[0] != "-c" else spoil
    return run(*before, *command, env=env or beside("npu"), status=status)


def losses(work_dir):
    return [line["loss"] for line in metrics(work_dir) if "loss" in line]


def skipped(work_dir):
    return [line["skipped_steps"] for line in metrics(work_dir) if "loss" in line]


def latest(work_dir):
    return state(work_dir / "ckpt/latest.pth")


def same(a, b):
    """Whether two nested states are equal, tensors to the bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return len(a) == len(b) and all(map(same, a, b)) if isinstance(a, list) else a == b


@pytest.fixture(scope="module")
def cpu_run(drawn_voc, tmp_path_factory):
    """The folder of a run on the CPU, its tensors contiguous as an NPU's are: another layout rounds otherwise."""
    work_dir = tmp_path_factory.mktemp("cpu") / "run"
    tiny_train(drawn_voc, work_dir, "--device", "cpu", spoil=("-c", CONTIGUOUS))
    return work_dir


@needs_software_npu
def test_in_float32_an_npu_gives_the_losses_and_scores_of_the_cpu(cpu_run, drawn_voc, tmp_path):
    output = tiny_train(drawn_voc, tmp_path, "--device", "auto").stdout
    assert "1 x npu:0 (software NPU), float32" in output
    assert losses(tmp_path) == pytest.approx(losses(cpu_run), rel=1e-6)
    assert all(value.device == CPU for value in latest(tmp_path)["state_dict"].values())  # any machine can read it
    output = run(ROOT / "evaluate.py", tmp_path / "ckpt/latest.pth", "--data_path", drawn_voc, "--device", "npu",
                 "--json", tmp_path / "scores.json", env=beside("npu")).stdout
    assert "on npu:0 (software NPU), float32" in output
    scores, result = (json.loads((tmp_path / name).read_text()) for name in ("scores.json", "result.json"))
    assert scores["mIoU"] == result["mIoU"] == json.loads((cpu_run / "result.json").read_text())["mIoU"]


@needs_software_npu
@pytest.mark.parametrize("stand_ins, flags, words", [
    (("npu",), (), "float16 with loss scale 128.0"), (("npu",), ("--amp_dtype", "bfloat16"), "bfloat16"),
    (("npu",), ("--opt_level", "O0"), "float32"),
    (("npu", "apex"), (), "apex O1 with loss scale 128.0"),
    (("npu", "apex"), ("--opt_level", "O3", "--loss_scale", 64), "apex O3 with loss scale 64.0")])
def test_mixed_precision_on_an_npu(cpu_run, drawn_voc, tmp_path, stand_ins, flags, words):
    """Step 2 has infinite gradients: the third begins where the second did, but at another learning rate."""
    output = tiny_train(drawn_voc, tmp_path, "--amp", *flags, spoil=("gradient", "inf", "2"),
                        env=beside(*stand_ins)).stdout
    assert f"software NPU), {words}\n" in output and "skipped steps 1\n" in output
    assert skipped(tmp_path) == [0, 1, 1]
    assert losses(tmp_path)[:2] == pytest.approx(losses(cpu_run)[:2], rel=0.01)
    assert losses(tmp_path)[2] > losses(cpu_run)[2] + 0.1  # which learned in step 2


@needs_software_npu
@pytest.mark.parametrize("stand_ins, flags", [
    (("npu",), ("--loss_scale", "dynamic")),
    (("npu", "apex"), ("--opt_level", "O2", "--loss_scale", "dynamic"))], ids=("native O1", "apex O2"))
def test_a_resumed_run_on_an_npu_is_the_same_run(drawn_voc, tmp_path, stand_ins, flags):
    """Step 1 has infinite gradients, and the resumed run starts after it: it goes on with the lowered scale."""
    flags, env = ("--amp", *flags, "--checkpoint_interval", 2), beside(*stand_ins)
    tiny_train(drawn_voc, tmp_path / "whole", *flags, spoil=("gradient", "nan", "1"), env=env)
    tiny_train(drawn_voc, tmp_path / "part", *flags, "--resume", tmp_path / "whole/ckpt/iter_2.pth", env=env)
    whole, part = latest(tmp_path / "whole"), latest(tmp_path / "part")
    for key in ("state_dict", "optimizer", "precision"):
        assert same(whole[key], part[key]), key
    assert skipped(tmp_path / "whole") == [1, 1, 1] and skipped(tmp_path / "part") == [1]
    kept = part["precision"]
    assert (kept["scaler"]["scale"] if "scaler" in kept else kept["amp"]["loss_scaler0"]["loss_scale"]) == 2.0 ** 15


@needs_software_npu
def test_the_stand_ins_and_apex_steps():
    tests = run("-m", "pytest", "-q", "-p", "no:cacheprovider", "--noconftest", ROOT / "tests/on_npu.py",
                env=beside("npu", "apex")).stdout
    assert "passed" in tests and "skipped" not in tests


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
        left_out = precision.step(loss, optimizer)
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
        precision.step(weight.square().sum(), optimizer)
    assert precision.scaler.get_scale() == 2.0 ** 18


def test_a_loss_that_stays_nan_stops_the_run_and_spares_the_checkpoints(drawn_voc, tmp_path):
    """NaN from step 3 on, but for step 5, whose number begins the count anew: ten in a row are full at step 15. The
    checkpoints asked for meanwhile are not written, but for the one of step 5."""
    steps = ",".join(str(step) for step in range(3, 25) if step != 5)
    done = tiny_train(drawn_voc, tmp_path / "run", "--device", "cpu", "--max_iters", 24, "--checkpoint_interval", 1,
                      "--eval_interval", 24, spoil=("loss", "nan", steps), status=1)
    assert done.stderr.startswith("train.py: error: the loss was no number for 10 steps in a row, at iteration 15;")
    assert len(done.stderr.splitlines()) == 1
    assert [number for number, loss in enumerate(losses(tmp_path / "run"), 1) if loss is not None] == [1, 2, 5]
    assert skipped(tmp_path / "run")[-1] == 12
    names = sorted(path.name for path in (tmp_path / "run/ckpt").glob("iter_*"))
    assert names == ["iter_1.pth", "iter_2.pth", "iter_5.pth"]
    last = latest(tmp_path / "run")
    assert last["progress"]["iteration"] == 5 and all(v.isfinite().all() for v in last["state_dict"].values())


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
    with pytest.raises(DeviceError) as caught:
        choose_precision(CPU, amp=True, **flags)
    assert words in str(caught.value) and "\n" not in str(caught.value)


COMPLETE = """
def initialize(model, optimizer): pass
scale_loss = master_params = state_dict = load_state_dict = initialize
"""


@pytest.mark.parametrize("kind, files, words", [
    ("npu", {"__init__": "raise SystemError('imported')"}, "is PyPI's unrelated package of that name; uninstall it"),
    ("cuda", {"optimizers": ""}, "has no amp, which NVIDIA took out in May 2025"),
    ("cuda", {"amp": "def initialize(): pass"}, "lacks amp.scale_loss"),
    ("cuda", {"__init__": "import torch._six", "amp": ""}, "apex cannot be imported (No module named 'torch._six')"),
    ("npu", {"amp": COMPLETE}, "is for CUDA devices"),
    ("cuda", {"amp": COMPLETE.replace("optimizer)", "optimizer, combine_grad=None)")}, "is for NPUs"),
    ("cuda", {"amp": COMPLETE}, None)])
def test_apex_is_told_by_what_it_offers(tmp_path, monkeypatch, kind, files, words):
    forget_apex()
    (tmp_path / "apex").mkdir()
    for name, text in {"__init__": "", **files}.items():
        (tmp_path / f"apex/{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    if words is None:
        assert find_apex(kind).__name__ == "apex.amp"
    else:
        with pytest.raises(ImportError, match=re.escape(words)):
            find_apex(kind)
    forget_apex()


def forget_apex():
    for name in [name for name in sys.modules if name.partition(".")[0] == "apex"]:
        del sys.modules[name]


def test_a_torch_npu_that_cannot_be_imported_is_one_line(drawn_voc, tmp_path):
    """As the real one without CANN. `auto` says why it goes on."""
    (tmp_path / "torch_npu.py").write_text("raise ImportError('libhccl.so: cannot open shared object file\\nand more')")
    env = {"PYTHONPATH": str(tmp_path)}
    reason = "torch_npu cannot be imported (libhccl.so: cannot open shared object file)"
    command = ROOT / "train.py", *train_flags(drawn_voc, tmp_path / "run"), "--device", "npu"
    assert reason in error_line(*command, env=env)
    said = run("-c", "from device import *; print(describe(choose_device('auto'), 'auto'))", env=env).stdout
    assert said.startswith("cpu (") and f"; no npu: {reason}; no cuda: " in said and len(said.splitlines()) == 1


def test_on_an_npu_machine_cann_is_set_up_before_python_is_looked_for(tmp_path):
    """The driver's npu-smi on the PATH, CANN in the home folder; what the caller has set stays."""
    cann = tmp_path / "Ascend/ascend-toolkit/set_env.sh"
    cann.parent.mkdir(parents=True)
    cann.write_text('export LD_LIBRARY_PATH=/cann:$LD_LIBRARY_PATH\nfalse\n')  # as it is: not for `set -eu`
    (tmp_path / "npu-smi").write_text("#!/bin/sh\n")
    (tmp_path / "npu-smi").chmod(0o755)
    script = f"set -eu; source {ROOT}/find_python.sh; find_python none os; echo "
    shown = script + '"$LD_LIBRARY_PATH $TASK_QUEUE_ENABLE $HCCL_CONNECT_TIMEOUT"'
    env = {**os.environ, "HOME": str(tmp_path), "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": sys.executable,
           "HCCL_CONNECT_TIMEOUT": "1200"}
    env.pop("LD_LIBRARY_PATH", None)
    done = subprocess.run(["bash", "-c", shown], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["/cann:", "2", "1200"] and not done.stderr
    elsewhere = subprocess.run(["bash", "-c", script + "${TASK_QUEUE_ENABLE-unset}"], capture_output=True, text=True,
                               env={**env, "PATH": os.environ["PATH"]}, check=True)
    assert elsewhere.stdout == "unset\n"
