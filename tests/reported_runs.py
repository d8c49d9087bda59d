"""Small runs for tests of reports: those of tests/unit/golden/report/runs, copied and changed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

STORED = Path(__file__).parent / "unit" / "golden" / "report" / "runs"
"""Both runs named small-seed7 and -seed8, with twins, are finished. The adaptive run `measured` was resumed once, and
stopped before its end."""


def copied(folder: Path, *names: str) -> list[Path]:
    """Copy stored runs into a folder; all of them without names."""
    chosen = names or tuple(sorted(path.name for path in STORED.iterdir()))
    return [Path(shutil.copytree(STORED / name, folder / name)) for name in chosen]


def change_json(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the object in a JSON file."""
    tree = json.loads(path.read_text())
    change(tree)
    path.write_text(json.dumps(tree))


def change_lines(path: Path, change: Callable[[list[dict[str, Any]]], list[dict[str, Any]]]) -> None:
    """Change the objects in a file of JSON lines."""
    lines = change([json.loads(line) for line in path.read_text().splitlines()])
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def long_run(folder: Path, num_records: int) -> Path:
    """Write a run with a record of each of its updates; the loss is 1 + 1/k after k updates, and 9 in one record."""
    source, folder = STORED / "small-seed7", folder / "long"
    folder.mkdir(parents=True)
    plan = json.loads((source / "plan.json").read_text())
    batch, num_samples = plan["phases"][0]["global_batch"], plan["num_samples"]
    phase = {**plan["phases"][0], "num_updates": num_records}
    sizes = {"end_samples": batch * num_records, "num_updates": num_records, "phases": [phase]}
    (folder / "plan.json").write_text(json.dumps({**plan, **sizes}))
    record = json.loads((source / "metrics.jsonl").read_text().splitlines()[0])
    record = {key: record[key] for key in ("kind", "lr", "global_batch", "ranks", "top1", "samples_per_s")}
    with (folder / "metrics.jsonl").open("w") as metrics, (folder / "consumed.jsonl").open("w") as consumed:
        for k in range(1, num_records + 1):
            loss = 9.0 if k == num_records // 3 else 1 + 1 / k
            line = {**record, "samples": k * batch, "updates": k, "epoch": k * batch / num_samples, "loss": loss}
            metrics.write(json.dumps(line) + "\n")
            update = {"samples": (k - 1) * batch, "global_batch": batch, "digest": f"{k:016x}"}
            consumed.write(json.dumps(update) + "\n")
    return folder
