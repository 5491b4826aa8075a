"""Trains FCN8s on PASCAL VOC 2012 + SBD, or on data of your own: `python train.py --data_path data/VOCdevkit/VOC2012`.

Writes into the work folder: train_<device_id>.log and metrics.jsonl (a line each --log_interval iterations and each
evaluation), curves.png and val_samples.png (at each evaluation), ckpt/iter_<n>.pth, ckpt/latest.pth, ckpt/best.pth,
run.json, result.json, and FCN_bs<batch>_<cards>p_acc.log.
"""
import importlib.util
import math

from backbones import BACKBONES, DEFAULT_BACKBONE
from cli import Parser, class_weights, number, run
from flags import MAX_BATCH, MAX_SIDE, WARM_UP_ITERS, from_args
from launch import Launch, add_device_flags, check_devices, is_launcher, launch, visible_devices

MAX_LOSS_SCALE = 2 ** 24  # where apex's dynamic one stops, too
not_negative = number(0, math.inf, float)  # an argparse type


def parse_args(argv=None):
    parser = Parser(prog="train.py", description="Train FCN8s on PASCAL VOC 2012 + SBD, or on data of your own.",
                    usage="%(prog)s --data_path DIR [flags]")

    essentials = parser.add_argument_group("essentials")
    essentials.add_argument("--data_path", metavar="DIR", required=True,
                            help="a folder in VOC's layout, say data/VOCdevkit/VOC2012")
    essentials.add_argument("--classes", metavar="FILE",
                            help="names of your own classes, one a line, the first the background (default: "
                                 "class_names.txt in the data folder, else VOC's 21)")
    essentials.add_argument("--backbone", default=DEFAULT_BACKBONE, choices=tuple(BACKBONES),
                            help="(default: %(default)s)")
    essentials.add_argument("--pretrained", default="imagenet", metavar="imagenet|none|NAME|FILE",
                            help="the weights to start from; NAME: resnet50_d8_voc or resnet101_d8_voc, trained on VOC "
                                 "(default: %(default)s)")
    essentials.add_argument("--batch_size", type=number(1, MAX_BATCH), default=16, metavar="N",
                            help="images of one card that go through the network at once (default: %(default)s)")
    essentials.add_argument("--max_iters", type=number(1), default=10_000, metavar="N",
                            help="length of the training, in iterations (default: %(default)s)")
    essentials.add_argument("--amp", action="store_true",
                            help="mixed precision: float16 on NPU and CUDA, bfloat16 on a CPU (default: float32)")
    essentials.add_argument("--work_dir", metavar="DIR",
                            help="where the files go (default: output/<device_id>/FCN)")
    essentials.add_argument("--resume", metavar="auto|FILE",
                            help="go on from a checkpoint; auto: from the work folder's latest, if there is one "
                                 "(default: start afresh)")

    data = parser.add_argument_group("data")
    data.add_argument("--train_split", metavar="LIST",
                      help="a list in ImageSets/Segmentation (default: trainaug; train with classes of your own)")
    data.add_argument("--val_split", default="val", metavar="LIST",
                      help="the list to evaluate on (default: %(default)s)")
    data.add_argument("--val_fraction", type=number(0, 1, float, without=(0, 1)), metavar="X",
                      help="where the folder has no lists: the share of its images to evaluate on, drawn by --seed "
                           "(default: 0.2)")
    data.add_argument("--crop_size", type=number(1, MAX_SIDE), default=512, metavar="N",
                      help="side of the training crop, in pixels (default: %(default)s)")
    data.add_argument("--scale", type=number(1, 2 ** 16), nargs=2, metavar=("LONG", "SHORT"), default=(2048, 512),
                      help="fit images into these sides, in pixels; training varies them by 0.5 to 2 "
                           "(default: 2048 512)")
    data.add_argument("--pad_to", type=number(1, MAX_SIDE), metavar="N",
                      help="evaluate images padded right and bottom to N x N pixels, as the Ascend port does with "
                           "--scale 512 512 (default: no padding)")
    data.add_argument("--workers", type=number(0), metavar="N",
                      help="processes that load images, for each card (default: 4, fewer where the cores are few)")

    recipe = parser.add_argument_group("recipe")
    recipe.add_argument("--at_once", action="store_true", help="the --pretrained file holds torchfcn's FCN8sAtOnce")
    recipe.add_argument("--lr", type=not_negative, help="learning rate at the start (default: 0.01; vgg16: 0.001)")
    recipe.add_argument("--min_lr", type=not_negative, default=1e-4, help="and at the end (default: %(default)s)")
    recipe.add_argument("--power", type=not_negative, default=0.9,
                        help="of the polynomial between them (default: %(default)s)")
    recipe.add_argument("--momentum", type=not_negative, default=0.9, help="of SGD (default: %(default)s)")
    recipe.add_argument("--weight_decay", type=not_negative, default=5e-4, help="of SGD (default: %(default)s)")
    recipe.add_argument("--accumulate", type=number(1, MAX_BATCH), default=1, metavar="N",
                        help="batches whose gradients make one step, so that an iteration sees N x --batch_size images "
                             "of a card (default: %(default)s)")
    recipe.add_argument("--freeze_bn", action="store_true",
                        help="keep the BN statistics of the weights to start from, for small batches")
    recipe.add_argument("--sync_bn", action="store_true",
                        help="BN statistics over the batches of all cards, NPUs or GPUs (default: each card's own)")
    recipe.add_argument("--compile", action="store_true",
                        help="torch.compile of network and losses, which takes a minute at the start (default: off)")
    recipe.add_argument("--class_weights", metavar="FILE", type=class_weights,
                        help="a number for each class, one a line: the weight of its pixels in the loss (default: all "
                             "1)")
    recipe.add_argument("--seed", type=number(0, 2 ** 63 - 1), default=0, metavar="N",
                        help="of all that is random (default: %(default)s)")

    add_device_flags(parser)
    precision = parser.add_argument_group("precision")
    precision.add_argument("--opt_level", choices=("O0", "O1", "O2", "O3"),
                           help="of --amp: O0 mixes nothing, O1 operation by operation; O2 (float16 weights beside "
                                "float32 ones) and O3 (all float16) need apex (default: O1)")
    precision.add_argument("--loss_scale", type=loss_scale, metavar="X|dynamic",
                           help="of --amp in float16 (default: 128 on NPU, else dynamic)")
    precision.add_argument("--amp_backend", choices=("auto", "apex", "native"),
                           help="of --amp: native is PyTorch's own; auto takes apex for O2 and O3, and on an NPU where "
                                "it is installed (default: auto)")
    precision.add_argument("--amp_dtype", choices=("float16", "bfloat16"),
                           help="of --amp (default: float16 on NPU and CUDA, bfloat16 on a CPU)")

    files = parser.add_argument_group("run and files")
    files.add_argument("--tensorboard", action="store_true",
                       help="write the metrics and pictures for TensorBoard, too, into tensorboard/ there")
    files.add_argument("--log_interval", type=number(1), default=50, metavar="N",
                       help="iterations between log lines (default: %(default)s)")
    files.add_argument("--eval_interval", type=number(1), default=1000, metavar="N",
                       help="iterations between evaluations; the end is always evaluated (default: %(default)s)")
    files.add_argument("--checkpoint_interval", type=number(1), default=1000, metavar="N",
                       help="iterations between checkpoints; the end is always saved (default: %(default)s)")
    files.add_argument("--keep", type=number(1), default=3, metavar="K",
                       help="how many of the newest checkpoints stay, beside best.pth (default: %(default)s)")
    files.add_argument("--performance", action="store_true",
                       help="measure speed: stop after 1,000 iterations; files in output/<device_id>/FCN_prof")
    args = parser.parse_args(argv)
    check_usage(parser, args)
    return args


def check_usage(parser, args):
    """Flags that make no sense together are a usage error; what a flag leaves to others is filled in."""
    check_devices(parser, args)
    if args.tensorboard and importlib.util.find_spec("tensorboard") is None:
        parser.error("--tensorboard needs the package tensorboard, which is not there; pip install tensorboard")
    if args.lr is None:
        args.lr = BACKBONES[args.backbone].lr
    if args.scale[0] < args.scale[1]:
        parser.error(f"--scale {args.scale[0]} {args.scale[1]}: the long side comes first")
    if args.momentum >= 1:
        parser.error(f"--momentum {args.momentum}: takes less than 1, or the steps grow without end")
    if args.min_lr > args.lr:
        parser.error(f"--min_lr {args.min_lr} is above --lr {args.lr}; the learning rate falls towards it")
    for flag in ("opt_level", "loss_scale", "amp_backend", "amp_dtype"):
        if getattr(args, flag) is not None and not args.amp:
            parser.error(f"--{flag} {getattr(args, flag)} has no effect without --amp")
    if args.sync_bn and args.freeze_bn:
        parser.error("--sync_bn has no effect with --freeze_bn, which takes no statistics")
    if args.performance and args.resume:
        parser.error("--performance and --resume do not go together: a performance run always starts afresh")
    for flag in ("eval_interval", "checkpoint_interval"):
        if args.performance and getattr(args, flag) <= WARM_UP_ITERS and getattr(args, flag) < args.max_iters:
            parser.error(f"--performance --{flag} {getattr(args, flag)}: pauses so often that nothing is left to "
                         f"measure; it takes more than {WARM_UP_ITERS}")
    if args.at_once and args.pretrained in ("imagenet", "none"):
        parser.error(f"--at_once has no effect with --pretrained {args.pretrained}")
    args.scale = tuple(args.scale)


def loss_scale(text):
    return text if text == "dynamic" else number(0, MAX_LOSS_SCALE, float, without=(0,))(text)


def main():
    args = parse_args()
    args.device_list = visible_devices(args.device, args.device_list)
    if is_launcher(args.device_list):
        return launch(from_args(Launch, args), __file__)
    from trainer import Recipe
    from training import Settings, train
    return train(from_args(Recipe, args), from_args(Settings, args))


if __name__ == "__main__":
    run(main, "train.py")
