"""The types of a checkpoint's fields.

The seal proves that a file has not changed since it was written, but not that this version of this program wrote it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
)
from torch import Tensor

from hvd_batchgrow.messages.errors import RunError, first_fault
from hvd_batchgrow.nn.state.extra_state import is_extra_state, plain_fault
from hvd_batchgrow.schedule.adaptive.decisions import Decision
from hvd_batchgrow.schedule.trigger import check_rule_state


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", arbitrary_types_allowed=True)


class _Optimizer(_Strict):
    state: dict[Any, Any]
    param_groups: list[dict[str, Any]]


class _Evaluation(_Strict):
    samples: NonNegativeInt
    loss: float
    metrics: dict[str, float]
    updates: NonNegativeInt | None
    dataset: Literal["validation", "test"]
    average_loss: float | None
    average_metrics: dict[str, float]


class _Best(_Strict):
    metric: str
    value: Annotated[float, Field(allow_inf_nan=False)]
    samples: Annotated[list[NonNegativeInt], Field(min_length=1)]


class _LossScale(_Strict):
    value: Annotated[PositiveFloat, Field(allow_inf_nan=False)]
    good_updates: NonNegativeInt
    growth_updates: PositiveInt


class _Replays(_Strict):
    passed: PositiveInt
    seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    samples: NonNegativeInt
    identical: NonNegativeInt


_Empty = Annotated[dict[str, Any], Field(max_length=0)]


class _Growth(_Strict):
    decisions: list[Annotated[dict[str, Any], AfterValidator(Decision.from_dict)]]
    replayed_from: str | None
    trigger: Annotated[dict[str, Any], AfterValidator(check_rule_state)]
    noise: dict[str, dict[str, float]]
    loss: Annotated[list[float], Field(min_length=2, max_length=2)]
    best: dict[str, Any]
    best_average: dict[str, Tensor]


class _Contents(_Strict):
    samples: Annotated[int, Field(ge=0, lt=2**62)]
    deciding: dict[str, Any]
    model: dict[str, Any]
    optimizer: _Optimizer
    elapsed_s: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    evaluation: _Evaluation | _Empty
    average: dict[str, Tensor]
    loss_scale: _LossScale | _Empty
    num_skipped: NonNegativeInt
    growth: _Growth | _Empty
    best: _Best | _Empty
    gradient_magnitudes: list[int]
    replays: _Replays | _Empty
    unfinished: NonNegativeInt | None


def check_contents(values: Mapping[str, Any]) -> None:
    """Check the types of all fields without converting them. Raises RunError that names the first wrong field."""
    try:
        _Contents.model_validate(values)
    except ValidationError as error:
        raise RunError(f"not a checkpoint of this version: {first_fault(error)}") from None
    for path, state in (("model", values["model"]), ("growth.best", values["growth"].get("best", {}))):
        for name, value in state.items():
            if plain_fault(value) or not (isinstance(value, Tensor) or is_extra_state(name)):
                raise RunError(f"not a checkpoint of this version: {path}.{name}: is of class {type(value).__name__}")
    if fault := plain_fault(dict(values)):
        raise RunError(f"not a checkpoint of this version: {fault}")
