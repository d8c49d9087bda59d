"""The package's rooms: what each may import of the others, also within functions."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import hvd_batchgrow

ROOT = Path(hvd_batchgrow.__file__).parent
ORDER = (
    *(
        "messages",
        "import_string",
        "storage",
        "comm",
        "interrupt",
        "config",
        "schedule",
        "data",
        "nn",
        "optim",
        "slurm",
    ),
    *("job_file", "train", "verification", "observers", "library", "cli"),
)
"""Each knows none but those before it."""


def imported(room: str) -> Iterator[list[str]]:
    """Every module that a file of the room imports, in parts."""
    for path in [ROOT / f"{room}.py"] if (ROOT / f"{room}.py").exists() else sorted((ROOT / room).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                yield from (alias.name.split(".") for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                yield (node.module or "").split(".")


@pytest.mark.parametrize("room", ORDER)
def test_a_room_knows_only_those_before_it(room: str) -> None:
    ours = [parts for parts in imported(room) if parts[0] == "hvd_batchgrow"]
    # Names of networks are checked where a job is read; that file imports nothing of its room.
    others = [parts for parts in ours if parts[1:] != ["nn", "known"]]
    assert [parts for parts in others if not {*parts[1:2]} <= {*ORDER[: ORDER.index(room) + 1]}] == []


def test_every_file_is_in_a_room() -> None:
    found = {path.stem for path in ROOT.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert found == {"__init__", *ORDER}


@pytest.mark.parametrize("room", ["config", "schedule", "slurm"])
def test_what_is_planned_knows_neither_torch_nor_horovod(room: str) -> None:
    assert not {"torch", "horovod"} & {parts[0] for parts in imported(room)}
