"""A comparison in words: the numbers behind its verdict, and the cost of both arms."""

from __future__ import annotations

from collections.abc import Iterator

from hvd_batchgrow.messages.wording import metric_name
from hvd_batchgrow.results.comparison import Comparison
from hvd_batchgrow.results.run_cost import RunCost


def statistics(found: Comparison) -> Iterator[str]:
    """Yield the numbers behind a verdict, without a full stop at the end."""
    difference, equal = found.difference, found.equivalence
    if difference is not None and difference.std is not None:
        wide = found.interval(difference.low, difference.high)
        yield f"difference, first minus second: {found.signed(difference.mean)}, 95 % interval {wide}"
    if equal is not None and equal.p is not None:
        narrow = found.interval(equal.low, equal.high)
        yield f"two one-sided tests at ±{found.limit}: p = {equal.p:.2g}, 90 % interval {narrow}"
    if any(pair.samples for pair in found.pairs):
        yield (
            "McNemar's p compares the two networks of a pair on each test sample; two networks of one job with "
            "different seeds differ too, so a small p does not show that the jobs differ"
        )


def curve_lines(found: Comparison) -> Iterator[str]:
    """Yield how far the curves are apart during training, without a full stop at the end."""
    if (curves := found.curves) is None:
        return
    place, largest = curves.largest
    what = f"{curves.dataset} {metric_name(curves.metric)} by {curves.axis}"
    where = f"{curves.axis} {curves.place_text(place)}"
    yield f"{what}: {found.amount(curves.mean)} apart on average, at most {found.signed(largest)} at {where}"
    if found.margin is None:
        return
    ends = [dict.fromkeys(map(curves.place_text, both)) for both in curves.apart(found.margin)]
    stretches = [" to ".join(both) for both in ends]
    far = f"more than {found.limit} apart"
    yield f"{far} at {curves.axis} {', '.join(stretches)}" if stretches else f"never {far}"


def branch_lines(found: Comparison) -> Iterator[str]:
    """Yield which costs include branches of a trigger, without a full stop at the end."""
    if not found.pairs:
        return
    for arm, cost in zip((found.first, found.second), arm_costs(found), strict=True):
        if cost.branch_updates:
            yield f"updates of {arm.name}: {cost.branch_updates:,.0f} are those of branches that its trigger trained"


def arm_costs(found: Comparison) -> tuple[RunCost, RunCost]:
    """Return the mean cost of the counted runs of each arm; there must be a pair."""
    pairs = found.pairs
    return RunCost.mean([pair.first_run for pair in pairs]), RunCost.mean([pair.second_run for pair in pairs])
