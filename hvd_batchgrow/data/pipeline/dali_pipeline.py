"""DALI pipelines: one definition for the CPU and for a GPU, fed with our ids and draws."""

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
from hvd_batchgrow.data.pipeline.torch_pipeline import Normalize, finish_windows
from hvd_batchgrow.messages.errors import RunError

_PREFETCH = 2
"""Groups that DALI works on ahead of the one that is asked for."""


def dali_inputs(
    feed: Sampler, finish: Normalize, first_group: int, stride: int, num_threads: int
) -> Iterator[tuple[RawBatch, Tensor]]:
    """Groups of a feed, and what the network is given of each, worked on ahead by DALI's own threads.

    On the CPU DALI decodes windows, and the last steps are those of the reference, so that both give the
    same bits; they are faster there than DALI's. On a GPU DALI does all of it. Images that DALI cannot decode, or
    decodes to other pixels, are decoded by Pillow. Where DALI fails on images that were thought to be for it, Pillow
    decodes those from then on, and the groups are made again.

    Raises:
        BadSample: a sample of a group that DALI has begun cannot be read or decoded.
    """
    group = first_group
    with ThreadPoolExecutor(num_threads, "decode") as pool:
        while True:
            try:
                for raw, values in _inputs(feed, finish, group, stride, num_threads, pool):
                    group = raw.group + stride
                    yield raw, values
                return
            except _AgainError:
                continue


class _AgainError(RuntimeError):
    """DALI failed on samples that Pillow can decode, and will not be given them again."""


def _inputs(
    feed: Sampler, finish: Normalize, first_group: int, stride: int, num_threads: int, pool: ThreadPoolExecutor
) -> Iterator[tuple[RawBatch, Tensor]]:
    """See `dali_inputs`. Raises _AgainError too."""
    in_flight: deque[RawBatch] = deque()

    def fed() -> Iterator[RawBatch]:
        for raw in feed.raw_groups(first_group, stride):
            in_flight.append(raw)
            yield for_dali(feed, raw, pool) if feed.samples.kind == "encoded" else raw

    pipeline = make_pipeline(feed, finish, fed(), num_threads, in_dali=finish.device.type == "cuda")
    while True:
        try:
            (output,) = pipeline.run()
        except StopIteration:
            return
        except RuntimeError as error:
            if isinstance(error, RunError):
                raise
            cause, ids = cause_of(feed.samples, in_flight, error), _ids_of(in_flight)
            if isinstance(cause, BadSample) or feed.samples.kind != "encoded" or ids <= feed.not_for_dali:
                raise cause from None
            feed.not_for_dali |= ids
            raise _AgainError from None
        raw = in_flight.popleft()
        assert raw.placement is not None
        # Outputs lie in DALI's own buffers, which later runs overwrite: what leaves here is no view of them.
        if feed.samples.kind == "images":
            yield raw, finish.images(from_dlpack(output.as_tensor()))
        elif finish.device.type == "cuda":
            yield raw, channels_first(from_dlpack(output.as_tensor()), finish)
        else:
            yield raw, finish_windows(map(from_dlpack, output), raw.placement, finish)


def _ids_of(groups: Iterable[RawBatch]) -> set[int]:
    return {sample_id for raw in groups for sample_id in raw.ids.tolist()}


def for_dali(feed: Sampler, raw: RawBatch, pool: ThreadPoolExecutor) -> RawBatch:
    """A group that DALI can decode: images that are not for it are replaced by their window, as a PPM file.

    Args:
        feed: of the group.
        raw: with images as they lie in their files.
        pool: threads that decode.

    Raises:
        BadSample: Pillow cannot decode an image.
    """
    ids, values, place = raw.ids.tolist(), list(raw.values), raw.placement
    assert place is not None
    mine = [k for k, sample_id in enumerate(ids) if not _is_for(feed, sample_id, values[k])]
    windows = place.windows.copy()

    def window(k: int) -> NDArray[np.uint8]:
        top, left, height, width = place.windows[k].tolist()
        return decode(feed.samples, ids[k], values[k])[top : top + height, left : left + width]

    for k, pixels in zip(mine, pool.map(window, mine), strict=True):
        height, width, _ = pixels.shape
        header = np.frombuffer(b"P6 %d %d 255\n" % (width, height), np.uint8)
        values[k], windows[k, :2] = np.concatenate((header, pixels.reshape(-1))), 0
    return replace(raw, values=values, placement=replace(place, windows=windows))


def _is_for(feed: Sampler, sample_id: int, data: NDArray[np.uint8]) -> bool:
    if sample_id in feed.not_for_dali:
        return False
    if isinstance(feed.samples, EncodedDataset):
        return feed.samples.is_for_dali(sample_id)
    return inspect_image(BytesIO(data.tobytes())).for_dali


def channels_first(values: Tensor, finish: Normalize) -> Tensor:
    """A copy of shape (n, C, H, W), whatever lies next to what in memory."""
    return (values.permute(0, 3, 1, 2) if finish.channels_last else values).clone()


def make_pipeline(
    feed: Sampler, finish: Normalize, groups: Iterator[RawBatch], num_threads: int, *, in_dali: bool
) -> Any:
    """A built pipeline with one output.

    Args:
        feed: of the groups.
        finish: says on which device.
        groups: what goes in.
        num_threads: of DALI.
        in_dali: encoded images are resized and normalised by DALI too; else their windows come out.
    """
    definition = (
        _encoded(feed, finish, groups, in_dali=in_dali)
        if feed.samples.kind == "encoded"
        else _images(feed, finish, groups)
    )
    pipeline = definition(
        batch_size=feed.group if isinstance(feed, TrainSampler) else max(map(len, feed.chunks), default=1),
        num_threads=num_threads,
        device_id=finish.device.index if finish.device.type == "cuda" else None,
        prefetch_queue_depth=_PREFETCH,
    )
    pipeline.build()
    return pipeline


def _images(feed: Sampler, finish: Normalize, groups: Iterator[RawBatch]) -> Any:
    """Arrays of one size: cut with zeros beyond the edges, mirrored; bytes as they leave `cut_and_mirror`."""

    def next_group() -> tuple[Any, ...]:
        raw = next(groups)
        assert raw.placement is not None
        return raw.values, np.ascontiguousarray(raw.placement.windows[:, :2]), raw.placement.mirrors

    @pipeline_def  # type: ignore[untyped-decorator]
    def definition() -> Any:
        images, corners, mirrors = fn.external_source(next_group, num_outputs=3, batch=True, layout=["HWC", "", ""])
        images = images.gpu() if finish.device.type == "cuda" else images
        shape = list(feed.samples.shape[:2])
        cut = fn.slice(images, start=corners, shape=shape, axes=[0, 1], out_of_bounds_policy="pad", fill_values=0)
        return fn.flip(cut, horizontal=mirrors)

    return definition


def _encoded(feed: Sampler, finish: Normalize, groups: Iterator[RawBatch], *, in_dali: bool) -> Any:
    """Encoded images of any size: only the window is decoded; where DALI goes on, it is resized and normalised."""
    device = "mixed" if finish.device.type == "cuda" else "cpu"

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
        return _finished(windows, rule, feed, finish) if in_dali else windows

    return definition


def _finished(windows: Any, rule: Sequence[Any], feed: Sampler, finish: Normalize) -> Any:
    """What `finish_windows` does, in DALI; at a window's edges its filter counts the pixel at the edge again."""
    resized, corners, mirrors = rule
    mean, std = ([255 * x for x in values] for values in (finish.mean, finish.std))
    assert feed.augment is not None
    images = fn.resize(
        windows, size=fn.cast(resized, dtype=types.FLOAT), interp_type=types.INTERP_LINEAR, antialias=True
    )
    images = fn.slice(images, start=corners, shape=list(feed.augment.out_size), axes=[0, 1])
    return fn.crop_mirror_normalize(
        images,
        mirror=mirrors,
        mean=mean,
        std=std,
        dtype=types.FLOAT16 if finish.dtype == torch.float16 else types.FLOAT,
        output_layout="HWC" if finish.channels_last else "CHW",
    )


def cause_of(samples: Dataset, in_flight: Iterable[RawBatch], error: RuntimeError) -> RunError:
    """The bad sample behind an error of DALI's, which names none: each of those it was given is decoded by PIL."""
    groups = list(in_flight)
    if samples.kind == "encoded":
        for raw in groups:
            for sample_id, data in zip(raw.ids.tolist(), raw.values, strict=True):
                try:
                    decode(samples, sample_id, data)
                except BadSample as bad:
                    return bad
    ids = ", ".join(str(k) for raw in groups for k in raw.ids.tolist())
    return RunError(f"DALI failed on the samples {ids}, all of which PIL can decode: {error}")
