"""Labels photographs with a trained network: `python predict.py CHECKPOINT my_photos --save_dir labelled --overlay`."""

from cli import Parser, file_path, run
from flags import add_network_flags, add_protocol_flags, check_protocol, from_args
from launch import add_one_device_flags


def parse_args(argv=None):
    parser = Parser(prog="predict.py", description="Label photographs with a trained network.",
                    usage="%(prog)s CHECKPOINT PHOTO_OR_FOLDER... --save_dir DIR [flags]")
    add_network_flags(parser)
    parser.add_argument("photographs", metavar="PHOTO_OR_FOLDER", type=file_path, nargs="+",
                        help="files, and folders with their sub-folders")
    output = parser.add_argument_group("what it writes")
    output.add_argument("--save_dir", metavar="DIR", type=file_path, required=True,
                        help="the class of each pixel as palette PNGs, in the folders' structure")
    output.add_argument("--overlay", action="store_true",
                        help="also DIR/overlay/: the photograph under the class colours, with a legend")
    output.add_argument("--csv", metavar="FILE", type=file_path,
                        help="the share of each class in each photograph (default: none)")
    add_protocol_flags(parser)
    add_one_device_flags(parser.add_argument_group("device"))
    args = parser.parse_args(argv)
    check_protocol(parser, args)
    return args


def main():
    args = parse_args()
    from inference import Protocol
    from labelling import label
    return label(args.photographs, args.save_dir, args.overlay, args.csv, args.checkpoint, args.device,
                 device_id=args.device_id, backbone=args.backbone, at_once=args.at_once,
                 protocol=from_args(Protocol, args))


if __name__ == "__main__":
    run(main, "predict.py")
