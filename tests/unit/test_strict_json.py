"""What the package writes is JSON for every reader: without NaN and Infinity."""

from __future__ import annotations

import ast
import json
import math
from pathlib import Path
from typing import Any

import pytest

import hvd_batchgrow
from hvd_batchgrow.schedule.adaptive.decisions import Decision, decisions_text
from hvd_batchgrow.storage.json_lines import JsonLines, read_json_lines
from hvd_batchgrow.storage.strict_json import dump_json, json_bytes

ROOT = Path(hvd_batchgrow.__file__).parent
TREE: dict[str, Any] = {"samples": 1, "loss": math.nan, "high": [math.inf, (-math.inf, 0.5)], "name": "NaN"}
AS_JSON = {"samples": 1, "loss": None, "high": [None, [None, 0.5]], "name": "NaN"}


def strictly(text: str | bytes) -> Any:
    def refuse(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_numbers_that_are_not_finite_are_null() -> None:
    assert strictly(dump_json(TREE)) == AS_JSON
    assert strictly(dump_json(TREE, indent=2)) == AS_JSON
    assert strictly(json_bytes(TREE)) == AS_JSON
    measured = {"loss": math.nan}
    decision = Decision(16, "plateau", "", 16, 32, 32.0, 0.1, 0.1, measured=measured)
    assert strictly(decisions_text(None, [decision]).splitlines()[0])["measured"] == {"loss": None}


def test_lines_are_strict_and_those_of_earlier_versions_become_so(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"samples": 1, "loss": NaN}\n{"samples": 2, "loss": -Infinity}\n')
    JsonLines(path, lambda line: True).append(TREE)
    assert [strictly(line)["loss"] for line in path.read_text().splitlines()] == [None, None, None]
    assert [line["loss"] for line in read_json_lines(path)] == [None, None, None]


def writers(tree: ast.AST) -> list[str]:
    return [
        ast.unparse(node.func)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) in {"json.dumps", "json.dump", "dumps", "dump"}
    ]


# Their text is hashed as the name of a cache, from paths and whole numbers alone.
HASHED = {"data/images/image_folder.py", "data/images/shards.py"}


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_only_one_place_writes_json(path: Path) -> None:
    name = str(path.relative_to(ROOT))
    found = writers(ast.parse(path.read_text()))
    assert not found or name in {"storage/strict_json.py", *HASHED}, found


def test_the_search_for_writers_finds_them() -> None:
    assert writers(ast.parse("import json\njson.dump(1, f)\njson.dumps([float('nan')])")) == ["json.dump", "json.dumps"]
