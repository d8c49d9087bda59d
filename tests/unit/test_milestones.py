"""Checkpoints that are kept where decisions move the boundaries of the learning rate."""

from __future__ import annotations

from pathlib import Path

import pytest

from hvd_batchgrow.comm.ranks import SingleRank
from hvd_batchgrow.schedule.adaptive.decisions import Decision, decisions_text
from hvd_batchgrow.schedule.plan import compile_plan
from hvd_batchgrow.train import trainer as module
from hvd_batchgrow.train.checkpoints.checkpoint import checkpoint_paths
from tests.helpers import NUM_TRAIN, measured_job
from tests.training import train

OFTEN = {"every_epochs": 0.1, "keep": 1}
GAINS = (
    Decision(320, "adascale", "planted", 32, 32, 32.0, 0.05, 0.075),
    Decision(512, "adascale", "planted", 32, 32, 32.0, 0.075, 0.1),
)
"""Progress per sample is gain · 16/32: 160 samples at 320, with a gain of 1.5 from there 304 at 512, the first update
that reaches the boundary at 300. With a gain of 2 from there, 596 samples remain: 19 updates, up to 1120."""


def kept(folder: Path) -> list[int]:
    return sorted(int(path.stem.removeprefix("samples-")) for path in checkpoint_paths(folder / "checkpoints"))


def test_checkpoints_of_boundaries_that_a_decision_moves_are_kept(tmp_path: Path) -> None:
    """Boundaries at 315 and 615 samples. With a batch of 48 from 160 on, these are 160 + 4 · 48 and 352 + 6 · 48."""
    schedule = {"lr_boundaries_epochs": [1.05, 2.05]}
    job = measured_job({"name": "gradient_noise"}, schedule=schedule, checkpoint=OFTEN)
    decision = Decision(160, "gradient_noise", "planted", 16, 48, 48.0, 0.05, 0.05)
    replay = tmp_path / "decisions.jsonl"
    replay.write_bytes(decisions_text(None, [decision]))
    train(job, SingleRank(), tmp_path / "run", replay=replay)
    assert kept(tmp_path / "run") == [160, 352, 640, 928]


def test_a_gain_is_a_milestone_only_if_a_boundary_is_there_too() -> None:
    job = measured_job({"name": "adascale"}, schedule={"batch_scale": 2.0, "lr_boundaries_epochs": [1.0]})
    assert compile_plan(job, 1, NUM_TRAIN).milestones == {608, 1824}  # 19 and 57 updates of 32 samples, 16 of progress
    assert compile_plan(job, 1, NUM_TRAIN, None, GAINS[:1]).milestones == {512, 1312}  # 596/0.75 samples: 25 updates
    assert compile_plan(job, 1, NUM_TRAIN, None, GAINS).milestones == {512, 1120}


def test_a_gain_that_changes_at_a_boundary_leaves_the_boundary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    estimated: list[int] = []
    monkeypatch.setattr(module, "reestimate", lambda parts, samples, *others: estimated.append(samples))
    schedule = {"batch_scale": 2.0, "lr_boundaries_epochs": [1.0]}
    model = {"name": "small_conv_net", "channels": [4, 8], "ghost_batch": 8, "precise_bn_samples": 64}
    job = measured_job({"name": "adascale"}, schedule=schedule, model=model, checkpoint=OFTEN)
    replay = tmp_path / "decisions.jsonl"
    replay.write_bytes(decisions_text(None, GAINS))
    train(job, SingleRank(), tmp_path / "run", replay=replay)
    assert estimated == [512, 1120]
    assert kept(tmp_path / "run") == [512, 1120]
