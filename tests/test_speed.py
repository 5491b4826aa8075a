"""What is for speed and changes no result: images together, mixed precision, --compile; SyncBatchNorm."""
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, error_line, metrics, run, state, train, train_flags, untrained_checkpoint
from PIL import Image
from torch import nn

import inference
from amp import Precision, bn_layers, check_run
from cli import UserError
from device import Ranks
from fcn8s import FCN8s
from train import parse_args
from voc import VOC

CPU, CUDA = torch.device("cpu"), torch.device("cuda")  # no CUDA device is touched
CLASSES = [f"class {number}" for number in range(21)]


def test_images_run_together_on_an_accelerator():
    assert [inference.Protocol(None).batch_on(device) for device in (CPU, CUDA)] == [1, inference.TOGETHER]
    assert inference.Protocol(None, batch_size=3).batch_on(CUDA) == 3


def test_mixed_precision_is_for_evaluate_and_predict(drawn_voc, tmp_path):
    checkpoint = untrained_checkpoint(tmp_path / "network.pth", CLASSES)
    for flags, words in (((), "threads), float32\n"), (("--amp",), "threads), bfloat16\n")):
        where = ("--device", "cpu", "--save_dir", tmp_path / f"pictures{len(flags)}", *flags)
        assert words in run(ROOT / "predict.py", checkpoint, drawn_voc / "JPEGImages", *where).stdout
        assert words in run(ROOT / "evaluate.py", checkpoint, "--data_path", drawn_voc, *where).stdout
    name = f"{VOC(drawn_voc, 'val').ids[0]}.png"
    plain, mixed = (np.asarray(Image.open(tmp_path / folder / name)) for folder in ("pictures0", "pictures1"))
    assert 0 < (plain != mixed).mean() < 0.1


def test_synchronised_bn_has_the_keys_of_bn_and_evaluates_alike():
    torch.manual_seed(0)
    model = FCN8s(21, "tiny").eval()
    for layer in bn_layers(model):
        layer.running_var.uniform_(0.5, 2)
        for values in (layer.running_mean, layer.weight.data, layer.bias.data):
            values.normal_(0.5)
    for name, parameter in model.named_parameters():
        if "score_" in name:
            nn.init.normal_(parameter, std=0.1)
    plain, images = model.state_dict(), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = model(images)["out"]
        synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        assert {type(layer) for layer in bn_layers(synchronised)} == {nn.SyncBatchNorm}
        assert synchronised.state_dict().keys() == plain.keys() == FCN8s(21, "tiny").state_dict().keys()
        assert torch.equal(synchronised(images)["out"], expected)


def test_synchronised_bn_is_for_several_cards(drawn_voc, tmp_path):
    flags = (*train_flags(drawn_voc, tmp_path / "run"), "--sync_bn")
    refused = "--sync_bn is for several NPUs or GPUs, and for a backbone with BN"
    assert refused in error_line(ROOT / "train.py", *flags)
    assert not (tmp_path / "run").exists()

    def problem(ranks, *more):
        args = parse_args(["--data_path", "unused", "--backbone", "tiny", "--sync_bn", *more])
        with pytest.raises(UserError) as caught:
            check_run(args, ranks, Precision(CPU), FCN8s(21, args.backbone), CLASSES)
        return str(caught.value)
    npu = SimpleNamespace(type="npu")
    assert refused in problem(Ranks(npu)) and refused in problem(Ranks(npu, count=2), "--backbone", "tiny_plain")
    assert "--compile does not go with --sync_bn" in problem(Ranks(npu, count=2), "--compile")


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++ on a CPU")
def test_a_compiled_run_has_the_losses_of_the_plain_one(drawn_voc, tmp_path):
    """Resumed from a plain run; the checkpoint has the plain network's keys."""
    flags = ("--max_iters", 3, "--checkpoint_interval", 1)
    train(drawn_voc, tmp_path / "plain", *flags)
    result = train(drawn_voc, tmp_path / "compiled", *flags, "--compile", "--resume",
                   tmp_path / "plain/ckpt/iter_1.pth", real=True)
    output = result.stdout + result.stderr
    assert "Warning" not in output and "float32, compiled\n" in output and "--compile False -> True" in output
    plain, compiled = (metrics(tmp_path / name) for name in ("plain", "compiled"))
    assert [line["loss"] for line in compiled if "loss" in line] == pytest.approx(
        [line["loss"] for line in plain if "loss" in line][1:], rel=1e-5)
    assert compiled[-1]["mIoU"] == pytest.approx(plain[-1]["mIoU"], abs=0.1)
    keys = [state(tmp_path / name / "ckpt/latest.pth")["state_dict"].keys() for name in ("plain", "compiled")]
    assert keys[0] == keys[1]
