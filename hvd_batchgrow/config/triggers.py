"""`[trigger]`: what a run measures to decide when its batch grows; one model per trigger."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from hvd_batchgrow.config.types import PositiveFloat, Section, tuples

Window = tuple[Annotated[float, Field(ge=0)], PositiveFloat]
AboveOne = Annotated[float, Field(gt=1)]


class NoTrigger(Section):
    """No trigger: the schedule is fixed."""

    name: Literal["none"]


class TriggerBase(Section):
    """The keys that all triggers but adascale share."""

    windows_epochs: Annotated[tuple[Window, ...], Field(min_length=1), BeforeValidator(tuples)] | None = None
    """[earliest, latest] epoch of the first, second, … decision, and the largest number of decisions. If a window ends
    without a decision, the trigger decides there, by `noise_factor` or `max_batch_factor`. None: no limits."""


class PlateauTrigger(TriggerBase):
    """Divide the noise scale when the test result has stopped improving, like torch's ReduceLROnPlateau."""

    name: Literal["plateau"]
    metric: Literal["loss", "top1"] = "loss"
    """Result on the test set: loss improves when it falls, top1 (accuracy in [0, 1]) when it rises."""
    min_delta: Annotated[float, Field(ge=0)] = 0.0
    """Smallest change of the metric that counts as an improvement; the change must exceed it."""
    patience_epochs: Annotated[float, Field(ge=0)] = 3.0
    """Epochs without improvement before the batch grows; growth needs more than this."""
    cooldown_epochs: Annotated[float, Field(ge=0)] = 0.0
    """Epochs after a decision that do not count towards `patience_epochs`."""
    noise_factor: AboveOne = 5.0
    """Divisor of the noise scale at a decision: the batch grows, and at `max_batch` the learning rate decays."""
    restore_best: bool = False
    """At a decision, restore the weights of the best evaluation and their moving average; the optimizer keeps its
    state."""


class MeasuringTrigger(TriggerBase):
    """The keys of triggers that measure the gradient."""

    every_epochs: PositiveFloat = 0.05
    """Epochs between two checks of the trigger."""
    max_batch_factor: AboveOne = 2.0
    """Largest factor by which one decision multiplies the batch."""
    min_factor: Annotated[float, Field(ge=1)] = 1.25
    """Smallest factor by which a decision multiplies the batch; smaller requests are ignored."""


class NormTestTrigger(MeasuringTrigger):
    """Keep the standard error of the gradient below a fraction of its norm."""

    name: Literal["norm_test"]
    theta: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """θ in tr(Σ)/B ≤ θ² |g|²: the standard error as a fraction of the norm."""


class CabsTrigger(MeasuringTrigger):
    """Couple the batch to learning rate and loss: B = c ε tr(Σ) / (loss + δ)."""

    name: Literal["cabs"]
    scale: PositiveFloat = 1.0
    """c in the formula."""
    loss_offset: float = 0.0
    """δ in the formula: minus the smallest possible loss."""


class SimilarityTrigger(MeasuringTrigger):
    """Keep the gradients of two updates similar: their expected cosine is 1/(1 + B_simple/B)."""

    name: Literal["similarity"]
    similarity: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Smallest expected cosine; the batch grows if it is lower."""


class GradientNoiseTrigger(MeasuringTrigger):
    """Let the batch follow B_simple."""

    name: Literal["gradient_noise"]
    ratio: PositiveFloat = 1.0
    """h: grow the batch to B_simple/h when B_simple exceeds h B."""
    hold_epochs: Annotated[float, Field(ge=0)] = 0.25
    """Epochs for which B_simple must have exceeded h B."""


class AdaScaleTrigger(Section):
    """Scale the learning rate and the progress of the schedule by the gain of a larger, constant batch."""

    name: Literal["adascale"]
    every_epochs: PositiveFloat = 0.05
    """Epochs between two calculations of the gain."""
    min_change: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Smallest relative change of the gain that is applied."""


TriggerSection = Annotated[
    NoTrigger
    | PlateauTrigger
    | NormTestTrigger
    | CabsTrigger
    | SimilarityTrigger
    | GradientNoiseTrigger
    | AdaScaleTrigger,
    Field(discriminator="name"),
]
