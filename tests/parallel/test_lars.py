"""Whole runs with LARS: they learn, and exact runs are bit-identical in any layout and after a stop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hvd_batchgrow.comm.ranks import Ranks, SingleRank
from hvd_batchgrow.config import Job
from tests.helpers import small_job
from tests.training import Recorder, StopAfter, digest, newest, train


def lars_job(**sections: Any) -> Job:
    """Warm-up from 0, where the buffer is corrected at every update; growth to 96, where the rate falls."""
    optim = {"name": "lars", "lr": 0.5, "weight_decay": 1e-3, "trust_coefficient": 0.1}
    schedule = {"warmup_epochs": 0.4, "epochs": 6.0}
    return small_job(optim=optim, schedule=schedule, data={"pipeline": "torch"}, **sections)


def test_a_job_with_lars_learns(ranks: Ranks, tmp_path: Path) -> None:
    recorder = Recorder()
    trainer, ended = train(lars_job(), ranks, tmp_path, recorder)
    assert ended.done
    assert recorder.evaluations[-1].metrics["top1"] > 0.8  # three classes
    ratios = trainer.parts.optimizer.trust_ratios()  # type: ignore[attr-defined]
    assert ratios.shape == (3,)  # two convolutions and the linear layer
    assert ((ratios > 0) & (ratios != 1)).all()


def test_exact_weights_and_buffers_are_those_of_one_rank_to_the_bit(ranks: Ranks, tmp_path: Path) -> None:
    job = lars_job(layout={"exact": True})
    together, _ = train(job, ranks, tmp_path / "together")
    alone, _ = train(job, SingleRank(), tmp_path / f"alone{ranks.rank}")
    assert digest(together) == digest(alone)


@pytest.mark.parametrize("updates", [1, 5, 11])
def test_a_stopped_and_resumed_run_is_bit_identical(ranks: Ranks, tmp_path: Path, updates: int) -> None:
    whole, _ = train(lars_job(), ranks, tmp_path / "whole")
    train(lars_job(), ranks, tmp_path / "parts", stop=StopAfter(updates, here=ranks.rank == 0))
    resumed, ended = train(lars_job(), ranks, tmp_path / "parts", checkpoint=newest(ranks, tmp_path / "parts"))
    assert ended.done
    assert digest(resumed) == digest(whole)
