"""Residual networks for small images."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from hvd_batchgrow.config.model_specs import MODELS, NORM_KEYS, ModelSpec

if TYPE_CHECKING:
    from torch import nn


def build(
    in_channels: int, num_classes: int, *, depth: int, ghost_batch: int, bn_momentum: float, shakedrop: float = 0.0
) -> nn.Module:
    """Return ResNet-D for small images, with shortcuts that have no parameters.

    A 3×3 convolution to 16 channels, norm and ReLU; three stages of n = (D-2)/6 blocks of 16, 32 and
    64 channels, each stage at half the resolution of the previous one; mean of the map and a linear
    layer. A block is

        y = relu(s + norm(conv(relu(norm(conv(x)))))),

    with s = x, or, if the width doubles, every other pixel of x with zeros for the new channels
    (option A). If `shakedrop` is above 0, `ShakeDrop` follows the second norm of each block. ResNet-20 has
    269 722 parameters for 10 classes and color images (the paper's 0.27 M).
    Initial weights: `he_normal`, as in the authors' code.

    Shapes: input (n, in_channels, H, W), output (n, num_classes) logits.

    Args:
        in_channels: channels of the image.
        num_classes: number of classes.
        depth: D = 6n + 2.
        ghost_batch: γ of every ghost norm, in samples.
        bn_momentum: weight of one ghost batch in the running statistics.
        shakedrop: probability that `ShakeDrop` perturbs a sample in the last block.

    Source: He et al. 2016 (arXiv 1512.03385), §4.2.
    """
    from torch import nn

    from hvd_batchgrow.nn.ghost.ghost_batch_norm import GhostBatchNorm2d
    from hvd_batchgrow.nn.init import he_normal
    from hvd_batchgrow.nn.layers import MeanClassifier, PaddedShortcutBlock
    from hvd_batchgrow.nn.shakedrop import ShakeDrop, drop_probability

    norm = partial(GhostBatchNorm2d, ghost_batch=ghost_batch, momentum=bn_momentum)
    conv = partial(nn.Conv2d, kernel_size=3, padding=1, bias=False)
    width, num_blocks, number = 16, (depth - 2) // 2, 0  # number: of the block, from 1
    layers: list[nn.Module] = [conv(in_channels, width), norm(width), nn.ReLU(inplace=True)]
    for out in (16, 32, 64):
        for _ in range(num_blocks // 3):
            number += 1
            first = conv(width, out, stride=1 if width == out else 2)
            residual = nn.Sequential(first, norm(out), nn.ReLU(inplace=True), conv(out, out), norm(out))
            if shakedrop:
                residual.append(ShakeDrop(drop_probability(shakedrop, number, num_blocks)))
            layers.append(PaddedShortcutBlock(residual, out - width))
            width = out
    network = MeanClassifier(layers, width, num_classes)
    he_normal(network)
    return network


MODELS.register(
    ModelSpec(
        name="resnetD",
        doc="CIFAR ResNet of depth D = 6n+2, shortcuts without parameters (He et al. 2016, §4.2, option A); "
        "50 and 152 are torchvision's",
        keys=NORM_KEYS | {"shakedrop"},
        accepts="images",
        build=build,
        pattern=r"resnet(?P<depth>[1-9]\d*)",
        # 50 and 152 have this form too, but they are the depths of ImageNet's networks.
        depths=tuple(depth for depth in range(8, 1203, 6) if depth not in {50, 152}),
        listing="resnetD of depth D = 6n+2",
        examples=tuple(f"resnet{depth}" for depth in (20, 32, 44, 56, 110)),
    )
)
