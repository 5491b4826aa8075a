"""Writes a trained network as an ONNX file: `python export.py CHECKPOINT model.onnx`, checked with ONNX Runtime."""
from pathlib import Path

from cli import Parser, file_path, number, run
from flags import MAX_SIDE, add_network_flags


def parse_args(argv=None):
    parser = Parser(prog="export.py", description="Write a trained network as an ONNX file.",
                    usage="%(prog)s CHECKPOINT FILE [--size HEIGHT WIDTH] [flags]")
    add_network_flags(parser)
    parser.add_argument("file", metavar="FILE", type=file_path, help="the ONNX file")
    parser.add_argument("--size", type=number(1, MAX_SIDE), nargs=2, metavar=("HEIGHT", "WIDTH"),
                        help="one fixed shape, batch 1, in pixels (default: any batch and size)")
    args = parser.parse_args(argv)
    if args.file.resolve() == Path(args.checkpoint).resolve():
        parser.error(f"{args.file} would overwrite the checkpoint; name another file")
    return args


def main():
    args = parse_args()
    from onnx_file import export
    return export(args.checkpoint, args.file, args.size, args.backbone, args.at_once)


if __name__ == "__main__":
    run(main, "export.py")
