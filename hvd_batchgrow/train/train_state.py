"""The state of a run, which updates change and checkpoints hold."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

import torch

from hvd_batchgrow.comm.broadcast_object import broadcast_object
from hvd_batchgrow.comm.ranks import Ranks
from hvd_batchgrow.optim.build import set_betas
from hvd_batchgrow.train.checkpoints.best import improved
from hvd_batchgrow.train.checkpoints.checkpoint import Checkpoint
from hvd_batchgrow.train.checkpoints.compatibility import average_notes
from hvd_batchgrow.train.events import Evaluation
from hvd_batchgrow.train.growth_controller import GrowthController
from hvd_batchgrow.train.parts import TrainingParts
from hvd_batchgrow.train.update.engine import UpdateResult
from hvd_batchgrow.train.update.weight_average import WeightAverage

_SAVED_RESULTS = ("samples", "loss", "metrics", "updates", "dataset", "average_loss", "average_metrics")
"""What a checkpoint keeps of the last evaluation."""


@dataclass(frozen=True)
class ReplayTally:
    """The passed checks of `checks.replay_every` since the start of the run."""

    passed: int = 0
    seconds: float = 0.0
    """Their duration on rank 0."""
    samples: int = 0
    """Sample counter before the update of the last one."""
    identical: int = 0
    """Number of them in which all results were bit-identical. In the others, rounding explains the differences."""

    def plus(self, seconds: float, samples: int, *, is_identical: bool) -> ReplayTally:
        """Return it with one more passed check."""
        return ReplayTally(self.passed + 1, self.seconds + seconds, samples, self.identical + is_identical)

    def describe(self, elapsed_s: float) -> str:
        """Return their number and their share of the run's time."""
        share = 100 * self.seconds / max(elapsed_s, 1e-9)
        return f"replay checks passed: {self.passed:,} ({self.identical:,} bit-identical), {share:.1f} % of the time"


class TrainState:
    """The sample counter and what follows it, in addition to the weights and the optimizer of the parts.

    Args:
        parts: its network, optimizer and loss scale belong to the state.
    """

    def __init__(self, parts: TrainingParts) -> None:
        self._parts, job = parts, parts.job
        self.samples = 0
        """The sample counter."""
        self.unfinished: int | None = None
        """`Checkpoint.unfinished`."""
        self.num_skipped = 0
        """Number of updates skipped because they were not finite."""
        self.replays = ReplayTally()
        self.evaluation: Evaluation | None = None
        """The last one, unless the weights have changed since at the same sample counter."""
        self.best: dict[str, Any] = {}
        """`Checkpoint.best`."""
        self.average = WeightAverage(parts.model, job.update.ema_samples) if job.update.ema_samples else None
        self.growth = GrowthController(job, len(parts.source.train), parts.model, self.average)
        self._elapsed_before_s = 0.0
        self._begin = time.perf_counter()

    @property
    def epoch(self) -> float:
        """The sample counter in epochs."""
        return self.samples / len(self._parts.source.train)

    @property
    def elapsed_s(self) -> float:
        """Wall time of the run so far, over all attempts."""
        return self._elapsed_before_s + time.perf_counter() - self._begin

    def begin(self, checkpoint: Checkpoint | None, ranks: Ranks) -> list[str]:
        """Load a checkpoint, which all ranks have; without one, start from rank 0's weights. All ranks call it.

        Return notes for the user.
        """
        notes: list[str] = []
        if checkpoint is not None:
            self.load(checkpoint)
            notes += average_notes(checkpoint, self._parts.model) if self.average else []
        elif ranks.size > 1:
            self._parts.model.load_state_dict(
                broadcast_object(ranks, self._parts.model.state_dict(), "initial weights")
            )
        self._begin = time.perf_counter()
        return notes

    def add(self, result: UpdateResult, global_batch: int) -> None:
        """Count an update that has been done."""
        if self.average and not result.skipped:
            self.average.update(global_batch)
        self.growth.add(result, global_batch)
        self.num_skipped += result.skipped
        self.samples += global_batch

    def forget_evaluation(self) -> None:
        """Forget an evaluation at this sample counter: the weights or their statistics have changed since."""
        if self.evaluation and self.evaluation.samples == self.samples:
            self.evaluation = None

    def keep_best(self, evaluation: Evaluation, ranks: Ranks) -> bool:
        """Record an evaluation of the validation set if it is the best so far, and return whether it is.

        All ranks call it together; rank 0's result counts.
        """
        if (metric := self._parts.job.checkpoint.keep_best) is None:
            return False
        direction = {"loss": "down", **self._parts.task.metrics}[metric.removeprefix("val/")]
        best = broadcast_object(ranks, improved(self.best, metric, direction, evaluation), "best evaluation")
        self.best = best or self.best
        return best is not None

    def load(self, checkpoint: Checkpoint) -> None:
        """Continue from a checkpoint."""
        engine, last = self._parts.engine, checkpoint.evaluation
        self._parts.model.load_state_dict(checkpoint.model)
        keeps_beta2 = self._parts.job.schedule.rule in {"adam", "adam_linear"}
        _load_optimizer(self._parts.optimizer, checkpoint.optimizer, keeps_beta2=keeps_beta2)
        self.samples, self.num_skipped = checkpoint.samples, checkpoint.num_skipped
        self.unfinished, self.replays = checkpoint.unfinished, ReplayTally(**checkpoint.replays)
        if self.average:
            self.average.load_state_dict(checkpoint.average)
        engine.load_state_dict(vars(checkpoint))
        if last and last["samples"] == self.samples:
            self.evaluation = Evaluation(epoch=self.epoch, **last)
        if checkpoint.best.get("metric") == self._parts.job.checkpoint.keep_best:
            self.best = dict(checkpoint.best)
        self.growth.load(checkpoint.growth)
        self._elapsed_before_s, self._begin = checkpoint.elapsed_s, time.perf_counter()

    def capture(self) -> Checkpoint:
        """Return the state as a checkpoint, whose tensors change with the next update."""
        last, engine = self.evaluation, self._parts.engine.state_dict()
        return Checkpoint(
            samples=self.samples,
            deciding=self._parts.job.deciding(len(self._parts.source.train)),
            model=self._parts.model.state_dict(),
            optimizer=self._parts.optimizer.state_dict(),
            elapsed_s=self.elapsed_s,
            evaluation={key: getattr(last, key) for key in _SAVED_RESULTS} if last else {},
            average=self.average.state_dict() if self.average else {},
            loss_scale=engine["loss_scale"] or {},
            num_skipped=self.num_skipped,
            growth=self.growth.state(),
            best=self.best,
            gradient_magnitudes=engine["gradient_magnitudes"],
            replays=asdict(self.replays) if self.replays.passed else {},
            unfinished=self.unfinished,
        )


def _load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any], *, keeps_beta2: bool) -> None:
    """Load an optimizer's state, but keep the job's settings, such as weight decay: a fork may change them.

    What the schedule sets is state. It is set again before the next update, and if the momentum differs from the next
    phase's, the buffers may be rescaled.

    Args:
        optimizer: of the job.
        state: of the checkpoint.
        keeps_beta2: whether the schedule sets Adam's β₂.
    """
    scheduled = {"params", "lr", "momentum"}
    settings = [{k: v for k, v in group.items() if k not in scheduled} for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        if betas := own.pop("betas", None):
            set_betas(optimizer, group, group["betas"][0], None if keeps_beta2 else betas[1])
        group.update(own)
