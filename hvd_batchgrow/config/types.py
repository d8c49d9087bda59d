"""Types of the values of a job file, and the base class of its sections."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field


def tuples(value: Any) -> Any:
    """Turn lists into tuples: TOML has only lists, and strict mode rejects a list for a tuple."""
    return tuple(map(tuples, value)) if isinstance(value, list) else value


def numbers(value: Any) -> Any:
    """Turn a list into a tuple, and say of a word in its place that numbers are expected."""
    if isinstance(value, str) and not set(value) & set("0123456789"):
        raise ValueError("must be a list of numbers")
    return tuples(value)


def matching(pattern: str, meaning: str) -> AfterValidator:
    """Return a validator that accepts the texts that match a pattern, and describes them in its error."""

    def check(text: str) -> str:
        if re.fullmatch(pattern, text):
            return text
        raise ValueError(f"must be {meaning}")

    return AfterValidator(check)


RunName = Annotated[
    str,
    matching("[A-Za-z0-9][A-Za-z0-9._-]{0,199}", "a name of at most 200 letters, digits, dots, dashes and underscores"),
]
"""Name of a run and its folder. The length leaves room for suffixes within the limit of file systems."""
NamePattern = Annotated[str, Field(min_length=1, max_length=1000)]
"""Pattern of parameter names, in the syntax of `fnmatch`."""
PositiveInt = Annotated[int, Field(gt=0)]
NumRanks = Annotated[int, Field(gt=0, le=1 << 20)]
"""The limit is above any cluster's size, and small enough to loop over."""
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Price = Annotated[float, Field(ge=0, allow_inf_nan=False)]
"""Price of one rank-hour, in any currency."""
Margin = Annotated[float, Field(gt=0, lt=1e9)]
"""Largest difference of two results that does not matter."""
FiniteSeconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Probability = Annotated[float, Field(ge=0, le=1)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
FloatList = Annotated[tuple[PositiveFloat, ...], BeforeValidator(numbers)]


class Section(BaseModel):
    """Base class of all sections: frozen, no unknown keys, no implicit conversion, no NaN."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
