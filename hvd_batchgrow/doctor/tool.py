"""Run a command-line tool that may be missing, fail or hang."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Sequence

from hvd_batchgrow.comm.launcher_env import without_launcher
from hvd_batchgrow.doctor.check import Facts
from hvd_batchgrow.messages.errors import reason_of

TOOL_TIMEOUT_S = 10.0


def tool_facts(words: Sequence[str], timeout_s: float = TOOL_TIMEOUT_S) -> Facts:
    """Run a tool; if it does not finish in time, kill it and its children.

    Args:
        words: the command and its arguments.
        timeout_s: time for it, in seconds.

    Returns:
        `path` (None if it is not on PATH), `code` (its exit code) and `output` (stdout and stderr); or `path` and
        `error`.
    """
    path = shutil.which(words[0])
    if path is None:
        return {"path": None}
    try:
        # A separate process group, because its children could keep the pipe open.
        process = subprocess.Popen(
            [path, *words[1:]],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=without_launcher(os.environ),
        )
    except OSError as error:
        return {"path": path, "error": f"{path} cannot be run: {reason_of(error)}"}
    try:
        output, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return {"path": path, "error": f"{path} did not finish within {timeout_s:g} s"}
    return {"path": path, "code": process.returncode, "output": output.decode(errors="replace").strip()}


def first_line(text: str) -> str:
    """Return the first line of an output; empty without one."""
    return next(iter(text.splitlines()), "").strip()
