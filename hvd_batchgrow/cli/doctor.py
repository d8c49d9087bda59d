"""`hvd-batchgrow doctor`."""

from __future__ import annotations

import os
import shutil
import textwrap
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hvd_batchgrow.cli.common import refuse_overrides
from hvd_batchgrow.comm.launcher_env import is_first_process, launched_by, launched_ranks, unconnected_tasks
from hvd_batchgrow.doctor.check import Check, fail
from hvd_batchgrow.doctor.checkup import has_failed, machine_checks
from hvd_batchgrow.doctor.gather import error_text
from hvd_batchgrow.messages.errors import ExitCode
from hvd_batchgrow.messages.wording import counted
from hvd_batchgrow.storage.strict_json import dump_json

CONNECT_TIMEOUT_S = 180.0
"""Time in which the ranks must connect and finish their checks."""
_NAME_WIDTH = 15


@dataclass(frozen=True)
class DoctorCommand:
    """Check Python, torch, MPI, Horovod, DALI, GPUs, NCCL, Slurm, disks, file locks and, under mpirun, the ranks."""

    runs_dir: Path = Path("runs")
    """Folder that holds the run folders: check its free space, writes and locks."""
    json: bool = False
    """Print one JSON object."""

    def run(self, overrides: dict[str, Any]) -> ExitCode:
        """Print to stdout. Return 1 if a check failed; missing optional parts do not count."""
        refuse_overrides(overrides)
        report = _Report(self.json and is_first_process(os.environ), is_first_process(os.environ))
        report.add(machine_checks(self.runs_dir))
        if launched_by(os.environ) or unconnected_tasks(os.environ):
            report.add(_checks_of_ranks(report))
        return report.end()


class _Report:
    """The checks so far, printed immediately, or at the end as JSON.

    Args:
        as_json: print JSON.
        is_printed: whether this process prints.
    """

    def __init__(self, as_json: bool, is_printed: bool) -> None:
        self._as_json, self._is_printed = as_json, is_printed
        self.checks: list[Check] = []

    def add(self, checks: Sequence[Check]) -> None:
        self.checks += checks
        if self._is_printed and not self._as_json:
            print(table_text(checks, shutil.get_terminal_size((80, 24)).columns), flush=True)

    def end(self) -> ExitCode:
        code = ExitCode.FAILURE if has_failed(self.checks) else ExitCode.DONE
        if self._is_printed:
            print(json_text(self.checks) if self._as_json else summary(self.checks), flush=True)
        return code


def _checks_of_ranks(report: _Report) -> list[Check]:
    """Connect the ranks and check them; if one does not connect in time, print the report and end this process."""
    rank, size = launched_ranks(os.environ)
    broken = next((check for check in report.checks if check.name == "torch" and check.status == "fail"), None)
    if broken:  # importing torch might end this process
        return [fail("ranks", f"not checked, because rank {rank} cannot use torch")]

    def give_up() -> None:
        why = f"{launched_by(os.environ)} has started {size} ranks, but they have not all connected"
        remedy = "check the network and firewall between the hosts, and that each host has this Python environment"
        report.add([fail("ranks", f"{why} within {CONNECT_TIMEOUT_S:g} s", remedy)])
        report.end()
        os._exit(ExitCode.FAILURE)

    timer = threading.Timer(CONNECT_TIMEOUT_S, give_up)
    timer.daemon = True
    timer.start()
    try:
        return _connected_checks(report.checks)
    except Exception as error:  # report any failure of a backend
        return [fail("ranks", str(error).strip() or error_text(error), "docs/launching.md")]
    finally:
        timer.cancel()


def _connected_checks(checks: Sequence[Check]) -> list[Check]:
    from hvd_batchgrow.comm.backend import connect
    from hvd_batchgrow.comm.ranks import CollectiveError
    from hvd_batchgrow.doctor.rank_checks import check_ranks

    ranks = connect()
    try:
        found = check_ranks(ranks, checks)
    except CollectiveError as failure:
        found = [fail("ranks", str(failure.error or "another rank reports an error"))]
    ranks.close()
    return found


def table_text(checks: Sequence[Check], width: int) -> str:
    """Return checks as lines of status, name and what was found, wrapped at a width; remedies follow an arrow."""
    lines = []
    for check in checks:
        head = f"{check.status:<5} {check.name:<{_NAME_WIDTH}} "
        lines += _wrapped(head, check.found, width)
        if check.remedy:
            lines += _wrapped(" " * (len(head) - 2) + "→ ", check.remedy, width)
    return "\n".join(lines)


def _wrapped(head: str, text: str, width: int) -> list[str]:
    # Paths and commands are not broken, so that they can be copied.
    indent = " " * min(len(head), _NAME_WIDTH + 7)
    words = textwrap.TextWrapper(
        max(width, 40), initial_indent=head, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )
    return words.wrap(" ".join(text.split())) or [head.rstrip()]


def summary(checks: Sequence[Check]) -> str:
    """Return the last line of a report."""
    counts = Counter(check.status for check in checks)
    numbers = f"{counted(counts['note'], 'note')}, {counts['ok']} ok"
    if counts["fail"]:
        return f"{counted(counts['fail'], 'check')} failed ({numbers}): see the lines that begin with fail"
    return f"no check failed ({numbers})"


def json_text(checks: Sequence[Check]) -> str:
    """Return checks as one JSON object."""
    return dump_json({"passed": not has_failed(checks), "checks": [check.to_dict() for check in checks]}, indent=2)
