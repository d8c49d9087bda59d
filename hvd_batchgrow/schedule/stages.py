"""Stages: the batch and learning rate that a policy requests from an epoch on, before they are cut into updates."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from hvd_batchgrow.config import Job
from hvd_batchgrow.schedule.noise import NoiseScale
from hvd_batchgrow.schedule.rounding import half_up, whole_multiples


@dataclass(frozen=True)
class Stage:
    """Learning rate, momentum and batch from an epoch on."""

    start_epoch: float
    lr: float
    momentum: float
    """m of SGD, β₁ of Adam."""
    global_batch: int
    wanted_batch: float
    """The requested batch, before rounding to whole ghost batches and the limit."""
    beta2: float | None = None
    eps: float | None = None
    weight_decay_factor: float | None = None
    """Factor of the weight decay of every parameter; None: `weight_decay_rule` does not change it."""
    progress_rate: float = 1.0
    """Progress of the schedule per sample; under AdaScale gain · B₀/B."""
    continues_phase: bool = False
    """Whether a policy cut it from the stage before, so that the learning rate follows a curve more finely."""


@dataclass(frozen=True)
class Start:
    """The start of a schedule."""

    lr: float
    momentum: float
    global_batch: int
    noise: NoiseScale
    """Form from which the policy calculates batches and learning rates, before `lr_rule`."""
    noise_after_rule: NoiseScale
    """Form of the phases' noise scale, which is that of normalized gradients if `has_normalized_gradients`."""
    batch_unit: int
    """Every batch is a whole multiple of this number of samples; see `ScheduleBase.batch_unit`."""
    max_batch: int | None
    wanted_batch: float | None = None
    """The requested first batch, if a key such as `lr_scale` enlarged it and it was rounded or cut."""

    def form(self, wanted: float) -> int:
        """Return the nearest batch that can be formed; the larger of two that are equally near."""
        if abs(wanted - self.global_batch) < 1e-6:
            return self.global_batch
        if not math.isfinite(wanted):  # infinity over infinity; the plan reports it as out of range
            raise ArithmeticError(f"a batch of {wanted}")
        batch = max(1, half_up(wanted / self.batch_unit)) * self.batch_unit
        return batch if self.max_batch is None else min(batch, self.max_batch)

    def is_cut(self, wanted: float) -> bool:
        """Return whether the nearest multiple of the unit to a requested batch is above the limit of the batch."""
        return self.max_batch is not None and wanted > self.max_batch + self.batch_unit / 2

    def whole(self, most: float) -> int:
        """Return the largest batch that can be formed and is not above `most`."""
        return whole_multiples(most / self.batch_unit) * self.batch_unit

    def stage(self, epoch: float, noise: float, momentum: float, wanted: float) -> Stage:
        """Return a stage of a noise scale: the nearest batch to `wanted`, and the learning rate that matches."""
        batch = self.form(wanted)
        exact = math.isclose(batch, wanted, rel_tol=1e-12)
        held = exact and math.isclose(self.noise.of(self.lr, momentum, batch), noise, rel_tol=1e-12)
        lr = self.lr if held else self.noise.lr_for(noise, momentum, batch)
        return Stage(epoch, lr, momentum, batch, wanted)

    @property
    def first_stage(self) -> Stage:
        """The stage from epoch 0 on, with the batch of the start."""
        return Stage(0.0, self.lr, self.momentum, self.global_batch, float(self.global_batch))

    @property
    def first_noise(self) -> float:
        """The noise scale at the start."""
        return self.noise.of(self.lr, self.momentum, self.global_batch)


def make_start(job: Job, num_samples: int) -> Start:
    """Return the start of a schedule. `lr_scale` and `raise_momentum_to` enlarge the batch at the same noise scale."""
    section, optim = job.schedule, job.optim
    base_batch, unit = section.first_batch, section.batch_unit(job.model.ghost_batch)
    plain = NoiseScale(num_samples, section.exact_noise, averages_gradients=optim.averages_gradients)
    normalized = replace(plain, normalized_from=base_batch)
    noise = normalized if has_normalized_gradients(job) else plain
    lr = optim.lr * section.lr_scale
    momentum = optim.momentum if section.raise_momentum_to is None else section.raise_momentum_to
    start = Start(lr, momentum, base_batch, noise, noise, unit, section.limit(num_samples, unit))
    enlarged = section.enlarged_batch
    start = replace(start, global_batch=start.form(enlarged))
    if not math.isclose(enlarged, start.global_batch, rel_tol=1e-9):
        start = replace(start, wanted_batch=enlarged)
    if (lr, momentum) != (optim.lr, optim.momentum):
        target = noise.of(optim.lr, optim.momentum, base_batch)
        stage = start.stage(0.0, target, momentum, noise.batch_for(target, momentum, lr))
        wanted = None if math.isclose(stage.wanted_batch, stage.global_batch, rel_tol=1e-9) else stage.wanted_batch
        start = replace(start, lr=stage.lr, global_batch=stage.global_batch, wanted_batch=wanted)
    return start if section.normalizes_gradients else replace(start, noise=plain)


def has_normalized_gradients(job: Job) -> bool:
    """Return whether growth by κ with a learning rate of ε √κ keeps the noise scale of the phases.

    So it does under seesaw, and for Adam under an `lr_rule` that multiplies ε by √κ (Malladi et al. 2022).
    """
    has_root = job.schedule.rule in {"sqrt", "adam", "adam_linear"}
    return job.schedule.normalizes_gradients or (has_root and job.optim.averages_gradients)
