"""Computes what a training step holds in memory, by backbone and precision: `python tools/memory.py`.

Counts the tensors that the forward pass keeps for the backward pass, for one image of 512x512, and adds weights,
gradients and momentum. The tensors are PyTorch's fake ones, of shapes without values. An accelerator's allocator and
its convolutions' workspaces take more; those are not in the figures.
"""
import sys
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from fcn8s import BACKBONES, FCN8s
from train import losses_of

SIDE = 512
GIB = 2 ** 30


def kept_bytes(model, images, labels, precision):
    """The bytes of all storages that autograd keeps from a forward pass, parameters left out."""
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    with (torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
          torch.autocast("cpu", torch.bfloat16, enabled=precision == "mixed")):
        loss = losses_of(model(images), labels)  # noqa: F841, keeps the storages, whose addresses are then unique
        return sum(kept.values())


def main():
    images = torch.randn(2, 3, SIDE, SIDE).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, 21, (2, SIDE, SIDE), dtype=torch.uint8)
    print("| `--backbone` | precision | weights, gradients, momentum | each image | 4 images | 16 images |\n"
          "| --- | --- | --- | --- | --- | --- |")
    for backbone in BACKBONES:
        model = FCN8s(21, backbone).train()
        fixed = 3 * 4 * sum(parameter.numel() for parameter in model.parameters())
        for precision in ("float32", "mixed"):
            image = kept_bytes(model, images, labels, precision) / len(images)
            print(f"| `{backbone}` | {precision} | {fixed / GIB:.1f} GiB | {image / GIB:.2f} GiB | "
                  f"{(fixed + 4 * image) / GIB:.1f} GiB | {(fixed + 16 * image) / GIB:.1f} GiB |", flush=True)


if __name__ == "__main__":
    with FakeTensorMode():
        main()
