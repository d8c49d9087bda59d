"""tests/gpu by pytest: on a GPU without the forms for the CPU, and on a CPU those that are fast."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree  # pytest has just written the file

from benchmarks.rows.figures import Figure, Group, Outcome
from benchmarks.rows.row import Settings

ROOT = Path(__file__).parents[2]
_COMPILED_ELSEWHERE = "tests/gpu/test_kernels_compile.py"
"""It needs no GPU, and takes a minute."""


def run(name: str, settings: Settings) -> Outcome:
    """Run the tests, and count them."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-v", "--color=no", "-p", "no:cacheprovider", "-p", "no:logging"]
        command += ["--tb=short", f"--junit-xml={report}", f"--basetemp={folder}/tests"]
        command += [
            "-k",
            "cpu_form and not compiled" if settings.is_tiny else "not cpu_form",
            f"--ignore={_COMPILED_ELSEWHERE}",
        ]
        code = subprocess.run([*command, "tests/gpu"], cwd=ROOT, check=False).returncode
        if not report.exists():
            return Outcome(failed=f"pytest has ended with code {code} and has written no report")
        return outcome_of(report, code)


def reason_of(skipped: ElementTree.Element) -> str:
    """Return why a test was skipped; of a whole file, the reason is the end of a tuple as text."""
    message = skipped.get("message", "")
    return (skipped.text or "").rpartition("Skipped: ")[2].rstrip("')") if message == "collection skipped" else message


def outcome_of(report: Path, code: int) -> Outcome:
    """Return the counts in a report, and the names of the tests that failed."""
    cases = list(ElementTree.parse(report).getroot().iter("testcase"))  # noqa: S314
    skipped = [found for case in cases if (found := case.find("skipped")) is not None]
    bad = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    counts = {"passed": len(cases) - len(skipped) - len(bad), "failed": len(bad), "skipped": len(skipped)}
    group = Group("number of tests", "tests", [Figure(label, [float(count)]) for label, count in counts.items()])
    reasons = Counter(reason_of(found) for found in skipped)
    notes = [f"{count} skipped: {reason}" for reason, count in reasons.most_common()]
    names = [f"{case.get('classname', '')}::{case.get('name', '')}" for case in bad]
    if not counts["passed"] and not bad:
        return Outcome([group], skipped=f"no test ran: {'; '.join(notes) or f'pytest has ended with code {code}'}")
    if code and not bad:
        names = [f"pytest has ended with code {code}"]
    return Outcome([group], notes, failed="; ".join(names))
