"""Ranks that torchrun has started again: they resume the run that they trained before."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from pathlib import Path

from hvd_batchgrow.comm.launcher_env import TORCHRUN, launched_by, restarts_ranks, torchrun_agent
from hvd_batchgrow.comm.ranks import Ranks
from hvd_batchgrow.config import Job
from hvd_batchgrow.messages.wording import counted
from hvd_batchgrow.results.run_files import read_attempts
from hvd_batchgrow.schedule.plan import Plan

LOCK_WAIT_S = 60.0
"""How long a new attempt waits for processes of the one before. torchrun kills those that do not end within 30 s."""


def agents_of(ranks: Ranks) -> list[str]:
    """Return the torchrun processes that have started these ranks, each once. All ranks call it together."""
    if launched_by(os.environ) != TORCHRUN:
        return []
    names = ranks.all_gather_bytes(torchrun_agent(os.environ).encode(), "agents")
    return sorted({name.decode() for name in names} - {""})


def is_restart(folder: Path, agents: Collection[str]) -> bool:
    """Return whether one of these torchrun processes has started the last attempt of the run in a folder.

    If so, torchrun has started the ranks again, and they continue this run even without `--resume auto`.
    TORCHELASTIC_RESTART_COUNT does not show this: it counts the failures of one torchrun process. It does not count
    restarts because ranks join, and counts attempts that ended because the folder holds a run already.
    """
    attempts = read_attempts(folder / "record.json")  # a damaged record is reported elsewhere
    before = attempts[-1].get("agents") if attempts else None
    return isinstance(before, list) and any(agent in before for agent in agents)


def notes_on_restarts(
    environment: Mapping[str, str], plan: Plan, job: Job, num_ranks: int, *, resume: bool
) -> list[str]:
    """Return notes for the user of torchrun with restarts: on its environment, and on a changed layout.

    In torch 2.13.0, a torchrun process that joins waits for the address of rank 0, which is not published again if
    rank 0 was there before (`DynamicRendezvousHandler.next_rendezvous`).

    Args:
        environment: of this process.
        plan: for the current ranks.
        job: as the user wrote it.
        num_ranks: number of current ranks.
        resume: whether the command has `--resume auto`.
    """
    if not restarts_ranks(environment):
        return []
    notes = []
    if environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        variable = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"
        notes.append(f"so that hosts can join and failed ranks restart, set {variable} in the environment of torchrun")
    if not resume:  # `is_restart` needs a torchrun process of the last attempt
        notes.append("add --resume auto, so that the run continues even if all torchrun processes have been replaced")
    if plan.job.layout != job.layout:
        ranks = counted(num_ranks, "rank")
        notes.append(f"the job's layout cannot be formed on {ranks}: shares may be unequal, and ranks may be idle")
    return notes
