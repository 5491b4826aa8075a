"""Writes a trained network as an ONNX file: `python export.py CHECKPOINT model.onnx`, checked with ONNX Runtime."""
import importlib.util
import io
import warnings

from cli import MAX_SIDE, Parser, UserError, file_path, number, run  # isort: skip, see cli
import numpy as np
import torch

from device import readable_errors
from files import output_file
from transforms import CAFFE_MEAN, MEAN, STD, normalise
from weights import Checkpoint, add_network_flags

TOLERANCE = 1e-4  # of the largest logit
OPSET = 11  # the oldest with PyTorch's way to resize, for engines that lag behind
SHAPES = (2, 96, 120), (1, 65, 33), (3, 40, 150)  # batch, height, width to check a dynamic file; the first is traced


def parse_args(argv=None):
    parser = Parser("Write a trained network as an ONNX file.",
                    usage="%(prog)s CHECKPOINT FILE [--size HEIGHT WIDTH] [flags]")
    add_network_flags(parser)
    parser.add_argument("file", metavar="FILE", type=file_path, help="the ONNX file")
    parser.add_argument("--size", type=number(1, MAX_SIDE), nargs=2, metavar=("HEIGHT", "WIDTH"),
                        help="one fixed shape, batch 1, in pixels (default: any batch and size)")
    return parser.parse_args(argv)


def main(args):
    missing = [package for package in ("onnx", "onnxruntime") if importlib.util.find_spec(package) is None]
    if missing:
        raise UserError(f"the export needs packages that are missing; pip install {' '.join(missing)}")
    write = output_file(args.file, [args.checkpoint], "FILE")
    checkpoint = Checkpoint.read(args.checkpoint, args.backbone, args.at_once)
    network = WithPreparation(checkpoint.network()).eval()
    shapes = [(1, *args.size)] if args.size else SHAPES
    with readable_errors("take a smaller --size"):
        content = as_onnx(network, metadata(checkpoint), shapes[0], dynamic=not args.size)
        difference = max(onnx_difference(network, content, shape) for shape in shapes)
    if not difference <= TOLERANCE:
        raise UserError(f"{args.file}: not written, as ONNX Runtime's logits differ from PyTorch's by "
                        f"{difference:.1e} of the largest; at most {TOLERANCE} is right")
    write(content)
    shape = "x".join(map(str, args.size)) if args.size else "of any size and number"
    print(f"{checkpoint}\n{args.file}: images, float32 RGB 0..255, {shape} -> logits of {checkpoint.num_classes} "
          f"classes, float32\nONNX Runtime agrees with PyTorch to {difference:.1e} of the largest logit")
    return 0


class WithPreparation(torch.nn.Module):
    """A network as it is exported: images float32 [N, 3, H, W], RGB, 0..255 -> logits [N, C, H, W]."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        return self.model(normalise(images, self.model.form))["out"]


def metadata(checkpoint):
    """What an engine must know to label an image, {name: text}; docs/evaluation.md has the list."""
    channels, mean, std = ("RGB", MEAN, STD) if checkpoint.form == "unpadded" else ("BGR", CAFFE_MEAN, (1, 1, 1))
    numbers = {"scale": checkpoint.scale() or (), "mean": mean, "std": std}
    colours = checkpoint.colours()[:checkpoint.num_classes].tolist()
    names = "\n".join(checkpoint.names() or ())
    return {"classes": names.encode(errors="backslashreplace").decode(),
            "colours": "\n".join(" ".join(map(str, colour)) for colour in colours),
            **{name: " ".join(map(str, values)) for name, values in numbers.items()}, "channels": channels,
            "pad_to": str(checkpoint.meta.get("args", {}).get("pad_to") or "")}


def as_onnx(network, properties, shape, dynamic):
    """The network as an ONNX file with `properties`, its metadata: bytes. Traced on images of a shape (batch, height,
    width); `dynamic`: it takes any."""
    import onnx  # here, as nothing else needs it
    axes, buffer = {0: "batch", 2: "height", 3: "width"} if dynamic else {}, io.BytesIO()
    images = torch.zeros(shape[0], 3, *shape[1:])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter is the older of PyTorch's two
        # The newer one (dynamo=True) needs onnxscript, whose releases for PyTorch 2.6 fix the size.
        torch.onnx.export(network, (images,), buffer, input_names=["images"], output_names=["logits"],
                          opset_version=OPSET, dynamo=False, dynamic_axes={"images": axes, "logits": axes})
    file = onnx.load_from_string(buffer.getvalue())
    # The exporter may name this axis, too, after an operator.
    file.graph.output[0].type.tensor_type.shape.dim[1].dim_value = network.model.num_classes
    onnx.helper.set_model_props(file, properties)
    return file.SerializeToString()


def onnx_difference(network, content, shape):
    """The largest difference between ONNX Runtime's and PyTorch's logits, relative to the largest logit."""
    import onnxruntime
    batch, height, width = shape
    images = torch.randint(0, 256, (batch, 3, height, width), generator=torch.Generator().manual_seed(0)).float()
    with torch.inference_mode():
        expected = network(images).numpy()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    got, = session.run(None, {"images": images.numpy()})
    return float(np.abs(got - expected).max() / (np.abs(expected).max() or 1))


if __name__ == "__main__":
    run(main, parse_args)
