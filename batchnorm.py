"""Batch normalisation: the running statistics of a skipped step restored, broadcast, frozen; layers folded into
convolutions."""
import copy
import itertools

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval

from device import convolutions

STATISTICS = ("running_mean", "running_var")
FOLDED_TOLERANCE = 1e-5  # of the largest logit


def layers(model):
    """The BN layers of a model that has statistics to keep."""
    return [module for module in model.modules() if isinstance(module, _BatchNorm) and module.running_mean is not None]


class RunningStatistics:
    """The running statistics of a model's BN layers, as views of one tensor, so that one operation reaches all.

    Create it after the last `model.to`, which replaces the buffers.
    """

    def __init__(self, model):
        parts = [(layer, name) for layer in layers(model) for name in STATISTICS]
        counts = [(layer, "num_batches_tracked") for layer in layers(model)]
        self.tensors = [flatten(part) for part in (parts, counts) if part]
        self.kept = []

    def keep(self):
        """Saves a copy of the statistics."""
        self.kept = [tensor.clone() for tensor in self.tensors]

    def restore_if(self, condition):
        """Restores the copy if `condition` is true, a bool tensor [] on the device; without a synchronisation."""
        for tensor, kept in zip(self.tensors, self.kept, strict=True):
            tensor.copy_(torch.where(condition, kept, tensor))

    def broadcast(self):
        """Gives every rank the statistics of rank 0."""
        for tensor in self.tensors:
            torch.distributed.broadcast(tensor, 0)


def flatten(parts):
    """Moves buffers, (module, name) each, into one new tensor, of which they become views. -> that tensor"""
    values = [getattr(module, name) for module, name in parts]
    flat = torch.cat([value.reshape(-1) for value in values])
    start = 0
    for (module, name), value in zip(parts, values, strict=True):
        module._buffers[name] = flat[start:start + value.numel()].view(value.shape)
        start += value.numel()
    return flat


def freeze(model):
    """Makes BN layers use and keep the statistics they have. To be called after every `model.train()`."""
    for layer in layers(model):
        layer.eval()


@torch.no_grad()
def fold(model):
    """For inference: a copy of a model in evaluation mode, each BN layer folded into the convolution defined before it.

    -> the model itself if its logits then differ, as where a backbone of your own calls its layers in another order.
    """
    if not layers(model):
        return model
    folded = copy.deepcopy(model)
    for module in folded.modules():
        for (conv_name, conv), (name, bn) in itertools.pairwise(list(module.named_children())):
            if isinstance(conv, nn.Conv2d) and isinstance(bn, _BatchNorm) and conv.out_channels == bn.num_features:
                setattr(module, conv_name, fuse_conv_bn_eval(conv, bn))
                setattr(module, name, nn.Identity())
    device = next(model.parameters()).device
    images = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)).to(device)
    with convolutions(device, training=False):
        expected, got = (network(images)["out"] for network in (model, folded))
    return folded if (got - expected).abs().max() <= FOLDED_TOLERANCE * expected.abs().max() else model
