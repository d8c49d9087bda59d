"""ResNet-50 and WRN-16-4: training by this package and by a bare loop, in turns."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import nn

from benchmarks.contestants import Ours, bare, job_of, random_batch, with_batch_norm
from benchmarks.rows.figures import Outcome, compare
from benchmarks.rows.row import Settings, say
from benchmarks.turns import take_turns
from hvd_batchgrow.comm.ranks import SingleRank
from hvd_batchgrow.config import Job
from hvd_batchgrow.nn.build import build_model
from hvd_batchgrow.torchvision_shim import import_torchvision

BARE, OURS = "bare loop", "hvd_batchgrow"
NUM_CLASSES = 10


def run(name: str, settings: Settings) -> Outcome:
    """Measure one of the rows of this module."""
    return {"resnet50": resnet50, "resnet50_dali": resnet50_dali, "wrn": wrn}[name](settings)


def resnet50(settings: Settings) -> Outcome:
    """One batch on the device, again and again."""
    batch, side, num_updates = resnet50_sizes(settings)
    data = {
        "source": "synthetic_images",
        "num_samples": 8 * batch,
        "shape": [side, side, 3],
        "num_classes": NUM_CLASSES,
    }
    ours = Ours(resnet50_job(settings, batch, data), SingleRank())
    inputs, labels = random_batch((batch, 3, side, side), NUM_CLASSES, ours.device, channels_last=True)
    network = bare_resnet50(settings, ours.device)
    return in_turns(
        settings,
        f"B {batch}, {side} × {side}",
        {
            BARE: bare(network, itertools.repeat((inputs, labels)), "bfloat16", num_updates),
            OURS: ours.repeating(inputs, labels, num_updates),
        },
        [f"one micro-batch of {batch} in ghost batches of {ours.group}"],
    )


def resnet50_dali(settings: Settings) -> Outcome:
    """JPEG images: ours by the reader of training, the bare loop by a DALI pipeline with its own shuffling reader."""
    from benchmarks.gpu.jpeg_loaders import dali_batches, write_images

    batch, side, num_updates = resnet50_sizes(settings)
    num_images = 4 * batch if settings.is_tiny else 512
    with tempfile.TemporaryDirectory() as name:
        say(f"writing {num_images} JPEG images")
        write_images(Path(name), num_images)
        say("starting both loops")
        data = {
            "source": "image_folder", "root": name, "train": ".", "test": ".", "num_samples": num_images,
            "image_size": side, "hflip": True, "pipeline": "dali",
        }  # fmt: skip
        ours = Ours(resnet50_job(settings, batch, data), SingleRank())
        threads = torch.get_num_threads()
        batches = dali_batches(Path(name), batch, side, ours.device, threads)
        return in_turns(
            settings,
            f"B {batch}, {side} × {side}",
            {
                BARE: bare(bare_resnet50(settings, ours.device), batches, "bfloat16", num_updates),
                OURS: ours.reading(num_updates),
            },
            [f"{num_images} JPEG files of about 500 × 375 pixels, {threads} threads that read and decode"],
        )


def wrn(settings: Settings) -> Outcome:
    """WRN-16-4 as in jobs/cifar10_wrn16_4_grow.toml, on one batch again and again, and on generated images."""
    batch, side, ghost_batch, num_updates = (8, 16, 4, 2) if settings.is_tiny else (128, 32, 128, 40)
    precision = "float32" if settings.is_tiny else "tf32"
    job = job_of(
        "wrn",
        settings.device,
        batch,
        data={
            "source": "synthetic_images", "num_samples": 400 * batch, "shape": [side, side, 3], "crop_padding": 4,
            "hflip": True, "num_classes": NUM_CLASSES,
        },
        model={"name": settings.wrn, "ghost_batch": ghost_batch},
        update={"precision": precision},
    )  # fmt: skip
    ours, reading = Ours(job, SingleRank()), Ours(job, SingleRank())
    inputs, labels = random_batch((batch, 3, side, side), NUM_CLASSES, ours.device, channels_last=False)
    network = with_batch_norm(build_model(job, (side, side, 3), NUM_CLASSES)).to(ours.device)
    return in_turns(
        settings,
        f"B {batch}, {precision}",
        {
            BARE: bare(network, itertools.repeat((inputs, labels)), precision, num_updates),
            OURS: ours.repeating(inputs, labels, num_updates),
            "… reading generated images": reading.reading(num_updates),
        },
        [],
    )


def in_turns(settings: Settings, title: str, contestants: Mapping[str, Callable[[], int]], notes: list[str]) -> Outcome:
    """Time the contestants until the budget is spent, and add the peak of the GPU's memory to the notes."""
    say("the first turn, which is not timed")
    rates = take_turns(
        {name: announced(name, work) for name, work in contestants.items()}, settings.turns, settings.is_over()
    )
    if settings.device == "cuda":
        notes = [
            *notes,
            f"at most {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB of GPU memory, all loops together",
        ]
    return Outcome([compare(title, "samples/s", rates, BARE)], notes)


def announced(name: str, work: Callable[[], int]) -> Callable[[], int]:
    """Return a contestant that says its name before it works."""

    def run() -> int:
        say(f"turn of: {name}")
        return work()

    return run


def resnet50_sizes(settings: Settings) -> tuple[int, int, int]:
    """Return the batch, the side of the images, and the updates of a turn; less memory, smaller batch."""
    if settings.is_tiny:
        return 4, 32, 1
    gib = torch.cuda.get_device_properties(0).total_memory / 2**30
    return (256 if gib > 60 else 128 if gib > 30 else 64), 224, 10


def resnet50_job(settings: Settings, batch: int, data: dict[str, object]) -> Job:
    """Return the job of ResNet-50 in bfloat16 and channels_last."""
    return job_of(
        "resnet50",
        settings.device,
        batch,
        data={**data, "channels_last": True},
        model={"name": f"torchvision.models:{resnet_name(settings)}", "ghost_batch": 2 if settings.is_tiny else 32},
        update={"precision": "bfloat16"},
    )


def resnet_name(settings: Settings) -> str:
    """Return the name of the network in torchvision."""
    return "resnet18" if settings.is_tiny else "resnet50"


def bare_resnet50(settings: Settings, device: torch.device) -> nn.Module:
    """Return torchvision's network in channels_last."""
    import_torchvision()
    from torchvision import models  # type: ignore[import-untyped]

    return getattr(models, resnet_name(settings))(num_classes=NUM_CLASSES).to(device, memory_format=torch.channels_last)  # type: ignore[no-any-return]
