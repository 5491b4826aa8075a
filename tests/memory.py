"""Computes what a training step holds in memory, by backbone and precision: `python tests/memory.py`.

Counts the tensors that the forward pass keeps for the backward pass, on a CPU, for one image of 512x512, and adds
weights, gradients and momentum. An accelerator's allocator and its convolutions' workspaces take more; those are not in
the figures.
"""
import contextlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

SIDE = 512
GIB = 2 ** 30


def kept_bytes(model, images, labels, dtype):
    """The bytes of all storages that autograd keeps from a forward pass, parameters left out."""
    import torch

    from trainer import losses_of

    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    cast = torch.autocast("cpu", dtype) if dtype is not torch.float32 else contextlib.nullcontext()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), cast:
        loss = losses_of(model(images), labels)[0]
        total = sum(kept.values())
    del loss
    return total


def main():
    import torch

    from backbones import BACKBONES
    from fcn8s import FCN8s

    torch.manual_seed(0)
    images = torch.randn(2, 3, SIDE, SIDE).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, 21, (2, SIDE, SIDE), dtype=torch.uint8)
    print("| `--backbone` | precision | weights, gradients, momentum | each image | 4 images | 16 images |\n"
          "| --- | --- | --- | --- | --- | --- |")
    for backbone in BACKBONES:
        model = FCN8s(21, backbone).to(memory_format=torch.channels_last).train()
        fixed = 3 * 4 * sum(parameter.numel() for parameter in model.parameters())
        for dtype, name in ((torch.float32, "float32"), (torch.bfloat16, "mixed")):
            image = kept_bytes(model, images, labels, dtype) / len(images)
            print(f"| `{backbone}` | {name} | {fixed / GIB:.1f} GiB | {image / GIB:.2f} GiB | "
                  f"{(fixed + 4 * image) / GIB:.1f} GiB | {(fixed + 16 * image) / GIB:.1f} GiB |", flush=True)


if __name__ == "__main__":
    main()
