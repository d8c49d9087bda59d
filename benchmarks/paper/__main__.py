"""Train the studies and write their tables: see `benchmarks.paper`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from benchmarks.paper import wall_time
from benchmarks.paper.pages import replace_block, write_table
from benchmarks.paper.studies import STUDIES, TABLES, fashion_mnist
from benchmarks.paper.studies.study import Study, Table
from benchmarks.paper.tables import check_jobs, read_runs
from benchmarks.paper.training import ROOT, Trainer, tasks_of
from hvd_batchgrow.messages.wording import counted
from hvd_batchgrow.storage.atomic import write_atomically

RESULTS = ROOT / "docs/results"
Named = TypeVar("Named", Study, Table)


def main() -> int:
    """Do what the command line asks for; return the exit code."""
    options = parse()
    if options.command == "write":
        tables = selected(TABLES, options.names)
        studies = {table.study.name: table.study for table in tables}
        runs = {name: read_runs(study, options.results) for name, study in studies.items()}
        for name, study in studies.items():
            check_jobs(study, runs[name])
        for table in tables:
            count = write_table(table, runs[table.study.name], options.docs)
            print(f"{options.docs / table.page}: table {table.name} of {counted(count, 'run')}")
        if not options.names and wall_time.RECORD.exists():
            page = options.docs / fashion_mnist.PAGE
            block = wall_time.markdown(json.loads(wall_time.RECORD.read_text()))
            write_atomically(page, replace_block(page.read_text(), "wall_time", block).encode())
        return 0
    tasks = list(tasks_of(selected(STUDIES, options.names), options.seeds))
    if options.arms:
        tasks = [task for task in tasks if task.arm.name in options.arms]
    missing = [task for task in tasks if not task.is_kept(options.results)]
    print(f"{len(tasks) - len(missing)} of {len(tasks)} tasks are in {options.results}", flush=True)
    return 1 if Trainer(options.work, options.results).train_all(missing, options.at_a_time) else 0


def selected(found: Sequence[Named], names: Sequence[str]) -> list[Named]:
    """Return studies or tables by name; without names, all but those of `make paper-quick`."""
    return [one for one in found if (one.name in names if names else one.name != "quick")]


def parse() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.paper", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="train what the folder of results does not have yet")
    write = commands.add_parser("write", help="write tables and figures into pages")
    for command, kind, known in ((train, "STUDY", STUDIES), (write, "TABLE", TABLES)):
        names = ", ".join(one.name for one in known)
        command.add_argument("names", nargs="*", metavar=kind, help=f"{names}; by default all but quick")
        command.add_argument("--results", type=Path, default=RESULTS, help="folder for the records that are kept")
    train.add_argument("--seeds", nargs="+", type=int, default=[], help="these instead of the studies' own")
    train.add_argument("--arms", nargs="+", default=[], help="only these arms of the studies")
    train.add_argument("--work", type=Path, default=ROOT / "build/paper", help="folder for run folders")
    train.add_argument("--at-a-time", type=int, default=len(os.sched_getaffinity(0)), help="runs side by side")
    write.add_argument("--docs", type=Path, default=ROOT / "docs", help="folder of the pages")
    options = parser.parse_args()
    found = TABLES if options.command == "write" else STUDIES
    if unknown := set(options.names) - {one.name for one in found}:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; choose from {', '.join(one.name for one in found)}")
    if options.command == "train":
        arms = list(dict.fromkeys(arm.name for study in selected(STUDIES, options.names) for arm in study.arms))
        if unknown := set(options.arms) - set(arms):
            parser.error(f"no such arm: {', '.join(sorted(unknown))}; choose from {', '.join(arms)}")
    return options


if __name__ == "__main__":
    sys.exit(main())
