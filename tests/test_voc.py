"""voc.py: lists, images, labels, and what their check finds."""
import argparse
import gc

import numpy as np
import pytest
import torch
from conftest import REAL_VOC, kill_workers
from PIL import Image

from cli import UserError, message_of
from data import train_batches
from device import Ranks
from voc import CLASSES, VOC, palette, read_image

SHIFTS = np.array([1 << 16, 1 << 8, 1])  # a colour times these is one number


def test_palette_is_vocs():
    """The corners of VOC's published colour map."""
    known = {0: (0, 0, 0), 1: (128, 0, 0), 2: (0, 128, 0), 3: (128, 128, 0), 15: (192, 128, 128), 20: (0, 64, 128),
             255: (224, 224, 192)}
    assert {index: tuple(palette()[index]) for index in known} == known
    assert len(CLASSES) == 21 and CLASSES[15] == "person"


def test_labels_read_equal_the_files_pixels(real_voc):
    """Decoded into the colours that a viewer shows, and those turned back into indices."""
    index_of = {int(code): index for index, code in enumerate(palette() @ SHIFTS)}
    data = VOC(real_voc, "val")
    for i in range(0, len(data), 10):
        image, label = data[i]
        colours = np.asarray(Image.open(data.label_path(data.ids[i])).convert("RGB"))
        codes, inverse = np.unique(colours @ SHIFTS, return_inverse=True)
        expected = np.array([index_of[int(code)] for code in codes])[inverse].reshape(label.shape)
        np.testing.assert_array_equal(label, expected)
        assert image.shape == (3, *label.shape) and image.dtype == label.dtype == torch.uint8


def test_trainaug_takes_vocs_label_in_train_and_sbds_otherwise(real_voc):
    data = VOC(real_voc, "trainaug")
    train = set((real_voc / "ImageSets/Segmentation/train.txt").read_text().split())
    folders = {image_id: data.label_path(image_id).parent.name for image_id in data.ids}
    assert folders == {i: "SegmentationClass" if i in train else "SegmentationClassAug" for i in data.ids}
    assert sum(i in train for i in data.ids) == 170 and len(data) == 380
    shared = {path.stem for path in (REAL_VOC / "VOCdevkit/VOCaug/dataset/cls").iterdir()} & train
    assert len(shared) == 12  # for which the rule makes a difference: SBD has no void


# ---- what check finds

def test_check_returns_the_sizes(drawn_voc):
    data = VOC(drawn_voc, "val")
    assert data.check(21) == [Image.open(data.image_path(i)).size[::-1] for i in data.ids]
    assert data.check(21, count=2) == data.check(21)[:2]


def test_each_of_a_few_bad_ids_is_named(own_drawn_voc):
    data = VOC(own_drawn_voc, "val")
    for image_id in data.ids[:2]:
        data.image_path(image_id).unlink()
    with pytest.raises(UserError) as caught:
        data.check(21)
    assert all(image_id in str(caught.value) for image_id in data.ids[:2]) and "\n" not in str(caught.value)


def test_a_link_to_nothing_is_an_image_to_restore(tmp_path):
    """predict.py finds it in a folder; its message spoke of a list."""
    (tmp_path / "a.jpg").symlink_to(tmp_path / "nowhere.jpg")
    with pytest.raises(UserError, match=r"a\.jpg: there is no such image; add or restore it$"):
        read_image(tmp_path / "a.jpg")


def test_an_error_in_a_worker_is_the_same_line(own_drawn_voc):
    data = VOC(own_drawn_voc, "train")
    data.image_path(data.ids[0]).write_bytes(b"garbage")
    lines = []
    for workers in (0, 1):
        args = argparse.Namespace(crop_size=64, scale=(128, 64), seed=0, batch_size=6, accumulate=1, workers=workers)
        with pytest.raises(UserError, match="does not decode") as caught:
            list(train_batches(data, args, 0, 6, Ranks(torch.device("cpu"))))
        lines.append(message_of(caught.value))
        del caught
        kill_workers()
        gc.collect()
    assert lines[0] == lines[1] and "\n" not in lines[0] and data.ids[0] in lines[0]
