"""Measure how fast JPEG images reach the trainer, in comparison with other loaders.

    python -m benchmarks.jpeg [--images 1500] [--turns 7]

Every loader is timed in its steady state: it fills its queues before the timed batches, and finishes prefetching
before the next loader starts. The loaders run in turns, each turn in another random order.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nvidia.dali import Pipeline, fn
from PIL import Image, ImageDraw

from benchmarks import jpeg_spdl
from benchmarks.rows.row import Skip
from hvd_batchgrow.config import DataSection
from hvd_batchgrow.data.datasets.dataset import raise_bad
from hvd_batchgrow.data.load_source import load_source
from hvd_batchgrow.data.order.stream import Stream
from hvd_batchgrow.data.pipeline.reader import Reader
from hvd_batchgrow.train.malloc_tuning import keep_freed_memory

Batches = Iterator[torch.Tensor]
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
AREA, ASPECT = (0.08, 1.0), (3 / 4, 4 / 3)
CROP_PIXELS, BATCH_SAMPLES, NUM_WORKERS = 224, 64, 2
WARM_BATCHES = 6
POLL_S = 0.1
NOISE = ((64, 40), (16, 30), (6, 22), (2, 18), (1, 16))
"""(pixels per grain, amplitude) of the layers of noise: their sum has about as many bytes as a photograph."""


# ------------------------------------------------------------------------------------------------ images


def make_image(rng: np.random.Generator, height: int, width: int) -> Image.Image:
    """Return noise at several scales, mostly gray, with ellipses, which compresses like a photograph."""
    pixels = np.full((height, width, 3), 128, dtype=np.float32)
    for grain, amplitude in NOISE:
        noise = rng.standard_normal((height // grain + 2, width // grain + 2, 3)).astype(np.float32)
        noise = 0.75 * noise[..., :1] + 0.4 * noise
        for channel in range(3):
            layer = Image.fromarray(noise[..., channel].copy()).resize((width, height), Image.Resampling.BICUBIC)
            pixels[..., channel] += amplitude * np.asarray(layer)
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image, "RGBA")
    for _ in range(6):
        x, y = int(rng.integers(width)), int(rng.integers(height))
        rx, ry = (int(radius) for radius in rng.integers(10, 120, 2))
        red, green, blue = (int(value) for value in rng.integers(0, 255, 3))
        draw.ellipse((x - rx, y - ry, x + rx, y + ry), fill=(red, green, blue, 150))
    return image


def image_paths(folder: Path, num_images: int) -> list[Path]:
    """Return the paths of JPEG files in ten folders."""
    return [folder / f"class{k % 10}" / f"{k:05d}.jpg" for k in range(num_images)]


def write_image(number: int, path: Path) -> None:
    """Write an image: 3 in 4 are 500 × 375, the rest of many sizes; 1 in 5 is upright."""
    rng = np.random.default_rng(number)
    height, width = (375, 500) if number % 4 else (int(rng.integers(330, 420)), int(rng.integers(440, 560)))
    partial = path.with_suffix(".part")
    make_image(rng, *((width, height) if number % 5 == 0 else (height, width))).save(partial, "JPEG", quality=90)
    partial.rename(path)


def make_tree(folder: Path, num_images: int) -> list[Path]:
    """Write the JPEG files that do not exist yet."""
    paths = image_paths(folder, num_images)
    for k, path in enumerate(paths):
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_image(k, path)
    return paths


# ------------------------------------------------------------------------------------------------ peer: torch, PIL


def crop_window(height: int, width: int, uniforms: Callable[[], float]) -> tuple[int, int, int, int]:
    """Return row, column, height and width of torchvision's RandomResizedCrop."""
    for _ in range(10):
        area = height * width * (AREA[0] + (AREA[1] - AREA[0]) * uniforms())
        ratio = ASPECT[0] * (ASPECT[1] / ASPECT[0]) ** uniforms()
        w, h = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
        if 0 < w <= width and 0 < h <= height:
            return int(uniforms() * (height - h + 1)), int(uniforms() * (width - w + 1)), h, w
    w, h = min(width, round(height * ASPECT[1])), min(height, round(width / ASPECT[0]))
    return (height - h) // 2, (width - w) // 2, h, w


class PilImages(torch.utils.data.Dataset[torch.Tensor]):
    """The operations of torchvision's RandomResizedCrop, RandomHorizontalFlip, ToTensor and Normalize."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = paths
        self.mean, self.std = (torch.tensor(value).view(3, 1, 1) for value in (MEAN, DEVIATION))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        """Return an image (3, 224, 224), float32."""
        with self.paths[index].open("rb") as file:
            image: Image.Image = Image.open(file).convert("RGB")
        row, column, height, width = crop_window(image.height, image.width, lambda: torch.rand(1).item())
        image = image.crop((column, row, column + width, row + height))
        image = image.resize((CROP_PIXELS, CROP_PIXELS), Image.Resampling.BILINEAR)
        if torch.rand(1).item() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div(255)
        return pixels.sub_(self.mean).div_(self.std)


def torch_loader(paths: Sequence[Path]) -> Batches:
    """Return batches of a DataLoader with two workers, without end."""
    sampler = torch.utils.data.RandomSampler(PilImages(paths), replacement=True, num_samples=10**9)
    yield from torch.utils.data.DataLoader(
        PilImages(paths), BATCH_SAMPLES, sampler=sampler, num_workers=NUM_WORKERS, worker_init_fn=_one_thread
    )


def _one_thread(_: int) -> None:
    torch.set_num_threads(1)


# ------------------------------------------------------------------------------------------------ peer: DALI


def to_crop(images: Any, mirrors: Any) -> Any:
    """Resize, mirror and normalize images by DALI."""
    images = fn.resize(images, size=[CROP_PIXELS, CROP_PIXELS])
    mean, std = ([255 * value for value in values] for values in (MEAN, DEVIATION))
    return fn.crop_mirror_normalize(images, mirror=mirrors, mean=mean, std=std, output_layout="CHW")


def outputs(pipeline: Any) -> Batches:
    """Yield batches without a copy. Each is valid until the next one."""
    while True:
        yield torch.utils.dlpack.from_dlpack(pipeline.run()[0].as_tensor())


def dali_own(folder: Path, num_threads: int = NUM_WORKERS) -> Batches:
    """Return batches of DALI's shuffling file reader, with its own random crop and mirror."""
    pipeline = Pipeline(BATCH_SAMPLES, num_threads, None, seed=1)
    with pipeline:
        data, _ = fn.readers.file(file_root=str(folder), random_shuffle=True)
        images = fn.decoders.image_random_crop(data, random_area=list(AREA), random_aspect_ratio=list(ASPECT))
        pipeline.set_outputs(to_crop(images, fn.random.coin_flip()))
    pipeline.build()
    return outputs(pipeline)


# ------------------------------------------------------------------------------------------------ peer: SPDL


def spdl(paths: Sequence[Path]) -> Batches:
    """Return batches of SPDL with two threads, without end. Raises Skip if SPDL is not available."""
    order = np.random.default_rng(1)

    def draw(height: int, width: int) -> tuple[jpeg_spdl.Window, bool]:
        return crop_window(height, width, order.random), bool(order.random() < 0.5)

    endless = (paths[k] for k in iter(lambda: int(order.integers(len(paths))), None))
    return jpeg_spdl.batches(endless, draw, CROP_PIXELS, BATCH_SAMPLES, NUM_WORKERS, (MEAN, DEVIATION))


# ------------------------------------------------------------------------------------------------ ours


def ours(
    folder: Path, num_images: int, num_threads: int, pipeline: str = "auto", file_latency_s: float = 0.0, **keys: Any
) -> Batches:
    """Return the batches that the trainer uses with these keys, where each file takes this much longer to read."""
    data = DataSection(
        source="image_folder",
        root=str(folder),
        train=".",
        test=".",
        num_samples=num_images,
        image_size=CROP_PIXELS,
        hflip=True,
        pipeline=pipeline,  # type: ignore[arg-type]
        **keys,
    )
    source = load_source(data, 0, lambda *_: None)
    if file_latency_s:
        make_slow(source.train, file_latency_s)
    reader = Reader(data, source, torch.device("cpu"), num_threads, raise_bad, BATCH_SAMPLES)
    return (batch.inputs for batch in reader.training(Stream(num_images, 0), BATCH_SAMPLES, 0, 1))


def make_slow(samples: Any, seconds: float) -> None:
    """Make a set of encoded samples wait before it reads each file, as a network file system does."""
    read = samples._read

    def slow_read(sample_id: int) -> Any:
        time.sleep(seconds)
        return read(sample_id)

    samples._read = slow_read


# ------------------------------------------------------------------------------------------------ timing


@dataclass
class Loader:
    """A loader and its measurements, one entry per turn."""

    name: str
    batches: Batches
    images_per_s: list[float] = field(default_factory=list)
    cpu_ms: list[float] = field(default_factory=list)


def cpu_seconds() -> float:
    """Return user and system time of this process and its current workers."""
    ticks = 0
    children = Path("/proc/thread-self/children").read_text().split()
    for pid in [str(os.getpid()), *children]:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def time_turn(loader: Loader, num_batches: int) -> None:
    """Run one turn: fill the queues, time `num_batches`, and wait until prefetching has finished."""
    for _ in range(WARM_BATCHES):
        next(loader.batches)
    cpu_s, start_s = cpu_seconds(), time.perf_counter()
    for _ in range(num_batches):
        next(loader.batches)
    wall_s, cpu_s = time.perf_counter() - start_s, cpu_seconds() - cpu_s
    num_images = num_batches * BATCH_SAMPLES
    loader.images_per_s.append(num_images / wall_s)
    loader.cpu_ms.append(1000 * cpu_s / num_images)
    settle()


def settle() -> None:
    """Wait until no loader prefetches: otherwise the next loader would be slower."""
    before_s = -1.0
    while (now_s := cpu_seconds()) > before_s + 0.01:
        before_s = now_s
        time.sleep(POLL_S)


def table(loaders: Sequence[Loader]) -> str:
    """Return a table of medians, ranges, and ratios to the medians of the first two loaders."""
    medians = [statistics.median(loader.images_per_s) for loader in loaders]
    lines = [f"{'loader':<30} {'images/s':>8} {'min–max':>12} {'/ torch':>8} {'/ DALI':>8} {'CPU ms/image':>13}"]
    for loader, median in zip(loaders, medians, strict=True):
        spread = f"{min(loader.images_per_s):.0f}–{max(loader.images_per_s):.0f}"
        ratios = f"{median / medians[0]:>7.2f}× {median / medians[1]:>7.2f}×"
        cpu_ms = statistics.median(loader.cpu_ms)
        lines.append(f"{loader.name:<30} {median:>8.0f} {spread:>12} {ratios} {cpu_ms:>13.2f}")
    return "\n".join(lines)


def measure(
    tree: Path, num_images: int, num_turns: int, is_over: Callable[[], bool] = lambda: False
) -> tuple[list[Loader], list[str]]:
    """Time the loaders in turns.

    Args:
        tree: folder of the images, which is created if it does not exist.
        num_images: number of images in it.
        num_turns: largest number of turns.
        is_over: called after each turn but the first two; if it returns True, no further turns are taken.

    Returns:
        The loaders, and a reason for each loader that is missing.
    """
    paths = make_tree(tree, num_images)
    torch.set_num_threads(1)
    keep_freed_memory()  # as `hvd-batchgrow train` does
    loaders = [
        Loader(f"torch DataLoader, PIL, {NUM_WORKERS} workers", torch_loader(paths)),
        Loader(f"DALI's reader, {NUM_WORKERS} threads", dali_own(tree)),
        Loader("hvd_batchgrow, 2 threads", ours(tree, num_images, NUM_WORKERS)),
        Loader("… 1 ms more for each file", ours(tree, num_images, NUM_WORKERS, file_latency_s=0.001)),
        Loader("… 10 ms more for each file", ours(tree, num_images, NUM_WORKERS, file_latency_s=0.01)),
        Loader("hvd_batchgrow, torch pipeline", ours(tree, num_images, 1, "torch")),
        Loader("… RandAugment", ours(tree, num_images, 1, "torch", auto_augment="randaugment")),
        Loader("… 2 threads", ours(tree, num_images, NUM_WORKERS, "torch")),
        Loader("… RandAugment, 2 threads", ours(tree, num_images, NUM_WORKERS, "torch", auto_augment="randaugment")),
    ]
    missing = []
    try:
        loaders.insert(2, Loader(f"SPDL, {NUM_WORKERS} threads", spdl(paths)))
    except Skip as reason:
        missing.append(str(reason))
    order = np.random.default_rng(0)
    for turn in range(num_turns):
        for k in order.permutation(len(loaders)):
            time_turn(loaders[k], batches_of_turn(num_images))
        if turn > 1 and is_over():
            break
    return loaders, missing


def batches_of_turn(num_images: int) -> int:
    """Return the number of batches in a turn."""
    return max(1, num_images // BATCH_SAMPLES)


def benchmark_jpeg(folder: Path, num_images: int, num_turns: int) -> str:
    """Time the loaders in turns, and return a table."""
    tree = folder / f"jpeg-{num_images}"
    loaders, missing = measure(tree, num_images, num_turns)
    mean_bytes = sum(path.stat().st_size for path in tree.rglob("*.jpg")) / num_images
    turns = f"{num_turns} turns of {batches_of_turn(num_images)} × {BATCH_SAMPLES}"
    facts = f"{num_images} images of {mean_bytes / 1000:.0f} kB, {turns}"
    return "\n".join([f"{facts}, {len(os.sched_getaffinity(0))} cores", table(loaders), *missing])


def main() -> None:
    """Run the benchmark, and print the table."""
    parser = argparse.ArgumentParser(description="Time the loaders of images in turns.")
    parser.add_argument("--images", type=int, default=1500, help="files, and at most as many images in a turn")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "hvd_batchgrow-benchmark")
    args = parser.parse_args()
    sys.stdout.write(benchmark_jpeg(args.folder, args.images, args.turns) + "\n")


if __name__ == "__main__":
    main()
