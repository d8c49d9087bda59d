"""`[task]`: what the network learns."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, JsonValue

from hvd_batchgrow.config.task_specs import TASKS, Direction, TargetKind, check_task
from hvd_batchgrow.config.types import FloatList, Fraction, PositiveFloat, Section


class TaskSection(Section):
    """`[task]`: what the network learns: its loss, its metrics, and the targets that they need."""

    name: Annotated[str, AfterValidator(check_task)] = "classification"
    """A task of this package, or your own `module:name`."""
    kwargs: dict[str, JsonValue] = Field(default={})
    """For `module:name`: keyword arguments of the call."""
    label_smoothing: Fraction = 0.0
    """classification and language_model: fraction of each target that is spread evenly over all classes, in training
    only."""
    class_weights: FloatList | None = None
    """classification: weight of the samples of each class, by class number, in the loss of training and evaluation.
    None: 1 each."""
    pos_weights: FloatList | None = None
    """multi_label: factor on the loss of each label's positive samples, in training and evaluation. None: 1 each."""
    loss: Literal["mse", "l1", "huber"] = "mse"
    """regression: mean over the targets of the squared error, of the absolute error, or of Huber's loss."""
    huber_delta: PositiveFloat = 1.0
    """Huber's loss: error from which it is linear."""
    standardize: bool = False
    """regression: let the network learn (target - mean) / std of the training targets; metrics and predictions stay in
    the units of the targets."""

    @property
    def target(self) -> TargetKind | None:
        """Targets that the task needs; None: the user's own task names them."""
        spec = TASKS.get(self.name)
        return spec.target if spec else None

    def directions(self) -> dict[str, Direction] | None:
        """Return the direction in which the loss and each metric improve; None: the user's own task states it."""
        spec = TASKS.get(self.name)
        return {"loss": "down", **spec.metrics} if spec else None
