"""The file of a ledger: JSON of a format, in the folder `slurm` of what was submitted."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from hvd_batchgrow.messages.errors import RunError, first_fault, unreadable, unwritable
from hvd_batchgrow.storage.atomic import write_atomically
from hvd_batchgrow.storage.regular_files import read_regular
from hvd_batchgrow.storage.strict_json import json_bytes

FOLDER = "slurm"
"""Subfolder of a run folder with the ledger, the batch scripts, their job file and their logs."""
LEDGER = "ledger.json"
_FORMAT = 1
_T = TypeVar("_T")


def write_ledger_file(folder: Path, values: Mapping[str, Any]) -> None:
    """Write the ledger of a folder atomically. Raises RunError if it cannot be written."""
    path = folder / FOLDER / LEDGER
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json_bytes({"format": _FORMAT, **values}))
    except OSError as error:
        raise unwritable(path, error) from None


def read_ledger_file(folder: Path, adapter: TypeAdapter[_T]) -> _T | None:
    """Return the ledger of a folder; None if the folder has no ledger.

    Args:
        folder: a run folder, or that of branches.
        adapter: of the values that `write_ledger_file` was given.

    Raises:
        RunError: the ledger cannot be read, or is of another format.
    """
    path = folder / FOLDER / LEDGER
    try:
        tree = json.loads(read_regular(path))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise unreadable(path, error) from None
    found = tree.pop("format", None) if isinstance(tree, dict) else None
    if isinstance(found, int) and found != _FORMAT:
        raise RunError(f"{path} is of format {found}, this version reads {_FORMAT}")
    try:
        return adapter.validate_python(tree)
    except ValidationError as error:
        raise RunError(f"{path} cannot be read: {first_fault(error)}") from None
