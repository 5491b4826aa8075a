"""A run of predict.py: labels photographs, each read once, and names those that cannot be."""
import csv
import sys

import numpy as np
from tqdm import tqdm

import pictures
from device import describe, memory_errors
from errors import DataError, UserError
from files import check_new_file, check_no_overlap, check_writable, whole_file
from fonts import missing_font
from inference import Predictor
from voc import heic_remedy, read_image, readable_suffixes


def label(photographs, save_dir, overlay, csv_file, checkpoint, device, **network):
    """Labels photographs. photographs: files and folders; checkpoint, device, network: as Predictor takes them

    -> the exit status

    A file that cannot be labelled is an error line and status 1; the others are done.
    """
    every, skipped = find_photographs(photographs, save_dir)
    found, problems = one_of_each_name(every)
    written = [target for name in found.values() for target in targets(save_dir, name, overlay).values()]
    check_no_overlap(every, written, f"--save_dir {save_dir}")
    check_writable(save_dir)
    if csv_file:
        check_no_overlap([*every, *written, checkpoint], [csv_file], f"--csv {csv_file}")
        check_new_file(csv_file)
    predictor = Predictor(checkpoint, device, **network)
    print(f"{predictor.checkpoint.backbone} from {predictor.checkpoint.source}: {predictor.checkpoint.kind}\n"
          f"{len(found)} photographs, {predictor.protocol}, on {describe(predictor.device, device)}, "
          f"{predictor.protocol.precision(predictor.device)}")
    font = missing_font(predictor.names) if overlay else None
    for line in [*skipped, *([f"note: {font}"] if font else [])]:
        print(line)
    shares = {}
    for path, name in tqdm(found.items(), "labelling", unit="photograph", leave=False, disable=None):
        try:
            with memory_errors(f"{path} needs a smaller --scale, or windows by --slide"):
                shares[path] = label_one(predictor, path, targets(save_dir, name, overlay))
        except (UserError, OSError) as error:
            problems.append(str(error))
    if csv_file:
        write_csv(csv_file, predictor.names, shares)
    print(f"{len(shares)} photograph{'s' * (len(shares) != 1)} labelled; pictures in {save_dir}")
    for problem in problems:
        print(f"predict.py: error: {problem}", file=sys.stderr)
    return 1 if problems else 0


def find_photographs(inputs, save_dir):
    """The photographs in files and folders, with those in sub-folders.

    -> ({path: name without extension, relative to the folder that was named}, lines about the files that are skipped)
    """
    found, skipped, out = {}, [], save_dir.resolve()
    for given in inputs:
        if not given.exists():
            raise DataError(f"{given}: there is no such photograph or folder")
        if not given.is_dir():
            found.setdefault(given, given.with_suffix("").name)
            continue
        for path in sorted(given.rglob("*")):
            inside = given.resolve() in out.parents and out in path.resolve().parents
            hidden = any(part.startswith(".") for part in path.relative_to(given).parts)
            if path.is_dir() or inside or hidden:
                continue
            if path.suffix.lower() in readable_suffixes():
                found.setdefault(path, str(path.relative_to(given).with_suffix("")))
            else:
                skipped.append(f"skipped, Pillow does not know its format: {path}{heic_remedy([path])}")
    if not found:
        raise DataError("; ".join([f"{inputs[0]}: holds no photographs that Pillow reads", *skipped[:1]]))
    return found, skipped


def one_of_each_name(found):
    """Leaves out photographs whose pictures would have the names of another's. -> ({path: name}, lines about them)"""
    first, problems = {}, []
    for path, name in found.items():
        if first.setdefault(name, path) != path:
            problems.append(f"{path}: its pictures would have the names of those of {first[name]}; label it into "
                            "another --save_dir")
    return {path: name for name, path in first.items()}, problems


def targets(save_dir, name, overlay):
    """The files that are written for a photograph: {kind: path}."""
    files = {"classes": save_dir / f"{name}.png"}
    return {**files, "overlay": save_dir / "overlay" / f"{name}.jpg"} if overlay else files


def label_one(predictor, path, files):
    """Writes the pictures of one photograph. -> the share of each class, float [C]"""
    image = read_image(path).permute(1, 2, 0).numpy()
    classes = predictor(image)
    pictures.save(pictures.class_picture(classes, predictor.colours), files["classes"])
    if "overlay" in files:
        pictures.save(pictures.overlay(image, classes, predictor.names, predictor.colours), files["overlay"])
    return np.bincount(classes.ravel(), minlength=len(predictor.names)) / classes.size


def write_csv(path, names, shares):
    """A line for each photograph with the share of each class."""
    with whole_file(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["photograph", *names])
        writer.writerows([str(photograph), *(f"{share:.6f}" for share in row)] for photograph, row in shares.items())
