"""Packages of the extra `tables`, imported when they are used."""

from __future__ import annotations

import importlib
from typing import Any

from hvd_batchgrow.messages.errors import RunError


def need(module: str, package: str) -> Any:
    """Import a module of the extra `tables`. Raises RunError naming the extra where it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        remedy = "pip install 'hvd_batchgrow[tables]'"
        raise RunError(f"{package} is needed for this source and cannot be imported ({error}): {remedy}") from None
