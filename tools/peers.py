"""The peers that the project is compared with, mmsegmentation 1.2.2 and torchfcn: networks, losses and pipeline."""
import importlib.util
import sys
import types

import torch

DEPTHS = {"resnet50_d8": 50, "resnet101_d8": 101}


def installed():
    """Whether both are there; if so, makes them ready to import."""
    if not all(importlib.util.find_spec(name) for name in ("mmseg", "torchfcn")):
        return False
    for name in ("mmcv._ext", "fcn", "pytz", "skimage", "skimage.io"):  # for what is not called here
        stub(name)
    import mmseg.models  # noqa: F401, fills the registry
    return True


def stub(name):
    """An empty module in place of one that the peers import but do not need here; whatever is called in it raises."""
    module = types.ModuleType(name)

    def absent(attribute):
        if attribute.startswith("__"):
            raise AttributeError(attribute)

        def call(*args, **kwargs):
            raise NotImplementedError(f"{name}.{attribute} was called")
        return call
    module.__getattr__ = absent
    sys.modules.setdefault(name, module)


def mmseg_model(backbone, **test_cfg):
    """mmsegmentation's configs/_base_/models/fcn_r50-d8.py, with plain BN, random weights, and no dropout."""
    from mmengine import ConfigDict
    from mmseg.registry import MODELS
    norm = {"type": "BN", "requires_grad": True}
    head = {"type": "FCNHead", "dropout_ratio": 0, "num_classes": 21, "norm_cfg": norm, "align_corners": False}
    torch.manual_seed(0)
    return MODELS.build(ConfigDict({
        "type": "EncoderDecoder", "data_preprocessor": None, "train_cfg": {}, "test_cfg": test_cfg or {"mode": "whole"},
        "backbone": {"type": "ResNetV1c", "depth": DEPTHS[backbone], "num_stages": 4, "out_indices": (0, 1, 2, 3),
                     "dilations": (1, 1, 2, 4), "strides": (1, 2, 1, 1), "norm_cfg": norm, "norm_eval": False,
                     "style": "pytorch", "contract_dilation": True},
        "decode_head": {**head, "in_channels": 2048, "in_index": 3, "channels": 512, "num_convs": 2,
                        "concat_input": True,
                        "loss_decode": {"type": "CrossEntropyLoss", "use_sigmoid": False, "loss_weight": 1.0}},
        "auxiliary_head": {**head, "in_channels": 1024, "in_index": 2, "channels": 256, "num_convs": 1,
                           "concat_input": False,
                           "loss_decode": {"type": "CrossEntropyLoss", "use_sigmoid": False, "loss_weight": 0.4}}}))


def mmseg_loss(model, images, labels):
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample
    samples = []
    for label in labels:
        sample = SegDataSample()
        sample.gt_sem_seg = PixelData(data=label[None].long())
        samples.append(sample)
    losses = model.loss(images, samples)
    return sum(value for name, value in losses.items() if "loss" in name)


def mmseg_pipeline():
    """mmsegmentation's training pipeline, configs/_base_/datasets/pascal_voc12_aug.py, as a function of the paths of an
    image and its label."""
    import cv2
    from mmcv.transforms import Compose, LoadImageFromFile, RandomFlip, RandomResize
    from mmseg.datasets.transforms import LoadAnnotations, PackSegInputs, PhotoMetricDistortion, RandomCrop
    cv2.setNumThreads(1)
    pipeline = Compose([
        LoadImageFromFile(), LoadAnnotations(),
        RandomResize(scale=(2048, 512), ratio_range=(0.5, 2.0), keep_ratio=True),
        RandomCrop(crop_size=(512, 512), cat_max_ratio=0.75), RandomFlip(prob=0.5), PhotoMetricDistortion(),
        PackSegInputs()])
    return lambda image, label: pipeline({"img_path": str(image), "seg_map_path": str(label), "seg_fields": [],
                                          "reduce_zero_label": False})
