"""Residual networks for small images."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from hvd_batchgrow.nn.ghost.ghost_batch_norm import GhostBatchNorm2d
from hvd_batchgrow.nn.networks.init import he_normal
from hvd_batchgrow.nn.networks.wide_resnet import Norm


class CifarResNet(nn.Module):
    """ResNet-D for small images, with shortcuts that have no parameters.

    A 3×3 convolution to 16 channels, norm and ReLU; three stages of n = (D-2)/6 blocks of 16, 32 and
    64 channels, each stage at half the resolution of the previous one; mean of the map and a linear
    layer. A block is

        y = relu(s + norm(conv(relu(norm(conv(x)))))),

    with s = x, or, if the width doubles, every other pixel of x with zeros for the new channels
    (option A). ResNet-20 has 269 722 parameters for 10 classes and colour images (the paper's 0.27 M).
    Initial weights: `he_normal`, as in the authors' code.

    Shapes: input (n, in_channels, H, W), output (n, num_classes) logits.

    Args:
        in_channels: channels of the image.
        num_classes: number of classes.
        depth: D = 6n + 2.
        ghost_batch: γ of every ghost norm, in samples.
        bn_momentum: weight of one ghost batch in the running statistics.

    Source: He et al. 2016 (arXiv 1512.03385), §4.2.
    """

    def __init__(
        self, in_channels: int, num_classes: int, depth: int = 20, ghost_batch: int = 64, bn_momentum: float = 0.1
    ) -> None:
        super().__init__()
        norm = partial(GhostBatchNorm2d, ghost_batch=ghost_batch, momentum=bn_momentum)
        width = 16
        first = (nn.Conv2d(in_channels, width, 3, padding=1, bias=False), norm(width), nn.ReLU(inplace=True))
        blocks: list[nn.Module] = []
        for out in (16, 32, 64):
            for _ in range((depth - 2) // 6):
                blocks.append(_Block(width, out, norm))
                width = out
        self.features = nn.Sequential(*first, *blocks)
        self.classifier = nn.Linear(width, num_classes)
        he_normal(self)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (n, num_classes) of a batch of images."""
        return self.classifier(self.features(images).mean(dim=(2, 3)))  # type: ignore[no-any-return]


class _Block(nn.Module):
    def __init__(self, width: int, out: int, norm: Norm) -> None:
        super().__init__()
        self.new_channels = out - width
        self.stride = 2 if self.new_channels else 1
        self.residual = nn.Sequential(
            nn.Conv2d(width, out, 3, stride=self.stride, padding=1, bias=False),
            norm(out),
            nn.ReLU(inplace=True),
            nn.Conv2d(out, out, 3, padding=1, bias=False),
            norm(out),
        )

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        if self.new_channels:
            every_other = x[:, :, :: self.stride, :: self.stride]
            shortcut = nn.functional.pad(every_other, (0, 0, 0, 0, 0, self.new_channels))
        return nn.functional.relu(shortcut + self.residual(x))
