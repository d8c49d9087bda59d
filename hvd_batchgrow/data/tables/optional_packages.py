"""Packages of the extra `tables`, imported on first use."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from hvd_batchgrow.messages.errors import RunError


def need(module: str, package: str) -> Any:
    """Import a module of the extra `tables`. Raise RunError, naming the extra, if it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        remedy = "pip install 'hvd_batchgrow[tables]'"
        raise RunError(f"{package} is needed for this source and cannot be imported ({error}): {remedy}") from None


def arrow_path(path: Path) -> str:
    """Return a path in the form that pyarrow accepts. Raise RunError if it is not UTF-8, which pyarrow cannot open."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise RunError(f"{path} cannot be read: its name is not UTF-8; rename it") from None
    return str(path)
