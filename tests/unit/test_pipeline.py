from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from hvd_batchgrow.comm.ranks import SingleRank
from hvd_batchgrow.config import DataSection
from hvd_batchgrow.data.datasets.dataset import ArrayDataset, BadSample, Dataset, Datasets, raise_bad
from hvd_batchgrow.data.images import encoded_dataset
from hvd_batchgrow.data.images.encoded_dataset import EncodedDataset
from hvd_batchgrow.data.order.stream import Stream, ghost_batches_of_rank
from hvd_batchgrow.data.pipeline import sampler as samplers
from hvd_batchgrow.data.pipeline.crops import Augment, CenterCrop, CropFlip, ResizedCrop
from hvd_batchgrow.data.pipeline.dali_definition import arrays_of, make_pipeline
from hvd_batchgrow.data.pipeline.dali_pipeline import DaliPipeline, cause_of, channels_first
from hvd_batchgrow.data.pipeline.reader import GhostBatches, Reader, batches, choose_pipeline
from hvd_batchgrow.data.pipeline.sampler import EvalSampler, TrainSampler
from hvd_batchgrow.data.pipeline.torch_pipeline import Normalize, cut_and_mirror, torch_inputs
from hvd_batchgrow.messages.errors import JobError, RunError
from hvd_batchgrow.train.parts import TrainingParts
from tests.helpers import SIDE, encoded_samples, small_job, small_source

FINISH = Normalize((0.5, 0.4, 0.3), (0.25, 0.2, 0.3))
PIPELINES = ["torch", "dali"]
KINDS = ["images", "rows", "encoded"]
CROP = 12
MOST = 1024


@pytest.fixture(autouse=True)
def few_drawn_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute few ids and draws in one call: many epochs of small sets cost time, and more calls follow each other."""
    monkeypatch.setattr(samplers, "_DRAWN_AT_ONCE", 64)


def array_samples(num_samples: int) -> ArrayDataset:
    """Return images that all differ."""
    values = np.random.default_rng(1).integers(0, 256, (num_samples, SIDE, SIDE + 1, 3), dtype=np.uint8)
    return ArrayDataset(values, np.arange(num_samples) % 7)


def row_samples(num_samples: int) -> ArrayDataset:
    values = np.random.default_rng(1).standard_normal((num_samples, 3)).astype(np.float32)
    return ArrayDataset(values, np.arange(num_samples) % 7)


@pytest.fixture
def make_samples(tmp_path: Path) -> Callable[[str, int], Dataset]:
    makers: dict[str, Callable[[int], Dataset]] = {
        "images": array_samples,
        "rows": row_samples,
        "encoded": lambda n: encoded_samples(tmp_path, n),
    }
    return lambda kind, num_samples: makers[kind](num_samples)


def augment_of(samples: Dataset) -> Augment | None:
    if samples.kind == "rows":
        return None
    if samples.kind == "encoded":
        return ResizedCrop((CROP, CROP), (0.08, 1.0), (3 / 4, 4 / 3), hflip=True)
    return CropFlip((SIDE, SIDE + 1), 2, hflip=True)


def feed_of(samples: Dataset, group: int, seed: int = 5) -> TrainSampler:
    return TrainSampler(samples, Stream(len(samples), seed), augment_of(samples), group)


def read(name: str, sampler: TrainSampler, first_ghost_batch: int, stride: int, count: int) -> list[GhostBatches]:
    def inputs(first: int) -> Iterator[tuple[object, Tensor]]:
        if name == "torch":
            return torch_inputs(sampler, FINISH, first, stride)
        return pipeline.inputs(sampler, first, stride)

    pipeline = DaliPipeline(FINISH, MOST, 1)
    return list(islice(batches(sampler, inputs, first_ghost_batch), count))  # type: ignore[arg-type]


def combinations() -> list[tuple[str, str]]:
    return [(kind, name) for kind in KINDS for name in PIPELINES if (kind, name) != ("rows", "dali")]


# --- one definition --------------------------------------------------------------------------------


def test_a_corner_and_a_mirror_do_what_they_say() -> None:
    samples = array_samples(40)
    raw = next(feed_of(samples, 40).raw_batches(0, 1))
    assert raw.placement is not None
    pixels = cut_and_mirror(raw.values, raw.placement)
    for image, window, mirror, result in zip(
        raw.values, raw.placement.windows, raw.placement.mirrors, pixels, strict=True
    ):
        row, column = window[:2]
        for y in range(SIDE):
            for x in range(SIDE + 1):
                from_x = SIDE - x if mirror else x
                inside = 0 <= y + row < SIDE and 0 <= from_x + column < SIDE + 1
                assert (result[y, x] == (image[y + row, from_x + column] if inside else 0)).all()


def test_all_corners_and_both_mirrors_occur() -> None:
    draws = np.random.default_rng(0).random((500, 3))
    placed = CropFlip((SIDE, SIDE), 1, hflip=True).sample_crops(draws, np.full((500, 2), SIDE, np.int32))
    assert {tuple(c) for c in placed.windows[:, :2].tolist()} == {(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1)}
    assert set(placed.mirrors.tolist()) == {0, 1}
    assert (
        not CropFlip((SIDE, SIDE), 1, hflip=False).sample_crops(draws, np.full((500, 2), SIDE, np.int32)).mirrors.any()
    )


def test_both_pipelines_give_the_same_bytes_of_arrays() -> None:
    samples = array_samples(101)
    for ours, theirs in zip(
        read("torch", feed_of(samples, 8), 3, 2, 40), read("dali", feed_of(samples, 8), 3, 2, 40), strict=True
    ):
        assert torch.equal(ours.inputs, theirs.inputs)
        assert torch.equal(ours.targets, theirs.targets)
        assert (ours.ids == theirs.ids).all()


@pytest.mark.parametrize("kind", ["training", "testing"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_the_definition_for_a_gpu_gives_the_same_pixels_on_a_cpu(
    tmp_path: Path, kind: str, channels_last: bool
) -> None:
    """Except for DALI's filter at a window's edges, and values that round the other way."""
    samples, finish = encoded_samples(tmp_path, 24), replace(FINISH, channels_last=channels_last)
    rule = CenterCrop((CROP, CROP), 14)
    sampler = feed_of(samples, 24) if kind == "training" else EvalSampler(samples, rule, [range(24)])
    read = (arrays_of(sampler, raw, in_dali=True) for raw in sampler.raw_batches(0, 1))
    (output,) = make_pipeline(sampler, finish, lambda: next(read), 24, 1, in_dali=True).run()
    found = channels_first(from_dlpack(output.as_tensor()), finish)
    _, expected = next(torch_inputs(sampler, finish, 0, 1))
    inner = (..., slice(2, -2), slice(2, -2))
    assert (found - expected)[inner].abs().max() < 1.5 / (255 * min(FINISH.std))
    assert (found - expected).abs().mean() < 0.02


# --- one order for any machine ------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "name"), combinations())
@pytest.mark.parametrize(
    ("ranks", "batch", "micro_batch"), [(1, 64, 64), (2, 64, 32), (4, 64, 4), (3, 100, 7), (1, 500, 128)]
)
def test_a_sample_has_the_same_pixels_in_every_layout(
    make_samples: Callable[[str, int], Dataset], kind: str, name: str, ranks: int, batch: int, micro_batch: int
) -> None:
    """The stream is cut into micro-batches; 131 samples are not divisible by any of them."""
    samples = make_samples(kind, 131)
    entries = 2 * batch
    expected = read("torch", feed_of(samples, entries), 0, 1, 1)[0]
    num_ghost_batches = entries // micro_batch
    for rank in range(ranks):
        mine = ghost_batches_of_rank(0, num_ghost_batches, rank, ranks)
        for k, found in zip(mine, read(name, feed_of(samples, micro_batch), rank, ranks, len(mine)), strict=True):
            part = slice(k * micro_batch, (k + 1) * micro_batch)
            assert (found.stream_index == np.arange(part.start, part.stop)).all()
            assert (found.ids == expected.ids[part]).all()
            assert torch.equal(found.targets, expected.targets[part])
            assert torch.equal(found.inputs, expected.inputs[part])


@pytest.mark.parametrize(("kind", "name"), combinations())
def test_growth_within_an_epoch_continues_the_stream(
    make_samples: Callable[[str, int], Dataset], kind: str, name: str
) -> None:
    """Two ranks take 2, then 6, then 10 ghost batches per update, from the same pipelines."""
    samples = make_samples(kind, 50)
    group, expected = 4, read("torch", feed_of(samples, 4), 0, 1, 18)
    readers = [iter(read(name, feed_of(samples, group), rank, 2, 9)) for rank in range(2)]
    first = 0
    for groups in (2, 6, 10):
        for rank in range(2):
            for k in ghost_batches_of_rank(first, groups, rank, 2):
                found = next(readers[rank])
                assert (found.ids == expected[k].ids).all()
                assert torch.equal(found.inputs, expected[k].inputs)
        first += groups


@pytest.mark.parametrize(("kind", "name"), combinations())
def test_a_resume_in_mid_epoch_at_another_rank_count(
    make_samples: Callable[[str, int], Dataset], kind: str, name: str
) -> None:
    samples = make_samples(kind, 37)  # an epoch is 4.6 groups
    whole = read("torch", feed_of(samples, 8), 0, 1, 20)
    for first, ranks in ((1, 1), (3, 2), (5, 3)):
        for rank in range(ranks):
            start = ghost_batches_of_rank(first, ranks, rank, ranks)[0]
            for k, found in zip(
                range(start, 20, ranks), read(name, feed_of(samples, 8), start, ranks, 2), strict=False
            ):
                assert (found.ids == whole[k].ids).all()
                assert torch.equal(found.inputs, whole[k].inputs)


@pytest.mark.parametrize(("kind", "name"), combinations())
def test_one_sample_and_batches_larger_than_the_set(
    make_samples: Callable[[str, int], Dataset], kind: str, name: str
) -> None:
    samples = make_samples(kind, 1)
    (batch,) = read(name, feed_of(samples, 16), 0, 1, 1)
    assert (batch.ids == 0).all()
    if kind != "rows":  # 16 epochs: each with its own crop
        assert len({tuple(image.flatten().tolist()) for image in batch.inputs}) > 4


def test_epochs_differ_in_order_and_augmentation() -> None:
    samples = array_samples(64)
    first, second = read("torch", feed_of(samples, 64), 0, 1, 2)
    assert (first.ids != second.ids).any()
    again = first.inputs[np.argsort(first.ids)], second.inputs[np.argsort(second.ids)]
    assert (again[0] != again[1]).flatten(1).any(1).float().mean() > 0.9


def test_ranks_never_share_augmentation_draws() -> None:
    """The defect: every node seeds its generator alike, and rank r's n-th sample is cropped as rank 0's."""
    samples = array_samples(4096)
    placements = []
    for rank in range(2):
        raw = next(feed_of(samples, 1024).raw_batches(rank, 2))
        assert raw.placement is not None
        placements.append(np.column_stack((raw.placement.windows[:, :2], raw.placement.mirrors)))
    same = (placements[0] == placements[1]).all(axis=1).mean()
    assert same == pytest.approx(1 / 50, abs=4 * (0.02 / 1024) ** 0.5)  # 25 corners, 2 mirrors: by chance


def test_batches_are_not_overwritten_by_those_that_follow(make_samples: Callable[[str, int], Dataset]) -> None:
    for kind in ("images", "encoded"):
        found = read("dali", feed_of(make_samples(kind, 30), 8), 0, 1, 6)
        again = read("torch", feed_of(make_samples(kind, 30), 8), 0, 1, 6)
        for a, b in zip(found, again, strict=True):
            assert torch.equal(a.inputs, b.inputs)


# --- the window of a resized crop -------------------------------------------------------------------


def windows_of(sizes: NDArray[np.int32], rule: ResizedCrop) -> NDArray[np.int32]:
    draws = np.random.default_rng(0).random((len(sizes), rule.num_draws))
    return rule.sample_crops(draws, sizes).windows


def test_windows_have_the_requested_area_and_aspect() -> None:
    sizes = np.broadcast_to(np.array([375, 500], np.int32), (20_000, 2))
    windows = windows_of(sizes, ResizedCrop((224, 224), (0.08, 1.0), (3 / 4, 4 / 3), hflip=False))
    top, left, height, width = windows.T
    assert (top >= 0).all() and (left >= 0).all()  # noqa: PT018
    assert (top + height <= 375).all() and (left + width <= 500).all()  # noqa: PT018
    area, aspect = height * width / (375 * 500), width / height
    # Rounding to whole pixels moves a window of 100 pixels by half a per cent.
    assert (area >= 0.08 * 0.99).all()
    assert ((aspect >= 0.75 * 0.99) & (aspect <= 4 / 3 * 1.01)).all()
    # The share is uniform, but for those that did not fit and were drawn again, which are large.
    small = area[area < 0.5]
    assert abs(small.mean() - 0.29) < 0.01
    assert {0} < set(top[height < 300].tolist())


def test_where_no_window_fits_it_is_the_largest_central_one() -> None:
    rule = ResizedCrop((8, 8), (1.0, 1.0), (1.0, 1.0), hflip=False)
    windows = windows_of(np.array([[10, 30], [30, 10], [12, 12]], np.int32), rule)
    assert windows.tolist() == [[0, 10, 10, 10], [10, 0, 10, 10], [0, 0, 12, 12]]


# --- the last stage -----------------------------------------------------------------------------------


def test_normalization_is_per_channel() -> None:
    image = torch.tensor([[[[0, 255]]]], dtype=torch.uint8)
    result = Normalize((0.5, 0.0), (0.25, 2.0)).images(image)
    assert result.tolist() == [[[[-2.0]], [[0.5]]]]
    assert Normalize((1.0, 2.0), (2.0, 4.0)).rows(torch.tensor([[3.0, 0.0]])).tolist() == [[1.0, -0.5]]


@pytest.mark.parametrize("name", PIPELINES)
@pytest.mark.parametrize("kind", ["images", "encoded"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_memory_layout_and_type_change_no_pixel(
    make_samples: Callable[[str, int], Dataset], kind: str, name: str, dtype: str
) -> None:
    samples = make_samples(kind, 20)
    source = Datasets(samples, samples, 7, FINISH.mean, FINISH.std)
    data = {"source": "synthetic_images", "crop_padding": 2, "hflip": True, "pipeline": name, "image_size": CROP}
    plain, changed = (
        next(
            Reader(DataSection(**data, **form), source, torch.device("cpu"), 1, raise_bad, MOST).training(  # type: ignore[arg-type]
                Stream(20, 0), 20, 0, 1
            )
        ).inputs
        for form in ({}, {"channels_last": True, "dtype": dtype})
    )
    assert changed.dtype == getattr(torch, dtype)
    assert changed.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(plain, changed.float(), rtol=0, atol=1e-6 if dtype == "float32" else 2e-3)


# --- testing ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "name"), combinations())
@pytest.mark.parametrize("ranks", [1, 3])
def test_every_test_sample_is_evaluated_once(
    make_samples: Callable[[str, int], Dataset], kind: str, name: str, ranks: int
) -> None:
    samples = make_samples(kind, 23)
    source = Datasets(samples, samples, 7, FINISH.mean, FINISH.std)
    data = DataSection(source="idx", pipeline="auto" if kind == "rows" else name, image_size=CROP)  # type: ignore[arg-type]
    reader = Reader(data, source, torch.device("cpu"), 1, raise_bad, MOST)
    chunks = [range(start, min(start + 5, 23)) for start in range(0, 23, 5)]
    found = [batch for rank in range(ranks) for batch in reader.testing(chunks[rank::ranks])]
    assert sorted(np.concatenate([batch.ids for batch in found]).tolist()) == list(range(23))
    again = next(reader.testing([range(23)]))
    for batch in found:
        assert torch.equal(batch.inputs, again.inputs[batch.ids])
    if kind == "images":
        assert torch.equal(again.inputs, FINISH.images(torch.from_numpy(samples.fetch(np.arange(23)))))


def test_the_center_is_cut_as_torchvision_does(tmp_path: Path) -> None:
    """Resize the shorter side and crop the center with PIL, which uses the same triangle filter and rounds to bytes."""
    samples = encoded_samples(tmp_path, 12)
    source = Datasets(samples, samples, 7, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    data = DataSection(source="idx", image_size=10, eval_resize=14)
    (batch,) = Reader(data, source, torch.device("cpu"), 1, raise_bad, MOST).testing([range(12)])
    for k, found in enumerate(batch.inputs):
        with Image.open(tmp_path / f"{k}.jpg") as opened:
            image = opened.convert("RGB")
        short, long = sorted(image.size)
        long = int(14 * long / short)
        size = (14, long) if image.width <= image.height else (long, 14)
        left, top = (round((side - 10) / 2) for side in size)
        expected = image.resize(size, Image.Resampling.BILINEAR).crop((left, top, left + 10, top + 10))
        difference = found.permute(1, 2, 0) * 255 - torch.from_numpy(np.array(expected)).float()
        assert difference.abs().max() < 1.1  # PIL rounds after each of two passes


# --- bad samples --------------------------------------------------------------------------------------


DAMAGES = [(name, how) for name in PIPELINES for how in ("missing", "truncated", "changed", "undecodable")]


@pytest.fixture
def short_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check only the first bytes of each image on reading, so that damage after them reaches the decoder."""
    monkeypatch.setattr(encoded_dataset, "HEAD_BYTES", 64)


def damaged(folder: Path, how: str) -> EncodedDataset:
    """Write 25 images; number 6 is damaged after indexing, or known to be bad."""
    samples = encoded_samples(folder, 25)
    path = folder / "6.jpg"
    if how == "known":
        samples.sizes[6] = 0
    elif how == "missing":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(path.read_bytes()[:100])
    elif how == "changed":
        path.write_bytes(bytes(path.stat().st_size))
    else:
        path.write_bytes(path.read_bytes()[:64].ljust(path.stat().st_size, b"\0"))
    return samples


@pytest.mark.usefixtures("short_head")
@pytest.mark.parametrize(("name", "how"), DAMAGES)
def test_a_bad_sample_ends_the_run_naming_file_and_id(tmp_path: Path, name: str, how: str) -> None:
    with pytest.raises(BadSample, match=rf"sample 6 \({tmp_path}/6.jpg\): .*data.on_bad_sample = 'replace'"):
        read(name, feed_of(damaged(tmp_path, how), 5), 0, 1, 5)


@pytest.mark.usefixtures("short_head")
@pytest.mark.parametrize(("name", "how"), [("torch", "known"), ("dali", "known"), *DAMAGES])
@pytest.mark.parametrize(("ranks", "group"), [(1, 5), (2, 5), (3, 2)])
def test_a_bad_sample_is_replaced_by_the_next_of_the_stream(
    tmp_path: Path, name: str, how: str, ranks: int, group: int
) -> None:
    samples = damaged(tmp_path, how)
    stream = Stream(25, 5)
    order = stream.ids(0, 61)
    reported: list[int] = []
    for rank in range(ranks):
        sampler = TrainSampler(samples, stream, augment_of(samples), group, lambda bad: reported.append(bad.sample_id))
        for k, batch in zip(
            range(rank, 60 // group, ranks), read(name, sampler, rank, ranks, 60 // group // ranks), strict=False
        ):
            wanted = order[k * group : (k + 1) * group]
            after = order[k * group + 1 : (k + 1) * group + 1]
            assert (batch.ids == np.where(wanted == 6, after, wanted)).all()
            assert (batch.replaced == (wanted == 6)).all()
            assert batch.targets.tolist() == [id_ % 7 for id_ in batch.ids]
    assert set(reported) == (set() if how == "known" else {6})
    assert len(reported) <= ranks  # each rank finds out once


@pytest.mark.usefixtures("short_head")
@pytest.mark.parametrize("name", PIPELINES)
def test_bad_test_samples_are_skipped(tmp_path: Path, name: str) -> None:
    samples = damaged(tmp_path, "changed")
    source = Datasets(samples, samples, 7, FINISH.mean, FINISH.std)
    data = DataSection(source="idx", image_size=CROP, pipeline=name)  # type: ignore[arg-type]
    reported: list[BadSample] = []
    reader = Reader(data, source, torch.device("cpu"), 1, reported.append, MOST)
    found = [k for batch in reader.testing([range(10), range(10, 25)]) for k in batch.ids.tolist()]
    assert found == [k for k in range(25) if k != 6]
    assert [bad.sample_id for bad in reported] == [6]


def test_a_bad_sample_is_reported_once_as_replaced_in_training_and_once_as_skipped_in_evaluations(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    samples = encoded_samples(tmp_path, 24)
    data = {"source": "image_folder", "num_samples": 24, "image_size": CROP, "crop_padding": 0}
    job = small_job(data={**data, "on_bad_sample": "replace"}, model={"ghost_batch": 8})
    source = Datasets(samples, samples, 7, FINISH.mean, FINISH.std)
    parts = TrainingParts(job, source, SingleRank(), torch.device("cpu"))
    (tmp_path / "6.jpg").unlink()
    for _ in range(2):  # each evaluation, and training after a change of ranks, begins with new samplers
        assert sum(len(batch.ids) for batch in parts.reader.testing([range(24)])) == 23
        assert all(6 not in batch.ids for batch in parts.ghost_batches(0, SingleRank()).take(3))
    place = f"rank 0: sample 6 ({tmp_path}/6.jpg): cannot be read: No such file or directory; "
    assert capfd.readouterr().err.splitlines() == [f"{place}skipped", f"{place}the next sample replaces it"]


@pytest.mark.usefixtures("short_head")
@pytest.mark.parametrize("name", PIPELINES)
def test_a_range_of_bad_test_samples_makes_no_other_count_twice(tmp_path: Path, name: str) -> None:
    """The defect: a bad sample after a range without good samples repeated an evaluated range."""
    samples = damaged(tmp_path, "changed")
    samples.sizes[:2] = 0
    source = Datasets(samples, samples, 7, FINISH.mean, FINISH.std)
    data = DataSection(source="idx", image_size=CROP, pipeline=name)  # type: ignore[arg-type]
    reader = Reader(data, source, torch.device("cpu"), 1, lambda bad: None, MOST)
    chunks = [range(start, min(start + 2, 25)) for start in range(0, 25, 2)]
    found = [k for batch in reader.testing(chunks) for k in batch.ids.tolist()]
    assert found == [k for k in range(2, 25) if k != 6]


@pytest.mark.usefixtures("short_head")
def test_a_failure_of_dali_is_traced_to_the_sample(tmp_path: Path) -> None:
    samples = damaged(tmp_path, "undecodable")
    raws = [next(feed_of(samples, 25).raw_batches(0, 1))]
    cause = cause_of(samples, raws, RuntimeError("Critical error in pipeline"))
    assert isinstance(cause, BadSample)
    assert cause.sample_id == 6
    whole = encoded_samples(tmp_path, 25)
    raws = [next(feed_of(whole, 25).raw_batches(0, 1))]
    with pytest.raises(RunError, match=r"DALI failed on the samples \d+, .*: Critical error in pipeline"):
        raise cause_of(whole, raws, RuntimeError("Critical error in pipeline"))


def test_nothing_but_bad_samples_is_an_error(tmp_path: Path) -> None:
    samples = encoded_samples(tmp_path, 3)
    samples.sizes[:] = 0
    with pytest.raises(RunError, match="all 3 training samples are bad"):
        read("torch", feed_of(samples, 2), 0, 1, 1)


# --- the choice ---------------------------------------------------------------------------------------


def test_auto_takes_the_faster_one_and_missing_dali_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrays, rows, encoded = small_source().train, row_samples(3), encoded_samples(tmp_path, 1)
    auto, dali = (DataSection(source="idx", pipeline=name) for name in ("auto", "dali"))
    assert [choose_pipeline(auto, samples) for samples in (arrays, rows, encoded)] == ["torch", "torch", "dali"]
    with pytest.raises(JobError, match="'dali' reads images, and these are rows"):
        choose_pipeline(dali, rows)
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if "nvidia" in name else find_spec(name))
    assert choose_pipeline(auto, encoded) == "torch"
    with pytest.raises(RunError, match=r"pip install 'hvd_batchgrow\[dali-cuda130\]', or --data.pipeline torch"):
        choose_pipeline(dali, encoded)
