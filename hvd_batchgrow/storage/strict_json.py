"""Strict JSON (RFC 8259), which every reader accepts: it has no NaN and no Infinity."""

from __future__ import annotations

import json
import math
from typing import Any


def dump_json(value: Any, indent: int | None = None, *, sort_keys: bool = False) -> str:
    """Return a value as JSON; a number that is not finite becomes null.

    Python's own `json.dumps` writes NaN and Infinity, which jq, JavaScript, Go and pandas' C reader reject. Only
    this function calls it.
    """
    return json.dumps(_finite(value), indent=indent, sort_keys=sort_keys, allow_nan=False)


def json_bytes(tree: Any) -> bytes:
    """Return the content of an indented JSON file."""
    return (dump_json(tree, indent=2) + "\n").encode()


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else value
