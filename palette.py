"""VOC's colour map, in a module without PyTorch, whose import takes longer than converting a thousand labels."""
import numpy as np


def palette():
    """VOC's colour map as uint8 [256, 3]: bits 0, 1, 2 of the index go to the top bits of R, G, B, then bits 3, 4, 5...

    The rule of VOCcode/VOClabelcolormap.m in VOC's development kit.
    """
    index = np.arange(256)[:, None]
    colour = np.zeros((256, 3), np.int64)
    for bit in range(8):
        colour |= (index >> 3 * bit + np.arange(3) & 1) << 7 - bit
    return colour.astype(np.uint8)
