"""Wide residual networks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from hvd_batchgrow.nn.dropout import KeyedDropout
from hvd_batchgrow.nn.ghost.ghost_batch_norm import GhostBatchNorm2d
from hvd_batchgrow.nn.networks.init import he_normal

Norm = Callable[[int], nn.Module]


class WideResNet(nn.Module):
    """WRN-D-K: pre-activation residual blocks of two 3×3 convolutions, K times as wide as in a ResNet.

    A 3×3 convolution to 16 channels; three stages of n = (D-4)/6 blocks of 16K, 32K and 64K channels,
    each stage at half the resolution of the previous one; norm, ReLU, mean of the map and a linear
    layer. With a = relu(norm(x)), a block is

        y = s + conv(relu(norm(conv(a)))),   s = x, or a 1×1 convolution of a if the width changes.

    If `dropout` is above 0, keyed dropout precedes the second convolution of each block. Parameters for 10
    classes and colour images: WRN-16-4 2 748 890, WRN-28-10 36 479 194.
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

    Source: Zagoruyko & Komodakis 2016 (arXiv 1605.07146).
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        depth: int = 16,
        widening: int = 4,
        ghost_batch: int = 64,
        bn_momentum: float = 0.1,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        norm = partial(GhostBatchNorm2d, ghost_batch=ghost_batch, momentum=bn_momentum)
        width = 16
        layers: list[nn.Module] = [nn.Conv2d(in_channels, width, 3, padding=1, bias=False)]
        for out, stride in ((16 * widening, 1), (32 * widening, 2), (64 * widening, 2)):
            for k in range((depth - 4) // 6):
                layers.append(_Block(width, out, stride if k == 0 else 1, norm, dropout))
                width = out
        self.features = nn.Sequential(*layers, norm(width), nn.ReLU(inplace=True))
        self.classifier = nn.Linear(width, num_classes)
        he_normal(self)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (n, num_classes) of a batch of images."""
        return self.classifier(self.features(images).mean(dim=(2, 3)))  # type: ignore[no-any-return]


class _Block(nn.Module):
    def __init__(self, width: int, out: int, stride: int, norm: Norm, dropout: float) -> None:
        super().__init__()
        self.activate = nn.Sequential(norm(width), nn.ReLU(inplace=True))
        self.residual = nn.Sequential(
            nn.Conv2d(width, out, 3, stride=stride, padding=1, bias=False),
            norm(out),
            nn.ReLU(inplace=True),
            *([KeyedDropout(dropout)] if dropout else []),
            nn.Conv2d(out, out, 3, padding=1, bias=False),
        )
        self.shortcut = None if width == out else nn.Conv2d(width, out, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        active = self.activate(x)
        shortcut: Tensor = x if self.shortcut is None else self.shortcut(active)
        return shortcut + self.residual(active)  # type: ignore[no-any-return]
