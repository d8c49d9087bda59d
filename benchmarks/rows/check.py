"""Run the rows of a benchmark one after the other, print their table and write their file."""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.rows import packages, report
from benchmarks.rows.earlier import last_file, regressions
from benchmarks.rows.figures import Outcome
from benchmarks.rows.processes import run_limited
from benchmarks.rows.row import Device, Row

ROOT = Path(__file__).parents[2]
_LEAST_SHARE = 0.25
"""A row is skipped if less than this part of its budget is left of the total."""


@dataclass(frozen=True)
class Benchmark:
    """A command that runs rows."""

    name: str
    """Start of the name of its files."""
    module: str
    """Name of the module whose ROWS these are."""
    rows: Mapping[str, Row]
    total_s: float
    """Limit of all rows together, with their default budgets."""
    packages: tuple[str, ...] = ("torch",)
    """Distributions that are named if they are missing, besides those that rows need."""

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        """Add the options of all such commands, and list the rows in the help."""
        listed = "\n".join(f"  {name:<14} {row.budget_s:>4.0f} s  {row.title}" for name, row in self.rows.items())
        parser.formatter_class = argparse.RawDescriptionHelpFormatter
        parser.epilog = f"rows, with their default budgets:\n{listed}"
        parser.add_argument("--rows", nargs="+", choices=tuple(self.rows), metavar="ROW", help="default: all")
        parser.add_argument("--budget-s", type=seconds, metavar="S", help="seconds for each row; default: listed below")
        parser.add_argument("--out", type=Path, default=ROOT / "build", help="folder of the file (default: build)")


@dataclass(frozen=True)
class Check:
    """What all rows of an invocation share."""

    module: str
    device: Device
    size: str
    """"tiny" or "full"."""
    machine: dict[str, Any]
    logs: Path
    end: float
    """Value of `time.monotonic()` at which the total budget is spent."""


def run_all(benchmark: Benchmark, options: argparse.Namespace, device: Device, *, is_tiny: bool) -> int:
    """Run the rows, print the table and write the file; return the exit code: 1 if a row has failed.

    Args:
        benchmark: its rows.
        options: those of `Benchmark.add_options`.
        device: of the networks.
        is_tiny: whether the rows only show that they work.
    """
    names = list(dict.fromkeys(options.rows or benchmark.rows))
    budgets = {name: options.budget_s or benchmark.rows[name].budget_s for name in names}
    stamp = time.strftime("%Y-%m-%d-%H%M%S")
    logs = options.out / f"{benchmark.name}-{stamp}"
    logs.mkdir(parents=True, exist_ok=True)
    total_s = math.inf if options.rows or options.budget_s else benchmark.total_s
    size = "tiny" if is_tiny else "full"
    check = Check(benchmark.module, device, size, machine_facts(), logs, time.monotonic() + total_s)
    print(report.heading(check.machine, is_tiny=is_tiny), flush=True)
    lacking = packages.missing([*benchmark.packages, *(need for name in names for need in benchmark.rows[name].needs)])
    if lacking:
        print(f"missing: {', '.join(lacking)}. Install them:")
        print(f"  {packages.pip_line(lacking, check.machine['torch'], check.machine['cuda'])}")
    file, results = options.out / f"{benchmark.name}-{stamp}.json", dict[str, Any]()
    earlier = None if is_tiny else last_file(options.out, benchmark.name, check.machine)
    for number, name in enumerate(names, start=1):
        begin, row = time.monotonic(), benchmark.rows[name]
        outcome = run_row(check, f"[{number}/{len(names)}] {name}", name, row, budgets[name])
        taken_s = time.monotonic() - begin
        print("\n" + "\n".join(report.row_lines(name, row.title, outcome, taken_s, budgets[name])), flush=True)
        results[name] = {"seconds": round(taken_s, 1), "budget_s": budgets[name], **outcome.to_json()}
        for line in regressions(name, outcome, earlier) if earlier else ():
            print(report.in_red("\n".join(report.wrapped(line, "    "))), flush=True)
        write(file, check, stamp, results, lacking)
    failed = [name for name, result in results.items() if result["failed"]]
    skipped = sum(bool(result["skipped"]) for result in results.values())
    cost_s = sum(result["seconds"] for result in results.values())
    passed = len(results) - len(failed) - skipped
    print(
        f"\n{passed} ok, {len(failed)} failed, {skipped} skipped in {cost_s:.0f} s; load now {os.getloadavg()[0]:.1f}"
    )
    print(f"{file}; the rows' output: {logs}")
    return 1 if failed else 0


def seconds(text: str) -> float:
    """Return a positive number of seconds."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
    return value


def machine_facts() -> dict[str, Any]:
    """Return what `benchmarks.rows.machine` prints: a torch that crashes ends that process and not this one.

    Raises:
        SystemExit: the process fails.
    """
    command = [sys.executable, "-m", "benchmarks.rows.machine"]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{done.stderr}torch cannot be imported, see above")
    facts: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return facts


def environment() -> dict[str, str]:
    """Return the environment of the processes: this checkout comes first."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def run_row(check: Check, label: str, name: str, row: Row, budget_s: float) -> Outcome:
    """Return the outcome of a row, which runs in a process until it ends or takes twice its budget."""
    left_s = check.end - time.monotonic()
    if why := reason_to_skip(check, row):
        return Outcome(skipped=why)
    if left_s < _LEAST_SHARE * budget_s:
        return Outcome(skipped=f"the total budget is spent; run it alone: --rows {name}")
    now = time.monotonic()
    result, log = check.logs / f"{name}.json", check.logs / f"{name}.log"
    until = str(now + min(budget_s, left_s))
    command = [sys.executable, "-m", "benchmarks.rows.child", check.module, name, check.device, until, check.size]
    code = run_limited([*command, str(result)], ROOT, environment(), log, min(2 * budget_s, left_s), label)
    if code is None and left_s < 2 * budget_s:
        return Outcome(skipped=f"stopped because the total budget is spent; run it alone: --rows {name}")
    if code is None:
        return Outcome(failed=f"stopped after twice its budget of {budget_s:g} s; its last output: {last_line(log)}")
    if code or not result.exists():
        return Outcome(failed=f"its process has ended with code {code}: {last_line(log)} ({log})")
    return Outcome.from_json(json.loads(result.read_text(encoding="utf-8")))


def reason_to_skip(check: Check, row: Row) -> str:
    """Return why a row cannot run here, or an empty text."""
    if lacking := packages.missing(row.needs):
        return f"not installed: {', '.join(lacking)}"
    return str(check.machine["no_gpu"]) if check.device == "cuda" else ""


def last_line(log: Path) -> str:
    """Return the last non-empty line of a row's output."""
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "no output")


def write(file: Path, check: Check, stamp: str, rows: dict[str, Any], lacking: list[str]) -> None:
    """Write the file; called again after each row."""
    label = report.NOT_A_MEASUREMENT if check.size == "tiny" else ""
    tree = {
        "date": stamp,
        "device": check.device,
        "note": label,
        "machine": check.machine,
        "load_after": [round(value, 1) for value in os.getloadavg()],
        "missing": lacking,
        "rows": rows,
    }
    partial = file.with_suffix(".part")
    partial.write_text(json.dumps(tree, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, file)
