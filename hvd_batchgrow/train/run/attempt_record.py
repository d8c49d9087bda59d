"""The entry of an attempt in record.json."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from hvd_batchgrow.comm.ranks import CollectiveError, RanksLost
from hvd_batchgrow.messages.errors import RunError
from hvd_batchgrow.storage.atomic import write_atomically
from hvd_batchgrow.storage.regular_files import read_regular
from hvd_batchgrow.storage.strict_json import json_bytes

_MOST_CHARACTERS = 300


def add_to_last_attempt(path: Path, values: Mapping[str, Any]) -> None:
    """Add values to the last entry of `attempts`. A record that is missing or damaged stays as it is.

    Raises:
        OSError: it cannot be written.
    """
    try:
        record = json.loads(read_regular(path))
        record["attempts"][-1].update(values)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return
    write_atomically(path, json_bytes(record))


@contextmanager
def error_recorded(folder: Path) -> Iterator[None]:
    """If the attempt ends with an error, add its first line to `record.json` as `error`; rank 0 only."""
    try:
        yield
    except RanksLost:  # the next attempt of an elastic job continues here
        raise
    except Exception as error:
        with suppress(OSError):  # the user must see the original error
            add_to_last_attempt(folder / "record.json", {"error": _first_line(error)})
        raise


def _first_line(error: Exception) -> str:
    if isinstance(error, CollectiveError) and error.error is None:
        return "an error on another rank"
    text = str(error) if isinstance(error, (RunError, CollectiveError)) else f"{type(error).__name__}: {error}"
    line = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text.strip().partition("\n")[0])
    return line if len(line) <= _MOST_CHARACTERS else f"{line[:_MOST_CHARACTERS]}…"
