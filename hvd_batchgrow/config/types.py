"""What the values of a job file are made of, and what all its sections share."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


def tuples(value: Any) -> Any:
    """TOML has lists only; strict mode would refuse to take one for a tuple."""
    return tuple(map(tuples, value)) if isinstance(value, list) else value


NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,199}$"
"""Of a run, and so of its folder and of files beside it, to whose names more is added: few enough for file systems."""
PositiveInt = Annotated[int, Field(gt=0)]
NumRanks = Annotated[int, Field(gt=0, le=1 << 20)]
"""More than anyone has, and few enough to be counted through."""
PositiveFloat = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
FloatList = Annotated[tuple[PositiveFloat, ...], BeforeValidator(tuples)]


class Section(BaseModel):
    """What all sections share: frozen, no unknown key, no silent conversion, no NaN."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
