"""Put the tables and figures of the studies into pages of the documentation."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.paper.figures import svg_files
from benchmarks.paper.studies.study import QUIET, Table
from benchmarks.paper.tables import Runs, markdown, runs_of
from benchmarks.paper.training import ROOT
from hvd_batchgrow.messages.wording import counted
from hvd_batchgrow.storage.atomic import write_atomically


def write_table(table: Table, runs: Runs, docs: Path) -> int:
    """Write a table and its figures into its page, which is created if necessary; return the number of runs in it.

    Args:
        table: what to write.
        runs: those of its study.
        docs: folder of the pages; figures are written to its folder figures.
    """
    pictures = svg_files(table, runs) if table.with_figures else {}
    (docs / "figures").mkdir(parents=True, exist_ok=True)
    for name, content in pictures.items():
        write_atomically(docs / "figures" / name, content)
    page = docs / table.page
    text = page.read_text() if page.exists() else f"# Results\n\n{_first(table.name)}{_last(table.name)}"
    count = sum(len(runs_of(table, name, runs)) for name in table.rows)
    lines = [markdown(table, runs), *_figures(list(pictures)), *_origin(table, runs, docs)]
    block = "\n".join(lines) if count else "Not trained yet."
    write_atomically(page, replace_block(text, table.name, block).encode())
    return count


def _figures(names: list[str]) -> list[str]:
    return [f"\n![{name.removesuffix('.svg').replace('-', ' ')}](figures/{name})" for name in names]


def _origin(table: Table, runs: Runs, docs: Path) -> Iterator[str]:
    """Return the job of each row, and where its runs were trained."""
    if table.margin is None:
        return
    yield "\n<details><summary>Jobs, machine and commit</summary>\n"
    rows = {name: list(found.values()) for name in table.rows if (found := runs_of(table, name, runs))}
    for name in rows:
        arm = table.rows[name]
        changes = {key: value for key, value in {**table.study.changes, **arm.changes}.items() if key not in QUIET}
        said = " with " + ", ".join(f"`{key} = {value}`" for key, value in changes.items()) if changes else ""
        twin = "the twin of " if name != arm.name else ""
        yield f"- `{name}`: {twin}[{arm.job}]({os.path.relpath(ROOT / arm.job, docs)}){said}"
    attempts = [attempt for found in rows.values() for run in found for attempt in run.attempts]
    yield from (f"- {said}" for said in dict.fromkeys(map(_machine, attempts)))
    yield "\n</details>"


def _machine(attempt: Mapping[str, Any]) -> str:
    """Return where and from which commit an invocation trained."""
    packages, commit = attempt["packages"], str(attempt["git_commit"])[:7]
    changed = ", with changes" if attempt.get("git_diff") else ""
    return (
        f"{attempt['hardware']['device']}; {counted(attempt['ranks'], 'rank')}, Python {attempt['python']}, "
        f"torch {packages['torch']}; commit {commit}{changed}"
    )


def replace_block(page: str, name: str, block: str) -> str:
    """Return a page in which a block replaces what is between its two marks.

    Raises:
        ValueError: the page lacks the marks.
    """
    first, last = _first(name), _last(name)
    if first not in page or last not in page:
        raise ValueError(f"the page lacks the marks of table {name}")
    before, _, rest = page.partition(first)
    return f"{before}{first}{block}\n{last}{rest.partition(last)[2]}"


def _first(name: str) -> str:
    return f"<!-- table {name}: python -m benchmarks.paper write -->\n"


def _last(name: str) -> str:
    return f"<!-- end of table {name} -->\n"
