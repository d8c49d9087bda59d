"""The network of the quickstart."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hvd_batchgrow.config.model_specs import MODELS, NORM_KEYS, ModelSpec

if TYPE_CHECKING:
    from torch import nn


def build(
    in_channels: int,
    num_classes: int,
    *,
    ghost_batch: int,
    bn_momentum: float,
    channels: tuple[int, ...] = (16, 32, 32, 64, 64),
) -> nn.Module:
    """Return 3×3 convolutions with ghost norm and ReLU, and one linear layer. The map is halved where the width grows.

    Initial weights: torch's defaults.

    Shapes: input (n, in_channels, H, W), output (n, num_classes) logits.

    Args:
        in_channels: channels of the image.
        num_classes: number of classes.
        ghost_batch: γ of every ghost norm, in samples.
        bn_momentum: weight of one ghost batch in the running statistics.
        channels: output channels of each convolution.
    """
    from torch import nn

    from hvd_batchgrow.nn.ghost.ghost_batch_norm import GhostBatchNorm2d
    from hvd_batchgrow.nn.layers import MeanClassifier

    layers: list[nn.Module] = []
    width = in_channels
    for k, out in enumerate(channels):
        stride = 2 if k and out > width else 1
        layers += [
            # No bias: the mean of the following norm would cancel it.
            nn.Conv2d(width, out, 3, stride=stride, padding=1, bias=False),
            GhostBatchNorm2d(out, ghost_batch, momentum=bn_momentum),
            nn.ReLU(inplace=True),
        ]
        width = out
    return MeanClassifier(layers, width, num_classes)


MODELS.register(
    ModelSpec(
        name="small_conv_net",
        doc="3×3 convolutions, one linear layer",
        keys=NORM_KEYS | {"channels"},
        accepts="images",
        build=build,
    )
)
