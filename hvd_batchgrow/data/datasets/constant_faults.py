"""Find implausible constants of a normalization: mean and std of images on another scale. Needs no numpy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

_LEAST_DEVIATION = 0.002
"""Values in [0, 1] have a std of at most 0.5. 0.5/255 is below this limit; 1/255, which yields 0 … 255, is above it."""


def constant_faults(mean: Sequence[float] | None, std: Sequence[float] | None) -> Iterator[tuple[str, str]]:
    """Yield the keys `mean` and `std` with their faults for images, which are scaled to [0, 1].

    Args:
        mean: per channel; None: not stated.
        std: per channel, above 0; None: not stated.
    """
    if mean is not None and not all(0 <= m <= 1 for m in mean):
        by_255 = [m / 255 if 1 < m <= 255 else min(max(m, 0.0), 1.0) for m in mean]
        fault = f"{_short(mean)}: images are scaled to [0, 1] first, so their mean is in [0, 1] too"
        yield "mean", f"{fault}; nearest: {_short(by_255)}{_how(mean)}"
    if not std:
        return
    if max(std) > 1:
        by_255 = [d / 255 if 1 < d <= 255 else min(d, 1.0) for d in std]
        fault = f"{_short(std)}: images are scaled to [0, 1] first, so std cannot exceed 1"
        yield "std", f"{fault}; nearest: {_short(by_255)}{_how(std)}"
    elif min(std) < _LEAST_DEVIATION:
        by_255 = [min(255 * d, 1.0) if d < _LEAST_DEVIATION else d for d in std]
        fault = f"{_short(std)}: images are scaled to [0, 1] first, and would become as large as {1 / min(std):,.0f}"
        yield "std", f"{fault}; nearest: {_short(by_255)}, × 255"


def _how(values: Sequence[float]) -> str:
    return ", divided by 255" if any(1 < value <= 255 for value in values) else ""


def _short(values: Sequence[float]) -> str:
    return f"[{', '.join(f'{value:.4g}' for value in values)}]"
