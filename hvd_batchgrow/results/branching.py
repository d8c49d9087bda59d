"""Compare the branches of a run: which batches are not worse, and what they save.

All branches train on the same samples, so block j of each holds the same samples. The difference d_j of the mean loss
of a branch in block j from that of the branch with the run's own batch is therefore paired.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvd_batchgrow.messages.errors import RunError
from hvd_batchgrow.results.block_bootstrap import MeanInterval, mean_interval
from hvd_batchgrow.results.outcomes import Outcomes, read_outcomes
from hvd_batchgrow.results.records import number
from hvd_batchgrow.results.run_files import RunFiles
from hvd_batchgrow.results.statistics import paired_difference

Array = NDArray[np.float64]
_ENOUGH_BLOCKS = 32
"""Blocks for which simulations find a coverage of 95 ± 3 % up to a correlation of 0.7; see docs/critical-batch.md."""


@dataclass(frozen=True)
class BranchRecord:
    """What a branch has recorded."""

    folder: Path
    factor: int
    """k."""
    global_batch: int
    lr: float
    """Learning rate ε f(k)."""
    ranks: int
    losses: Array
    """(updates,): training loss of each update; NaN if it was not finite."""
    update_s: float
    """Median time of an update; NaN if it was not measured."""
    held_out: float
    """Loss of the last evaluation on the set that is evaluated during training; NaN if it was not finite, or if there
    was none, as in a branch that a trigger has trained."""
    dataset: str
    """That set: `validation` or `test`."""
    outcomes: Outcomes | None = None
    """Losses of the test samples, if the test set is the one that is evaluated during training."""
    weights: Array | None = None
    """(updates,): the sum of the weights of each update's samples; None: the samples have no weights."""

    @property
    def seconds(self) -> float:
        """Time of all updates."""
        return self.update_s * len(self.losses)


@dataclass(frozen=True)
class HeldOut:
    """The difference of the loss on held-out samples, with its interval over the samples."""

    mean: float
    low: float | None
    """None: only the means are known, as for a validation set."""
    high: float | None

    @property
    def half_width(self) -> float | None:
        """Half of the interval's width."""
        return None if self.low is None or self.high is None else (self.high - self.low) / 2


@dataclass(frozen=True)
class BranchResult:
    """A branch compared with the branch of the run's own batch."""

    record: BranchRecord
    loss: float
    """Mean training loss over the second half of the samples; NaN if the loss of an update there was not finite."""
    difference: MeanInterval | None
    """Of `loss`, this branch minus the first; None for the first branch, and if a loss is not finite."""
    held_out: HeldOut | None
    is_not_worse: bool
    """Whether this branch alone passes."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values; without the losses of single updates."""
        record = self.record
        return {
            "factor": record.factor,
            "global_batch": record.global_batch,
            "lr": record.lr,
            "ranks": record.ranks,
            "updates": len(record.losses),
            "seconds": record.seconds,
            "loss": self.loss,
            "difference": asdict(self.difference) if self.difference else None,
            "held_out_loss": record.held_out,
            "held_out_difference": asdict(self.held_out) if self.held_out else None,
            "is_not_worse": self.is_not_worse,
            "folder": str(record.folder),
        }


@dataclass(frozen=True)
class Branching:
    """The comparison of all branches."""

    results: tuple[BranchResult, ...]
    """By ascending factor; the first is the branch of the run's own batch."""
    tolerance: float | None

    @property
    def passed(self) -> tuple[BranchResult, ...]:
        """The first branch, and those after it up to the first that is worse."""
        count = next((k for k, result in enumerate(self.results) if not result.is_not_worse), len(self.results))
        return self.results[:count]

    @property
    def critical_batch(self) -> int:
        """The largest batch that is not worse, together with all smaller ones."""
        return self.passed[-1].record.global_batch

    @property
    def is_bound(self) -> bool:
        """Whether all branches passed, so that the critical batch may be larger."""
        return len(self.passed) == len(self.results)

    def verdict(self) -> str:
        """Return the critical batch in a sentence."""
        test = (
            "the interval of its training difference is not entirely above 0"
            if self.tolerance is None
            else f"the interval of its training difference is below {self.tolerance:g}"
        )
        batch = f"{self.critical_batch:,}"
        if self.is_bound:
            return f"critical batch: at least {batch}; no branch is worse ({test})"
        first_worse = self.results[len(self.passed)].record.global_batch
        if len(self.passed) == 1:
            return f"critical batch: below {first_worse:,}; the run's own batch is {batch} (not worse: {test})"
        return f"critical batch: {batch}; {first_worse:,} is worse (not worse: {test})"

    def explanation(self, block: int) -> list[str]:
        """Return how to read the numbers: what the loss is, and the limits of the intervals."""
        first = self.results[0].record
        total = len(first.losses) * first.global_batch // block
        used = total - total // 2
        where = f"the second half of the samples, {used} blocks of {block:,}"
        lines = [f"loss: mean over {where}; differences from k = 1, with 95 % intervals (block bootstrap)"]
        if used < _ENOUGH_BLOCKS:
            lines.append(
                f"{used} blocks are few: if neighboring blocks are correlated, intervals are too narrow; "
                f"{_ENOUGH_BLOCKS} take --samples {2 * _ENOUGH_BLOCKS * block}"
            )
        if any(result.held_out is not None and result.held_out.low is not None for result in self.results):
            lines.append("test loss: the interval is over the test samples, and says nothing about another seed")
        passed = [result.difference.high for result in self.passed if result.difference]
        if passed and self.tolerance is None:
            lines.append(
                f"a branch that is not worse may still be worse by up to {max(passed):.4g}, the upper end of its "
                "interval; --tolerance sets a limit"
            )
        return lines

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "tolerance": self.tolerance,
            "branches": [result.to_dict() for result in self.results],
            "critical_batch": self.critical_batch,
            "is_bound": self.is_bound,
            "verdict": self.verdict(),
        }


def read_branch(folder: Path, factor: int, start: int) -> BranchRecord:
    """Read a finished branch.

    Args:
        folder: its run folder.
        factor: k.
        start: sample counter at which it begins.

    Raises:
        RunError: records are missing or damaged.
    """
    run = RunFiles.read(folder)
    phase = run.plan["phases"][-1]
    samples, batch = run.column("samples"), phase["global_batch"]
    rows = samples > start
    expected = start + batch * np.arange(1, phase["num_updates"] + 1)
    if phase["start_samples"] != start or not np.array_equal(samples[rows], expected):
        fault = f"records of {int(rows.sum()):,} of {len(expected):,} updates"
        raise RunError(f"{folder / 'metrics.jsonl'} holds {fault}: remove {folder}, and run branch again")
    is_timed = (run.column("samples_per_s")[rows] > 0).all()
    during = [line for line in run.evaluations if line["samples"] == expected[-1]]
    by_set = {line["dataset"]: line for line in during}
    held_out = by_set.get("validation") or by_set.get("test") or {"dataset": "test"}
    ranks, weights = run.column("ranks")[rows], run.column("loss_weight")[rows]
    return BranchRecord(
        folder,
        factor,
        batch,
        phase["lr"],
        int(ranks[-1]) if np.isfinite(ranks[-1]) else 1,
        run.column("loss")[rows],
        float(np.median(run.record_seconds[rows])) if is_timed else math.nan,
        math.nan if (loss := number(held_out.get("loss"))) is None else loss,
        held_out["dataset"],
        read_outcomes(folder) if held_out["dataset"] == "test" else None,
        np.where(np.isnan(weights), batch, weights),  # records of older versions do not have it
    )


def compare_branches(records: Sequence[BranchRecord], block: int, tolerance: float | None = None) -> Branching:
    """Compare branches with the first one.

    Args:
        records: by ascending factor; the first has factor 1, and all cover the same samples.
        block: samples of a block, in which each branch does whole updates.
        tolerance: a branch is not worse if the upper end of the 95 % interval of its loss difference is below this
            number. None: if the lower end is not above 0.

    Raises:
        RunError: a loss of the first branch is not finite.
    """
    first = records[0]
    base = _last_half(block_losses(first.losses, block // first.global_batch, first.weights))
    if not np.isfinite(base).all():
        raise RunError(f"{first.folder}: the loss of the run's own batch is not finite, so nothing can be compared")
    results = [BranchResult(first, float(base.mean()), None, None, is_not_worse=True)]
    for record in records[1:]:
        losses = _last_half(block_losses(record.losses, block // record.global_batch, record.weights))
        difference = mean_interval(losses - base) if np.isfinite(losses).all() else None
        results.append(
            BranchResult(
                record,
                float(losses.mean()),
                difference,
                held_out_difference(record, first),
                is_not_worse=difference is not None and _passes(difference, tolerance),
            )
        )
    return Branching(tuple(results), tolerance)


def block_losses(losses: Array, updates: int, weights: Array | None = None) -> Array:
    """Return the mean loss of each block of this number of updates: Σ weight · loss / Σ weight.

    The loss of an update is a ratio too. Unweighted means of such ratios would depend on the batch.
    """
    weights = np.ones_like(losses) if weights is None else weights
    sums, totals = (each.reshape(-1, updates).sum(axis=1) for each in (weights * losses, weights))
    return np.asarray(np.divide(sums, totals, out=np.full_like(sums, np.nan), where=totals > 0))


def _last_half(blocks: Array) -> Array:
    """Return the blocks that count: just after the checkpoint, all branches have nearly the same weights."""
    return blocks[len(blocks) // 2 :]


def _passes(difference: MeanInterval, tolerance: float | None) -> bool:
    return difference.low <= 0 if tolerance is None else difference.high < tolerance


def held_out_difference(record: BranchRecord, first: BranchRecord) -> HeldOut | None:
    """Return the difference of two networks' losses on held-out samples; None if one is not finite."""
    mean = record.held_out - first.held_out
    if not math.isfinite(mean):
        return None
    a, b = record.outcomes, first.outcomes
    if a is None or b is None or len(a.losses) != len(b.losses) or len(a.losses) < 2:
        return HeldOut(mean, None, None)
    each = a.losses.astype(np.float64) - b.losses
    each = each[~(np.isnan(a.losses) & np.isnan(b.losses))]  # without bad samples that both have skipped
    if a.weights is not None:
        each *= len(each) / float(a.weights.sum(dtype=np.float64))
    if not np.isfinite(each).all():
        return HeldOut(mean, None, None)
    found = paired_difference(each.tolist())
    return HeldOut(found.mean, found.low, found.high)
