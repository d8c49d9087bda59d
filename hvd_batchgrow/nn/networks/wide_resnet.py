"""Wide residual networks."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from hvd_batchgrow.config.model_specs import MODELS, NORM_KEYS, ModelSpec

if TYPE_CHECKING:
    from torch import nn


def build(
    in_channels: int,
    num_classes: int,
    *,
    depth: int,
    widening: int,
    ghost_batch: int,
    bn_momentum: float,
    dropout: float,
    shakedrop: float = 0.0,
) -> nn.Module:
    """Return WRN-D-K: pre-activation residual blocks of two 3×3 convolutions, K times as wide as in a ResNet.

    A 3×3 convolution to 16 channels; three stages of n = (D-4)/6 blocks of 16K, 32K and 64K channels,
    each stage at half the resolution of the previous one; norm, ReLU, mean of the map and a linear
    layer. With a = relu(norm(x)), a block is

        y = s + conv(relu(norm(conv(a)))),   s = x, or a 1×1 convolution of a if the width changes.

    If `dropout` is above 0, keyed dropout precedes the second convolution of each block. If `shakedrop` is above
    0, `ShakeDrop` follows that convolution. Parameters for 10 classes and color images: WRN-16-4 2 748 890,
    WRN-28-10 36 479 194.
    Initial weights: `he_normal`, as in the authors' code.

    Shapes: input (n, in_channels, H, W), output (n, num_classes) logits.

    Args:
        in_channels: channels of the image.
        num_classes: number of classes.
        depth: D = 6n + 4.
        widening: K.
        ghost_batch: γ of every ghost norm, in samples.
        bn_momentum: weight of one ghost batch in the running statistics.
        dropout: fraction of the values that keyed dropout sets to 0 between the convolutions of a block.
        shakedrop: probability that `ShakeDrop` perturbs a sample in the last block.

    Source: Zagoruyko & Komodakis 2016 (arXiv 1605.07146).
    """
    from torch import nn

    from hvd_batchgrow.nn.dropout import KeyedDropout
    from hvd_batchgrow.nn.ghost.ghost_batch_norm import GhostBatchNorm2d
    from hvd_batchgrow.nn.init import he_normal
    from hvd_batchgrow.nn.layers import MeanClassifier, PreActivationBlock
    from hvd_batchgrow.nn.shakedrop import ShakeDrop, drop_probability

    norm = partial(GhostBatchNorm2d, ghost_batch=ghost_batch, momentum=bn_momentum)
    conv = partial(nn.Conv2d, bias=False)

    num_blocks = (depth - 4) // 2

    def block(number: int, width: int, out: int, stride: int) -> nn.Module:
        residual = nn.Sequential(
            conv(width, out, 3, stride=stride, padding=1),
            norm(out),
            nn.ReLU(inplace=True),
            *([KeyedDropout(dropout)] if dropout else []),
            conv(out, out, 3, padding=1),
            *([ShakeDrop(drop_probability(shakedrop, number, num_blocks))] if shakedrop else []),
        )
        shortcut = None if width == out else conv(width, out, 1, stride=stride)
        return PreActivationBlock(nn.Sequential(norm(width), nn.ReLU(inplace=True)), residual, shortcut)

    width = 16
    layers: list[nn.Module] = [conv(in_channels, width, 3, padding=1)]
    for out, stride in ((16 * widening, 1), (32 * widening, 2), (64 * widening, 2)):
        for k in range(num_blocks // 3):
            number = len(layers)  # of the block, from 1: the first layer is a convolution
            layers.append(block(number, width, out, stride if k == 0 else 1))
            width = out
    network = MeanClassifier([*layers, norm(width), nn.ReLU(inplace=True)], width, num_classes)
    he_normal(network)
    return network


MODELS.register(
    ModelSpec(
        name="wrn_D_K",
        doc="wide ResNet of depth D = 6n+4 and widening factor K, with optional dropout (Zagoruyko & Komodakis 2016)",
        keys=NORM_KEYS | {"dropout", "shakedrop"},
        accepts="images",
        build=build,
        pattern=r"wrn_(?P<depth>[1-9]\d*)_(?P<widening>[1-9]\d*)",
        depths=tuple(range(10, 1007, 6)),
        listing="wrn_D_K of depth D = 6n+4",
        examples=("wrn_16_4", "wrn_28_10"),
    )
)
