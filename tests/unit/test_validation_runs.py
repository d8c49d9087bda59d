"""Whole runs with a validation set, from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hvd_batchgrow.cli import main
from hvd_batchgrow.train.checkpoints.checkpoint import newest_good
from hvd_batchgrow.verification.audit import audit, read_consumed
from hvd_batchgrow.verification.digest import compare_weights, final_weights

SPLIT = ("--data.validation_fraction", "0.1")
BEST = ("--checkpoint.keep_best", "val/loss")


def train(*words: str) -> int:
    return main(["train", "small.toml", *words])


def best_of(run: str) -> list[str]:
    return sorted(path.name for path in Path("runs", run, "checkpoints").glob("best-*"))


def test_a_stopped_run_resumes_with_the_same_split_and_ends_with_the_same_weights(
    job: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(*SPLIT, *BEST, "--name", "whole") == 0
    assert train(*SPLIT, *BEST, "--max-updates", "12") == 75
    assert train(*SPLIT, *BEST, "--resume", "auto") == 0
    whole, small = (final_weights(Path("runs", name)) for name in ("whole", "small"))
    assert compare_weights(whole, small) == "bit-identical"
    assert audit(read_consumed(small.run), lambda *_: None).passed
    assert read_consumed(small.run).num_samples == 270
    assert best_of("small") == best_of("whole")
    # The file with the largest number is that of the lowest validation loss on record.
    lines = [json.loads(line) for line in Path("runs/small/metrics.jsonl").read_text().splitlines()]
    results = {line["loss"]: line["samples"] for line in lines if line.get("dataset") == "validation"}
    assert best_of("small")[-1] == f"best-{results[min(results)]:015d}.pt"
    assert [line["samples"] for line in lines if line.get("dataset") == "test"] == [small.samples]
    assert f"best val/loss {min(results):.4f} at sample {results[min(results)]:,}" in capsys.readouterr().err


def test_a_resume_or_fork_with_another_split_is_refused(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(*SPLIT, "--max-updates", "3") == 75
    other = ("--data.validation_fraction", "0.2")
    capsys.readouterr()
    assert train(*other, "--resume", "auto") == 1
    error = capsys.readouterr().err
    assert "data.validation_fraction: was 0.1, is 0.2" in error
    assert "data.num_validation: was 30, is 60" in error
    assert train("--fork", "other", *other) == 1
    error = capsys.readouterr().err
    assert "cannot be forked with a change of\n  data.num_samples: was 270, is 240" in error
    assert "data.validation_fraction: was 0.1, is 0.2" in error
    assert train("--fork", "none") == 1
    assert "data.validation_fraction: was 0.1, is 0.0" in capsys.readouterr().err


def test_a_resume_on_another_draw_is_refused(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(*SPLIT, "--max-updates", "3") == 75
    path = Path("runs/small/record.json")
    record = json.loads(path.read_text())
    assert record["data"]["validation"]["num_samples"] == 30
    record["data"]["validation"]["sha256"] = "0" * 64
    path.write_text(json.dumps(record))
    assert train(*SPLIT, "--resume", "auto") == 1
    assert "was trained on data with another meaning:\n  validation: " in capsys.readouterr().err


def test_a_fork_selects_among_its_own_results(job: str) -> None:
    assert train(*SPLIT, *BEST, "--evaluation.every_epochs", "0.5", "--max-updates", "14") == 75
    assert best_of("small")
    assert train("--fork", "gentler", *SPLIT, *BEST, "--optim.lr", "0.02", "--max-updates", "1") == 75
    checkpoint, _ = newest_good(Path("runs/gentler/checkpoints"))
    assert checkpoint is not None
    assert checkpoint.best["samples"] == [checkpoint.samples]  # without those of the original run
    assert best_of("gentler") == [f"best-{checkpoint.samples:015d}.pt"]


def test_keep_best_may_change_at_a_resume(job: str) -> None:
    words = (*SPLIT, "--evaluation.every_epochs", "0.5")
    assert train(*words, *BEST, "--max-updates", "14") == 75
    assert train(*words, "--checkpoint.keep_best", "val/top1", "--resume", "auto") == 0
    checkpoint, _ = newest_good(Path("runs/small/checkpoints"))
    assert checkpoint is not None
    assert checkpoint.best["metric"] == "val/top1"
    assert checkpoint.best["samples"][0] > 160  # the first evaluation after the resume


@pytest.mark.slow
def test_verify_uses_the_remaining_samples(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "small.toml", *SPLIT, "--updates", "2"]) == 0
    assert "agrees" in capsys.readouterr().out
