"""A small job on small real files, for tests that train."""

from __future__ import annotations

import gzip
import io
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
from numpy.typing import NDArray
from PIL import Image

from hvd_batchgrow.config import Job
from hvd_batchgrow.data.datasets.dataset import ArrayDataset, Dataset, Datasets
from hvd_batchgrow.data.images.encoded_dataset import EncodedDataset, read_header
from hvd_batchgrow.data.images.image_index import Entry, make_index
from hvd_batchgrow.job_file import parse_job
from hvd_batchgrow.observers.console import PlainConsole
from hvd_batchgrow.observers.console_tables import print_plan
from hvd_batchgrow.schedule.plan import Plan

NUM_TRAIN, NUM_TEST, NUM_CLASSES, SIDE = 300, 50, 3, 8


def enter_with_job(folder: Path, tree: dict[str, Any], patch: pytest.MonkeyPatch) -> None:
    """Make a folder the working directory, with `job.toml`, the data of `small_source` and a separate cache."""
    patch.chdir(folder)
    patch.setenv("HVD_BATCHGROW_CACHE", str(folder / "cache"))
    write_idx_folder(Path("data"), small_source())
    Path("job.toml").write_text(tomli_w.dumps(tree))


def enter_copy(trained: Path, folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Make a copy of a folder from `enter_with_job` the working directory."""
    patch.setenv("HVD_BATCHGROW_CACHE", str(trained / "cache"))
    patch.chdir(shutil.copytree(trained, folder))


def enter_with_job_of(trained: Path, folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Make a folder the working directory, with the job and the data of one from `enter_with_job`, but no runs."""
    patch.setenv("HVD_BATCHGROW_CACHE", str(trained / "cache"))
    patch.chdir(folder)
    for name in ("data", "job.toml"):
        (folder / name).symlink_to(trained / name)


def no_report(what: str, done: int, total: int, unit: str = "bytes") -> None:
    """Ignore progress."""


def everything(samples: Dataset) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Return all values and labels; fetch them in reverse, to test the order of ids, and restore the order."""
    ids = np.arange(len(samples))[::-1]
    return samples.fetch(ids)[::-1], samples.targets[ids][::-1]


def job_tree(root: Path | str = "data", /, **sections: Any) -> dict[str, Any]:
    """A valid job as plain values: 300 samples, ghost batch 8, a batch of 16 that grows by 3 to at most 96."""
    tree: dict[str, Any] = {
        "name": "small",
        "seed": 7,
        "data": {"source": "idx", "root": str(root), "num_samples": NUM_TRAIN, "crop_padding": 1, "hflip": True},
        "model": {"name": "small_conv_net", "channels": [4, 8], "ghost_batch": 8},
        "optim": {"name": "sgd", "lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3},
        "schedule": {
            "policy": "grow",
            "epochs": 2.2,
            "boundaries_epochs": [0.5, 1.0, 1.5],
            "noise_factor": 3.0,
            "global_batch": 16,
            "max_batch": 96,
        },
        "layout": {"max_micro_batch": 16, "threads_per_rank": 1},
        "logging": {"logs_per_epoch": 5, "tensorboard": False},
    }
    for section, values in sections.items():
        tree[section] = {**tree.get(section, {}), **values} if isinstance(values, dict) else values
    if tree["schedule"]["policy"] == "decay":
        tree["schedule"].pop("max_batch", None)
    if tree["optim"]["name"] in {"adam", "adamw"}:
        tree["optim"].pop("momentum", None)
    return tree


def measured_tree(root: Path | str, trigger: dict[str, Any], **sections: Any) -> dict[str, Any]:
    """A `job_tree` whose batch of 16 grows to at most 96 when a trigger says so, in micro-batches of at most 8 samples.

    The trigger may decide from the start.
    """
    if "windows_epochs" not in trigger and trigger.get("name") in {"norm_test", "cabs", "similarity", "gradient_noise"}:
        trigger = {"first_decision_epoch": 0.0, **trigger}
    schedule = {"policy": "adaptive", "epochs": 3.0, "global_batch": 16, "max_batch": 96} | sections.pop("schedule", {})
    layout = {"max_micro_batch": 8} | sections.pop("layout", {})
    return {**job_tree(root, trigger=trigger, layout=layout, **sections), "schedule": schedule}


def measured_job(trigger: dict[str, Any], **sections: Any) -> Job:
    """`measured_tree`, checked and frozen."""
    return parse_job(measured_tree("data", trigger, **sections))


def small_job(root: Path | str = "data", /, **sections: Any) -> Job:
    """`job_tree`, checked and frozen."""
    return parse_job(job_tree(root, **sections))


def plan_tree(num_samples: int, end_samples: int, **job: Any) -> dict[str, Any]:
    """Return what readers need of a plan.json: one phase of one update."""
    phase = {"start_samples": 0, "lr": 0.1, "global_batch": end_samples, "num_updates": 1}
    sizes = {"num_samples": num_samples, "end_samples": end_samples, "num_updates": 1}
    return {"job": "small", **sizes, "job_file": {"schedule": {"policy": "grow"}} | job, "phases": [phase]}


def small_source() -> Datasets:
    """Three classes of noisy 8×8 images."""
    generator = np.random.default_rng(0)
    prototypes = generator.integers(0, 256, (NUM_CLASSES, SIDE, SIDE, 1))

    def images(count: int) -> ArrayDataset:
        labels = generator.integers(0, NUM_CLASSES, count)
        noise = generator.integers(-60, 60, (count, SIDE, SIDE, 1))
        return ArrayDataset(np.clip(prototypes[labels] + noise, 0, 255).astype(np.uint8), labels.astype(np.int64))

    return Datasets(images(NUM_TRAIN), images(NUM_TEST), NUM_CLASSES, (0.5,), (0.25,))


def labels_of(samples: Dataset) -> list[int]:
    """The classes of all samples."""
    labels: list[int] = samples.targets[np.arange(len(samples))].tolist()
    return labels


def idx_bytes(array: NDArray[np.uint8]) -> bytes:
    """An array of bytes in the IDX format, written from its description alone."""
    return struct.pack(f">HBB{array.ndim}i", 0, 8, array.ndim, *array.shape) + array.tobytes()


def write_idx_folder(folder: Path, source: Datasets) -> Path:
    """The four files of a source, images gzipped and labels not."""
    folder.mkdir(parents=True, exist_ok=True)
    for prefix, part in (("train", source.train), ("t10k", source.test)):
        (folder / f"{prefix}-images-idx3-ubyte.gz").write_bytes(
            gzip.compress(idx_bytes(part.fetch(np.arange(len(part)))[..., 0]))
        )
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(
            idx_bytes(part.targets[np.arange(len(part))].astype(np.uint8))
        )
    return folder


def encoded_samples(folder: Path, num_samples: int) -> EncodedDataset:
    """JPEG files of several sizes, one of them gray."""
    generator = np.random.default_rng(2)
    entries = []
    for k in range(num_samples):
        height, width = generator.integers(16, 48, 2).tolist()
        coarse = generator.integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        path = folder / f"{k}.jpg"
        (image.convert("L") if k == 3 else image).save(path, quality=90)
        entries.append(Entry(path.name, 0, path.stat().st_size, k % 7, *read_header(path.read_bytes())))
    return EncodedDataset(folder, make_index(entries))


def plan_text(plan: Plan) -> str:
    """The table of a plan as plain text."""
    stream = io.StringIO()
    print_plan(PlainConsole(stream, 120), plan)
    return stream.getvalue()
