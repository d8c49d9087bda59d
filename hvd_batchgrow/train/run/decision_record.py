"""The record of a run's decisions: read before the first update, and extended by each decision."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from hvd_batchgrow.comm.ranks import Ranks
from hvd_batchgrow.messages.errors import Fault, JobError
from hvd_batchgrow.schedule.adaptive.decisions import Decision, decisions_text, parse_decisions, read_decisions
from hvd_batchgrow.schedule.plan import Plan, compile_plan
from hvd_batchgrow.storage.atomic import write_file

_FILE = "decisions.jsonl"

Record = tuple[str | None, tuple[Decision, ...]]
"""The file that the run replays, if it replays one, and its decisions."""


def open_decisions(
    folder: Path, ranks: Ranks, plan: Plan, samples: int, replay: Path | None, known: Record
) -> tuple[str | None, tuple[Decision, ...], list[str]]:
    """Read the recorded decisions of a run, or those of the run to replay, on rank 0. All ranks call it together.

    Decisions ahead of the checkpoint were made by an attempt that was killed. They remain valid, so that the records
    of both attempts belong to the same run.

    Args:
        folder: the run folder.
        ranks: of the run.
        plan: of the run, with any decisions.
        samples: sample counter at the start.
        replay: a file of decisions to follow, without making others; None: as the run began.
        known: those of the checkpoint.

    Returns:
        the record, and notes for the user.

    Raises:
        CollectiveError: the decisions to replay cannot be read, do not fit the job, or differ from those that the run
            has followed so far.
    """
    notes: list[str] = []
    path = folder / _FILE

    def read() -> bytes:
        made = tuple(decision for decision in known[1] if decision.samples <= samples)
        if replay is not None:
            source: str | None = str(replay)
            decisions = read_decisions(replay)[1]
            if decisions[: len(made)] != made:
                fault = f"{replay} does not begin with the {len(made)} decisions that led to the checkpoint"
                raise JobError([Fault("--replay", f"{fault}; replay it as another run: --name NAME")], plan.job.name)
        else:
            source, decisions = _on_record(path, made, known, notes)
        try:
            compile_plan(plan.job, plan.num_ranks, plan.num_samples, None, decisions)
        except JobError as error:
            raise JobError(error.faults, str(replay or path)) from None
        if decisions or source or path.exists():
            write_decisions(folder, source, decisions)
        return decisions_text(source, decisions)

    text = ranks.broadcast_from_rank0(read, "decisions")
    return *parse_decisions(text.decode(), path), notes


def _on_record(path: Path, made: tuple[Decision, ...], known: Record, notes: list[str]) -> Record:
    """Return the record of the run, or that of its checkpoint if the run's is unusable."""
    fault = f"{path} is missing"
    if path.exists():
        try:
            source, decisions = read_decisions(path)
            if decisions[: len(made)] == made:
                return source, decisions
            fault = f"{path} does not match the checkpoint"
        except JobError as error:
            fault = str(error)
    elif not known[1]:
        return known
    notes.append(f"{fault}; using the {len(known[1])} decisions of the checkpoint")
    return known


def drop_decisions(folder: Path, after: int) -> int:
    """Remove the decisions after a sample counter from the record of a run that makes its own, on rank 0.

    The record stays, even if it is empty: without it, the run would follow the decisions of its checkpoint, which may
    be ahead of the checkpoint. A damaged record is not changed, because the run does not follow it.

    Returns:
        the number of removed decisions.

    Raises:
        RunError: the record cannot be written.
    """
    try:
        source, decisions = read_decisions(folder / _FILE) if (folder / _FILE).exists() else (None, ())
    except JobError:
        return 0
    kept = [decision for decision in decisions if decision.samples <= after]
    if source is not None or len(kept) == len(decisions):
        return 0
    write_decisions(folder, source, kept)
    return len(decisions) - len(kept)


def write_decisions(folder: Path, source: str | None, decisions: Iterable[Decision]) -> None:
    """Replace the record; it is on disk when this returns.

    Raises:
        RunError: it cannot be written.
    """
    write_file(folder / _FILE, decisions_text(source, decisions))
