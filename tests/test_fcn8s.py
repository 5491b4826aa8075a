"""fcn8s.py: shapes, sizes, the features held against torchvision's networks, weights to start from."""
import hashlib
import http.server
import os
import subprocess
import sys
import threading

import numpy
import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import ROOT, error_line, run, train_flags
from torch import nn

import cli
import voc
from fcn8s import (BACKBONES, FCN8s, ResNet, SkipHead, WeightsError, bilinear_upsampling, load_weights, model_from_file,
                   read_checkpoint)


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(0)
    return {name: FCN8s(21, name) for name in BACKBONES}


@pytest.mark.parametrize("name", BACKBONES)
def test_any_input_size_gives_an_output_of_that_size(models, name):
    model = models[name].eval()
    for size in ((1, 1), (1, 40), (33, 2), (31, 65), (64, 48)):
        with torch.no_grad():
            outputs = model(torch.randn(1, 3, *size))
        assert set(outputs) == {"out"} and outputs["out"].shape == (1, 21, *size)


def test_the_command_lines_offer_these_backbones():
    assert cli.BACKBONES == BACKBONES


def test_auxiliary_logits_in_training_only_and_only_from_d8(models):
    for name, model in models.items():
        outputs = model.train()(torch.randn(2, 3, 33, 40))
        assert set(outputs) == ({"out", "aux"} if name.endswith("_d8") else {"out"})
        assert all(logits.shape == (2, 21, 33, 40) for logits in outputs.values())


def test_parameters_and_names_are_the_references(models):
    model = models["resnet50_d8"]
    assert sum(p.numel() for p in model.parameters()) == 49_499_274
    assert sum(p.numel() for n, p in model.named_parameters() if not n.startswith("auxiliary_head")) == 47_134_069
    names = set(model.state_dict())
    assert {"backbone.stem.0.weight", "backbone.stem.7.running_var", "backbone.layer1.0.downsample.1.weight",
            "backbone.layer4.2.bn3.bias", "decode_head.convs.1.conv.weight", "decode_head.conv_cat.bn.weight",
            "decode_head.conv_seg.bias", "auxiliary_head.convs.0.conv.weight"} <= names


def test_dilated_stages_and_their_strides(models):
    dilations = [[block.conv2.dilation[0] for block in getattr(models["resnet50_d8"].backbone, f"layer{i}")]
                 for i in (1, 2, 3, 4)]
    assert dilations == [[1] * 3, [1] * 4, [1, 2, 2, 2, 2, 2], [2, 4, 4]]
    features = models["resnet50_d8"].backbone(torch.randn(1, 3, 64, 64))
    assert [tuple(f.shape[1:]) for f in features] == [(512, 8, 8), (1024, 8, 8), (2048, 8, 8)]


def shake(model):
    """Random BN statistics and scales, so that a mix-up of two layers shows."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in ((module.weight, 0.5, 1.5), (module.bias, -0.5, 0.5),
                                      (module.running_mean, -0.5, 0.5), (module.running_var, 0.5, 1.5)):
                nn.init.uniform_(tensor, low, high)
    return model.eval()


@pytest.mark.parametrize("dilated", (False, True))
def test_resnet_features_equal_torchvisions(dilated):
    """With its weights under the same names; torchvision dilates by the same rule."""
    peer = shake(torchvision.models.resnet50(replace_stride_with_dilation=[False, dilated, dilated]))
    ours = ResNet(blocks=(3, 4, 6, 3), dilated=dilated).eval()
    ours.load_state_dict({key: value for key, value in peer.state_dict().items() if not key.startswith("fc.")})
    images = torch.randn(2, 3, 61, 45)
    with torch.no_grad():
        expected = [peer.layer2(peer.layer1(peer.maxpool(peer.relu(peer.bn1(peer.conv1(images))))))]
        expected.append(peer.layer3(expected[0]))
        expected.append(peer.layer4(expected[1]))
        for a, b in zip(ours(images), expected, strict=True):
            torch.testing.assert_close(a, b)


def test_fixed_upsampling_is_bilinear_and_takes_no_gradient():
    for factor in (2, 8):
        layer = bilinear_upsampling(3, factor)
        x = torch.randn(1, 3, 5, 7)
        expected = F.interpolate(x, scale_factor=factor, mode="bilinear", align_corners=False)
        inner = slice(factor, -factor)  # at the border one fades out, the other repeats the edge
        torch.testing.assert_close(layer(x)[..., inner, inner], expected[..., inner, inner])
        assert not layer.weight.requires_grad and "weight" in layer.state_dict()


def test_skip_head_adds_three_scores_in_place():
    """Scores that are a ramp across the picture, at three strides: the sum, upsampled, is the sum of the ramps."""
    head = SkipHead((1, 1, 1), 1)
    for score in (head.score_pool3, head.score_pool4, head.score_fr):
        nn.init.ones_(score.weight)
    size = (160, 224)
    ramp = torch.arange(size[1]).expand(1, 1, *size).float()
    features = [F.avg_pool2d(ramp, stride) for stride in (8, 16, 32)]
    out = head(features, size)
    torch.testing.assert_close(out[..., 64:96, 64:-64], 3 * ramp[..., 64:96, 64:-64])


# ---- weights to start from

def fake_imagenet(name):
    """Weights of a torchvision classifier, as they are published: random here."""
    torch.manual_seed(1)
    return {"vgg16": torchvision.models.vgg16, "resnet50": torchvision.models.resnet50}[name](num_classes=10)


def test_vggs_linear_layers_become_fc6_and_fc7(models, tmp_path):
    """On a 224x224 image, the middle of fc7's map and torchvision's second linear layer see the same."""
    peer = fake_imagenet("vgg16").eval()
    torch.save(peer.state_dict(), tmp_path / "vgg16.pth")
    model = models["vgg16"]
    assert "ImageNet" in load_weights(model, tmp_path / "vgg16.pth").origin
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        expected = peer.classifier[:5](peer.features(images).flatten(1))  # fc6, ReLU, dropout, fc7, ReLU
        fc7 = model.eval().backbone(images)[-1]
    torch.testing.assert_close(fc7[0, :, 3, 3], expected[0], atol=1e-4, rtol=1e-4)


def test_a_classifier_of_another_kind_is_refused_by_its_keys(models, tmp_path):
    torch.save(fake_imagenet("resnet50").state_dict(), tmp_path / "resnet50.pth")
    assert "ImageNet" in load_weights(models["resnet50"], tmp_path / "resnet50.pth").origin
    for name, key in (("resnet50_d8", "stem.0.weight is missing"), ("vgg16", "does not fit vgg16")):
        with pytest.raises(WeightsError, match=key):
            load_weights(models[name], tmp_path / "resnet50.pth")


class Silent(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.mark.parametrize("name", ("resnet50_d8", "resnet50"))
def test_imagenet_weights_are_downloaded_verified_and_loaded(models, name, tmp_path):
    """The real download code, against a server of our own that has files of the published names."""
    if name == "resnet50":
        state = fake_imagenet(name).state_dict()
    else:
        state = {"state_dict": {key.removeprefix("backbone."): value for key, value in models[name].state_dict().items()
                                if key.startswith("backbone.")}}
    torch.save(state, tmp_path / "weights")
    digest = hashlib.sha256((tmp_path / "weights").read_bytes()).hexdigest()[:8]
    file = (tmp_path / "weights").rename(tmp_path / f"{name}-{digest}.pth")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), lambda *args: Silent(*args, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def load(url):
        return run("-c", f"""
import fcn8s, torch
fcn8s.IMAGENET_URLS["resnet50_d8"] = "{url}"
if "{name}" == "resnet50":
    from torchvision.models._api import Weights, WeightsEnum
    class Published(WeightsEnum):
        V1 = Weights("{url}", None, {{}})
    fcn8s.torchvision_weights = lambda name: Published.V1
model = fcn8s.FCN8s(21, "{name}")
try:
    fcn8s.load_imagenet(model)
    print(model.backbone.layer3[1].conv2.weight.double().sum().item())
except fcn8s.WeightsError as error:
    print(error)
""", env={"TORCH_HOME": str(tmp_path / "hub")}).stdout.strip().splitlines()[-1]

    weights = state.get("state_dict", state)["layer3.1.conv2.weight"]
    address = f"http://127.0.0.1:{server.server_port}"
    assert float(load(f"{address}/{file.name}")) == pytest.approx(weights.double().sum().item())
    os.rename(file, tmp_path / f"{name}-00000000.pth")
    assert "damaged" in load(f"{address}/{name}-00000000.pth")  # the hash in the name is not the file's
    server.shutdown()
    server.server_close()
    assert "--pretrained none" in load(f"{address}/again-{digest}.pth")


def test_no_network_is_one_line_and_leaves_no_folder(drawn_voc, tmp_path):
    done = run(ROOT / "train.py", *train_flags(drawn_voc, tmp_path / "run"), "--pretrained", "imagenet", status=1,
               env={"TORCH_HOME": str(tmp_path / "hub"), "https_proxy": "http://127.0.0.1:9"})
    line, = [line for line in done.stderr.splitlines() if not line.startswith("Downloading: ")]  # PyTorch 2.6 adds that
    assert "cannot be downloaded" in line and "--pretrained none" in line and not (tmp_path / "run").exists()


def test_a_torchvision_that_does_not_match_torch_is_explained(drawn_voc, tmp_path):
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    line = error_line(ROOT / "train.py", *train_flags(drawn_voc, tmp_path / "run"), "--pretrained", "imagenet",
                      env={"PYTHONPATH": str(tmp_path)})
    assert "torchvision::nms" in line and torch.__version__ in line


# ---- files

def test_another_number_of_classes_gives_its_backbone_and_says_so(models, tmp_path):
    donor = FCN8s(19, "resnet50")
    torch.save({"state_dict": donor.state_dict(), "meta": {"backbone": "resnet50", "num_classes": 19}},
               tmp_path / "19.pth")
    model = FCN8s(21, "resnet50")
    head = model.decode_head.score_fr.weight.clone()
    assert "19 classes" in load_weights(model, tmp_path / "19.pth").origin
    assert torch.equal(model.backbone.conv1.weight, donor.backbone.conv1.weight)
    assert torch.equal(model.decode_head.score_fr.weight, head)


def test_another_backbone_is_refused(models, tmp_path):
    torch.save({"state_dict": models["vgg16"].state_dict(), "meta": {"backbone": "vgg16", "num_classes": 21}},
               tmp_path / "vgg.pth")
    with pytest.raises(WeightsError, match="--backbone vgg16"):
        load_weights(models["resnet50"], tmp_path / "vgg.pth")


class Payload:
    def __reduce__(self):
        return os.system, ("touch pwned",)


def test_a_file_that_wants_to_run_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {}, "meta": Payload()}, "evil.pth")
    with pytest.raises(WeightsError, match="refused.*could run code") as caught:
        read_checkpoint("evil.pth")
    assert not (tmp_path / "pwned").exists() and "\n" not in str(caught.value)


def test_the_command_that_an_error_names_makes_a_plain_file(models, tmp_path, monkeypatch):
    """mmengine's checkpoints hold objects of its own, beside the weights."""
    monkeypatch.chdir(tmp_path)
    import argparse
    torch.save({"state_dict": models["resnet50_d8"].state_dict(), "message_hub": argparse.Namespace()}, "mm.pth")
    with pytest.raises(WeightsError, match="refused") as caught:
        read_checkpoint("mm.pth")
    command = str(caught.value).split("make a plain one: ")[1]
    subprocess.run(command.replace("python", sys.executable, 1), shell=True, check=True)
    assert "mmsegmentation" in load_weights(FCN8s(21, "resnet50_d8"), "mm.pth.plain.pth").origin


def test_the_plain_file_of_torchfcns_trainer_keeps_what_tells_its_form(tmp_path, monkeypatch):
    """Its checkpoints hold a NumPy number, and the class's name under `arch`."""
    monkeypatch.chdir(tmp_path)
    state = {key.split(".", 1)[1]: value for key, value in FCN8s(21, "vgg16").state_dict().items()}
    torch.save({"epoch": 1, "arch": "FCN8sAtOnce", "model_state_dict": state, "best_mean_iu": numpy.float64(0.5)},
               "t.pth")
    with pytest.raises(WeightsError, match="refused") as caught:
        read_checkpoint("t.pth")
    command = str(caught.value).split("make a plain one: ")[1]
    subprocess.run(command.replace("python", sys.executable, 1), shell=True, check=True)
    assert load_weights(FCN8s(21, "vgg16"), "t.pth.plain.pth").form == "at_once"


def test_published_models_go_by_their_name(models, tmp_path):
    """From a folder of ours that has a file of that kind: hash in the name, mmsegmentation's keys, its meta."""
    torch.save({"meta": {"CLASSES": ("a",), "PALETTE": [[0, 0, 0]]}, "state_dict": models["resnet50_d8"].state_dict()},
               tmp_path / "weights")
    digest = hashlib.sha256((tmp_path / "weights").read_bytes()).hexdigest()[:8]
    file = (tmp_path / "weights").rename(tmp_path / f"fcn_r50-d8_voc-{digest}.pth")
    output = run("-c", f"""
import fcn8s
assert fcn8s.VOC_URLS["resnet50_d8_voc"].endswith("-52dc5306.pth")
assert fcn8s.VOC_URLS["resnet101_d8_voc"].endswith("-0bb4e798.pth")
fcn8s.VOC_URLS["resnet50_d8_voc"] = "file://{file}"
model, _ = fcn8s.model_from_file("resnet50_d8_voc")
print(model.backbone_name, model.num_classes, model.origin)
""", env={"TORCH_HOME": str(tmp_path / "hub")}).stdout
    assert "resnet50_d8 21 resnet50_d8_voc: a checkpoint of mmsegmentation" in output


def test_weights_of_the_original_release_switch_the_form(tmp_path):
    """torchfcn's names; at once is told by its trainer's `arch`, by the file's name, or by the flag."""
    model = FCN8s(21, "vgg16")
    state = {key.split(".", 1)[1]: value for key, value in model.state_dict().items()}
    torch.save(state, tmp_path / "fcn8s_from_caffe.pth")
    torch.save({"model_state_dict": state, "arch": "FCN8sAtOnce"}, tmp_path / "trained.pth")
    for name, flag, form in (("fcn8s_from_caffe.pth", False, "padded"), ("fcn8s_from_caffe.pth", True, "at_once"),
                             ("trained.pth", False, "at_once")):
        assert load_weights(model, tmp_path / name, at_once=flag).form == form
        assert model.eval()(torch.randn(1, 3, 20, 33))["out"].shape == (1, 21, 20, 33)
    (tmp_path / "fcn8s_from_caffe.pth").rename(tmp_path / "fcn8s-atonce_from_caffe.pth")
    assert load_weights(model, tmp_path / "fcn8s-atonce_from_caffe.pth").form == "at_once"
    with pytest.raises(WeightsError, match="--backbone vgg16"):
        load_weights(FCN8s(21, "resnet50"), tmp_path / "trained.pth")


def test_fine_tuning_keeps_the_form_and_evaluate_uses_it(drawn_voc, tmp_path):
    state = {key.split(".", 1)[1]: value for key, value in FCN8s(21, "vgg16").state_dict().items()}
    torch.save(state, tmp_path / "fcn8s_from_caffe.pth")
    own_size = run(ROOT / "evaluate.py", tmp_path / "fcn8s_from_caffe.pth", "--backbone", "vgg16", "--data_path",
                   drawn_voc, "--device", "cpu", "--workers", 0, "--max_images", 2).stdout
    assert "padded form" in own_size and "of their own size" in own_size
    run(ROOT / "train.py", *train_flags(drawn_voc, tmp_path / "run"), "--backbone", "vgg16", "--max_iters", 1,
        "--pretrained", tmp_path / "fcn8s_from_caffe.pth")
    checkpoint = torch.load(tmp_path / "run/ckpt/latest.pth", weights_only=True)
    assert checkpoint["meta"]["form"] == "padded"


def test_the_original_releases_input_is_bgr_less_its_mean():
    images = torch.tensor([[10, 20, 30]], dtype=torch.uint8)[:, :, None, None]
    expected = torch.tensor([[30 - 104.00699, 20 - 116.66877, 10 - 122.67892]])
    torch.testing.assert_close(voc.prepare(images, "padded")[:, :, 0, 0], expected)


def test_an_incomplete_network_is_not_scored(models, tmp_path):
    state = models["resnet50_d8"].state_dict()
    torch.save({"state_dict": {key: value for key, value in state.items() if "conv_cat" not in key}},
               tmp_path / "a.pth")
    with pytest.raises(WeightsError, match="decode_head.conv_cat.conv.weight is missing"):
        model_from_file(tmp_path / "a.pth", "resnet50_d8")
    with pytest.raises(WeightsError, match="add --backbone"):
        model_from_file(tmp_path / "a.pth")
    torch.save({"state_dict": {key: value for key, value in state.items() if key.startswith("backbone.")}},
               tmp_path / "b.pth")
    assert "without heads" in load_weights(FCN8s(21, "resnet50_d8"), tmp_path / "b.pth").origin
    torch.save({"state_dict": {key: value for key, value in state.items() if not key.startswith("aux")}},
               tmp_path / "c.pth")
    model, _ = model_from_file(tmp_path / "c.pth", "resnet50_d8")
    assert model.auxiliary_head is None
    assert "auxiliary head starts afresh" in load_weights(FCN8s(21, "resnet50_d8"), tmp_path / "c.pth").origin


def test_half_a_head_is_an_error_that_names_the_key(models):
    state = models["resnet50_d8"].state_dict()
    model = FCN8s(21, "resnet50_d8")
    for spoiled, words in (({k: v for k, v in state.items() if k != "decode_head.conv_seg.weight"},
                            "decode_head.conv_seg.weight is missing"),
                           ({**FCN8s(19, "resnet50_d8").state_dict(), "decode_head.bogus": torch.ones(1)},
                            "decode_head.bogus is unexpected")):
        with pytest.raises(WeightsError, match=words):
            load_weights(model, {"state_dict": spoiled})
    names = {key.split(".", 1)[1]: value for key, value in models["vgg16"].state_dict().items()}
    vgg = FCN8s(21, "vgg16")
    with pytest.raises(WeightsError, match="decode_head.score_fr.weight is missing"):
        load_weights(vgg, {k: v for k, v in names.items() if k != "score_fr.weight"})
    assert load_weights(vgg, {k: v for k, v in names.items() if k.startswith(("conv", "fc"))}).form == "padded"
    with pytest.raises(WeightsError, match="which form"):
        load_weights(vgg, {"state_dict": models["vgg16"].state_dict()})


def test_a_truncated_or_foreign_file_is_named(models, tmp_path):
    torch.save(models["resnet50"].state_dict(), tmp_path / "whole.pth")
    content = (tmp_path / "whole.pth").read_bytes()
    for name, part in (("half", content[:len(content) // 2]), ("start", content[:100]), ("empty", b""),
                       ("text", b"hello\n")):
        (tmp_path / name).write_bytes(part)
        with pytest.raises(WeightsError, match=name) as caught:
            read_checkpoint(tmp_path / name)
        assert "\n" not in str(caught.value)
