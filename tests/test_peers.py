"""Agreement with the implementations that the published numbers come from: mmsegmentation 1.2.2 and torchfcn.

Skipped where they are not installed; `bash tests/run.sh --peers` installs them. Each test prints what it measured.
"""
import numpy as np
import peers
import pytest
import torch
import torch.nn.functional as F
from peers import mmseg_loss, mmseg_model
from scipy import stats
from test_fcn8s import shake
from torch import nn
from torch.utils.data import default_collate

from amp import BatchNormGuard, Precision, fused_sgd
from data import ScaledImages
from fcn8s import FCN8s
from inference import Protocol, class_map, predict
from metrics import confusion_matrix, scores_of
from train import WithLosses, learning_rate, losses_of, parse_args, train_step
from transforms import LEFT_OUT, TrainAugmentation, distort_colours, prepare
from voc import CLASSES, IGNORE, VOC
from weights import Checkpoint


@pytest.fixture(scope="module", autouse=True)
def installed():
    if not peers.installed():
        pytest.skip("mmsegmentation and torchfcn are not installed (tests/run.sh --peers)")


def ours_from(state, backbone, tmp_path, **extra):
    torch.save({"state_dict": state, **extra}, tmp_path / "peer.pth")
    model = FCN8s(21, backbone)
    model.origin = Checkpoint.read(tmp_path / "peer.pth", backbone).start(model, CLASSES)
    return model


def labels_for(images):
    labels = torch.randint(0, 21, (len(images), *images.shape[-2:]), dtype=torch.uint8)
    return labels.masked_fill(torch.rand(labels.shape) < 0.2, IGNORE)


def without_dropout(monkeypatch):
    monkeypatch.setattr(F, "dropout", lambda x, *args, **kwargs: x)
    monkeypatch.setattr(F, "dropout2d", lambda x, *args, **kwargs: x)


def relative(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


# ---- networks

@pytest.mark.parametrize("backbone", peers.DEPTHS)
def test_mmsegmentations_logits_loss_and_gradients(backbone, tmp_path, monkeypatch):
    peer = shake(mmseg_model(backbone))
    model = ours_from(peer.state_dict(), backbone, tmp_path, meta={"CLASSES": ("a", "b")}).eval()
    assert "mmsegmentation" in model.origin
    differences = []
    for size in ((65, 97), (128, 91), (33, 41)):
        images = torch.randn(2, 3, *size)
        with torch.no_grad():
            differences.append(relative(model(images)["out"], peer.encode_decode(images, [{"img_shape": size}] * 2)))
    assert max(differences) <= 1e-4

    without_dropout(monkeypatch)
    images = torch.randn(2, 3, 65, 57)
    labels = labels_for(images)
    loss, theirs = losses_of(model.train()(images), labels)[0], mmseg_loss(peer.train(), images, labels)
    assert abs(loss - theirs) / theirs <= 1e-5
    model, peer, images = model.double(), peer.double(), images.double()
    peer.load_state_dict(model.state_dict())  # the BN statistics have moved
    losses_of(model(images), labels)[0].backward()
    mmseg_loss(peer, images, labels).backward()
    gradients = dict(peer.named_parameters())
    worst = max((p.grad - gradients[name].grad).norm() / gradients[name].grad.norm()
                for name, p in model.named_parameters())
    assert worst <= 1e-9
    print(f"\n{backbone}: logits {max(differences):.1e}, loss {(loss - theirs).abs().item():.1e}, "
          f"gradients {worst:.1e}")


@pytest.mark.parametrize("name, form", (("FCN8s", "padded"), ("FCN8sAtOnce", "at_once")))
def test_torchfcns_logits_loss_and_gradients(name, form, tmp_path, monkeypatch):
    import torchfcn.models
    torch.manual_seed(0)
    peer = getattr(torchfcn.models, name)()
    for parameter in peer.parameters():
        nn.init.kaiming_normal_(parameter) if parameter.dim() > 1 else nn.init.normal_(parameter)
    model = ours_from(peer.state_dict(), "vgg16", tmp_path, arch=name)
    assert model.form == form
    without_dropout(monkeypatch)
    differences = []
    for size in ((64, 48), (100, 131), (75, 203)):
        images = torch.randn(1, 3, *size)
        with torch.no_grad():
            differences.append(relative(model.eval()(images)["out"], peer.eval()(images)))
    images = torch.randn(1, 3, 64, 48)
    labels = labels_for(images)

    def peers_loss(images):
        return F.cross_entropy(peer(images), labels.long(), ignore_index=IGNORE, reduction="sum") / labels.numel()

    loss, theirs = losses_of(model.train()(images), labels)[0], peers_loss(images)
    model, peer, images = model.double(), peer.double(), images.double()
    losses_of(model(images), labels)[0].backward()
    peers_loss(images).backward()
    gradients = dict(peer.named_parameters())
    worst = max((p.grad - gradients[key.split(".", 1)[1]].grad).norm() / gradients[key.split(".", 1)[1]].grad.norm()
                for key, p in model.named_parameters() if p.requires_grad)  # the upsampling kernels are fixed
    print(f"\n{name}: logits {max(differences):.1e}, loss {(loss - theirs).abs().item():.1e}, gradients {worst:.1e}")
    assert max(differences) <= 1e-4 and abs(loss - theirs) / theirs <= 1e-5 and worst <= 1e-9


def difference(a, b):
    """The largest difference of two tensors, relative to values above 1: BN variances and momenta reach thousands."""
    return ((a - b).abs().max() / b.abs().max().clamp(min=1)).item()


def test_50_iterations_of_training(tmp_path, monkeypatch):
    """float64, at the schedule's learning rates. Before each iteration ours takes over all of the peer's state, as even
    two runs of one program drift apart."""
    without_dropout(monkeypatch)
    args = parse_args(["--data_path", "-", "--batch_size", "2", "--max_iters", "50"])
    peer = mmseg_model("resnet50_d8").double().train()
    peers_optimizer = torch.optim.SGD(peer.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    device = torch.device("cpu")
    model, precision = FCN8s(21, "resnet50_d8").double().train(), Precision(device)
    ours = dict(model.named_parameters())
    optimizer = fused_sgd(list(ours.values()), device, precision, args.lr, args.momentum, args.weight_decay)
    network, bn_guard = WithLosses(model), BatchNormGuard(model)
    worst, generator = 0.0, torch.Generator().manual_seed(0)
    for iteration in range(50):
        model.load_state_dict(peer.state_dict())
        for name, parameter in peer.named_parameters():
            if parameter in peers_optimizer.state:
                momentum = peers_optimizer.state[parameter]["momentum_buffer"]
                optimizer.state[ours[name]]["momentum_buffer"].copy_(momentum)
        images = torch.randn(2, 3, 33, 33, generator=generator, dtype=torch.float64)
        labels = torch.randint(0, 21, (2, 33, 33), generator=generator, dtype=torch.uint8)

        rate = 0.0099 * (1 - iteration / 50) ** 0.9 + 0.0001
        assert learning_rate(iteration, args) == pytest.approx(rate, rel=1e-12)
        for group in (*optimizer.param_groups, *peers_optimizer.param_groups):
            group["lr"] = learning_rate(iteration, args)
        train_step(network, [(images, labels)], optimizer, precision, bn_guard)
        peers_optimizer.zero_grad()
        mmseg_loss(peer, images, labels).backward()
        peers_optimizer.step()
        theirs = peer.state_dict()
        worst = max(worst, *(difference(value, theirs[key]) for key, value in model.state_dict().items()))
        worst = max(worst, *(difference(optimizer.state[ours[name]]["momentum_buffer"],
                                        peers_optimizer.state[parameter]["momentum_buffer"])
                             for name, parameter in peer.named_parameters()))
    print(f"\n50 iterations: {worst:.1e}")
    assert worst <= 1e-10


# ---- augmentation

DRAWS = 2000


def same_distribution(name, ours, theirs):
    """Two-sample Kolmogorov-Smirnov; the seeds are fixed, so that the outcome is."""
    p = stats.ks_2samp(np.array(ours, float), np.array(theirs, float)).pvalue
    print(f"{name}: p = {p:.2f}")
    assert p > 0.01, name


def real_samples(real_voc, count):
    data = VOC(real_voc, "trainaug")
    return [data[i] for i in range(count)]


def test_draws_of_scale_crop_and_flip(real_voc):
    import cv2
    from mmcv.transforms import RandomFlip, RandomResize
    from mmseg.datasets.transforms import RandomCrop
    np.random.seed(0)
    augmentation, rng = TrainAugmentation(512, (2048, 512)), np.random.default_rng(0)
    resize = RandomResize(scale=(2048, 512), ratio_range=(0.5, 2.0), keep_ratio=True)
    crop, flip = RandomCrop(crop_size=(512, 512), cat_max_ratio=0.75), RandomFlip(prob=0.5)
    samples = real_samples(real_voc, 50)
    ours, theirs = [], []
    for i in range(DRAWS):
        image, label = samples[i % len(samples)]
        height, width = augmentation.draw_scaled_size(*label.shape, rng)
        top, left = augmentation.draw_crop(label, (height, width), rng)
        sample = augmentation(torch.arange(label.shape[1], dtype=torch.uint8).expand(3, *label.shape), label, rng)
        row = sample["image"][0, 0, :sample["size"][1]].int()
        ours.append((height, width, top / height, left / width, (row.diff() < 0).sum() > (row.diff() > 0).sum()))

        results = {"img": np.zeros((*label.shape, 1), np.uint8), "img_shape": tuple(label.shape), "seg_fields": []}
        results = resize(results)
        height, width = results["img"].shape[:2]
        results["gt_seg_map"] = cv2.resize(label.numpy(), (width, height), interpolation=cv2.INTER_NEAREST)
        y0, _, x0, _ = crop.crop_bbox(results)
        theirs.append((height, width, y0 / height, x0 / width, flip(results)["flip"]))
    for column, name in enumerate(("height", "width", "top", "left")):
        same_distribution(name, [draw[column] for draw in ours], [draw[column] for draw in theirs])
    rates = [np.mean([bool(draw[4]) for draw in draws]) for draws in (ours, theirs)]
    print(f"flip: {rates[0]:.3f} and {rates[1]:.3f}")
    assert max(abs(rate - 0.5) for rate in rates) < 0.04


def test_draws_of_the_photometric_distortion(real_voc):
    """The change that each step makes to a real picture, measured in the numbers that it changes; and all together."""
    import cv2
    from mmseg.datasets.transforms import PhotoMetricDistortion
    np.random.seed(0)
    rng, peer = np.random.default_rng(0), PhotoMetricDistortion()
    augmentation = TrainAugmentation(512, (2048, 512))
    pictures = [image[:, 100:132, 100:132].contiguous() for image, _ in real_samples(real_voc, 20)]

    def channels(rgb):
        return cv2.cvtColor(np.ascontiguousarray(rgb), cv2.COLOR_RGB2HSV).reshape(-1, 3).astype(float)

    def hue_change(before, after):
        return np.angle(np.exp(2j * np.pi * (channels(after)[:, 0] - channels(before)[:, 0]) / 180).sum())

    steps = {"brightness": lambda before, after: after.mean() - before.mean(),
             "contrast": lambda before, after: after.mean() / max(before.mean(), 1),
             "saturation": lambda before, after: channels(after)[:, 1].mean() - channels(before)[:, 1].mean(),
             "hue": hue_change,
             "__call__": lambda before, after: (after.astype(float) - before).std()}
    for column, (step, change) in enumerate(steps.items()):
        ours, theirs = [], []
        for i in range(DRAWS):
            picture = pictures[i % len(pictures)]
            before = picture.permute(1, 2, 0).numpy()
            jitter = augmentation.draw_jitter(rng)
            if step != "__call__":
                jitter[[other for other in range(4) if other != column]] = LEFT_OUT
            after = distort_colours(picture[None].float(), jitter[None])[0].permute(1, 2, 0).byte().numpy()
            ours.append(change(before, after))
            bgr = np.ascontiguousarray(before[..., ::-1])
            distorted = peer({"img": bgr.copy()})["img"] if step == "__call__" else getattr(peer, step)(bgr.copy())
            theirs.append(change(before, distorted[..., ::-1]))
        same_distribution(step, ours, theirs)


def test_a_given_draw_agrees_with_opencv(real_voc):
    import cv2
    augmentation, rng = TrainAugmentation(512, (2048, 512)), np.random.default_rng(0)
    worst = 1.0

    def crop_by(interpolation, array, scaled, top, left, size, flipped):
        resized = cv2.resize(array, scaled[::-1], interpolation=interpolation)[top:top + size[0], left:left + size[1]]
        return resized[:, ::-1] if flipped else resized

    for image, label in real_samples(real_voc, 40):
        seed = int(rng.integers(2 ** 31))
        sample = augmentation(image, label, np.random.default_rng(seed))
        again = np.random.default_rng(seed)
        scaled = augmentation.draw_scaled_size(*label.shape, again)
        top, left = augmentation.draw_crop(label, scaled, again)
        height, width = sample["size"].tolist()
        draw = (scaled, top, left, (height, width), again.random() < 0.5)
        got = sample["image"][:, :height, :width].permute(1, 2, 0).numpy().astype(int)
        picture = crop_by(cv2.INTER_LINEAR, np.ascontiguousarray(image.permute(1, 2, 0).numpy()), *draw)
        worst = min(worst, (np.abs(got - picture) <= 1).mean())
        np.testing.assert_array_equal(sample["label"][:height, :width],
                                      crop_by(cv2.INTER_NEAREST, label.numpy(), *draw))
    print(f"\nwithin 1 grey level: {100 * worst:.2f}% of the pixels, in the worst of 40")
    assert worst >= 0.99


# ---- evaluation

def peers_views(peer, images, size, flips):
    """mmsegmentation's result for each view: its predict() resizes to the original size and mirrors back."""
    from mmseg.structures import SegDataSample
    views = []
    for image in images:
        for flip in flips:
            sample = SegDataSample()
            sample.set_metainfo({"img_path": "", "ori_shape": size, "img_shape": image.shape[-2:],
                                 "pad_shape": image.shape[-2:], "padding_size": [0] * 4, "flip": flip,
                                 "flip_direction": "horizontal" if flip else None})
            with torch.no_grad():
                views += peer.predict(image.flip(-1) if flip else image, [sample])
    return views


@pytest.mark.parametrize("how", ("whole", "multi-scale and flip", "slide"))
def test_predictions_on_real_images(real_voc, tmp_path, how):
    slide = {"mode": "slide", "crop_size": (97, 97), "stride": (64, 64)}
    peer = shake(mmseg_model("resnet50_d8", **(slide if how == "slide" else {})))
    model = ours_from(peer.state_dict(), "resnet50_d8", tmp_path).eval()
    ratios, flips = ((0.5, 0.75, 1.0, 1.25), (False, True)) if how.startswith("multi") else ((1.0,), (False,))
    protocol = Protocol((512, 128), ratios, flip=True in flips, slide=(97, 64) if how == "slide" else None)
    images = ScaledImages(VOC(real_voc, "val"), protocol.scales())
    agree = []
    for i in range(5):
        batches, (label,) = default_collate([images[i]])
        views = [view[0] for batch in batches for view in predict(model, batch, protocol)]
        ours = class_map(views, tuple(label.shape))
        results = peers_views(peer, [prepare(batch) for batch in batches], tuple(label.shape), flips)
        if len(results) > 1:
            from mmseg.models import SegTTAModel
            theirs = SegTTAModel(module=peer).merge_preds([results])[0].pred_sem_seg.data[0]
        else:
            theirs = results[0].pred_sem_seg.data[0]
        agree.append((ours == theirs).float().mean().item())
        assert len(theirs.unique()) > 1
    print(f"\n{how}: {100 * min(agree):.3f}% of the pixels, in the worst of 5")
    assert min(agree) >= 0.999


def test_metrics(real_voc):
    from mmseg.evaluation import IoUMetric
    data, rng = VOC(real_voc, "val"), np.random.default_rng(0)
    confusion, areas = np.zeros((21, 21), np.int64), []
    for i in range(30):
        label = data[i][1]
        shifted = label.roll(7, 0)
        guess = torch.where(shifted == IGNORE, int(rng.integers(0, 3)), shifted)
        confusion += confusion_matrix(label, guess, 21).numpy()
        areas.append(IoUMetric.intersect_and_union(guess, label, 21, IGNORE))
    theirs = IoUMetric.total_area_to_metrics(*(sum(area) for area in zip(*areas, strict=True)), metrics=["mIoU"])
    ours = scores_of(confusion)
    differences = [ours["aAcc"] - 100 * float(theirs["aAcc"]), ours["mIoU"] - 100 * np.nanmean(theirs["IoU"]),
                   ours["mAcc"] - 100 * np.nanmean(theirs["Acc"])]
    print(f"\nmetrics: {max(map(abs, differences)):.1e}")
    assert max(map(abs, differences)) <= 1e-4  # per cent; its areas are float32
