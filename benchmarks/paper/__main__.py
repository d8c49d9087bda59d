"""Train the studies and write their tables: see `benchmarks.paper`."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from benchmarks.paper.studies import STUDIES, TABLES
from benchmarks.paper.tables import markdown, read_runs, replace_table
from benchmarks.paper.training import ROOT, Trainer, tasks_of

RESULTS = ROOT / "docs/results"


def main() -> int:
    """Do what the command line asks for; return the exit code."""
    options = parse()
    if options.command == "write":
        return write(options.results)
    studies = [STUDIES[name] for name in options.studies or STUDIES]
    tasks = list(tasks_of(studies, options.seeds))
    missing = [task for task in tasks if not task.is_kept(options.results)]
    print(f"{len(tasks) - len(missing)} of {len(tasks)} tasks are in {options.results}", flush=True)
    return 1 if Trainer(options.work, options.results).train_all(missing, options.at_a_time) else 0


def write(results: Path) -> int:
    """Write the tables of all studies into their pages."""
    for table in TABLES:
        runs = read_runs(table.study, results)
        page = ROOT / "docs" / table.page
        page.write_text(replace_table(page.read_text(), table.name, markdown(table, runs)))
        print(f"{page.relative_to(ROOT)}: table {table.name} of {len(runs)} runs")
    return 0


def parse() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.paper", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="train what the folder of results does not have yet")
    train.add_argument("studies", nargs="*", metavar="STUDY", help=f"{', '.join(STUDIES)}; by default all")
    train.add_argument("--seeds", nargs="+", type=int, default=[], help="these instead of the studies' own")
    train.add_argument("--work", type=Path, default=ROOT / "build/paper", help="folder for run folders")
    train.add_argument("--at-a-time", type=int, default=len(os.sched_getaffinity(0)), help="runs side by side")
    write = commands.add_parser("write", help="write the tables into docs/")
    for command in (train, write):
        command.add_argument("--results", type=Path, default=RESULTS, help="folder for the records that are kept")
    options = parser.parse_args()
    unknown = set(getattr(options, "studies", ())) - STUDIES.keys()
    if unknown:
        parser.error(f"there is no study {', '.join(sorted(unknown))}; choose from {', '.join(STUDIES)}")
    return options


if __name__ == "__main__":
    sys.exit(main())
