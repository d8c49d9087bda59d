"""Averages over the updates between two records."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from hvd_batchgrow.schedule.phases import Phase
from hvd_batchgrow.schedule.plan import Plan
from hvd_batchgrow.train.events import TrainRecord
from hvd_batchgrow.train.train_state import TrainState
from hvd_batchgrow.train.update.engine import UpdateResult
from hvd_batchgrow.train.update.stopwatch import Stage


@dataclass
class MetricWindow:
    """Sums over the updates since the last record, all of one phase."""

    updates: int = 0
    samples: int = 0
    weight: float = 0.0
    loss: float = 0.0
    metrics: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Sum and count of each metric."""

    def add(self, result: UpdateResult, samples: int) -> None:
        """Add an update of `samples` samples; if its loss is not finite, only its samples and its time count."""
        self.updates += 1
        self.samples += samples
        self.metrics = self.metrics or dict.fromkeys(result.metrics, (0.0, 0.0))
        # If only the gradient of a skipped update was not finite, as with too large a loss scale, its loss counts.
        if math.isfinite(result.loss_sum) and math.isfinite(result.weight):
            self.weight += result.weight
            self.loss += result.loss_sum
            for name, parts in result.metrics.items():
                before = self.metrics[name]
                self.metrics[name] = (before[0] + parts[0], before[1] + parts[1])

    def record(
        self,
        plan: Plan,
        index: int,
        phase: Phase,
        state: TrainState,
        trust_ratio: float | None,
        seconds: Mapping[Stage, float],
    ) -> TrainRecord:
        """Return the record of this window. If no update has a finite loss, loss and metrics are NaN.

        Args:
            plan: of the run.
            index: of the phase.
            phase: as of the last update.
            state: after the last update.
            trust_ratio: median of LARS's trust ratios.
            seconds: time of each stage of the updates, from `Stopwatch.read`.
        """
        total = math.fsum(seconds.values())
        samples = state.samples
        layout = plan.layouts[index]
        return TrainRecord(
            samples=samples,
            epoch=samples / plan.num_samples,
            progress_epochs=plan.schedule.progress_at(samples) / plan.num_samples,
            updates=plan.schedule.updates_at(samples),
            phase=index,
            lr=phase.lr,
            momentum=phase.momentum,
            global_batch=phase.global_batch,
            accumulation=layout.accumulation,
            ranks=layout.ranks,
            noise_scale=plan.noise_scale(phase),
            loss=mean(self.loss, self.weight),
            loss_weight=self.weight,
            metrics={name: mean(*parts) for name, parts in self.metrics.items()},
            samples_per_s=self.samples / total,
            data_wait_pct=100 * seconds["data"] / total,
            backward_pct=100 * seconds["backward"] / total,
            allreduce_pct=100 * seconds["all-reduce"] / total,
            optimizer_pct=100 * seconds["optimizer"] / total,
            trust_ratio=trust_ratio,
            skipped=state.num_skipped,
            gradient_noise=state.growth.noise,
            norm_layers=state.growth.norm_layers,
            elapsed_s=state.elapsed_s,
            replay_checks=state.replays.passed,
        )


def mean(total: float, count: float) -> float:
    """Return a mean; NaN of nothing."""
    return total / count if count else math.nan
