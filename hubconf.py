"""Networks with their weights for torch.hub: `torch.hub.load(CLONE, "resnet101_d8_voc", source="local")`.

They take normalised RGB images [N, 3, H, W] (see transforms.normalise) and return {"out": logits [N, C, H, W]}. On CUDA
their float32 convolutions use TF32, PyTorch's default, unless torch.backends.cudnn.allow_tf32 is False.
"""
dependencies = ["torch", "numpy", "PIL", "tqdm"]


def fcn8s(checkpoint, backbone=None, at_once=False):
    """The network of a checkpoint file, in evaluation mode; the arguments are those of weights.Checkpoint.read."""
    from weights import Checkpoint
    return Checkpoint.read(checkpoint, backbone, at_once).network().eval()


def resnet50_d8_voc():
    """mmsegmentation's FCN R-50-D8, trained on VOC 2012 + SBD; the weights are downloaded."""
    return fcn8s("resnet50_d8_voc")


def resnet101_d8_voc():
    """mmsegmentation's FCN R-101-D8, trained on VOC 2012 + SBD; the weights are downloaded."""
    return fcn8s("resnet101_d8_voc")
