"""A small backbone for the tests: it goes through the same code as the real ones, in milliseconds."""
from torch import nn


class Tiny(nn.Module):
    """Five 3x3 convolutions with BN, each of stride 2: images [N, 3, H, W] -> the outputs of the last three."""
    channels = (32, 32, 48)
    strides = (8, 16, 32)

    def __init__(self):
        super().__init__()
        self.stage8 = nn.Sequential(conv_bn_relu(3, 8), conv_bn_relu(8, 16), conv_bn_relu(16, 32))
        self.stage16 = conv_bn_relu(32, 32)
        self.stage32 = conv_bn_relu(32, 48)

    def forward(self, images):
        stride8 = self.stage8(images)
        stride16 = self.stage16(stride8)
        return stride8, stride16, self.stage32(stride16)


class TinyD8(Tiny):
    """The last two convolutions keep stride 8."""
    strides = (8, 8, 8)

    def __init__(self):
        super().__init__()
        self.stage16, self.stage32 = conv_bn_relu(32, 32, stride=1), conv_bn_relu(32, 48, stride=1)


class TinyPlain(Tiny):
    """Without BN, whose statistics are each rank's own."""

    def __init__(self):
        super().__init__()
        for name, module in list(self.named_modules()):
            if isinstance(module, nn.BatchNorm2d):
                self.set_submodule(name, nn.Identity())


def conv_bn_relu(channels, width, stride=2):
    return nn.Sequential(nn.Conv2d(channels, width, 3, stride=stride, padding=1, bias=False), nn.BatchNorm2d(width),
                         nn.ReLU(inplace=True))
