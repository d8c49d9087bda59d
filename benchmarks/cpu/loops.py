"""`hvd-batchgrow train` against loops written by hand, in turns: on one rank, and on two ranks under mpirun."""

from __future__ import annotations

import socket
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import tomli_w

from benchmarks.cpu.cases import MICRO_BATCH, Case, case_of, job_of_case
from benchmarks.cpu.contestant import ROOT, Contestant, closing_all
from benchmarks.cpu.pausing import UPDATES
from benchmarks.rows.figures import Group, Outcome, compare
from benchmarks.rows.row import Settings, say
from benchmarks.turns import take_turns

OURS = "hvd_batchgrow"
TRAIN = (sys.executable, "-m", "hvd_batchgrow.cli", "train", "job.toml")
BY_HAND = {
    1: {"loop": "loop by hand", "loop_channels_last": "… channels_last"},
    2: {"ddp": "DDP over Gloo, no_sync", "horovod": "Horovod optimizer"},
}
"""The contestants for a number of ranks; the first one is the reference."""


def run(name: str, settings: Settings) -> Outcome:
    """Measure a row: `loop…` with one rank, `ranks…` with two; `…_wrn` is WRN-16-4."""
    case = case_of("wrn" if name.endswith("_wrn") else "small", is_tiny=settings.is_tiny)
    num_ranks = 1 if name.startswith("loop") else 2
    groups: list[Group] = []
    for index, (batch, num_updates) in enumerate(case.batches):
        say(f"B {batch}: starting")
        with tempfile.TemporaryDirectory() as folder, closing_all() as started:
            for title, begin in contestants(Path(folder), name, case, settings, batch, num_updates, num_ranks).items():
                started[title] = begin()
            rates = in_turns(started, settings, index, len(case.batches))
        on = f" on {num_ranks} ranks" if num_ranks > 1 else ""
        title = f"{case.title}, B {batch:,}{on}, micro-batches of {MICRO_BATCH}"
        groups.append(compare(title, "samples/s", rates, next(iter(rates))))
    return Outcome(groups, ["one thread for each rank; by hand: nn.BatchNorm2d; all crop, mirror and normalize"])


def in_turns(started: Mapping[str, Contestant], settings: Settings, part: int, parts: int) -> dict[str, list[float]]:
    """Return the samples/s of contestants in each turn, within a part of the budget."""
    work = {name: contestant.turn for name, contestant in started.items()}
    return take_turns(work, settings.turns, settings.part(part, parts))


def contestants(
    folder: Path, name: str, case: Case, settings: Settings, batch: int, num_updates: int, num_ranks: int
) -> dict[str, Callable[[], Contestant]]:
    """Return functions that start the contestants of a row."""
    samples = batch * num_updates
    found: dict[str, Callable[[], Contestant]] = {}
    for kind, title in BY_HAND[num_ranks].items():
        words = [kind, name.partition("_")[2] or "small", "tiny" if settings.is_tiny else "full", str(batch)]
        command = [sys.executable, "-m", "benchmarks.cpu.by_hand", *words, str(num_updates)]
        found[title] = partial(start, folder, kind, command, num_ranks, samples)
    found[OURS] = partial(ours, folder, "ours", case, batch, num_updates, num_ranks)
    if num_ranks == 1:
        last = replace(case, data=case.data | {"channels_last": True})
        found[f"{OURS}, channels_last"] = partial(ours, folder, "ours_last", last, batch, num_updates)
    return found


def ours(
    folder: Path,
    name: str,
    case: Case,
    batch: int,
    num_updates: int,
    num_ranks: int = 1,
    options: Sequence[str] = (),
    **sections: dict[str, Any],
) -> Contestant:
    """Start `hvd-batchgrow train`, whose turns are some updates.

    Args:
        folder: for its job file and its run folder.
        name: of its folder.
        case: the network and the data.
        batch: B.
        num_updates: updates of a turn.
        num_ranks: under mpirun, if above 1.
        options: of `train`.
        sections: of the job file.
    """
    write_job(folder / name, case, batch, **sections)
    return start(folder, name, [*TRAIN, *options], num_ranks, batch * num_updates, {UPDATES: str(num_updates)})


def write_job(folder: Path, case: Case, batch: int, **sections: dict[str, Any]) -> None:
    """Write the job file of a case, which waits between its turns, into a new folder."""
    own = {"observers": ["benchmarks.cpu.pausing:Pausing"], "stall_timeout_s": 1e6}
    job = job_of_case(case, batch, logging=own | sections.pop("logging", {}), **sections)
    folder.mkdir()
    (folder / "job.toml").write_text(tomli_w.dumps(job.model_dump(mode="json", exclude_none=True)))


def start(
    folder: Path,
    name: str,
    command: list[str],
    num_ranks: int,
    samples: int,
    variables: Mapping[str, str] | None = None,
) -> Contestant:
    """Start a contestant on a number of ranks; a turn has `samples` samples."""
    (folder / name).mkdir(exist_ok=True)
    return Contestant([*launcher(num_ranks), *command], environment() | dict(variables or {}), folder / name, samples)


def launcher(num_ranks: int) -> list[str]:
    """Return the words before a command that start it on a number of ranks."""
    return [str(ROOT / "tools/mpirun.sh"), str(num_ranks)] if num_ranks > 1 else []


def environment() -> dict[str, str]:
    """Return variables for one thread per rank and for torch.distributed."""
    return {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}


def free_port() -> int:
    """Return a port that no process uses now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port
