"""Initial weights."""

from __future__ import annotations

from torch import nn


def he_normal(model: nn.Module) -> None:
    """Draw the weights of all convolutions with variance 2/(k² C_out), and set the biases of linear layers to 0.

    This variance preserves the variance of the gradient through convolution and ReLU (He et al. 2015, arXiv
    1502.01852, eq. 14). The weights of linear layers keep torch's default: uniform, variance 1/(3 C_in).
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
