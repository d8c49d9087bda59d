"""Decisions: when a trigger changed the batch or the learning rate, and to what; and the file that stores them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from hvd_batchgrow.config import Job
from hvd_batchgrow.messages.errors import Fault, JobError, reason_of
from hvd_batchgrow.storage.regular_files import read_regular
from hvd_batchgrow.storage.strict_json import dump_json

_REPLAYED = "replayed_from"
"""Key of a first line that marks a replay: the run makes no decisions after those in the file."""


@dataclass(frozen=True)
class Decision:
    """Batch and learning rate from a sample counter on, and the reason."""

    samples: int
    """Sample counter of an update boundary."""
    trigger: str
    why: str
    old_batch: int
    new_batch: int
    wanted_batch: float
    """The requested batch, before rounding and limit."""
    old_lr: float
    """Learning rate before `lr_rule` and `lr_boundaries_epochs`; `new_lr` likewise."""
    new_lr: float
    measured: dict[str, Any] = field(default_factory=dict)
    """The measurements that led to the decision."""
    restore_samples: int | None = None
    """Restore the weights of the evaluation at this sample counter; None: keep the current weights."""

    def to_dict(self) -> dict[str, Any]:
        """Return the values of a line of `decisions.jsonl`."""
        return asdict(self)

    def describe(self) -> str:
        """Return the decision in words."""
        rounded = f" ({self.wanted_batch:,.0f} requested)" if abs(self.wanted_batch - self.new_batch) > 0.5 else ""
        lr = "" if self.new_lr == self.old_lr else f", lr {self.old_lr:.4g} → {self.new_lr:.4g}"
        back = "" if self.restore_samples is None else f", weights as at sample {self.restore_samples:,}"
        held = self.new_batch == self.old_batch
        batch = f"batch {self.old_batch:,}" if held else f"batch {self.old_batch:,} → {self.new_batch:,}"
        return f"{batch}{rounded}{lr}{back}: {self.why}"

    @classmethod
    def from_dict(cls, line: Mapping[str, Any]) -> Decision:
        """Return the decision of a line of `decisions.jsonl`. Raises ValueError if the line is not a decision."""
        names = {f.name for f in fields(cls)}
        if unknown := sorted(set(line) - names):
            raise ValueError(f"unknown: {', '.join(unknown)}")
        try:
            decision = cls(**line)
        except TypeError as error:
            raise ValueError(str(error).partition(") ")[2] or str(error)) from None
        whole = (decision.samples, decision.old_batch, decision.new_batch)
        numbers = (*whole, decision.wanted_batch, decision.old_lr, decision.new_lr)
        if not all(_is_whole(n) for n in whole) or not all(_is_above_0(n) for n in numbers):
            raise ValueError("samples and batch must be whole numbers above 0, the learning rate above 0")
        if not isinstance(decision.trigger, str) or not isinstance(decision.why, str):
            raise ValueError("trigger and why must be text")
        if not isinstance(decision.measured, dict):
            raise ValueError(f"measured must be an object, got {decision.measured!r}")
        if decision.restore_samples is not None and not _is_whole(decision.restore_samples):
            raise ValueError(f"restore_samples must be a whole number or null, got {decision.restore_samples!r}")
        return decision


def _is_whole(number: Any) -> bool:
    return isinstance(number, int) and not isinstance(number, bool)


def _is_above_0(number: Any) -> bool:
    return isinstance(number, (int, float)) and math.isfinite(number) and number > 0


def read_decisions(path: Path) -> tuple[str | None, tuple[Decision, ...]]:
    """Return the content of a `decisions.jsonl`: the replayed file, if the run replays one, and the decisions.

    The path may be that of the run's folder.

    A last line that a kill cut short is skipped: the run had not acted on it yet.

    Raises:
        JobError: the file is missing or invalid.
    """
    if path.is_dir():
        path /= "decisions.jsonl"
    try:
        return parse_decisions(read_regular(path).decode(), path)
    except (OSError, UnicodeDecodeError) as error:
        raise JobError([Fault("", f"cannot be read: {reason_of(error)}")], str(path)) from None


def check_replay(job: Job, where: str) -> None:
    """Raise JobError if a job's schedule is fixed and so has nothing to replay."""
    if not job.is_adaptive:
        fault = f"schedule.policy = {job.schedule.policy!r} is fixed: there is nothing to replay"
        raise JobError([Fault("--replay", fault)], where)


def decisions_text(source: str | None, decisions: Iterable[Decision]) -> bytes:
    """Return the content of a `decisions.jsonl`; see `parse_decisions`."""
    lines = [*([{_REPLAYED: source, "samples": 0}] if source else []), *(decision.to_dict() for decision in decisions)]
    return "".join(dump_json(line) + "\n" for line in lines).encode()


def parse_decisions(text: str, path: Path) -> tuple[str | None, tuple[Decision, ...]]:
    """Like `read_decisions`, for the content of the file at `path`."""
    source: str | None = None
    decisions: list[Decision] = []
    lines = text.splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        try:
            values = json.loads(line)
            if not isinstance(values, dict):
                raise ValueError("not an object")
            if number == 1 and _REPLAYED in values:
                source = str(values[_REPLAYED])
            else:
                decisions.append(Decision.from_dict(values))
        except (ValueError, RecursionError) as error:
            if number == len(lines) and not line.endswith("\n"):
                break
            raise JobError([Fault(f"line {number}", f"is not a decision: {error}")], str(path)) from None
    return source, tuple(decisions)
