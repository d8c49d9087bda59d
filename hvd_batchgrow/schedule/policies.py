"""Policies: the batch and learning rate that a job requests at each boundary, before the job is compiled to updates.

A policy is a plain function of its section of the job and of the start. It returns stages in the order of their epochs,
the first at 0. To add a policy, write the function, add it to POLICIES, and describe its keys in config/schedules.py.

Every policy says by how much the noise scale must have fallen, and whether the batch or the learning rate changes. The
learning rate corrects for a batch that was rounded to whole ghost batches or cut at its limit.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hvd_batchgrow.config import Job
from hvd_batchgrow.config.batch_steps import parse_batch_steps
from hvd_batchgrow.config.optim import AdamSection
from hvd_batchgrow.config.schedules import (
    AdaBatchSchedule,
    AdaptiveSchedule,
    BoundaryBase,
    DecaySchedule,
    GrowSchedule,
    HybridSchedule,
    ImportSchedule,
    SeesawSchedule,
    StepsSchedule,
)
from hvd_batchgrow.messages.errors import Fault, JobError
from hvd_batchgrow.schedule.imported import imported_multiples
from hvd_batchgrow.schedule.noise import NoiseScale
from hvd_batchgrow.schedule.rounding import decimal, half_up, samples_at, whole_multiples

_MOST_STAGES = 1000


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
    progress_rate: float = 1.0
    """Progress of the schedule per sample; under AdaScale gain · B₀/B."""


@dataclass(frozen=True)
class Start:
    """The start of a schedule."""

    lr: float
    momentum: float
    global_batch: int
    noise: NoiseScale
    batch_unit: int
    """Every batch is a whole multiple of this number of samples; see `batch_unit`."""
    max_batch: int | None
    wanted_batch: float | None = None
    """The requested first batch, if `lr_scale` or `raise_momentum_to` enlarged it and it was rounded or cut."""

    def form(self, wanted: float) -> int:
        """Return the nearest batch that can be formed; the larger of two that are equally near."""
        if abs(wanted - self.global_batch) < 1e-6:
            return self.global_batch
        if not math.isfinite(wanted):  # infinity over infinity; the plan reports it as out of range
            raise ArithmeticError(f"a batch of {wanted}")
        batch = max(1, half_up(wanted / self.batch_unit)) * self.batch_unit
        return batch if self.max_batch is None else min(batch, self.max_batch)

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


def decay(section: DecaySchedule, start: Start) -> list[Stage]:
    """Divide the learning rate by f at every boundary; the batch stays."""
    return [
        start.stage(epoch, noise, momentum, start.global_batch)
        for epoch, noise, momentum in _boundary_targets(section, start)
    ]


def grow(section: GrowSchedule, start: Start) -> list[Stage]:
    """Grow the batch so that the noise scale falls by f at every boundary, at a constant learning rate.

    An `lr_rule` alone sets the learning rate. Its κ follows the formed batch, so rounding and limit need no correction.

    Source: Smith et al. 2018 (arXiv 1711.00489), §2 and §5.
    """
    stages = [
        start.stage(epoch, noise, momentum, start.noise.batch_for(noise, momentum, start.lr))
        for epoch, noise, momentum in _boundary_targets(section, start)
    ]
    return stages if section.lr_rule == "none" else [replace(stage, lr=start.lr) for stage in stages]


def hybrid(section: HybridSchedule, start: Start) -> list[Stage]:
    """Grow the batch at the first `growing_boundaries` boundaries and divide the learning rate at the others.

    Source: Smith et al. 2018, figure 1.
    """
    stages: list[Stage] = []
    for k, (epoch, noise, momentum) in enumerate(_boundary_targets(section, start)):
        grows = k <= section.growing_boundaries
        wanted = start.noise.batch_for(noise, momentum, start.lr) if grows else float(stages[-1].global_batch)
        stages.append(start.stage(epoch, noise, momentum, wanted))
    return stages


def seesaw(section: SeesawSchedule, start: Start) -> list[Stage]:
    """Divide the learning rate by √f and multiply the batch by f at every boundary, for Adam.

    The normalized noise scale then falls by f, as if the learning rate were divided by f at a constant batch. At the
    limit of the batch the learning rate decays by the rest. The rule requires a learning-rate factor of at least the
    square root of the batch factor; here it equals the root.

    Source: Seesaw (2025).
    """
    return [
        start.stage(epoch, noise, momentum, start.global_batch * fallen)
        for (epoch, noise, momentum), fallen in zip(_boundary_targets(section, start), _fallen(section), strict=True)
    ]


def adabatch(section: AdaBatchSchedule, start: Start) -> list[Stage]:
    """Every `every_epochs`, multiply the batch by β and the learning rate by α: the noise scale falls by β/α.

    With `exact_noise` the batch lowers the exact noise scale by β, and so never reaches N.

    Source: Devarakonda et al. 2017 (arXiv 1712.02029).
    """
    every = decimal(section.every_epochs)
    count = math.ceil(decimal(section.epochs) / every)
    if count > _MOST_STAGES:
        fault = f"{section.epochs:g} epochs by {section.every_epochs:g} are {count} phases, at most {_MOST_STAGES}"
        raise JobError([Fault("schedule.every_epochs", fault)])
    first = start.noise.of(start.lr, start.momentum, start.global_batch)
    stages = []
    for k in range(count):
        lr, grown = start.lr * section.lr_factor**k, section.batch_factor**k
        noise, wanted = first * section.lr_factor**k / grown, start.global_batch * grown
        if section.exact_noise:
            wanted = start.noise.batch_for(noise, start.momentum, lr)
        stages.append(start.stage(float(k * every), noise, start.momentum, wanted))
    return stages


def steps(section: StepsSchedule, start: Start) -> list[Stage]:
    """Set the batches of "samples:batch samples:batch …"; the learning rate is constant or follows `lr_rule`."""
    pairs = parse_batch_steps(section.batch_steps)
    counts = [samples for samples, _ in pairs]
    if any(b <= a for a, b in itertools.pairwise(counts)):
        raise JobError([Fault("schedule.batch_steps", f"sample counts must rise, got {counts}")])
    num_samples = start.noise.num_samples
    total = samples_at(section.epochs, num_samples)
    if counts[-1] >= total:
        fault = f"the last step at {counts[-1]} samples is beyond the run's {total}"
        raise JobError([Fault("schedule.batch_steps", fault)])
    return [Stage(at / num_samples, start.lr, start.momentum, batch, float(batch)) for at, batch in pairs]


def import_(section: ImportSchedule, start: Start) -> list[Stage]:
    """Grow the batch where the imported schedule decays the learning rate.

    A schedule of steps gives one stage per step. A smooth schedule is cut into `num_phases` stages of equal length,
    each with the schedule's mean noise scale over it.
    """
    multiples = imported_multiples(section)
    for (_, before), (epoch, multiple) in itertools.pairwise(multiples):
        if multiple > before:
            fault = f"rises from {before:g} to {multiple:g} × lr at epoch {epoch:g}: only a falling one can be imported"
            raise JobError([Fault("schedule.lr_schedule", fault)])
    first = start.noise.of(start.lr, start.momentum, start.global_batch)
    return [
        start.stage(epoch, first * m, start.momentum, start.noise.batch_for(first * m, start.momentum, start.lr))
        for epoch, m in multiples
    ]


def adaptive(section: AdaptiveSchedule, start: Start) -> list[Stage]:
    """Return the stage before the first decision of the trigger; see `batch_requests.adaptive_stages`."""
    return [Stage(0.0, start.lr, start.momentum, start.global_batch, float(start.global_batch))]


POLICIES: dict[str, Callable[[Any, Start], list[Stage]]] = {
    "decay": decay,
    "grow": grow,
    "hybrid": hybrid,
    "seesaw": seesaw,
    "adabatch": adabatch,
    "steps": steps,
    "import": import_,
    "adaptive": adaptive,
}


# --- helpers of the policies -----------------------------------------------------------------


def _boundary_targets(section: BoundaryBase, start: Start) -> list[tuple[float, float, float]]:
    """Return epoch, noise scale and momentum of each stage."""
    epochs, fallen = (0.0, *section.boundaries_epochs), _fallen(section)
    momenta = section.momenta or (start.momentum,) * len(epochs)
    faults = []
    if len(fallen) != len(epochs):
        fault = f"{len(fallen) - 1} factors for {len(epochs) - 1} boundaries; give one number, or one for each boundary"
        faults.append(Fault("schedule.noise_factor", fault))
    if len(momenta) != len(epochs) or momenta[0] != start.momentum:
        fault = f"needs one for each of the {len(epochs)} phases, the first {start.momentum:g}, got {list(momenta)}"
        faults.append(Fault("schedule.momenta", fault))
    if faults:
        raise JobError(faults)
    first = start.noise.of(start.lr, start.momentum, start.global_batch)
    return [(epoch, first / r, m) for epoch, r, m in zip(epochs, fallen, momenta, strict=True)]


def _fallen(section: BoundaryBase) -> list[float]:
    """Return the factor by which the noise scale must have fallen at each stage: 1, f₁, f₁ f₂, …"""
    given, count = section.noise_factor, len(section.boundaries_epochs)
    factors = given if isinstance(given, tuple) else (given,) * count
    return list(itertools.accumulate(factors, lambda a, b: a * b, initial=1.0))


def make_start(job: Job, num_samples: int) -> Start:
    """Return the start of a schedule. `lr_scale` and `raise_momentum_to` enlarge the batch at the same noise scale."""
    section, optim, unit = job.schedule, job.optim, batch_unit(job)
    base_batch = first_batch(job)
    normalised_from = base_batch if section.policy == "seesaw" else None
    noise = NoiseScale(num_samples, section.exact_noise, normalised_from)
    lr = optim.lr * section.lr_scale
    momentum = optim.momentum if section.raise_momentum_to is None else section.raise_momentum_to
    max_batch = batch_cap(getattr(section, "max_batch", None), num_samples, unit)
    start = Start(lr, momentum, base_batch, noise, unit, max_batch)
    if isinstance(section, AdaptiveSchedule) and section.batch_scale != 1:
        start = replace(start, global_batch=start.form(section.batch_scale * base_batch))
    if (lr, momentum) == (optim.lr, optim.momentum):
        return start
    target = noise.of(optim.lr, optim.momentum, base_batch)
    stage = start.stage(0.0, target, momentum, noise.batch_for(target, momentum, lr))
    wanted = None if math.isclose(stage.wanted_batch, stage.global_batch, rel_tol=1e-9) else stage.wanted_batch
    return replace(start, lr=stage.lr, global_batch=stage.global_batch, wanted_batch=wanted)


def first_batch(job: Job) -> int:
    """Return B₀ as written in the job file."""
    if isinstance(job.schedule, StepsSchedule):
        return parse_batch_steps(job.schedule.batch_steps)[0][1]
    return job.schedule.global_batch


def batch_unit(job: Job) -> int:
    """Return the samples of which every batch is a whole multiple: γ, or for an adaptive schedule `batch_multiple`."""
    if isinstance(job.schedule, AdaptiveSchedule):
        return job.schedule.batch_multiple or job.schedule.global_batch
    return job.model.ghost_batch


def batch_cap(max_batch: int | str | None, num_samples: int, unit: int) -> int | None:
    """Return the largest allowed batch in samples, or None for no limit. "N/10" is rounded down to whole units."""
    if isinstance(max_batch, str):
        return num_samples // int(max_batch.removeprefix("N/")) // unit * unit
    return max_batch


def apply_lr_rule(stages: Sequence[Stage], job: Job) -> list[Stage]:
    """Multiply the learning rate of each stage by a function of κ, by which the batch has grown since the start.

    κ = B / B₀ of the formed batches. With a rule, the policy has not corrected the learning rate for rounding or limit.

    none: ε; linear: ε κ (Goyal et al. 2017, arXiv 1706.02677); sqrt: ε √κ; adam: ε √κ, 1-βᵢ → κ (1-βᵢ), eps/√κ
    (Malladi et al. 2022, arXiv 2205.10287), only while κ (1-βᵢ) < 1.

    Raises:
        JobError: the rule is adam and the optimizer is not, or κ is too large for it.
    """
    rule = getattr(job.schedule, "lr_rule", "none")
    if rule == "none":
        return list(stages)
    if rule == "adam":
        return [_adam_set(stage, stages[0].global_batch, job) for stage in stages]
    power = {"linear": 1.0, "sqrt": 0.5}[rule]
    return [replace(s, lr=s.lr * (s.global_batch / stages[0].global_batch) ** power) for s in stages]


def _adam_set(stage: Stage, first: int, job: Job) -> Stage:
    if not isinstance(job.optim, AdamSection):
        raise JobError(
            [Fault("schedule.lr_rule", f"'adam' is for optim.name = 'adam' or 'adamw', not {job.optim.name!r}")]
        )
    kappa, optim = stage.global_batch / first, job.optim
    for name, beta in (("β₁", stage.momentum), ("β₂", optim.betas[1])):
        if kappa * (1 - beta) < 1 - 1e-9:
            continue
        largest = math.floor(first / (1 - beta) * (1 - 1e-9) / job.model.ghost_batch) * job.model.ghost_batch
        fault = (
            f"lr_rule = 'adam' needs κ (1-{name}) < 1, but {stage.global_batch}/{first} · {1 - beta:g} = "
            f"{kappa * (1 - beta):g}; grow to at most {largest}"
        )
        raise JobError([Fault("schedule.lr_rule", fault)])
    return replace(
        stage,
        lr=stage.lr * kappa**0.5,
        momentum=1 - kappa * (1 - stage.momentum),
        beta2=1 - kappa * (1 - optim.betas[1]),
        eps=optim.eps / kappa**0.5,
    )
