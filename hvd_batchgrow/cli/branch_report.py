"""What `branch` prints: what the branches would cost, and how they compare."""

from __future__ import annotations

import io
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hvd_batchgrow.cli.branch_setup import branch_costs
from hvd_batchgrow.messages.errors import RunError
from hvd_batchgrow.observers.branch_tables import branch_cost_table, branching_table
from hvd_batchgrow.observers.console import PlainConsole
from hvd_batchgrow.observers.console_tables import print_table
from hvd_batchgrow.results.branching import Branching, compare_branches, read_branch
from hvd_batchgrow.storage.atomic import write_file
from hvd_batchgrow.storage.strict_json import json_bytes
from hvd_batchgrow.train.checkpoints.checkpoint_names import saved_samples
from hvd_batchgrow.train.run.branch_folders import BranchSetup

_SPARE: Sequence[str] = ("lr", "updates", "not\nworse")
"""Columns that a narrow terminal can do without."""


def costs_tree(setup: BranchSetup, probe: Path | None) -> dict[str, Any]:
    """Return what each branch would cost, as plain values. Raises as `branch_costs`."""
    costs, notes = branch_costs(setup, probe)
    return {**setup.to_dict(), "branches": [cost.to_dict() for cost in costs], "notes": notes}


def print_costs(console: PlainConsole, setup: BranchSetup, probe: Path | None) -> None:
    """Print what each branch would cost. Raises as `branch_costs`."""
    costs, notes = branch_costs(setup, probe)
    _print_lines(console, setup.lines())
    print_table(console, branch_cost_table(costs))
    _print_lines(console, notes)


def compare(setup: BranchSetup, tolerance: float | None) -> Branching:
    """Compare finished branches. Raises RunError."""
    start = setup.point.samples
    records = [read_branch(branch.folder, branch.factor, start) for branch in setup.branches]
    return compare_branches(records, setup.wanted.block, tolerance)


def comparison_tree(setup: BranchSetup, found: Branching) -> dict[str, Any]:
    """Return a comparison as plain values."""
    return {**setup.to_dict(), **found.to_dict()}


def print_comparison(console: PlainConsole, setup: BranchSetup, found: Branching) -> None:
    """Print what the branches have shown; the critical batch comes last."""
    _print_lines(console, setup.lines())
    print_table(console, branching_table(found), _SPARE)
    _print_lines(console, [*found.explanation(setup.wanted.block), found.verdict()])


def store_comparison(setup: BranchSetup, found: Branching) -> None:
    """Write a comparison to `table.txt` and `table.json` in the folder of the branches. Raises RunError."""
    console = PlainConsole(io.StringIO(), 140)
    print_comparison(console, setup, found)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    write_file(setup.folder / "table.txt", text.encode())
    write_file(setup.folder / "table.json", json_bytes(comparison_tree(setup, found)))


def refuse_unfinished(setup: BranchSetup, words: Sequence[str]) -> None:
    """Raise RunError if branches are not finished, with how far they are and how to continue.

    Args:
        setup: the branches.
        words: arguments of `branch` for these branches.
    """
    left = [branch for branch in setup.branches if not branch.is_done]
    if not left:
        return
    end = setup.point.samples + setup.wanted.num_samples
    lines = []
    for branch in left:
        at = max(saved_samples(branch.folder / "checkpoints"), default=None)
        state = "has not begun" if at is None else f"has a checkpoint at sample {at:,} of {end:,}"
        lines.append(f"k = {branch.factor} {state}")
    raise RunError(
        "\n  ".join(
            [
                f"{len(left)} of {len(setup.branches)} branches in {setup.folder} are not finished:",
                *lines,
                "to train them, repeat the submit command, which submits only these, or run",
                shlex.join(["hvd-batchgrow", "branch", *words]),
            ]
        )
    )


def _print_lines(console: PlainConsole, lines: Sequence[str]) -> None:
    for line in lines:
        console.print(line, soft_wrap=True)
