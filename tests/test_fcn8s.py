"""fcn8s.py: shapes, sizes, the features held against torchvision's networks."""
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from fcn8s import BACKBONES, Backbone, FCN8s, ResNet, SkipHead, bilinear_upsampling
from transforms import prepare


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


def test_auxiliary_logits_in_training_only_and_only_from_d8(models):
    for model in models.values():
        outputs = model.train()(torch.randn(2, 3, 33, 40))
        assert set(outputs) == ({"out", "aux"} if max(model.backbone.strides) == 8 else {"out"})
        assert all(logits.shape == (2, 21, 33, 40) for logits in outputs.values())


def test_parameters_and_names_are_the_references(models):
    model = models["resnet50_d8"]
    assert sum(p.numel() for p in model.parameters()) == 49_499_274
    assert sum(p.numel() for n, p in model.named_parameters() if not n.startswith("auxiliary_head")) == 47_134_069
    names = set(model.state_dict())
    assert {"backbone.stem.0.weight", "backbone.stem.7.running_var", "backbone.layer1.0.downsample.1.weight",
            "backbone.layer4.2.bn3.bias", "decode_head.convs.1.conv.weight", "decode_head.conv_cat.bn.weight",
            "decode_head.conv_seg.bias", "auxiliary_head.convs.0.conv.weight"} <= names


@pytest.mark.parametrize("strides", ((4, 8, 16), (8, 16, 16), (16, 16, 16)))
def test_strides_without_a_head_are_refused(monkeypatch, strides):
    network = type("Network", (nn.Module,), {"channels": (8, 8, 16), "strides": strides})
    monkeypatch.setitem(BACKBONES, "odd", Backbone(network))
    with pytest.raises(ValueError, match="odd: has strides .*; the heads take 8, 16, 32 or 8, 8, 8"):
        FCN8s(5, "odd")


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


def test_the_original_releases_input_is_bgr_less_its_mean():
    images = torch.tensor([10, 20, 30], dtype=torch.uint8)[None, None, None]
    expected = torch.tensor([[30 - 104.00699, 20 - 116.66877, 10 - 122.67892]])
    torch.testing.assert_close(prepare(images, "padded")[:, :, 0, 0], expected)
