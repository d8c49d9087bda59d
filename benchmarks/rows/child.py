"""The process of one row: python -m benchmarks.rows.child ROWS ROW DEVICE UNTIL SIZE RESULT."""

from __future__ import annotations

import json
import os
import sys
from importlib import import_module
from pathlib import Path

from benchmarks.rows.figures import Outcome
from benchmarks.rows.row import Settings, Skip


def main() -> None:
    """Run the row, and write its outcome to the file RESULT. An exception ends the process with its traceback."""
    rows, name, device, until, size, result = sys.argv[1:]
    settings = Settings("cpu" if device == "cpu" else "cuda", float(until), is_tiny=size == "tiny")
    try:
        row = import_module(rows).ROWS[name]
        outcome: Outcome = import_module(row.module).run(name, settings)
    except Skip as skip:
        outcome = Outcome(skipped=str(skip))
    partial = Path(f"{result}.part")
    partial.write_text(json.dumps(outcome.to_json()), encoding="utf-8")
    os.replace(partial, result)


if __name__ == "__main__":
    main()
