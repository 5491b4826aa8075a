"""A run of evaluate.py: scores a checkpoint on a list, on one card or several."""
import dataclasses
import json
import math
import sys
import time
from pathlib import Path

import pictures
from data import open_split
from device import choose_device, describe, memory_errors, place, synchronize
from errors import RunError, WeightsError
from files import check_new_file, check_no_overlap, check_writable, write_whole
from fonts import missing_font
from inference import evaluate
from loader import default_workers
from processes import Processes
from record import write_summary
from scores import MEANS, for_json, format_table, scores_of, summary
from voc import LISTS, read_classes
from weights import Checkpoint

FOLDERS = {"compared": ".png", "overlay": ".jpg"}  # in --save_dir, beside the class maps


@dataclasses.dataclass(frozen=True)
class Settings:
    """What to score, where, and what to write. The fields are evaluate.py's flags of these names."""
    checkpoint: str
    data_path: str
    split: str
    max_images: int | None
    classes: str | None
    backbone: str | None
    at_once: bool
    workers: int | None
    device: str
    device_id: int | None
    timeout: int
    save_dir: Path | None
    overlay: bool
    json: Path | None


def score(settings, protocol):
    """Scores a checkpoint. protocol: a Protocol; a scale of None is the checkpoint's. -> the exit status"""
    processes = Processes()
    with processes.failing_together(), memory_errors("lower --batch_size or --scale, or take windows by --slide"):
        run(settings, protocol, processes)
        processes.leave()
    return 0


def run(settings, protocol, processes):
    started = time.perf_counter()
    device = choose_device(settings.device, settings.device_id)
    checkpoint = Checkpoint.read(settings.checkpoint, settings.backbone, settings.at_once)
    model = checkpoint.network()
    names = class_names(settings, checkpoint)
    protocol = protocol.with_scale_of(checkpoint)
    data = open_split(settings.data_path, settings.split, checkpoint.meta.get("lists"))
    write = picture_writer(settings, data, names, checkpoint.colours()) if settings.save_dir else None
    if settings.json is not None:
        lists = Path(settings.data_path, LISTS).glob("*.txt")
        read = [*data.files(), *lists, *([settings.classes] if settings.classes else [])]
        check_no_overlap(read, [settings.json], f"--json {settings.json}")
        check_new_file(settings.json)
    processes.join(device, settings.timeout)
    sizes = processes.once_a_machine(lambda: data.check(len(names), settings.max_images))
    protocol.check(sizes)
    model = place(model, device)
    if processes.rank == 0:
        of_checkpoint = (checkpoint.meta.get("lists") or {}).get(settings.split) == data.ids
        whose = " of the checkpoint's lists" if of_checkpoint else ""
        print(f"{checkpoint.backbone} from {checkpoint.source}: {checkpoint.kind}\n{len(sizes)} images of "
              f"'{settings.split}'{whose}, {protocol}, on {processes.count} x {describe(device, settings.device)}, "
              f"{protocol.precision(device)}",
              flush=True)
        font = missing_font(names) if settings.save_dir else None
        if font:
            print(f"note: {font}")
    workers = default_workers(processes.here) if settings.workers is None else settings.workers
    since = time.perf_counter()
    confusion = evaluate(model, data, sizes, protocol, device, workers, processes, each=write)
    synchronize(device)
    seconds = time.perf_counter() - since
    if processes.rank == 0:
        scores = scores_of(confusion)
        report(settings, scores, names, len(sizes), seconds)
        if settings.json is not None:
            write_json(settings, checkpoint, scores, names, len(sizes), seconds)
        write_run_summary(settings, checkpoint, protocol, device, processes, scores, len(sizes), seconds,
                          time.perf_counter() - started)


def class_names(settings, checkpoint):
    """The names of the classes: of --classes, else the checkpoint's. Raises WeightsError unless there is one each."""
    names = read_classes(settings.classes) if settings.classes else checkpoint.names()
    count = checkpoint.num_classes
    if names is None or len(names) != count:
        whose = f"{settings.classes} has {len(names)}" if names else "but no names of them"
        raise WeightsError(f"{settings.checkpoint}: has {count} classes, {whose}; pass its own by --classes FILE")
    return names


def report(settings, scores, names, images, seconds):
    print(format_table(scores, names))
    print(f"{summary(scores)}  ({images / seconds:.2f} images/s)")
    if settings.save_dir:
        print(f"pictures in {settings.save_dir}")


def write_json(settings, checkpoint, scores, names, images, seconds):
    """The scores as a JSON file; NaN is null."""
    scores = for_json(scores, names)
    classes = {name: {"IoU": scores["IoU"][name], "Acc": scores["Acc"][name]} for name in names}
    result = {"checkpoint": settings.checkpoint, "iteration": checkpoint.iteration(), "split": settings.split,
              "images": images, "aAcc": scores["aAcc"], "mIoU": scores["mIoU"], "mAcc": scores["mAcc"],
              "images_per_second": images / seconds, "seconds": seconds, "classes": classes}
    write_whole(settings.json, json.dumps(result, indent=2, ensure_ascii=False) + "\n")


def write_run_summary(settings, checkpoint, protocol, device, processes, scores, images, seconds, all_seconds):
    """The Ascend port's summary of an evaluation, beside a checkpoint of train.py."""
    if checkpoint.training is None:
        return
    values = {name: None if math.isnan(scores[name]) else scores[name] / 100 for name in MEANS}
    values = {"Split": settings.split, "Images": images, **values, "ValTime": seconds, "E2EValTime": all_seconds}
    try:
        write_summary(Path(settings.checkpoint).parent, checkpoint.backbone, protocol.batch_on(device),
                      processes.count, "val", values)
    except OSError as error:  # another's folder; the scores are printed
        print(f"evaluate.py: no summary beside the checkpoint: {error.filename}: {error.strerror}", file=sys.stderr)


def picture_writer(settings, data, names, colours):
    """For evaluate's `each`: writes the pictures of an image into --save_dir, where nothing of the data lies."""
    folder = settings.save_dir
    kinds = {"compared": FOLDERS["compared"], **({"overlay": FOLDERS["overlay"]} if settings.overlay else {})}
    written = [folder / f"{name}.png" for name in data.ids] + [
        folder / kind / f"{name}{suffix}" for name in data.ids for kind, suffix in kinds.items()]
    if any(Path(name).is_absolute() or ".." in Path(name).parts for name in data.ids):
        raise RunError(f"--save_dir {folder}: the list has ids that lead out of the data folder; take another list")
    check_no_overlap(data.files(), written, f"--save_dir {folder}")
    check_writable(folder)

    def write(index, prediction):
        image, label = data[index]
        image, name = image.permute(1, 2, 0).numpy(), data.ids[index]
        pictures.save(pictures.class_picture(prediction, colours), folder / f"{name}.png")
        compared = pictures.comparison(image, label.numpy(), prediction, names, colours)
        pictures.save(compared, folder / "compared" / f"{name}.png")
        if settings.overlay:
            pictures.save(pictures.overlay(image, prediction, names, colours), folder / "overlay" / f"{name}.jpg")
    return write
