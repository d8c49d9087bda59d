"""What a run tells those who watch it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hvd_batchgrow.config import Job
from hvd_batchgrow.messages.errors import unwritable
from hvd_batchgrow.schedule.adaptive.decisions import Decision
from hvd_batchgrow.schedule.plan import Plan
from hvd_batchgrow.train.update.gradient_noise import GradientNoiseScale


@dataclass(frozen=True)
class RunStarted:
    """Before the first update."""

    job: Job
    plan: Plan
    folder: Path
    samples: int
    """Sample counter to start from; above 0 on a resume."""
    backend: str
    ranks: int
    threads_per_rank: int
    pipeline: str
    device: str
    num_parameters: int
    notes: tuple[str, ...]
    """What the user should know, such as a damaged checkpoint that was skipped."""
    last_update: UpdateDone | None = None
    """The update that has led to `samples`, where the life that did it may not have recorded it."""


@dataclass(frozen=True)
class TrainRecord:
    """Averages over the updates of a stretch, which lies inside one phase."""

    samples: int
    """Sample counter at the stretch's end."""
    epoch: float
    progress_epochs: float
    """Of the schedule: `epoch`, but under AdaScale, which counts updates of the base batch."""
    updates: int
    """Updates done since the start of the run."""
    phase: int
    """Index of the phase, from 0."""
    lr: float
    momentum: float
    global_batch: int
    accumulation: int
    ranks: int
    """Those that this phase uses."""
    noise_scale: float
    loss: float
    """Mean over every sample of the stretch, on all ranks."""
    top1: float
    """Share of samples answered right, in [0, 1]."""
    samples_per_s: float
    data_wait_pct: float
    allreduce_pct: float
    trust_ratio: float | None
    """Median over the tensors of LARS's last update; None: another optimiser."""
    skipped: int
    """Updates left out since the start of the run, because they were not finite."""
    gradient_noise: dict[str, GradientNoiseScale] = field(default_factory=dict)
    """Of the whole gradient ("all"), and of each layer group where that is asked for; empty: not measured."""


@dataclass(frozen=True)
class UpdateDone:
    """One update: what it consumed."""

    samples: int
    """Sample counter before it."""
    global_batch: int
    digest: int
    """`consumed.digest` of its samples, over all ranks."""
    replaced: tuple[tuple[int, int], ...]
    """(place in the stream, sample id) of each that stood in for a bad one."""


@dataclass(frozen=True)
class Evaluation:
    """The whole test set under the weights of a moment."""

    samples: int
    epoch: float
    loss: float
    top1: float
    average_loss: float | None = None
    """Of the averaged weights, where the job keeps an average; likewise below."""
    average_top1: float | None = None

    @property
    def is_finite(self) -> bool:
        """Whether each loss is a finite number; otherwise the accuracy means nothing either."""
        return all(math.isfinite(loss) for loss in (self.loss, self.average_loss) if loss is not None)


@dataclass(frozen=True)
class Decided:
    """A trigger has changed batch or learning rate, now or in the record that is followed."""

    decision: Decision
    plan: Plan
    """As it is from here on."""


@dataclass(frozen=True)
class RunEnded:
    """After the last update, or at a stop."""

    job_name: str
    folder: Path
    done: bool
    """It did all that it was started for, whether the run or some phases of it; False: stopped on request, with a
    checkpoint to go on from."""
    samples: int
    updates: int
    num_updates: int
    """What the plan asked for."""
    elapsed_s: float
    """Over all lives of the run."""
    evaluation: Evaluation | None


class Observer:
    """Does nothing on any event; watchers override what they care for."""

    def on_start(self, event: RunStarted) -> None:
        """The run begins."""

    def on_update(self, event: UpdateDone) -> None:
        """An update is done; called before a checkpoint of it can be written."""

    def on_record(self, event: TrainRecord) -> None:
        """A stretch of updates is done."""

    def on_evaluation(self, event: Evaluation) -> None:
        """The test set was evaluated."""

    def on_decision(self, event: Decided) -> None:
        """Batch or learning rate change with the next update."""

    def on_end(self, event: RunEnded) -> None:
        """The run is over, or stopped."""


class ObserverList:
    """The observers of a run.

    Args:
        observers: told in this order; none but on rank 0.
        folder: of the run, which they write into.
    """

    def __init__(self, observers: Sequence[Observer], folder: Path) -> None:
        self._observers, self._folder = observers, folder

    def notify(self, method: str, event: object) -> None:
        """Call a method of `Observer` on each. Raises RunError where one cannot write."""
        for observer in self._observers:
            try:
                getattr(observer, method)(event)
            except OSError as error:
                raise unwritable(error.filename or self._folder, error) from error
