"""ShakeDrop: multiply the residual of a block by random factors, which differ between forward and backward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hvd_batchgrow.nn.keyed_random import KeyedModule, fewest_bits


class ShakeDrop(KeyedModule):
    """The factor of F(x) in G(x) = x + (b + α - bα) F(x), the output of a residual block.

    b is 1 with probability 1 - p, otherwise 0. α is uniform in [-1, 1), and in the backward pass β, uniform in [0, 1),
    replaces it. So the factor is 1 in both passes if b = 1, otherwise α in the forward and β in the backward pass. In
    evaluation, the factor is its expectation, E[b + α - bα] = 1 - p.

    Each sample has one b, α and β, drawn by its key (`KeyedModule`). The paper also draws them once per batch, channel
    or pixel; a draw per batch would depend on how ranks and micro-batches divide an update. Outside an update, samples
    have no keys, and torch's generator draws.

    Shapes: input F(x) and output (n, …); with keys, n of them.

    Args:
        p: probability of b = 0, in [0, 1); see `drop_probability`.

    Raises:
        ValueError: p is not in [0, 1).

    Source: Yamada et al. 2018 (arXiv 1802.02375), with its ranges [-1, 1] of α and [0, 1] of β.
    """

    kind = "ShakeDrop"

    def __init__(self, p: float) -> None:
        super().__init__()
        if not 0 <= p < 1:
            raise ValueError(f"p = {p} must be in [0, 1)")
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """Scale each sample. Raises ValueError if the number of keys is not the number of samples."""
        if not self.training:
            return x * (1 - self.p)
        bits = self.random_bits(x.shape[0], 3, x.device)
        if bits is None:
            bits = torch.randint(1 << 24, (x.shape[0], 3), device=x.device)
        uniform = bits.to(torch.float32) * 2.0**-24  # exact
        kept = (bits[:, 0] >= fewest_bits(self.p)).to(uniform.dtype)
        factors = [kept + (1 - kept) * other for other in (2 * uniform[:, 1] - 1, uniform[:, 2])]
        alpha, beta = (factor.to(x.dtype).view(-1, *[1] * (x.dim() - 1)) for factor in factors)
        scaled: Tensor = _TwoFactors.apply(x, alpha, beta)  # type: ignore[no-untyped-call]
        return scaled

    def extra_repr(self) -> str:
        """Return the arguments that `print(model)` shows."""
        return f"p={self.p:.4g}"


class _TwoFactors(torch.autograd.Function):
    """`apply(x, forward, backward)` multiplies x by one factor, and its gradient by the other."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, forward_factor: Tensor, backward_factor: Tensor) -> Tensor:
        ctx.save_for_backward(backward_factor)
        return x * forward_factor

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (factor,) = ctx.saved_tensors
        return gradient * factor, None, None


def drop_probability(shakedrop: float, block: int, num_blocks: int) -> float:
    """Return the probability of b = 0 in a block: shakedrop · l/L, the linear decay rule.

    So p_l = 1 - l/L (1 - p_L) with p_L = 1 - shakedrop, in the symbols of the paper, whose p is that of b = 1.

    Args:
        shakedrop: 1 - p_L, the probability in the last block.
        block: l, from 1, the block next to the input.
        num_blocks: L.

    Source: Huang et al. 2016 (arXiv 1603.09382), eq. 4; Yamada et al. 2018 (arXiv 1802.02375).
    """
    return shakedrop * block / num_blocks
