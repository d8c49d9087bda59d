"""Decide from three computations of a share of an update which rank is wrong, and write the message."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class RankLocation:
    """Where a rank computes."""

    rank: int
    host: str
    device: str

    def __str__(self) -> str:
        return f"rank {self.rank} (host {self.host}, {self.device})"


@dataclass(frozen=True)
class Finding:
    """One rank's share of an update, for which the results of the first two ranks disagree."""

    share: int
    """The rank whose ghost batches these are."""
    ranks: tuple[int, int, int]
    """Those that computed it, in this order. The first is `share`. With one or two ranks, some appear twice."""
    third_agrees: tuple[bool, bool]
    """Whether the third result agrees with the first, and with the second."""
    gradient: float
    """Largest difference of the first two gradients over all buckets, relative to the gradient's norm."""
    gradient_limit: float
    """Largest difference that rounding explains there; 0 in exact mode."""
    loss: float
    """Difference of the first two sums of losses, relative to the sum."""
    loss_limit: float
    same_samples: bool
    """Whether the first two ranks have read the same samples."""

    @property
    def wrong(self) -> int | None:
        """The rank whose result is wrong, by majority; None: undecided.

        A rank that confirms its own result proves nothing against another rank, because a lasting fault repeats.
        """
        first, second, third = self.ranks
        match self.third_agrees:
            case (True, False):
                return second if first != third or first == second else None
            case (False, True):
                return first if second != third or first == second else None
            case _:
                return None


@dataclass(frozen=True)
class Occasion:
    """The update whose check has failed, and the last check that has passed."""

    update: int
    """Number of the update, from 0."""
    samples: int
    """Sample counter before the update."""
    global_batch: int
    last_passed: int | None
    """Sample counter before the update of the last passed check; None: no check has passed."""
    folder: str
    """The run folder."""


def describe(findings: Sequence[Finding], locations: Sequence[RankLocation], occasion: Occasion) -> str:
    """Return the message for a failed check: what differs, on which ranks, which one is wrong, and what to do.

    Args:
        findings: at least one.
        locations: of all ranks, by rank.
        occasion: when it failed.
    """
    first, last = occasion.samples, occasion.samples + occasion.global_batch - 1
    lines = [
        f"update {occasion.update}, samples {first:,} … {last:,}: the repetition for checks.replay_every gave another "
        "result. A device, its memory or its host computes wrong numbers, or reads other data:",
        *(line for finding in findings for line in _lines(finding, locations)),
        *_remedy(findings, locations, occasion),
    ]
    return "\n  ".join(lines)


def _lines(finding: Finding, locations: Sequence[RankLocation]) -> Iterator[str]:
    first, second = (locations[rank] for rank in finding.ranks[:2])
    who = f"two computations of {first}" if first == second else f"{first} and {second}"
    what = f"the gradient by {_amount(finding.gradient, finding.gradient_limit)}"
    what += f", the loss by {_amount(finding.loss, finding.loss_limit)}"
    samples = "" if finding.same_samples else "; they have not read the same samples"
    yield f"ghost batches of rank {finding.share}: {who} differ: {what}{samples}"
    yield f"{_third(finding, locations)}: {_verdict(finding, len(locations))}"


def _third(finding: Finding, locations: Sequence[RankLocation]) -> str:
    """Return with which results the third one agrees."""
    first, second, third = finding.ranks
    if first == second:
        who, results = "a third computation", ("the first", "the second")
    elif first == third:
        who, results = f"rank {first}'s second computation", ("its first", f"that of rank {second}")
    else:
        who, results = f"the result of {locations[third]}", (f"that of rank {first}", f"that of rank {second}")
    agrees = [result for result, does in zip(results, finding.third_agrees, strict=True) if does]
    return f"{who} agrees with {' and '.join(agrees) or 'neither'}"


def _verdict(finding: Finding, num_ranks: int) -> str:
    if num_ranks == 1:
        return "this device is not reliable"
    if finding.wrong is None:
        return f"{'with two ranks, ' * (num_ranks == 2)}it cannot be decided which is wrong"
    return f"rank {finding.wrong} is wrong"


def _amount(relative: float, limit: float) -> str:
    allowed = f"rounding explains {limit:.2g}" if limit else "must be 0"
    return f"{relative:.2g} of its value ({allowed})"


def _remedy(findings: Sequence[Finding], locations: Sequence[RankLocation], occasion: Occasion) -> Iterator[str]:
    wrong = [finding.wrong for finding in findings if finding.wrong is not None]
    suspects = wrong or [rank for finding in findings for rank in finding.ranks[:2]]
    hosts = " or ".join(dict.fromkeys(locations[rank].host for rank in sorted(suspects)))
    yield "the update was not applied, and no checkpoint of it was written"
    if occasion.last_passed is None:
        yield f"no check of this run has passed before. Exclude {hosts}, and train it again (--name NAME)"
        return
    yield (
        f"exclude {hosts}. The last check passed at sample {occasion.last_passed:,}: remove later checkpoints from "
        f"{occasion.folder}/checkpoints, and continue with --resume auto"
    )
