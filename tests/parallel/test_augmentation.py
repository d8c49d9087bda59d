"""Augmentation and mixing: bit-identical weights on any ranks in exact mode, and after a stop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hvd_batchgrow.comm.ranks import Ranks, SingleRank
from hvd_batchgrow.config import Job
from hvd_batchgrow.data.datasets.dataset import Datasets
from tests.helpers import encoded_samples, small_job
from tests.training import StopAfter, digest, newest, train

N = 90
RANDAUGMENT: dict[str, Any] = {"auto_augment": "randaugment", "random_erasing": 0.5, "mixup_alpha": 0.8}
TRIVIAL: dict[str, Any] = {
    "auto_augment": "trivialaugment_wide",
    "color_jitter": [0.4, 0.4, 0.0, 0.0],
    "mixup_alpha": 0.2,
    "cutmix_alpha": 1.0,
    "mixup_prob": 0.8,
}


def job_of(augmentation: dict[str, Any], **sections: Any) -> Job:
    return small_job(data=augmentation, evaluation={"every_epochs": 3.0}, **sections)


@pytest.mark.parametrize("augmentation", [RANDAUGMENT, TRIVIAL])
def test_exact_runs_are_bit_identical_on_any_ranks_and_micro_batches(
    ranks: Ranks, tmp_path: Path, augmentation: dict[str, Any]
) -> None:
    """γ is 8; the fast path reads two ghost batches as one batch, and exact mode one."""
    exact, plain = job_of(augmentation, layout={"exact": True}), job_of({})
    together, _ = train(exact, ranks, tmp_path / "together")
    alone, _ = train(exact, SingleRank(), tmp_path / "alone")
    assert digest(together) == digest(alone)
    without, _ = train(plain, SingleRank(), tmp_path / "plain")
    assert digest(alone) != digest(without)


@pytest.mark.parametrize("updates", [1, 5, 12])
@pytest.mark.parametrize("augmentation", [RANDAUGMENT, TRIVIAL])
def test_a_stopped_run_resumes_to_the_same_weights(
    ranks: Ranks, tmp_path: Path, augmentation: dict[str, Any], updates: int
) -> None:
    job = job_of(augmentation)
    whole, _ = train(job, ranks, tmp_path / "whole")
    _, ended = train(job, ranks, tmp_path / "parts", stop=StopAfter(updates, here=ranks.rank == 0))
    assert (ended.done, ended.updates) == (False, updates)
    resumed, _ = train(job, ranks, tmp_path / "parts", checkpoint=newest(ranks, tmp_path / "parts"))
    assert digest(resumed) == digest(whole)


def test_encoded_images_with_replaced_samples(ranks: Ranks, tmp_path: Path) -> None:
    samples = encoded_samples(tmp_path, N)
    (tmp_path / "6.jpg").unlink()
    source = Datasets(samples, samples, 7, (0.5,) * 3, (0.25,) * 3)
    data = {
        **{"source": "image_folder", "num_samples": N, "crop_padding": 0, "image_size": 12},
        **{"on_bad_sample": "replace", **TRIVIAL, "color_jitter": [0.4, 0.4, 0.4, 0.1]},
    }
    job = job_of(data, schedule={"max_batch": 80}, layout={"exact": True})
    together, _ = train(job, ranks, tmp_path / "together", source=source)
    alone, _ = train(job, SingleRank(), tmp_path / "alone", source=source)
    assert digest(together) == digest(alone)
