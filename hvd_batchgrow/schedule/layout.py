"""Layout: a global batch as ranks × accumulation × micro-batch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Layout:
    """How one update is computed. It affects the speed, and the result only by rounding."""

    ranks: int
    accumulation: int
    """Micro-batches of the rank with the most ghost batches."""
    micro_batch: int
    """Samples of one forward and backward pass; with `uneven_ranks` the last one may have fewer."""
    uneven_ranks: bool
    """Whether some ranks hold one ghost batch more than others."""


def form_layout(global_batch: int, ranks: int, group: int, max_micro_batch: int, *, uneven_ranks: bool) -> Layout:
    """Divide a global batch into ranks and micro-batches: as few equal micro-batches as possible.

    Args:
        global_batch: B, samples of one update.
        ranks: R.
        group: γ, samples of a ghost batch, which is never cut.
        max_micro_batch: most samples of one forward and backward pass.
        uneven_ranks: whether ranks may hold different numbers of ghost batches.

    Raises:
        ValueError: the layout cannot be formed; the message has the arithmetic and the nearest valid values.
    """
    groups, rest = divmod(global_batch, group)
    if rest:
        raise ValueError(f"global batch {cut_groups(global_batch, group)}")
    if max_micro_batch % group:
        raise ValueError(f"max_micro_batch {cut_groups(max_micro_batch, group)}")
    if groups < ranks:
        raise ValueError(
            f"global batch {global_batch} = {groups} ghost batches of {group} for {ranks} ranks: "
            f"{ranks - groups} would have nothing to do; nearest: {ranks * group}, or {groups} ranks"
        )
    if groups % ranks and not uneven_ranks:
        raise ValueError(_indivisible(global_batch, ranks, group))
    return _equal_passes(groups, ranks, group, max_micro_batch)


def _equal_passes(groups: int, ranks: int, group: int, max_micro_batch: int) -> Layout:
    most = -(-groups // ranks)
    limit = min(most, max_micro_batch // group)
    if groups % ranks:
        # Ranks differ anyway, so the last micro-batch may be short.
        return Layout(ranks, -(-most // limit), limit * group, uneven_ranks=True)
    per_pass = next(size for size in range(limit, 0, -1) if most % size == 0)
    return Layout(ranks, most // per_pass, per_pass * group, uneven_ranks=False)


def _indivisible(global_batch: int, ranks: int, group: int) -> str:
    groups = global_batch // group
    lower, upper = _neighbors(global_batch, ranks * group)
    nearest_ranks = sorted(sorted(divisors(groups, 4 * ranks), key=lambda n: abs(n - ranks))[:3])
    return (
        f"global batch {global_batch} = {ranks} ranks × {groups / ranks:.2f} ghost batches of {group}; "
        f"nearest: {lower}{upper}; or {', '.join(map(str, nearest_ranks))} ranks; "
        "or layout.uneven_ranks = true"
    )


def cut_groups(samples: int, group: int) -> str:
    """Return the fault of a number of samples that is not whole ghost batches, with the nearest valid numbers."""
    lower, upper = _neighbors(samples, group)
    return f"{samples} = {samples / group:.2f} ghost batches of {group}, which are never cut; nearest: {lower}{upper}"


def _neighbors(value: int, unit: int) -> tuple[str, str]:
    lower = value // unit * unit
    return (f"{lower}, " if lower else "", str(lower + unit))


def formable_ranks(num_ghost_batches: int, max_ranks: int, *, uneven_ranks: bool) -> Iterator[int]:
    """Return the numbers of ranks that can share a batch of `num_ghost_batches` ghost batches, the largest first."""
    most = max(1, min(num_ghost_batches, max_ranks))
    return iter(range(most, 0, -1)) if uneven_ranks else reversed(divisors(max(1, num_ghost_batches), most))


def divisors(number: int, most: int) -> list[int]:
    """Return the divisors of a number up to `most`. Of each pair of divisors, one is at most the square root."""
    small = [k for k in range(1, min(math.isqrt(number), most) + 1) if number % k == 0]
    return sorted({divisor for k in small for divisor in (k, number // k) if divisor <= most})


def ranks_for_full_passes(
    global_batch: int, max_ranks: int, group: int, max_micro_batch: int, *, uneven_ranks: bool
) -> int:
    """Return the most ranks that each get at least one full micro-batch of a global batch; at least 1.

    Args as `form_layout`. Without `uneven_ranks`, the ranks must divide the number of ghost batches.
    """
    return next(
        formable_ranks(
            global_batch // group, min(max_ranks, global_batch // max_micro_batch), uneven_ranks=uneven_ranks
        )
    )
