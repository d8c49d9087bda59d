"""VGG networks for small images."""

from __future__ import annotations

from torch import Tensor, nn

from hvd_batchgrow.nn.ghost.ghost_batch_norm import GhostBatchNorm2d
from hvd_batchgrow.nn.networks.init import he_normal

_STAGES = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}
"""Convolutions of each stage, by depth. The depth also counts the three linear layers of the paper."""


class Vgg(nn.Module):
    """VGG-D with norm, and with one linear layer instead of the paper's three.

    Five stages of 3×3 convolutions with norm and ReLU, of 64, 128, 256, 512 and 512 channels, each end
    with 2×2 max-pooling. One pixel of 32×32 is left; larger maps are averaged. One linear layer follows.
    The convolutions have no biases, because the norm's mean would cancel them.

    VGG-19 has 20 035 018 parameters for 10 classes and colour images, or 5 504 more with biases (both agree
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

    def __init__(
        self, in_channels: int, num_classes: int, depth: int = 19, ghost_batch: int = 64, bn_momentum: float = 0.1
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        width = in_channels
        for out, num_convolutions in zip((64, 128, 256, 512, 512), _STAGES[depth], strict=True):
            for _ in range(num_convolutions):
                norm = GhostBatchNorm2d(out, ghost_batch, momentum=bn_momentum)
                layers += [nn.Conv2d(width, out, 3, padding=1, bias=False), norm, nn.ReLU(inplace=True)]
                width = out
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(width, num_classes)
        he_normal(self)
        nn.init.normal_(self.classifier.weight, std=0.01)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (n, num_classes) of a batch of images."""
        return self.classifier(self.features(images).mean(dim=(2, 3)))  # type: ignore[no-any-return]
