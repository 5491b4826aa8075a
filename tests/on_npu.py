"""The tests that need the software NPU. A device can be registered once in a process, and stays: so test_device.py runs
these in one of their own, with the stand-ins of torch_npu and apex on PYTHONPATH.

The stand-in of apex fails on what apex's documentation calls wrong use; then, that ApexPrecision uses it right.
"""
import importlib
import json
import os
import subprocess
import sys

import apex.amp
import pytest
import software_npu
import torch
import torch_npu  # makes the software NPU
from apex import optimizers
from conftest import ROOT, environment, error_line, metrics, run, state, train_flags
from spoiled_steps import spoiled

import amp
import inference
import train
from amp import ApexPrecision, choose_precision, fused_sgd, place
from data import val_batches
from device import Ranks
from fcn8s import FCN8s
from inference import Protocol, evaluate
from metrics import MEANS

CPU, NPU = torch.device("cpu"), torch.device("npu:0")
SETTINGS = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3}
TRAIN = ROOT / "train.py"


def fresh_apex():
    """Forgets amp.initialize, as if the process were new."""
    if apex.amp.STATE is not None:
        if apex.amp.STATE.opt_level == "O1":
            apex.amp.CASTS.__exit__(None, None, None)
        importlib.reload(apex.amp)


@pytest.fixture(autouse=True)
def forgetting_apex():
    yield
    fresh_apex()


@pytest.fixture
def without_apex(monkeypatch):
    hide_apex(monkeypatch)


def hide_apex(monkeypatch):
    """apex is not installed, in this test."""
    folder = str(ROOT / "tests/stand_ins/apex")
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path != folder])
    for name in [name for name in sys.modules if name.partition(".")[0] == "apex"]:
        monkeypatch.delitem(sys.modules, name)


# ---- the commands on an NPU

def flags_of(data, work_dir, *flags):
    return (*train_flags(data, work_dir), "--device", "npu", "--scale", 64, 32, "--crop_size", 32, "--max_iters", 3,
            *flags)


def tiny_train(data, work_dir, *flags, plan="", status=0):
    """Three iterations on crops of 32 pixels, on an NPU; `plan`: of spoiled_steps."""
    try:
        with spoiled(plan):
            return run(TRAIN, *flags_of(data, work_dir, *flags), status=status)
    finally:
        fresh_apex()


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
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(amp, "memory_format", lambda device: torch.contiguous_format)
        tiny_train(drawn_voc, work_dir, "--device", "cpu")
    return work_dir


def test_in_float32_an_npu_gives_the_losses_and_scores_of_the_cpu(cpu_run, drawn_voc, tmp_path, pictures):
    output = tiny_train(drawn_voc, tmp_path, "--device", "auto").stdout
    assert "1 x npu:0 (software NPU), float32" in output and (tmp_path / "val_samples.png").is_file()
    assert losses(tmp_path) == pytest.approx(losses(cpu_run), rel=1e-6)
    assert all(value.device == CPU for value in latest(tmp_path)["state_dict"].values())  # any machine can read it
    assert "on 1 x npu:0 (software NPU), float32" in assert_score_is_evaluates(tmp_path, drawn_voc)
    assert same_scores(*(json.loads((folder / "result.json").read_text()) for folder in (tmp_path, cpu_run)))


def assert_score_is_evaluates(work_dir, data):
    """-> what evaluate.py printed"""
    output = run(ROOT / "evaluate.py", work_dir / "ckpt/latest.pth", "--data_path", data, "--device", "npu",
                 "--json", work_dir / "scores.json").stdout
    assert same_scores(*(json.loads((work_dir / name).read_text()) for name in ("scores.json", "result.json")))
    return output


def same_scores(a, b):
    return all(a[name] == b[name] for name in MEANS)


@pytest.mark.parametrize("has_apex, flags, words", [
    (False, (), "float16 with loss scale 128.0"),
    (False, ("--opt_level", "O0"), "float32 (HF32 in convolutions)"),
    (True, (), "apex O1 with loss scale 128.0"),
    (True, ("--opt_level", "O2"), "apex O2 with loss scale 128.0"),
    (True, ("--opt_level", "O3", "--loss_scale", 64), "apex O3 with loss scale 64.0")])
def test_mixed_precision_on_an_npu(cpu_run, drawn_voc, tmp_path, monkeypatch, has_apex, flags, words):
    """Step 2 has infinite gradients: the third begins where the second did, but at another learning rate."""
    if not has_apex:
        hide_apex(monkeypatch)
    output = tiny_train(drawn_voc, tmp_path, "--amp", *flags, plan="gradient inf 2").stdout
    assert f"software NPU), {words}\n" in output and "skipped steps 1\n" in output
    assert skipped(tmp_path) == [0, 1, 1]
    assert losses(tmp_path)[:2] == pytest.approx(losses(cpu_run)[:2], rel=0.01)
    assert losses(tmp_path)[2] > losses(cpu_run)[2] + 0.04  # which learned in step 2
    assert_score_is_evaluates(tmp_path, drawn_voc)


def test_bfloat16_on_an_npu(drawn_voc, tmp_path):
    flags = ("--amp", "--amp_dtype", "bfloat16", "--max_iters", 1)
    output = tiny_train(drawn_voc, tmp_path / "d8", *flags, "--backbone", "tiny_d8").stdout
    assert "software NPU), bfloat16\n" in output
    error = error_line(TRAIN, *flags_of(drawn_voc, tmp_path / "run", *flags))
    assert "has transposed convolutions, which an NPU does not offer in bfloat16" in error
    assert not (tmp_path / "run").exists()


def test_an_npu_that_hides_overflows_is_refused(drawn_voc, tmp_path):
    assert "npu:0 has no INF/NAN mode" in error_line(
        TRAIN, *flags_of(drawn_voc, tmp_path / "run"), env={"SOFTWARE_NPU_IS_910A": "1"})


@pytest.mark.parametrize("variable, flags, number, line", (
    ("1", (), 1, ""), ("", (), 0, ""), ("1", ("--device_id", 1), 1, ""),
    ("1", ("--device_id", 0), 0, "train.py: ASCEND_DEVICE_ID=1 is set, --device_id 0 wins over it\n")))
def test_ascend_device_id_is_the_device_where_no_flag_names_one(drawn_voc, tmp_path, variable, flags, number, line):
    """The files are in its folder, as the port's."""
    flags = [flag for flag in flags_of(drawn_voc, "unused", "--max_iters", 1, *flags) if flag not in (
        "--work_dir", "unused")]
    done = run(TRAIN, *flags, cwd=tmp_path, env={"ASCEND_DEVICE_ID": variable, "SOFTWARE_NPUS": "2"})
    assert f"device: 1 x npu:{number} (" in done.stdout and done.stderr == line
    assert (tmp_path / f"output/{number}/FCN/train_{number}.log").is_file()


def test_ascend_device_id_is_heeded_on_an_npu_alone_and_not_under_torchrun(cpu_run, drawn_voc, tmp_path):
    photograph = drawn_voc / "JPEGImages/drawn_val_0000.jpg"
    predict = (ROOT / "predict.py", cpu_run / "ckpt/latest.pth", photograph, "--save_dir", tmp_path / "labelled")
    there = {"ASCEND_DEVICE_ID": "1", "SOFTWARE_NPUS": "2"}
    assert "on npu:1 (" in run(*predict, "--device", "npu", env=there).stdout
    done = run(*predict, "--device", "cpu", "--device_id", 0, env=there)
    assert "on cpu (" in done.stdout and not done.stderr
    rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500",
            "TORCHELASTIC_RUN_ID": "none"}
    done = run(TRAIN, *flags_of(drawn_voc, tmp_path / "run", "--max_iters", 1), env={**there, **rank})
    assert "device: 1 x npu:0 (" in done.stdout and not done.stderr
    for value, words in (("x", "ASCEND_DEVICE_ID=x: takes a whole number"), ("7", "no npu device 7; there are 2")):
        line = error_line(*predict, "--device", "npu", env={**there, "ASCEND_DEVICE_ID": value})
        assert words in line and "--device_id" in line


def test_a_missing_device_is_said_before_any_waiting(drawn_voc, tmp_path):
    flags = flags_of(drawn_voc, tmp_path / "run", "--device_list", "0,1,2", "--nnodes", 2, "--node_rank", 0,
                     "--master_addr", "127.0.0.1")
    env = {"SOFTWARE_NPUS": "2", "PYTHONPATH": os.environ["PYTHONPATH"]}
    done = run(TRAIN, *flags, status=1, env=env)
    assert not done.stdout and done.stderr.count("\n") == 1
    assert "2 of the npu devices 0,1,2 exist; change --device_list" in done.stderr


def test_run_8p_runs_on_two_npus_as_it_is(drawn_voc, tmp_path):
    """Only data, backbone, sizes, lengths and the start differ from its defaults. The two cards are named by hand, from
    which neither the launcher's ranks nor the folder take their numbers."""
    (tmp_path / "npu-smi").write_text("#!/bin/sh\n")
    (tmp_path / "npu-smi").chmod(0o755)
    env = environment({"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": sys.executable, "SOFTWARE_NPUS": "3",
                       "PYTHONPATH": os.environ["PYTHONPATH"], "ASCEND_DEVICE_ID": "1",
                       "ASCEND_RT_VISIBLE_DEVICES": "1,2"})
    listed = "0,1,2,3,4,5,6,7"

    def script(*flags):
        command = ["bash", ROOT / "run_8p.sh", f"--data_path={drawn_voc}", *flags]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        name = "evaluate.py" if "--val" in flags else "train.py"
        assert done.stderr == (f"{name}: ASCEND_RT_VISIBLE_DEVICES=1,2 is set, it wins over --device_list {listed}\n"
                               f"{name}: ASCEND_DEVICE_ID=1 is set, --device_list {listed} wins over it\n")
        return done.stdout
    output = script("--backbone=tiny", "--pretrained=none", "--crop_size=32", "--batch_size=2", "--max_iters=2",
                    "--log_interval=1")
    assert "device: 2 x npu:0 (software NPU), apex O1 with loss scale 128.0\n" in output
    assert "evaluation: images fitted into 512x512, padded to 512x512\n" in output
    assert "augmentation: fitted into 2048x512, " in output
    folder = tmp_path / f"output/{listed}/FCN"
    best = summary_of(folder / "FCN_bs2_2p_acc.log")
    assert best["RankSize"] == "2" and float(best["mIoU"]) == metrics(folder)[-1]["mIoU"] / 100
    assert "fitted into 512x512, padded to 512x512, on 2 x npu:0" in script("--val")
    assert float(summary_of(folder / "FCN_bs8_2p_val.log")["mIoU"]) == float(best["mIoU"])


def summary_of(path):
    return dict(line.split(" = ") for line in path.read_text().splitlines())


def test_a_dynamic_loss_scale_on_an_npu_needs_apex(without_apex, drawn_voc, tmp_path):
    flags = flags_of(drawn_voc, tmp_path / "run", "--amp", "--loss_scale", "dynamic")
    assert "--loss_scale dynamic: PyTorch's own AMP has none on an NPU" in error_line(TRAIN, *flags)


@pytest.mark.parametrize("backend, flags", [
    ("native", ()), ("apex", ("--opt_level", "O2", "--loss_scale", "dynamic"))], ids=("native O1", "apex O2"))
def test_a_resumed_run_on_an_npu_is_the_same_run(drawn_voc, tmp_path, backend, flags):
    """Step 1 has infinite gradients, and the resumed run starts after it: it continues with the lowered scale."""
    flags = ("--amp", "--amp_backend", backend, *flags, "--checkpoint_interval", 2)
    tiny_train(drawn_voc, tmp_path / "whole", *flags, plan="gradient nan 1")
    tiny_train(drawn_voc, tmp_path / "part", *flags, "--resume", tmp_path / "whole/ckpt/iter_2.pth")
    whole, part = latest(tmp_path / "whole"), latest(tmp_path / "part")
    for key in ("state_dict", "optimizer", "precision"):
        assert same(whole[key], part[key]), key
    assert skipped(tmp_path / "whole") == [1, 1, 1] and skipped(tmp_path / "part") == [1]
    if backend == "apex":
        assert part["precision"]["amp"]["loss_scaler0"]["loss_scale"] == 2.0 ** 15


# ---- apex and the stand-ins

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
    apex.amp.initialize(model, sgd_of(model), loss_scale=128.0)
    with pytest.raises(RuntimeError, match="once"):
        apex.amp.initialize(model, sgd_of(model), loss_scale=128.0)


class Wrapper(torch.nn.Module):
    """In place of DistributedDataParallel, which would want other processes."""
    made = []

    def __init__(self, module, **settings):
        super().__init__()
        self.module, self.settings = module, settings
        self.dtype = module.model.decode_head.score_fr.weight.dtype if hasattr(module, "model") else None
        self.made.append(self)

    def forward(self, *inputs):
        return self.module(*inputs)


class TwoRanks(Ranks):
    """Two ranks, of which there is one."""

    def share(self, value):
        return value

    def sum(self, tensor):
        return tensor


def test_ddp_comes_after_initialize(monkeypatch, drawn_voc, tmp_path):
    monkeypatch.setattr(torch.nn.parallel, "DistributedDataParallel", Wrapper)
    model = network()
    with pytest.raises(RuntimeError, match="after amp.initialize"):
        apex.amp.initialize(Wrapper(model), sgd_of(model))
    ranks = TwoRanks(NPU, count=2)
    monkeypatch.setattr(train, "DistributedDataParallel", Wrapper)
    monkeypatch.setattr(train, "join_ranks", lambda args: ranks)
    monkeypatch.setattr(torch.distributed, "broadcast", lambda tensor, rank: None)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: None)
    tiny_train(drawn_voc, tmp_path, "--amp", "--opt_level", "O2")
    made = Wrapper.made[-1]
    assert isinstance(made.module, train.WithLosses) and made.dtype is torch.float16  # so apex was there before
    assert made.settings == train.ddp_settings(NPU, ApexPrecision)
    assert skipped(tmp_path) == [0, 0, 0] and losses(tmp_path)[2] < losses(tmp_path)[0]


def varied(backbone="tiny"):
    """A network that is not trained but answers otherwise from pixel to pixel, on the NPU."""
    torch.manual_seed(0)
    model = FCN8s(21, backbone)
    for name, parameter in model.named_parameters():
        if "score_" in name or "conv_seg" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return place(model, NPU)


@pytest.mark.parametrize("opt_level", ("O1", "O2", "O3"))
def test_training_with_apex_evaluates_the_network_that_evaluate_py_would(opt_level):
    """In float32, though apex casts in training; the logits are equal to the bit."""
    precision, model = choose_precision(NPU, True, opt_level), varied()
    model, _ = precision.wrap(model, fused_sgd(list(model.parameters()), NPU, precision, **SETTINGS))
    images = torch.randn(1, 3, 64, 96).to(NPU)
    model.eval()
    theirs = FCN8s(21, "tiny").eval()
    theirs.load_state_dict({key: value.cpu().float() for key, value in model.state_dict().items()})
    with torch.no_grad():
        with precision.evaluated(model) as scored:
            ours = scored.eval()(images)["out"]
        with torch.autocast("npu", enabled=False):
            expected = theirs.to(NPU)(images)["out"]
        assert torch.equal(ours.cpu(), expected.cpu())
        assert not torch.equal(model(images)["out"].float().cpu(), expected.cpu())  # casts as before


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


def test_a_step_copies_nothing_but_the_batch_to_the_device(monkeypatch, drawn_voc, tmp_path):
    """Constants are there since the first one. The log and the evaluation at the end may wait."""
    rates, seen = train.learning_rate, []

    def learning_rate(*arguments):  # asked once in each iteration, and for the log line at the end
        seen.append(list(software_npu.waits))
        software_npu.waits.clear()
        return rates(*arguments)
    monkeypatch.setattr(train, "learning_rate", learning_rate)
    tiny_train(drawn_voc, tmp_path, "--max_iters", 5, "--log_interval", 5)
    assert len(seen) == 6
    for waits in seen[2:5]:
        # GradScaler waits once, as torch_npu's fused SGD does not skip a step by itself.
        assert sorted(waits) == ["aten::_local_scalar_dense"] + 4 * ["to npu:0"]


def score(model, count):
    """The confusion matrix of as many equal images."""
    data = [(torch.arange(6000, dtype=torch.int64).remainder(251).byte().view(3, 40, 50),
             torch.ones(40, 50, dtype=torch.uint8))] * count
    protocol, ranks = Protocol((64, 32)), Ranks(NPU)
    return evaluate(model, val_batches(data, [(40, 50)] * count, protocol, 0, ranks), protocol, ranks, total=count)


def test_evaluation_waits_for_the_device_no_more_for_more_images():
    model = varied()

    def waits(count):
        software_npu.waits.clear()
        confusion = score(model, count)
        assert confusion[1].sum() == confusion.sum() == count * 40 * 50
        return [what for what in software_npu.waits if what != "to npu:0"]
    assert waits(10) == waits(1) != []


def test_evaluation_runs_images_together(monkeypatch):
    seen, predict = [], inference.predict
    monkeypatch.setattr(inference, "predict", lambda model, images, protocol: (
        seen.append(len(images)), predict(model, images, protocol))[1])
    score(varied(), 10)
    assert seen == [8, 2]


def test_evaluation_is_in_float32_and_training_in_hf32(monkeypatch, drawn_voc, tmp_path):
    seen, forward = {}, FCN8s.forward

    def recording(self, *arguments):
        seen.setdefault(self.training, set()).add(torch.npu.conv.allow_hf32)
        return forward(self, *arguments)
    monkeypatch.setattr(FCN8s, "forward", recording)
    tiny_train(drawn_voc, tmp_path, "--max_iters", 1)
    assert seen == {True: {True}, False: {False}} and torch.npu.conv.allow_hf32


def test_a_model_on_the_cpu_fails():
    model = network("cpu")
    with pytest.raises(RuntimeError, match="expected it on an NPU"):
        apex.amp.initialize(model, sgd_of(model))


def test_backward_outside_scale_loss_fails():
    model = network()
    model, optimizer = apex.amp.initialize(model, sgd_of(model), loss_scale=128.0)
    loss_of(model).backward()
    with pytest.raises(RuntimeError, match="without a backward inside"):
        optimizer.step()
    with pytest.raises(RuntimeError, match="no backward of the scaled loss"):
        with apex.amp.scale_loss(loss_of(model), optimizer):
            loss_of(model).backward()


def test_weights_changed_without_the_master_weights_fail():
    model = network()
    model, optimizer = apex.amp.initialize(model, sgd_of(model), opt_level="O2", loss_scale=128.0)
    optimizer.zero_grad()
    with torch.no_grad():
        model[0].weight.mul_(2)
    with pytest.raises(RuntimeError, match="not its master weights"):
        with apex.amp.scale_loss(loss_of(model), optimizer) as scaled:
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
    for ours, theirs in zip(apex.amp.master_params(optimizer), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.float().cpu(), theirs.cpu(), rtol=0.05, atol=0.005)
    assert precision.scale() == (128.0 if loss_scale == 128.0 else 2.0 ** 14)  # halved twice


def test_the_fused_optimizer_of_torch_npu():
    precision = choose_precision(NPU)
    assert type(fused_sgd(list(network().parameters()), NPU, precision, **SETTINGS)) is torch_npu.optim.NpuFusedSGD
