"""voc.py: labels, augmentation, the sample stream, normalisation; held against NumPy, SciPy, colorsys, closed forms."""
import colorsys

import numpy as np
import pytest
import torch
import torchvision
from conftest import REAL_VOC
from PIL import Image
from scipy import stats

import voc
from voc import IGNORE, VOC, DataError, TrainAugmentation, TrainStream, prepare, resize_image, scaled_size, train_loader

CROP = 96


@pytest.fixture(scope="module")
def stream(drawn_voc):
    return TrainStream(VOC(drawn_voc, "trainaug"), TrainAugmentation(CROP, (256, 128)), seed=3)


def test_palette_is_vocs():
    """The corners of VOC's published colour map."""
    known = {0: (0, 0, 0), 1: (128, 0, 0), 2: (0, 128, 0), 3: (128, 128, 0), 15: (192, 128, 128), 20: (0, 64, 128),
             255: (224, 224, 192)}
    assert {index: tuple(voc.palette()[index]) for index in known} == known
    assert len(voc.CLASSES) == 21 and voc.CLASSES[15] == "person"


def test_labels_read_equal_the_files_pixels(real_voc):
    """Decoded into the colours that a viewer shows, and those turned back into indices."""
    index_of = {tuple(colour): index for index, colour in enumerate(voc.palette())}
    data = VOC(real_voc, "val")
    for i in range(0, len(data), 10):
        image, label = data[i]
        colours = np.asarray(Image.open(data.label_path(data.ids[i])).convert("RGB"))
        values, inverse = np.unique(colours.reshape(-1, 3), axis=0, return_inverse=True)
        expected = np.array([index_of[tuple(colour)] for colour in values])[inverse].reshape(label.shape)
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


def test_scaled_size_keeps_the_aspect_and_at_least_one_pixel():
    assert scaled_size(375, 500, 2048, 512) == (512, 683)
    assert scaled_size(500, 375, 512, 128) == (171, 128)
    assert scaled_size(10, 4000, 512, 512) == (1, 512)
    assert scaled_size(1, 100_000, 512, 128) == (1, 512)


def test_resize_is_bilinear_with_half_pixel_centres():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (3, 37, 53), dtype=np.uint8)
    for size in ((20, 30), (37, 53), (80, 61)):
        y, x = (np.clip((np.arange(out) + 0.5) * side / out - 0.5, 0, side - 1) for out, side in zip(size, (37, 53)))
        y0, x0 = y.astype(int), x.astype(int)
        y1, x1 = np.minimum(y0 + 1, 36), np.minimum(x0 + 1, 52)
        fy, fx = (y - y0)[:, None], x - x0
        expected = ((image[:, y0][:, :, x0] * (1 - fy) + image[:, y1][:, :, x0] * fy) * (1 - fx)
                    + (image[:, y0][:, :, x1] * (1 - fy) + image[:, y1][:, :, x1] * fy) * fx)
        assert np.abs(resize_image(torch.from_numpy(image), size).numpy() - expected).max() <= 1


def test_sample_is_a_crop_of_the_scaled_image_and_its_label(drawn_voc):
    """Image and label go through the same scaling, crop and flip: a picture whose colours are its label's stays so."""
    label = torch.from_numpy(np.array(Image.open(next((drawn_voc / "SegmentationClass").glob("*.png")))))
    image = label.expand(3, -1, -1)
    augmentation = TrainAugmentation(CROP, (256, 128))
    sizes = set()
    for seed in range(50):
        sample = augmentation(image, label, np.random.default_rng(seed))
        height, width = sample["size"].tolist()
        sizes.add((height, width))
        assert sample["image"].shape == (3, CROP, CROP) and sample["label"].shape == (CROP, CROP)
        assert (sample["label"][height:] == IGNORE).all() and (sample["label"][:, width:] == IGNORE).all()
        assert (sample["image"][:, height:] == 0).all() and (sample["image"][:, :, width:] == 0).all()
        same = (sample["image"][0] == sample["label"])[:height, :width]
        assert same.float().mean() > 0.75  # all but the outlines, which bilinear scaling blends
    assert len(sizes) > 5 and (CROP, CROP) in sizes  # some scaled images are smaller than the crop


def test_draws_have_the_recipes_distributions(stream):
    augmentation, rng = stream.augmentation, np.random.default_rng(0)
    heights = [augmentation.draw_scaled_size(375, 500, rng)[0] for _ in range(2000)]
    assert stats.kstest(np.array(heights) / 128, stats.uniform(0.5, 1.5).cdf).pvalue > 0.01  # 128: the short side
    jitter = np.array([augmentation.draw_jitter(rng).numpy() for _ in range(4000)])
    done = ~np.isnan(jitter)
    assert (abs(done[:, :4].mean(0) - 0.5) < 0.03).all() and abs(jitter[:, 4].mean() - 0.5) < 0.03
    for column, low, high in ((0, -32, 32), (1, 0.5, 1.5), (2, 0.5, 1.5)):
        assert stats.kstest(jitter[done[:, column], column], stats.uniform(low, high - low).cdf).pvalue > 0.01
    assert set(jitter[done[:, 3], 3]) == set(range(-18, 18))


def test_crops_avoid_a_single_class(stream):
    """A label with a small object: most crops show it, though most places would not; ten tries cannot do more."""
    label = torch.zeros(300, 300, dtype=torch.uint8)
    label[:80, :80] = 1
    rng = np.random.default_rng(0)

    def good(corner):
        share = stream.augmentation.crop_label(label, (300, 300), *corner).float().mean()
        return 0.25 < share < 0.75
    by_chance = np.mean([good(rng.integers(0, 300 - CROP + 1, 2)) for _ in range(500)])
    chosen = np.mean([good(stream.augmentation.draw_crop(label, (300, 300), rng)) for _ in range(500)])
    assert abs(chosen - (1 - (1 - by_chance) ** 11)) < 0.08  # 11 draws: the first and ten more


def test_void_counts_neither_as_a_class_nor_in_a_share(stream):
    """With 80% void, and classes 1 and 2 sharing the rest, the first corner drawn is good; with 1 alone none is."""
    label = torch.full((CROP, 3 * CROP), IGNORE, dtype=torch.uint8)
    label[:, ::10], label[:, 5::10] = 1, 2
    alone = label.where(label != 2, torch.tensor(IGNORE, dtype=torch.uint8))
    for seed in range(20):
        first = np.random.default_rng(seed)
        corner = [int(first.integers(1)), int(first.integers(2 * CROP + 1))]
        rng = np.random.default_rng(seed)
        assert stream.augmentation.draw_crop(label, label.shape, rng) == corner
        assert rng.bit_generator.state == first.bit_generator.state
        stream.augmentation.draw_crop(alone, label.shape, rng)
        for _ in range(11):  # the first and ten more
            first.integers(1), first.integers(2 * CROP + 1)
        assert rng.bit_generator.state == first.bit_generator.state


# ---- the stream

def test_each_epoch_is_a_permutation_and_batches_cross_its_end(stream):
    count = len(stream.voc)
    epochs = [[stream.index(epoch * count + i) for i in range(count)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    batches = list(train_loader(stream, 5, 0, 15, workers=0).batch_sampler)
    assert [list(batch) for batch in batches] == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [10, 11, 12, 13, 14]]


def test_global_batches_do_not_depend_on_ranks_or_workers(stream):
    def batches(ranks, workers):
        loaders = [train_loader(stream, 4 // ranks, 8, 20, workers, rank, ranks) for rank in range(ranks)]
        return [{key: torch.cat([part[key] for part in parts]) for key in parts[0]} for parts in zip(*loaders)]

    alone = batches(1, 0)
    assert len(alone) == 3
    for other in (batches(2, 0), batches(4, 2), batches(1, 2)):
        for a, b in zip(alone, other, strict=True):
            assert all(torch.equal(a[key], b[key]) or torch.equal(a[key].isnan(), b[key].isnan()) for key in a)
            assert torch.equal(a["image"], b["image"])


def test_a_sample_depends_on_seed_and_position_alone(stream):
    again = TrainStream(stream.voc, stream.augmentation, seed=3)
    other = TrainStream(stream.voc, stream.augmentation, seed=4)
    assert torch.equal(stream[17]["image"], again[17]["image"])
    assert not all(torch.equal(stream[i]["image"], other[i]["image"]) for i in range(4))


# ---- on the device

def test_prepare_normalises_and_leaves_padding_exactly_zero(stream):
    batch = next(iter(train_loader(stream, 8, 0, 8, workers=0)))
    out = prepare(batch["image"], sizes=batch["size"], jitter=batch["jitter"])
    for image, (height, width) in zip(out, batch["size"]):
        assert (image[:, height:] == 0).all() and (image[:, :, width:] == 0).all()
    plain = prepare(batch["image"]).numpy()
    expected = torchvision.transforms.functional.normalize(
        batch["image"] / 255, mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225]).numpy()
    np.testing.assert_allclose(plain, expected, atol=2e-5)


def distort(pixels, **steps):
    """`distort_colours` on an image of N pixels, [N, 3] -> [N, 3]."""
    order = ("brightness", "contrast", "saturation", "hue", "contrast_last")
    jitter = torch.tensor([[steps.get(name, 0.0 if name == "contrast_last" else np.nan) for name in order]])
    images = torch.from_numpy(pixels.T.astype(np.float32))[None, :, None]
    return voc.distort_colours(images, jitter)[0, :, 0].T.numpy()


PIXELS = np.random.default_rng(1).integers(0, 256, (3000, 3))


def to_byte(values):
    return np.clip(values, 0, 255).astype(np.uint8)


def test_no_step_changes_nothing():
    np.testing.assert_array_equal(distort(PIXELS), PIXELS)


def test_brightness_and_contrast_clip_and_truncate():
    np.testing.assert_array_equal(distort(PIXELS, brightness=-20.6), to_byte(PIXELS - 20.6))
    np.testing.assert_array_equal(distort(PIXELS, contrast=1.25), to_byte(PIXELS * 1.25))
    both = distort(PIXELS, brightness=31.5, contrast=0.75)
    np.testing.assert_array_equal(both, to_byte(to_byte(PIXELS + 31.5) * 0.75))


def test_contrast_comes_second_or_last():
    first = distort(PIXELS, contrast=1.5, saturation=0.5)
    last = distort(PIXELS, contrast=1.5, saturation=0.5, contrast_last=1.0)
    np.testing.assert_array_equal(first, distort(distort(PIXELS, contrast=1.5), saturation=0.5))
    np.testing.assert_array_equal(last, distort(distort(PIXELS, saturation=0.5), contrast=1.5))


@pytest.mark.parametrize("steps", [{"saturation": 0.5}, {"saturation": 1.4}, {"hue": 17.0}, {"hue": -18.0}])
def test_saturation_and_hue_agree_with_colorsys(steps):
    """Python's colorsys in floats; 8-bit HSV rounds its three numbers, so that colours differ by a few levels."""
    def reference(pixel):
        hue, saturation, value = colorsys.rgb_to_hsv(*(pixel / 255))
        return colorsys.hsv_to_rgb((hue + steps.get("hue", 0) / 180) % 1,
                                   min(saturation * steps.get("saturation", 1), 1), value)

    difference = np.abs(distort(PIXELS, **steps) - 255 * np.array([reference(pixel) for pixel in PIXELS]))
    assert difference.mean() < 1.2 and difference.max() <= 7


# ---- what check finds

def test_check_returns_the_sizes(drawn_voc):
    data = VOC(drawn_voc, "val")
    assert data.check(21) == [Image.open(data.image_path(i)).size[::-1] for i in data.ids]
    assert data.check(21, count=2) == data.check(21)[:2]


def test_each_of_a_few_bad_ids_is_named(own_drawn_voc):
    data = VOC(own_drawn_voc, "val")
    for image_id in data.ids[:2]:
        data.image_path(image_id).unlink()
    with pytest.raises(DataError) as caught:
        data.check(21)
    assert all(image_id in str(caught.value) for image_id in data.ids[:2]) and "\n" not in str(caught.value)


def test_an_error_in_a_worker_is_the_same_line(own_drawn_voc):
    data = VOC(own_drawn_voc, "train")
    data.image_path(data.ids[0]).write_bytes(b"garbage")
    stream = TrainStream(data, TrainAugmentation(64, (128, 64)), seed=0)
    with pytest.raises(DataError, match="does not decode") as caught:
        list(train_loader(stream, 6, 0, 6, workers=1))
    assert "\n" not in str(caught.value) and data.ids[0] in str(caught.value)
