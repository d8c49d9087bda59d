"""The events of a run, and the observers that receive them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hvd_batchgrow.config import Job
from hvd_batchgrow.messages.errors import unwritable
from hvd_batchgrow.results.outcomes import Outcomes
from hvd_batchgrow.schedule.adaptive.decisions import Decision
from hvd_batchgrow.schedule.plan import Plan
from hvd_batchgrow.train.update.gradient_noise import GradientNoiseScale, NormLayers

if TYPE_CHECKING:  # it imports torch, which `plan` does without
    from hvd_batchgrow.comm.hardware import Hardware

EvaluatedSet = Literal["validation", "test"]
Results = tuple[float, dict[str, float]]
"""The mean loss of a set, and its metrics."""


@dataclass(frozen=True)
class RunStarted:
    """Sent before the first update."""

    job: Job
    plan: Plan
    folder: Path
    samples: int
    """Sample counter at the start; above 0 on a resume."""
    hardware: Hardware
    backend: str
    ranks: int
    threads_per_rank: int
    pipeline: str
    num_parameters: int
    notes: tuple[str, ...]
    """Notices for the user, such as a damaged checkpoint that was skipped."""
    num_frozen: int = 0
    """Number of parameters that are not trained, included in `num_parameters`."""
    groups: tuple[str, ...] = ()
    """Parameter groups of the optimizer, if the job divides the parameters."""
    last_update: UpdateDone | None = None
    """The update that ended at `samples`, if the attempt that did it may have died before recording it."""
    repeats_evaluation: bool = False
    """Whether an evaluation at `samples`, if one is due, is done again: an elastic run has lost ranks during it."""


@dataclass(frozen=True)
class TrainRecord:
    """Averages over the updates of a window, all of one phase."""

    samples: int
    """Sample counter at the end of the window."""
    epoch: float
    progress_epochs: float
    """Progress through the schedule: equals `epoch`, except under AdaScale, which counts updates of the base batch."""
    updates: int
    """Updates done since the start of the run."""
    phase: int
    """Index of the phase, from 0."""
    lr: float
    momentum: float
    global_batch: int
    accumulation: int
    ranks: int
    """Ranks that this phase uses."""
    noise_scale: float
    loss: float
    """Mean over all samples of the window, on all ranks; without updates whose loss is not finite."""
    metrics: dict[str, float]
    """Those of the task, over all samples of the window, on all ranks."""
    samples_per_s: float
    data_wait_pct: float
    """Percentage of the updates' time, on the device of rank 0; so are the next three. The forward passes are the rest.
    While the host waits for samples, the device may still work: only the time in which it does not counts."""
    backward_pct: float
    allreduce_pct: float
    """From the end of the backward to the end of the all-reduces, which it did not hide."""
    optimizer_pct: float
    """From there to the end of the optimizer step."""
    trust_ratio: float | None
    """Median over the tensors of LARS's last update; None for other optimizers."""
    skipped: int
    """Updates skipped since the start of the run because they were not finite."""
    gradient_noise: dict[str, GradientNoiseScale] = field(default_factory=dict)
    """Noise scale of the whole gradient ("all") and, if requested, of each layer group; empty: not measured."""
    norm_layers: NormLayers | None = None
    """With the estimator "norm_layers": what it was computed from; None: not measured."""
    elapsed_s: float | None = None
    """Wall time of the run up to here, over all attempts, with evaluations and checkpoints; None outside of a run."""
    loss_weight: float | None = None
    """Sum of the weights of the samples in `loss`, their number if they have no weights; None: not recorded."""
    replay_checks: int = 0
    """Checks of `checks.replay_every` that have passed since the start of the run."""


@dataclass(frozen=True)
class UpdateDone:
    """One update, and the samples that it consumed."""

    samples: int
    """Sample counter before the update."""
    global_batch: int
    digest: int
    """`order_digest.digest` of its samples, over all ranks."""
    replaced: tuple[tuple[int, int], ...]
    """(stream index, sample id) of each sample that replaced a bad one."""


@dataclass(frozen=True)
class Evaluation:
    """Loss and metrics over the whole validation or test set, with the weights after `samples`."""

    samples: int
    epoch: float
    loss: float
    metrics: dict[str, float]
    """Those of the task; the first one is the main result."""
    average_loss: float | None = None
    """Loss of the averaged weights, if the job keeps an average."""
    average_metrics: dict[str, float] = field(default_factory=dict)
    """Metrics of the averaged weights; empty without an average."""
    outcomes: Outcomes | None = field(default=None, repr=False, compare=False)
    """The outcome of each sample; only of the test at the end of a run, and not with averaged weights."""
    updates: int | None = None
    """Updates done since the start of the run; None outside of a run."""
    dataset: EvaluatedSet = "test"
    """Which set these are the results of. A run with a validation set evaluates the test set at its end only."""
    seconds: float = field(default=0.0, compare=False)
    """Duration of the evaluation on rank 0."""

    @property
    def is_finite(self) -> bool:
        """Whether each loss is a finite number; if not, the metrics are meaningless too."""
        return all(math.isfinite(loss) for loss in (self.loss, self.average_loss) if loss is not None)

    def named(self) -> dict[str, float]:
        """Return the loss and the metrics by name, with those of the averaged weights as `average_NAME`."""
        found = {"loss": self.loss, **self.metrics}
        if self.average_loss is not None:
            averages = {"loss": self.average_loss, **self.average_metrics}
            found |= {f"average_{name}": value for name, value in averages.items()}
        return found


@dataclass(frozen=True)
class Decided:
    """A trigger changed the batch or the learning rate, now or in the record that the run replays."""

    decision: Decision
    plan: Plan
    """The plan that includes this decision."""


@dataclass(frozen=True)
class BranchStarted:
    """The run pauses at an update boundary, and its ranks begin or resume a branch from there."""

    samples: int
    """Sample counter of the run."""
    factor: int
    """k: the branch trains with k times the batch of the run."""
    global_batch: int
    """Batch of the branch."""
    end_samples: int
    """Sample counter at which the branch ends."""

    def describe(self) -> str:
        """Return it in words."""
        what = f"training branch k = {self.factor} (batch {self.global_batch:,}) up to sample {self.end_samples:,}"
        return f"sample {self.samples:,}: {what}"


@dataclass(frozen=True)
class BranchesCompared:
    """What the branches from a sample counter have shown, or why none were trained."""

    samples: int
    global_batch: int
    """Batch of the run there."""
    branch_samples: int
    """Samples of each branch; 0: none were trained."""
    seconds: float
    """Duration of the pause; of a resumed pause, the part in this attempt."""
    text: str
    """The result in words."""
    table: dict[str, Any] = field(default_factory=dict)
    """`Branching.to_dict`; empty if the branches could not be compared."""

    def describe(self) -> str:
        """Return it in words."""
        return f"sample {self.samples:,}: {self.text}"


@dataclass(frozen=True)
class RunEnded:
    """Sent after the last update, or after a stop."""

    job_name: str
    folder: Path
    done: bool
    """True: all requested phases are trained. False: the run stopped on request, and its checkpoint can be resumed."""
    samples: int
    updates: int
    num_updates: int
    """Number of updates in the plan."""
    elapsed_s: float
    """Sum over all attempts of the run."""
    evaluation: Evaluation | None
    """The last one: of the test set if the run has reached the end of its plan."""
    best: str | None = None
    """Result and checkpoint of the best evaluation, if the job keeps one."""
    lost_ranks: bool = False
    """Whether an elastic run has lost ranks: the others continue from their state in memory, without a checkpoint."""
    replay_checks: str | None = None
    """Number and duration of the passed checks, if the job makes them."""


class Observer:
    """Ignores every event; subclasses override the methods for the events they need."""

    def on_start(self, event: RunStarted) -> None:
        """Handle the start of the run."""

    def on_update(self, event: UpdateDone) -> None:
        """Handle an update; called before a checkpoint of it can be written."""

    def on_record(self, event: TrainRecord) -> None:
        """Handle the record of a window of updates."""

    def on_evaluation(self, event: Evaluation) -> None:
        """Handle an evaluation of the validation or test set."""

    def on_decision(self, event: Decided) -> None:
        """Handle a change of batch or learning rate that takes effect with the next update."""

    def on_branch(self, event: BranchStarted) -> None:
        """Handle a pause of the run in which a branch is trained."""

    def on_branches(self, event: BranchesCompared) -> None:
        """Handle the result of the branches of a pause."""

    def on_end(self, event: RunEnded) -> None:
        """Handle the end of the run, or its stop."""

    def for_branch(self) -> Observer | None:
        """Return what observes a branch that the run trains in a pause; None: nothing does."""
        return None


class ObserverList:
    """The observers of a run.

    Args:
        observers: notified in this order; empty on all ranks but rank 0.
        folder: the run folder, into which they write.
    """

    def __init__(self, observers: Sequence[Observer], folder: Path) -> None:
        self._observers, self._folder = observers, folder

    def for_branch(self) -> list[Observer]:
        """Return the observers of a branch."""
        found = (observer.for_branch() for observer in self._observers)
        return [observer for observer in found if observer is not None]

    def notify(self, method: str, event: object) -> None:
        """Call a method of `Observer` on each observer.

        Raises:
            RunError: an observer cannot write.
        """
        for observer in self._observers:
            try:
                getattr(observer, method)(event)
            except OSError as error:
                raise unwritable(error.filename or self._folder, error) from error
