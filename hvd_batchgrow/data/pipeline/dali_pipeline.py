"""DALI pipelines that last: they read one sampler after another, and hand their outputs to torch."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from io import BytesIO
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from hvd_batchgrow.data.datasets.dataset import BadSample, Dataset
from hvd_batchgrow.data.datasets.subset import origin
from hvd_batchgrow.data.images.encoded_dataset import EncodedDataset, decode
from hvd_batchgrow.data.images.image_header import inspect_image
from hvd_batchgrow.data.pipeline.dali_definition import arrays_of, make_pipeline
from hvd_batchgrow.data.pipeline.sampler import RawBatch, Sampler
from hvd_batchgrow.data.pipeline.torch_pipeline import Normalize, normalize_windows
from hvd_batchgrow.messages.errors import RunError


class _Feed:
    """What DALI reads, from one sampler after another; it calls `next`."""

    def __init__(self) -> None:
        self.start(iter(()))

    def start(self, batches: Iterator[tuple[RawBatch, tuple[Any, ...]]]) -> None:
        """Read other batches from now on: each, and what DALI reads of it."""
        self.batches = batches
        self.in_flight: deque[RawBatch] = deque()
        self.fault: RunError | None = None
        """Why there are no more batches; None: the sampler has ended."""

    def next(self) -> tuple[Any, ...]:
        """Return DALI's next input. A fault ends it like StopIteration, so that the batches before it are delivered."""
        try:
            raw, arrays = next(self.batches)
        except RunError as fault:
            self.fault = fault
            raise StopIteration from None
        self.in_flight.append(raw)
        return arrays


class DaliPipeline:
    """A DALI pipeline that serves one sampler after another. It is built when the first one is read.

    On the CPU, DALI decodes windows and the reference pipeline does the rest, which is faster than DALI and makes both
    pipelines bit-identical. On a GPU, DALI does everything, and its results are ordered by torch's current stream: the
    host does not wait for them.

    Args:
        normalize: the last stage; its device decides where DALI runs.
        max_samples: the most samples of a batch.
        num_threads: of DALI, and as many that decode with Pillow.
    """

    def __init__(self, normalize: Normalize, max_samples: int, num_threads: int) -> None:
        self.normalize, self.max_samples, self.num_threads = normalize, max_samples, num_threads
        self._pool = ThreadPoolExecutor(num_threads, "decode")
        self._pipeline: Any = None
        self._feed = _Feed()
        self._in_copy: deque[tuple[torch.cuda.Event, Any]] = deque()
        """DALI's outputs, and the event after which each has been copied."""

    def inputs(self, sampler: Sampler, first_ghost_batch: int, stride: int) -> Iterator[tuple[RawBatch, Tensor]]:
        """Yield the batches of a sampler and the network's inputs, prefetched by DALI's threads.

        Only the sampler that was opened last can be read. Pillow decodes images that DALI cannot decode or decodes to
        other pixels. If DALI fails on images marked as decodable, Pillow decodes them from then on, and the batches in
        flight are repeated.

        Raises:
            BadSample: a sample of the next batch cannot be read or decoded.
        """
        index = first_ghost_batch
        while True:
            try:
                for raw, values in self._run(sampler, index, stride):
                    index = raw.next_ghost_batch
                    yield raw, values
                return
            except _AgainError:
                continue

    def _run(self, sampler: Sampler, first_ghost_batch: int, stride: int) -> Iterator[tuple[RawBatch, Tensor]]:
        """See `inputs`. Also raises _AgainError."""
        self._drain()
        feed, batches = self._feed, _read(sampler, first_ghost_batch, stride, self._pool, in_dali=self._on_gpu)
        feed.start(batches)
        if self._pipeline is None:
            self._pipeline = make_pipeline(
                sampler, self.normalize, feed.next, self.max_samples, self.num_threads, in_dali=self._on_gpu
            )
        while True:
            assert feed.batches is batches, "another sampler is being read"
            # The output is ordered by torch's stream. Without a stream, the host would wait for it.
            stream = torch.cuda.current_stream(self.normalize.device) if self._on_gpu else None
            try:
                (output,) = self._pipeline.run(stream)
            except StopIteration:
                if feed.fault:
                    raise feed.fault from None
                return
            except RuntimeError as error:
                self._pipeline = None
                raise _meaning_of(error, sampler, feed.in_flight) from None
            raw = feed.in_flight.popleft()
            values = self._copied(sampler, raw, output)
            if stream is not None:
                self._in_copy.append((stream.record_event(), output))
            while self._in_copy and self._in_copy[0][0].query():
                self._in_copy.popleft()
            yield raw, values

    @property
    def _on_gpu(self) -> bool:
        return self.normalize.device.type == "cuda"

    def _drain(self) -> None:
        """Drop the batches in flight, so that the pipeline can read others."""
        self._feed.start(iter(()))
        try:
            while self._pipeline is not None:
                self._pipeline.run()
        except StopIteration:
            self._pipeline.reset()
        except RuntimeError:  # a dropped batch cannot be decoded
            self._pipeline = None

    def _copied(self, sampler: Sampler, raw: RawBatch, output: Any) -> Tensor:
        """Return the network's inputs in torch's memory: DALI reuses an output that is no longer referenced.

        On a GPU the copy is only enqueued on the current stream.
        """
        assert raw.placement is not None
        if sampler.samples.kind == "images":
            return self.normalize.images(from_dlpack(output.as_tensor()))
        if self._on_gpu:
            return channels_first(from_dlpack(output.as_tensor()), self.normalize)
        return normalize_windows(map(from_dlpack, output), raw.placement, self.normalize)


def _read(
    sampler: Sampler, first_ghost_batch: int, stride: int, pool: ThreadPoolExecutor, *, in_dali: bool
) -> Iterator[tuple[RawBatch, tuple[Any, ...]]]:
    """Yield each batch, and what DALI reads of it."""
    for raw in sampler.raw_batches(first_ghost_batch, stride):
        own = for_dali(sampler, raw, pool) if sampler.samples.kind == "encoded" else raw
        yield raw, arrays_of(sampler, own, in_dali=in_dali)


class _AgainError(RuntimeError):
    """DALI failed on samples that Pillow can decode; Pillow decodes them from now on."""


def _meaning_of(error: RuntimeError, sampler: Sampler, in_flight: Iterable[RawBatch]) -> RuntimeError:
    """Return what DALI's error means: a bad sample, or samples that Pillow decodes from now on."""
    cause = cause_of(sampler.samples, in_flight, error)
    ids = {sample_id for raw in in_flight for sample_id in raw.ids.tolist()}
    if isinstance(cause, BadSample) or sampler.samples.kind != "encoded" or ids <= sampler.not_for_dali:
        return cause
    sampler.not_for_dali |= ids
    return _AgainError()


def for_dali(sampler: Sampler, raw: RawBatch, pool: ThreadPoolExecutor) -> RawBatch:
    """Return a batch that DALI can decode: windows of other images, decoded by Pillow, replace them as PPM files.

    Args:
        sampler: of the batch.
        raw: with encoded images.
        pool: decoding threads.

    Raises:
        BadSample: Pillow cannot decode an image.
    """
    ids, values, place = raw.ids.tolist(), list(raw.values), raw.placement
    assert place is not None
    mine = [k for k, sample_id in enumerate(ids) if not _is_for(sampler, sample_id, values[k])]
    windows = place.windows.copy()

    def window(k: int) -> NDArray[np.uint8]:
        top, left, height, width = place.windows[k].tolist()
        return decode(sampler.samples, ids[k], values[k])[top : top + height, left : left + width]

    for k, pixels in zip(mine, pool.map(window, mine), strict=True):
        height, width, _ = pixels.shape
        header = np.frombuffer(b"P6 %d %d 255\n" % (width, height), np.uint8)
        values[k], windows[k, :2] = np.concatenate((header, pixels.reshape(-1))), 0
    return replace(raw, values=values, placement=replace(place, windows=windows))


def _is_for(sampler: Sampler, sample_id: int, data: NDArray[np.uint8]) -> bool:
    if sample_id in sampler.not_for_dali:
        return False
    whole, id_in_whole = origin(sampler.samples, sample_id)
    if isinstance(whole, EncodedDataset):
        return whole.is_for_dali(id_in_whole)
    return inspect_image(BytesIO(data.tobytes())).for_dali


def channels_first(values: Tensor, normalize: Normalize) -> Tensor:
    """Return a copy of shape (n, C, H, W), in either memory format."""
    return (values.permute(0, 3, 1, 2) if normalize.channels_last else values).clone()


def cause_of(samples: Dataset, in_flight: Iterable[RawBatch], error: RuntimeError) -> RunError:
    """Return the bad sample that made DALI fail, found by decoding its inputs with Pillow: DALI does not name it."""
    raws = list(in_flight)
    if samples.kind == "encoded":
        for raw in raws:
            for sample_id, data in zip(raw.ids.tolist(), raw.values, strict=True):
                try:
                    decode(samples, sample_id, data)
                except BadSample as bad:
                    return bad
    ids = ", ".join(str(k) for raw in raws for k in raw.ids.tolist())
    return RunError(f"DALI failed on the samples {ids}, all of which Pillow can decode: {error}")
