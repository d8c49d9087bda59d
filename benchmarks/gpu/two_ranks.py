"""Two ranks on one device, over Gloo, and one of them alone: python -m benchmarks.gpu.two_ranks is one rank."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.contestants import Ours, job_of, random_batch
from benchmarks.rows.figures import Outcome, compare
from benchmarks.rows.row import Settings, say
from benchmarks.turns import take_turns
from hvd_batchgrow.comm.backend import connect
from hvd_batchgrow.comm.ranks import Ranks, SingleRank
from hvd_batchgrow.config import Job
from hvd_batchgrow.train.weights_agree import check_agreement

ALONE, BOTH = "one rank", "two ranks"


def run(name: str, settings: Settings) -> Outcome:
    """Start two ranks by torchrun, and return what rank 0 has measured."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        command += ["-m", "benchmarks.gpu.two_ranks", settings.device, str(settings.until), str(result)]
        code = subprocess.run(command, check=False).returncode
        if code:
            return Outcome(failed=f"torchrun has ended with code {code}")
        return Outcome.from_json(json.loads(result.read_text(encoding="utf-8")))


def train_as_rank(settings: Settings, ranks: Ranks, result: Path) -> None:
    """Train WRN-16-4 on both ranks, and on rank 0 alone, in turns; rank 0 writes the figures."""
    share, side, ghost_batch, num_updates = (8, 16, 4, 1) if settings.is_tiny else (128, 32, 128, 10)
    both = Ours(job(settings, 2 * share, share, side, ghost_batch), ranks)
    alone = Ours(job(settings, 2 * share, share, side, ghost_batch), SingleRank())
    inputs, labels = random_batch((share, 3, side, side), 10, both.device, channels_last=False)

    def together(work: Callable[[], int]) -> Callable[[], int]:
        """Make a turn end when both ranks have finished it."""

        def turn() -> int:
            done = work()
            ranks.all_reduce(torch.zeros(1), "end of turn")
            return done

        return turn

    of_both = both.repeating(inputs, labels, num_updates)
    of_one = alone.repeating(inputs, labels, num_updates) if ranks.rank == 0 else lambda: 0
    is_over = settings.is_over()
    # Ranks must take the same number of turns.
    rates = take_turns(
        {ALONE: together(of_one), BOTH: together(of_both)}, settings.turns, lambda: ranks.any(flag=is_over())
    )
    check_agreement(both.parts.model, ranks, num_updates)
    if ranks.rank == 0:
        group = compare(f"WRN-16-4, B {2 * share}, micro-batches of {share}", "samples/s", rates, ALONE)
        notes = [f"{ranks.size} ranks on {both.device} over {ranks.backend}; their weights agree at the end"]
        wrong = ranks.size != 2 or both.device.type != settings.device
        result.write_text(json.dumps(Outcome([group], notes, "not two ranks on the device" if wrong else "").to_json()))


def job(settings: Settings, batch: int, micro_batch: int, side: int, ghost_batch: int) -> Job:
    """Return the job, for any number of ranks."""
    return job_of(
        "two_ranks",
        settings.device,
        batch,
        data={"source": "synthetic_images", "num_samples": 40 * batch, "shape": [side, side, 3]},
        model={"name": settings.wrn, "ghost_batch": ghost_batch},
        layout={"ranks_per_gpu": 2, "max_micro_batch": micro_batch},
        update={"precision": "float32" if settings.is_tiny else "tf32"},
    )


def main() -> None:
    """Join the other rank, and train."""
    device, until, result = sys.argv[1:]
    settings = Settings("cpu" if device == "cpu" else "cuda", float(until), is_tiny=device == "cpu")
    ranks = connect("torch", settings.device, 2)
    if ranks.rank == 0:
        say("both ranks have met")
    train_as_rank(settings, ranks, Path(result))
    ranks.close()


if __name__ == "__main__":
    main()
