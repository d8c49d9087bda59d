"""The job that trains a network of the zoo with the same updates as `reference`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import tomli_w

from tests.fuzz.reference import BATCHES, BETA2, DECAY, EPS, GHOST, LR, MOMENTUM, NUM_SAMPLES, SEED, TRUST, Layout, rows
from tests.fuzz.zoo.entry import FEATURES, Entry


def command_lines(layout: Layout) -> list[list[str]]:
    """Return the command line of each invocation of a run."""
    train = ["train", "job.toml"]
    return [[*train, "--max-updates", "3"], [*train, "--resume", "auto"]] if layout.resumed else [train]


def write_case(entry: Entry, layout: Layout, place: Path) -> None:
    """Write the job file and the data."""
    features, labels = rows()
    data = place / "data"
    data.mkdir()
    for part in ("train", "test"):
        np.save(data / f"{part}_rows.npy", features)
        np.save(data / f"{part}_labels.npy", labels)
    place.joinpath("job.toml").write_text(tomli_w.dumps(_job_tree(entry, layout)))


def _job_tree(entry: Entry, layout: Layout) -> dict[str, Any]:
    """Return the job whose updates `reference` computes."""
    optim: dict[str, Any] = {"name": entry.optim, "lr": LR[entry.optim], "weight_decay": DECAY}
    is_adam = entry.optim in {"adam", "adamw"}
    optim |= {"betas": [MOMENTUM, BETA2], "eps": EPS} if is_adam else {"momentum": MOMENTUM}
    optim |= {"trust_coefficient": TRUST} if entry.optim == "lars" else {}
    unscaled = {"mean": [0.0] * FEATURES, "std": [1.0] * FEATURES}
    cut = {"exact": True} if layout.exact else {"max_micro_batch": GHOST * layout.groups}
    return {
        "name": "run",
        "seed": SEED,
        "data": {"source": "numpy", "root": "data", "num_samples": NUM_SAMPLES} | unscaled,
        "model": {"name": entry.name, "ghost_batch": GHOST, "kwargs": dict(entry.arguments)},
        "optim": optim,
        "schedule": {
            "policy": "grow", "epochs": 1.0, "boundaries_epochs": [0.5], "noise_factor": 2.0,
            "global_batch": BATCHES[0], "max_batch": BATCHES[-1],
        },
        "layout": {"threads_per_rank": 1, "uneven_ranks": True} | cut,
        "evaluation": {"batch_size": 32},
        "logging": {"tensorboard": False},
    }  # fmt: skip
