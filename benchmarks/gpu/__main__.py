"""Check and measure this package on a machine with a GPU, within 8 minutes and without a network.

    make gpu-check                                          all rows
    python -m benchmarks.gpu --rows ghost_norm wrn          only these
    python -m benchmarks.gpu --device cpu                   tiny sizes on a CPU: shows that the rows work

Each row is a process with a time budget. A row whose packages, GPU or time are missing is skipped with the reason.
The table is printed, and written with all values of all turns to a dated JSON file, which also has the versions of
driver, CUDA, torch and packages. Exit code: 0 if no row failed, otherwise 1.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu import packages, report
from benchmarks.gpu.figures import Outcome
from benchmarks.gpu.processes import run_limited
from benchmarks.gpu.rows import ROWS, TOTAL_S, Row

ROOT = Path(__file__).parents[2]
_LEAST_SHARE = 0.25
"""A row is skipped if less than this part of its budget is left of the total."""


@dataclass(frozen=True)
class Check:
    """What all rows of a check share."""

    device: str
    machine: dict[str, Any]
    logs: Path
    end: float
    """Value of `time.monotonic()` at which the total budget is spent."""


def main() -> int:
    """Run the rows, print the table and write the file; return the exit code."""
    options = parse()
    names = list(dict.fromkeys(options.rows or ROWS))
    budgets = {name: options.budget_s or ROWS[name].budget_s for name in names}
    stamp = time.strftime("%Y-%m-%d-%H%M%S")
    logs = options.out / f"gpu-check-{stamp}"
    logs.mkdir(parents=True, exist_ok=True)
    total_s = math.inf if options.rows or options.budget_s else TOTAL_S
    check = Check(options.device, machine_facts(), logs, time.monotonic() + total_s)
    print(report.heading(check.machine, check.device), flush=True)
    lacking = packages.missing(["torch", "triton", *(need for name in names for need in ROWS[name].needs)])
    if lacking:
        print(f"missing: {', '.join(lacking)}. Install them:")
        print(f"  {packages.pip_line(lacking, check.machine['torch'], check.machine['cuda'])}")
    file = options.out / f"gpu-check-{stamp}.json"
    results: dict[str, Any] = {}
    for number, name in enumerate(names, start=1):
        begin = time.monotonic()
        outcome = run_row(check, f"[{number}/{len(names)}] {name}", name, ROWS[name], budgets[name])
        seconds = time.monotonic() - begin
        print("\n" + "\n".join(report.row_lines(name, ROWS[name].title, outcome, seconds, budgets[name])), flush=True)
        results[name] = {"seconds": round(seconds, 1), "budget_s": budgets[name], **outcome.to_json()}
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


def parse() -> argparse.Namespace:
    """Parse the command line."""
    listed = "\n".join(f"  {name:<14} {row.budget_s:>4.0f} s  {row.title}" for name, row in ROWS.items())
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"rows, with their default budgets:\n{listed}",
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: tiny sizes (default: cuda)")
    parser.add_argument("--rows", nargs="+", choices=tuple(ROWS), metavar="ROW", help="default: all")
    parser.add_argument("--budget-s", type=seconds, metavar="S", help="seconds for each row; default: listed below")
    parser.add_argument("--out", type=Path, default=ROOT / "build", help="folder of the file (default: build)")
    return parser.parse_args()


def seconds(text: str) -> float:
    """Return a positive number of seconds."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
    return value


def machine_facts() -> dict[str, Any]:
    """Return the facts of `benchmarks.gpu.machine`, from a process, so that a torch that crashes does not end this one.

    Raises:
        SystemExit: the process fails.
    """
    command = [sys.executable, "-m", "benchmarks.gpu.machine"]
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
    command = [sys.executable, "-m", "benchmarks.gpu.child", name, check.device, until, str(result)]
    code = run_limited(command, ROOT, environment(), log, min(2 * budget_s, left_s), label)
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
    """Return the last line of a row's output that is not empty."""
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "no output")


def write(file: Path, check: Check, stamp: str, rows: dict[str, Any], lacking: list[str]) -> None:
    """Write the file, after each row again."""
    label = report.NOT_A_MEASUREMENT if check.device == "cpu" else ""
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


if __name__ == "__main__":
    sys.exit(main())
