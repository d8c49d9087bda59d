"""DALI's buffers and streams, the batches of whole passes, and one pipeline for a whole run."""

from __future__ import annotations

import inspect
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nvidia.dali import Pipeline
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.dlpack import from_dlpack

from hvd_batchgrow.comm.ranks import SingleRank
from hvd_batchgrow.data.datasets.dataset import ArrayDataset, BadSample, Dataset, Datasets
from hvd_batchgrow.data.order.stream import Stream, micro_batches_of_rank
from hvd_batchgrow.data.pipeline import dali_pipeline
from hvd_batchgrow.data.pipeline import sampler as samplers
from hvd_batchgrow.data.pipeline.crops import Augment, CropFlip, ResizedCrop
from hvd_batchgrow.data.pipeline.dali_definition import make_pipeline
from hvd_batchgrow.data.pipeline.dali_pipeline import DaliPipeline
from hvd_batchgrow.data.pipeline.reader import GhostBatches, GhostBatchStream
from hvd_batchgrow.data.pipeline.sampler import NumGhostBatches, RawBatch, TrainSampler, one_by_one
from hvd_batchgrow.data.pipeline.torch_pipeline import Normalize, torch_inputs
from hvd_batchgrow.schedule.plan import compile_plan
from hvd_batchgrow.train.update.micro_batches import ghost_batches_per_micro_batch
from tests.helpers import SIDE, encoded_samples, measured_job, small_job
from tests.training import train

CROP, GROUP, SEED = 12, 4, 5
NORMALIZE = Normalize((0.5, 0.4, 0.3), (0.25, 0.2, 0.3))
JPEG = {"source": "image_folder", "image_size": CROP, "crop_padding": 0, "num_samples": 300}


@pytest.fixture(autouse=True)
def few_drawn_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute few ids and draws in one call: many epochs of small sets cost time, and more calls follow each other."""
    monkeypatch.setattr(samplers, "_DRAWN_AT_ONCE", 64)


def samples_of(kind: str, folder: Path, count: int = 60) -> Dataset:
    if kind == "encoded":
        return encoded_samples(folder, count)
    values = np.random.default_rng(1).integers(0, 256, (count, SIDE, SIDE, 3), dtype=np.uint8)
    return ArrayDataset(values, np.arange(count) % 7)


def sampler_of(samples: Dataset, num_ghost_batches: NumGhostBatches = one_by_one) -> TrainSampler:
    rule: Augment = CropFlip((SIDE, SIDE), 2, hflip=True)
    if samples.kind == "encoded":
        rule = ResizedCrop((CROP, CROP), (0.08, 1.0), (3 / 4, 4 / 3), hflip=True)
    return TrainSampler(samples, Stream(len(samples), SEED), rule, GROUP, num_ghost_batches=num_ghost_batches)


def expected_inputs(samples: Dataset, groups: Iterable[int]) -> Tensor:
    """Return the inputs of ghost batches, which the torch pipeline makes one at a time."""
    return torch.cat([next(torch_inputs(sampler_of(samples), NORMALIZE, group, 1))[1] for group in groups])


# --- batches of several ghost batches ---------------------------------------------------------------


@pytest.mark.parametrize("name", ["torch", "dali"])
@pytest.mark.parametrize("kind", ["images", "encoded"])
@pytest.mark.parametrize("stride", [1, 3])
def test_a_batch_of_several_ghost_batches_has_the_pixels_of_each(
    tmp_path: Path, kind: str, name: str, stride: int
) -> None:
    samples = samples_of(kind, tmp_path)
    sampler = sampler_of(samples, lambda group: 1 + group % 4)
    found: Iterator[tuple[RawBatch, Tensor]] = (
        torch_inputs(sampler, NORMALIZE, 2, stride)
        if name == "torch"
        else DaliPipeline(NORMALIZE, 4 * GROUP, 1).inputs(sampler, 2, stride)
    )
    group = 2
    for raw, inputs in islice(found, 9):
        groups = range(group, group + (1 + group % 4) * stride, stride)
        group = groups.stop
        assert raw.next_ghost_batch == group
        assert raw.stream_index.tolist() == [k * GROUP + j for k in groups for j in range(GROUP)]
        assert torch.equal(inputs, expected_inputs(samples, groups))


def counted(sizes: Iterable[int]) -> Iterator[GhostBatches]:
    """Yield batches of so many ghost batches of two samples, numbered from 0."""
    start = 0
    for size in sizes:
        index = np.arange(start, start + 2 * size)
        start += 2 * size
        yield GhostBatches(torch.from_numpy(index), torch.from_numpy(-index), index, 3 * index, index % 2 == 1)


@pytest.mark.parametrize(
    ("sizes", "taken", "parts"),
    [
        ([3, 3, 2], [3, 3, 2], [1, 1, 1]),
        ([3, 3, 2], [2, 2, 2, 2], [1, 2, 1, 1]),
        ([1, 1, 1, 1, 1], [2, 3], [2, 3]),
        ([5], [1, 0, 3, 1], [1, 0, 1, 1]),
    ],
)
def test_any_number_of_ghost_batches_is_taken_in_order(sizes: list[int], taken: list[int], parts: list[int]) -> None:
    stream, index = GhostBatchStream(counted(sizes), 2), np.arange(2 * sum(sizes))
    found = [stream.take(count) for count in taken]
    assert [len(batches) for batches in found] == parts
    assert [sum(len(batch.ids) for batch in batches) for batches in found] == [2 * count for count in taken]
    flat = [batch for batches in found for batch in batches]
    for name, expected in {
        "inputs": index,
        "targets": -index,
        "stream_index": index,
        "ids": 3 * index,
        "replaced": index % 2 == 1,
    }.items():
        assert (np.concatenate([np.asarray(getattr(batch, name)) for batch in flat]) == expected).all()


def test_a_batch_that_matches_is_not_copied() -> None:
    batches = list(counted([3, 2]))
    stream = GhostBatchStream(iter(batches), 2)
    assert stream.take(3)[0] is batches[0]
    assert stream.take(1)[0].inputs.data_ptr() == batches[1].inputs.data_ptr()


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("max_micro_batch", [8, 16, 24, 40])
def test_batches_are_the_passes_of_the_plan(ranks: int, max_micro_batch: int) -> None:
    """Batches of 24, 72 and 96 samples: 3, 9 and 12 ghost batches in passes of at most 1, 2, 3 or 5 on each rank."""
    layout = {"max_micro_batch": max_micro_batch, "uneven_ranks": True}
    plan = compile_plan(small_job(schedule={"global_batch": 24}, layout=layout), ranks, 300)
    assert len({phase.global_batch for phase in plan.schedule.phases}) == 3
    for rank in range(ranks):
        expected: list[list[int]] = []
        samples = 0
        while samples < plan.schedule.end_samples:
            index = plan.schedule.index_at(samples)
            batch, micro_batch = plan.schedule.phases[index].global_batch, plan.layouts[index].micro_batch
            passes = micro_batches_of_rank(samples, batch, 8, micro_batch, rank, ranks)
            expected += [[samples // 8 + slot for slot in slots] for slots in passes]
            samples += batch
        found: list[list[int]] = []
        group = rank
        while len(found) < len(expected):
            found.append(list(range(group, group + ghost_batches_per_micro_batch(plan, group, ranks) * ranks, ranks)))
            group = found[-1][-1] + ranks
        assert found == expected
        assert (
            ghost_batches_per_micro_batch(plan, 10**6 * ranks + rank, ranks) >= 1
        )  # prefetched after the end of the run
        # A batch that begins within a pass ends with it.
        for groups in expected:
            assert [ghost_batches_per_micro_batch(plan, k, ranks) for k in groups] == list(range(len(groups), 0, -1))


# --- streams and buffers ----------------------------------------------------------------------------


class FakeStream:
    """Executes what was enqueued, when the device gets to it."""

    def __init__(self) -> None:
        self.enqueued: deque[Callable[[], object]] = deque()
        self.num_done = 0

    def enqueue(self, operation: Callable[[], object]) -> None:
        self.enqueued.append(operation)

    def execute(self, leave: int = 0) -> None:
        while len(self.enqueued) > leave:
            self.enqueued.popleft()()
            self.num_done += 1

    def record_event(self) -> FakeEvent:
        return FakeEvent(self, self.num_done + len(self.enqueued))


class FakeEvent:
    def __init__(self, stream: FakeStream, at: int) -> None:
        self.stream, self.at = stream, at

    def query(self) -> bool:
        return self.stream.num_done >= self.at


class EnqueuedCopies(TorchDispatchMode):
    """`clone` only enqueues the copy, as on a GPU; until then the result is NaN."""

    def __init__(self, stream: FakeStream) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.stream = stream

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.ops.aten.clone.default:
            return func(*args, **(kwargs or {}))
        result = torch.full_like(args[0], float("nan"))
        self.stream.enqueue(lambda: result.copy_(args[0]))
        return result


class Output:
    """A DALI output on a GPU: a view of a buffer."""

    def __init__(self, buffer: Tensor) -> None:
        self.buffer = buffer

    def as_tensor(self) -> Tensor:
        return self.buffer


class FakeGpuPipeline:
    """Its outputs are the samples' crops' corners. DALI reuses the buffer of an output that is no longer referenced."""

    def __init__(self, source: Callable[[], tuple[Any, ...]]) -> None:
        self.source = source
        self.buffers: list[tuple[Tensor, Callable[[], Output | None]]] = []
        self.streams: list[object] = []

    def run(self, stream: FakeStream, /) -> tuple[Output]:
        self.streams.append(stream)
        corners = torch.from_numpy(self.source()[1]).float().view(-1, 2, 1, 1)
        free = [buffer for buffer, output in self.buffers if output() is None]
        buffer = free[0] if free else torch.empty_like(corners)
        buffer.copy_(corners)  # at once: DALI's own streams do not wait for torch's
        output = Output(buffer)
        self.buffers = [pair for pair in self.buffers if pair[0] is not buffer] + [(buffer, weakref.ref(output))]
        return (output,)


@pytest.mark.parametrize("lag", [0, 1, 5, 100])
def test_on_a_gpu_no_buffer_is_reused_before_torch_has_copied_it_on_the_stream_it_was_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lag: int
) -> None:
    """The device lags behind the host by so many copies."""
    stream, made = FakeStream(), []
    devices: list[torch.device] = []

    def make(sampler: object, normalize: object, source: Callable[[], Any], *_: object, in_dali: bool) -> Any:
        assert in_dali
        made.append(FakeGpuPipeline(source))
        return made[-1]

    def current_stream(device: torch.device) -> FakeStream:
        devices.append(device)
        return stream

    monkeypatch.setattr(dali_pipeline, "make_pipeline", make)
    monkeypatch.setattr(torch.cuda, "current_stream", current_stream)
    samples, device = samples_of("encoded", tmp_path), torch.device("cuda", 1)
    opened = DaliPipeline(replace(NORMALIZE, device=device), GROUP, 1).inputs(sampler_of(samples), 0, 1)
    found, count = [], 12
    for _ in range(count):
        with EnqueuedCopies(stream):
            found.append(next(opened)[1])
        stream.execute(leave=lag)
    stream.execute()
    (pipeline,) = made
    assert pipeline.streams == [stream] * count
    assert devices == [device] * count
    assert len(pipeline.buffers) <= min(count, lag + 2)  # released once they are copied
    raws = islice(sampler_of(samples).raw_batches(0, 1), count)
    for inputs, raw in zip(found, raws, strict=True):
        assert raw.placement is not None
        assert inputs.flatten().tolist() == raw.placement.windows[:, :2].flatten().tolist()


class FakeCpuPipeline:
    """A DALI pipeline whose outputs are overwritten at the next run."""

    def __init__(self, *args: Any, **keys: Any) -> None:
        self.real = make_pipeline(*args, **keys)
        self.outputs: list[Tensor] = []

    def run(self, stream: None = None, /) -> tuple[Any]:
        assert stream is None
        (output,) = self.real.run()
        for earlier in self.outputs:
            earlier.fill_(0)
        self.outputs = [from_dlpack(sample).clone() for sample in output]
        return (_Samples(self.outputs),)


class _Samples(list[Tensor]):
    def as_tensor(self) -> Tensor:
        self[:] = torch.stack(list(self)).unbind()
        whole = self[0]._base
        assert whole is not None
        return whole


@pytest.mark.parametrize("kind", ["images", "encoded"])
def test_on_a_cpu_no_view_outlives_its_buffer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(dali_pipeline, "make_pipeline", FakeCpuPipeline)
    samples = samples_of(kind, tmp_path)
    found = [inputs for _, inputs in islice(DaliPipeline(NORMALIZE, GROUP, 1).inputs(sampler_of(samples), 0, 1), 6)]
    assert torch.equal(torch.cat(found), expected_inputs(samples, range(6)))


def test_dali_takes_the_stream_as_it_is_given(tmp_path: Path) -> None:
    stream = object()
    assert inspect.signature(Pipeline.run).bind(None, stream).arguments["cuda_stream"] is stream
    sampler = sampler_of(samples_of("encoded", tmp_path))
    pipeline = make_pipeline(sampler, NORMALIZE, lambda: (), 1, 1, in_dali=False)
    assert pipeline.exec_dynamic  # other executors refuse a stream


# --- one pipeline after another source --------------------------------------------------------------


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Record every pipeline that is built."""
    built: list[object] = []

    def make(*args: Any, **keys: Any) -> Any:
        built.append(make_pipeline(*args, **keys))
        return built[-1]

    monkeypatch.setattr(dali_pipeline, "make_pipeline", make)
    return built


@pytest.mark.parametrize("kind", ["images", "encoded"])
def test_one_pipeline_reads_one_source_after_another(tmp_path: Path, made: list[object], kind: str) -> None:
    """Endless sources are left with batches in flight, finite ones end; each starts where it should."""
    samples = samples_of(kind, tmp_path)
    pipeline = DaliPipeline(NORMALIZE, 2 * GROUP, 1)
    for first in (0, 7, 3):
        endless = pipeline.inputs(sampler_of(samples, lambda group: 2), first, 1)
        assert torch.equal(next(endless)[1], expected_inputs(samples, [first, first + 1]))
        one = pipeline.inputs(sampler_of(samples, lambda group, first=first: int(group == first)), first, 1)  # type: ignore[misc]
        (only,) = one
        assert torch.equal(only[1], expected_inputs(samples, [first]))
        assert list(pipeline.inputs(sampler_of(samples, lambda group: 0), first, 1)) == []
        with pytest.raises(AssertionError, match="another sampler is being read"):
            next(endless)
    assert len(made) == 1


def test_batches_before_a_bad_sample_are_delivered_and_the_pipeline_serves_on(
    tmp_path: Path, made: list[object]
) -> None:
    samples, pipeline = samples_of("encoded", tmp_path), DaliPipeline(NORMALIZE, GROUP, 1)
    bad = int(Stream(60, SEED).ids(0, 60)[5 * GROUP])
    path = tmp_path / f"{bad}.jpg"
    whole = path.read_bytes()
    path.write_bytes(bytes(len(whole)))
    found: list[Tensor] = []
    with pytest.raises(BadSample) as raised:
        found.extend(inputs for _, inputs in pipeline.inputs(sampler_of(samples), 0, 1))
    assert raised.value.sample_id == bad
    path.write_bytes(whole)
    assert torch.equal(torch.cat(found), expected_inputs(samples, range(5)))
    again = next(pipeline.inputs(sampler_of(samples), 4, 1))[1]
    assert torch.equal(again, expected_inputs(samples, [4]))
    assert len(made) == 1


@pytest.mark.slow
@pytest.mark.parametrize("pipeline", ["dali", "torch"])
def test_a_run_has_one_pipeline_for_training_and_one_beside_it_and_joins_no_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: list[object], pipeline: str
) -> None:
    """Its batch grows twice, its last passes are shorter, it is evaluated, and its statistics are re-estimated."""
    taken: list[int] = []
    take = GhostBatchStream.take

    def recorded(self: GhostBatchStream, count: int) -> list[GhostBatches]:
        batches = take(self, count)
        taken.append(len(batches))
        return batches

    monkeypatch.setattr(GhostBatchStream, "take", recorded)
    samples = encoded_samples(tmp_path, 300)
    job = small_job(
        data={**JPEG, "pipeline": pipeline},
        model={"precise_bn_samples": 40},
        schedule={"global_batch": 40, "max_batch": 240},
        layout={"max_micro_batch": 24},
        evaluation={"batch_size": 32},
    )
    source = Datasets(samples, samples, 7, (0.5,) * 3, (0.2,) * 3)
    trainer, ended = train(job, SingleRank(), tmp_path / "run", source=source)
    assert len({phase.global_batch for phase in trainer.plan.schedule.phases}) > 1
    assert ended.done
    assert set(taken) == {1}
    assert len(made) == (2 if pipeline == "dali" else 0)


@pytest.mark.slow
def test_batches_in_flight_are_cut_where_a_trigger_grows_the_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files are read 256 samples ahead, and DALI prefetches two passes of at most 24 samples."""
    samples = encoded_samples(tmp_path, 300)
    job = measured_job(
        {"name": "norm_test", "theta": 0.1},
        data=JPEG,
        layout={"max_micro_batch": 24},
        schedule={"epochs": 8.0, "global_batch": 40, "max_batch": 120},
    )
    seen: list[int] = []
    joined_at: list[int] = []
    take = GhostBatchStream.take

    def recorded(self: GhostBatchStream, count: int) -> list[GhostBatches]:
        batches = take(self, count)
        if len(batches) > 1:
            joined_at.append(len(seen))
        seen.extend(k for batch in batches for k in batch.stream_index.tolist())
        return batches

    monkeypatch.setattr(GhostBatchStream, "take", recorded)
    source = Datasets(samples, samples, 7, (0.5,) * 3, (0.2,) * 3)
    trainer, _ = train(job, SingleRank(), tmp_path / "run", source=source)
    assert seen == list(range(trainer.plan.schedule.end_samples))
    grown_at = [decision.samples for decision in trainer.plan.decisions]
    late = [at for at in joined_at if not any(0 <= at - grown <= 256 + 5 * 24 for grown in grown_at)]
    assert len(late) < len(joined_at)
    # The batches that were drawn in one call before a growth end where a pass would have ended.
    assert len(late) <= len(grown_at)
