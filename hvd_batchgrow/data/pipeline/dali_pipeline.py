"""DALI pipelines: one definition for CPU and GPU, whose inputs are our ids and draws."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from io import BytesIO
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from nvidia.dali import fn, pipeline_def, types
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from hvd_batchgrow.data.datasets.dataset import BadSample, Dataset
from hvd_batchgrow.data.images.encoded_dataset import EncodedDataset, decode
from hvd_batchgrow.data.images.image_header import inspect_image
from hvd_batchgrow.data.pipeline.sampler import RawBatch, Sampler, TrainSampler
from hvd_batchgrow.data.pipeline.torch_pipeline import Normalize, normalize_windows
from hvd_batchgrow.messages.errors import RunError

_PREFETCH = 2
"""Ghost batches that DALI prefetches."""


def dali_inputs(
    sampler: Sampler, normalize: Normalize, first_group: int, stride: int, num_threads: int
) -> Iterator[tuple[RawBatch, Tensor]]:
    """Yield ghost batches of a sampler and the network's inputs, prefetched by DALI's threads.

    On the CPU, DALI decodes windows and the reference pipeline does the rest, which is faster than DALI and makes both
    pipelines bit-identical. On a GPU, DALI does everything. Pillow decodes images that DALI cannot decode or decodes to
    other pixels. If DALI fails on images marked as decodable, Pillow decodes them from then on, and the ghost batches
    in flight are repeated.

    Raises:
        BadSample: a sample of a prefetched ghost batch cannot be read or decoded.
    """
    group = first_group
    with ThreadPoolExecutor(num_threads, "decode") as pool:
        while True:
            try:
                for raw, values in _inputs(sampler, normalize, group, stride, num_threads, pool):
                    group = raw.group + stride
                    yield raw, values
                return
            except _AgainError:
                continue


class _AgainError(RuntimeError):
    """DALI failed on samples that Pillow can decode; Pillow decodes them from now on."""


def _inputs(
    sampler: Sampler, normalize: Normalize, first_group: int, stride: int, num_threads: int, pool: ThreadPoolExecutor
) -> Iterator[tuple[RawBatch, Tensor]]:
    """See `dali_inputs`. Also raises _AgainError."""
    in_flight: deque[RawBatch] = deque()

    def fed() -> Iterator[RawBatch]:
        for raw in sampler.raw_groups(first_group, stride):
            in_flight.append(raw)
            yield for_dali(sampler, raw, pool) if sampler.samples.kind == "encoded" else raw

    pipeline = make_pipeline(sampler, normalize, fed(), num_threads, in_dali=normalize.device.type == "cuda")
    while True:
        try:
            (output,) = pipeline.run()
        except StopIteration:
            return
        except RuntimeError as error:
            if isinstance(error, RunError):
                raise
            cause, ids = cause_of(sampler.samples, in_flight, error), _ids_of(in_flight)
            if isinstance(cause, BadSample) or sampler.samples.kind != "encoded" or ids <= sampler.not_for_dali:
                raise cause from None
            sampler.not_for_dali |= ids
            raise _AgainError from None
        raw = in_flight.popleft()
        assert raw.placement is not None
        # DALI overwrites its output buffers in later runs: yield copies, not views.
        if sampler.samples.kind == "images":
            yield raw, normalize.images(from_dlpack(output.as_tensor()))
        elif normalize.device.type == "cuda":
            yield raw, channels_first(from_dlpack(output.as_tensor()), normalize)
        else:
            yield raw, normalize_windows(map(from_dlpack, output), raw.placement, normalize)


def _ids_of(groups: Iterable[RawBatch]) -> set[int]:
    return {sample_id for raw in groups for sample_id in raw.ids.tolist()}


def for_dali(sampler: Sampler, raw: RawBatch, pool: ThreadPoolExecutor) -> RawBatch:
    """Return a ghost batch that DALI can decode: windows of other images, decoded by Pillow, replace them as PPM files.

    Args:
        sampler: of the ghost batch.
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
    if isinstance(sampler.samples, EncodedDataset):
        return sampler.samples.is_for_dali(sample_id)
    return inspect_image(BytesIO(data.tobytes())).for_dali


def channels_first(values: Tensor, normalize: Normalize) -> Tensor:
    """Return a copy of shape (n, C, H, W), in either memory format."""
    return (values.permute(0, 3, 1, 2) if normalize.channels_last else values).clone()


def make_pipeline(
    sampler: Sampler, normalize: Normalize, groups: Iterator[RawBatch], num_threads: int, *, in_dali: bool
) -> Any:
    """Return a built pipeline with one output.

    Args:
        sampler: of the ghost batches.
        normalize: its device decides where DALI runs.
        groups: the input.
        num_threads: of DALI.
        in_dali: DALI also resizes and normalizes encoded images; else the output is their windows.
    """
    definition = (
        _encoded(sampler, normalize, groups, in_dali=in_dali)
        if sampler.samples.kind == "encoded"
        else _images(sampler, normalize, groups)
    )
    pipeline = definition(
        batch_size=sampler.group if isinstance(sampler, TrainSampler) else max(map(len, sampler.chunks), default=1),
        num_threads=num_threads,
        device_id=normalize.device.index if normalize.device.type == "cuda" else None,
        prefetch_queue_depth=_PREFETCH,
    )
    pipeline.build()
    return pipeline


def _images(sampler: Sampler, normalize: Normalize, groups: Iterator[RawBatch]) -> Any:
    """Define the pipeline of images of one size: the uint8 result is that of `cut_and_mirror`."""

    def next_group() -> tuple[Any, ...]:
        raw = next(groups)
        assert raw.placement is not None
        return raw.values, np.ascontiguousarray(raw.placement.windows[:, :2]), raw.placement.mirrors

    @pipeline_def  # type: ignore[untyped-decorator]
    def definition() -> Any:
        images, corners, mirrors = fn.external_source(next_group, num_outputs=3, batch=True, layout=["HWC", "", ""])
        images = images.gpu() if normalize.device.type == "cuda" else images
        shape = list(sampler.samples.shape[:2])
        cut = fn.slice(images, start=corners, shape=shape, axes=[0, 1], out_of_bounds_policy="pad", fill_values=0)
        return fn.flip(cut, horizontal=mirrors)

    return definition


def _encoded(sampler: Sampler, normalize: Normalize, groups: Iterator[RawBatch], *, in_dali: bool) -> Any:
    """Define the pipeline of encoded images, which decodes only the window; `in_dali` resizes and normalizes it too."""
    device = "mixed" if normalize.device.type == "cuda" else "cpu"

    def next_group() -> tuple[Any, ...]:
        raw = next(groups)
        place = raw.placement
        assert place is not None
        windows = np.ascontiguousarray(place.windows[:, :2]), np.ascontiguousarray(place.windows[:, 2:])
        return raw.values, *windows, *((place.resized, place.corners, place.mirrors) if in_dali else ())

    @pipeline_def  # type: ignore[untyped-decorator]
    def definition() -> Any:
        encoded, start, shape, *rule = fn.external_source(next_group, num_outputs=6 if in_dali else 3, batch=True)
        windows = fn.decoders.image_slice(
            encoded,
            start=start,
            shape=shape,
            axes=[0, 1],
            device=device,
            output_type=types.RGB,
            adjust_orientation=False,
        )
        return _finished(windows, rule, sampler, normalize) if in_dali else windows

    return definition


def _finished(windows: Any, rule: Sequence[Any], sampler: Sampler, normalize: Normalize) -> Any:
    """Do in DALI what `normalize_windows` does, except that DALI's filter repeats the edge pixels of a window."""
    resized, corners, mirrors = rule
    mean, std = ([255 * x for x in values] for values in (normalize.mean, normalize.std))
    assert sampler.augment is not None
    images = fn.resize(
        windows, size=fn.cast(resized, dtype=types.FLOAT), interp_type=types.INTERP_LINEAR, antialias=True
    )
    images = fn.slice(images, start=corners, shape=list(sampler.augment.out_size), axes=[0, 1])
    return fn.crop_mirror_normalize(
        images,
        mirror=mirrors,
        mean=mean,
        std=std,
        dtype=types.FLOAT16 if normalize.dtype == torch.float16 else types.FLOAT,
        output_layout="HWC" if normalize.channels_last else "CHW",
    )


def cause_of(samples: Dataset, in_flight: Iterable[RawBatch], error: RuntimeError) -> RunError:
    """Return the bad sample that made DALI fail, found by decoding its inputs with Pillow: DALI does not name it."""
    groups = list(in_flight)
    if samples.kind == "encoded":
        for raw in groups:
            for sample_id, data in zip(raw.ids.tolist(), raw.values, strict=True):
                try:
                    decode(samples, sample_id, data)
                except BadSample as bad:
                    return bad
    ids = ", ".join(str(k) for raw in groups for k in raw.ids.tolist())
    return RunError(f"DALI failed on the samples {ids}, all of which Pillow can decode: {error}")
