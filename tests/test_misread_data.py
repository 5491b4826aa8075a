"""Files that say something else than their user means: each is refused, read rightly, or named in a note."""
import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from unittest import mock

import numpy as np
import pytest
import torch
import torchvision
from conftest import REAL_VOC, ROOT, error_line, run, state, train, train_flags, untrained_checkpoint
from PIL import Image, ImageOps

from cli import UserError
from data import split_by_seed, with_every_class
from voc import CLASSES, VOC, decode_label, palette, read_image
from weights import Checkpoint

TRAIN, EVALUATE, PREDICT = (ROOT / f"{name}.py" for name in ("train", "evaluate", "predict"))
EXIF_TURNS = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_270}  # what shows an image of it upright


def write(folder, labels, names="ground\ncat\ndog\n", size=(40, 30), colours=None, seed=0):
    """A folder without lists: images of noise p0, p1, ... with squares of the values that `labels` has for each."""
    rng = np.random.default_rng(seed)
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True)
    (folder / "class_names.txt").write_text(names)
    for number, values in enumerate(labels):
        label = np.zeros(size[::-1], np.uint8)
        for place, value in enumerate(values):
            label[5:25, 3 + 8 * place:9 + 8 * place] = value
        Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)).save(folder / f"images/p{number}.png")
        picture = Image.fromarray(label)
        if colours is not None:
            picture.putpalette(colours.tobytes())
        picture.save(folder / f"masks/p{number}.png")
    return folder


def lists(folder, **parts):
    (folder / "ImageSets/Segmentation").mkdir(parents=True, exist_ok=True)
    for name, lines in parts.items():
        (folder / f"ImageSets/Segmentation/{name}.txt").write_text("\n".join(lines) + "\n")


def refused(data, work_dir, *flags):
    line = error_line(TRAIN, *train_flags(data, work_dir), *flags)
    assert not work_dir.exists()
    return line


def checked(data, work_dir, *flags):
    """What `train.py --check` prints."""
    return train(data, work_dir, "--check", *flags).stdout


# ---- labels

def renumber(path, target):
    """As a PNG optimiser does it: the used entries of the palette alone."""
    with Image.open(path) as label:
        used = [index for index, count in enumerate(label.histogram()) if count]
        label.remap_palette(used).save(target)
    return used


def renumbered_voc(folder):
    """Six real labels of VOC whose palettes were renumbered, as train, and as val."""
    ids = [path.stem for path in sorted((REAL_VOC / "VOCdevkit/VOC2012/SegmentationClass").iterdir())][:6]
    for name in ("JPEGImages", "SegmentationClass"):
        (folder / name).mkdir(parents=True)
    for image_id in ids:
        shutil.copy(REAL_VOC / f"VOCdevkit/VOC2012/JPEGImages/{image_id}.jpg", folder / "JPEGImages")
        used = renumber(REAL_VOC / f"VOCdevkit/VOC2012/SegmentationClass/{image_id}.png",
                        folder / f"SegmentationClass/{image_id}.png")
        assert used[0] == 0 and used != list(range(len(used)))
    lists(folder, train=ids[:3], val=ids[3:])
    return folder


@pytest.mark.skipif(not REAL_VOC.is_dir(), reason="no real VOC subset")
def test_renumbered_palettes_of_real_labels_are_refused(tmp_path):
    """The message's command drops the palettes; then nothing is known any more."""
    data = renumbered_voc(tmp_path / "voc's")
    lines = [refused(data, tmp_path / "run", "--train_split", "train")]
    checkpoint = untrained_checkpoint(tmp_path / "net.pth", CLASSES)
    lines.append(error_line(EVALUATE, checkpoint, "--data_path", data, "--device", "cpu"))
    for line in lines:
        assert re.search(r"index 1 is \(\d+, \d+, \d+\) in .*SegmentationClass/\d+_\d+\.png, \(128, 0, 0\) in VOC",
                         line), line
    before = {path: np.array(Image.open(path)) for path in (data / "SegmentationClass").iterdir()}
    command = lines[1].partition("drop the palettes: ")[2]
    assert command.startswith("python -c ")
    subprocess.run([sys.executable, *shlex.split(command)[1:]], check=True)
    for path, pixels in before.items():
        assert Image.open(path).mode == "L" and np.array_equal(np.array(Image.open(path)), pixels)
    run(EVALUATE, checkpoint, "--data_path", data, "--device", "cpu")


def test_an_index_of_two_colours_is_refused_for_classes_of_ones_own(tmp_path):
    """Of either list. Files without a palette, of greys, or with a single colour say nothing; nor does 255."""
    data, colours = write(tmp_path / "data", [(1, 2)] * 6, colours=palette()), palette()
    lists(data, train=["p0", "p1", "p2", "p3"], val=["p4", "p5"])
    grey, single = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 3, 1), np.full((256, 3), 77, np.uint8)
    for number, table in ((1, grey), (2, single)):
        with Image.open(data / f"masks/p{number}.png") as label:
            label.load()
            label.putpalette(table.tobytes())
            label.save(data / f"masks/p{number}.png")
    Image.fromarray(np.array(Image.open(data / "masks/p3.png"))).save(data / "masks/p3.png")
    void = colours.copy()
    void[255] = 1, 2, 3
    with Image.open(data / "masks/p5.png") as label:
        pixels = np.array(label)
        pixels[0] = 255
        picture = Image.fromarray(pixels)
        picture.putpalette(void.tobytes())
    picture.save(data / "masks/p5.png")
    assert "note: " not in checked(data, tmp_path / "run")
    colours[[1, 2]] = colours[[2, 1]]
    picture.putpalette(colours.tobytes())
    picture.save(data / "masks/p5.png")
    line = error_line(TRAIN, *train_flags(data, tmp_path / "run"))
    assert "index 1 is (0, 128, 0) in" in line and "masks/p5.png, (128, 0, 0) in" in line and "masks/p0.png" in line


@pytest.mark.parametrize("suffix, how", [
    (".jpg", {"format": "JPEG"}), (".png", {"format": "JPEG"}), (".jp2", {}), (".avif", {"quality": 90}),
    (".webp", {"format": "WEBP", "lossless": False}), (".tif", {"compression": "jpeg"})])
def test_lossy_labels_are_told_by_their_decoder(tmp_path, suffix, how):
    data = write(tmp_path / "data", [(1, 2)] * 4)
    for path in list((data / "masks").iterdir()):
        Image.open(path).save(path.with_suffix(suffix), **how)
        if suffix != ".png":
            path.unlink()
    line = refused(data, tmp_path / "run")
    assert f"masks/p0{suffix}: the label is " in line and "lossy" in line


def bits(pixels, depth, path):
    """A grey PNG of that many bits, or a PGM whose maximum is not 255."""
    if path.suffix == ".pgm":
        path.write_bytes(b"P5 %d %d %d\n" % (*pixels.shape[::-1], depth) + pixels.tobytes())
    else:
        Image.fromarray(pixels).save(path, bits=depth)


@pytest.mark.parametrize("depth", (1, 2, 4))
def test_grey_of_few_bits_has_the_values_of_the_file(tmp_path, depth):
    pixels = np.random.default_rng(0).integers(0, 2 ** depth, (13, 9), dtype=np.uint8)
    image = Image.fromarray(pixels.astype(bool)) if depth == 1 else Image.fromarray(pixels)
    image.save(tmp_path / "a.png", bits=depth)
    assert (tmp_path / "a.png").read_bytes()[24] == depth  # of IHDR
    label = decode_label(tmp_path / "a.png")[0]
    assert label.dtype == torch.uint8 and np.array_equal(label, pixels)


def test_values_that_pillow_changes_are_refused(tmp_path):
    pixels = np.array([[0, 1], [2, 1]], np.uint8)
    Image.fromarray(pixels).save(tmp_path / "white is zero.tif", tiffinfo={262: 0})
    Image.fromarray(pixels > 0).save(tmp_path / "bit.tif", tiffinfo={262: 0}, compression="group4")
    Image.fromarray(pixels > 0).save(tmp_path / "black is one.pbm")
    (tmp_path / "scaled.pgm").write_bytes(b"P5 2 2 15\n" + pixels.tobytes())
    Image.fromarray(pixels.astype(np.uint16)).save(tmp_path / "sixteen.png")
    for path in sorted(tmp_path.iterdir()):
        with pytest.raises(UserError, match="8-bit grey PNG whose pixel values are the classes"):
            decode_label(path)
    (tmp_path / "plain.pgm").write_bytes(b"P5 2 2 255\n" + pixels.tobytes())
    assert np.array_equal(decode_label(tmp_path / "plain.pgm")[0], pixels)


def test_labels_of_several_images_and_turned_ones_are_refused(tmp_path):
    """A page for each class, of which the first alone would be read; a label that EXIF turns, as viewers show it."""
    pages = [Image.fromarray(np.full((3, 4), page, np.uint8)) for page in (0, 1)]
    for path in (tmp_path / "pages.tif", tmp_path / "pages.png"):
        pages[0].save(path, save_all=True, append_images=pages[1:])
        with pytest.raises(UserError, match=rf"{path.name}: the label holds several images"):
            decode_label(path)
    exif = Image.Exif()
    exif[0x0112] = 3
    pages[1].save(tmp_path / "turned.png", exif=exif)
    with pytest.raises(UserError, match="turned.png: the label is turned or mirrored by EXIF"):
        decode_label(tmp_path / "turned.png")


def test_labels_of_0_and_255_among_others_are_counted_in_a_note(tmp_path):
    data = write(tmp_path / "data", [(1, 2)] * 4 + [(255,)] * 2)
    lists(data, train=["p0", "p1", "p4"], val=["p2", "p5"])
    output = checked(data, tmp_path / "run")
    for split, count, name in (("train", 3, "p4"), ("val", 2, "p5")):
        assert (f"note: the list '{split}': 1 of {count} images have labels of 0 and 255 alone, background and "
                f"'not labelled': {name}\n") in output


def test_masks_of_0_and_255_are_told_the_value_of_the_object(tmp_path):
    data = write(tmp_path / "data", [(255,)] * 5, names="ground\ncat\n")
    line = refused(data, tmp_path / "run")
    assert "255" in line and "not labelled" in line and "the object takes the value 1" in line
    lists(data, val=["p0", "p1"])
    checkpoint = untrained_checkpoint(tmp_path / "net.pth", ["ground", "cat"])
    assert "takes the value 1" in error_line(EVALUATE, checkpoint, "--data_path", data, "--device", "cpu")


@pytest.mark.parametrize("orientation, size, seen", [(6, (40, 30), True), (3, (40, 30), False), (6, (30, 30), False)])
def test_exif_is_named_where_a_label_is_not_turned_with_its_image(tmp_path, orientation, size, seen):
    data = write(tmp_path / "data", [(1, 2)] * 5, size=size)
    image = Image.open(data / "images/p1.png")
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(data / "images/p1.png", exif=exif)
    if seen:
        line = refused(data, tmp_path / "run")
        assert "p1.png" in line and "EXIF" in line
        label = Image.open(data / "masks/p1.png")
        label.transpose(EXIF_TURNS[orientation]).save(data / "masks/p1.png")
        assert "EXIF" not in checked(data, tmp_path / "run")
    else:
        output = checked(data, tmp_path / "run")
        assert re.search(r"note: .*1 of \d images are turned or mirrored by EXIF.*: p1\n", output)
    assert np.array_equal(read_image(data / "images/p1.png").permute(1, 2, 0),
                          np.array(ImageOps.exif_transpose(Image.open(data / "images/p1.png")).convert("RGB")))


# ---- absent classes, and the split

def test_a_validation_list_without_some_classes_is_a_note_with_the_flags(tmp_path):
    data = write(tmp_path / "data", [(1, 2)] * 3 + [(1,)] + [()] * 2)
    lists(data, train=["p0", "p1", "p2"], val=["p3", "p4"], bare=["p4", "p5"])
    output = checked(data, tmp_path / "run")
    assert re.search(r"note: the list 'val' lacks dog .*--seed and --val_fraction", output)
    output = checked(data, tmp_path / "run", "--val_split", "bare")
    assert "lacks cat, dog" in output and "every label of the list 'bare' is all background" in output
    train(data, tmp_path / "run", "--val_split", "bare", "--max_iters", 1)
    assert "all background" in run(EVALUATE, tmp_path / "run/ckpt/best.pth", "--data_path", data, "--split", "bare",
                                   "--device", "cpu").stdout
    assert "all background" in refused(data, tmp_path / "other", "--train_split", "bare")


def presence(labels):
    return {f"p{n:02}": np.isin(np.arange(3), (0, *values)) for n, values in enumerate(labels)}


@pytest.mark.parametrize("labels", (
    [(1,)] * 2 + [()] * 18, [(1,)] * 18 + [(2,)] * 2, [(1, 2)] + [()] * 9, [(1,), (2,), (1, 2), (2,)] + [()] * 20,
    [(1,), (2,)] * 3))
def test_a_drawn_split_has_every_class_in_both_parts(labels):
    """Where two images have it; that of one image alone is trained on. The counts are those drawn; so is the split,
    where nothing lacks."""
    has, kept = presence(labels), 0
    for seed in range(40):
        drawn = split_by_seed(list(has), 0.2, seed)
        split = with_every_class(drawn, has)
        assert {name: len(ids) for name, ids in split.items()} == {name: len(ids) for name, ids in drawn.items()}
        assert sorted([*split["train"], *split["val"]]) == sorted(has)
        counts = {name: sum(has[image_id].astype(int) for image_id in ids) for name, ids in split.items()}
        total = counts["train"] + counts["val"]
        if len(split["val"]) > 1:
            assert (counts["train"][total > 0] > 0).all() and (counts["val"][total > 1] > 0).all()
        both = all(sum(has[image_id] for image_id in ids)[total > 1].all() for ids in drawn.values())
        if both and total.min() > 1:
            kept += 1
            assert split == drawn
    assert kept or total.min() < 2 or len(labels) * 0.2 < 3


def test_twenty_photographs_train_with_every_class_in_both_lists(tmp_path):
    """Cats in two of twenty images. The labels are read once."""
    data = write(tmp_path / "data", [(1,)] * 2 + [(2,)] * 17 + [(2, 3)], names="ground\ncat\ndog\nowl\n")
    for seed in range(3):
        with mock.patch("voc.decode_label", side_effect=decode_label) as reads, mock.patch(
                "train.draw_data"), mock.patch("train.first_samples"):
            output = train(data, tmp_path / f"run{seed}", "--check", "--seed", seed).stdout
        assert reads.call_count == 20
        counts = {line.split()[0]: [line.split()[i] for i in (1, 3)] for line in output.splitlines()
                  if line.startswith(("cat ", "dog ", "owl "))}
        assert counts["cat"] == ["1", "1"] and counts["owl"] == ["1", "0"]
        assert "a single image has owl: it is trained on" in output
    train(data, tmp_path / "run", "--max_iters", 1)
    kept = state(tmp_path / "run/ckpt/latest.pth")["meta"]["lists"]
    assert len(kept["val"]) == 4 and len({"p0", "p1"} & set(kept["val"])) == 1 and "p19" in kept["train"]


# ---- images

def png16(pixels, path):
    """Writes uint16 [H, W, 3] as a PNG of 16-bit colours, which Pillow does not."""
    import struct
    import zlib

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", *pixels.shape[1::-1], 16, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows))
                     + chunk(b"IEND", b""))


RAMP = np.linspace(0, 1, 1200).reshape(30, 40)
WRONG_RANGES = {"unit.tif": RAMP.astype(np.float32), "wide.tif": (RAMP * 65535).astype(np.float32),
                "negative.tif": (RAMP * 255 - 9).astype(np.float32), "nan.tif": np.full((30, 40), np.nan, np.float32),
                "twelve.png": (RAMP * 4095).astype(np.uint16), "eight.tif": (RAMP * 255).astype(np.uint16),
                "minus.tif": (RAMP * 60000 - 9).astype(np.int32), "large.tif": (RAMP * 2 ** 30).astype(np.int32)}


@pytest.mark.parametrize("name", (*WRONG_RANGES, "colour.png"))
def test_images_whose_values_do_not_say_what_is_white_are_refused(tmp_path, name):
    data, path = write(tmp_path / "data", [(1, 2)] * 5), tmp_path / name
    if name in WRONG_RANGES:
        Image.fromarray(WRONG_RANGES[name]).save(path)
    else:
        png16(np.full((30, 40, 3), 255, np.uint16), path)
    (data / "images/p2.png").unlink()
    shutil.copy(path, data / f"images/p2{path.suffix}")
    line = refused(data, tmp_path / "run")
    assert f"images/p2{path.suffix}: its values lie in " in line and "8-bit" in line
    checkpoint = untrained_checkpoint(tmp_path / "net.pth", ["ground", "cat"])
    done = run(PREDICT, checkpoint, data / "images", "--save_dir", tmp_path / "out", "--device", "cpu", status=1)
    assert f"p2{path.suffix}: its values lie in " in done.stderr and len(list((tmp_path / "out").glob("*.png"))) == 4


def test_images_of_a_known_range_are_read_as_before(tmp_path):
    grey = np.round(RAMP * 255).astype(np.uint8)
    grey[0, 0] = 255
    for name, pixels in (("float.tif", grey.astype(np.float32)), ("sixteen.png", grey.astype(np.uint16) * 257),
                         ("thirty-two.tif", grey.astype(np.int32) * 257)):
        Image.fromarray(pixels).save(tmp_path / name)
        assert np.array_equal(read_image(tmp_path / name), np.repeat(grey[None], 3, 0)), name
    png16(np.repeat(grey[..., None], 3, 2).astype(np.uint16) * 256, tmp_path / "colour.png")
    assert np.array_equal(read_image(tmp_path / "colour.png")[0], grey)
    Image.new("RGB", (4, 4)).save(tmp_path / "night.png")
    assert not read_image(tmp_path / "night.png").any()


def test_linked_folders_are_read_once(tmp_path):
    """A loop ends; a note names the second way to a folder."""
    data, more = write(tmp_path / "data", [(1, 2)] * 4), write(tmp_path / "more", [(1, 2)] * 3)
    for kind in ("images", "masks"):
        (data / kind / "batch2").symlink_to(more / kind)
        (data / kind / "again").symlink_to(more / kind)
        (more / kind / "loop").symlink_to(data / kind)
    ids, note = VOC.labelled(data)
    assert ids == [*(f"again/p{n}" for n in range(3)), *(f"p{n}" for n in range(4))]
    assert f"{data}/images/batch2" in note and f"{data}/images/again/loop" in note and "again," not in note
    output = checked(data, tmp_path / "run")
    assert "6 images of 'train', 1 of 'val'" in output and f"{data}/images/batch2" in output
    checkpoint = untrained_checkpoint(tmp_path / "net.pth", ["ground", "cat"])
    output = run(PREDICT, checkpoint, data / "images", "--save_dir", tmp_path / "out", "--device", "cpu").stdout
    assert "7 photographs labelled" in output and f"{data}/images/batch2" in output
    assert (tmp_path / "out/again/p2.png").is_file()


# ---- lists and folders

@pytest.mark.parametrize("line", ("p0.png p0.png", "p0.png", "images/p0", "/data/images/p0.png"))
def test_a_line_that_is_no_id_is_named_with_its_number(tmp_path, line):
    data = write(tmp_path / "data", [(1, 2)] * 4)
    lists(data, train=["p1", "", line], val=["p2"])
    message = refused(data, tmp_path / "run")
    assert f"ImageSets/Segmentation/train.txt, line 3: '{line}'" in message and "without extension" in message


def test_ids_with_spaces_dots_and_folders_are_ids(tmp_path):
    data = write(tmp_path / "data", [(1, 2)] * 4)
    for number, name in enumerate(("my cat", "v1.2 final", "day 1/b.c")):
        for kind in ("images", "masks"):
            (data / kind / "day 1").mkdir(exist_ok=True)
            (data / f"{kind}/p{number}.png").rename(data / f"{kind}/{name}.png")
    lists(data, train=["my cat", "v1.2 final", "my cat"], val=["day 1/b.c", "p3"])
    output = checked(data, tmp_path / "run")
    assert "note: the list 'train': 1 of 2 images stand there twice: my cat\n" in output
    lists(data, train=["your cat"])
    assert "your cat" in error_line(TRAIN, *train_flags(data, tmp_path / "run"))


def scored(checkpoint, data, *flags):
    return run(EVALUATE, checkpoint, "--data_path", data, "--device", "cpu", *flags).stdout


def test_what_is_scored_goes_by_the_content_of_the_images(tmp_path):
    """Another folder with the same names is scored by its own list or as a whole; the folder of the training by the
    checkpoint's, whatever was added or renamed."""
    data = write(tmp_path / "data", [(1, 2)] * 10)
    train(data, tmp_path / "run", "--max_iters", 1)
    best = tmp_path / "run/ckpt/best.pth"
    meta = state(best)["meta"]
    assert {name: len(found) for name, found in meta["images"].items()} == {"train": 8, "val": 2}
    other = write(tmp_path / "other", [(1, 2)] * 10, seed=1)
    assert "10 images, the whole folder, " in scored(best, other)
    lists(other, val=[f"p{n}" for n in range(6)])
    assert "6 images of 'val', a list of the folder, " in scored(best, other)
    lists(data, val=meta["lists"]["train"])
    for kind in ("images", "masks"):
        shutil.copy(other / kind / "p0.png", data / kind / "a.png")
        name = meta["lists"]["val"][0]
        (data / kind / f"{name}.png").rename(data / kind / "renamed.png")
    output = scored(best, data)
    assert "2 images of 'val' of the checkpoint's lists, " in output and "trained on" not in output
    shutil.copy(data / f"images/{meta['lists']['train'][0]}.png", other / "images/p3.png")
    assert "note: the list 'val': 1 of 6 images are trained on: the same files: p3\n" in scored(best, other)


def test_a_checkpoint_without_hashes_scores_as_before(tmp_path):
    data = write(tmp_path / "data", [(1, 2)] * 10)
    train(data, tmp_path / "run", "--max_iters", 1)
    content = state(tmp_path / "run/ckpt/best.pth")
    del content["meta"]["images"]
    torch.save(content, tmp_path / "old.pth")
    other = write(tmp_path / "other", [(1, 2)] * 10, seed=1)
    assert "2 images of 'val' of the checkpoint's lists, " in scored(tmp_path / "old.pth", other)


def test_validation_images_that_are_trained_on_are_named(tmp_path):
    data = write(tmp_path / "data", [(1, 2)] * 6)
    shutil.copy(data / "images/p0.png", data / "images/p5.png")
    lists(data, train=["p0", "p1", "p2"], val=["p3", "p4", "p5"])
    assert "note: the list 'val': 1 of 3 images are trained on: the same files: p5\n" in checked(data, tmp_path / "run")


# ---- checkpoints of others

@pytest.mark.parametrize("form", ({"CLASSES": ("a", "b", "c"), "PALETTE": [[9, 8, 7], [6, 5, 4], [3, 2, 1]]},
                                  {"dataset_meta": {"classes": ["a", "b", "c"],
                                                    "palette": [[9, 8, 7], [6, 5, 4], [3, 2, 1]]}},
                                  {"dataset_meta": {"CLASSES": ("a", "b", "c"), "PALETTE": None}}))
def test_names_and_colours_come_from_the_file(tmp_path, form):
    checkpoint = untrained_checkpoint(tmp_path / "net.pth", ["x", "y", "z"])
    torch.save({"state_dict": torch.load(checkpoint)["state_dict"], "meta": form}, checkpoint)
    read = Checkpoint.read(checkpoint, "tiny")
    coloured = form.get("PALETTE") or form.get("dataset_meta", {}).get("palette")
    assert read.names() == ("a", "b", "c") and np.array_equal(read.colours()[:3], coloured or palette()[:3])
    data = write(tmp_path / "data", [(1, 2)] * 5)
    lists(data, train=["p0", "p1"], val=["p2", "p3"])
    output = scored(checkpoint, data, "--backbone", "tiny", "--scale", 64, 64)
    assert "\na " in output and "\nc " in output
    run(PREDICT, checkpoint, data / "images/p0.png", "--save_dir", tmp_path / "out", "--backbone", "tiny", "--device",
        "cpu", "--csv", tmp_path / "shares.csv")
    assert (tmp_path / "shares.csv").read_text().splitlines()[0] == "photograph,a,b,c"
    assert Image.open(tmp_path / "out/p0.png").getpalette()[3:6] == (coloured or palette()[:3].tolist())[1]
    output = checked(data, tmp_path / "run", "--pretrained", checkpoint)
    assert "for other classes, of which the backbone is taken" in output
    (data / "class_names.txt").write_text("a\nb\nc\n")
    assert "heads start afresh" not in checked(data, tmp_path / "run", "--pretrained", checkpoint)


def test_names_that_do_not_fit_the_classes_are_left_aside(tmp_path):
    checkpoint = untrained_checkpoint(tmp_path / "net.pth", ["x", "y", "z"])
    meta = {"CLASSES": ("a",), "PALETTE": [[1, 2, 3]]}
    torch.save({"state_dict": torch.load(checkpoint)["state_dict"], "meta": meta}, checkpoint)
    read = Checkpoint.read(checkpoint, "tiny")
    assert read.names() is None and np.array_equal(read.colours(), palette())


def test_the_command_for_a_file_with_a_namespace_makes_one_that_is_read(tmp_path):
    """As torchvision's references save it."""
    path = tmp_path / "model_89.pth"
    torch.manual_seed(0)
    torch.save({"model": torchvision.models.resnet50(num_classes=3).state_dict(), "epoch": 89,
                "args": argparse.Namespace(lr=0.1)}, path)
    with pytest.raises(UserError) as caught:
        Checkpoint.read(path, "resnet50")
    command = str(caught.value).partition("make a plain one: ")[2]
    run(*shlex.split(command)[1:])
    read = Checkpoint.read(f"{path}.plain.pth", "resnet50")
    assert read.kind == "ImageNet weights of the backbone" and "conv1.weight" in read.state


@pytest.mark.parametrize("prefix", ("_orig_mod.", "module.", "_orig_mod.module.", "module._orig_mod."))
@pytest.mark.parametrize("key", ("model", "state_dict", None))
def test_prefixes_of_wrappers_are_stripped(tmp_path, prefix, key):
    checkpoint = untrained_checkpoint(tmp_path / "net.pth", ["x", "y", "z"])
    weights = torch.load(checkpoint)["state_dict"]
    wrapped = {prefix + name: value for name, value in weights.items()}
    torch.save({key: wrapped} if key else wrapped, checkpoint)
    assert Checkpoint.read(checkpoint, "tiny").network().state_dict().keys() == weights.keys()


# ---- train.py --check

def test_a_check_shows_the_data_and_leaves_no_run(tmp_path, pictures):
    data = write(tmp_path / "data", [(1, 2)] * 5 + [(1, 255)] * 5)
    (data / "images/notes.txt").write_text("x")
    (data / "masks/p9.png").rename(data / "masks/lost.png")
    output = checked(data, tmp_path / "run")
    labels = {path.stem: np.array(Image.open(path)) for path in (data / "masks").iterdir() if path.stem != "lost"}
    seen = json.loads(json.dumps(output))
    drawn = split_by_seed(sorted(labels), 0.2, 0)
    has = {name: np.isin(np.arange(255), label) for name, label in labels.items()}
    for name, ids in with_every_class(drawn, has).items():
        for value, title in enumerate(("ground", "cat", "dog")):
            line = next(line for line in seen.splitlines() if line.startswith(f"{title} ")).split()
            at = 1 if name == "train" else 3
            assert int(line[at]) == sum((labels[i] == value).any() for i in ids)
            assert int(line[at + 1].replace(",", "")) == sum((labels[i] == value).sum() for i in ids)
    assert "40x30 (7)" in output and "p9" in output and "lost" in output and "notes.txt" in output
    assert sorted(path.name for path in (tmp_path / "run").iterdir() if path.name != ".lock") == [
        "data.png", "train_batch.png"]
    checked(data, tmp_path / "run")
    assert not (tmp_path / "run/train_0.log").exists()
    train(data, tmp_path / "run", "--max_iters", 1)
    before = (tmp_path / "run/train_0.log").read_text(), state(tmp_path / "run/ckpt/latest.pth")["progress"]
    assert "holds a run already" in error_line(TRAIN, *train_flags(data, tmp_path / "run"), "--check")
    checked(data, tmp_path / "run", "--resume", "auto")
    assert before == ((tmp_path / "run/train_0.log").read_text(), state(tmp_path / "run/ckpt/latest.pth")["progress"])
    flags = (*train_flags(data, tmp_path / "new"), "--check")
    assert "--crop_size" in error_line(TRAIN, *flags, "--crop_size", 0, status=2)
    assert "batch normalisation" in refused(data, tmp_path / "new", "--check", "--crop_size", 32, "--batch_size", 1)


def test_a_training_draws_the_data_and_is_the_same_run_without(tmp_path, pictures):
    """Its first batch is the one in the picture, and drawing changes no random state."""
    from conftest import assert_same_run

    from transforms import prepare_batch, visible
    data, seen = write(tmp_path / "data", [(1, 2)] * 8), []

    def spy(batch, *more):
        seen.append({key: value.clone() for key, value in batch.items()})
        return prepare_batch(batch, *more)

    with mock.patch("train.prepare_batch", spy), mock.patch("inference.prepare_batch", spy):
        train(data, tmp_path / "a")
    assert all(torch.equal(seen[0][key], seen[1][key]) for key in seen[0])
    assert {"data.png", "train_batch.png"} <= set(os.listdir(tmp_path / "a"))
    with mock.patch("train.draw_data"):
        train(data, tmp_path / "b")
    assert_same_run(tmp_path / "a", tmp_path / "b")
    run(TRAIN, *train_flags(data, tmp_path / "perf"), "--performance", "--max_iters", 2)
    assert not (tmp_path / "perf/data.png").exists()
    for form in ("unpadded", "padded"):
        batch = {**seen[0], "jitter": torch.full_like(seen[0]["jitter"], -1000.0)}
        shown = visible(prepare_batch(batch, form, torch.device("cpu"))[0], form)
        height, width = batch["size"][0].tolist()
        assert np.abs(shown[0, :height, :width].astype(int) - batch["image"][0, :height, :width].numpy()).max() <= 1
