"""Shared by benchmarks: contestants alternate in one run, so that disturbances of the machine affect all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has finished its work. A CPU has already finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def take_turns(
    contestants: Mapping[str, Callable[[], int]],
    turns: int,
    is_over: Callable[[], bool] = lambda: False,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Run each contestant once per turn. Each turn begins with another contestant.

    Args:
        contestants: each does some work and returns the number of processed items.
        turns: number of timed turns; an untimed one precedes them.
        is_over: called after each timed turn but the first two; True: take no further turns.
        clock: returns seconds.

    Returns:
        Items per second of each contestant, one for each turn.
    """
    rates: dict[str, list[float]] = {name: [] for name in contestants}
    names = list(contestants)
    for turn in range(turns + 1):
        for k in range(len(names)):
            name = names[(k + turn) % len(names)]
            begin = clock()
            items = contestants[name]()
            if turn:
                rates[name].append(items / (clock() - begin))
        if turn > 2 and is_over():
            break
    return rates


def print_rates(rates: Mapping[str, Sequence[float]], unit: str, reference: str) -> None:
    """Print median and range of each contestant, and of its ratio to the reference in each turn."""
    print(f"{'':32} {'median ' + unit:>18} {'least … most':>24}   × {reference}")
    for name, values in rates.items():
        ratios = [a / b for a, b in zip(values, rates[reference], strict=True)]
        spread = f"{min(values):,.0f} … {max(values):,.0f}"
        print(
            f"{name:32} {statistics.median(values):18,.0f} {spread:>24}   "
            f"{statistics.median(ratios):.3f} ({min(ratios):.3f} … {max(ratios):.3f})"
        )
