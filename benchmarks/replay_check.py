"""Measure the cost of a check of `checks.replay_every`, in updates.

python -m benchmarks.replay_check JOB [--turns 15] [--updates 3] [--cpu-time] [--optim.lr 0.1 …]
mpirun -np 2 --bind-to none python -m benchmarks.replay_check JOB …

Updates of the job's first phase alternate with and without the check, in one process. The samples are read by the job's
pipeline, for the update and for the check.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.turns import synchronize, take_turns
from hvd_batchgrow.comm.backend import connect
from hvd_batchgrow.comm.ranks import Ranks
from hvd_batchgrow.config import ChecksSection, Job
from hvd_batchgrow.data.datasets.dataset import Datasets
from hvd_batchgrow.job_file import load_job
from hvd_batchgrow.schedule.plan import compile_plan
from hvd_batchgrow.train.parts import TrainingParts
from hvd_batchgrow.train.run.setup import load_together, prepare_rank
from hvd_batchgrow.train.trainer import Trainer


def updates_of(job: Job, source: Datasets, ranks: Ranks, folder: Path, num_updates: int) -> Callable[[], int]:
    """Return a function that does some updates of a job's first phase, and returns their number."""
    device = prepare_rank(job, ranks).device
    plan = compile_plan(job, ranks.size, len(source.train))
    trainer = Trainer(TrainingParts(job, source, ranks, device), plan, ranks, folder, ())
    ghost_batches = trainer.parts.ghost_batches(0, ranks)
    phase, micro_batch = plan.schedule.phases[0], plan.layouts[0].micro_batch

    def work() -> int:
        for _ in range(num_updates):
            trainer.update(ghost_batches, phase, micro_batch)
        synchronize(device)
        return num_updates

    return work


def main() -> None:
    """Print the cost of a check on rank 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", type=Path)
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--updates", type=int, default=3, help="per turn")
    parser.add_argument("--cpu-time", action="store_true", help="count CPU time, which other work disturbs less")
    options, rest = parser.parse_known_args()
    overrides = dict(zip((word.removeprefix("--") for word in rest[::2]), map(_value, rest[1::2]), strict=True))
    ranks = connect("auto")
    job = load_job(options.job, overrides)
    source = load_together(job, ranks, lambda *_: None)
    with tempfile.TemporaryDirectory() as folder:
        jobs = {every: job.model_copy(update={"checks": ChecksSection(replay_every=every)}) for every in (0, 1)}
        works = {str(every): updates_of(jobs[every], source, ranks, Path(folder), options.updates) for every in jobs}
        clock = time.process_time if options.cpu_time else time.perf_counter
        rates = take_turns(works, options.turns, clock=clock)
    source.close()
    costs = [without / checked - 1 for without, checked in zip(rates["0"], rates["1"], strict=True)]
    if ranks.rank == 0:
        update_ms, cost = 1e3 / statistics.median(rates["0"]), statistics.median(costs)
        print(f"{job.model.name}, ranks: {ranks.size}, exact: {job.layout.exact}, update {update_ms:.1f} ms")
        print(f"a check costs {cost:.2f} updates ({min(costs):.2f} … {max(costs):.2f}), n = {len(costs)}")
    ranks.close()


def _value(word: str) -> object:
    try:
        return {"true": True, "false": False}.get(word) if word in {"true", "false"} else float(word)
    except ValueError:
        return word


if __name__ == "__main__":
    main()
