"""What all benchmarks share: contestants take turns in one run, so that what disturbs the machine disturbs all."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch


def finish(device: torch.device) -> None:
    """Wait for what a GPU has been told to do; a CPU has done it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def take_turns(contestants: Mapping[str, Callable[[], int]], turns: int) -> dict[str, list[float]]:
    """Run each contestant once a turn, beginning with another each time.

    Args:
        contestants: each does some work and returns how many items it has done.
        turns: how often; one more goes before, untimed.

    Returns:
        items per second, one for each turn.
    """
    rates: dict[str, list[float]] = {name: [] for name in contestants}
    names = list(contestants)
    for turn in range(turns + 1):
        for k in range(len(names)):
            name = names[(k + turn) % len(names)]
            begin = time.perf_counter()
            items = contestants[name]()
            if turn:
                rates[name].append(items / (time.perf_counter() - begin))
    return rates


def print_rates(rates: Mapping[str, Sequence[float]], unit: str, reference: str) -> None:
    """Median and spread of each, and the median of its ratios to the reference, turn by turn."""
    print(f"{'':32} {'median ' + unit:>18} {'least … most':>24}   × {reference}")
    for name, values in rates.items():
        ratios = [a / b for a, b in zip(values, rates[reference], strict=True)]
        spread = f"{min(values):,.0f} … {max(values):,.0f}"
        print(
            f"{name:32} {statistics.median(values):18,.0f} {spread:>24}   "
            f"{statistics.median(ratios):.3f} ({min(ratios):.3f} … {max(ratios):.3f})"
        )
