"""`policy = "import"`."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from typing import Annotated, Literal, NamedTuple

from pydantic import AfterValidator, BeforeValidator, Field

from hvd_batchgrow.config import Job
from hvd_batchgrow.config.own_code import is_module_name
from hvd_batchgrow.config.schedules import GrowthKeys
from hvd_batchgrow.config.types import PositiveFloat, tuples
from hvd_batchgrow.import_string import NotFound, find_callable
from hvd_batchgrow.messages.errors import Fault, JobError, describe_error
from hvd_batchgrow.schedule.policy import POLICIES, BatchPolicy
from hvd_batchgrow.schedule.rounding import decimal
from hvd_batchgrow.schedule.stages import Stage, Start

_POINTS = 1000
_STEPS_AT_LIMIT = 100
"""Parts of the run, at least, if the batch is at its limit from the start."""
LrStep = tuple[PositiveFloat, PositiveFloat]


def _checked_name(name: str) -> str:
    if name in {"steps", "polynomial", "cosine"} or is_module_name(name):
        return name
    raise ValueError("must be one of steps, polynomial, cosine, or your own module:function")


@POLICIES.add
class ImportSchedule(GrowthKeys, BatchPolicy):
    """Grow the batch where the imported schedule decays the learning rate.

    A schedule of steps gives one stage per step. A smooth schedule is cut into `num_phases` stages of equal length,
    each with the schedule's mean noise scale over it. A stage that requests more than `max_batch` is cut again, so that
    the learning rate, which decays instead, follows the curve in steps of at most a hundredth of the run. A step is at
    least as long as an update of `max_batch`.

    Every batch is a multiple of `batch_multiple`. The learning rate makes up for the difference, so the noise scale of
    each stage is that of the imported schedule.
    """

    policy: Literal["import"]
    lr_schedule: Annotated[str, AfterValidator(_checked_name)]
    """The schedule to import: steps, polynomial, cosine, or your own `module:function`, which returns the multiple of
    `optim.lr` at an epoch."""
    num_phases: Annotated[int, Field(gt=0, le=1000)] = 8
    """Number of phases of equal length that approximate a smooth schedule, each with its mean noise scale."""
    lr_steps: Annotated[tuple[LrStep, ...], BeforeValidator(tuples)] = ()
    """For steps: pairs [epoch, multiple of `optim.lr` from that epoch on]."""
    power: PositiveFloat = 1.0
    """For polynomial: the exponent of ε₀ (1 - t)^power, where t rises from 0 to 1 over the run."""
    end_lr_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """For polynomial and cosine: learning rate at the end, as a fraction of ε₀."""

    def batch_unit(self, ghost_batch: int) -> int:
        # A first batch that cuts ghost batches is a fault by itself, and no unit of others.
        return self.stated_unit or (ghost_batch if self.global_batch % ghost_batch else self.global_batch)

    def stages(self, start: Start) -> list[Stage]:
        first = start.first_noise

        def wanted(multiple: float) -> float:
            return start.noise.batch_for(first * multiple, start.momentum, start.lr)

        def num_parts(multiple: float) -> int:
            if start.max_batch is None or not start.is_cut(wanted(multiple)):
                return 1
            updates = self.epochs * start.noise.num_samples / self.num_phases / start.max_batch
            return max(1, min(-(-_STEPS_AT_LIMIT // self.num_phases), int(updates)))

        parts = imported_parts(self, num_parts)
        _refuse_learning_rates(self.lr_schedule, start.lr)
        for before, part in itertools.pairwise(parts):
            if part.multiple > before.multiple:
                rise = f"rises from {before.multiple:g} to {part.multiple:g} × lr at epoch {part.start_epoch:g}"
                raise JobError([Fault("schedule.lr_schedule", f"{rise}: only a falling one can be imported")])
        return [
            replace(
                start.stage(part.start_epoch, first * part.multiple, start.momentum, wanted(part.multiple)),
                continues_phase=part.continues_phase,
            )
            for part in parts
        ]

    def faults(self, job: Job, num_samples: int) -> list[Fault]:
        kinds = ["polynomial", "cosine"]
        users = {"power": kinds[:1], "end_lr_fraction": kinds}
        if self.lr_schedule == "steps":
            users["num_phases"] = [*kinds, "module:function"]
        return [
            Fault(f"schedule.{key}", f"is for {' or '.join(map(repr, of))}, not {self.lr_schedule!r}; remove it")
            for key, of in users.items()
            if self.lr_schedule not in of and getattr(self, key) != type(self).model_fields[key].default
        ]


class Part(NamedTuple):
    """A part of the run, of a constant learning rate."""

    start_epoch: float
    multiple: float
    """Mean multiple of the learning rate over the part."""
    continues_phase: bool = False
    """Whether the part before belongs to the same one of `num_phases`."""


def imported_parts(section: ImportSchedule, num_parts: Callable[[float], int]) -> list[Part]:
    """Return the parts of the run.

    Args:
        section: the schedule.
        num_parts: returns into how many parts a phase of a smooth schedule is cut, given its mean multiple.

    Raises:
        JobError: the schedule cannot be imported.
    """
    _check_lr_steps(section)
    if section.lr_schedule == "steps":
        return [Part(epoch, multiple) for epoch, multiple in [(0.0, 1.0), *section.lr_steps]]
    mean_of, count = _mean_function(section), section.num_phases
    parts: list[Part] = []
    for k in range(count):
        phase = _part(section, mean_of, k, count)
        if (cuts := num_parts(phase.multiple)) == 1:
            parts.append(phase)
            continue
        cut = [_part(section, mean_of, k * cuts + i, count * cuts) for i in range(cuts)]
        parts += [cut[0], *(part._replace(continues_phase=True) for part in cut[1:])]
    return parts


def _part(section: ImportSchedule, mean_of: Callable[[int, int], float], k: int, count: int) -> Part:
    """Return part k of `count` equal parts of the run. Raises JobError if its mean is 0 or less."""
    start, end = (float(decimal(section.epochs) * Fraction(edge, count)) for edge in (k, k + 1))
    mean = mean_of(k, count)
    if mean <= 0:
        fault = f"{section.lr_schedule} is {mean:g} on average over epochs {start:g} to {end:g}"
        raise JobError([Fault("schedule.lr_schedule", f"{fault}; must be above 0: no batch has a noise scale of 0")])
    return Part(start, mean)


def _check_lr_steps(section: ImportSchedule) -> None:
    epochs = [0.0, *(epoch for epoch, _ in section.lr_steps), section.epochs]
    if (section.lr_schedule == "steps") != bool(section.lr_steps):
        fault = "belongs to lr_schedule = 'steps', which needs it: [[epoch, multiple of lr], …]"
    elif any(b <= a for a, b in itertools.pairwise(epochs)):
        fault = f"its epochs must rise from above 0 to below epochs = {section.epochs:g}, got {epochs[1:-1]}"
    else:
        return
    raise JobError([Fault("schedule.lr_steps", fault)])


def _mean_function(section: ImportSchedule) -> Callable[[int, int], float]:
    """Return a function of k and n: the mean multiple over part k of n of the run, exact for the built-in curves."""
    end = section.end_lr_fraction
    if section.lr_schedule == "polynomial":
        return lambda k, count: end + (1 - end) * polynomial_mean(k, count, section.power)
    if section.lr_schedule == "cosine":
        return lambda k, count: end + (1 - end) * cosine_mean(k, count)
    multiple_at, epochs = _own_function(section.lr_schedule), section.epochs

    def mean(k: int, count: int) -> float:
        return math.fsum(multiple_at((k + (i + 0.5) / _POINTS) * (epochs / count)) for i in range(_POINTS)) / _POINTS

    return mean


def polynomial_mean(k: int, count: int, power: float) -> float:
    """Return the mean of (1 - t)^p over t from k/n to (k+1)/n, p > 0:
    n/(p+1) · ((1 - k/n)^(p+1) - (1 - (k+1)/n)^(p+1)).
    """
    q = power + 1
    return float(count / q * (((count - k) / count) ** q - ((count - k - 1) / count) ** q))


def cosine_mean(k: int, count: int) -> float:
    """Return the mean of (1 + cos πt)/2 over t from k/n to (k+1)/n.

    Let m and h be the center and half the length of the stage in x = π (1 - t). The mean is (1 - cos m · sin h / h)/2,
    calculated as sin²(m/2) + cos m · (1 - sin h / h)/2 to avoid cancellation at the end of the curve. 1 - sin h / h is
    summed as a series, whose twelfth term is negligible for h <= π/2.
    """
    center, half = math.pi * (2 * (count - k) - 1) / (2 * count), math.pi / (2 * count)
    series = math.fsum(-((-(half**2)) ** i) / math.factorial(2 * i + 1) for i in range(1, 13))
    return math.sin(center / 2) ** 2 + math.cos(center) * series / 2


def _refuse_learning_rates(name: str, lr: float) -> None:
    """Raise JobError if the user's function seems to return learning rates instead of multiples of the first one."""
    if ":" in name and lr != 1 and math.isclose(_own_function(name)(0.0), lr):
        fault = f"{name}(0) is {lr:g}, the learning rate itself; it must return a multiple of it, such as 1"
        raise JobError([Fault("schedule.lr_schedule", f"{fault}: divide its result by optim.lr")])


def _own_function(name: str) -> Callable[[float], float]:
    """Return the user's function of the epoch, wrapped to raise JobError if it fails."""
    try:
        function = find_callable(name)
    except NotFound as error:
        raise JobError([Fault("schedule.lr_schedule", str(error))]) from error

    def multiple_at(epoch: float) -> float:
        try:
            multiple = float(function(epoch))
        except (Exception, SystemExit) as error:  # the user's own code
            raise JobError(
                [Fault("schedule.lr_schedule", f"{name}({epoch:g}) failed: {describe_error(error)}")]
            ) from error
        if not math.isfinite(multiple):
            raise JobError([Fault("schedule.lr_schedule", f"{name}({epoch:g}) is {multiple}")])
        return multiple

    return multiple_at
