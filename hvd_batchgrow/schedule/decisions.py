"""Decisions: when a trigger changed the batch, and to what. A schedule that is measured is compiled from them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from hvd_batchgrow.config import Job
from hvd_batchgrow.errors import Fault, JobError
from hvd_batchgrow.schedule.policies import Stage, make_start

_REPLAYED = "replayed_from"
"""A first line with this key: nothing is decided any more after the decisions that follow."""


@dataclass(frozen=True)
class Decision:
    """What holds from a sample counter on, and why."""

    samples: int
    """Sample counter, between two updates."""
    trigger: str
    why: str
    old_batch: int
    new_batch: int
    wanted_batch: float
    """What the trigger asked for, before rounding and limit."""
    old_lr: float
    """Before `lr_rule`; likewise the new one."""
    new_lr: float
    measured: dict[str, float] = field(default_factory=dict)
    """What it was decided by."""
    restore_samples: int | None = None
    """Go on from the weights that the run had at this evaluation; None: from those it has."""

    def to_dict(self) -> dict[str, Any]:
        """A line of `decisions.jsonl`."""
        return asdict(self)

    def told(self) -> str:
        """In words."""
        rounded = f" ({self.wanted_batch:,.0f} wanted)" if abs(self.wanted_batch - self.new_batch) > 0.5 else ""
        lr = "" if self.new_lr == self.old_lr else f", lr {self.old_lr:.4g} → {self.new_lr:.4g}"
        back = "" if self.restore_samples is None else f", weights as at sample {self.restore_samples:,}"
        return f"batch {self.old_batch:,} → {self.new_batch:,}{rounded}{lr}{back}: {self.why}"

    @classmethod
    def from_dict(cls, line: Mapping[str, Any]) -> Decision:
        """The inverse. Raises ValueError, if it is none."""
        names = {f.name for f in fields(cls)}
        if unknown := sorted(set(line) - names):
            raise ValueError(f"unknown: {', '.join(unknown)}")
        try:
            decision = cls(**line)
            numbers = (decision.samples, decision.new_batch, decision.new_lr, decision.wanted_batch)
            is_sound = all(isinstance(n, (int, float)) and math.isfinite(n) and n > 0 for n in numbers)
        except TypeError as error:
            raise ValueError(str(error).partition(") ")[2] or str(error)) from None
        if not is_sound or not all(isinstance(n, int) for n in (decision.samples, decision.new_batch)):
            raise ValueError("samples and batch must be whole numbers above 0, the learning rate above 0")
        return decision


@dataclass(frozen=True)
class Wish:
    """What a trigger asks for: a batch at the same learning rate, or a noise scale that falls."""

    why: str
    batch: float | None = None
    """B, samples."""
    noise_factor: float | None = None
    """By which g is to fall: by the batch as far as it goes, then by the learning rate."""


def form_decision(
    job: Job, num_samples: int, stages: Sequence[Stage], samples: int, wish: Wish, measured: Mapping[str, float]
) -> Decision | None:
    """Round a wish to what can be formed; None: to what there is.

    A batch is a whole number of `schedule.batch_multiple` and at most `schedule.max_batch`. As in
    every policy, the learning rate makes up for the rounding, so that the noise scale is the one
    that was asked for; and where a falling noise scale was, for the limit too.

    Args:
        job: of a measured schedule.
        num_samples: N.
        stages: of the decisions so far, the last one holds.
        samples: sample counter.
        wish: of the trigger.
        measured: what led to it.
    """
    start, last = make_start(job, num_samples), stages[-1]
    noise = start.noise
    if wish.noise_factor is not None:
        target = noise.of(last.lr, last.momentum, last.global_batch) / wish.noise_factor
        wanted = noise.batch_for(target, last.momentum, start.lr)
        formed = start.stage(samples / num_samples, target, last.momentum, wanted)
    else:
        assert wish.batch is not None
        most = start.max_batch or num_samples
        wanted = min(max(wish.batch, 1.0), most)
        formed = start.stage(samples / num_samples, noise.of(start.lr, last.momentum, wanted), last.momentum, wanted)
    if formed.global_batch == last.global_batch and math.isclose(formed.lr, last.lr, rel_tol=1e-3):
        return None
    if wish.batch is not None and formed.global_batch == last.global_batch:
        return None  # the learning rate alone would follow the noise of the measurement
    return Decision(
        samples=samples,
        trigger=job.trigger.name,
        why=wish.why,
        old_batch=last.global_batch,
        new_batch=formed.global_batch,
        wanted_batch=wish.batch if wish.batch is not None else wanted,
        old_lr=last.lr,
        new_lr=formed.lr,
        measured=dict(measured),
    )


def decided_stages(first: Stage, decisions: Sequence[Decision], job: Job, num_samples: int) -> list[Stage]:
    """The first stage, and one for each decision.

    Raises:
        JobError: the decisions do not belong to this job: they do not follow one another at whole updates.
    """
    stages, faults, at = [first], [], 0
    for k, decision in enumerate(decisions, start=1):
        key, batch = f"decision {k}", stages[-1].global_batch
        if decision.samples <= at or (decision.samples - at) % batch:
            updates = (decision.samples - at) / batch
            faults.append(
                Fault(
                    key,
                    f"at sample {decision.samples:,}, {updates:.2f} updates of {batch} after sample {at:,}: "
                    f"this job is never there between two updates",
                )
            )
        if decision.samples >= round(job.schedule.epochs * num_samples):
            faults.append(
                Fault(key, f"at sample {decision.samples:,}, beyond the run's {job.schedule.epochs * num_samples:,.0f}")
            )
        at = decision.samples
        stages.append(
            replace(
                first,
                start_epoch=decision.samples / num_samples,
                lr=decision.new_lr,
                global_batch=decision.new_batch,
                wanted_batch=decision.wanted_batch,
            )
        )
    if faults:
        raise JobError(faults, job.name)
    return stages


def read_decisions(path: Path) -> tuple[str | None, tuple[Decision, ...]]:
    """What `decisions.jsonl` holds: the file that the run replays, if it does, and the decisions.

    A last line that a kill cut short is left out: nobody has acted on it.

    Raises:
        JobError: it is missing, or holds something else.
    """
    try:
        return parse_decisions(path.read_text(encoding="utf-8"), path)
    except (OSError, UnicodeDecodeError) as error:
        raise JobError([Fault("", f"cannot be read: {getattr(error, 'strerror', None) or error}")], str(path)) from None


def decisions_text(source: str | None, decisions: Iterable[Decision]) -> bytes:
    """The content of a `decisions.jsonl`; see `parse_decisions`."""
    lines = [*([{_REPLAYED: source}] if source else []), *(decision.to_dict() for decision in decisions)]
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


def parse_decisions(text: str, path: Path) -> tuple[str | None, tuple[Decision, ...]]:
    """As `read_decisions`, of the content of a file at `path`."""
    source: str | None = None
    decisions: list[Decision] = []
    lines = text.splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        try:
            values = json.loads(line)
            if not isinstance(values, dict):
                raise ValueError("no object")
            if number == 1 and _REPLAYED in values:
                source = str(values[_REPLAYED])
            else:
                decisions.append(Decision.from_dict(values))
        except ValueError as error:
            if number == len(lines) and not line.endswith("\n"):
                break
            raise JobError([Fault(f"line {number}", f"is no decision: {error}")], str(path)) from None
    return source, tuple(decisions)
