"""Augmentation through the reader: the same pixels in every layout, at a resume and from both pipelines."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hvd_batchgrow.comm.ranks import SingleRank
from hvd_batchgrow.config import DataSection
from hvd_batchgrow.data.datasets.dataset import ArrayDataset, BadSample, Datasets, raise_bad
from hvd_batchgrow.data.load_source import load_source
from hvd_batchgrow.data.order.stream import Stream, ghost_batches_of_rank, sample_draws
from hvd_batchgrow.data.pipeline.pixel_augment import pixel_augment
from hvd_batchgrow.data.pipeline.reader import GhostBatches, Reader, choose_pipeline, training_augment
from hvd_batchgrow.data.pipeline.sampler import TrainSampler
from hvd_batchgrow.data.source_checks import check_data
from hvd_batchgrow.messages.errors import JobError
from hvd_batchgrow.train.parts import TrainingParts
from hvd_batchgrow.train.run.notes import notes_on_network
from tests.helpers import encoded_samples, small_job

CROP, N, GAMMA, CLASSES = 12, 50, 4, 7
OF_SAMPLES: dict[str, Any] = {
    "auto_augment": "randaugment",
    "color_jitter": (0.4, 0.4, 0.4, 0.1),
    "random_erasing": 0.5,
}
MIXING: dict[str, Any] = {"mixup_alpha": 0.8, "cutmix_alpha": 1.0, "mixup_prob": 0.9}
AFTER_PIPELINE: dict[str, Any] = {"random_erasing": 0.5, **MIXING}
KINDS = ["images", "encoded"]


@pytest.fixture
def make_source(tmp_path: Path) -> Callable[[str], Datasets]:
    def make(kind: str) -> Datasets:
        if kind == "encoded":
            samples: Any = encoded_samples(tmp_path, N)
        else:
            values = np.random.default_rng(1).integers(0, 256, (N, 9, 8, 3), dtype=np.uint8)
            samples = ArrayDataset(values, np.arange(N) % CLASSES)
        return Datasets(samples, samples, CLASSES, (0.5, 0.4, 0.3), (0.25, 0.2, 0.3))

    return make


def section(**keys: Any) -> DataSection:
    return DataSection(**{"source": "idx", "image_size": CROP, "hflip": True, "crop_padding": 1, **keys})


def reader_of(source: Datasets, **keys: Any) -> Reader:
    return Reader(section(**keys), source, torch.device("cpu"), 1, raise_bad, 64)


def read(
    reader: Reader, count: int, first: int = 0, stride: int = 1, at_once: int = 1, gamma: int = GAMMA
) -> Iterator[GhostBatches]:
    """Yield some ghost batches, one by one, however many are read as one batch."""
    stream = Stream(N, 5)
    batches = reader.training(stream, gamma, first, stride, lambda group: at_once)
    parts = (batch[k * gamma : (k + 1) * gamma] for batch in batches for k in range(len(batch.ids) // gamma))
    yield from islice(parts, count)


def assert_same(found: GhostBatches, expected: GhostBatches) -> None:
    assert (found.ids == expected.ids).all()
    assert torch.equal(found.inputs, expected.inputs)
    assert torch.equal(found.targets, expected.targets)


# --- one result ---------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", [{}, {"channels_last": True}, {"auto_augment": "trivialaugment_wide"}])
def test_ghost_batches_are_the_same_in_every_layout_and_after_a_resume(
    make_source: Callable[[str], Datasets], kind: str, form: dict[str, Any]
) -> None:
    """Two epochs, 50 samples each, whose ends are within ghost batches; across ranks and batches of several."""
    reader = reader_of(make_source(kind), **{**OF_SAMPLES, **MIXING, **form})
    whole = list(read(reader, 27))
    assert all(part.targets.shape == (GAMMA, CLASSES) for part in whole)
    for ranks, at_once in ((1, 3), (2, 5), (3, 2)):
        for first in (0, 11):  # from the start, and at a resume
            for rank in range(ranks):
                mine = ghost_batches_of_rank(first, 27 - first, rank, ranks)
                for k, found in zip(mine, read(reader, len(mine), mine[0], ranks, at_once), strict=True):
                    assert_same(found, whole[k])


@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_has_the_same_pixels_whatever_the_ghost_batch_is(
    make_source: Callable[[str], Datasets], kind: str
) -> None:
    reader = reader_of(make_source(kind), **OF_SAMPLES)
    (expected,) = read(reader, 1, gamma=2 * N)
    for gamma in (2, 5):
        for k, found in enumerate(read(reader, 2 * N // gamma, gamma=gamma)):
            assert_same(found, expected[k * gamma : (k + 1) * gamma])
    first, second = (
        expected.inputs[k * N : (k + 1) * N][np.argsort(expected.ids[k * N : (k + 1) * N])] for k in (0, 1)
    )
    assert (first != second).flatten(1).any(1).float().mean() > 0.9  # each epoch has its own draws


@pytest.mark.parametrize("form", [{}, {"channels_last": True, "dtype": "float16"}])
def test_any_number_of_decoding_threads_gives_the_same_pixels(
    make_source: Callable[[str], Datasets], form: dict[str, Any]
) -> None:
    source, keys = make_source("encoded"), {"pipeline": "torch", **OF_SAMPLES, **MIXING, **form}
    one, three = (replace(reader_of(source, **keys), num_threads=threads) for threads in (1, 3))
    for found, expected in zip(read(three, 15, at_once=2), read(one, 15), strict=True):
        assert_same(found, expected)
        assert found.inputs.is_contiguous(memory_format=torch.channels_last) == bool(form)
    chunks = [range(start, min(start + 8, N)) for start in range(0, N, 8)]
    for found, expected in zip(three.testing(chunks), one.testing(chunks), strict=True):
        assert_same(found, expected)


@pytest.mark.parametrize("on_bad_sample", ["error", "replace"])
def test_a_bad_sample_is_found_by_a_decoding_thread_when_its_batch_is_next(tmp_path: Path, on_bad_sample: str) -> None:
    samples, stream = encoded_samples(tmp_path, N), Stream(N, 5)
    bad = int(stream.ids(9, 10)[0])
    (tmp_path / f"{bad}.jpg").unlink()
    source = Datasets(samples, samples, CLASSES, (0.5, 0.4, 0.3), (0.25, 0.2, 0.3))
    reported: list[int] = []

    def note(fault: BadSample) -> None:
        reported.append(fault.sample_id)
        if on_bad_sample == "error":
            raise fault

    reader = Reader(section(pipeline="torch", **OF_SAMPLES), source, torch.device("cpu"), 2, note, 64)
    batches = reader.training(stream, GAMMA, 0, 1)
    found = [next(batches) for _ in range(2)]
    assert not reported
    if on_bad_sample == "error":
        with pytest.raises(BadSample, match=f"sample {bad} "):
            next(batches)
    else:
        found.append(next(batches))
        assert found[2].replaced.tolist() == [False, True, False, False]
    assert [batch.ids.tolist() for batch in found[:2]] == stream.ids(0, 8).reshape(2, 4).tolist()
    assert reported == [bad]


def test_decoding_threads_end_with_the_reader(make_source: Callable[[str], Datasets]) -> None:
    reader = replace(reader_of(make_source("encoded"), pipeline="torch"), num_threads=4)
    before = set(threading.enumerate())
    batches = reader.training(Stream(N, 5), GAMMA, 0, 1)
    next(batches)
    started = set(threading.enumerate()) - before
    assert len([thread for thread in started if thread.name.startswith("decode")]) == 4
    del batches
    for thread in started:
        thread.join(10.0)
        assert not thread.is_alive()


@pytest.mark.parametrize("kind", KINDS)
def test_each_key_changes_most_training_samples_and_no_draw_of_another(
    make_source: Callable[[str], Datasets], kind: str
) -> None:
    source = make_source(kind)
    plain = list(read(reader_of(source), 12))
    for key, value in {**OF_SAMPLES, "random_erasing": 1.0, "mixup_alpha": 0.8, "cutmix_alpha": 1.0}.items():
        found = list(read(reader_of(source, **{key: value}), 12))
        changed = torch.cat([(a.inputs != b.inputs).flatten(1).any(1) for a, b in zip(found, plain, strict=True)])
        assert changed.float().mean() > 0.7, key
    train = source.train
    augment = training_augment(section(), train)
    assert augment is not None
    pixels = pixel_augment(section(**OF_SAMPLES), augment.out_size)
    raws = [
        next(TrainSampler(train, Stream(N, 5), augment, N, pixel_augment=rule).raw_batches(0, 1))
        for rule in (None, pixels)
    ]
    places = [raw.placement for raw in raws]
    assert places[0] is not None
    assert places[1] is not None
    assert (places[0].windows == places[1].windows).all()
    assert (places[0].mirrors == places[1].mirrors).all()


def test_draws_of_different_uses_differ_and_those_of_crops_are_as_before() -> None:
    ids, epochs = np.arange(1000), np.zeros(1000, dtype=np.int64)
    draws = [sample_draws(7, epochs, ids, 23, use) for use in range(4)]
    for k in range(4):
        for other in range(k):
            assert not (draws[k] == draws[other]).all(axis=0).any()
            assert abs(np.corrcoef(draws[k].ravel(), draws[other].ravel())[0, 1]) < 4 / np.sqrt(23_000)
    # Recorded before draws had uses.
    recorded = [[1675892246, 1074293615], [3900702617, 1359178168]]
    assert (sample_draws(7, epochs[:2], np.array([3, 2**40]), 2) * 2**32).tolist() == recorded


@pytest.mark.parametrize("kind", KINDS)
def test_erasing_and_mixing_are_the_same_from_both_pipelines(make_source: Callable[[str], Datasets], kind: str) -> None:
    source = make_source(kind)
    ours, theirs = (read(reader_of(source, pipeline=name, **AFTER_PIPELINE), 20) for name in ("torch", "dali"))
    for found, expected in zip(theirs, ours, strict=True):
        assert_same(found, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_is_not_augmented(make_source: Callable[[str], Datasets], kind: str) -> None:
    source = make_source(kind)
    plain, augmented = (
        next(reader_of(source, pipeline="torch", **keys).testing([range(N)])) for keys in ({}, OF_SAMPLES | MIXING)
    )
    assert_same(augmented, plain)
    assert augmented.targets.dtype == torch.int64


def test_a_bad_sample_is_augmented_and_mixed_as_its_replacement(tmp_path: Path) -> None:
    samples, keys = encoded_samples(tmp_path, N), {**OF_SAMPLES, **MIXING}
    stream = Stream(N, 5)
    bad = int(stream.ids(5, 6)[0])
    samples.sizes[bad] = 0
    source = Datasets(samples, samples, CLASSES, (0.5, 0.4, 0.3), (0.25, 0.2, 0.3))
    mixed, plain = (list(read(reader_of(source, **k), 3)) for k in (keys, OF_SAMPLES))
    assert mixed[1].replaced.tolist() == [False, True, False, False]
    assert mixed[1].ids[1] == stream.ids(6, 7)[0] == mixed[1].ids[2]
    assert torch.equal(plain[1].inputs[1], plain[1].inputs[2])  # the same sample and epoch
    soft = mixed[1].targets
    assert soft[1].argmax() in [samples.targets[k] for k in mixed[1].ids]
    assert bad not in mixed[1].ids


def test_targets_that_are_not_classes_cannot_be_mixed(make_source: Callable[[str], Datasets]) -> None:
    source = make_source("images")
    train = ArrayDataset(source.train.fetch(np.arange(N)), np.ones((N, 2), np.float32))
    with pytest.raises(JobError, match=r"data.cutmix_alpha: mixes classes, .* torch.float32 \(4, 2\); set it to 0"):
        next(read(reader_of(replace(source, train=train), cutmix_alpha=1.0), 1))


# --- the choice of a pipeline, and faults -------------------------------------------------------------


def test_operations_that_dali_does_not_have_select_torch(make_source: Callable[[str], Datasets]) -> None:
    samples = make_source("encoded").train
    assert choose_pipeline(section(), samples) == "dali"
    assert choose_pipeline(section(**AFTER_PIPELINE), samples) == "dali"
    for key in ("auto_augment", "color_jitter"):
        keys = {key: OF_SAMPLES[key]}
        assert choose_pipeline(section(**keys), samples) == "torch"
        with pytest.raises(JobError, match=f"data.pipeline: 'dali' does not have data.{key}; use 'auto' or 'torch'"):
            choose_pipeline(section(**keys, pipeline="dali"), samples)
        assert f"data.pipeline: 'dali' does not have data.{key}; use 'auto' or 'torch'" in [
            str(fault) for fault in check_data(DataSection(source="idx", pipeline="dali", **keys))
        ]


def test_a_run_reports_why_pillow_decodes(make_source: Callable[[str], Datasets]) -> None:
    data = {"source": "image_folder", "image_size": CROP, "num_samples": N, "crop_padding": 0}
    notes = []
    for keys in ({}, AFTER_PIPELINE, {"auto_augment": "randaugment"}, {"pipeline": "torch"}):
        job = small_job(data={**data, **keys}, schedule={"max_batch": 48})
        parts = TrainingParts(job, make_source("encoded"), SingleRank(), torch.device("cpu"))
        notes.append([note for note in notes_on_network(parts) if "decoded" in note])
    expected = "images are decoded by Pillow, because DALI does not have data.auto_augment"
    assert notes == [[], [], [expected], []]


@pytest.mark.parametrize(
    ("keys", "faults"),
    [
        ({"source": "idx", **OF_SAMPLES, **MIXING}, []),
        ({"source": "imagenet", "image_size": 224, **OF_SAMPLES, **MIXING}, []),
        (
            {"source": "csv", "auto_augment": "trivialaugment_wide", "mixup_alpha": 0.2},
            [
                "data.auto_augment: is for images of one size and encoded images, and 'csv' has rows",
                "data.mixup_alpha: is for images of one size and encoded images, and 'csv' has rows",
            ],
        ),
        (
            {"source": "idx", "auto_augment": "trivialaugment_wide", "randaugment_num_ops": 3},
            [
                "data.randaugment_num_ops: requires data.auto_augment = 'randaugment', which is 'trivialaugment_wide'",
            ],
        ),
        (
            {"source": "idx", "randaugment_magnitude": 5},
            ["data.randaugment_magnitude: requires data.auto_augment = 'randaugment', which is missing"],
        ),
        (
            {"source": "idx", "color_jitter": (0.0, 0.0, 0.0, 0.0)},
            ["data.color_jitter: [0, 0, 0, 0] changes nothing; remove it, or use [0.4, 0.4, 0.4, 0.1]"],
        ),
        (
            {"source": "idx", "color_jitter": (0.4, 0.4, 0.4, 0.6)},
            ["data.color_jitter: hue = 0.6 exceeds 0.5, half a turn of the color circle; use <= 0.5"],
        ),
        (
            {"source": "idx", "random_erasing_scale": (0.1, 0.2), "random_erasing_ratio": (1.0, 2.0)},
            [
                "data.random_erasing_ratio: requires data.random_erasing, the probability, which is missing",
                "data.random_erasing_scale: requires data.random_erasing, the probability, which is missing",
            ],
        ),
        (
            {
                "source": "idx",
                "random_erasing": 0.5,
                "random_erasing_scale": (0.5, 1.5),
                "random_erasing_ratio": (2.0, 1.0),
            },
            [
                "data.random_erasing_ratio: must be [min, max], got [2, 1]; try [1, 2]",
                "data.random_erasing_scale: 1.5 exceeds 1, the area of the whole image; use <= 1",
            ],
        ),
        (
            {"source": "idx", "mixup_prob": 0.5},
            ["data.mixup_prob: requires data.mixup_alpha or data.cutmix_alpha, which are missing"],
        ),
        (
            {"source": "idx", "mixup_alpha": 0.5, "mixup_switch_prob": 0.3},
            [
                "data.mixup_switch_prob: chooses between Mixup and CutMix: requires both data.mixup_alpha and "
                "data.cutmix_alpha"
            ],
        ),
    ],
)
def test_a_key_that_would_have_no_effect_is_a_fault(keys: dict[str, Any], faults: list[str]) -> None:
    assert [str(fault) for fault in check_data(DataSection(**keys))] == faults


@pytest.mark.parametrize(
    ("channels", "keys", "fault"),
    [
        (1, {"auto_augment": "randaugment", "color_jitter": (0.4, 0.4, 0.0, 0.0)}, None),
        (
            1,
            {"color_jitter": (0.4, 0.2, 0.4, 0.0)},
            r"changes saturation and hue, which gray images do not have; use \[0.4, 0.2, 0, 0\]",
        ),
        (
            4,
            {"auto_augment": "randaugment"},
            r"is for images with 1 \(gray\) or 3 \(RGB\) channels, and these have 4; remove it",
        ),
        (4, {"random_erasing": 0.5, "mixup_alpha": 0.4}, None),
    ],
)
def test_the_channels_of_the_images_must_fit(
    tmp_path: Path, channels: int, keys: dict[str, Any], fault: str | None
) -> None:
    for part in ("train", "test"):
        np.save(tmp_path / f"{part}_images.npy", np.random.default_rng(0).integers(0, 256, (20, 8, 8, channels), "u1"))
        np.save(tmp_path / f"{part}_labels.npy", np.arange(20) % 2)
    data = DataSection(source="numpy", root=str(tmp_path), num_samples=20, **keys)
    if fault is None:
        source = load_source(data, 0, lambda *_: None)
        batch = next(Reader(data, source, torch.device("cpu"), 1, raise_bad, 64).training(Stream(20, 0), 4, 0, 1))
        assert batch.inputs.shape == (4, channels, 8, 8)
        return
    with pytest.raises(JobError, match=f"data.{next(iter(keys))}: {fault}"):
        load_source(data, 0, lambda *_: None)


def test_a_resume_with_another_augmentation_is_an_error() -> None:
    base = small_job().deciding(300)
    for key, value in {**OF_SAMPLES, **MIXING}.items():
        changed = small_job(data={**MIXING, key: list(value) if isinstance(value, tuple) else value})
        assert changed.deciding(300) != base, key
    old = {key: value for key, value in base.items() if not key.startswith(("data.mixup", "data.color"))}
    assert small_job().completed(old) == base
