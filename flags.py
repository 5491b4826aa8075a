"""Flags that several commands share."""
import dataclasses

from backbones import BACKBONES
from cli import number

MAX_SIDE, MAX_BATCH = 2 ** 14, 2 ** 14  # beyond any memory
MAX_RATIO = 100
WARM_UP_ITERS = 5  # that a measurement of speed leaves out: they choose kernels and fill caches


def from_args(kind, args):
    """A dataclass whose fields are flags of these names."""
    return kind(**{field.name: getattr(args, field.name) for field in dataclasses.fields(kind)
                   if hasattr(args, field.name)})


def add_network_flags(parser):
    """The flags that name a trained network."""
    parser.add_argument("checkpoint", metavar="CHECKPOINT",
                        help="a file of train.py, mmsegmentation or torchfcn; or resnet50_d8_voc, resnet101_d8_voc: "
                             "mmsegmentation's published weights, downloaded")
    network = parser.add_argument_group("network")
    network.add_argument("--backbone", choices=tuple(BACKBONES), help="where the file does not say")
    network.add_argument("--at_once", action="store_true", help="the file holds torchfcn's FCN8sAtOnce")


def add_protocol_flags(parser):
    """The flags that say how images go through the network. -> their group"""
    how = parser.add_argument_group("how the images go through the network")
    how.add_argument("--scale", type=number(1, 2 ** 16), nargs=2, metavar=("LONG", "SHORT"),
                     help="fit each image into these sides, in pixels (default: the checkpoint's; 2048 512 for "
                          "mmsegmentation's, the image's own size for torchfcn's)")
    how.add_argument("--pad_to", type=number(1, MAX_SIDE), metavar="N",
                     help="pad each image right and bottom to N x N pixels, so that every shape is the same (default: "
                          "no padding)")
    how.add_argument("--ratios", type=number(0, MAX_RATIO, float, without=(0,)), nargs="+", metavar="R", default=(1.0,),
                     help="average over these multiples of the scale, say 0.5 0.75 1.0 1.25 1.5 1.75 (default: 1)")
    how.add_argument("--flip", action="store_true", help="average over each image and its mirror image")
    how.add_argument("--slide", type=number(1, MAX_SIDE), nargs=2, metavar=("CROP", "STRIDE"),
                     help="average over windows of CROP x CROP pixels, STRIDE pixels apart (default: the whole image)")
    how.add_argument("--amp", action="store_true",
                     help="mixed precision: float16 on NPU and CUDA, bfloat16 on a CPU (default: float32)")
    return how


def check_protocol(parser, args):
    """Values that make no sense together are a usage error. Several values of a flag become a tuple."""
    if args.scale and args.scale[0] < args.scale[1]:
        parser.error(f"--scale {args.scale[0]} {args.scale[1]}: the long side comes first")
    if args.slide and args.slide[0] < args.slide[1]:
        parser.error(f"--slide {args.slide[0]} {args.slide[1]}: the stride is longer than the window, pixels would be "
                     "left out; CROP comes first")
    if args.slide and args.pad_to:
        parser.error("--pad_to and --slide do not go together: a window is of one shape already")
    for flag in ("scale", "ratios", "slide"):
        setattr(args, flag, getattr(args, flag) and tuple(getattr(args, flag)))
