"""Scores a trained network on a list of images: `python evaluate.py CHECKPOINT --data_path data/VOCdevkit/VOC2012`.

Prints IoU and accuracy of each class, then aAcc, mIoU, mAcc in per cent, and the images per second. Beside a checkpoint
of train.py it writes the summary FCN_bs<batch>_<cards>p_val.log.
"""
from pathlib import Path

from cli import Parser, file_path, number, run
from flags import MAX_BATCH, add_network_flags, add_protocol_flags, check_protocol, from_args
from launch import Launch, add_device_flags, check_devices, is_launcher, launch, visible_devices


def parse_args(argv=None):
    parser = Parser(prog="evaluate.py", description="Score a trained network on a list of images.",
                    usage="%(prog)s CHECKPOINT --data_path DIR [flags]")
    add_network_flags(parser)

    data = parser.add_argument_group("data")
    data.add_argument("--data_path", metavar="DIR", required=True,
                      help="a folder in VOC's layout, say data/VOCdevkit/VOC2012")
    data.add_argument("--split", default="val", metavar="LIST",
                      help="a list in ImageSets/Segmentation (default: %(default)s)")
    data.add_argument("--max_images", type=number(1), metavar="N",
                      help="only the first N images of the list (default: all)")
    data.add_argument("--classes", metavar="FILE",
                      help="names of the classes, one a line, the first the background (default: the checkpoint's, "
                           "else VOC's)")
    data.add_argument("--workers", type=number(0), metavar="N",
                      help="processes that load images, for each card (default: 4, fewer where the cores are few)")

    output = parser.add_argument_group("what it writes")
    output.add_argument("--save_dir", metavar="DIR", type=file_path,
                        help="the class of each pixel as palette PNGs, and in compared/ photograph, label, prediction "
                             "and errors side by side (default: none)")
    output.add_argument("--overlay", action="store_true",
                        help="also DIR/overlay/: the photograph under the class colours, with a legend")
    output.add_argument("--json", metavar="FILE", type=file_path, help="the scores (default: none)")

    how = add_protocol_flags(parser)
    how.add_argument("--batch_size", type=number(1, MAX_BATCH), metavar="N",
                     help="images of one shape that run together (default: 1 on a CPU, else 8)")
    add_device_flags(parser)
    args = parser.parse_args(argv)
    check_devices(parser, args)
    check_protocol(parser, args)
    if args.overlay and not args.save_dir:
        parser.error("--overlay has no effect without --save_dir")
    if args.json and args.json.resolve() == Path(args.checkpoint).resolve():
        parser.error(f"--json {args.json} would overwrite the checkpoint; name another file")
    return args


def main():
    args = parse_args()
    args.device_list = visible_devices(args.device, args.device_list)
    if is_launcher(args.device_list):
        return launch(from_args(Launch, args), __file__)
    from inference import Protocol
    from scoring import Settings, score
    return score(from_args(Settings, args), from_args(Protocol, args))


if __name__ == "__main__":
    run(main, "evaluate.py")
