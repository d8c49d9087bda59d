"""AlexNet for small images."""

from __future__ import annotations

from torch import Tensor, nn


class AlexNet(nn.Module):
    """AlexNet's five convolutions with ReLU, adapted to 32×32 images, and one linear layer, without norm or dropout.

    The convolutions are 11×11 with stride 4 to 64 channels, 5×5 to 192, and 3×3 to 384, 256 and 256. 2×2
    max-pooling follows the first, the second and the last. It leaves one pixel of 32×32; larger maps are averaged.
    The network has 2 472 266 parameters for 10 classes and colour images. Initial weights: torch's defaults.

    Shapes: input (n, in_channels, H >= 29, W >= 29), output (n, num_classes) logits.

    Args:
        in_channels: channels of the image.
        num_classes: number of classes.

    Source: Krizhevsky et al. 2012, in the CIFAR form of github.com/bearpaw/pytorch-classification,
    which AdaBatch (github.com/NVlabs/AdaBatch) uses.
    """

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
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
        )
        self.classifier = nn.Linear(256, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (n, num_classes) of a batch of images."""
        return self.classifier(self.features(images).mean(dim=(2, 3)))  # type: ignore[no-any-return]
