"""Read the gradient noise that a run has recorded, and report where the evidence is weak."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hvd_batchgrow.config import Job
from hvd_batchgrow.schedule.rounding import samples_at

WIDE = 4.0
"""Ratio of a band's ends above which it gives only the order of magnitude."""
_UNCALIBRATED = (
    "B_simple is that of the norm layers times gradient_noise.norm_layers_factor, which the run had not measured; it "
    "does so in updates of two or more micro-batches"
)
_MOST_LISTED = 4
"""Ranges of epochs that one message lists."""


@dataclass(frozen=True)
class Observation:
    """One training record: consecutive updates at one batch, and the averages at their end."""

    start_samples: int
    """Sample counter at the start of the record."""
    samples: int
    """Sample counter at its end."""
    updates: int
    """Number of updates in the record."""
    global_batch: int
    """B in samples."""
    lr: float
    gradients: int
    """Number of micro-batches of an update over all ranks, from whose gradients its noise or, with norm layers, their
    factor is estimated."""
    is_measured: bool = True
    b_simple: float | None = None
    """B_simple = tr(Σ)/|G|² in samples; None: |G|² is not resolved."""
    low: float | None = None
    """Lower and upper end of its 95 % band; None: unbounded."""
    high: float | None = None
    units: int | None = None
    """Number of ghost batches or samples of an update, from whose norm layers its noise was estimated; None: it was
    estimated from micro-batches."""
    is_calibrated: bool = True
    """Whether B_simple was estimated from micro-batches, or from norm layers with a factor that the run measured."""

    @property
    def num_gradients(self) -> int:
        """Number of gradients from which the noise of an update was estimated."""
        return self.gradients if self.units is None else self.units

    @property
    def length(self) -> int:
        """Number of samples in the record."""
        return self.samples - self.start_samples

    @property
    def is_resolved(self) -> bool:
        """Whether B_simple and its lower end are known."""
        return self.b_simple is not None and self.low is not None

    @property
    def is_wide(self) -> bool:
        """Whether B_simple is resolved with a band wider than `WIDE`."""
        return self.is_resolved and (self.high is None or self.high > WIDE * (self.low or 0.0))


def read_observations(lines: Iterable[Mapping[str, Any]]) -> list[Observation]:
    """Return the training records of a `metrics.jsonl`, in the order of their samples.

    If a run did some updates twice, for instance after a kill, the later record is used.
    """
    kept: list[Mapping[str, Any]] = []
    for line in lines:
        if line.get("kind") != "train":
            continue
        while kept and kept[-1]["samples"] >= line["samples"]:
            kept.pop()
        kept.append(line)
    before: Mapping[str, Any] = {"samples": 0, "updates": 0}
    return [_observation(a, b) for a, b in itertools.pairwise([before, *kept])]


def _observation(before: Mapping[str, Any], line: Mapping[str, Any]) -> Observation:
    noise, layers = line.get("gradient_noise", {}).get("all"), line.get("norm_layers")
    return Observation(
        start_samples=before["samples"],
        samples=line["samples"],
        updates=line["updates"] - before["updates"],
        global_batch=line["global_batch"],
        lr=line["lr"],
        gradients=line["ranks"] * line["accumulation"],
        is_measured=noise is not None,
        units=layers["num_units"] if layers else None,
        is_calibrated=not layers or layers["is_measured"],
        **{key: noise[key] if noise else None for key in ("b_simple", "low", "high")},
    )


def typical(seen: Sequence[Observation], value: Callable[[Observation], float | None], share: float) -> float | None:
    """Return the quantile of a value over samples, for a share in [0, 1]; None if the value is never known."""
    known = sorted((v, o.length) for o in seen if (v := value(o)) is not None)
    wanted, passed = share * sum(length for _, length in known), 0
    for v, length in known:
        passed += length
        if passed >= wanted:
            return v
    return None


def weaknesses(seen: Sequence[Observation], job: Job, num_samples: int) -> list[str]:
    """Return where the evidence is missing or weak, and what would improve it.

    Args:
        seen: the result of `read_observations`.
        job: the run's job.
        num_samples: N.
    """
    kinds: list[tuple[Callable[[Observation], bool], str]] = [
        (lambda o: not o.is_measured, "B_simple was not measured"),
        (lambda o: o.is_measured and not o.is_calibrated, _UNCALIBRATED),
        (lambda o: o.is_measured and o.b_simple is None, "|G|² is not resolved, so B_simple is unknown"),
        (lambda o: o.b_simple is not None and o.low is None, "too few updates for a band"),
        (lambda o: o.is_wide, f"band wider than ×{WIDE:g}"),
    ]
    found = [f"{place}: {text}" for test, text in kinds if (place := where(seen, num_samples, test))]
    measured = [o for o in seen if o.is_measured]
    if measured and min(o.num_gradients for o in measured) == 2:
        found.append(f"an update has two gradients, the fewest that show noise; {more_gradients(measured, job)}")
    of_factor = [o for o in measured if o.units is not None and o.gradients > 1]
    if of_factor and min(o.gradients for o in of_factor) == 2:
        found.append(
            "the factor of the norm layers is measured from two micro-batches per update, the fewest that show noise; "
            f"{_more_micro_batches(of_factor, job)}"
        )
    end = seen[-1].samples if seen else 0
    if end < samples_at(job.schedule.epochs, num_samples):
        at = f"the run is at epoch {end / num_samples:.3g} of {job.schedule.epochs:g}"
        found.append(f"{at}: later epochs are unknown, and the batch does not grow there")
    return found


def smaller_pass(seen: Sequence[Observation], job: Job) -> int | None:
    """Return a micro-batch of at most half the current one, which gives an update more gradients; None if it would be
    smaller than a ghost batch."""
    ghost_batch, fewest = job.model.ghost_batch, min(seen, key=lambda o: o.gradients)
    smaller = min(job.micro_batch_limit, fewest.global_batch // fewest.gradients) // 2 // ghost_batch * ghost_batch
    return smaller or None


def more_gradients(seen: Sequence[Observation], job: Job) -> str:
    """Return how to get more gradients per update, in keys of the job file."""
    if job.gradient_noise.estimator != "norm_layers":
        return _more_micro_batches(seen, job)
    fewest, ghost_batch = min(seen, key=lambda o: o.num_gradients), job.model.ghost_batch
    if ghost_batch == 1 or fewest.num_gradients * ghost_batch > fewest.global_batch:
        return f"measure with a batch above {fewest.global_batch}: each of its samples is a gradient already"
    return f"measure with a ghost batch below {ghost_batch}"


def _more_micro_batches(seen: Sequence[Observation], job: Job) -> str:
    if smaller := smaller_pass(seen, job):
        return f"measure with more micro-batches: layout.max_micro_batch = {smaller}"
    return f"measure with more ranks, or a ghost batch below {job.model.ghost_batch}"


def where(seen: Sequence[Observation], num_samples: int, test: Callable[[Observation], bool]) -> str:
    """Return the epochs in which a test holds, in words; empty if there are no such epochs."""
    ranges: list[tuple[int, int]] = []
    for o in filter(test, seen):
        if ranges and ranges[-1][1] == o.start_samples:
            ranges[-1] = (ranges[-1][0], o.samples)
        else:
            ranges.append((o.start_samples, o.samples))
    texts = [f"{a / num_samples:.3g}-{b / num_samples:.3g}" for a, b in ranges[:_MOST_LISTED]]
    more = f" and {len(ranges) - _MOST_LISTED} more ranges" if len(ranges) > _MOST_LISTED else ""
    return f"epochs {', '.join(texts)}{more}" if ranges else ""
