"""DALI's pipeline on a GPU, read as training reads it; on the CPU the same tests show that they are right."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from hvd_batchgrow.comm.ranks import SingleRank
from hvd_batchgrow.config import Job
from hvd_batchgrow.data.load_source import load_source
from hvd_batchgrow.job_file import parse_job
from hvd_batchgrow.train.parts import TrainingParts
from hvd_batchgrow.train.update.forward import MicroBatch
from hvd_batchgrow.train.update.micro_batches import read_micro_batches

pytestmark = pytest.mark.skipif(
    not (find_spec("nvidia") and find_spec("nvidia.dali")), reason="DALI is not installed (the extra dali-cuda130)"
)

GHOST, CROP, NUM_IMAGES, NUM_CLASSES = 8, 48, 48, 3
STD = 0.25
LEVEL = 1 / (255 * STD)
"""One of 255 levels of a pixel, after normalization."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder of JPEG files of several sizes, each with a smooth pattern that is not its mirror image."""
    generator = np.random.default_rng(0)
    for k in range(NUM_IMAGES):
        height, width = generator.integers(60, 120, 2).tolist()
        coarse = generator.integers(0, 256, (3, 4, 3), dtype=np.uint8)
        path = tmp_path / f"class{k % NUM_CLASSES}" / f"{k:02d}.jpg"
        path.parent.mkdir(exist_ok=True)
        image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        image.save(path, quality=95, subsampling=("4:4:4", "4:2:0")[k % 2])
    return tmp_path


def job_of(folder: Path, device: torch.device, pipeline: str, **data: object) -> Job:
    return parse_job(
        {
            "name": "photos",
            "data": {
                **{"source": "image_folder", "root": str(folder), "train": ".", "test": ".", "num_samples": NUM_IMAGES},
                **{"image_size": CROP, "hflip": True, "mean": [0.5] * 3, "std": [STD] * 3, "pipeline": pipeline},
                **data,
            },
            "model": {"name": "small_conv_net", "channels": [4, 8], "ghost_batch": GHOST},
            "optim": {"name": "sgd", "lr": 0.1},
            "schedule": {"policy": "decay", "epochs": 2.0, "global_batch": GHOST},
            "layout": {"device": device.type, "max_micro_batch": 2 * GHOST, "threads_per_rank": 1},
        }
    )


def read(job: Job, device: torch.device, passes: Sequence[tuple[int, ...]]) -> list[MicroBatch]:
    """Read the micro-batches, which stay on the device; a GPU is kept busy, so that it lags behind the host."""
    source = load_source(job.data, job.seed, lambda *_: None)
    parts = TrainingParts(job, source, SingleRank(), device)
    ghost_batches = parts.ghost_batches(0, SingleRank())
    busy = torch.ones(4096, 4096, device=device) if device.type == "cuda" else None
    found = []
    for micro_batch in read_micro_batches(ghost_batches, passes, None, lambda stage: None):
        if busy is not None:
            for _ in range(20):
                busy = busy @ busy / 4096
        assert micro_batch.inputs.device == device
        # The copy is queued behind the work above: the batch's memory must not be used again before.
        found.append(MicroBatch(micro_batch.inputs.clone(), micro_batch.targets.clone(), micro_batch.slots))
    return found


def pixels(batches: Sequence[MicroBatch]) -> Tensor:
    return torch.cat([batch.inputs.float().cpu() for batch in batches])


def assert_same_images(found: Tensor, expected: Tensor) -> None:
    """Check that each image is the expected one up to decoding and resizing, and that mirror images differ more."""

    def away(others: Tensor) -> Tensor:
        return (found - others).abs().mean((1, 2, 3)) / LEVEL

    assert away(expected).max() < 4
    assert away(expected.flip(3)).median() > 12
    assert away(expected.roll(1, 0)).median() > 12


PASSES = [(0,), (1,), (2, 3), (4, 5), (6, 7), (8,), (9, 10), (11,)]
"""Two epochs, in micro-batches of one and two ghost batches."""


@pytest.mark.parametrize("channels_last", [False, True])
def test_images_are_those_of_the_torch_pipeline(each_device: torch.device, folder: Path, channels_last: bool) -> None:
    cpu = torch.device("cpu")
    batches = read(job_of(folder, each_device, "dali", channels_last=channels_last), each_device, PASSES)
    expected = read(job_of(folder, cpu, "torch"), cpu, PASSES)
    for batch, right in zip(batches, expected, strict=True):
        assert batch.targets.cpu().tolist() == right.targets.tolist()
        assert batch.inputs.shape == right.inputs.shape
        layout = torch.channels_last if channels_last else torch.contiguous_format
        assert batch.inputs.is_contiguous(memory_format=layout)
    assert_same_images(pixels(batches), pixels(expected))


def test_images_do_not_depend_on_the_micro_batch(each_device: torch.device, folder: Path) -> None:
    job = job_of(folder, each_device, "dali")
    one_by_one = read(job, each_device, [(k,) for k in range(12)])
    assert_same_images(pixels(read(job, each_device, PASSES)), pixels(one_by_one))


def test_float16_images_are_rounded_float32_ones(each_device: torch.device, folder: Path) -> None:
    half = read(job_of(folder, each_device, "dali", dtype="float16"), each_device, PASSES[:3])
    single = read(job_of(folder, each_device, "dali"), each_device, PASSES[:3])
    assert {batch.inputs.dtype for batch in half} == {torch.float16}
    assert (pixels(half) - pixels(single)).abs().mean() < LEVEL / 4
    assert (pixels(half) - pixels(single)).abs().max() < 4 * LEVEL


def test_images_in_memory_are_those_of_the_torch_pipeline(each_device: torch.device) -> None:
    def batches(device: torch.device, pipeline: str) -> list[MicroBatch]:
        data = {"source": "synthetic_images", "num_samples": NUM_IMAGES, "shape": [16, 16, 3], "crop_padding": 2}
        job = job_of(Path(), device, pipeline)
        tree = job.model_dump(exclude_none=True, exclude_defaults=True)
        return read(parse_job({**tree, "data": {**data, "hflip": True, "pipeline": pipeline}}), device, PASSES)

    found, expected = batches(each_device, "dali"), batches(torch.device("cpu"), "torch")
    torch.testing.assert_close(pixels(found), pixels(expected), rtol=0, atol=LEVEL / 1000)
