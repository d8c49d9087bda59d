"""`[schedule]`: one model per policy."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from hvd_batchgrow.config import batch_steps
from hvd_batchgrow.config.types import FloatList, Fraction, PositiveFloat, PositiveInt, Section, matching, tuples

AtLeastOne = Annotated[float, Field(ge=1)]
Factor = Annotated[AtLeastOne | tuple[AtLeastOne, ...], BeforeValidator(tuples)]
ShareOfN = Annotated[str, matching("N/[1-9][0-9]{0,17}", 'a fraction of the training set such as "N/10"')]
MaxBatch = PositiveInt | ShareOfN | None
LrRule = Literal["none", "linear", "sqrt", "adam"]
LrStep = tuple[PositiveFloat, PositiveFloat]


class ScheduleBase(Section):
    """`[schedule]`: the keys that all policies share."""

    epochs: PositiveFloat
    """Length of the run, in epochs."""
    lr_scale: PositiveFloat = 1.0
    """Multiply the learning rate and the batch at the start by this factor; the noise scale stays the same."""
    raise_momentum_to: Fraction | None = None
    """Start with this momentum m' and multiply the batch by (1-m)/(1-m'); the noise scale stays the same."""
    warmup_epochs: Annotated[float, Field(ge=0)] = 0.0
    """Length, in epochs, of a linear warm-up of the learning rate. 0: no warm-up."""
    warmup_start_lr: Annotated[float, Field(ge=0)] = 0.0
    """Learning rate at the start of the warm-up."""
    exact_noise: bool = False
    """Noise scale that follows the schedule. true: ε/(1-m) · (N/B - 1), exact for any B. false: its leading order,
    ε N / (B (1-m))."""


class BoundaryBase(ScheduleBase):
    """The keys of policies that act at given epochs."""

    global_batch: PositiveInt
    """B: samples per update at the start, over all ranks and micro-batches."""
    boundaries_epochs: FloatList = ()
    """Epochs at which the noise scale is divided by `noise_factor`."""
    noise_factor: Factor = 5.0
    """Factor that divides the noise scale at a boundary: one number, or one for each boundary."""
    momenta: Annotated[tuple[Fraction, ...], BeforeValidator(tuples)] | None = None
    """Momentum of each phase; the batch (with `decay`: the learning rate) compensates for it. None: constant."""


class DecaySchedule(BoundaryBase):
    """Divide the learning rate at every boundary."""

    policy: Literal["decay"]


class GrowSchedule(BoundaryBase):
    """Grow the batch at every boundary."""

    policy: Literal["grow"]
    max_batch: MaxBatch = None
    """Largest batch: samples, or "N/10". The learning rate decays instead once it is reached. None: no limit."""
    lr_rule: LrRule = "none"
    """Factor of the learning rate when the batch has grown by κ: none: 1; linear: κ; sqrt: √κ; adam: √κ, with new β₁,
    β₂ and eps."""


class HybridSchedule(BoundaryBase):
    """Grow the batch at the first boundaries, then divide the learning rate."""

    policy: Literal["hybrid"]
    max_batch: MaxBatch = None
    """Largest batch: samples, or "N/10". None: no limit."""
    growing_boundaries: Annotated[int, Field(ge=0)] = 1
    """Number of boundaries that grow the batch; the later ones divide the learning rate."""


class AdaBatchSchedule(ScheduleBase):
    """Multiply batch and learning rate every few epochs."""

    policy: Literal["adabatch"]
    global_batch: PositiveInt
    """B: samples per update at the start, over all ranks and micro-batches."""
    max_batch: MaxBatch = None
    """Largest batch: samples, or "N/10". None: no limit."""
    every_epochs: PositiveFloat
    """Epochs between steps."""
    batch_factor: Annotated[float, Field(ge=1)] = 2.0
    """β: factor of the batch at each step."""
    lr_factor: Annotated[float, Field(gt=0, le=1)] = 0.75
    """α: factor of the learning rate at each step; the noise scale falls by β/α."""


class StepsSchedule(ScheduleBase):
    """Set the batch at given sample counts; `lr_rule` sets the learning rate."""

    policy: Literal["steps"]
    batch_steps: Annotated[str, AfterValidator(batch_steps.check_batch_steps)]
    """Pairs SAMPLES:BATCH such as "0:768 250K:1536". K, M and B are 10³, 10⁶ and 10⁹ samples, never tokens."""
    lr_rule: LrRule = "none"
    """Factor of the learning rate when the batch has grown by κ: none: 1; linear: κ; sqrt: √κ; adam: √κ, with new β₁,
    β₂ and eps."""


class ImportSchedule(ScheduleBase):
    """Replace the decay of a learning-rate schedule by growth of the batch."""

    policy: Literal["import"]
    global_batch: PositiveInt
    """B: samples per update at the start, over all ranks and micro-batches."""
    max_batch: MaxBatch = None
    """Largest batch: samples, or "N/10". The learning rate decays instead once it is reached. None: no limit."""
    lr_schedule: Annotated[
        str,
        matching(
            r"steps|polynomial|cosine|[A-Za-z_][\w.]*:[A-Za-z_]\w*",
            "one of steps, polynomial, cosine, or your own module:function",
        ),
    ]
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


class SeesawSchedule(BoundaryBase):
    """For Adam: where the learning rate would be divided by f, divide it by √f and multiply the batch by f."""

    policy: Literal["seesaw"]
    max_batch: MaxBatch = None
    """Largest batch: samples, or "N/10". The rule holds up to the critical batch. None: no limit."""


class AdaptiveSchedule(ScheduleBase):
    """Grow the batch when `[trigger]` decides to."""

    policy: Literal["adaptive"]
    global_batch: PositiveInt
    """B: samples per update at the start, over all ranks and micro-batches."""
    max_batch: MaxBatch = "N/10"
    """Largest batch: samples, or a fraction of N."""
    batch_scale: Annotated[float, Field(ge=1)] = 1.0
    """For AdaScale: the batch as a multiple of `global_batch`, for which learning rate and epochs are chosen."""
    lr_boundaries_epochs: FloatList = ()
    """Epochs at which the learning rate is divided by `lr_factor`, in addition to what the trigger decides."""
    lr_factor: Annotated[float, Field(gt=1)] = 10.0
    """Divisor of the learning rate at `lr_boundaries_epochs`."""
    batch_multiple: PositiveInt | None = None
    """Every batch is a whole multiple of this, so that the ranks can form it. None: of `global_batch`."""
    lr_rule: LrRule = "none"
    """Factor of the learning rate when the batch has grown by κ: none: 1; linear: κ; sqrt: √κ; adam: √κ, with new β₁,
    β₂ and eps."""


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
