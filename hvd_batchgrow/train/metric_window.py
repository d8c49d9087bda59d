"""Averages over the updates between two records."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hvd_batchgrow.schedule.phases import Phase
from hvd_batchgrow.schedule.plan import Plan
from hvd_batchgrow.train.events import TrainRecord
from hvd_batchgrow.train.train_state import TrainState
from hvd_batchgrow.train.update.engine import UpdateResult


@dataclass
class MetricWindow:
    """Sums over the updates since the last record, all of one phase."""

    samples: int = 0
    loss: float = 0.0
    correct: int = 0
    seconds: float = 0.0
    data_wait_s: float = 0.0
    reduce_wait_s: float = 0.0

    def add(self, result: UpdateResult, samples: int) -> None:
        """Add an update of `samples` samples; if it was skipped, only its time counts."""
        if not result.skipped:  # the loss of a skipped update may be NaN
            self.samples += samples
            self.loss += result.loss_sum
            self.correct += result.num_correct
        self.seconds += result.seconds
        self.data_wait_s += result.data_wait_s
        self.reduce_wait_s += result.reduce_wait_s

    def record(self, plan: Plan, index: int, phase: Phase, state: TrainState, trust_ratio: float | None) -> TrainRecord:
        """Return the record of this window. If all its updates were skipped, loss and top1 are NaN.

        Args:
            plan: of the run.
            index: of the phase.
            phase: as of the last update.
            state: after the last update.
            trust_ratio: median of LARS's trust ratios.
        """
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
            loss=self.loss / self.samples if self.samples else math.nan,
            top1=self.correct / self.samples if self.samples else math.nan,
            samples_per_s=self.samples / self.seconds,
            data_wait_pct=100 * self.data_wait_s / self.seconds,
            allreduce_pct=100 * self.reduce_wait_s / self.seconds,
            trust_ratio=trust_ratio,
            skipped=state.num_skipped,
            gradient_noise=state.growth.noise,
        )
