"""Labels photographs with a trained network: `python predict.py CHECKPOINT my_photos --save_dir labelled --overlay`."""
import csv
import io
import os
import sys
from pathlib import Path

from cli import PROG, Parser, UserError, file_path, message_of, run  # isort: skip, see cli
from tqdm import tqdm

import visualize
from device import add_one_device_flags, describe, readable_errors
from files import output_file
from inference import Predictor, Protocol, add_protocol_flags, check_protocol, image_of
from voc import LABEL_FOLDERS, heic_hint, id_of, is_readable, opened, walk
from weights import add_network_flags


def parse_args(argv=None):
    parser = Parser("Label photographs with a trained network.",
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


def main(args):
    """Labels photographs, one after the other. One that cannot be labelled is an error line and status 1."""
    found, skipped = find_photographs(args.photographs, args.save_dir)
    paths, problems = {}, []
    for path, name in found.items():
        if paths.setdefault(name, path) != path:
            problems.append(f"{PROG}: error: {path}: its pictures would have the names of those of {paths[name]}; "
                            "label it into another --save_dir")
    labels = walk(args.save_dir)[0] if args.save_dir.name in LABEL_FOLDERS else ()  # of a data set
    kinds = ("{}.png", "overlay/{}.jpg")[:1 + args.overlay]
    written = visualize.picture_files(args.save_dir, paths, kinds, [*found, *labels, *filter(None, [args.csv])])
    if args.csv:
        write_csv = output_file(args.csv, [*found, args.checkpoint], f"--csv {args.csv}")
    predictor = Predictor(args.checkpoint, args.device, args.device_id, args.backbone, args.at_once, Protocol.of(args))
    print(f"{predictor.checkpoint}\n{counted(paths)}, {predictor.protocol}, on "
          f"{describe(predictor.device, args.device)}, {predictor.protocol.precision(predictor.device)}")
    font = visualize.missing_font(predictor.names) if args.overlay else None
    for line in [*skipped, *([f"note: {font}"] if font else [])]:
        print(line)
    shares = {}
    try:
        for name, path in tqdm(paths.items(), "labelling", unit="photograph", leave=False, disable=None):
            try:
                with readable_errors(f"{path} needs a smaller --scale, or windows by --slide"):
                    shares[path] = label(predictor, path, *written[name])
            except (UserError, OSError) as error:
                problems.append(message_of(error))
    finally:  # also after Ctrl-C
        for problem in problems:
            print(problem, file=sys.stderr)
        if args.csv:
            write_csv(as_csv(predictor.names, shares))
    print(f"{counted(shares)} labelled; pictures in {args.save_dir}")
    return 1 if problems else 0


def find_photographs(inputs, save_dir):
    """The photographs in files and folders, with those in sub-folders, through links.

    -> ({path: name without extension, relative to the folder that was named}, lines about the files that are skipped)
    """
    found, skipped, out = {}, [], Path(os.path.realpath(save_dir))
    for given in inputs:
        if not given.exists():
            raise UserError(f"{given}: there is no such photograph or folder")
        folder = given if given.is_dir() else given.parent
        around = Path(os.path.realpath(given)) in out.parents  # what lies in `out` then is of an earlier call
        paths, again = walk(given)
        skipped += [f"skipped, it is read under another name: {path}" for path in again]
        for path in paths:
            if around and out in Path(os.path.realpath(path)).parents:
                continue
            if path == given or is_readable(path):
                found.setdefault(path, id_of(path, folder))
            else:
                skipped.append(f"skipped, Pillow does not know its format: {path}{heic_hint([path])}")
    if not found:
        raise UserError("; ".join([f"{inputs[0]}: holds no photographs that Pillow reads", *skipped[:1]]))
    return found, skipped


def counted(photographs):
    return f"{len(photographs)} photograph{'s' * (len(photographs) != 1)}"


def label(predictor, path, class_file, overlay_file=None):
    """Writes the pictures of one photograph. -> the share of each class, float [C]"""
    image = image_of(path).permute(1, 2, 0).numpy()
    with opened(path, "image") as file:
        if getattr(file, "is_animated", False) and file.format != "MPO":  # whose others are the camera's previews
            tqdm.write(f"note: {path}: holds several frames; the first is labelled")
    classes = predictor(image)
    visualize.save(visualize.class_picture(classes, predictor.colours), class_file)
    if overlay_file:
        visualize.save(visualize.overlay(image, classes, predictor.names, predictor.colours), overlay_file)
    return visualize.histogram(classes)[:len(predictor.names)] / classes.size


def as_csv(names, shares):
    """A line for each photograph with the share of each class, as CSV in UTF-8: bytes. Other names keep their bytes."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["photograph", *names])
    writer.writerows([str(photograph), *(f"{share:.6f}" for share in row)] for photograph, row in shares.items())
    return text.getvalue().encode(errors="surrogateescape")


if __name__ == "__main__":
    run(main, parse_args)
