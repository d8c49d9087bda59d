"""Layers that the networks of this package are made of."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


class MeanClassifier(nn.Module):
    """Layers that make a feature map of an image, the mean of the map, and a linear layer.

    Shapes: input (n, channels, H, W), output (n, num_classes) logits.

    Args:
        layers: applied in order.
        width: channels of the map.
        num_classes: number of classes.
    """

    def __init__(self, layers: Sequence[nn.Module], width: int, num_classes: int) -> None:
        super().__init__()
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of a batch of images."""
        return self.classifier(self.features(images).mean(dim=(2, 3)))  # type: ignore[no-any-return]


class PreActivationBlock(nn.Module):
    """y = s + residual(a) with a = activate(x), and s = x, or shortcut(a).

    Args:
        activate: norm and ReLU.
        residual: of the same output shape as the shortcut.
        shortcut: None: s = x.
    """

    def __init__(self, activate: nn.Module, residual: nn.Module, shortcut: nn.Module | None) -> None:
        super().__init__()
        self.activate, self.residual, self.shortcut = activate, residual, shortcut

    def forward(self, x: Tensor) -> Tensor:
        """Return y."""
        active = self.activate(x)
        shortcut: Tensor = x if self.shortcut is None else self.shortcut(active)
        return shortcut + self.residual(active)  # type: ignore[no-any-return]


class PaddedShortcutBlock(nn.Module):
    """y = relu(s + residual(x)) with s = x, or every other pixel of x with zeros for new channels.

    Args:
        residual: halves the map if there are new channels.
        new_channels: channels of the output minus channels of the input.
    """

    def __init__(self, residual: nn.Module, new_channels: int) -> None:
        super().__init__()
        self.residual, self.new_channels = residual, new_channels

    def forward(self, x: Tensor) -> Tensor:
        """Return y."""
        shortcut = x
        if self.new_channels:
            shortcut = nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 0, self.new_channels))
        return nn.functional.relu(shortcut + self.residual(x))
