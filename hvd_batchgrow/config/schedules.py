"""`[schedule]`: one model per policy."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from hvd_batchgrow.config import batch_steps
from hvd_batchgrow.config.types import FloatList, Fraction, PositiveFloat, PositiveInt, Section, tuples

AtLeastOne = Annotated[float, Field(ge=1)]
Factor = Annotated[AtLeastOne | tuple[AtLeastOne, ...], BeforeValidator(tuples)]
ShareOfN = Annotated[
    str,
    Field(pattern=r"^N/[1-9][0-9]{0,17}$", description='a share of the training set such as "N/10"', examples=["N/10"]),
]
MaxBatch = PositiveInt | ShareOfN | None
LrRule = Literal["none", "linear", "sqrt", "adam"]
LrStep = tuple[PositiveFloat, PositiveFloat]


class ScheduleBase(Section):
    """`[schedule]`: what all policies share."""

    epochs: PositiveFloat
    lr_scale: PositiveFloat = 1.0
    """Start with the learning rate and the batch this much larger; the noise scale stays."""
    raise_momentum_to: Fraction | None = None
    """Start with this momentum, and a batch larger by (1-m)/(1-m'); the noise scale stays."""
    warmup_epochs: Annotated[float, Field(ge=0)] = 0.0
    """The learning rate rises in a line, update by update, to that of the schedule."""
    warmup_start_lr: Annotated[float, Field(ge=0)] = 0.0
    exact_noise: bool = False
    """Hold ε/(1-m) · (N/B - 1) to the schedule, exact for any B; else its leading order, ε N / (B (1-m))."""


class BoundaryBase(ScheduleBase):
    """Policies that act at given epochs."""

    global_batch: PositiveInt
    """Samples per update at the start, over all ranks and passes."""
    boundaries_epochs: FloatList = ()
    """Epochs at which the noise scale is divided by `noise_factor`."""
    noise_factor: Factor = 5.0
    """One number, or one for each boundary."""
    momenta: Annotated[tuple[Fraction, ...], BeforeValidator(tuples)] | None = None
    """Momentum of each phase; None: the same in all. The batch makes up for it, or the learning rate under `decay`."""


class DecaySchedule(BoundaryBase):
    """Divide the learning rate."""

    policy: Literal["decay"]


class GrowSchedule(BoundaryBase):
    """Grow the batch."""

    policy: Literal["grow"]
    max_batch: MaxBatch = None
    """Where growth stops and the learning rate decays instead: samples, or "N/10"; None: no limit."""
    lr_rule: LrRule = "none"
    """What the learning rate does when the batch has grown by κ: nothing, × κ, × √κ, or Adam's set."""


class HybridSchedule(BoundaryBase):
    """Grow the batch at the first boundaries, then divide the learning rate."""

    policy: Literal["hybrid"]
    max_batch: MaxBatch = None
    growing_boundaries: Annotated[int, Field(ge=0)] = 1
    """How many boundaries grow the batch."""


class AdaBatchSchedule(ScheduleBase):
    """Multiply batch and learning rate every few epochs."""

    policy: Literal["adabatch"]
    global_batch: PositiveInt
    max_batch: MaxBatch = None
    every_epochs: PositiveFloat
    batch_factor: Annotated[float, Field(ge=1)] = 2.0
    """β."""
    lr_factor: Annotated[float, Field(gt=0, le=1)] = 0.75
    """α: the noise scale falls by β/α each time."""


class StepsSchedule(ScheduleBase):
    """Batch sizes at sample counts, the learning rate by rule."""

    policy: Literal["steps"]
    batch_steps: Annotated[
        str,
        AfterValidator(batch_steps.check_batch_steps),
        Field(
            json_schema_extra={"pattern": batch_steps.PATTERN},
            description=f'pairs SAMPLES:BATCH, the first from sample 0, such as "{batch_steps.EXAMPLE}"',
            examples=[batch_steps.EXAMPLE],
        ),
    ]
    """ "0:768 250K:1536": from sample count, batch. K, M and B are 10³, 10⁶ and 10⁹ samples, never tokens."""
    lr_rule: LrRule = "none"


class ImportSchedule(ScheduleBase):
    """Turn a learning-rate schedule into growth of the batch."""

    policy: Literal["import"]
    global_batch: PositiveInt
    max_batch: MaxBatch = None
    lr_schedule: Annotated[
        str,
        Field(
            pattern=r"^(steps|polynomial|cosine|[A-Za-z_][\w.]*:[A-Za-z_]\w*)$",
            description="one of steps, polynomial, cosine, or your own module:function",
            examples=["steps", "polynomial", "cosine"],
        ),
    ]
    """steps, polynomial, cosine, or `module:function` that maps an epoch to a multiple of `optim.lr`."""
    num_phases: Annotated[int, Field(gt=0, le=1000)] = 8
    """Phases of equal length that stand for a smooth schedule, each with its mean noise scale."""
    lr_steps: Annotated[tuple[LrStep, ...], BeforeValidator(tuples)] = ()
    """For steps: [epoch, multiple of `optim.lr` from there on]."""
    power: PositiveFloat = 1.0
    """For polynomial: ε₀ (1 - t)^power, t from 0 to 1 over the run."""
    end_lr_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """For polynomial and cosine: what is left of ε₀ at the end."""


class SeesawSchedule(BoundaryBase):
    """Where the learning rate would be divided by f, divide it by √f and multiply the batch by f: for Adam."""

    policy: Literal["seesaw"]
    max_batch: MaxBatch = None
    """The critical batch: beyond it the rule does not hold."""


class AdaptiveSchedule(ScheduleBase):
    """Grow the batch when `[trigger]` says so."""

    policy: Literal["adaptive"]
    global_batch: PositiveInt
    max_batch: MaxBatch = "N/10"
    batch_scale: Annotated[float, Field(ge=1)] = 1.0
    """For AdaScale: the batch, as a multiple of the one that learning rate and epochs are meant for, `global_batch`."""
    lr_boundaries_epochs: FloatList = ()
    """Epochs at which the learning rate is divided by `lr_factor`, whatever the batch does."""
    lr_factor: Annotated[float, Field(gt=1)] = 10.0
    batch_multiple: PositiveInt | None = None
    """Batches are whole multiples of this, so that any of them can be formed; None: of `global_batch`."""
    lr_rule: LrRule = "none"
    """What the learning rate does when the batch has grown by κ: nothing, × κ, × √κ, or Adam's set."""


ScheduleSection = Annotated[
    DecaySchedule
    | GrowSchedule
    | HybridSchedule
    | AdaBatchSchedule
    | StepsSchedule
    | ImportSchedule
    | SeesawSchedule
    | AdaptiveSchedule,
    Field(discriminator="policy"),
]
