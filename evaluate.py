"""Scores a checkpoint on a list of VOC: `python evaluate.py CHECKPOINT --data_path data/VOCdevkit/VOC2012`.

Prints IoU and accuracy of each class, then aAcc, mIoU, mAcc in per cent, and the images per second. With --images it
labels photographs instead, with --export it writes the network as an ONNX file.
"""
import os
from pathlib import Path

from cli import (BACKBONES, Parser, check_new_file, check_writable, file_path, not_empty, positive, run, whole_file,
                 whole_number)


def parse_args():
    parser = Parser(prog="evaluate.py", description="Score a trained network on a list of VOC, label photographs with "
                                                    "it, or export it.",
                    usage="%(prog)s CHECKPOINT (--data_path DIR | --images ... --save_dir DIR | --export FILE) [flags]")
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=not_empty,
                        help="a file of train.py, mmsegmentation or torchfcn; or resnet50_d8_voc, resnet101_d8_voc: "
                             "mmsegmentation's published weights, downloaded")

    task = parser.add_argument_group("what to do, one of the three")
    tasks = task.add_mutually_exclusive_group(required=True)
    tasks.add_argument("--data_path", metavar="DIR", type=not_empty, help="score it on a folder in VOC's layout, say "
                                                          "data/VOCdevkit/VOC2012")
    tasks.add_argument("--images", metavar="FILE_OR_FOLDER", type=file_path, nargs="+",
                       help="label photographs: the files, and all files of the folders; needs --save_dir")
    tasks.add_argument("--export", metavar="FILE", type=file_path,
                       help="write the network as an ONNX file, checked with ONNX Runtime")

    output = parser.add_argument_group("what it writes")
    output.add_argument("--save_dir", metavar="DIR", type=file_path,
                        help="the class of each pixel as palette PNGs; with --data_path also compared/: photograph, "
                             "label, prediction and errors side by side (default: none)")
    output.add_argument("--overlay", action="store_true",
                        help="also DIR/overlay/: the photograph under the class colours, with a legend")
    output.add_argument("--json", metavar="FILE", type=file_path, help="the scores of --data_path (default: none)")
    output.add_argument("--export_size", type=whole_number(1), nargs=2, metavar=("HEIGHT", "WIDTH"),
                        help="of --export: one fixed shape, batch 1, in pixels (default: any batch and size)")

    data = parser.add_argument_group("data")
    data.add_argument("--split", help="a list in ImageSets/Segmentation (default: val)")
    data.add_argument("--max_images", type=whole_number(1), metavar="N",
                      help="only the first N images of the list (default: all)")
    data.add_argument("--classes", metavar="FILE", type=not_empty,
                      help="names of the classes, one a line, the first the background (default: the checkpoint's, "
                           "else VOC's)")
    data.add_argument("--workers", type=whole_number(0), metavar="N",
                      help=f"processes that load images (default: {min(4, os.cpu_count())}; 0 with --images)")

    network = parser.add_argument_group("network and device")
    network.add_argument("--backbone", choices=BACKBONES, help="where the file does not say")
    network.add_argument("--at_once", action="store_true", help="the file holds torchfcn's FCN8sAtOnce")
    network.add_argument("--device", choices=("auto", "npu", "cuda", "gpu", "cpu"),
                         help="auto takes an NPU, else CUDA, else the CPU (default: auto)")
    network.add_argument("--device_id", type=whole_number(0), metavar="N",
                         help="which of the devices, counted from 0 (default: 0)")
    network.add_argument("--batch_size", type=whole_number(1), metavar="N",
                         help="images of one shape that run together (default: 1)")

    how = parser.add_argument_group("how the images go through the network")
    how.add_argument("--scale", type=whole_number(1), nargs=2, metavar=("LONG", "SHORT"),
                     help="fit each image into these sides, in pixels (default: the checkpoint's; 2048 512 for "
                          "mmsegmentation's, the image's own size for torchfcn's)")
    how.add_argument("--pad_to", type=whole_number(1), metavar="N",
                     help="pad each image right and bottom to N x N pixels, so that every shape is the same (default: "
                          "no padding)")
    how.add_argument("--ratios", type=positive, nargs="+", metavar="R",
                     help="average over these multiples of the scale, say 0.5 0.75 1.0 1.25 1.5 1.75 (default: 1)")
    how.add_argument("--flip", action="store_true", help="average over each image and its mirror image")
    how.add_argument("--slide", type=whole_number(1), nargs=2, metavar=("CROP", "STRIDE"),
                     help="average over windows of CROP x CROP pixels, STRIDE pixels apart (default: the whole image)")
    args = parser.parse_args()
    check_usage(parser, args)
    args.split, args.device, args.batch_size = args.split or "val", args.device or "auto", args.batch_size or 1
    if args.workers is None:
        # A worker hands an image over in shared memory, of which a container may have 64 MB: too little for a large
        # photograph.
        args.workers = 0 if args.images else min(4, os.cpu_count())
    return args


def check_usage(parser, args):
    """Refuses flags that could not take effect, and values that make no sense together."""
    def given(flags):
        return [flag for flag in flags if getattr(args, flag) not in (None, False)]

    for needed, flags in (("data_path", ("split", "max_images", "json")), ("save_dir", ("overlay",)),
                          ("export", ("export_size",))):
        if given(flags) and not given([needed]):
            parser.error(f"--{given(flags)[0]} has no effect without --{needed}")
    for flag in given(("json", "export")):
        if getattr(args, flag).resolve() == Path(args.checkpoint).resolve():
            parser.error(f"--{flag} {getattr(args, flag)} would overwrite the checkpoint; name another file")
    without_export = given(("save_dir", "workers", "device", "device_id", "batch_size", "scale", "pad_to",
                            "ratios", "flip", "slide"))
    if args.export and without_export:
        parser.error(f"--{without_export[0]} has no effect with --export")
    if args.images and not args.save_dir:
        parser.error("--images needs --save_dir DIR, where the pictures go")
    if args.scale and args.scale[0] < args.scale[1]:
        parser.error(f"--scale {args.scale[0]} {args.scale[1]}: the long side comes first")
    if args.slide and args.slide[0] < args.slide[1]:
        parser.error(f"--slide {args.slide[0]} {args.slide[1]}: the stride is longer than the window, pixels would be "
                     "left out; CROP comes first")
    if args.slide and args.pad_to:
        parser.error("--pad_to and --slide do not go together: a window is of one shape already")


if __name__ == "__main__":
    ARGS = parse_args()  # before PyTorch is imported, which takes seconds: a usage error answers at once
os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")  # or a broken torch_npu breaks `import torch`

import json  # noqa: E402
import math  # noqa: E402
import sys  # noqa: E402
import time  # noqa: E402
import unicodedata  # noqa: E402
from concurrent.futures import ThreadPoolExecutor  # noqa: E402

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch.utils.data import DataLoader, Dataset  # noqa: E402
from tqdm import tqdm  # noqa: E402

import pictures  # noqa: E402
from device import (DeviceError, Processes, check_fits, choose_device, describe, memory_format, place,  # noqa: E402
                    synchronize)
from export import ExportError, export  # noqa: E402
from fcn8s import WeightsError, model_from_file, unwrap  # noqa: E402
from voc import (CLASSES, IGNORE, VOC, DataError, first_of, leave_signals, palette, prepare,  # noqa: E402
                 read_classes, read_image, resize_image, scaled_size, stack_images)

DEFAULT_SCALE = (2048, 512)  # of the reference's evaluation
STRIP_VALUES = 2 ** 26  # logits that are enlarged at once: 256 MiB of float32
DECODERS = 4  # threads that look at photographs; each may hold a very large one


class Photographs(Dataset):
    """Photographs in the form of a VOC list: each comes with a label that is all IGNORE.

    inputs: paths of files, and of folders, of which it takes the files that are not hidden
    After `check`, `problems` says which of them cannot be labelled and why, a line each, and those are left out.
    """

    def __init__(self, inputs):
        self.paths, self.problems = [], []
        for path in inputs:
            if not path.exists():
                raise DataError(f"{path}: there is no such photograph or folder")
            files = [path] if path.is_file() else sorted(
                file for file in path.iterdir() if not (file.is_dir() or file.name.startswith(".")))
            if not files:
                raise DataError(f"{path}: the folder holds no files; name one that holds photographs")
            self.paths += files
        self.paths = list(dict.fromkeys(self.paths))

    @property
    def ids(self):
        return [path.stem for path in self.paths]

    def __getitem__(self, index):
        """(image uint8 [3, H, W], label uint8 [H, W])."""
        image = read_image(self.paths[index])
        return image, torch.full(image.shape[1:], IGNORE, dtype=torch.uint8)

    def check(self):
        """Decodes each photograph. -> (H, W) of those that can be labelled"""
        def look(path):
            try:
                return tuple(read_image(path).shape[1:])
            except DataError as error:
                return error

        with ThreadPoolExecutor(DECODERS) as pool:
            looks = list(tqdm(pool.map(look, self.paths), "checking", len(self.paths), leave=False, disable=None))
        sizes, kept = [], {}
        for path, size in zip(self.paths, looks):
            if isinstance(size, DataError):
                self.problems.append(str(size))
            elif path.stem in kept:
                self.problems.append(f"{path}: its pictures would have the names of those of {kept[path.stem]}; label "
                                     "it into another --save_dir")
            else:
                kept[path.stem] = path
                sizes.append(size)
        if not sizes:
            raise DataError(first_of(self.problems))
        self.paths = list(kept.values())
        return sizes


class ScaledImages(Dataset):
    """The images of a VOC list at each of some scales, uint8 [3, h, w], with their label in the original size.

    scales: (long, short) that an image is fitted into, or None for its own size
    """

    def __init__(self, voc, scales):
        self.voc, self.scales = voc, scales

    def __getitem__(self, index):
        image, label = self.voc[index]
        return [fit_into(image, scale) for scale in self.scales], label


def fit_into(image, scale):
    """uint8 [3, H, W] resized to fit into (long, short) pixels; None: as it is."""
    return image if scale is None else resize_image(image, scaled_size(*image.shape[1:], *scale))


def stack_scaled(samples):
    """Samples of one original size -> (a uint8 [N, 3, h, w] for each scale, labels uint8 [N, H, W])."""
    images, labels = zip(*samples)
    return [stack_images(one_scale) for one_scale in zip(*images)], torch.stack(labels)


def one_shape_batches(sizes, batch_size):
    """Lists of up to `batch_size` indices of images that have one size."""
    groups = {}
    for index, size in enumerate(sizes):
        groups.setdefault(size, []).append(index)
    return [group[start:start + batch_size] for group in groups.values() for start in range(0, len(group), batch_size)]


def scales_of(scale, ratios):
    """The multiples of a scale (None: the image's own size, at ratio 1), as the reference rounds them."""
    return [scale and tuple(int(side * ratio) for side in scale) for ratio in ratios or (1.0,)]


def evaluate(model, voc, sizes, scale, device, *, batch_size=1, workers=0, processes=None, ratios=None, flip=False,
             pad_to=None, slide=None, each=None, stop=None):
    """The confusion matrix of the model on the images of a list, in float32.

    sizes: (H, W) of the images to score, the first of the list, as VOC.check returns them
    scale: (long, short) that an image is fitted into, None: its own size; ratios: multiples of it to average over
    processes: those of the run, among which the batches are dealt out
    flip, pad_to, slide: see predict
    each: called with the index of each image in the list and its class map, uint8 [H, W]
    stop: the run's StopSignal; what there is when one comes is then returned
    -> int64 [C, C], row: the label's class, column: the predicted one; the pixels labelled IGNORE are left out
    """
    processes = processes or Processes()
    was_training = model.training
    model.eval()
    processes.share_buffers(model)
    batches = one_shape_batches(sizes, batch_size)[processes.rank::processes.count]
    loader = DataLoader(ScaledImages(voc, scales_of(scale, ratios)), batch_sampler=batches, num_workers=workers,
                        collate_fn=stack_scaled, worker_init_fn=leave_signals)
    confusion = np.zeros((model.num_classes,) * 2, np.int64)
    progress = tqdm(total=sum(map(len, batches)), desc="evaluating", unit="image", leave=False, disable=None)
    for indices, (scaled, labels) in zip(batches, loader):
        if stop is not None and stop.number:
            break
        views = [view for images in scaled for view in predict(model, images.to(device), flip, pad_to, slide)]
        for i, label in enumerate(labels):
            prediction = class_map([view[i] for view in views], label.shape).cpu().numpy()
            confusion += confusion_matrix(label.numpy(), prediction, model.num_classes)
            if each is not None:
                each(indices[i], prediction)
            progress.update()
    progress.close()
    model.train(was_training)
    return processes.add_up(confusion, device)


def classify(model, image, scale, device):
    """The class map of one image uint8 [3, H, W], fitted into `scale`: uint8 NumPy [H, W]; `model` is in evaluation
    mode."""
    logits = predict(model, fit_into(image, scale)[None].to(device))[0]
    return class_map([logits[0]], image.shape[1:]).cpu().numpy()


@torch.inference_mode()
def predict(model, images, flip=False, pad_to=None, slide=None):
    """The network's logits of images uint8 [N, 3, h, w]: a list of [N, C, h, w], of the images and, with `flip`, of
    their mirror images, mirrored back.

    pad_to: the network sees the images padded right and bottom to that side, in pixels
    slide: (crop, stride) in pixels; the network sees windows, and where they overlap their logits are averaged
    """
    size = tuple(images.shape[-2:])
    inputs = prepare(images.contiguous(memory_format=memory_format(images.device)), model.form)
    if pad_to:
        inputs = F.pad(inputs, (0, pad_to - size[1], 0, pad_to - size[0]))

    def logits_of(inputs):
        return slide_windows(model, inputs, *slide) if slide else model(inputs, size)["out"]

    views = [logits_of(inputs)]
    if flip:
        # With padding, the mirror image is padded on the right, too.
        mirrored = torch.cat([inputs[..., :size[1]].flip(-1), inputs[..., size[1]:]], -1)
        views.append(logits_of(mirrored).flip(-1))
    return views


def slide_windows(model, inputs, crop, stride):
    """Logits [N, C, h, w] averaged over windows of crop x crop pixels; the last of a row or column is moved inside."""
    tops, lefts = ([max(min(start, side - crop), 0) for start in
                    range(0, max(math.ceil((side - crop) / stride), 0) * stride + 1, stride)]
                   for side in inputs.shape[-2:])
    total, count = 0, torch.zeros(inputs.shape[-2:], device=inputs.device)
    for top in tops:
        for left in lefts:
            window = inputs[..., top:top + crop, left:left + crop]
            logits = model(window)["out"]
            if isinstance(total, int):
                total = logits.new_zeros(*logits.shape[:2], *inputs.shape[-2:])
            total[..., top:top + crop, left:left + crop] += logits
            count[top:top + crop, left:left + crop] += 1
    return total / count


@torch.inference_mode()
def class_map(views, size):
    """The most likely class of each pixel: logits [C, h, w] -> uint8 [*size]; of several, by the mean of their softmax.

    The logits are enlarged bilinearly (align_corners=False) strip by strip, as those of a large photograph at its
    original size would not fit into memory.
    """
    strip = max(1, STRIP_VALUES // (views[0].shape[0] * size[1]))
    parts = []
    for top in range(0, size[0], strip):
        rows = torch.arange(top, min(top + strip, size[0]), device=views[0].device)
        scores = enlarge_rows(views[0], rows, size)
        if len(views) > 1:
            scores = sum((enlarge_rows(view, rows, size).softmax(0) for view in views[1:]), scores.softmax(0))
        parts.append(scores.argmax(0).byte())
    return torch.cat(parts)


def enlarge_rows(logits, rows, size):
    """Some rows of logits [C, h, w] enlarged to `size`: [C, len(rows), size[1]]. First each row from the two it lies
    between, then its columns."""
    height = logits.shape[1]
    source = ((rows + 0.5) * (height / size[0]) - 0.5).clamp(min=0)
    upper = source.long()
    lower = (upper + 1).clamp(max=height - 1)
    scores = torch.lerp(logits[:, upper], logits[:, lower], (source - upper)[:, None].to(logits.dtype))
    return F.interpolate(scores[None], (len(rows), size[1]), mode="bilinear", align_corners=False)[0]


def confusion_matrix(label, prediction, num_classes):
    """uint8 [H, W] each -> int64 [C, C], row: the label's class, column: the predicted one, without IGNORE."""
    # torch.bincount takes 4-byte numbers as they are; NumPy's would copy them to 8 bytes first, and takes twice as long.
    pairs = torch.from_numpy(label).int().mul_(num_classes).add_(torch.from_numpy(prediction))
    counts = torch.bincount(pairs.ravel(), minlength=(IGNORE + 1) * num_classes)
    return counts.reshape(-1, num_classes)[:num_classes].numpy()


def scores_of(confusion):
    """The metrics of a confusion matrix, in per cent; a class that is 0/0 is NaN and left out of the mean.

    -> dict: aAcc, correct / labelled pixels; Acc [C], correct / the label's pixels, and its mean mAcc; IoU [C],
    correct / (label's + predicted - correct pixels), and its mean mIoU (Long et al., section 4)
    """
    correct, labelled, predicted = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
    with np.errstate(invalid="ignore"):
        accuracy = 100 * correct / labelled
        iou = 100 * correct / (labelled + predicted - correct)
    return {"aAcc": float(100 * correct.sum() / labelled.sum()), "mIoU": float(np.nanmean(iou)),
            "mAcc": float(np.nanmean(accuracy)), "IoU": iou.tolist(), "Acc": accuracy.tolist()}


def format_table(scores, classes):
    """The scores of each class as lines of text; `-` where there is none."""
    def cell(value):
        return f"{'-' if np.isnan(value) else format(value, '.2f'):>8}"

    def columns(name):  # Chinese characters and the like are two columns wide
        return sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in name)

    width = max(14, *(columns(name) + 2 for name in classes))
    lines = [f"{'class':<{width}}{'IoU':>8}{'Acc':>8}"]
    lines += [name + " " * (width - columns(name)) + cell(iou) + cell(acc)
              for name, iou, acc in zip(classes, scores["IoU"], scores["Acc"])]
    return "\n".join(lines)


def summary(scores):
    return "  ".join(f"{name} {scores[name]:.2f}" for name in ("aAcc", "mIoU", "mAcc"))


def write_json(path, args, iteration, scores, names, images, seconds):
    def number(value):
        return None if np.isnan(value) else value  # JSON has no NaN

    per_class = {name: {"IoU": number(iou), "Acc": number(acc)}
                 for name, iou, acc in zip(names, scores["IoU"], scores["Acc"])}
    result = {"checkpoint": args.checkpoint, "iteration": iteration, "split": args.split, "images": images,
              "aAcc": scores["aAcc"], "mIoU": scores["mIoU"], "mAcc": scores["mAcc"],
              "images_per_second": images / seconds, "seconds": seconds, "classes": per_class}
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(result, indent=2) + "\n")


def check_flags(args, scale, sizes):
    """Finds what does not go together before the first image."""
    if args.ratios and scale is None:
        raise DataError("--ratios are multiples of a scale; add --scale LONG SHORT")
    if args.json is not None:
        check_new_file(args.json)
    for one_scale in scales_of(scale, args.ratios):
        if one_scale and min(one_scale) < 1:
            raise DataError(f"--ratios: {min(args.ratios)} of {scale[0]}x{scale[1]} leaves no pixel; take a larger one")
        shapes = [size if one_scale is None else scaled_size(*size, *one_scale) for size in sizes]
        pixels = args.pad_to ** 2 if args.pad_to else max(height * width for height, width in shapes)
        check_fits(3 * args.batch_size * pixels, f"--batch_size {args.batch_size} at --scale {one_scale}"
                   + (f" and --pad_to {args.pad_to}" if args.pad_to else ""))
        largest = max(map(max, shapes))
        if args.pad_to and largest > args.pad_to:
            raise DataError(f"--pad_to {args.pad_to}: images of up to {largest} pixels a side do not fit; "
                            f"add --scale {args.pad_to} {args.pad_to}, or pad to more")


def scale_of(checkpoint, model, source):
    """The scale that a checkpoint names, else the one of the network's reference: (long, short), or None, own size."""
    scale = unwrap(checkpoint)[1].get("scale")
    if scale is None:
        return DEFAULT_SCALE if model.form == "unpadded" else None
    pair = isinstance(scale, (list, tuple)) and len(scale) == 2
    if not pair or not all(isinstance(side, int) and side > 0 for side in scale):
        raise WeightsError(f"{source}: names the scale {scale}, which is none; give --scale LONG SHORT")
    return tuple(scale)


def names_and_colours(checkpoint, num_classes, source, classes_file=None):
    """What the classes are called and drawn in, as a file of names or else the checkpoint has it, or else VOC.

    -> (tuple of C names, uint8 [256, 3], the colour of each class and of IGNORE)
    """
    meta = unwrap(checkpoint)[1]
    names = read_classes(classes_file) if classes_file else meta.get("classes", CLASSES)
    colours = palette()
    try:
        names = tuple(map(str, names))
        colours[:num_classes] = meta.get("palette", colours[:num_classes])
    except (TypeError, ValueError, OverflowError):
        raise WeightsError(f"{source}: its names or colours of classes are damaged; take another checkpoint") from None
    if len(names) != num_classes:
        whose = classes_file or ("its list of names" if "classes" in meta else "VOC")
        raise WeightsError(f"{source}: is for {num_classes} classes, {whose} has {len(names)}; name its own by "
                           "--classes FILE")
    return names, colours


def picture_writer(args, data, names, colours):
    """For evaluate's `each`: writes the pictures of an image into --save_dir."""
    folder, ids = args.save_dir, data.ids
    inputs = data.paths if args.images else [data.image_path(ids[0]), *map(data.label_path, ids)]
    if {file.resolve().parent for file in inputs} & {part.resolve() for part in
                                                     (folder, folder / "overlay", folder / "compared")}:
        raise DataError(f"--save_dir {folder}: holds what is read, which pictures could overwrite; take another folder")
    check_writable(folder)

    def write(index, prediction):
        image, label = data[index]
        image, name = image.permute(1, 2, 0).numpy(), ids[index]
        pictures.save(pictures.class_picture(prediction, colours), folder / f"{name}.png")
        if args.overlay:
            pictures.save(pictures.overlay(image, prediction, names, colours), folder / "overlay" / f"{name}.jpg")
        if args.data_path:
            compared = pictures.comparison(image, label.numpy(), prediction, names, colours)
            pictures.save(compared, folder / "compared" / f"{name}.png")
    return write


def export_file(args):
    """--export: reads the checkpoint, writes its network, and says what the file takes and gives."""
    model, checkpoint = model_from_file(args.checkpoint, args.backbone, args.at_once)
    names, _ = names_and_colours(checkpoint, model.num_classes, args.checkpoint, args.classes)
    difference = export(model, names, args.export, args.export_size)
    shape = "x".join(map(str, args.export_size)) if args.export_size else "of any size and number"
    print(f"{model.backbone_name} from {model.origin}\n{args.export}: images, float32 RGB 0..255, {shape} -> logits of "
          f"{model.num_classes} classes, float32\nONNX Runtime agrees with PyTorch to {difference:.1e} of the largest "
          "logit")


def main(args):
    if args.export:
        return export_file(args)
    device = choose_device(args.device, args.device_id)
    data = Photographs(args.images) if args.images else VOC(args.data_path, args.split)
    model, checkpoint = model_from_file(args.checkpoint, args.backbone, args.at_once)
    names, colours = names_and_colours(checkpoint, model.num_classes, args.checkpoint, args.classes)
    scale = args.scale or scale_of(checkpoint, model, args.checkpoint)
    sizes = data.check() if args.images else data.check(model.num_classes, args.max_images)
    check_flags(args, scale, sizes)
    each = picture_writer(args, data, names, colours) if args.save_dir else None
    fitted = f"fitted into {scale[0]}x{scale[1]}" if scale else "of their own size"
    problems = data.problems if args.images else []
    what = f"of {len(sizes) + len(problems)} photographs" if args.images else f"images of '{args.split}'"
    print(f"{model.backbone_name} from {model.origin}\n{len(sizes)} {what}, {fitted}, on "
          f"{describe(device, args.device)}, float32")

    model = place(model, device)
    start = time.perf_counter()
    confusion = evaluate(model, data, sizes, scale, device, batch_size=args.batch_size, workers=args.workers,
                         ratios=args.ratios, flip=args.flip, pad_to=args.pad_to, slide=args.slide, each=each)
    synchronize(device)
    seconds = time.perf_counter() - start

    if args.data_path:
        scores = scores_of(confusion)
        print(format_table(scores, names))
        print(f"{summary(scores)}  ({len(sizes) / seconds:.2f} images/s)")
    if args.save_dir:
        print(f"pictures in {args.save_dir}")
    if args.json is not None:
        progress = checkpoint.get("progress")
        iteration = progress.get("iteration") if isinstance(progress, dict) else None
        write_json(args.json, args, iteration, scores, names, len(sizes), seconds)
    for problem in problems:
        print(f"evaluate.py: skipped: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    run(main, ARGS, "evaluate.py", (DataError, DeviceError, ExportError, WeightsError, torch.OutOfMemoryError))
