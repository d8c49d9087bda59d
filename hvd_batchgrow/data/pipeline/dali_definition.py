"""DALI's graphs of operators: one definition for CPU and GPU, whose inputs are our windows and mirrors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def, types

from hvd_batchgrow.data.pipeline.sampler import RawBatch, Sampler
from hvd_batchgrow.data.pipeline.torch_pipeline import Normalize

_PREFETCH = 2
"""Batches that DALI prefetches."""


def arrays_of(sampler: Sampler, raw: RawBatch, *, in_dali: bool) -> tuple[Any, ...]:
    """Return the inputs of the pipeline that `make_pipeline` makes."""
    place = raw.placement
    assert place is not None
    corners, shapes = (np.ascontiguousarray(part) for part in (place.windows[:, :2], place.windows[:, 2:]))
    if sampler.samples.kind == "images":
        return raw.values, corners, place.mirrors
    return raw.values, corners, shapes, *((place.resized, place.corners, place.mirrors) if in_dali else ())


def make_pipeline(
    sampler: Sampler,
    normalize: Normalize,
    source: Callable[[], tuple[Any, ...]],
    max_samples: int,
    num_threads: int,
    *,
    in_dali: bool,
) -> Any:
    """Return a built pipeline with one output. It serves all samplers of the same kind of images and the same crop.

    Args:
        sampler: one of them.
        normalize: its device decides where DALI runs.
        source: returns `arrays_of` the next batch, or raises StopIteration.
        max_samples: the most samples of a batch.
        num_threads: of DALI.
        in_dali: DALI also resizes and normalizes encoded images; else the output is their windows.
    """
    definition = (
        _encoded(sampler, normalize, source, in_dali=in_dali)
        if sampler.samples.kind == "encoded"
        else _images(sampler, normalize, source)
    )
    pipeline = definition(
        batch_size=max_samples,
        num_threads=num_threads,
        device_id=normalize.device.index if normalize.device.type == "cuda" else None,
        prefetch_queue_depth=_PREFETCH,
        exec_dynamic=True,  # the other executors order no output by a stream
    )
    pipeline.build()
    return pipeline


def _images(sampler: Sampler, normalize: Normalize, source: Callable[[], tuple[Any, ...]]) -> Any:
    """Define the pipeline of images of one size: the uint8 result is that of `cut_and_mirror`."""

    @pipeline_def  # type: ignore[untyped-decorator]
    def definition() -> Any:
        images, corners, mirrors = fn.external_source(source, num_outputs=3, batch=True, layout=["HWC", "", ""])
        images = images.gpu() if normalize.device.type == "cuda" else images
        shape = list(sampler.samples.shape[:2])
        cut = fn.slice(images, start=corners, shape=shape, axes=[0, 1], out_of_bounds_policy="pad", fill_values=0)
        return fn.flip(cut, horizontal=mirrors)

    return definition


def _encoded(sampler: Sampler, normalize: Normalize, source: Callable[[], tuple[Any, ...]], *, in_dali: bool) -> Any:
    """Define the pipeline of encoded images, which decodes only the window; `in_dali` resizes and normalizes it too."""
    device = "mixed" if normalize.device.type == "cuda" else "cpu"

    @pipeline_def  # type: ignore[untyped-decorator]
    def definition() -> Any:
        encoded, start, shape, *rule = fn.external_source(source, num_outputs=6 if in_dali else 3, batch=True)
        windows = fn.decoders.image_slice(
            encoded,
            start=start,
            shape=shape,
            axes=[0, 1],
            device=device,
            output_type=types.RGB,
            adjust_orientation=False,
            jpeg_fancy_upsampling=True,  # on a GPU too, as the decoder of the CPU and Pillow do
            hw_decoder_load=0.0,  # one decoder for all: another one would get a share that depends on the batch
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
