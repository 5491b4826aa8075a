"""The FCN8s networks, and where their weights come from.

Four backbones, two ways to predict at stride 8:
- `vgg16`, `resnet50`: features at stride 8, 16 and 32, scored and added up coarse to fine through transposed
  convolutions (Long, Shelhamer, Darrell: "Fully Convolutional Networks for Semantic Segmentation", CVPR 2015).
- `resnet50_d8`, `resnet101_d8`: dilation keeps the last two stages at stride 8; a head of 3x3 convolutions scores the
  last one, in training an auxiliary head the one before (mmsegmentation's FCN R-50-D8 and R-101-D8).

Shapes: N images of H x W pixels, C classes; h = ceil(H / 8) and w = ceil(W / 8).
"""
import functools
import pickle
import re
import warnings
import zipfile
from pathlib import Path
from urllib.error import URLError

import torch
import torch.nn.functional as F
from torch import nn

BACKBONES = ("resnet50_d8", "resnet101_d8", "resnet50", "vgg16")
OPENMMLAB = "https://download.openmmlab.com/pretrain/third_party/"
IMAGENET_URLS = {"resnet50_d8": OPENMMLAB + "resnet50_v1c-2cccc1ad.pth",
                 "resnet101_d8": OPENMMLAB + "resnet101_v1c-e67eebb6.pth"}  # the name ends in the file's SHA-256
MMSEG = "https://download.openmmlab.com/mmsegmentation/v0.5/fcn/"
R50_VOC, R101_VOC = "fcn_r50-d8_512x512_20k_voc12aug", "fcn_r101-d8_512x512_20k_voc12aug"
VOC_URLS = {"resnet50_d8_voc": f"{MMSEG}{R50_VOC}/{R50_VOC}_20200617_010715-52dc5306.pth",
            "resnet101_d8_voc": f"{MMSEG}{R101_VOC}/{R101_VOC}_20200617_010842-0bb4e798.pth"}  # trained on VOC + SBD
FORMS = ("unpadded", "padded", "at_once")  # of vgg16, see FCN8s.use_form
PLAIN_COMMAND = ("""python -c "import torch; c = torch.load('{0}', map_location='cpu', weights_only=False); """
                 """k = c.keys() & {{'state_dict', 'model_state_dict', 'arch'}} or c.keys(); """
                 """torch.save({{n: c[n] for n in k}}, '{0}.plain.pth')\"""")
CLASS_LAYERS = ("decode_head.conv_seg.weight", "decode_head.score_fr.weight")  # [C, channels, 1, 1]


class FCN8s(nn.Module):
    """A segmentation network: images [N, 3, H, W], normalised RGB, any H and W of at least 1 -> a dict of

    out: logits [N, C, H, W]; aux: the auxiliary head's, likewise, in training mode if the backbone has that head.
    Raises WeightsError for a backbone that is none of BACKBONES.
    """

    def __init__(self, num_classes=21, backbone="resnet50_d8"):
        super().__init__()
        self.auxiliary_head = None
        if backbone == "vgg16":
            self.backbone = VGG16()
            self.decode_head = SkipHead((256, 512, 4096), num_classes)
        elif backbone == "resnet50":
            self.backbone = ResNet(blocks=(3, 4, 6, 3))
            self.decode_head = SkipHead((512, 1024, 2048), num_classes)
        elif backbone in ("resnet50_d8", "resnet101_d8"):
            third_stage = {"resnet50_d8": 6, "resnet101_d8": 23}[backbone]
            self.backbone = ResNet(blocks=(3, 4, third_stage, 3), deep_stem=True, dilated=True)
            self.decode_head = ConvHead(2, 2048, 512, num_classes, convs=2, concat_input=True)
            self.auxiliary_head = ConvHead(1, 1024, 256, num_classes, convs=1)
        else:
            raise WeightsError(f"there is no backbone '{backbone}'; there are {', '.join(BACKBONES)}")
        self.num_classes, self.backbone_name, self.form = num_classes, backbone, "unpadded"

    def use_form(self, form):
        """Switches vgg16 to the form that its weights need:

        unpadded: ours, and for new trainings; RGB images, normalised
        padded: the original release's FCN-8s, which pads conv1_1 by 100 so that `fc6` needs none, and crops the scores
            into place; BGR images of 0..255 less their mean (`voc.prepare` does it), of their own size
        at_once: likewise, for the net trained at once, whose pools are scaled down before they are scored
        """
        if form not in FORMS or (form != "unpadded" and self.backbone_name != "vgg16"):
            raise WeightsError(f"there is no form '{form}' of {self.backbone_name}")
        if self.backbone_name == "vgg16":
            self.backbone.use_form(form)
            self.decode_head.use_form(form)
        self.form = form

    def forward(self, images, size=None):
        """size: (height, width) in use, where images are padded right and bottom beyond it; the output is of it."""
        size = size or tuple(images.shape[-2:])
        features = self.backbone(images)
        outputs = {"out": self.decode_head(features, size)}
        if self.training and self.auxiliary_head is not None:
            outputs["aux"] = self.auxiliary_head(features, size)
        return outputs


class VGG16(nn.Module):
    """VGG-16 with its fully connected layers as convolutions: images -> pool3 [N, 256, H/8, W/8], pool4 [N, 512, H/16,
    W/16] and fc7 [N, 4096, H/32, W/32], each size rounded up.

    The original release pads the image by 100 only to keep `fc6`, a 7x7 convolution without padding, from running out
    of pixels; padding `fc6` by 3 instead costs 1.8x fewer multiplications on a 375x500 image. Padded, the outputs are
    of size (H + 198) / 8, (H + 198) / 16 and (H + 198) / 32 - 6.
    """
    WIDTHS = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))  # channels and number of convolutions of each stage
    DROPOUT = 0.5
    stride = 32  # of the coarsest output

    def __init__(self):
        super().__init__()
        channels = 3
        for stage, (width, convs) in enumerate(self.WIDTHS, 1):
            for index in range(1, convs + 1):
                self.add_module(f"conv{stage}_{index}", nn.Conv2d(channels, width, 3, padding=1))
                channels = width
        self.fc6 = nn.Conv2d(512, 4096, 7, padding=3)
        self.fc7 = nn.Conv2d(4096, 4096, 1)
        for conv in self.children():  # He et al., ICCV 2015: without BN the forward signal must keep its size
            nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
            nn.init.zeros_(conv.bias)

    def use_form(self, form):
        first, fc6 = (1, 3) if form == "unpadded" else (100, 0)
        self.conv1_1.padding, self.fc6.padding = (first, first), (fc6, fc6)

    def forward(self, x):
        pools = []
        for stage, (_, convs) in enumerate(self.WIDTHS, 1):
            for index in range(1, convs + 1):
                x = F.relu(self.get_submodule(f"conv{stage}_{index}")(x), inplace=True)
            x = F.max_pool2d(x, 2, stride=2, ceil_mode=True)
            pools.append(x)
        # Contiguous, as fc6's weight may be (device.place): a convolution would turn that round to x's format.
        x = F.dropout(F.relu(self.fc6(x.contiguous()), inplace=True), self.DROPOUT, self.training)
        x = F.dropout(F.relu(self.fc7(x), inplace=True), self.DROPOUT, self.training)
        return pools[2], pools[3], x


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolution with BN around a shortcut (He et al., CVPR 2016), the stride on the 3x3:
    [N, channels, h, w] -> [N, 4 width, h / stride, w / stride], rounded up."""
    EXPANSION = 4

    def __init__(self, channels, width, stride=1, dilation=1):
        super().__init__()
        out = width * self.EXPANSION
        self.conv1, self.bn1 = nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=dilation, dilation=dilation, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, out, 1, bias=False), nn.BatchNorm2d(out)
        self.downsample = None
        if stride != 1 or channels != out:
            self.downsample = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x):
        shortcut = x if self.downsample is None else self.downsample(x)
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        x = F.relu(self.bn2(self.conv2(x)), inplace=True)
        x = self.bn3(self.conv3(x))
        x += shortcut
        return F.relu(x, inplace=True)


class ResNet(nn.Module):
    """A ResNet of bottlenecks: images -> the outputs of its stages 2, 3 and 4, with 512, 1024 and 2048 channels, at
    stride 8, 16, 32, or all at stride 8 if `dilated`.

    blocks: how many bottlenecks each stage has
    deep_stem: three 3x3 convolutions (ResNetV1c) instead of one 7x7
    """

    def __init__(self, blocks, deep_stem=False, dilated=False):
        super().__init__()
        if deep_stem:
            self.stem = nn.Sequential(*conv_bn_relu(3, 32, stride=2), *conv_bn_relu(32, 32), *conv_bn_relu(32, 64))
        else:
            self.conv1, self.bn1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False), nn.BatchNorm2d(64)
        self.stride = 8 if dilated else 32  # of the coarsest output
        strides, dilations = ((1, 2, 1, 1), (1, 1, 2, 4)) if dilated else ((1, 2, 2, 2), (1, 1, 1, 1))
        channels = 64
        for stage, (count, stride, dilation) in enumerate(zip(blocks, strides, dilations), 1):
            width = 64 * 2 ** (stage - 1)
            # The first block of a dilated stage sees the finer grid of the stage before: half the dilation.
            layers = [Bottleneck(channels, width, stride, max(dilation // 2, 1))]
            channels = width * Bottleneck.EXPANSION
            layers += [Bottleneck(channels, width, dilation=dilation) for _ in range(count - 1)]
            self.add_module(f"layer{stage}", nn.Sequential(*layers))
        self.apply(init_conv)
        for module in self.modules():
            if isinstance(module, Bottleneck):
                nn.init.zeros_(module.bn3.weight)  # a block starts as its shortcut (Goyal et al., 2017)

    def forward(self, x):
        x = self.stem(x) if hasattr(self, "stem") else F.relu(self.bn1(self.conv1(x)), inplace=True)
        x = self.layer1(F.max_pool2d(x, 3, stride=2, padding=1))
        stage2 = self.layer2(x)
        stage3 = self.layer3(stage2)
        return stage2, stage3, self.layer4(stage3)


def conv_bn_relu(channels, width, stride=1):
    """The three layers of a 3x3 convolution with BN and ReLU."""
    return nn.Conv2d(channels, width, 3, stride, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)


def init_conv(module):
    """The reference's start: Kaiming normal, fan-out (He et al., ICCV 2015)."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


class SkipHead(nn.Module):
    """FCN-8s: scores at stride 32, doubled and added to those at 16, doubled and added to those at 8, times 8.

    The transposed convolutions interpolate bilinearly and stay fixed, as in the released networks. A map at twice its
    size may overhang the finer one by a row and a column, as each size was rounded up: those are cropped.
    """

    def __init__(self, channels, num_classes):
        """channels: of the features at stride 8, 16, 32."""
        super().__init__()
        self.score_pool3, self.score_pool4, self.score_fr = (nn.Conv2d(c, num_classes, 1) for c in channels)
        for score in self.children():  # the paper starts its score layers at zero
            nn.init.zeros_(score.weight)
            nn.init.zeros_(score.bias)
        self.upscore2 = bilinear_upsampling(num_classes, 2)
        self.upscore_pool4 = bilinear_upsampling(num_classes, 2)
        self.upscore8 = bilinear_upsampling(num_classes, 8)
        self.use_form("unpadded")

    def use_form(self, form):
        """See FCN8s.use_form. The offsets are the original release's, as are the scales."""
        unpadded = form == "unpadded"
        self.pool4_offset, self.pool3_offset, self.offset = (0, 0, 0) if unpadded else (5, 9, 31)
        self.pool4_scale, self.pool3_scale = (0.01, 0.0001) if form == "at_once" else (1, 1)
        for layer in (self.upscore2, self.upscore_pool4, self.upscore8):
            padding = layer.stride[0] // 2 if unpadded else 0
            layer.padding = (padding, padding)

    def forward(self, features, size):
        """Features at the three strides -> logits [N, C, *size]."""
        stride8, stride16, stride32 = features
        scores = self.upscore2(self.score_fr(stride32))
        scores = add_aligned(scores, self.score_pool4(stride16 * self.pool4_scale), self.pool4_offset)
        scores = self.upscore_pool4(scores)
        scores = add_aligned(scores, self.score_pool3(stride8 * self.pool3_scale), self.pool3_offset)
        return crop(self.upscore8(scores), size, self.offset)


def crop(x, size, offset=0):
    """The part of [..., h, w] from (offset, offset) that is of `size`, or smaller where x ends."""
    return x[..., offset:offset + size[-2], offset:offset + size[-1]]


def add_aligned(coarse, fine, offset):
    """The sum of two score maps where both are: `coarse` begins at (offset, offset) of `fine`."""
    fine = crop(fine, coarse.shape, offset)
    return crop(coarse, fine.shape) + fine


def bilinear_upsampling(channels, factor):
    """A fixed transposed convolution that enlarges [N, channels, h, w] by `factor`, bilinearly.

    Kernel 2 factor, weights (1 - |x - centre| / factor) a side, each channel to itself (Long et al., section 3.3).
    """
    layer = nn.ConvTranspose2d(channels, channels, 2 * factor, stride=factor, padding=factor // 2, bias=False)
    side = 1 - (torch.arange(2 * factor) - (factor - 0.5)).abs() / factor
    with torch.no_grad():
        layer.weight.copy_(torch.eye(channels)[:, :, None, None] * (side[:, None] * side))
    return layer.requires_grad_(False)


class ConvBN(nn.Module):
    """3x3 convolution, BN and ReLU: [N, channels, h, w] -> [N, width, h, w]."""

    def __init__(self, channels, width):
        super().__init__()
        self.conv, self.bn, _ = conv_bn_relu(channels, width)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)), inplace=True)


class ConvHead(nn.Module):
    """mmsegmentation's FCN head, on one of the backbone's outputs.

    feature: which output; channels: how many it has
    convs: how many 3x3 convolutions to `width` channels; concat_input: one more over the features beside their result
    """
    DROPOUT = 0.1  # of whole channels

    def __init__(self, feature, channels, width, num_classes, convs, concat_input=False):
        super().__init__()
        self.feature = feature
        self.convs = nn.Sequential(*(ConvBN(channels if i == 0 else width, width) for i in range(convs)))
        self.conv_cat = ConvBN(channels + width, width) if concat_input else None
        self.conv_seg = nn.Conv2d(width, num_classes, 1)
        self.apply(init_conv)
        nn.init.normal_(self.conv_seg.weight, std=0.01)
        nn.init.zeros_(self.conv_seg.bias)

    def forward(self, features, size):
        """The backbone's outputs -> logits [N, C, *size]."""
        features = features[self.feature]
        x = self.convs(features)
        if self.conv_cat is not None:
            x = self.conv_cat(torch.cat([features, x], 1))
        logits = self.conv_seg(F.dropout2d(x, self.DROPOUT, self.training))
        # Where the image is padded beyond `size`, so are its logits, at stride 8.
        # Rounded up in whole numbers, which the trace of an ONNX export can follow to other sizes.
        return upsample(crop(logits, [(side + 7) // 8 for side in size]), size)


def upsample(logits, size):
    """Logits resized to `size`, bilinear. Half precision is widened first: the reference's loss wants float32."""
    logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    return F.interpolate(logits, size, mode="bilinear", align_corners=False)


class WeightsError(ValueError):
    """Weights that cannot be had or do not fit; the message is one line for the user."""


def load_imagenet(model):
    """Downloads ImageNet weights (to torch.hub's folder) and loads them into the model's backbone, in place."""
    name = model.backbone_name
    if name in IMAGENET_URLS:
        get_state = functools.partial(torch.hub.load_state_dict_from_url, IMAGENET_URLS[name])
    else:
        get_state = torchvision_weights(name).get_state_dict
    checkpoint = download(get_state, f"the ImageNet weights of {name}",
                          "give a file with --pretrained FILE, or start from random weights with --pretrained none")
    load_backbone(model, unwrap(checkpoint)[0], f"ImageNet weights of {name}")


def download(get_state, what, instead):
    """What a function of torch.hub's kind downloads, its hash checked; a WeightsError says what to do instead."""
    try:
        return get_state(map_location="cpu", check_hash=True, weights_only=True)
    except (URLError, TimeoutError, ConnectionError) as error:
        raise WeightsError(f"{what} cannot be downloaded ({error}); {instead}") from None
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise WeightsError(f"{what} came damaged ({first_line(error)}); delete what there is of them in "
                           f"{torch.hub.get_dir()}/checkpoints and try again") from None


def torchvision_weights(name):
    try:
        from torchvision import models  # only here: a torchvision that does not match torch fails on import
    except (ImportError, RuntimeError) as error:
        raise WeightsError(f"torchvision cannot be imported ({first_line(error)}); install the release that belongs "
                           f"to torch {torch.__version__}, from where torch came") from None
    return {"vgg16": models.VGG16_Weights.IMAGENET1K_V1, "resnet50": models.ResNet50_Weights.IMAGENET1K_V1}[name]


def read_checkpoint(path):
    """The dict in a checkpoint file, tensors on the CPU. Only tensors and plain values are read, no code is run.

    Raises WeightsError if the file is not there, damaged, or holds other objects.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"{path}: there is no such checkpoint file")
    try:
        with warnings.catch_warnings():  # PyTorch warns about pickles that it does not read
            warnings.simplefilter("ignore")
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                changed = archive.testzip()  # compares the checksums, which torch.load does not look at
            if changed:
                raise ValueError(f"the checksum of its part {changed} is wrong")
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL ([\w.]+)", str(error))  # what the pickle wants to call
        if not refused:
            raise WeightsError(f"{path}: the file is damaged, or no checkpoint but a plain pickle, which could run "
                               "code and is not read; take another one") from None
        raise WeightsError(f"{path}: refused, it holds objects other than tensors and plain values ({refused[1]}), "
                           "which could run code; if you trust it, make a plain one: "
                           + PLAIN_COMMAND.format(path)) from None
    except PermissionError:
        raise
    except Exception as error:  # whatever the damage leads to
        raise WeightsError(f"{path}: the file is damaged or no checkpoint ({first_line(error)}); take another one"
                           ) from None
    if not isinstance(checkpoint, dict):
        raise WeightsError(f"{path}: holds a {type(checkpoint).__name__}, not a checkpoint")
    return checkpoint


def model_from_file(source, backbone=None, at_once=False):
    """The trained FCN8s in a file, or of a name in VOC_URLS. -> (model, the dict in the file)

    backbone: which one, where the file does not say; at_once: see load_weights.
    """
    checkpoint = read_checkpoint(source) if source not in VOC_URLS else download(
        functools.partial(torch.hub.load_state_dict_from_url, VOC_URLS[source]), f"the weights {source}",
        f"fetch {VOC_URLS[source]} elsewhere and give the file with --backbone {source.removesuffix('_voc')}")
    state, meta = unwrap(checkpoint)
    theirs = source.removesuffix("_voc") if source in VOC_URLS else meta.get("backbone")
    if theirs is None and backbone is None:
        raise WeightsError(f"{source}: does not say which backbone it is of; add --backbone")
    if backbone not in (None, theirs or backbone):
        raise WeightsError(f"{source}: is of backbone {theirs}, not {backbone}; leave out --backbone")
    classes = next((state[key].shape[0] for key in (*CLASS_LAYERS, "score_fr.weight") if key in state), None)
    if classes is None:
        raise WeightsError(f"{source}: holds no trained network, it has none of {', '.join(CLASS_LAYERS)}; "
                           "it may do as a start: train.py --pretrained")
    model = FCN8s(classes, theirs or backbone)
    return load_weights(model, checkpoint, source, whole=True, at_once=at_once), checkpoint


def unwrap(checkpoint):
    """(state dict, meta dict) of a checkpoint: of ours, mmsegmentation's, torchfcn's trainer, or a bare state dict."""
    state = next((checkpoint[key] for key in ("state_dict", "model_state_dict") if key in checkpoint), checkpoint)
    meta = checkpoint.get("meta")
    state = state if isinstance(state, dict) else {}
    state = {str(key).removeprefix("module."): value for key, value in state.items() if isinstance(value, torch.Tensor)}
    return state, meta if isinstance(meta, dict) else {}


def load_weights(model, checkpoint, source=None, whole=False, at_once=False):
    """Loads weights into the model, in place, switches it to the form they need, and returns it; `model.origin` says
    what they were recognised as.

    checkpoint: a file or its dict: a checkpoint of train.py, mmsegmentation's for *_d8, torchfcn's FCN8s or FCN8sAtOnce
        for vgg16, or ImageNet weights (torchvision's for vgg16 and resnet50, OpenMMLab's for *_d8) for a backbone
    source: what an error calls it
    whole: whether every layer must be in it; else heads that are not, or are for other classes, start afresh
    at_once: that torchfcn weights are FCN8sAtOnce's, whose keys are FCN8s's; also seen by `arch` or the file's name
    Raises WeightsError, naming the keys, if they do not fit.
    """
    if not isinstance(checkpoint, dict):
        source, checkpoint = checkpoint, read_checkpoint(checkpoint)
    source = source or "the checkpoint"
    state, meta = unwrap(checkpoint)
    torchfcns = {"conv1_1.weight", "fc7.weight"} <= state.keys()
    theirs = meta.get("backbone", "vgg16" if torchfcns else model.backbone_name)
    if theirs != model.backbone_name:
        raise WeightsError(f"{source}: is of backbone {theirs}, not {model.backbone_name}; use --backbone {theirs}")
    if torchfcns:
        named = f"{checkpoint.get('arch')} {Path(str(source)).name}".lower().replace("-", "").replace("_", "")
        form = "at_once" if at_once or "atonce" in named else "padded"
        state = {("backbone." if key.startswith(("conv", "fc")) else "decode_head.") + key: value
                 for key, value in state.items()}
        kind = f"torchfcn's FCN-8s, {form} form"
    elif any(key.startswith("backbone.") for key in state):
        form = meta.get("form", "unpadded")
        if theirs == "vgg16" and "form" not in meta:
            raise WeightsError(f"{source}: does not say which form of vgg16 it is for; take the whole checkpoint, as "
                               "train.py wrote it")
        mmseg = theirs.endswith("_d8") and "backbone" not in meta
        kind = "a checkpoint of mmsegmentation" if mmseg else "a checkpoint of train.py"
        kind += "" if form == "unpadded" else f", {form} form"
    else:
        form, kind = model.form, "ImageNet weights of the backbone"
    if at_once and form != "at_once":
        raise WeightsError(f"{source}: is {kind}, --at_once is for torchfcn's FCN-8s")
    model.use_form(form)

    classes = next((state[key].shape[0] for key in CLASS_LAYERS if key in state), None)
    if model.auxiliary_head is not None and classes and not any(key.startswith("auxiliary_head.") for key in state):
        if whole:
            model.auxiliary_head = None  # it is for training only, and some leave it out
        else:
            kind += ", its auxiliary head starts afresh"
            fresh = FCN8s(classes, model.backbone_name).state_dict()
            state.update({key: value for key, value in fresh.items() if key.startswith("auxiliary_head.")})
    if not whole and not any(key.startswith(("decode_head.", "auxiliary_head.")) for key in state):
        load_backbone(model, {key.removeprefix("backbone."): value for key, value in state.items()}, source)
        kind += "" if kind.startswith("ImageNet") else " without heads; the heads start afresh"
    elif whole or classes in (None, model.num_classes):
        load_exactly(model, state, source)
    else:
        donor = FCN8s(classes, model.backbone_name)
        load_exactly(donor, state, source)
        model.backbone.load_state_dict(donor.backbone.state_dict())
        kind += f" for {classes} classes, of which the backbone is taken; the heads start afresh"
    model.origin = f"{source}: {kind}"
    return model


def load_backbone(model, state, source):
    """Loads a classifier's state dict into the model's backbone; its class layer is left out."""
    if model.backbone_name == "vgg16":
        state = convert_vgg(model.backbone, state, source)
    state = {key: value for key, value in state.items() if not key.startswith("fc.")}
    load_exactly(model.backbone, state, source)


def convert_vgg(backbone, state, source):
    """torchvision's VGG-16 under our names: its convolutions in order, its first two linear layers as fc6 and fc7."""
    if "fc6.weight" in state:
        return state
    names = list(dict(backbone.named_children()))
    layers = [key.removesuffix(".weight") for key in state if key.endswith(".weight")]
    if len(layers) != len(names) + 1:  # and the class layer, which is left out
        raise WeightsError(f"{source}: does not fit vgg16, it has {len(layers)} layers with weights, not 16")
    converted = {}
    for name, layer in zip(names, layers):
        weight = state[f"{layer}.weight"]
        shape = getattr(backbone, name).weight.shape
        converted[f"{name}.weight"] = weight.reshape(shape) if weight.numel() == shape.numel() else weight
        if f"{layer}.bias" in state:  # else load_exactly says that it is missing
            converted[f"{name}.bias"] = state[f"{layer}.bias"]
    return converted


def load_exactly(module, state, source):
    """load_state_dict, but an error is one line that names the first keys that do not fit."""
    ours = module.state_dict()
    wrong = [f"{key} is missing" for key in ours if key not in state and not key.endswith("num_batches_tracked")]
    wrong += [f"{key} is unexpected" for key in state if key not in ours]
    wrong += [f"{key} has shape {tuple(state[key].shape)}, not {tuple(ours[key].shape)}"
              for key in ours if key in state and state[key].shape != ours[key].shape]
    wrong += [f"{key} holds NaN or infinity" for key in ours if key in state and not state[key].isfinite().all()]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise WeightsError(f"{source}: the weights do not fit: {', '.join(wrong[:3])}{more}")
    module.load_state_dict(state, strict=False)


def first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0]
