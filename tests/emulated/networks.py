"""Networks for tests on the emulated accelerator."""

from __future__ import annotations

from torch import Tensor, nn


class PartlyUsed(nn.Module):
    """A linear classifier of images, and a layer whose output no loss contains."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.unused = nn.Linear(3, 2)
        self.features = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten())
        self.classifier = nn.Linear(4 * 6 * 6, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.features(images))
        return logits


def partly_used(num_classes: int) -> nn.Module:
    """Return the network, as `model.name` requires."""
    return PartlyUsed(num_classes)
