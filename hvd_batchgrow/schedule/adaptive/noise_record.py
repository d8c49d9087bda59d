"""What a run has recorded of the noise in its gradient, stretch by stretch, and where that is too weak to go by."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hvd_batchgrow.config import Job
from hvd_batchgrow.schedule.rounding import samples_at

WIDE = 4.0
"""A band whose upper end is more than this times its lower one tells the order of magnitude at best."""


@dataclass(frozen=True)
class Observation:
    """One training record: a stretch of updates of one batch, and the averages at its end."""

    start_samples: int
    """Sample counter where the stretch begins."""
    samples: int
    """Sample counter at its end."""
    updates: int
    """Done in it."""
    global_batch: int
    """B of the run, samples."""
    lr: float
    gradients: int
    """k: how many passes of all ranks made one update, at most."""
    is_measured: bool = True
    b_simple: float | None = None
    """B_simple = tr(Σ)/|G|², samples; None: |G|² is not resolved."""
    low: float | None = None
    """Ends of its band of 95 %; None: it has no such end."""
    high: float | None = None

    @property
    def length(self) -> int:
        """Samples of the stretch."""
        return self.samples - self.start_samples

    @property
    def is_resolved(self) -> bool:
        """Whether B_simple is known, and not below what."""
        return self.b_simple is not None and self.low is not None

    @property
    def is_wide(self) -> bool:
        """Whether it is resolved, and its band wider than `WIDE`."""
        return self.is_resolved and (self.high is None or self.high > WIDE * (self.low or 0.0))


def read_observations(lines: Iterable[Mapping[str, Any]]) -> list[Observation]:
    """Training records of a `metrics.jsonl`, in the order of their samples.

    Where a run has done a stretch twice, as after a kill, the later record holds.
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
    noise = line.get("gradient_noise", {}).get("all")
    return Observation(
        start_samples=before["samples"],
        samples=line["samples"],
        updates=line["updates"] - before["updates"],
        global_batch=line["global_batch"],
        lr=line["lr"],
        gradients=line["ranks"] * line["accumulation"],
        is_measured=noise is not None,
        **{key: noise[key] if noise else None for key in ("b_simple", "low", "high")},
    )


def typical(seen: Sequence[Observation], value: Callable[[Observation], float | None], share: float) -> float | None:
    """Of a value over samples: what a share of them, in [0, 1], lies at or below; None: nowhere is it known."""
    known = sorted((v, o.length) for o in seen if (v := value(o)) is not None)
    wanted, passed = share * sum(length for _, length in known), 0
    for v, length in known:
        passed += length
        if passed >= wanted:
            return v
    return None


def weaknesses(seen: Sequence[Observation], job: Job, num_samples: int) -> list[str]:
    """Where there is no evidence, or little, and what would give more; empty: it is sound throughout.

    Args:
        seen: of `read_observations`.
        job: of the run.
        num_samples: N.
    """
    kinds: list[tuple[Callable[[Observation], bool], str]] = [
        (lambda o: not o.is_measured, "B_simple was not measured"),
        (lambda o: o.is_measured and o.b_simple is None, "|G|² unresolved, so that B_simple may be anything"),
        (lambda o: o.b_simple is not None and o.low is None, "too few updates for a band"),
        (lambda o: o.is_wide, f"band wider than ×{WIDE:g}"),
    ]
    told = [f"{place}: {text}" for test, text in kinds if (place := where(seen, num_samples, test))]
    measured = [o for o in seen if o.is_measured]
    if measured and min(o.gradients for o in measured) == 2:
        told.append(f"an update is two gradients, the fewest that show a spread; {more_gradients(measured, job)}")
    end = seen[-1].samples if seen else 0
    if end < samples_at(job.schedule.epochs, num_samples):
        at = f"the run stands at epoch {end / num_samples:.3g} of {job.schedule.epochs:g}"
        told.append(f"{at}: beyond it nothing is known, and nothing grows")
    return told


def smaller_pass(seen: Sequence[Observation], job: Job) -> int | None:
    """Samples of a pass, at most half of those of now, by which an update has more gradients; None: of whole ghost
    batches there is no such pass."""
    group, fewest = job.model.ghost_batch, min(seen, key=lambda o: o.gradients)
    smaller = min(job.micro_batch_limit, fewest.global_batch // fewest.gradients) // 2 // group * group
    return smaller or None


def more_gradients(seen: Sequence[Observation], job: Job) -> str:
    """How to see more gradients an update, in the words of the job file."""
    if smaller := smaller_pass(seen, job):
        return f"measure with more passes: layout.max_micro_batch = {smaller}"
    return f"measure with more ranks, or a ghost batch below {job.model.ghost_batch}"


def where(seen: Sequence[Observation], num_samples: int, test: Callable[[Observation], bool]) -> str:
    """The epochs in which a test holds, in words; empty: in none."""
    stretches: list[tuple[int, int]] = []
    for o in filter(test, seen):
        if stretches and stretches[-1][1] == o.start_samples:
            stretches[-1] = (stretches[-1][0], o.samples)
        else:
            stretches.append((o.start_samples, o.samples))
    texts = [f"{a / num_samples:.3g}-{b / num_samples:.3g}" for a, b in stretches[:_TOLD]]
    more = f" and {len(stretches) - _TOLD} more stretches" if len(stretches) > _TOLD else ""
    return f"epochs {', '.join(texts)}{more}" if stretches else ""


_TOLD = 4
"""Stretches that are told one by one."""
