"""Devices: the NPU path on tests/software_npu.py, apex on its stand-in, steps that go wrong, what a card is told."""
import contextlib
import json
import os
import subprocess
import sys
import types
from unittest import mock

import pytest
import torch
from conftest import ROOT, error_line, metrics, run, state, train_flags

import inference
import loader
import scores
import trainer
from fcn8s import upsample
from precision import ApexPrecision, Precision

CPU, CUDA = torch.device("cpu"), torch.device("cuda")  # no CUDA device is touched
NPU = types.SimpleNamespace(type="npu")
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
    assert "on 1 x npu:0 (software NPU), float32" in assert_score_is_evaluates(tmp_path, drawn_voc)
    assert same_scores(*(json.loads((folder / "result.json").read_text()) for folder in (tmp_path, cpu_run)))


def assert_score_is_evaluates(work_dir, data):
    """-> what evaluate.py printed"""
    output = run(ROOT / "evaluate.py", work_dir / "ckpt/latest.pth", "--data_path", data, "--device", "npu",
                 "--json", work_dir / "scores.json", env=beside("npu")).stdout
    assert same_scores(*(json.loads((work_dir / name).read_text()) for name in ("scores.json", "result.json")))
    return output


def same_scores(a, b):
    return all(a[name] == b[name] for name in scores.MEANS)


@needs_software_npu
@pytest.mark.parametrize("stand_ins, flags, words", [
    (("npu",), (), "float16 with loss scale 128.0"),
    (("npu",), ("--opt_level", "O0"), "float32 (HF32 in convolutions)"),
    (("npu", "apex"), (), "apex O1 with loss scale 128.0"),
    (("npu", "apex"), ("--opt_level", "O2"), "apex O2 with loss scale 128.0"),
    (("npu", "apex"), ("--opt_level", "O3", "--loss_scale", 64), "apex O3 with loss scale 64.0")])
def test_mixed_precision_on_an_npu(cpu_run, drawn_voc, tmp_path, stand_ins, flags, words):
    """Step 2 has infinite gradients: the third begins where the second did, but at another learning rate."""
    output = tiny_train(drawn_voc, tmp_path, "--amp", *flags, spoil=("gradient", "inf", "2"),
                        env=beside(*stand_ins)).stdout
    assert f"software NPU), {words}\n" in output and "skipped steps 1\n" in output
    assert skipped(tmp_path) == [0, 1, 1]
    assert losses(tmp_path)[:2] == pytest.approx(losses(cpu_run)[:2], rel=0.01)
    assert losses(tmp_path)[2] > losses(cpu_run)[2] + 0.04  # which learned in step 2
    assert_score_is_evaluates(tmp_path, drawn_voc)


@needs_software_npu
def test_bfloat16_on_an_npu(drawn_voc, tmp_path):
    flags = ("--amp", "--amp_dtype", "bfloat16", "--max_iters", 1)
    output = tiny_train(drawn_voc, tmp_path / "d8", *flags, "--backbone", "tiny_d8").stdout
    assert "software NPU), bfloat16\n" in output
    error = tiny_train(drawn_voc, tmp_path / "run", *flags, status=1).stderr
    assert "has transposed convolutions, which an NPU does not offer in bfloat16" in error
    assert len(error.splitlines()) == 1 and not (tmp_path / "run").exists()


@needs_software_npu
def test_an_npu_that_hides_overflows_is_refused(drawn_voc, tmp_path):
    error = tiny_train(drawn_voc, tmp_path / "run", env={**beside("npu"), "SOFTWARE_NPU_IS_910A": "1"}, status=1).stderr
    assert "npu:0 has no INF/NAN mode" in error and len(error.splitlines()) == 1


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


def test_a_loss_that_stays_nan_stops_the_run_and_spares_the_checkpoints(drawn_voc, tmp_path):
    """NaN from step 3 on, but for step 5, whose number begins the count anew: ten in a row are full at step 15. The
    checkpoints asked for meanwhile are not written, but for the one of step 5."""
    steps = ",".join(str(step) for step in range(3, 25) if step != 5)
    done = tiny_train(drawn_voc, tmp_path / "run", "--device", "cpu", "--max_iters", 24, "--checkpoint_interval", 1,
                      "--eval_interval", 24, spoil=("loss", "nan", steps), status=1)
    assert done.stderr.startswith("train.py: error: the loss was NaN or Inf for 10 steps in a row, at iteration 15;")
    assert len(done.stderr.splitlines()) == 1
    assert [number for number, loss in enumerate(losses(tmp_path / "run"), 1) if loss is not None] == [1, 2, 5]
    assert skipped(tmp_path / "run")[-1] == 12
    names = sorted(path.name for path in (tmp_path / "run/ckpt").glob("iter_*"))
    assert names == ["iter_1.pth", "iter_2.pth", "iter_5.pth"]
    last = latest(tmp_path / "run")
    assert last["progress"]["iteration"] == 5 and all(v.isfinite().all() for v in last["state_dict"].values())


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


def test_what_ranks_tell_distributed_data_parallel():
    """No broadcast of buffers before each forward; no views with an NPU's fused SGD, nor with NVIDIA's apex."""
    for device, precision, views in ((CPU, Precision, True), (CUDA, Precision, True), (NPU, Precision, False),
                                     (CUDA, ApexPrecision, False)):
        settings = trainer.ddp_settings(device, precision)
        assert settings.pop("gradient_as_bucket_view") is views
        assert list(settings.values()) == [False] and set(settings) <= {"forward_sync_buffers", "broadcast_buffers"}


class Recording(torch.nn.Module):
    """Answers with its input's first channel, and records how cuDNN would compute."""
    form, num_classes = "unpadded", 1

    def forward(self, images, size=None):
        self.seen = torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32
        return {"out": images[:, :1]}


def as_cuda(module, monkeypatch):
    """The module takes the settings of a CUDA device."""
    convolutions = module.convolutions
    monkeypatch.setattr(module, "convolutions", lambda device, training: convolutions(CUDA, training))


def test_evaluation_neither_tunes_nor_takes_tf32(monkeypatch):
    as_cuda(inference, monkeypatch)
    model = Recording()
    before = torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32
    inference.predict(model, torch.zeros(1, 8, 8, 3, dtype=torch.uint8), inference.Protocol(None))
    assert model.seen == (False, False) and before == (torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32)


def test_training_tunes_and_takes_tf32(monkeypatch):
    as_cuda(trainer, monkeypatch)
    seen = []
    step = types.SimpleNamespace(
        recipe=types.SimpleNamespace(seed=0), progress=types.SimpleNamespace(iteration=0), device=CPU,
        processes=types.SimpleNamespace(rank=0), statistics=mock.Mock(), optimizer=mock.Mock(param_groups=[]),
        precision=mock.Mock(step=lambda optimizer: torch.tensor(False)), nan_run=torch.tensor(0),
        longest_nan_run=torch.tensor(0), exchanging_gradients=lambda last: contextlib.nullcontext())

    def gradients_of(batch, weight):
        seen.append((torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32))
        return torch.zeros(3)
    step.gradients_of = gradients_of
    trainer.Trainer.step(step, [{}])
    assert seen == [(True, True)]


def test_logits_are_contiguous_before_they_are_enlarged():
    """Or the loss would copy them, 64 times as many values."""
    logits = torch.randn(2, 21, 8, 8).contiguous(memory_format=torch.channels_last)
    assert upsample(logits, (64, 64)).is_contiguous()


def test_workers_share_the_cores(monkeypatch):
    monkeypatch.setattr(loader, "usable_cores", lambda: 16)
    assert [loader.default_workers(processes) for processes in (1, 2, 4, 8, 16, 32)] == [4, 4, 4, 2, 1, 1]
