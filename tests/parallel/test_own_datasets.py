"""Runs on torch Datasets with random transforms: the same weights on any ranks, with any workers, and after a stop."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from hvd_batchgrow.comm.ranks import CollectiveError, Ranks, SingleRank
from hvd_batchgrow.config import Job
from hvd_batchgrow.data.datasets.dataset import Datasets
from hvd_batchgrow.data.load_source import load_source
from hvd_batchgrow.job_file import parse_job
from hvd_batchgrow.train.run.setup import load_together
from tests.helpers import job_tree
from tests.own_datasets import NUM_TEST, NUM_TRAIN, NUM_VALIDATION, Pictures, to_floats
from tests.training import Recorder, StopAfter, digest, newest, train


def job_of(function: str, **sections: Any) -> Job:
    data = {"source": f"tests.own_datasets:{function}", "num_samples": NUM_TRAIN, **sections.pop("data", {})}
    tree = job_tree("x", schedule={"max_batch": 48}, layout={"exact": True}, **sections)
    return parse_job({**tree, "data": data})


def source_of(job: Job) -> Datasets:
    return load_source(job.data, job.seed, lambda *_: None)


def trained(job: Job, ranks: Ranks, folder: Path, *observers: Any, **options: Any) -> Any:
    source = source_of(job)
    try:
        return train(job, ranks, folder, *observers, source=source, **options)[0]
    finally:
        source.close()


def test_random_transforms_train_bit_identically_on_any_ranks(ranks: Ranks, tmp_path: Path) -> None:
    job = job_of("pictures")
    alone = trained(job, SingleRank(), tmp_path / f"alone{ranks.rank}")
    assert digest(trained(job, ranks, tmp_path / "together")) == digest(alone)
    other = job.model_copy(update={"seed": 8})
    assert digest(trained(other, ranks, tmp_path / "other")) != digest(alone)


def test_a_function_that_draws_from_global_generators_returns_the_same_sets_to_all_ranks(ranks: Ranks) -> None:
    job = job_of("divided", data={"num_samples": NUM_TRAIN - 20})
    source = load_together(job, ranks, lambda *_: None)
    try:
        mine = [round(1e6 * float(sample.double().sum())) for sample in source.test.fetch(np.arange(20))]
        assert ranks.all_gather(mine, "test sums").tolist() == [mine] * ranks.size
    finally:
        source.close()


def test_ranks_with_other_samples_are_an_error(ranks: Ranks) -> None:
    """The defect: samples were lost or repeated, and test samples of a rank were trained on by another, silently."""
    job = job_of("unseeded", model={"name": "dense7", "channels": [4] * 6})
    if ranks.size == 1:
        load_together(job, ranks, lambda *_: None)
        return
    with pytest.raises(CollectiveError) as caught:
        load_together(job, ranks, lambda *_: None)
    if ranks.rank == 1:
        fault = "has other data than rank 0: the training targets, the training samples, the test targets, the test "
        assert f"rank 1 on {socket.gethostname()} {fault}" in str(caught.value)


def test_workers_do_not_change_the_weights(ranks: Ranks, tmp_path: Path) -> None:
    here = trained(job_of("pictures"), ranks, tmp_path / "here")
    there = trained(job_of("pictures", data={"workers": 2}), ranks, tmp_path / "there")
    assert digest(there) == digest(here)


@pytest.mark.parametrize("workers", [0, 1])
def test_random_transforms_are_repeated_by_replay_checks(ranks: Ranks, tmp_path: Path, workers: int) -> None:
    plain = trained(job_of("pictures"), ranks, tmp_path / "plain")
    job = job_of("pictures", data={"workers": workers}, checks={"replay_every": 2})
    checked = trained(job, ranks, tmp_path / "checked")
    assert digest(checked) == digest(plain)
    assert checked.state.replays.identical == checked.plan.num_updates // 2


@pytest.mark.parametrize("updates", [2, 7])
def test_a_stopped_run_on_random_transforms_resumes_with_the_same_weights(
    ranks: Ranks, tmp_path: Path, updates: int
) -> None:
    job = job_of("pictures")
    whole = trained(job, ranks, tmp_path / "whole")
    trained(job, ranks, tmp_path / "parts", stop=StopAfter(updates, here=ranks.rank == 0))
    checkpoint = newest(ranks, tmp_path / "parts")
    assert checkpoint is not None
    resumed = trained(job_of("pictures", data={"workers": 1}), ranks, tmp_path / "parts", checkpoint=checkpoint)
    assert digest(resumed) == digest(whole)


def test_inputs_of_any_form_train_bit_identically_on_any_ranks(ranks: Ranks, tmp_path: Path) -> None:
    job = job_of("trees", model={"name": "tests.own_datasets:TreeNet", "channels": None})
    alone = trained(job, SingleRank(), tmp_path / f"alone{ranks.rank}")
    assert digest(trained(job, ranks, tmp_path / "together")) == digest(alone)


def test_a_sources_own_validation_set_is_evaluated_during_training(ranks: Ranks, tmp_path: Path) -> None:
    recorder = Recorder()
    job = job_of("three_sets", evaluation={"batch_size": 7}, checkpoint={"keep_best": "val/loss"})
    trainer = trained(job, ranks, tmp_path, recorder)
    assert [e.dataset for e in recorder.evaluations] == ["validation"] * 3 + ["test"]
    for found, size, seed in ((recorder.evaluations[2], NUM_VALIDATION, 7), (recorder.evaluations[3], NUM_TEST, 6)):
        pictures = Pictures(size, seed, to_floats())
        trainer.parts.model.eval()
        with torch.no_grad():
            logits = trainer.parts.model(torch.stack([pictures[k][0] for k in range(size)]))
        loss = nn.functional.cross_entropy(logits.double(), pictures.labels).item()
        top1 = np.mean(logits.argmax(1).numpy() == pictures.labels.numpy())
        assert (found.loss, found.metrics["top1"]) == pytest.approx((loss, top1), rel=1e-5)
    assert trainer.state.best["metric"] == "val/loss"
