"""The samples held out for validation: which they are, what is left, and what cannot be."""

from __future__ import annotations

import hashlib
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hvd_batchgrow.config import DataSection
from hvd_batchgrow.data.datasets.dataset import ArrayDataset, BadSample, Datasets, raise_bad
from hvd_batchgrow.data.datasets.subset import origin
from hvd_batchgrow.data.held_out import held_out_ids, with_test, with_validation
from hvd_batchgrow.data.load_source import load_source
from hvd_batchgrow.data.order.stream import Stream
from hvd_batchgrow.data.pipeline.reader import Reader
from hvd_batchgrow.data.source_checks import known_num_samples
from hvd_batchgrow.messages.errors import JobError
from hvd_batchgrow.schedule.plan import compile_plan
from hvd_batchgrow.train.run.notes import notes_on_data
from tests.helpers import NUM_TRAIN, encoded_samples, labels_of, plan_text, small_job, small_source, write_idx_folder


def numbered(count: int) -> Datasets:
    """Rows whose only feature is their id, and whose class is its last digit."""
    ids = np.arange(count)
    train = ArrayDataset(ids[:, None].astype(np.float32), ids % 10)
    return Datasets(train, train, 10, (0.0,), (1.0,))


@pytest.mark.parametrize(("count", "fraction", "num"), [(300, 0.1, 30), (301, 0.1, 31), (100, 0.07, 7), (4, 0.5, 2)])
def test_each_sample_is_in_one_of_the_two_sets(count: int, fraction: float, num: int) -> None:
    source = with_validation(numbered(count), fraction, 5)
    assert source.validation is not None
    held = source.validation.fetch(np.arange(len(source.validation)))[:, 0].tolist()
    left = source.train.fetch(np.arange(len(source.train)))[:, 0].tolist()
    assert len(held) == num
    assert sorted(held + left) == list(range(count))
    assert left == sorted(left)
    assert held == sorted(held)
    assert labels_of(source.train) == [int(k) % 10 for k in left]
    assert labels_of(source.validation) == [int(k) % 10 for k in held]
    assert source.train.locate(1) == f"array, entry {int(left[1])}"


def test_the_held_out_samples_are_those_of_the_seed_alone() -> None:
    first = held_out_ids(60_000, 0.1, 3)
    assert (first == held_out_ids(60_000, 0.1, 3)).all()
    assert set(first) < set(held_out_ids(60_000, 0.2, 3))
    # Two independent draws of 6000 of 60000 share 600 ± 22: 540 … 660 is 2.7 standard deviations, and both are fixed.
    assert 540 < len(set(first) & set(held_out_ids(60_000, 0.1, 4))) < 660
    assert 540 < len(set(first) & set(Stream(60_000, 3).ids(0, 6000))) < 660  # not the order of the first epoch
    thirds = np.bincount(first // 20_000)
    assert thirds.min() > 1900  # 2000 ± 35 from each third of the set
    # Recorded from the first version: a resume by a later one must hold out the same samples.
    assert held_out_ids(20, 0.25, 7).tolist() == [1, 2, 11, 13, 14]


def test_the_test_samples_are_another_draw_than_the_validation_samples() -> None:
    source = with_test(numbered(300), 0.2, 3)
    ids = source.test.fetch(np.arange(60))[:, 0].tolist()
    assert ids == held_out_ids(300, 0.2, 3, 2).tolist()
    assert ids != held_out_ids(300, 0.2, 3).tolist()


def test_training_draws_each_remaining_sample_once_an_epoch() -> None:
    source = with_validation(numbered(97), 0.25, 1)
    assert source.validation is not None
    num_left = 97 - 25
    assert len(source.train) == num_left
    reader = Reader(DataSection(source="numpy"), source, torch.device("cpu"), 1, raise_bad, 8)
    batches = reader.training(Stream(num_left, 1), 8, 0, 1)
    seen = [int(x) for _, batch in zip(range(num_left // 8), batches, strict=False) for x in batch.inputs[:, 0]]
    held = source.validation.fetch(np.arange(25))[:, 0]
    assert sorted(seen) == sorted(set(range(97)) - {int(k) for k in held})


def test_validation_images_are_read_without_augmentation() -> None:
    whole = small_source()
    source = with_validation(whole, 0.1, 7)
    data = small_job(data={"crop_padding": 3, "hflip": True, "pipeline": "torch"}).data
    reader = Reader(data, source, torch.device("cpu"), 1, raise_bad, 30)
    (batch,) = reader.testing([range(30)], source.validation)
    assert isinstance(whole.train, ArrayDataset)
    ids = held_out_ids(NUM_TRAIN, 0.1, 7)
    pixels = (torch.from_numpy(whole.train.values[ids]).permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.25
    torch.testing.assert_close(batch.inputs, pixels, rtol=1e-6, atol=1e-6)
    assert batch.targets.tolist() == whole.train.targets[ids].tolist()


@pytest.mark.parametrize("pipeline", ["torch", "dali"])
def test_a_subset_of_encoded_images_is_decoded_like_the_whole_set(tmp_path: Path, pipeline: str) -> None:
    whole = encoded_samples(tmp_path, 12)
    source = with_validation(Datasets(whole, whole, 7, (0.5,) * 3, (0.25,) * 3), 0.25, 1)
    ids = held_out_ids(12, 0.25, 1)
    assert source.validation is not None
    assert (source.validation.sizes == whole.sizes[ids]).all()
    data = DataSection(source="image_folder", image_size=16, pipeline=pipeline)  # type: ignore[arg-type]
    reader = Reader(data, source, torch.device("cpu"), 1, raise_bad, 12)
    (everything,), (part,) = reader.testing([range(12)]), reader.testing([range(3)], source.validation)
    assert torch.equal(part.inputs, everything.inputs[torch.from_numpy(ids)])
    assert part.targets.tolist() == [int(k) % 7 for k in ids]


def test_a_bad_sample_of_a_subset_has_its_id_there_and_its_own_file(tmp_path: Path) -> None:
    whole = encoded_samples(tmp_path, 12)
    source = with_validation(Datasets(whole, whole, 7, (0.5,) * 3, (0.25,) * 3), 0.25, 1)
    assert source.validation is not None
    broken = int(held_out_ids(12, 0.25, 1)[2])
    (tmp_path / f"{broken}.jpg").write_bytes(b"")
    with pytest.raises(BadSample) as caught:
        source.validation.fetch(np.arange(3))
    assert caught.value.sample_id == 2
    assert caught.value.where == str(tmp_path / f"{broken}.jpg")
    assert origin(source.validation, 2) == (whole, broken)
    data = DataSection(source="image_folder", image_size=16, pipeline="torch")
    skipped: list[BadSample] = []
    reader = Reader(data, source, torch.device("cpu"), 1, skipped.append, 12)
    (part,) = reader.testing([range(3)], source.validation)
    assert part.ids.tolist() == [0, 1]
    assert [bad.sample_id for bad in skipped] == [2]


def test_samples_known_to_be_bad_are_reported_for_the_set_that_holds_them(tmp_path: Path) -> None:
    whole = encoded_samples(tmp_path, 12)
    broken = int(held_out_ids(12, 0.25, 1)[0])
    whole.sizes[broken] = 0
    source = with_validation(Datasets(whole, whole, 7, (0.5,) * 3, (0.25,) * 3), 0.25, 1)
    notes = notes_on_data(source)
    assert notes[0].startswith(f"1 of 3 validation samples are bad and will be skipped: {tmp_path}/{broken}.jpg")
    assert notes[1].startswith("1 of 12 test samples")


def test_a_subset_can_be_pickled() -> None:
    source = with_validation(numbered(20), 0.25, 7)
    again = pickle.loads(pickle.dumps(source))  # noqa: S301  # made here
    ids = np.arange(5)
    assert (again.validation.fetch(ids) == held_out_ids(20, 0.25, 7)[:, None]).all()
    assert (again.train.fetch(ids) == source.train.fetch(ids)).all()


def test_a_loaded_source_has_the_planned_sizes_and_a_fingerprint(tmp_path: Path) -> None:
    job = small_job(write_idx_folder(tmp_path, small_source()), data={"validation_fraction": 0.1})
    source = load_source(job.data, job.seed, lambda *_: None)
    assert source.validation is not None
    assert (len(source.train), len(source.validation)) == (270, 30)
    assert known_num_samples(job.data) == 270
    ids = held_out_ids(300, 0.1, job.seed)
    digest = hashlib.sha256(b"".join(int(k).to_bytes(8, "little") for k in ids)).hexdigest()
    assert source.schema["validation"] == {"num_samples": 30, "sha256": digest}


def test_a_plan_counts_epochs_and_boundaries_in_the_remaining_samples() -> None:
    job = small_job(data={"validation_fraction": 0.1})
    plan = compile_plan(job, 1, known_num_samples(job.data))
    assert (plan.num_samples, plan.num_validation) == (270, 30)
    # Epochs 0.5 and 1 of N = 270 are at samples 135 and 270, which updates of 16 and 48 samples reach.
    ends = [phase.end_samples for phase in plan.schedule.phases]
    assert ends[0] == 9 * 16
    assert ends[1] == 144 + 3 * 48
    assert (plan.to_dict()["num_samples"], plan.to_dict()["num_validation"]) == (270, 30)
    assert "N = 270, validation samples: 30, ghost batch 8" in plan_text(plan)
    without = compile_plan(small_job(), 1, NUM_TRAIN)
    assert without.to_dict()["num_validation"] == 0
    assert "validation" not in plan_text(without)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            {"num_samples": 3, "validation_fraction": 0.9},
            "0.9 of 3 samples, rounded up, are 3: no sample would be left",
        ),
        ({"num_samples": 20, "validation_fraction": 0.3}, "16 must be below N = 14 = 20 - 6 for validation"),
        ({"validation_fraction": 1.0}, "validation_fraction"),
    ],
)
def test_a_fraction_that_leaves_too_little_is_refused_with_the_arithmetic(data: dict[str, Any], message: str) -> None:
    def plan() -> None:
        job = small_job(data=data)
        compile_plan(job, 1, known_num_samples(job.data))

    with pytest.raises(JobError, match=re.escape(message)):
        plan()


def test_the_best_checkpoint_needs_a_validation_set() -> None:
    job = small_job(checkpoint={"keep_best": "val/top1"})
    with pytest.raises(JobError, match=r"checkpoint\.keep_best: 'val/top1' needs a validation set"):
        compile_plan(job, 1, NUM_TRAIN)
    compile_plan(small_job(checkpoint={"keep_best": "val/top1"}, data={"validation_fraction": 0.1}), 1, 270)


def test_the_split_decides_the_weights_and_a_job_without_one_is_recorded_as_before() -> None:
    before, now = small_job(), small_job(data={"validation_fraction": 0.1})
    deciding = now.deciding(270)
    assert deciding["data.num_samples"] == 270
    assert deciding["data.num_validation"] == 30
    assert deciding["data.validation_fraction"] == 0.1
    recorded = {key: value for key, value in before.deciding(300).items() if key != "data.validation_fraction"}
    assert before.completed(recorded) == before.deciding(300)
    assert "data.num_validation" not in recorded
    # 4 and 5 samples both leave 2; only the number of validation samples differs.
    two = [parse_small(num_samples).deciding(2) for num_samples in (4, 5)]
    assert two[0] != two[1]


def parse_small(num_samples: int) -> Any:
    return small_job(data={"validation_fraction": 0.5, "num_samples": num_samples})
