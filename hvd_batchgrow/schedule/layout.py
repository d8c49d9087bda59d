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


def form_layout(global_batch: int, ranks: int, ghost_batch: int, max_micro_batch: int, *, uneven_ranks: bool) -> Layout:
    """Divide a global batch into ranks and micro-batches: as few equal micro-batches as possible.

    Args:
        global_batch: B, samples of one update.
        ranks: R.
        ghost_batch: γ, samples of a ghost batch, which is never cut.
        max_micro_batch: most samples of one forward and backward pass.
        uneven_ranks: whether ranks may hold different numbers of ghost batches.

    Raises:
        ValueError: the layout cannot be formed; the message has the arithmetic and the nearest valid values.
    """
    num_ghost_batches, rest = divmod(global_batch, ghost_batch)
    if rest:
        raise ValueError(f"global batch {cut_ghost_batches(global_batch, ghost_batch)}")
    if max_micro_batch % ghost_batch:
        raise ValueError(f"max_micro_batch {cut_ghost_batches(max_micro_batch, ghost_batch)}")
    if num_ghost_batches < ranks:
        raise ValueError(
            f"global batch {global_batch} = {num_ghost_batches} ghost batches of {ghost_batch} for {ranks} ranks: "
            f"{ranks - num_ghost_batches} would have nothing to do; "
            f"nearest: {ranks * ghost_batch}, or {num_ghost_batches} ranks"
        )
    if num_ghost_batches % ranks and not uneven_ranks:
        raise ValueError(_indivisible(global_batch, ranks, ghost_batch))
    return _equal_passes(num_ghost_batches, ranks, ghost_batch, max_micro_batch)


def _equal_passes(num_ghost_batches: int, ranks: int, ghost_batch: int, max_micro_batch: int) -> Layout:
    most = -(-num_ghost_batches // ranks)
    limit = min(most, max_micro_batch // ghost_batch)
    if num_ghost_batches % ranks:
        # Ranks differ anyway, so the last micro-batch may be short.
        return Layout(ranks, -(-most // limit), limit * ghost_batch, uneven_ranks=True)
    per_pass = next(size for size in range(limit, 0, -1) if most % size == 0)
    return Layout(ranks, most // per_pass, per_pass * ghost_batch, uneven_ranks=False)


def _indivisible(global_batch: int, ranks: int, ghost_batch: int) -> str:
    num_ghost_batches = global_batch // ghost_batch
    lower, upper = _neighbors(global_batch, ranks * ghost_batch)
    nearest_ranks = sorted(sorted(divisors(num_ghost_batches, 4 * ranks), key=lambda n: abs(n - ranks))[:3])
    return (
        f"global batch {global_batch} = {ranks} ranks × {num_ghost_batches / ranks:.2f} ghost batches of {ghost_batch}"
        f"; nearest: {lower}{upper}; or {', '.join(map(str, nearest_ranks))} ranks; "
        "or layout.uneven_ranks = true"
    )


def cut_ghost_batches(samples: int, ghost_batch: int) -> str:
    """Return the fault of a number of samples that is not whole ghost batches, with the nearest valid numbers."""
    lower, upper = _neighbors(samples, ghost_batch)
    count = f"{samples} = {samples / ghost_batch:.2f} ghost batches of {ghost_batch}"
    return f"{count}, which are never cut; nearest: {lower}{upper}"


def _neighbors(value: int, unit: int) -> tuple[str, str]:
    lower = value // unit * unit
    return (f"{lower}, " if lower else "", str(lower + unit))


def formable_ranks(num_ghost_batches: int, max_ranks: int, *, uneven_ranks: bool) -> Iterator[int]:
    """Return the numbers of ranks that can share a batch of `num_ghost_batches` ghost batches, the largest first."""
    most = max(1, min(num_ghost_batches, max_ranks))
    return iter(range(most, 0, -1)) if uneven_ranks else reversed(divisors(max(1, num_ghost_batches), most))


def fills_nodes(ranks: int, ranks_per_node: int) -> bool:
    """Return whether ranks fit on one node or fill whole nodes."""
    return ranks <= ranks_per_node or ranks % ranks_per_node == 0


def divisors(number: int, most: int) -> list[int]:
    """Return the divisors of a number up to `most`. Of each pair of divisors, one is at most the square root."""
    small = [k for k in range(1, min(math.isqrt(number), most) + 1) if number % k == 0]
    return sorted({divisor for k in small for divisor in (k, number // k) if divisor <= most})


def ranks_for_full_passes(
    global_batch: int, max_ranks: int, ghost_batch: int, max_micro_batch: int, *, uneven_ranks: bool
) -> int:
    """Return the most ranks that each get at least one full micro-batch of a global batch; at least 1.

    Args as `form_layout`. Without `uneven_ranks`, the ranks must divide the number of ghost batches.
    """
    return next(
        formable_ranks(
            global_batch // ghost_batch, min(max_ranks, global_batch // max_micro_batch), uneven_ranks=uneven_ranks
        )
    )
