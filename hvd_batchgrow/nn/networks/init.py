"""First weights."""

from __future__ import annotations

from torch import nn


def he_normal(model: nn.Module) -> None:
    """Draw the weights of all convolutions anew, with variance 2/(k² C_out); set the biases of linear layers to 0.

    The variance keeps that of the gradient through convolution and ReLU (He et al. 2015, arXiv
    1502.01852, eq. 14). The weights of linear layers stay torch's: uniform, variance 1/(3 C_in).
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
