"""Compare parts of an update and of its input with their alternatives, in one process."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks import arrays, checkpoint, ghost_batch_norm, jpeg, lars
from benchmarks.rows.figures import Figure, Group, Outcome, compare, ratios_of
from benchmarks.rows.row import LEAST_TURNS, Settings, say
from benchmarks.turns import take_turns
from hvd_batchgrow.train.malloc_tuning import keep_freed_memory


def run(name: str, settings: Settings) -> Outcome:
    """Measure a row of this module."""
    torch.set_num_threads(1)
    if name == "jpeg":
        return of_jpeg(settings)
    measure: dict[str, Callable[[Settings], list[Group]]] = {
        "arrays": of_arrays,
        "ghost_norm": of_ghost_norm,
        "lars": of_lars,
        "checkpoint": of_checkpoint,
    }
    return Outcome(measure[name](settings))


def of_arrays(settings: Settings) -> list[Group]:
    """Images in memory."""
    rates = take_turns(arrays.contestants(32, 3), settings.turns, settings.is_over())
    return [compare("32 × 32 × 3, one thread", "images/s", rates, arrays.REFERENCE)]


def of_jpeg(settings: Settings) -> Outcome:
    """A folder of JPEG images."""
    num_images = 64 if settings.is_tiny else 1500
    with tempfile.TemporaryDirectory() as folder:
        say(f"writing {num_images} images")
        loaders, missing = jpeg.measure(Path(folder) / "images", num_images, settings.turns, settings.is_over())
    reference, *others = loaders
    figures = [Figure(reference.name, reference.images_per_s)]
    figures += [
        Figure(each.name, each.images_per_s, ratios_of(each.images_per_s, reference.images_per_s)) for each in others
    ]
    group = Group(f"{num_images} images of about 500 × 375 pixels", "images/s", figures, reference.name)
    return Outcome([group], missing)


def of_ghost_norm(settings: Settings) -> list[Group]:
    """Ghost batch norm with ghost batches of 32, forward and backward."""
    keep_freed_memory()
    found = []
    for index, side in enumerate(ghost_batch_norm.SIDES):
        x = torch.randn(64 if settings.is_tiny else 256, 64, side, side)
        norms = ghost_batch_norm.on_cpu(64, 32)
        works = {title: ghost_batch_norm.contestant(norm, x) for title, norm in norms.items()}
        rates = take_turns(works, settings.turns, settings.part(index, len(ghost_batch_norm.SIDES)))
        found.append(compare(f"{tuple(x.shape)}", "samples/s", rates, "nn.BatchNorm2d"))
    return found


def of_lars(settings: Settings) -> list[Group]:
    """An update of all weights of ResNet-50."""
    rates = take_turns(lars.contestants(torch.device("cpu")), settings.turns, settings.is_over())
    return [compare("all weights of ResNet-50", "updates/s", rates, lars.REFERENCE)]


def of_checkpoint(settings: Settings) -> list[Group]:
    """Seconds for which training waits while a checkpoint of ResNet-50 is written, against those of an update."""
    update, waits = (
        "update of 8 images",
        {"background": "checkpoint in the background", "at once": "checkpoint at once"},
    )
    seconds: dict[str, list[float]] = {update: [], **{title: [] for title in waits.values()}}
    with tempfile.TemporaryDirectory() as folder:
        bench = checkpoint.Bench(Path(folder), 8)
        bench.waited_s("background")  # allocates its memory
        while len(seconds[update]) < LEAST_TURNS or not (settings.is_tiny or settings.is_over()()):
            seconds[update].append(bench.updated_s())
            for kind, title in waits.items():
                seconds[title].append(bench.waited_s(kind))
    return [compare("ResNet-50 with momentum", "s", seconds, update)]
