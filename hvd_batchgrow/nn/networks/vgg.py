"""VGG networks for small images."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hvd_batchgrow.config.model_specs import MODELS, NORM_KEYS, ModelSpec

if TYPE_CHECKING:
    from torch import nn

_STAGES = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}
"""Convolutions of each stage, by depth. The depth also counts the three linear layers of the paper."""
_NAMES = tuple(f"vgg{depth}_bn" for depth in _STAGES)


def build(in_channels: int, num_classes: int, *, depth: int, ghost_batch: int, bn_momentum: float) -> nn.Module:
    """Return VGG-D with norm, and with one linear layer instead of the paper's three.

    Five stages of 3×3 convolutions with norm and ReLU, of 64, 128, 256, 512 and 512 channels, each end
    with 2×2 max-pooling. One pixel of 32×32 is left; larger maps are averaged. One linear layer follows.
    The convolutions have no biases, because the norm's mean would cancel them.

    VGG-19 has 20 035 018 parameters for 10 classes and color images, or 5 504 more with biases (both agree
    with the published 20.04 M). Initial weights as in the code below: `he_normal`, and the linear layer's
    with standard deviation 0.01.

    Shapes: input (n, in_channels, H >= 32, W >= 32), output (n, num_classes) logits.

    Args:
        in_channels: channels of the image.
        num_classes: number of classes.
        depth: D, 11, 13, 16 or 19.
        ghost_batch: γ of every ghost norm, in samples.
        bn_momentum: weight of one ghost batch in the running statistics.

    Source: Simonyan & Zisserman 2015 (arXiv 1409.1556), in the CIFAR form of
    github.com/bearpaw/pytorch-classification, which AdaBatch (github.com/NVlabs/AdaBatch) uses.
    """
    from torch import nn

    from hvd_batchgrow.nn.ghost.ghost_batch_norm import GhostBatchNorm2d
    from hvd_batchgrow.nn.init import he_normal
    from hvd_batchgrow.nn.layers import MeanClassifier

    layers: list[nn.Module] = []
    width = in_channels
    for out, num_convolutions in zip((64, 128, 256, 512, 512), _STAGES[depth], strict=True):
        for _ in range(num_convolutions):
            norm = GhostBatchNorm2d(out, ghost_batch, momentum=bn_momentum)
            layers += [nn.Conv2d(width, out, 3, padding=1, bias=False), norm, nn.ReLU(inplace=True)]
            width = out
        layers.append(nn.MaxPool2d(2))
    network = MeanClassifier(layers, width, num_classes)
    he_normal(network)
    nn.init.normal_(network.classifier.weight, std=0.01)
    return network


MODELS.register(
    ModelSpec(
        name="vggD_bn",
        doc="VGG-11, 13, 16 or 19 with norm, convolutions without biases, one linear layer; sides from 32 pixels",
        keys=NORM_KEYS,
        accepts="images",
        build=build,
        pattern=r"vgg(?P<depth>[1-9]\d*)_bn",
        depths=tuple(_STAGES),
        listing=", ".join(_NAMES),
        examples=_NAMES,
        least_pixels=32,  # halved five times
    )
)
