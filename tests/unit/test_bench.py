"""`python -m benchmarks.cpu`: contestants in processes that take turns, rows, and the comparison with the last file."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from benchmarks.cpu.contestant import Contestant, closing_all
from benchmarks.cpu.rows import ROWS, TOTAL_S
from benchmarks.rows.earlier import last_file, regressions
from benchmarks.rows.figures import Outcome, compare

ROOT = Path(__file__).parents[2]
COUNTING = """
import itertools, sys, threading, time
from benchmarks.cpu.contestant import serve
beats = open("beats", "w")
def beat():
    while True:
        beats.write("x"); beats.flush(); time.sleep(0.01)
threading.Thread(target=beat, daemon=True).start()
done = open("turns", "a")
serve(lambda: print("worked", file=done, flush=True))
"""
MACHINE = {"host": "a", "cpu": "c", "cores": 2, "gpu": None}


def counting(folder: Path) -> Contestant:
    return Contestant([sys.executable, "-c", COUNTING], {}, folder, samples=7)


def test_a_contestant_works_in_its_turns_only_and_is_suspended_between_them(tmp_path: Path) -> None:
    with closing_all() as started:
        started["it"] = contestant = counting(tmp_path)
        turns, beats = tmp_path / "turns", tmp_path / "beats"
        assert turns.read_text() == ""
        assert [contestant.turn(), contestant.turn()] == [7, 7]
        assert turns.read_text().count("worked") == 2
        before = beats.read_text()
        subprocess.run(["sleep", "0.3"], check=True)
        assert beats.read_text() == before  # no thread of it runs
        assert 2**20 < contestant.peak_memory()[0] < 2**32
        process = contestant._process
    assert process.poll() is not None


def test_a_contestant_that_fails_is_an_error_with_its_last_output(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import sys; sys.exit('it is broken')"]
    with pytest.raises(RuntimeError, match="has ended with code 1: it is broken"):
        Contestant(command, {}, tmp_path, samples=1)


def test_each_row_has_a_module_and_the_budgets_fit_the_total() -> None:
    assert all(find_spec(row.module) for row in ROWS.values())
    assert sum(row.budget_s for row in ROWS.values()) <= TOTAL_S


def outcome(unit: str, ratio: float) -> Outcome:
    return Outcome([compare("title", unit, {"peer": [1.0, 2.0, 4.0], "ours": [ratio, 2 * ratio, 4 * ratio]}, "peer")])


def tree(rows: Mapping[str, Outcome], note: str = "", **machine: Any) -> dict[str, Any]:
    return {
        "date": "before",
        "note": note,
        "machine": MACHINE | machine,
        "rows": {name: one.to_json() for name, one in rows.items()},
    }


@pytest.mark.parametrize(
    ("unit", "before", "now", "is_worse"),
    [
        ("samples/s", 1.20, 1.15, False),
        ("samples/s", 1.20, 1.14, True),
        ("samples/s", 1.20, 1.30, False),
        ("s", 1.00, 1.04, False),
        ("s", 1.00, 1.06, True),
        ("MiB", 1.00, 0.50, False),
    ],
)
def test_a_ratio_that_is_worse_by_more_than_a_twentieth_is_reported(
    unit: str, before: float, now: float, is_worse: bool
) -> None:
    found = list(regressions("row", outcome(unit, now), tree({"row": outcome(unit, before)})))
    expected = f"worse than on before: title, ours: × {now:.2f} of peer instead of × {before:.2f}"
    assert found == ([expected] if is_worse else [])


def test_a_row_without_earlier_figures_or_without_own_ones_is_not_compared() -> None:
    earlier = tree({"row": outcome("s", 1.0)})
    assert not list(regressions("other", outcome("s", 2.0), earlier))
    assert not list(regressions("row", Outcome(skipped="no package"), earlier))
    assert not list(regressions("row", outcome("s", 2.0), tree({"row": Outcome(failed="broken")})))


def test_the_newest_whole_file_of_the_same_machine_is_found(tmp_path: Path) -> None:
    def write(name: str, content: str) -> None:
        (tmp_path / name).write_text(content)

    assert last_file(tmp_path, "bench", MACHINE) is None
    write("bench-1.json", json.dumps(tree({"old": outcome("s", 1.0)})))
    write("bench-2.json", json.dumps(tree({"row": outcome("s", 1.0)})))
    write("bench-3.json", json.dumps(tree({"tiny": outcome("s", 1.0)}, note="tiny sizes")))
    write("bench-4.json", json.dumps(tree({"elsewhere": outcome("s", 1.0)}, cpu="another")))
    write("bench-5.json", "{")
    write("gpu-check-9.json", json.dumps(tree({"gpu": outcome("s", 1.0)})))
    found = last_file(tmp_path, "bench", MACHINE)
    assert found is not None
    assert list(found["rows"]) == ["row"]


@pytest.mark.slow
def test_a_row_of_tiny_size_works(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.cpu", "--tiny", "--rows", "memory", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = tmp_path.glob("bench-*.json")
    result = json.loads(file.read_text())["rows"]["memory"]
    assert (result["failed"], result["skipped"]) == ("", "")
    for group in result["groups"]:
        assert {figure["name"] for figure in group["figures"]} > {"hvd_batchgrow"}
        assert all(min(figure["values"]) > 2**4 for figure in group["figures"])
