"""Which evaluation is the best, and which files of earlier bests are kept."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hvd_batchgrow.messages.errors import RunError
from hvd_batchgrow.train.checkpoints.best import best_path, improved, remove_superseded
from hvd_batchgrow.train.checkpoints.checkpoint import Checkpoint, newest_good, write_best, write_checkpoint
from hvd_batchgrow.train.events import Evaluation
from tests.training import bytes_of
from tests.unit.test_checkpoint import make

A, B, C = 100, 200, 300


def recorded(*samples: int) -> dict[str, Any]:
    return {"metric": "val/top1", "value": 0.5, "samples": list(samples)} if samples else {}


def write(folder: Path, samples: int, bests: Sequence[int], keep: int = 2) -> None:
    write_checkpoint(folder, replace(make(samples), best=recorded(*bests)), keep, ())


def kept(folder: Path) -> list[int]:
    return sorted(int(path.stem[5:]) for path in folder.glob("best-*.pt"))


@pytest.mark.parametrize(
    ("metric", "results", "bests"),
    [
        ("val/top1", [(0.9, 0.1), (0.8, 0.3), (0.7, 0.2), (0.6, 0.3), (0.5, 0.4)], [1, 2, 5]),
        ("val/loss", [(0.9, 0.1), (0.8, 0.3), (0.85, 0.9), (0.8, 0.9), (0.5, 0.0)], [1, 2, 5]),
        ("val/top1", [(math.nan, 0.9), (0.8, 0.3), (math.inf, 0.95)], [2]),
    ],
)
def test_an_evaluation_is_the_best_if_it_is_better_than_all_before(
    metric: str, results: list[tuple[float, float]], bests: list[int]
) -> None:
    best: dict[str, Any] = {}
    for samples, (loss, top1) in enumerate(results, start=1):
        evaluation = Evaluation(samples, 0.0, loss, {"top1": top1}, dataset="validation")
        best = improved(best, metric, "down" if metric == "val/loss" else "up", evaluation) or best
    assert best["samples"] == bests
    assert best["value"] == results[bests[-1] - 1][metric == "val/top1"]


def test_a_superseded_best_is_kept_until_no_checkpoint_can_need_it(tmp_path: Path) -> None:
    write_best(tmp_path, make(A))
    write(tmp_path, A, [A])
    write_best(tmp_path, make(B))
    write(tmp_path, B, [A, B])
    # If the newest checkpoint is damaged, the run resumes from A, where A was the best.
    assert kept(tmp_path) == [A, B]
    (tmp_path / f"samples-{B:015d}.pt").write_bytes(b"damaged")
    checkpoint, _ = newest_good(tmp_path)
    assert checkpoint is not None
    path = best_path(tmp_path, checkpoint.best)
    assert path is not None
    assert Checkpoint.from_bytes(path.read_bytes()).samples == A
    write(tmp_path, B, [A, B])
    write(tmp_path, C, [A, B])
    assert kept(tmp_path) == [B]


def test_the_best_is_kept_for_good(tmp_path: Path) -> None:
    write_best(tmp_path, make(A))
    for samples in range(A, 20 * A, A):
        write(tmp_path, samples, [A], keep=1)
    assert kept(tmp_path) == [A]


def test_the_file_of_a_killed_attempt_goes_when_the_run_has_passed_it(tmp_path: Path) -> None:
    write_best(tmp_path, make(A))
    write(tmp_path, A, [A])
    write_best(tmp_path, make(C))  # killed before a checkpoint recorded it
    write(tmp_path, B, [A])
    assert kept(tmp_path) == [A, C]
    write(tmp_path, C, [A])  # this time the evaluation at C was not the best
    assert kept(tmp_path) == [A]


def test_a_job_that_keeps_no_best_removes_none(tmp_path: Path) -> None:
    write_best(tmp_path, make(A))
    write(tmp_path, B, [])
    write(tmp_path, C, [])
    assert kept(tmp_path) == [A]


def test_no_run_resumes_from_the_file_of_the_best(tmp_path: Path) -> None:
    write_best(tmp_path, make(C))
    write(tmp_path, B, [])
    checkpoint, skipped = newest_good(tmp_path)
    assert checkpoint is not None
    assert (checkpoint.samples, skipped) == (B, [])


def test_a_best_that_cannot_be_written_is_reported_with_its_path(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"best-000000000000100\.pt could not be written: No such file"):
        write_best(tmp_path / "missing", make(A))


@pytest.mark.parametrize("best", [{"metric": "val/top1"}, recorded() | {"metric": 1, "value": 0.5, "samples": [1]}])
def test_a_record_of_the_best_that_is_not_one_is_refused(best: dict[str, Any]) -> None:
    with pytest.raises(RunError, match=r"best"):
        Checkpoint.from_bytes(bytes_of(replace(make(), best=best)))


def test_a_superseded_best_that_is_already_gone_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [tmp_path / f"best-{samples:015d}.pt" for samples in (8, 16)]
    names[1].touch()
    monkeypatch.setattr(Path, "glob", lambda *_: iter(names))  # a listing that is older than a removal
    remove_superseded(tmp_path, recorded(8, 16), [16])
    assert list(tmp_path.iterdir()) == [names[1]]
