"""Write the tables of sources, networks and tasks into the reference pages, from what each file registers.

python tools/reference_tables.py        `make format` runs it; tests/unit/test_docs.py compares
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hvd_batchgrow.config.model_specs import all_models
from hvd_batchgrow.config.source_specs import SOURCES
from hvd_batchgrow.config.task_specs import TASKS

DOCS = Path(__file__).parents[1] / "docs"


def with_rows(page: str, heading: str, rows: Sequence[str]) -> str:
    """Return a page in which these rows replace those of a table, except its rows of the user's own module.

    Args:
        page: its text.
        heading: start of the table's first line.
        rows: the start of each row; columns after it are kept, or left open in a new row.
    """
    before, _, table = page.partition(heading)
    head, rule, *lines = table.split("\n")
    num_rows = next(k for k, line in enumerate(lines) if not line.startswith("| `"))
    known = {line.split(" | ")[0]: line for line in lines[:num_rows]}
    own = [line for name, line in known.items() if "module:" in name]
    num_columns = rule.count("|") - 1
    written = []
    for row in rows:
        kept = known.get(row.split(" | ")[0], "").split(" | ")[row.count(" | ") + 1 :]
        open_columns = ["–"] * (num_columns - row.count(" | ") - 1)
        written.append(" | ".join([row, *(kept or [*open_columns, ""])]).rstrip(" |") + " |")
    return before + heading + "\n".join([head, rule, *written, *own, *lines[num_rows:]])


def main() -> None:
    """Write the tables."""
    sources = [f"| `{spec.name}` | {spec.doc} | {' or '.join(spec.kinds)}" for spec in SOURCES.specs()]
    models = [f"| `{spec.name}` | {spec.doc}" for spec in all_models() if "module:" not in spec.name]
    tasks = [f"| `{spec.name}` | {spec.doc}" for spec in TASKS.specs()]
    for name, heading, rows in (
        ("data.md", "| `data.source` |", sources),
        ("job-file.md", "| `model.name` |", models),
        ("job-file.md", "| `task.name` |", tasks),
    ):
        page = DOCS / name
        page.write_text(with_rows(page.read_text(), heading, rows))


if __name__ == "__main__":
    main()
