"""The network of the quickstart."""

from __future__ import annotations

from torch import Tensor, nn

from hvd_batchgrow.nn.ghost.ghost_batch_norm import GhostBatchNorm2d


class SmallConvNet(nn.Module):
    """3×3 convolutions with ghost norm and ReLU, and one linear layer. The map is halved where the width grows.

    Initial weights: torch's defaults.

    Shapes: input (n, in_channels, H, W), output (n, num_classes) logits.

    Args:
        in_channels: channels of the image.
        num_classes: number of classes.
        channels: output channels of each convolution.
        ghost_batch: γ of every ghost norm, in samples.
        bn_momentum: weight of one ghost batch in the running statistics.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        channels: tuple[int, ...] = (16, 32, 32, 64, 64),
        ghost_batch: int = 64,
        bn_momentum: float = 0.1,
    ) -> None:
        super().__init__()
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
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (n, num_classes) of a batch of images."""
        return self.classifier(self.features(images).mean(dim=(2, 3)))  # type: ignore[no-any-return]
