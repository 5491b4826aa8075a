"""export.py: the ONNX file is the network, at any size or at one; what is missing is said, and nothing left behind."""
import re
import shutil
import sys
from unittest import mock

import numpy as np
import onnx
import pytest
import torch
from conftest import ROOT, error_line, run, untrained_checkpoint
from PIL import Image

from export import WithPreparation, as_onnx, onnx_difference
from fcn8s import BACKBONES, Backbone, FCN8s, ResNet
from transforms import prepare
from voc import CLASSES
from weights import Checkpoint

EXPORT = ROOT / "export.py"
ANIMALS = ("ground", "猫", "sheep dog", "owl")


def onnx_logits(path, images):
    import onnxruntime
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert session.get_modelmeta().custom_metadata_map["classes"].split("\n") == list(ANIMALS)
    return session.run(None, {"images": images.numpy()})[0]


class ResNet14D8(ResNet):
    """Each kind of layer of resnet50_d8."""

    def __init__(self):
        super().__init__((1, 1, 1, 2), deep_stem=True, dilated=True)


@pytest.mark.parametrize("backbone, size", [("tiny", None), ("resnet14_d8", None), ("tiny", (40, 56))])
def test_an_exported_network_is_the_network(tmp_path, monkeypatch, backbone, size):
    """At sizes it was not checked at, where it takes any."""
    monkeypatch.setitem(BACKBONES, "resnet14_d8", Backbone(ResNet14D8))
    torch.manual_seed(0)
    model = FCN8s(4, backbone)
    for parameter in model.decode_head.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    torch.save({"state_dict": model.state_dict(), "meta": {"backbone": backbone, "classes": ANIMALS}},
               tmp_path / "net.pth")
    done = run(EXPORT, tmp_path / "net.pth", tmp_path / "net.onnx", *(("--size", *size) if size else ()))
    assert "ONNX Runtime agrees with PyTorch" in done.stdout and done.stderr == ""
    axes = onnx.load(tmp_path / "net.onnx").graph.output[0].type.tensor_type.shape.dim
    assert [axis.dim_param or axis.dim_value for axis in axes] == (
        [1, 4, *size] if size else ["batch", 4, "height", "width"])
    for shape in ((1, 3, *size),) if size else ((1, 3, 71, 90), (3, 3, 1, 8)):
        images = torch.randint(0, 256, shape).float()
        with torch.no_grad():
            expected = model.eval()(prepare(images.byte().permute(0, 2, 3, 1)))["out"]
        assert expected.abs().max() > 1e-3
        np.testing.assert_allclose(onnx_logits(tmp_path / "net.onnx", images), expected, rtol=1e-4,
                                   atol=1e-4 * float(expected.abs().max()))
    if size:
        with pytest.raises(Exception, match="[Dd]imension"):
            onnx_logits(tmp_path / "net.onnx", torch.zeros(1, 3, 64, 64))


def test_the_difference_is_relative_to_the_largest_logit_however_small_that_is():
    torch.manual_seed(0)
    network = WithPreparation(FCN8s(3, "tiny")).eval()
    score = network.model.decode_head.score_fr
    torch.nn.init.normal_(score.weight, std=1e-4)
    content = as_onnx(network, {}, (1, 32, 40), dynamic=False)
    assert onnx_difference(network, content, (1, 32, 40)) < 1e-4
    with torch.no_grad():
        score.weight *= 1.25
        score.bias *= 1.25
    assert onnx_difference(network, content, (1, 32, 40)) == pytest.approx(0.2, abs=1e-3)


@pytest.mark.parametrize("portrait", (False, True))
def test_the_lines_of_the_page_label_a_photograph_as_predict_does(real_voc, tmp_path, monkeypatch, portrait):
    """With the metadata alone: every pixel, and the colours, of a real photograph."""
    ids = (real_voc / "ImageSets/Segmentation/val.txt").read_text().split()
    photographs = [real_voc / f"JPEGImages/{image_id}.jpg" for image_id in ids]
    photograph = next(path for path in photographs if (Image.open(path).height > Image.open(path).width) == portrait)
    shutil.copy(photograph, tmp_path / "photo.jpg")
    checkpoint = untrained_checkpoint(tmp_path / "net.pth", CLASSES)  # its scale is 96 x 64
    run(EXPORT, checkpoint, tmp_path / "model.onnx")
    run(ROOT / "predict.py", checkpoint, tmp_path / "photo.jpg", "--save_dir", tmp_path / "out", "--device", "cpu")
    *_, lines = re.findall(r"```python\n(.*?)```", (ROOT / "docs/evaluation.md").read_text(), re.S)
    monkeypatch.chdir(tmp_path)
    exec(lines, {})
    ours, theirs = Image.open("labels.png"), Image.open("out/photo.png")
    assert np.array_equal(ours, theirs) and len(np.unique(ours)) > 3
    assert np.array_equal(ours.convert("RGB"), theirs.convert("RGB"))


def test_the_metadata_say_how_the_network_takes_an_image(tmp_path):
    """torchfcn's form of vgg16 takes BGR and divides by nothing; a padding is that of the training's evaluation."""
    import export
    checkpoint = Checkpoint.read(untrained_checkpoint(tmp_path / "net.pth", ANIMALS))
    found = export.metadata(checkpoint)
    assert found == {"classes": "\n".join(ANIMALS), "scale": "96 64",
                     "colours": "200 0 5\n200 10 5\n200 20 5\n200 30 5",
                     "mean": "123.675 116.28 103.53", "std": "58.395 57.12 57.375", "channels": "RGB", "pad_to": ""}
    checkpoint.meta["args"] = {"pad_to": 96}
    del checkpoint.meta["scale"]
    checkpoint.form = "padded"
    found = export.metadata(checkpoint)
    assert (found["mean"], found["std"]) == ("104.00699 116.66877 122.67892", "1 1 1")
    assert (found["channels"], found["scale"], found["pad_to"]) == ("BGR", "", "96")


def test_an_export_says_what_is_missing_and_leaves_nothing(tmp_path, monkeypatch):
    checkpoint = untrained_checkpoint(tmp_path / "net.pth", ANIMALS)
    assert "absent/net.onnx: cannot be written to (No such file or directory); name a file" in error_line(
        EXPORT, checkpoint, tmp_path / "absent/net.onnx")
    assert "FILE would overwrite this file" in error_line(EXPORT, checkpoint, checkpoint)
    assert "takes a value, not ''" in error_line(EXPORT, checkpoint, "", status=2)
    assert "at least 1 and at most 16384, not '0'" in error_line(
        EXPORT, checkpoint, tmp_path / "net.onnx", "--size", 0, 8, status=2)
    with monkeypatch.context() as patch:
        patch.setattr(torch.onnx, "export", mock.Mock(side_effect=MemoryError))
        assert "memory ran out (MemoryError); take a smaller --size" in error_line(
            EXPORT, checkpoint, tmp_path / "net.onnx", "--size", 512, 512)
    for package in ("onnx", "tensorboard"):
        monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    assert "pip install onnx" in error_line(EXPORT, checkpoint, tmp_path / "net.onnx")
    assert "pip install tensorboard" in error_line(
        ROOT / "train.py", "--data_path", tmp_path, "--tensorboard", status=2)
    assert [path.name for path in tmp_path.iterdir()] == ["net.pth"]
