"""The gradient noise scale B_simple = tr(Σ)/|G|², from the gradients of the parts of updates."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class NoiseEstimate:
    """Estimates of the noise in the gradient from one update. Each has a large error."""

    trace: float
    """Ŝ, unbiased for tr(Σ): the summed variance of a single sample's gradient; with weights, B times that of the
    update's gradient."""
    squared_norm: float
    """Unbiased for |G|², G the gradient over all data; may be below 0."""
    num_gradients: int = field(default=0, compare=False)
    """Number of gradients that it comes from."""


def estimate(
    weighted_squares: float, num_gradients: int, batch: int, squared_norm: float, imbalance: float = 1.0
) -> NoiseEstimate | None:
    """Estimate the signal and the noise in the gradient of an update.

        Ŝ = (Σ bᵢ |gᵢ|² - c B |g|²) / (k - c)        |G|²^ = |g|² - Ŝ/B        c = B/W² Σ wᵢ²/bᵢ

    Without weights, c = 1. With weights, the gradient of the update is g = Σ sᵢ/W with the sums sᵢ of the weighted
    gradients. If wᵢ G is the mean of sᵢ and all bᵢ are equal, Ŝ has the mean B Σ Var(sᵢ)/W² = B Var(g), whatever the
    variances are: Σ |sᵢ|² has the mean Σ Var(sᵢ) + |G|² Σ wᵢ², and |g|² the mean Σ Var(sᵢ)/W² + |G|².

    Args:
        weighted_squares: Σ bᵢ |gᵢ|² over all micro-batches on all ranks, or over other independent parts of the update;
            gᵢ = sᵢ/bᵢ · B/W is the mean gradient of the bᵢ samples of one part, divided by the mean weight of a sample.
        num_gradients: k, the number of these parts.
        batch: B = Σ bᵢ.
        squared_norm: |g|² of the gradient of the update, before it is clipped.
        imbalance: c, from 1 for equal weights to k if all the weight is in one part.

    Returns:
        None if k - c is below ½: one gradient has no spread, and neither have several if one has nearly all the weight.

    Source: McCandlish et al. 2018 (arXiv 1812.06162), App. A.1, for any bᵢ; our addition: any wᵢ.
    """
    if num_gradients - imbalance < 0.5:
        return None
    trace = (weighted_squares - imbalance * batch * squared_norm) / (num_gradients - imbalance)
    return NoiseEstimate(trace, squared_norm - trace / batch, num_gradients)


@dataclass(frozen=True)
class GradientNoiseScale:
    """Smoothed tr(Σ) and |G|², and their ratio with a confidence interval."""

    trace: float
    squared_norm: float
    b_simple: float | None
    """tr(Σ)/|G|², samples; None: unresolved, |G|² is not above 0."""
    low: float | None
    """Ends of the 95 % confidence interval; None: unbounded, or too few updates."""
    high: float | None


@dataclass(frozen=True)
class NormLayers:
    """How the noise scale of the whole gradient follows from that of the norm layers."""

    b_simple: float | None
    """B_simple of the norm layers alone, in samples; None: unresolved."""
    micro_batches: float | None
    """B_simple of the whole gradient, from micro-batches; None: unresolved or not measured."""
    factor: float
    """The factor from the first to that of the whole gradient."""
    is_measured: bool
    """Whether the factor was measured in this run; otherwise it is `gradient_noise.norm_layers_factor`."""
    num_units: int
    """Number of ghost batches or samples of an update."""


class NoiseAverage:
    """Separate moving averages of tr(Σ) and |G|² with a memory in samples.

    Neither quantity depends on the batch, so growth does not require a reset.

    Args:
        memory_samples: number of samples after which the weight of an estimate has fallen to 1/e.
    """

    def __init__(self, memory_samples: float) -> None:
        self._memory_samples = memory_samples
        self._sums = _Sums()

    def add(self, seen: NoiseEstimate, samples: int) -> None:
        """Add the estimate of an update of `samples` samples."""
        kept = math.exp(-samples / self._memory_samples)
        new, old = 1 - kept, self._sums
        self._sums = _Sums(
            weight=kept * old.weight + new,
            squared_weights=kept**2 * old.squared_weights + new**2,
            trace=kept * old.trace + new * seen.trace,
            norm=kept * old.norm + new * seen.squared_norm,
            trace_trace=kept * old.trace_trace + new * seen.trace**2,
            norm_norm=kept * old.norm_norm + new * seen.squared_norm**2,
            trace_norm=kept * old.trace_norm + new * seen.trace * seen.squared_norm,
        )

    @property
    def value(self) -> GradientNoiseScale | None:
        """The averages, divided by the sum of their weights (bias correction); None: no estimate was added."""
        sums = self._sums
        if not sums.weight:
            return None
        trace, norm = sums.trace / sums.weight, sums.norm / sums.weight
        low, high = sums.interval()
        return GradientNoiseScale(trace, norm, trace / norm if norm > 0 and trace > 0 else None, low, high)

    def state(self) -> dict[str, float]:
        """Return plain values for a checkpoint."""
        return asdict(self._sums)

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore the result of `state`."""
        self._sums = _Sums(**state)


@dataclass(frozen=True)
class _Sums:
    """Sums over updates: the weights, their squares, and the weighted estimates and products of estimates."""

    weight: float = 0.0
    squared_weights: float = 0.0
    trace: float = 0.0
    norm: float = 0.0
    trace_trace: float = 0.0
    norm_norm: float = 0.0
    trace_norm: float = 0.0

    def interval(self) -> tuple[float | None, float | None]:
        """Return Fieller's 95 % confidence interval for the ratio of the two means.

        It contains all ratios ρ with |S - ρ G| ≤ z σ(S - ρ G). The errors of both means and their covariance come
        from the spread of the estimates, and updates are assumed to be independent. Source: Fieller 1954.
        """
        num_updates = self.weight**2 / self.squared_weights
        if num_updates < _FEWEST:
            return None, None
        s, g = self.trace / self.weight, self.norm / self.weight
        per_mean = _Z**2 / (num_updates - 1)
        ss = max(0.0, self.trace_trace / self.weight - s * s) * per_mean
        gg = max(0.0, self.norm_norm / self.weight - g * g) * per_mean
        sg = (self.trace_norm / self.weight - s * g) * per_mean
        a, b, c = g * g - gg, s * g - sg, s * s - ss
        root = math.sqrt(max(0.0, b * b - a * c))
        if a > 0 and g > 0:
            return max(0.0, (b - root) / a), max(0.0, (b + root) / a)
        # |G|² may be 0, so the ratio has no upper bound. The lower bound is the root with the smaller absolute value,
        # which is above 0 if S is significantly above 0.
        if c > 0 and s > 0:
            return c / (b + root) if b + root > 0 else None, None
        return None, None


_Z = 1.96
_FEWEST = 8
"""Effective number of updates below which their spread does not give the error of their mean."""
