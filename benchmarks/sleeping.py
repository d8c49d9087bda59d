"""A network that sleeps instead of computing convolutions, so that emulated hosts do not compete for cores."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.contestants import job_of
from hvd_batchgrow.nn.build import build_model

NUM_CLASSES = 10
_SIDE = 32


class Sleep(torch.autograd.Function):
    """A layer that takes time, but uses no core."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, seconds: float, *weights: Tensor) -> Tensor:
        """Sleep a third of the seconds, and return x."""
        ctx.seconds = seconds
        ctx.save_for_backward(*weights)
        time.sleep(seconds / 3)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        """Sleep two thirds of the seconds, and return zeros as the gradients of the weights."""
        time.sleep(2 * ctx.seconds / 3)
        return grads[0], None, *map(torch.zeros_like, ctx.saved_tensors)


class SleepingNetwork(nn.Module):
    """A network with the parameters of WRN-16-4 (2.7 million numbers). All its layers sleep equally long.

    Args:
        seconds_per_sample: seconds that the forward and the backward pass together sleep for each sample.
    """

    def __init__(self, seconds_per_sample: float) -> None:
        super().__init__()
        job = job_of(
            "sleeping", "cpu", 8, model={"name": "wrn_16_4", "ghost_batch": 8},
            data={"source": "synthetic_images", "num_samples": 10**6, "shape": [_SIDE, _SIDE, 3]},
        )  # fmt: skip
        network = build_model(job, (_SIDE, _SIDE, 3), NUM_CLASSES)
        layers = [list(module.parameters(recurse=False)) for module in network.modules()]
        self.layers = nn.ModuleList(nn.ParameterList(layer) for layer in layers if layer)
        self.seconds_per_sample = seconds_per_sample

    def forward(self, x: Tensor) -> Tensor:
        """Return the first pixels of each sample as logits (n, classes), which have gradients for all parameters."""
        seconds = len(x) * self.seconds_per_sample / len(self.layers)
        y = x.flatten(1)[:, :NUM_CLASSES].clone().requires_grad_()
        for layer in self.layers:
            y = Sleep.apply(y, seconds, *layer.parameters())  # type: ignore[no-untyped-call]
        return y
