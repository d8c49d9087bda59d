"""`[trigger]`: what a run measures to decide when its batch grows; one model per trigger."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from hvd_batchgrow.config.types import PositiveFloat, Section, tuples

Window = tuple[Annotated[float, Field(ge=0)], PositiveFloat]
AboveOne = Annotated[float, Field(gt=1)]


class NoTrigger(Section):
    """The schedule is fixed."""

    name: Literal["none"]


class TriggerBase(Section):
    """What all triggers share."""

    windows_epochs: Annotated[tuple[Window, ...], Field(min_length=1), BeforeValidator(tuples)] | None = None
    """[earliest, latest] epoch of the first, second, … decision: never before, never after, and no more of them; a
    window that ends without a decision makes one, of `noise_factor` or `max_batch_factor`. None: no limit."""


class PlateauTrigger(TriggerBase):
    """Divide the noise scale when the test set's result has stopped improving, as torch's ReduceLROnPlateau."""

    name: Literal["plateau"]
    metric: Literal["loss", "top1"] = "loss"
    """Of the test set: the loss is to fall, top1 to rise."""
    min_delta: Annotated[float, Field(ge=0)] = 0.0
    """What is better by no more than this is no improvement."""
    patience_epochs: Annotated[float, Field(ge=0)] = 3.0
    """Decide when there was none for more than so long."""
    cooldown_epochs: Annotated[float, Field(ge=0)] = 0.0
    """After a decision, so long counts as none of it."""
    noise_factor: AboveOne = 5.0
    """By which the noise scale falls: the batch grows, and beyond `max_batch` the learning rate decays."""
    restore_best: bool = False
    """Go on from the weights of the best evaluation, and from their moving average; the optimiser stays as it is."""


class MeasuringTrigger(TriggerBase):
    """Those that look at the gradient, now and then."""

    every_epochs: PositiveFloat = 0.05
    """How often they look."""
    max_batch_factor: AboveOne = 2.0
    """One decision multiplies the batch by no more than this."""
    min_factor: Annotated[float, Field(ge=1)] = 1.25
    """A change by less is not made."""


class NormTestTrigger(MeasuringTrigger):
    """Keep the standard error of the gradient below a share of its norm."""

    name: Literal["norm_test"]
    theta: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """θ, that share."""


class CabsTrigger(MeasuringTrigger):
    """Couple the batch to learning rate and loss: B = c ε tr(Σ) / (loss + δ)."""

    name: Literal["cabs"]
    scale: PositiveFloat = 1.0
    """c."""
    loss_offset: float = 0.0
    """δ: minus the least loss that could be."""


class SimilarityTrigger(MeasuringTrigger):
    """Keep gradients of two updates alike: their expected cosine is 1/(1 + B_simple/B)."""

    name: Literal["similarity"]
    similarity: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """What it must not fall below."""


class GradientNoiseTrigger(MeasuringTrigger):
    """Let the batch follow B_simple."""

    name: Literal["gradient_noise"]
    ratio: PositiveFloat = 1.0
    """h: grow to B_simple/h when B_simple is above h B."""
    hold_epochs: Annotated[float, Field(ge=0)] = 0.25
    """It must have been so for this long."""


class AdaScaleTrigger(Section):
    """Scale the learning rate by the gain of a larger batch, and count progress by it; the batch stays."""

    name: Literal["adascale"]
    every_epochs: PositiveFloat = 0.05
    """How often the gain is worked out anew."""
    min_change: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """A gain that has changed by a smaller share of itself stays as it is."""


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
