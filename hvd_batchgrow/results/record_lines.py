"""The lines of metrics.jsonl as typed records. Their values may be missing, damaged or hostile: no type is trusted."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hvd_batchgrow.results.records import NOT_METRICS, is_usable, number, printable, whole

_AVERAGE = "average_"


@dataclass(frozen=True)
class NoiseBand:
    """A measured gradient noise scale."""

    b_simple: float | None
    """Samples; None: unresolved."""
    low: float | None
    """Ends of the 95 % confidence interval; None: unbounded or not known yet."""
    high: float | None
    factor: float | None = None
    """The factor from B_simple of the norm layers; None: it comes from micro-batches."""


@dataclass(frozen=True)
class TrainLine:
    """A training record; numbers that are missing are NaN or 0."""

    samples: int
    epoch: float
    progress_epochs: float
    updates: int
    phase: int
    lr: float
    global_batch: int
    accumulation: int
    ranks: int
    loss: float
    metric: float | None
    """The main metric over the samples of the record."""
    samples_per_s: float
    data_wait_pct: float
    allreduce_pct: float
    skipped: int
    noise: NoiseBand | None
    """None: not measured."""

    @classmethod
    def of(cls, line: Mapping[str, Any], metric: str) -> TrainLine:
        """Return the record of a line."""
        epoch = _real(line.get("epoch"))
        progress = number(line.get("progress_epochs"))
        return cls(
            samples=_count(line.get("samples")),
            epoch=epoch,
            progress_epochs=epoch if progress is None else progress,
            updates=_count(line.get("updates")),
            phase=_count(line.get("phase")),
            lr=_real(line.get("lr")),
            global_batch=_count(line.get("global_batch")),
            accumulation=_count(line.get("accumulation")),
            ranks=_count(line.get("ranks")),
            loss=_real(line.get("loss")),
            metric=number(line.get(metric)),
            samples_per_s=_real(line.get("samples_per_s")),
            data_wait_pct=_real(line.get("data_wait_pct")),
            allreduce_pct=_real(line.get("allreduce_pct")),
            skipped=_count(line.get("skipped")),
            noise=_noise(line.get("gradient_noise"), line.get("norm_layers")),
        )


@dataclass(frozen=True)
class EvaluationLine:
    """An evaluation."""

    samples: int
    epoch: float
    loss: float
    metrics: Mapping[str, float]
    average_metrics: Mapping[str, float]
    """Of the averaged weights."""
    dataset: str
    is_usable: bool
    """Whether each loss is finite."""

    @classmethod
    def of(cls, line: Mapping[str, Any]) -> EvaluationLine:
        """Return the evaluation of a line."""
        found = {
            printable(name): value
            for name in line
            if name not in NOT_METRICS and (value := number(line[name])) is not None
        }
        averages = {name.removeprefix(_AVERAGE): value for name, value in found.items() if name.startswith(_AVERAGE)}
        averages.pop("loss", None)
        return cls(
            samples=_count(line.get("samples")),
            epoch=_real(line.get("epoch")),
            loss=_real(line.get("loss")),
            metrics={name: value for name, value in found.items() if not name.startswith(_AVERAGE)},
            average_metrics=averages,
            dataset=printable(str(line.get("dataset", "test"))),
            is_usable=is_usable(line),
        )

    def value(self, metric: str) -> float | None:
        """Return a metric or the loss; None: it is not a number, or a loss is not finite."""
        if not self.is_usable:
            return None
        return self.metrics.get(metric) if metric != "loss" else number(self.loss)


def _count(value: Any) -> int:
    return whole(value, 0, 0)


def _real(value: Any) -> float:
    found = number(value)
    return math.nan if found is None else found


def _noise(tree: Any, layers: Any) -> NoiseBand | None:
    scale = tree.get("all") if isinstance(tree, dict) else None
    if not isinstance(scale, dict):
        return None
    factor = number(layers.get("factor")) if isinstance(layers, dict) else None
    b_simple, low, high = (number(scale.get(key)) for key in ("b_simple", "low", "high"))
    return NoiseBand(b_simple, low, high, factor)
