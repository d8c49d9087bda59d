"""JPEG files that are made on the spot, and DALI's own reader of them for a bare loop."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.plugin.pytorch import DALIGenericIterator, LastBatchPolicy

from benchmarks.contestants import Batch
from benchmarks.jpeg import AREA, ASPECT, DEVIATION, MEAN, image_paths, write_image


def write_images(folder: Path, num_images: int) -> None:
    """Write the images of `benchmarks.jpeg`, on several cores."""
    paths = image_paths(folder, num_images)
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
    # Not a fork: torch may have started a GPU or threads.
    num_processes = min(8, len(os.sched_getaffinity(0)))
    with ProcessPoolExecutor(num_processes, get_context("spawn")) as pool:
        list(pool.map(write_image, range(num_images), paths, chunksize=16))


def dali_batches(folder: Path, batch: int, side: int, device: torch.device, num_threads: int) -> Iterator[Batch]:
    """Yield batches in channels_last on a device, without end: the pipeline that DALI's documentation recommends."""
    is_gpu = device.type == "cuda"

    @pipeline_def(batch_size=batch, num_threads=num_threads, device_id=device.index or 0 if is_gpu else None, seed=1)  # type: ignore[untyped-decorator]
    def pipeline() -> tuple[object, object]:
        data, labels = fn.readers.file(file_root=str(folder), random_shuffle=True, name="reader")
        images = fn.decoders.image_random_crop(
            data, device="mixed" if is_gpu else "cpu", random_area=list(AREA), random_aspect_ratio=list(ASPECT)
        )
        images = fn.resize(images, size=[side, side])
        mean, std = ([255 * value for value in values] for values in (MEAN, DEVIATION))
        images = fn.crop_mirror_normalize(
            images, mirror=fn.random.coin_flip(), mean=mean, std=std, dtype=types.FLOAT, output_layout="HWC"
        )
        return images, labels

    start = partial(
        DALIGenericIterator,
        [pipeline()],
        ["images", "labels"],
        reader_name="reader",
        last_batch_policy=LastBatchPolicy.DROP,
        auto_reset=True,
    )
    iterator = start()
    while True:
        for (found,) in iterator:
            labels = found["labels"].flatten().to(device, torch.int64, non_blocking=True)
            yield found["images"].permute(0, 3, 1, 2), labels
