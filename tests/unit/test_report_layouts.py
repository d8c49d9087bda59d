"""`report`: what a phase and a transition were trained with, in forks and in runs with several layouts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hvd_batchgrow.reports.build import build_document
from hvd_batchgrow.reports.document import Document, Paragraph, Table
from tests.reported_runs import change_json, change_lines, copied

Lines = list[dict[str, Any]]


def rows(document: Document, name: str) -> list[dict[str, Any]]:
    (table,) = (table for table in document.blocks(Table) if table.name == name)
    return [dict(row) for row in table.rows]


def records(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[[Lines], Lines]:
    """Return what changes the training records of metrics.jsonl."""
    return lambda lines: [{**line, **(change(line) if line["kind"] == "train" else {})} for line in lines]


@pytest.fixture
def fork(tmp_path: Path) -> Path:
    """A run whose plan has the learning rates 0.05, 0.05, 0.0333 and 0.0111; its origin had 0.2 and 0.1 up to the
    third phase, which begins at sample 304."""
    (run,) = copied(tmp_path, "small-seed7")

    def before(line: dict[str, Any]) -> dict[str, Any]:
        return {"lr": 0.2} if line["samples"] <= 160 else {"lr": 0.1} if line["samples"] <= 304 else {}

    change_lines(run / "metrics.jsonl", records(before))
    origin = {"run": "/data/base-seed7", "samples": 304, "changed": {"optim.lr": [0.1, 0.05]}}

    def fork_record(record: dict[str, Any]) -> None:
        record["forked_from"] = origin
        record["attempts"][0]["start_samples"] = 304

    change_json(run / "record.json", fork_record)
    return run


def test_the_time_line_of_a_fork_has_what_was_trained_before_it(fork: Path) -> None:
    """The defect: the rates of the new job were shown from the start, and the fork was not an event."""
    events = [(event["samples"], event["event"], event["detail"]) for event in rows(build_document([fork]), "events")]
    found = [event for event in events if event[1] in {"forked", "transition"}]
    assert found == [
        (160, "transition", "B 16 → 48, ε 0.2 → 0.1, passes 1 → 3"),
        (304, "forked", "continues base-seed7; optim.lr was 0.1"),
        (304, "transition", "B 48 → 96, ε 0.1 → 0.03333, passes 3 → 6"),
        (496, "transition", "ε 0.03333 → 0.01111"),
    ]


def test_the_phases_of_a_fork_have_the_rates_of_the_records(fork: Path) -> None:
    document = build_document([fork])
    assert [row["lr"] for row in rows(document, "phases")] == pytest.approx([0.2, 0.1, 1 / 30, 1 / 90])
    said = "small-seed7 continues base-seed7 from sample 304: before it, ε and m are those of the records."
    assert said in [block.text for block in document.blocks(Paragraph)]


def test_a_fork_does_not_start_at_a_raised_learning_rate(fork: Path, tmp_path: Path) -> None:
    (other,) = copied(tmp_path, "small-seed8")
    change_json(fork / "plan.json", lambda plan: plan["phases"][0].update(lr=0.5))
    titles = [section.title for section in build_document([fork, other]).sections]
    assert "Raised learning rate and momentum" not in titles
    change_json(fork / "record.json", lambda record: record.pop("forked_from"))
    titles = [section.title for section in build_document([fork, other]).sections]
    assert "Raised learning rate and momentum" in titles


def test_a_phase_has_the_layouts_that_trained_it(tmp_path: Path) -> None:
    """The defect: all phases had the layout of the last invocation."""
    (run,) = copied(tmp_path, "small-seed7")

    def on_three_ranks(line: dict[str, Any]) -> dict[str, Any]:
        return {"ranks": 3, "accumulation": 1} if 160 < line["samples"] <= 256 else {}

    change_lines(run / "metrics.jsonl", records(on_three_ranks))
    document = build_document([run])
    # 48 samples on 3 ranks in one pass are micro-batches of 16; later records have the plan's layout.
    layouts = ["1 × 1 × 16", "3 × 1 × 16, then 1 × 3 × 16", "1 × 6 × 16", "1 × 6 × 16"]
    assert [row["layout"] for row in rows(document, "phases")] == layouts
    (first, second, _) = [event["detail"] for event in rows(document, "events") if event["event"] == "transition"]
    assert first == "B 16 → 48, ranks 1 → 3"
    assert second == "B 48 → 96, ε 0.05 → 0.03333, passes 3 → 6"


def test_a_micro_batch_that_is_not_on_record_is_not_shown(tmp_path: Path) -> None:
    (run,) = copied(tmp_path, "small-seed7")
    change_lines(run / "metrics.jsonl", records(lambda _: {"ranks": 5, "accumulation": 1}))
    assert [row["layout"] for row in rows(build_document([run]), "phases")] == ["5 × 1"] * 4
    change_lines(run / "metrics.jsonl", records(lambda _: {"ranks": None}))
    assert rows(build_document([run]), "phases")[1]["layout"] == "1 × 3 × 16"  # the plan's
