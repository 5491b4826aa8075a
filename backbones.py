"""The table of backbones. It imports no PyTorch, so that `--help` lists them at once.

To add a backbone, write its class (see `fcn8s.ResNet` for what it must offer) and add a line to BACKBONES.
"""
import dataclasses
import importlib

OPENMMLAB = "https://download.openmmlab.com/pretrain/third_party/"
MMSEG = "https://download.openmmlab.com/mmsegmentation/v0.5/fcn/"
R50_VOC, R101_VOC = "fcn_r50-d8_512x512_20k_voc12aug", "fcn_r101-d8_512x512_20k_voc12aug"


@dataclasses.dataclass(frozen=True)
class Backbone:
    """A line of the table.

    network: "module.Class" of the backbone
    imagenet: where its ImageNet weights are: a URL, whose file name ends in the first 8 digits of the file's SHA-256,
        or the name of a torchvision weights enum, say "ResNet50_Weights.IMAGENET1K_V1"; None: there are none
    voc: the URL of a whole network trained on VOC 2012 + SBD, which goes by the name "<backbone>_voc"; or None
    lr: the default learning rate
    """
    network: str
    imagenet: str | None = None
    voc: str | None = None
    lr: float = 1e-2


BACKBONES = {
    "resnet50_d8": Backbone("fcn8s.ResNet50D8", OPENMMLAB + "resnet50_v1c-2cccc1ad.pth",
                            f"{MMSEG}{R50_VOC}/{R50_VOC}_20200617_010715-52dc5306.pth"),
    "resnet101_d8": Backbone("fcn8s.ResNet101D8", OPENMMLAB + "resnet101_v1c-e67eebb6.pth",
                             f"{MMSEG}{R101_VOC}/{R101_VOC}_20200617_010842-0bb4e798.pth"),
    "resnet50": Backbone("fcn8s.ResNet50", "ResNet50_Weights.IMAGENET1K_V1"),
    "vgg16": Backbone("fcn8s.VGG16", "VGG16_Weights.IMAGENET1K_V1", lr=1e-3),  # without BN, 1e-2 is too high
}
DEFAULT_BACKBONE = "resnet50_d8"
VOC_SUFFIX = "_voc"


def published():
    """{name: (backbone, URL)} of the networks trained on VOC, which every command takes in place of a checkpoint."""
    return {name + VOC_SUFFIX: (name, line.voc) for name, line in BACKBONES.items() if line.voc}


def backbone_class(name):
    """The class of a backbone in the table. Imports its module, and so PyTorch."""
    module, _, attribute = BACKBONES[name].network.rpartition(".")
    return getattr(importlib.import_module(module), attribute)
