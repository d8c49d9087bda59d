"""Import packages in a separate process, which may crash or hang."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

from hvd_batchgrow.comm.launcher_env import without_launcher
from hvd_batchgrow.doctor.check import Facts


def imported_facts(parts: Sequence[str], timeout_s: float) -> dict[str, Facts]:
    """Return the facts of parts of `import_child.py`.

    If the process crashes in a part, that part has an error, and a new process continues with the next one. If it
    hangs until no time is left, it is killed, and the parts after it have an error too.

    Args:
        parts: imported in this order, in one process if nothing goes wrong.
        timeout_s: time for all processes together, in seconds.
    """
    found: dict[str, Facts] = {}
    deadline = time.monotonic() + timeout_s
    while left := [part for part in parts if part not in found]:
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            late = f"not imported: other imports took {timeout_s:g} s"
            return found | {part: {"error": late} for part in left}
        lines, how = _run(left, left_s)
        begun = left[0]
        for part, facts in lines:
            begun = part
            if facts is not None:
                found[part] = facts
        if how and begun not in found:
            found[begun] = {"error": how}
        elif begun not in found:
            found[begun] = {"error": "its import ended the process without a report"}
    return found


def _run(parts: Sequence[str], timeout_s: float) -> tuple[list[tuple[str, Facts | None]], str]:
    """Return what the process reported, and how it ended; empty if it succeeded."""
    # The variables of the launcher would make this process a rank.
    environment = without_launcher(os.environ)
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "hvd_batchgrow.doctor.import_child", *parts],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        env=environment,
    )
    how = ""
    try:
        output, errors = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, errors = process.communicate()
        how = f"its import did not finish within {math.ceil(timeout_s)} s"
    if not how and process.returncode:
        lines = errors.decode(errors="replace").strip().splitlines()
        how = "; ".join([f"its import ended the process ({_ending(process.returncode)})", *lines[-1:]])
    reported = [json.loads(line) for line in output.decode().splitlines() if line.endswith("]")]
    return [(part, facts) for part, facts in reported], how


def _ending(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"
