"""Scores a trained network on a list of images: `python evaluate.py CHECKPOINT --data_path data/VOCdevkit/VOC2012`.

Prints IoU and accuracy of each class, then aAcc, mIoU, mAcc in per cent, and the images per second.
"""
import sys
import time
from pathlib import Path

from cli import MAX_BATCH, PROG, Parser, UserError, file_path, number, run  # isort: skip, see cli

import device
import visualize
from data import check_scored, class_names, open_split, val_batches
from files import as_json, check_no_overlap, output_file, write_summary
from inference import Protocol, add_protocol_flags, check_protocol, evaluate, network_on
from metrics import MEANS, for_json, format_table, scores_of, summary
from weights import Checkpoint, add_network_flags

CONFUSION = "confusion.png"  # in --save_dir


def parse_args(argv=None):
    parser = Parser("Score a trained network on a list of images.",
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
                        help="the class of each pixel as palette PNGs, in compared/ photograph, label, prediction "
                             "and errors side by side, and confusion.png (default: none)")
    output.add_argument("--overlay", action="store_true",
                        help="also DIR/overlay/: the photograph under the class colours, with a legend")
    output.add_argument("--json", metavar="FILE", type=file_path,
                        help="the scores and the confusion matrix (default: none)")

    how = add_protocol_flags(parser)
    how.add_argument("--batch_size", type=number(1, MAX_BATCH), metavar="N",
                     help="images of one shape that run together (default: 1 on a CPU, else 8)")
    device.add_device_flags(parser)
    args = parser.parse_args(argv)
    device.check_device_flags(parser, args)
    check_protocol(parser, args)
    if args.overlay and not args.save_dir:
        parser.error("--overlay has no effect without --save_dir")
    return args


def main(args):
    if device.must_launch(args):
        return device.launch(args, __file__)
    started, ranks = time.perf_counter(), device.join_ranks(args)
    with device.readable_errors("lower --batch_size or --scale, or use windows by --slide"):
        here = ranks.rank == 0 and Checkpoint.read(args.checkpoint, args.backbone, args.at_once)
        checkpoint = ranks.share(here)  # so that one process downloads
        model = network_on(checkpoint, ranks.device)
        names, named = class_names(args, checkpoint)
        protocol = Protocol.of(args).with_scale_of(checkpoint)
        lists, digests = (checkpoint.meta.get(key) for key in ("lists", "images"))
        data, what = ranks.once_a_machine(lambda: open_split(args.data_path, args.split, lists, digests))
        write = picture_writer(args, data, names, checkpoint.colours()) if args.save_dir else None
        write_json = None
        if args.json:
            read = [args.checkpoint, *filter(None, [args.classes]), *data.files()]
            write_json = output_file(args.json, read, f"--json {args.json}")
        sizes, notes = ranks.once_a_machine(
            lambda: check_scored(data, names, args.max_images, (digests or {}).get("train", ())))
        protocol.check(sizes)
        if ranks.rank == 0:
            where = f"{ranks.count} x {device.describe(ranks.device, args.device)}"
            print(f"{checkpoint}\n{len(sizes)} {what}, {protocol}, on {where}, {protocol.precision(ranks.device)}")
            for note in filter(None, (named, *notes, args.save_dir and visualize.missing_font(names))):
                print(f"note: {note}")
        since = time.perf_counter()
        batches = val_batches(data, sizes, protocol, args.workers, ranks)
        scores = scores_of(evaluate(model, batches, protocol, ranks, write, len(sizes) // ranks.count))
        seconds = time.perf_counter() - since
        if ranks.rank == 0:
            result = report(args, checkpoint, scores, names, len(sizes), seconds)
            if write_json:
                write_json(as_json(result))
            if checkpoint.training is not None:  # of train.py
                write_val_summary(checkpoint, result, protocol.batch_on(ranks.device), ranks.count, started)
        return ranks.leave()


def report(args, checkpoint, scores, names, images, seconds):
    """Prints the scores, and writes confusion.png. -> the content of --json, where NaN is null"""
    print(format_table(scores, names))
    print(f"{summary(scores)}  ({images / seconds:.2f} images/s)")
    if args.save_dir:
        visualize.save(visualize.draw_confusion(scores["confusion"], names), args.save_dir / CONFUSION)
        print(f"pictures in {args.save_dir}")
    scores = for_json(scores, names)
    return {"checkpoint": args.checkpoint, "iteration": checkpoint.iteration(), "split": args.split, "images": images,
            **{name: scores[name] for name in MEANS}, "images_per_second": images / seconds, "seconds": seconds,
            "classes": {name: {"IoU": scores["IoU"][name], "Acc": scores["Acc"][name]} for name in names},
            "confusion": scores["confusion"]}  # a row for each label's class, a column for each predicted one


def write_val_summary(checkpoint, result, batch_size, cards, started):
    """The Ascend port's summary of an evaluation, in the folder of the checkpoint's run if that can be written to."""
    folder = Path(result["checkpoint"]).absolute().parent
    folder = folder.parent if folder.name == "ckpt" else folder
    values = {"Split": result["split"], "Images": result["images"], "ActualFPS": result["images_per_second"],
              **{name: result[name] and result[name] / 100 for name in MEANS},
              "ValTime": 1000 * batch_size * cards / result["images_per_second"],  # ms a batch, one of each card
              "E2EValTime": time.perf_counter() - started}
    try:
        write_summary(folder, checkpoint.backbone, batch_size, cards, "val", values)
    except OSError as error:  # another's folder; the scores are printed
        print(f"{PROG}: no summary in the run's folder: {error.filename}: {error.strerror}", file=sys.stderr)


def picture_writer(args, data, names, colours):
    """For evaluate's `each`: writes the pictures of an image into --save_dir, where nothing of the data lies."""
    kinds = ("{}.png", "compared/{}.png", "overlay/{}.jpg")[:2 + args.overlay]
    read, confusion = [*data.files(), *filter(None, [args.json])], args.save_dir / CONFUSION
    if any(Path(name).is_absolute() or ".." in Path(name).parts for name in data.ids):
        raise UserError(f"--save_dir {args.save_dir}: the list has ids that lead out of the data folder; take another")
    check_no_overlap(read, [confusion], f"--save_dir {args.save_dir}")
    files = visualize.picture_files(args.save_dir, data.ids, kinds, [*read, confusion])

    def write(index, prediction):
        image, label = data[index]
        image = image.permute(1, 2, 0).numpy()
        pictures = [visualize.class_picture(prediction, colours),
                    visualize.comparison(image, label.numpy(), prediction, names, colours)]
        if args.overlay:
            pictures.append(visualize.overlay(image, prediction, names, colours))
        for picture, file in zip(pictures, files[data.ids[index]], strict=True):
            visualize.save(picture, file)
    return write


if __name__ == "__main__":
    run(main, parse_args)
