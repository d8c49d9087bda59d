"""AlexNet for small images."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hvd_batchgrow.config.model_specs import MODELS, ModelSpec

if TYPE_CHECKING:
    from torch import nn


def build(in_channels: int, num_classes: int) -> nn.Module:
    """Return AlexNet's five convolutions with ReLU, adapted to 32×32 images, and one linear layer, without norm.

    The convolutions are 11×11 with stride 4 to 64 channels, 5×5 to 192, and 3×3 to 384, 256 and 256. 2×2
    max-pooling follows the first, the second and the last. It leaves one pixel of 32×32; larger maps are averaged.
    The network has no dropout, and 2 472 266 parameters for 10 classes and color images. Initial weights: torch's
    defaults.

    Shapes: input (n, in_channels, H >= 29, W >= 29), output (n, num_classes) logits.

    Source: Krizhevsky et al. 2012, in the CIFAR form of github.com/bearpaw/pytorch-classification,
    which AdaBatch (github.com/NVlabs/AdaBatch) uses.
    """
    from torch import nn

    from hvd_batchgrow.nn.layers import MeanClassifier

    layers = [
        nn.Conv2d(in_channels, 64, 11, stride=4, padding=5),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(64, 192, 5, padding=2),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(192, 384, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(384, 256, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(256, 256, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
    ]
    return MeanClassifier(layers, 256, num_classes)


MODELS.register(
    ModelSpec(
        name="alexnet",
        doc="AlexNet for CIFAR as in AdaBatch: five convolutions, one linear layer, no norm; sides from 29 pixels",
        keys=frozenset(),
        accepts="images",
        build=build,
        least_pixels=29,  # ⌊(29-1)/4⌋+1 = 8 after the first convolution, then halved three times
    )
)
