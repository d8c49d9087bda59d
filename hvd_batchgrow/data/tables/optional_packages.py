"""Packages of the extra `tables`, imported on first use."""

from __future__ import annotations

import importlib
from typing import Any

from hvd_batchgrow.messages.errors import RunError


def need(module: str, package: str) -> Any:
    """Import a module of the extra `tables`. Raise RunError, naming the extra, if it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        remedy = "pip install 'hvd_batchgrow[tables]'"
        raise RunError(f"{package} is needed for this source and cannot be imported ({error}): {remedy}") from None
