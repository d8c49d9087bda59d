"""Functions that torch.compile does not trace."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar, cast

import torch

P = ParamSpec("P")
R = TypeVar("R")


def eager(function: Callable[P, R]) -> Callable[P, R]:
    """Exclude a function from torch.compile, and what it calls.

    `torch.compiler.disable` alone would import the compiler, which takes longer than importing torch.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling():
            return cast(R, torch.compiler.disable(function)(*args, **kwargs))
        return function(*args, **kwargs)

    return call
