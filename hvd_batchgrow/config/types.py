"""Types of the values of a job file, and the base class of its sections."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


def tuples(value: Any) -> Any:
    """Turn lists into tuples: TOML has only lists, and strict mode rejects a list for a tuple."""
    return tuple(map(tuples, value)) if isinstance(value, list) else value


NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,199}$"
"""Name of a run and its folder. The length leaves room for suffixes within the limit of file systems."""
PositiveInt = Annotated[int, Field(gt=0)]
NumRanks = Annotated[int, Field(gt=0, le=1 << 20)]
"""The limit is above any cluster's size, and small enough to loop over."""
PositiveFloat = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
FloatList = Annotated[tuple[PositiveFloat, ...], BeforeValidator(tuples)]


class Section(BaseModel):
    """Base class of all sections: frozen, no unknown keys, no implicit conversion, no NaN."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
