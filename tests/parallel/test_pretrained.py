"""Runs that start from a file of weights, with frozen parameters and parameter groups."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hvd_batchgrow.comm.ranks import CollectiveError, Ranks, SingleRank
from hvd_batchgrow.config import Job
from hvd_batchgrow.nn.build import build_model
from tests.helpers import SIDE, small_job
from tests.training import StopAfter, digest, newest, train

OPTIM = {
    "lr": 0.05,
    "weight_decay": 1e-3,
    "layer_decay": 0.8,
    "groups": [{"match": "features.3", "lr_scale": 3.0, "weight_decay": 0.01}],
}


def job_of(path: str, **sections: Any) -> Job:
    """The first convolution and its norm are frozen, and the file has another number of classes."""
    model = {"pretrained": path, "allow_new_head": True, "freeze": ["features.0", "features.1"]}
    return small_job(model=model, optim=OPTIM, data={"pipeline": "torch"}, **sections)


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    torch.manual_seed(5)
    torch.save(build_model(small_job(), (SIDE, SIDE, 1), 7).state_dict(), tmp_path / "seven.pth")
    return tmp_path / "seven.pth"


@pytest.mark.parametrize("name", ["sgd", "lars"])
def test_exact_weights_are_those_of_one_rank(ranks: Ranks, tmp_path: Path, weights: Path, name: str) -> None:
    job = job_of(str(weights), layout={"exact": True})
    optim = small_job(optim={**OPTIM, "name": name}).optim
    job = job.model_copy(update={"optim": optim})
    together, _ = train(job, ranks, tmp_path / "together")
    alone, _ = train(job, SingleRank(), tmp_path / f"alone{ranks.rank}")
    assert digest(together) == digest(alone)
    state, first = together.parts.model.state_dict(), torch.load(weights, weights_only=True)
    kept = {key for key in first if state[key].shape == first[key].shape and torch.equal(state[key], first[key])}
    norm = {f"features.1.{key}" for key in ("weight", "bias", "running_mean", "running_var")}
    assert kept == {"features.0.weight", *norm}


def test_only_rank_0_needs_the_file(
    ranks: Ranks, tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone, _ = train(job_of(str(weights), layout={"exact": True}), SingleRank(), tmp_path / f"alone{ranks.rank}")
    if ranks.rank == 0:
        monkeypatch.chdir(weights.parent)
    else:
        (tmp_path / "elsewhere").mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / "elsewhere")
    together, _ = train(job_of("seven.pth", layout={"exact": True}), ranks, tmp_path / "together")
    assert digest(together) == digest(alone)


def test_a_missing_file_ends_all_ranks(ranks: Ranks, tmp_path: Path) -> None:
    with pytest.raises(CollectiveError) as caught:
        train(job_of("nowhere.pth"), ranks, tmp_path)
    assert caught.value.code == 2
    assert (caught.value.error is not None) == (ranks.rank == 0)


def test_a_stopped_and_resumed_run_is_bit_identical(ranks: Ranks, tmp_path: Path, weights: Path) -> None:
    job = job_of(str(weights))
    whole, _ = train(job, ranks, tmp_path / "whole")
    train(job, ranks, tmp_path / "parts", stop=StopAfter(5, here=ranks.rank == 0))
    resumed, ended = train(job, ranks, tmp_path / "parts", checkpoint=newest(ranks, tmp_path / "parts"))
    assert ended.done
    assert digest(resumed) == digest(whole)
