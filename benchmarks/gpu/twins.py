"""Whole short runs of WRN-16-4, as `hvd-batchgrow twin` trains them: growing batch and decaying learning rate."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path

from benchmarks.rows.figures import Outcome, compare
from benchmarks.rows.row import Settings, say
from benchmarks.turns import take_turns
from hvd_batchgrow.comm.ranks import SingleRank
from hvd_batchgrow.config import Job
from hvd_batchgrow.job_file import parse_job
from hvd_batchgrow.schedule.twin import decay_twin
from hvd_batchgrow.train.events import RunEnded
from hvd_batchgrow.train.liveness.stop import StopRequest
from hvd_batchgrow.train.run.run import RunOptions, run_job

GROWING, DECAYING = "growing run", "decay twin"


def run(name: str, settings: Settings) -> Outcome:
    """Train both twins in turns until the budget is spent."""
    num_samples = 80 if settings.is_tiny else 25_600
    growing = growing_job(settings, num_samples)
    jobs = {GROWING: growing, DECAYING: decay_twin(growing, num_samples)}
    ended: dict[str, RunEnded] = {}
    with tempfile.TemporaryDirectory() as folder:
        contestants = {label: contestant(label, job, Path(folder), ended) for label, job in jobs.items()}
        rates = take_turns(contestants, settings.turns, settings.is_over())
    group = compare("whole runs, evaluation and checkpoints included", "runs/min", rates, DECAYING, 60.0)
    updates = ", ".join(f"{label} {end.num_updates:,} updates" for label, end in ended.items())
    unfinished = [label for label, end in ended.items() if not end.done]
    return Outcome([group], [updates], failed=f"these runs did not end: {', '.join(unfinished)}" if unfinished else "")


def growing_job(settings: Settings, num_samples: int) -> Job:
    """Return the job of WRN-16-4 in which the batch grows twice by 4."""
    side, ghost_batch = (16, 4) if settings.is_tiny else (32, 128)
    return parse_job(
        {
            "name": "twins",
            "data": {
                "source": "synthetic_images", "num_samples": num_samples, "shape": [side, side, 3],
                "crop_padding": 4, "hflip": True,
            },
            "model": {"name": settings.wrn, "ghost_batch": ghost_batch},
            "optim": {"name": "sgd", "lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4},
            "schedule": {
                "policy": "grow", "epochs": 3.0, "boundaries_epochs": [1.0, 2.0], "noise_factor": 4.0,
                "global_batch": ghost_batch, "max_batch": 16 * ghost_batch,
            },
            "update": {"precision": "float32" if settings.is_tiny else "tf32"},
            "layout": {"device": settings.device, "max_micro_batch": 8 * ghost_batch},
            "evaluation": {"every_epochs": 3.0},
            "checkpoint": {"every_epochs": 3.0},
            "logging": {"tensorboard": False},
        }
    )  # fmt: skip


def contestant(label: str, job: Job, folder: Path, ended: dict[str, RunEnded]) -> Callable[[], int]:
    """Return a contestant that trains one run in a folder that does not exist yet, and keeps how it ended."""
    numbers = itertools.count()

    def work() -> int:
        say(f"run: {label}")
        options = RunOptions(folder / f"{next(numbers)}-{job.name}")
        ended[label] = run_job(lambda: job, SingleRank(), options, lambda *_: None, lambda job: (), StopRequest())
        return 1

    return work
