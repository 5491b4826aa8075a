"""The FCN8s networks.

A network is a backbone, which gives three feature maps, and a head, which scores them. The strides of the maps decide
which of two ways to predict at stride 8 is used:
- strides 8, 16, 32 (`vgg16`, `resnet50`): SkipHead scores each map and adds them up, coarse to fine, through transposed
  convolutions (Long, Shelhamer, Darrell: "Fully Convolutional Networks for Semantic Segmentation", CVPR 2015).
- strides 8, 8, 8 (`resnet50_d8`, `resnet101_d8`): dilation keeps the last two stages at stride 8. ConvHead scores the
  last map through 3x3 convolutions; in training an auxiliary head scores the one before (mmsegmentation's FCN-D8).

Shapes: N images of H x W pixels, C classes; a map of stride s has ceil(H / s) x ceil(W / s) pixels.
"""
import dataclasses
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

SKIP_STRIDES = (8, 16, 32)
STRIDE = 8  # of the logits before they are enlarged


class FCN8s(nn.Module):
    """A segmentation network: images [N, 3, H, W], normalised RGB, any H and W of at least 1 -> a dict of

    out: logits [N, C, H, W]; aux: those of the auxiliary head, in training mode if the network has that head.
    """

    def __init__(self, num_classes=21, backbone="resnet50_d8"):
        super().__init__()
        self.num_classes, self.backbone_name, self.form = num_classes, backbone, "unpadded"
        self.backbone = BACKBONES[backbone].network()
        channels, self.auxiliary_head = self.backbone.channels, None
        if tuple(self.backbone.strides) == SKIP_STRIDES:
            self.decode_head = SkipHead(channels, num_classes)
        elif set(self.backbone.strides) != {STRIDE}:
            raise ValueError(f"{backbone}: has strides {self.backbone.strides}; the heads take 8, 16, 32 or 8, 8, 8")
        else:
            self.decode_head = ConvHead(2, channels[2], 512, num_classes, convs=2, concat_input=True)
            self.auxiliary_head = ConvHead(1, channels[1], 256, num_classes, convs=1)

    def use_form(self, form):
        """Switches to a form of vgg16, see VGG16.use_form; every other network has the form "unpadded" alone."""
        if form != self.form:
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
    channels, strides = (256, 512, 4096), SKIP_STRIDES

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
        """Switches to the form that the weights need:

        unpadded: ours, and for new trainings; RGB images, normalised
        padded: the original release's FCN-8s, which pads conv1_1 by 100 so that `fc6` needs no padding, and crops the
            scores into place; BGR images of 0..255 minus their mean (`transforms.normalise`), of their own size
        at_once: the padded form of the network trained at once, which scales its pools down before it scores them
        """
        first, fc6 = (1, 3) if form == "unpadded" else (100, 0)
        self.conv1_1.padding, self.fc6.padding = (first, first), (fc6, fc6)

    def from_imagenet(self, state):
        """torchvision's VGG-16 under our names: its convolutions in order, its first two linear layers as fc6, fc7."""
        if "fc6.weight" in state:
            return state
        layers = [key.removesuffix(".weight") for key in state if key.endswith(".weight")]
        converted = {}
        for (name, _), layer in zip(self.named_children(), layers, strict=False):  # the class layer is left out
            weight = state[f"{layer}.weight"]
            shape = getattr(self, name).weight.shape
            converted[f"{name}.weight"] = weight.reshape(shape) if weight.numel() == shape.numel() else weight
            if f"{layer}.bias" in state:
                converted[f"{name}.bias"] = state[f"{layer}.bias"]
        return converted

    def forward(self, x):
        pools = []
        for stage, (_, convs) in enumerate(self.WIDTHS, 1):
            for index in range(1, convs + 1):
                x = F.relu(self.get_submodule(f"conv{stage}_{index}")(x), inplace=True)
            x = F.max_pool2d(x, 2, stride=2, ceil_mode=True)
            pools.append(x)
        # Contiguous, as fc6's weight may be (amp.place): a convolution would convert the weight to x's format.
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
    """A ResNet of bottlenecks: images [N, 3, H, W] -> the outputs of its stages 2, 3 and 4.

    What FCN8s asks of a backbone: a constructor without arguments, `channels` and `strides` of its three outputs (the
    latter 8, 16, 32 or 8, 8, 8), and `from_imagenet`, if the table names weights for it.

    blocks: how many bottlenecks each stage has
    deep_stem: three 3x3 convolutions (ResNetV1c) instead of one 7x7
    dilated: stages 3 and 4 keep stride 8
    """
    channels = (512, 1024, 2048)

    def __init__(self, blocks, deep_stem=False, dilated=False):
        super().__init__()
        if deep_stem:
            self.stem = nn.Sequential(*conv_bn_relu(3, 32, stride=2), *conv_bn_relu(32, 32), *conv_bn_relu(32, 64))
        else:
            self.conv1, self.bn1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False), nn.BatchNorm2d(64)
        self.strides = (8, 8, 8) if dilated else SKIP_STRIDES
        strides, dilations = ((1, 2, 1, 1), (1, 1, 2, 4)) if dilated else ((1, 2, 2, 2), (1, 1, 1, 1))
        channels = 64
        for stage, (count, stride, dilation) in enumerate(zip(blocks, strides, dilations, strict=True), 1):
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

    @staticmethod
    def from_imagenet(state):
        """A classifier's state dict without its class layer."""
        return {key: value for key, value in state.items() if not key.startswith("fc.")}

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
        with torch.autocast(scores.device.type, enabled=False):  # float16 would lose the gradients of single pixels
            logits = self.upscore8(scores.to(self.upscore8.weight.dtype))
        return crop(logits, size, self.offset)


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
    convs: how many 3x3 convolutions to `width` channels; concat_input: one more over the features and their result
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
        # Where the image is padded beyond `size`, so are its logits. Integer division rounds up, as the trace of an
        # ONNX export can follow it to other sizes.
        return upsample(crop(logits, [(side + STRIDE - 1) // STRIDE for side in size]), size)


def upsample(logits, size):
    """Logits resized to `size`, bilinear, in float32 at least, which the loss computes in.

    Contiguous first: the loss would copy enlarged logits that are channels last, 64 times as many values.
    """
    logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    enlarge = enlarge_by_products if logits.is_cuda and logits.requires_grad else interpolate
    return enlarge(logits.contiguous(), size)


def interpolate(maps, size):
    """Maps [N, C, h, w] -> [N, C, *size], bilinear."""
    return F.interpolate(maps, size, mode="bilinear", align_corners=False)


def enlarge_by_products(maps, size):
    """`interpolate` but for rounding, as two matrix products. On CUDA that one's gradient is a sum by atomic additions,
    which take 8% of a step (docs/speed.md), in an order that differs from run to run."""
    rows, columns = (F.interpolate(torch.eye(side, device=maps.device)[None], out, mode="linear")[0].T
                     for side, out in zip(maps.shape[-2:], size, strict=True))
    return Products.apply(maps, rows, columns)


class Products(torch.autograd.Function):
    """rows @ maps @ columns.T in float32, its gradient, too, which torch.compile would compute in autocast's type.
    By aten's operator, as apex's O1 replaces torch.matmul."""

    @staticmethod
    def forward(ctx, maps, rows, columns):
        ctx.save_for_backward(rows, columns)
        return Products.of(rows, maps, columns.T)

    @staticmethod
    def backward(ctx, gradient):
        rows, columns = ctx.saved_tensors
        return Products.of(rows.T, gradient, columns), None, None

    @staticmethod
    def of(left, maps, right):
        with torch.autocast(maps.device.type, enabled=False):
            return torch.ops.aten.matmul(torch.ops.aten.matmul(left, maps), right)


# ---- the table of backbones; to add one, write its class (see ResNet for what it must offer) and a row

OPENMMLAB = "https://download.openmmlab.com/pretrain/third_party/"
TORCHVISION = "https://download.pytorch.org/models/"
MMSEG = "https://download.openmmlab.com/mmsegmentation/v0.5/fcn/"
R50_VOC, R101_VOC = "fcn_r50-d8_512x512_20k_voc12aug", "fcn_r101-d8_512x512_20k_voc12aug"
R50, R101 = (3, 4, 6, 3), (3, 4, 23, 3)  # blocks of each stage
V1C_D8 = {"deep_stem": True, "dilated": True}  # mmsegmentation's ResNetV1c-D8


@dataclasses.dataclass(frozen=True)
class Backbone:
    """A row of the table.

    network: makes the backbone
    imagenet: the URL of its ImageNet weights, whose file name ends in the first 8 digits of the file's SHA-256; or None
    voc: the URL of a whole network trained on VOC 2012 + SBD, which goes by the name "<backbone>_voc"; or None
    lr: the default learning rate
    """
    network: Callable[[], nn.Module]
    imagenet: str | None = None
    voc: str | None = None
    lr: float = 1e-2


BACKBONES = {
    "resnet50_d8": Backbone(partial(ResNet, R50, **V1C_D8), OPENMMLAB + "resnet50_v1c-2cccc1ad.pth",
                            f"{MMSEG}{R50_VOC}/{R50_VOC}_20200617_010715-52dc5306.pth"),
    "resnet101_d8": Backbone(partial(ResNet, R101, **V1C_D8), OPENMMLAB + "resnet101_v1c-e67eebb6.pth",
                             f"{MMSEG}{R101_VOC}/{R101_VOC}_20200617_010842-0bb4e798.pth"),
    "resnet50": Backbone(partial(ResNet, R50), TORCHVISION + "resnet50-0676ba61.pth"),
    "vgg16": Backbone(VGG16, TORCHVISION + "vgg16-397923af.pth", lr=1e-3),  # without BN, 1e-2 is too high
}
DEFAULT_BACKBONE = "resnet50_d8"
VOC_SUFFIX = "_voc"


def published():
    """{name: (backbone, URL)} of the networks trained on VOC, which every command takes in place of a checkpoint."""
    return {name + VOC_SUFFIX: (name, row.voc) for name, row in BACKBONES.items() if row.voc}
