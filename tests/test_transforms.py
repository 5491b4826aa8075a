"""transforms.py and data.py: augmentation, the sample stream, normalisation; held against NumPy, SciPy, colorsys."""
import argparse
import colorsys

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from scipy import stats

from data import TrainStream, train_batches
from device import Ranks
from transforms import LEFT_OUT, TrainAugmentation, distort_colours, prepare, resize_image, scaled_size
from voc import IGNORE, VOC

CROP, SCALE, SEED = 96, (256, 128), 3


@pytest.fixture(scope="module")
def stream(drawn_voc):
    return TrainStream(VOC(drawn_voc, "trainaug"), TrainAugmentation(CROP, SCALE), SEED)


def batches_of(data, first, last, batch_size, workers=0, rank=0, ranks=1):
    """The training batches of one rank, as a list."""
    args = argparse.Namespace(crop_size=CROP, scale=SCALE, seed=SEED, batch_size=batch_size, accumulate=1,
                              workers=workers)
    return list(train_batches(data, args, first, last, Ranks(torch.device("cpu"), rank, ranks)))


def test_scaled_size_keeps_the_aspect_and_at_least_one_pixel():
    assert scaled_size(375, 500, 2048, 512) == (512, 683)
    assert scaled_size(500, 375, 512, 128) == (171, 128)
    assert scaled_size(10, 4000, 512, 512) == (1, 512)
    assert scaled_size(1, 100_000, 512, 128) == (1, 512)


def test_resize_is_bilinear_with_half_pixel_centres():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (3, 37, 53), dtype=np.uint8)
    for size in ((20, 30), (37, 53), (80, 61)):
        y, x = (np.clip((np.arange(out) + 0.5) * side / out - 0.5, 0, side - 1)
                for out, side in zip(size, (37, 53), strict=True))
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
    augmentation = TrainAugmentation(CROP, SCALE)
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
    done = jitter != LEFT_OUT
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
    count = len(stream.data)
    epochs = [[stream.index(epoch * count + i) for i in range(count)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    for batch, start in zip(batches_of(stream.data, 0, 15, 5), (0, 5, 10), strict=True):
        assert torch.equal(batch["jitter"], torch.stack([stream[start + i]["jitter"] for i in range(5)]))


def test_global_batches_do_not_depend_on_ranks_or_workers(stream):
    def batches(ranks, workers):
        loaders = [batches_of(stream.data, 8, 20, 4 // ranks, workers, rank, ranks) for rank in range(ranks)]
        return [{key: torch.cat([part[key] for part in parts]) for key in parts[0]}
                for parts in zip(*loaders, strict=True)]

    alone = batches(1, 0)
    assert len(alone) == 3
    for other in (batches(2, 0), batches(4, 2), batches(1, 2)):
        for a, b in zip(alone, other, strict=True):
            assert all(torch.equal(a[key], b[key]) for key in a)


def test_a_sample_depends_on_seed_and_position_alone(stream):
    again = TrainStream(stream.data, stream.augmentation, SEED)
    other = TrainStream(stream.data, stream.augmentation, seed=4)
    assert torch.equal(stream[17]["image"], again[17]["image"])
    assert not all(torch.equal(stream[i]["image"], other[i]["image"]) for i in range(4))


# ---- on the device

def test_prepare_normalises_and_leaves_padding_exactly_zero(stream):
    batch, = batches_of(stream.data, 0, 8, 8)
    out = prepare(batch["image"], sizes=batch["size"], jitter=batch["jitter"])
    for image, (height, width) in zip(out, batch["size"], strict=True):
        assert (image[:, height:] == 0).all() and (image[:, :, width:] == 0).all()
    plain = prepare(batch["image"]).numpy()
    expected = torchvision.transforms.functional.normalize(
        batch["image"].permute(0, 3, 1, 2) / 255, mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225]).numpy()
    np.testing.assert_allclose(plain, expected, atol=2e-5)


def distort(pixels, **steps):
    """`distort_colours` on an image of N pixels, [N, 3] -> [N, 3]."""
    order = ("brightness", "contrast", "saturation", "hue", "contrast_last")
    jitter = torch.tensor([[steps.get(name, 0.0 if name == "contrast_last" else LEFT_OUT) for name in order]])
    images = torch.from_numpy(pixels.T.astype(np.float32))[None, :, None]
    return distort_colours(images, jitter)[0, :, 0].T.numpy()


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
