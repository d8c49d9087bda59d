"""Decisions on record that a run must not follow: another job's, and those that follow a failed replay check."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from hvd_batchgrow.cli import main
from hvd_batchgrow.schedule.adaptive.decisions import read_decisions
from hvd_batchgrow.train.checkpoints.checkpoint import checkpoint_paths
from hvd_batchgrow.train.checkpoints.checkpoint_names import saved_samples
from hvd_batchgrow.train.replay_failure import write_failure
from hvd_batchgrow.verification.digest import compare_weights, final_weights
from tests.helpers import enter_with_job, measured_tree

pytestmark = pytest.mark.slow

RUN = Path("runs/small")
RECORD = RUN / "decisions.jsonl"


def enter(folder: Path, monkeypatch: pytest.MonkeyPatch, **sections: Any) -> None:
    enter_with_job(folder, measured_tree("data", {"name": "norm_test"}, **sections), monkeypatch)


def test_a_run_without_a_checkpoint_does_not_follow_decisions_of_another_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    enter(tmp_path, monkeypatch, schedule={"epochs": 1.0})
    assert main(["train", "job.toml"]) == 0
    assert len(RECORD.read_text().splitlines()) > 0
    shutil.rmtree(RUN / "checkpoints")  # as after a kill before the first one
    other = ["--seed", "99", "--trigger.theta", "0.9"]
    assert main(["train", "job.toml", "--resume", "auto", *other]) == 0
    note = f"removed {RECORD}: these settings have changed since its decisions: seed, trigger.theta"
    assert note in capsys.readouterr().err
    assert main(["train", "job.toml", "--name", "fresh", *other]) == 0
    fresh = Path("runs/fresh")
    assert not RECORD.exists()
    assert not (fresh / "decisions.jsonl").exists()
    assert compare_weights(final_weights(RUN), final_weights(fresh)) == "bit-identical"


def test_a_run_without_a_checkpoint_follows_the_decisions_of_the_same_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    enter(tmp_path, monkeypatch, schedule={"epochs": 1.0})
    assert main(["train", "job.toml"]) == 0
    first = json.loads(RECORD.read_text().splitlines()[0]) | {"why": "as an attempt with other ranks decided"}
    RECORD.write_text(json.dumps(first) + "\n")
    shutil.rmtree(RUN / "checkpoints")
    assert main(["train", "job.toml", "--resume", "auto"]) == 0
    assert json.loads(RECORD.read_text().splitlines()[0]) == first


def test_a_run_does_not_follow_decisions_and_branches_since_a_failed_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    often = {"checks": {"replay_every": 5}, "checkpoint": {"every_epochs": 0.2, "keep": 100}}
    enter(tmp_path, monkeypatch, schedule={"epochs": 4.0}, **often)
    assert main(["train", "job.toml"]) == 0
    good = shutil.copytree(RUN, Path("runs/good"))
    source, decisions = read_decisions(RECORD)
    assert source is None
    assert len(decisions) > 1
    # Wrong numbers have led to another second decision. The checkpoints from there on are removed, as the error says.
    first, second = (decision.samples for decision in decisions[:2])
    lines = RECORD.read_text().splitlines()[:2]
    RECORD.write_text(
        lines[0] + "\n" + json.dumps(json.loads(lines[1]) | {"new_batch": 96, "wanted_batch": 96.0}) + "\n"
    )
    last = max(samples for samples in saved_samples(RUN / "checkpoints") if first <= samples < second)
    for path in checkpoint_paths(RUN / "checkpoints"):
        if path.stem > f"samples-{last:015d}":
            path.unlink()
    write_failure(RUN, "rank 1 is wrong", second + 96, last)
    trusted, suspect = (RUN / f"branches/at-{samples}-for-512-linear" for samples in (last, second))
    for folder in (trusted, suspect):
        folder.mkdir(parents=True)
    capsys.readouterr()
    assert main(["train", "job.toml", "--resume", "auto"]) == 0
    error = capsys.readouterr().err
    since = f"after sample {last:,}: a replay check has failed since"
    assert f"removed 1 decision {since}" in error
    assert f"removed {suspect}, {since}" in error
    assert trusted.exists()
    assert not suspect.exists()
    assert not (RUN / "failed_check.json").exists()
    assert RECORD.read_text() == (good / "decisions.jsonl").read_text()
    assert compare_weights(final_weights(RUN), final_weights(good)) == "bit-identical"
