"""The compiled schedule: learning rate, momentum and batch as pure functions of samples seen."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from hvd_batchgrow.schedule.rounding import samples_at
from hvd_batchgrow.schedule.stages import Stage


@dataclass(frozen=True, kw_only=True)
class Phase(Stage):
    """Consecutive updates of a stage. It begins at the first update that reaches the stage's epoch."""

    start_samples: int
    num_updates: int

    @property
    def end_samples(self) -> int:
        """Sample counter after the phase's last update."""
        return self.start_samples + self.num_updates * self.global_batch


@dataclass(frozen=True)
class Warmup:
    """Linear warm-up of the learning rate, from `start_lr` to the schedule's at a progress of `end_samples`.

    If it crosses a phase boundary, it continues at the same fraction of the new phase's learning rate. So the warm-up
    lowers the noise scale by the same factor whether the phase grew the batch or decayed the learning rate.

    Progress is the number of samples seen, except with AdaScale, which scales it (Johnson et al. 2020, alg. 1: lr(t)
    is evaluated at the scale-invariant iteration).
    """

    end_samples: int = 0
    start_lr: float = 0.0
    first_lr: float = 1.0
    """Learning rate of the first phase."""

    def lr_at(self, progress: float, lr: float) -> float:
        """Return the learning rate of the update that starts at a progress, in samples; the batch has no influence."""
        if progress >= self.end_samples:
            return lr
        start_lr = self.start_lr * (lr / self.first_lr)
        return start_lr + (lr - start_lr) * progress / self.end_samples


@dataclass(frozen=True)
class Schedule:
    """Consecutive phases without gaps, the first from sample 0."""

    phases: tuple[Phase, ...]
    warmup: Warmup = Warmup()

    @property
    def num_updates(self) -> int:
        """Updates of the whole run."""
        return sum(phase.num_updates for phase in self.phases)

    @property
    def end_samples(self) -> int:
        """Sample counter at which the run ends."""
        return self.phases[-1].end_samples

    @property
    def milestones(self) -> set[int]:
        """Sample counters of the phase boundaries whose checkpoints are kept, with the end of the run.

        Where a phase only continues the one before with another learning rate, the checkpoint is one of many.
        """
        return {phase.start_samples for phase in self.phases[1:] if not phase.continues_phase} | {self.end_samples}

    def index_at(self, samples: int) -> int:
        """Return the index of the phase of the update that starts at this sample counter.

        Raises:
            ValueError: the counter is negative, or at or after the end of the run.
        """
        if not 0 <= samples < self.end_samples:
            raise ValueError(f"sample counter {samples} is outside the run: 0 … {self.end_samples - 1}")
        # An update may jump over a whole phase, which is then empty and starts where the next phase does. The last of
        # equal starts is the phase with the update.
        return bisect_right([phase.start_samples for phase in self.phases], samples) - 1

    def at(self, samples: int) -> Phase:
        """Return the phase of the update that starts at this sample counter, with the warm-up's learning rate.

        Raises as `index_at`.
        """
        phase = self.phases[self.index_at(samples)]
        return replace(phase, lr=self.warmup.lr_at(self.progress_at(samples), phase.lr))

    def progress_at(self, samples: int) -> float:
        """Return the progress of the schedule, in samples, at a sample counter."""
        return sum(
            phase.progress_rate * max(0, min(samples, phase.end_samples) - phase.start_samples) for phase in self.phases
        )

    def updates_at(self, samples: int) -> int:
        """Return the number of updates done at a sample counter that is an update boundary."""
        done = 0
        for phase in self.phases:
            inside = min(samples, phase.end_samples) - phase.start_samples
            done += max(0, inside) // phase.global_batch
        return done


def compile_schedule(
    stages: Sequence[Stage], epochs: float, num_samples: int, warmup: Warmup | None = None
) -> Schedule:
    """Cut stages into whole updates.

    Every update uses exactly B samples. A phase ends at the first update that reaches the next boundary (epochs × N,
    rounded to the nearest sample, ties up). A batch may therefore straddle a boundary, and the last one the end.

    Args:
        stages: in order of their epochs, the first at 0.
        epochs: length of the run.
        num_samples: N.
        warmup: None for no warm-up.
    """
    phases = []
    samples = 0
    ends = [stage.start_epoch for stage in stages[1:]] + [epochs]
    for stage, end_epoch in zip(stages, ends, strict=True):
        remaining = samples_at(end_epoch, num_samples) - samples
        num_updates = max(0, -(-remaining // stage.global_batch))
        phase = Phase(**asdict(stage), start_samples=samples, num_updates=num_updates)
        phases.append(phase)
        samples = phase.end_samples
    return Schedule(tuple(phases), warmup or Warmup())
