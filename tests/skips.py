"""Which tests ran in none of the pytest runs of tools/test.sh, and why.

    export PYTEST_PLUGINS=tests.skips HVD_BATCHGROW_TEST_OUTCOMES=FILE     every pytest adds its tests' outcomes to FILE
    python -m tests.skips FILE                                             one line about all of them

A test that is skipped on one rank and passes on two has run.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pytest


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Append one line of JSON per test that passed or was skipped: [test, reason], without a reason if it passed."""
    stats = terminalreporter.stats
    ran = [[report.nodeid, None] for report in stats.get("passed", []) if report.when == "call"]
    skipped = [[report.nodeid, _reason(report)] for report in stats.get("skipped", [])]
    with Path(os.environ["HVD_BATCHGROW_TEST_OUTCOMES"]).open("a") as file:
        file.writelines(json.dumps(outcome) + "\n" for outcome in ran + skipped)


def _reason(report: pytest.TestReport) -> str:
    # (path, line, "Skipped: why"); an expected failure is represented by a string
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return reason.removeprefix("Skipped: ")


def summary(outcomes: Iterable[tuple[str, str | None]]) -> str:
    """Return "0 tests skipped", or their number and, for each reason, how many tests it held back.

    Args:
        outcomes: (test, reason it was skipped for; None if it ran), of any number of runs.
    """
    reasons: dict[str, str] = {}
    ran = set()
    for test, reason in outcomes:
        if reason is None:
            ran.add(test)
        else:
            reasons[test] = reason
    counts = Counter(reason for test, reason in reasons.items() if test not in ran).most_common()
    total = f"{sum(count for _, count in counts)} tests skipped"
    return ": ".join([total, "; ".join(f"{count} × {reason}" for reason, count in counts)]) if counts else total


if __name__ == "__main__":
    print(summary(json.loads(line) for line in Path(sys.argv[1]).read_text().splitlines()))
