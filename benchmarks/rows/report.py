"""The table of 80 columns. Only Python's standard library is imported here."""

from __future__ import annotations

import os
import statistics
import sys
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.rows.figures import Group, Outcome

WIDTH = 80
NOT_A_MEASUREMENT = "On a CPU, with tiny networks and sizes: these figures only show that the rows work."


def heading(machine: Mapping[str, Any], *, is_tiny: bool) -> str:
    """Return lines about the machine."""
    torch = f"torch {machine['torch']}" if machine["torch"] else "no torch"
    gpu = machine["gpu"] or "no GPU"
    if machine["gpu"]:
        gpu += f", {machine['gpu_memory_gib']} GiB, driver {machine['driver']}, CUDA {machine['cuda']}, "
        gpu += f"cuDNN {machine['cudnn']}, NCCL {machine['nccl']}; in use before: {machine['gpu_use']}"
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    software = f"{torch}, {versions}, Python {machine['python']}; hvd_batchgrow {machine['commit'] or 'unknown commit'}"
    load = f"{machine['cores']} cores, load {' '.join(map(str, machine['load']))} (1, 5, 15 minutes) before"
    lines = [gpu, software, load, *([NOT_A_MEASUREMENT] if is_tiny else [])]
    return "\n".join(line for text in lines for line in wrapped(text))


def row_lines(name: str, title: str, outcome: Outcome, seconds: float, budget_s: float) -> Iterator[str]:
    """Yield the lines of a row: its verdict, its cost, its notes and its figures."""
    verdict = "FAILED" if outcome.failed else "skipped" if outcome.skipped else "ok"
    cost = "" if outcome.skipped else f", {seconds:.0f} s of {budget_s:.0f} s"
    yield from wrapped(f"{name}: {verdict}{cost}: {outcome.failed or outcome.skipped or title}")
    for group in outcome.groups:
        yield from group_lines(group)
    for note in outcome.notes:
        yield from wrapped(note, "    ")


def group_lines(group: Group) -> Iterator[str]:
    """Yield a heading and a line for each figure."""
    yield from wrapped(f"{group.title}: {group.unit}", "  ")
    turns = max(len(figure.values) for figure in group.figures)
    if turns == 1:
        for figure in group.figures:
            yield f"    {figure.name:<30}{number(figure.values[0]):>9}"
        return
    ratio = f"× {group.reference}" if group.reference else ""
    yield f"    {f'n = {turns} turns':<29}{'median':>9} {'least … most':>17}  {ratio:>18}".rstrip()
    for figure in group.figures:
        spread = f"{number(min(figure.values))} … {number(max(figure.values))}"
        ratio = ""
        if figure.ratios:
            low, high = min(figure.ratios), max(figure.ratios)
            ratio = f"{statistics.median(figure.ratios):.2f} ({low:.2f}–{high:.2f})"
        yield f"    {figure.name:<29}{number(statistics.median(figure.values)):>9} {spread:>17}  {ratio:>18}".rstrip()


def in_red(text: str) -> str:
    """Return a text in red for a terminal, and unchanged elsewhere and with NO_COLOR."""
    return f"\x1b[31m{text}\x1b[0m" if sys.stdout.isatty() and not os.environ.get("NO_COLOR") else text


def number(value: float) -> str:
    """Return a number with about three digits: 1,234 or 12.3 or 0.123 or 1.23M."""
    if abs(value) >= 999_950:
        return f"{value / 1e6:,.2f}M"
    if abs(value) >= 99.95 or value == int(value):
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 9.995 else f"{value:.2f}" if abs(value) >= 0.9995 else f"{value:.3f}"


def wrapped(text: str, indent: str = "") -> list[str]:
    """Return lines of at most 80 columns; further lines are indented."""
    return textwrap.wrap(text, WIDTH, initial_indent=indent, subsequent_indent=f"{indent}    ", break_on_hyphens=False)
