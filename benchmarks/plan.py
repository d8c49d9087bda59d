"""Measure plans/s for large machines, data and schedules, including plans that are refused.

python -m benchmarks.plan [--turns 9]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

from benchmarks.turns import print_rates, take_turns
from hvd_batchgrow.config import Job
from hvd_batchgrow.job_file import parse_job
from hvd_batchgrow.messages.errors import JobError
from hvd_batchgrow.schedule.plan import compile_plan

N, RANKS, PHASES = 10**9, 10_000, 1000


def make_job(schedule: dict[str, Any], growth: str) -> Job:
    """Return a job with ghost batches of 32."""
    return parse_job(
        {
            "name": "large",
            "data": {"source": "cifar10", "num_samples": N},
            "model": {"name": "resnet20", "ghost_batch": 32},
            "optim": {"name": "sgd", "lr": 0.1},
            "schedule": schedule,
            "layout": {"grow_by": growth},
        }
    )


def plan(job: Job) -> int:
    """Compile one plan, which may be refused."""
    try:
        compile_plan(job, RANKS, N)
    except JobError as error:
        str(error)
    return 1


def main() -> None:
    """Time the contestants in turns."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=9)
    few = {"policy": "grow", "epochs": 90.0, "boundaries_epochs": [30.0, 60.0, 80.0], "max_batch": "N/10"}
    few |= {"global_batch": 32 * RANKS}
    # 1,000 different batches, from 32 to about 4 · 10⁷.
    many = {"policy": "adabatch", "epochs": float(PHASES), "every_epochs": 1.0, "batch_factor": 1.014, "lr_factor": 1.0}
    many |= {"global_batch": 32, "max_batch": "N/10"}
    contestants: dict[str, Callable[[], int]] = {
        f"4 phases on {RANKS:,} ranks": partial(plan, make_job({**few, "noise_factor": 2.0}, "accumulation")),
        f"{PHASES:,} phases, growth by ranks": partial(plan, make_job(many, "ranks")),
        f"{PHASES:,} phases refused": partial(plan, make_job(many, "accumulation")),
    }
    rates = take_turns(contestants, parser.parse_args().turns)
    print_rates(rates, "plans/s", next(iter(contestants)))


if __name__ == "__main__":
    main()
