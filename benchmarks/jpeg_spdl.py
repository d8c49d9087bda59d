"""Images of a folder, read by SPDL, which decodes with FFmpeg in threads of this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers import imported
from benchmarks.rows.row import Skip

PACKAGES = ("spdl==0.8.0", "spdl_core==0.8.0", "spdl_io==0.8.0")
_PREFETCH = 2
_FFMPEG = "libavdevice59 libavfilter8 libavformat59 libavcodec59 libswscale6"
"""The packages of Debian 12 with FFmpeg's libraries."""

Window = tuple[int, int, int, int]
"""Row, column, height and width."""


def batches(
    paths: Iterator[Path],
    draw: Callable[[int, int], tuple[Window, bool]],
    side: int,
    batch: int,
    num_threads: int,
    moments: tuple[Sequence[float], Sequence[float]],
) -> Iterator[Tensor]:
    """Return batches (n, 3, side, side), float32, without end.

    Args:
        paths: paths of images, without end.
        draw: maps height and width of an image to its window, and whether it is mirrored; called by several threads.
        side: height and width of the images of a batch, in pixels.
        batch: n.
        num_threads: number of threads that decode.
        moments: mean and standard deviation of each channel.

    Raises:
        Skip: SPDL cannot be installed or imported, or does not find FFmpeg.
    """
    io, pipeline = imported(PACKAGES, "spdl.io", "spdl.pipeline")
    try:
        io.demux_image(str(next(paths)))  # loads FFmpeg
    except RuntimeError as error:
        raise Skip(f"SPDL does not work here ({error}); on Debian 12: apt install {_FFMPEG}") from None
    mean, deviation = (torch.tensor(values).view(3, 1, 1) for values in moments)

    def image(path: Path) -> Tensor:
        packets = io.demux_image(str(path))
        (top, left, height, width), is_mirrored = draw(packets.height, packets.width)
        steps = [f"crop={width}:{height}:{left}:{top}", f"scale={side}:{side}:flags=bilinear"]
        steps += ["hflip"] * is_mirrored + ["format=rgb24"]
        frames = io.decode_packets(packets, filter_desc=",".join(steps))
        pixels: Tensor = io.to_torch(io.convert_frames(frames))
        return pixels.permute(2, 0, 1).contiguous().float().div_(255).sub_(mean).div_(deviation)

    builder = pipeline.PipelineBuilder().add_source(paths).pipe(image, concurrency=num_threads)
    built = builder.aggregate(batch).pipe(torch.stack).add_sink(_PREFETCH).build(num_threads=num_threads + 1)
    return _read(built)


def _read(built: Any) -> Iterator[Tensor]:
    """Yield the batches of a pipeline. It stops, with its threads, when the iterator is closed or deleted."""
    with built.auto_stop():
        yield from built
