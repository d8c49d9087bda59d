"""Call functions in parallel, so that one that fails or hangs does not affect the others."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from hvd_batchgrow.doctor.check import Facts


def gather(parts: Mapping[str, Callable[[], Facts]], deadline_s: float) -> dict[str, Facts]:
    """Return the results of functions by name.

    Args:
        parts: functions by name. Each runs in a daemon thread: one that hangs, for example on a file system that does
            not answer, does not keep this process from ending.
        deadline_s: time for all of them, in seconds.

    Returns:
        the facts of each part; `{"error": ...}` if the function raised an exception or has not returned in time.
    """
    found: dict[str, Facts] = {}

    def call(name: str, function: Callable[[], Facts]) -> None:
        try:
            found[name] = function()
        except Exception as error:  # the report shows it
            found[name] = {"error": error_text(error)}

    threads = [threading.Thread(target=call, args=part, name=part[0], daemon=True) for part in parts.items()]
    for thread in threads:
        thread.start()
    end = time.monotonic() + deadline_s
    for thread in threads:
        thread.join(max(0.0, end - time.monotonic()))
    late = {"error": f"no answer within {deadline_s:g} s"}
    return {name: found.get(name, late) for name in parts}


def error_text(error: BaseException) -> str:
    """Return an exception as one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def facts_of(found: Mapping[str, Facts], name: str) -> dict[str, Any]:
    """Return the facts of a part; an error if it was not checked."""
    return dict(found.get(name, {"error": "not checked"}))
