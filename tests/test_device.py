"""Devices: the NPU path on tests/software_npu.py, a torch_npu that fails, CANN, what a card is told."""
import functools
import os
import subprocess
import types

import pytest
import torch
from conftest import ROOT, error_line, run, train, train_flags

import data
import device
from amp import ApexPrecision, Precision, convolutions, ddp_settings
from fcn8s import FCN8s, enlarge_by_products, interpolate, upsample

CPU, CUDA = torch.device("cpu"), torch.device("cuda")  # no CUDA device is touched
NPU = types.SimpleNamespace(type="npu")


@pytest.mark.skipif(not hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"),
                    reason="this PyTorch cannot register a device in Python")
def test_everything_on_the_software_npu():
    """on_npu.py, in a process of its own."""
    stand_ins = os.pathsep.join(str(ROOT / "tests/stand_ins" / name) for name in ("npu", "apex"))
    tests = run("-m", "pytest", "-q", "-p", "no:cacheprovider", ROOT / "tests/on_npu.py",
                env={"PYTHONPATH": stand_ins, "OMP_NUM_THREADS": "1", "NO_PICTURES": ""}).stdout
    assert "passed" in tests and "skipped" not in tests


def test_a_torch_npu_that_cannot_be_imported_is_one_line(drawn_voc, tmp_path, monkeypatch):
    """As the real one without CANN. `auto` says why it takes another device."""
    (tmp_path / "torch_npu.py").write_text("raise ImportError('libhccl.so: cannot open shared object file\\nand more')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(device, "problem", functools.cache(device.problem.__wrapped__))
    reason = "torch_npu cannot be imported (libhccl.so: cannot open shared object file)"
    assert reason in error_line(ROOT / "train.py", *train_flags(drawn_voc, tmp_path / "run"), "--device", "npu")
    said = device.describe(device.choose_device("auto"), "auto")
    assert said.startswith("cpu (") and f"; no npu: {reason}; no cuda: " in said and len(said.splitlines()) == 1


def test_on_an_npu_machine_cann_is_set_up_before_python_is_looked_for(tmp_path):
    """The driver's npu-smi on the PATH, CANN in the home folder; what the caller has set stays."""
    cann = tmp_path / "Ascend/ascend-toolkit/set_env.sh"
    cann.parent.mkdir(parents=True)
    cann.write_text('export LD_LIBRARY_PATH=/cann:$LD_LIBRARY_PATH\nfalse\n')  # as it is: not for `set -eu`
    for name, script in (("npu-smi", ""), ("python", f'echo "$LD_LIBRARY_PATH" >> {tmp_path}/seen')):
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    script = f"set -eu; source {ROOT}/env_npu.sh; find_python none os; echo "
    shown = script + '"$LD_LIBRARY_PATH $TASK_QUEUE_ENABLE $HCCL_CONNECT_TIMEOUT"'
    env = {**os.environ, "HOME": str(tmp_path), "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": "python",
           "HCCL_CONNECT_TIMEOUT": "1200"}
    env.pop("LD_LIBRARY_PATH", None)
    done = subprocess.run(["bash", "-c", shown], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["/cann:", "2", "1200"] and not done.stderr
    assert set((tmp_path / "seen").read_text().split()) == {"/cann:"}
    (tmp_path / "npu-smi").unlink()
    elsewhere = subprocess.run(["bash", "-c", script + "${TASK_QUEUE_ENABLE-unset}"], capture_output=True, text=True,
                               env=env, check=True)
    assert elsewhere.stdout == "unset\n"


def test_what_ranks_tell_distributed_data_parallel():
    """No broadcast of buffers before each forward; no views with an NPU's fused SGD, nor with NVIDIA's apex."""
    for on, precision, views in ((CPU, Precision, True), (CUDA, Precision, True), (NPU, Precision, False),
                                 (CUDA, ApexPrecision, False)):
        settings = ddp_settings(on, precision)
        assert settings.pop("gradient_as_bucket_view") is views
        assert list(settings.values()) == [False] and set(settings) <= {"forward_sync_buffers", "broadcast_buffers"}


def test_cudnn_tunes_and_takes_tf32_in_training_alone(monkeypatch, drawn_voc, tmp_path):
    """A run on a CPU that takes the settings of a CUDA device."""
    seen, forward = {}, FCN8s.forward

    def settings():
        return torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32

    def recording(self, *arguments):
        seen.setdefault(self.training, set()).add(settings())
        return forward(self, *arguments)
    monkeypatch.setattr(FCN8s, "forward", recording)
    for module in ("train", "inference"):
        monkeypatch.setattr(f"{module}.convolutions", lambda _, training: convolutions(CUDA, training))
    monkeypatch.setattr("train.draw", lambda *arguments: None)
    before = settings()
    train(drawn_voc, tmp_path, "--max_iters", 1)
    assert seen == {True: {(True, True)}, False: {(False, False)}} and settings() == before


def test_logits_are_contiguous_before_they_are_enlarged():
    """Or the loss would copy them, 64 times as many values."""
    logits = torch.randn(2, 21, 8, 8).contiguous(memory_format=torch.channels_last)
    assert upsample(logits, (64, 64)).is_contiguous()


@pytest.mark.parametrize("mixed", (False, True))
def test_matrix_products_enlarge_as_interpolation_does(mixed):
    """Values and gradients, in float32 where autocast is on, too."""
    logits = torch.randn(2, 3, 8, 9, generator=torch.Generator().manual_seed(0), requires_grad=True)
    weights = torch.rand(2, 3, 61, 70, generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        results = [way(logits, (61, 70)) for way in (interpolate, enlarge_by_products)]
        gradients = [torch.autograd.grad((each * weights).sum(), logits)[0] for each in results]
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)


def test_workers_share_the_cores(monkeypatch):
    seen = []
    monkeypatch.setattr(data, "usable_cores", lambda: 16)
    monkeypatch.setattr(data, "DataLoader", lambda *_, num_workers, **settings: seen.append(num_workers) or [])
    for here in (1, 2, 4, 8, 16, 32):
        data.batches_of([], [], None, device.Ranks(CPU, here=here))
    assert seen == [4, 4, 4, 2, 1, 1]
