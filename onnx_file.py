"""A run of export.py: a trained network as an ONNX file, for Ascend's or any other inference engine."""
import importlib.util
import warnings

import numpy as np
import torch

from augment import normalise
from errors import RunError
from files import check_new_file, whole_file
from weights import Checkpoint

TOLERANCE = 1e-4  # of the largest logit
OPSET = 11  # the oldest with PyTorch's way to resize, for engines that lag behind
TRACED, OTHERS = (2, 96, 120), ((1, 65, 33), (3, 40, 150))  # batch, height, width to check a dynamic file


def export(checkpoint, path, size, backbone, at_once):
    """Writes the network of a checkpoint as an ONNX file, if ONNX Runtime then computes what PyTorch does.

    size: (height, width) of one fixed shape, batch 1; None: any batch and size
    -> the exit status. Raises RunError.
    """
    missing = [package for package in ("onnx", "onnxruntime") if importlib.util.find_spec(package) is None]
    if missing:
        raise RunError(f"the export needs packages that are not there; pip install {' '.join(missing)}")
    check_new_file(path)
    checkpoint = Checkpoint.read(checkpoint, backbone, at_once)
    network = WithPreparation(checkpoint.network()).eval()
    traced, others = ((1, *size), ()) if size else (TRACED, OTHERS)
    with whole_file(path) as temporary:
        write_onnx(network, checkpoint.names() or (), traced, temporary, dynamic=bool(others))
        difference = max(onnx_difference(network, temporary, shape) for shape in (traced, *others))
        if not difference <= TOLERANCE:
            raise RunError(f"{path}: not written, as ONNX Runtime's logits differ from PyTorch's by "
                           f"{difference:.1e} of the largest; at most {TOLERANCE} is right")
    shape = "x".join(map(str, size)) if size else "of any size and number"
    print(f"{checkpoint.backbone} from {checkpoint.source}: {checkpoint.kind}\n{path}: images, float32 RGB 0..255, "
          f"{shape} -> logits of {checkpoint.num_classes} classes, float32\nONNX Runtime agrees with PyTorch to "
          f"{difference:.1e} of the largest logit")
    return 0


class WithPreparation(torch.nn.Module):
    """A network as it is exported: images float32 [N, 3, H, W], RGB, 0..255 -> logits [N, C, H, W]."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        return self.model(normalise(images, self.model.form))["out"]


def write_onnx(network, names, shape, path, dynamic):
    """Traces the network on images of a shape (batch, height, width); `dynamic`: the file takes any shape.

    The file's metadata have the names of the classes under `classes`, one a line.
    """
    import onnx  # only here: nothing else needs it

    axes = {0: "batch", 2: "height", 3: "width"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter is the older of PyTorch's two
        # The newer one (dynamo=True) needs onnxscript, whose releases for PyTorch 2.6 fix the size.
        torch.onnx.export(network, (random_images(shape),), path, input_names=["images"], output_names=["logits"],
                          opset_version=OPSET, dynamo=False,
                          dynamic_axes={"images": axes, "logits": axes} if dynamic else None)
    file = onnx.load(path)
    onnx.helper.set_model_props(file, {"classes": "\n".join(names)})
    onnx.save(file, path)


def onnx_difference(network, path, shape):
    """The largest difference between ONNX Runtime's and PyTorch's logits, relative to the largest logit."""
    import onnxruntime  # likewise only here

    images = random_images(shape)
    with torch.inference_mode():
        expected = network(images).numpy()
    got, = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"images": images.numpy()})
    return float(np.abs(got - expected).max() / max(1, np.abs(expected).max()))


def random_images(shape):
    batch, height, width = shape
    return torch.randint(0, 256, (batch, 3, height, width), generator=torch.Generator().manual_seed(0)).float()
