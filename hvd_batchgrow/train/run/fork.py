"""Start a new run from another run's checkpoint, with a job that may lead to different weights."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hvd_batchgrow.config import Job
from hvd_batchgrow.messages.errors import RunError
from hvd_batchgrow.results.changed_settings import FIXED, changes
from hvd_batchgrow.results.plan_file import read_plan
from hvd_batchgrow.schedule.adaptive.decisions import Decision, decisions_text
from hvd_batchgrow.schedule.plan import Plan, compile_plan
from hvd_batchgrow.schedule.trigger import trigger_of
from hvd_batchgrow.storage.atomic import new_folder
from hvd_batchgrow.storage.json_lines import read_json_lines
from hvd_batchgrow.storage.strict_json import dump_json, json_bytes
from hvd_batchgrow.train.checkpoints.checkpoint import Checkpoint, checkpoint_at, newest_good, write_checkpoint

_RECORDS = ("metrics.jsonl", "consumed.jsonl")
_KEEP = "Up to that sample, keep the batches and boundaries of the original run"


@dataclass(frozen=True)
class Origin:
    """The checkpoint that a fork continues from."""

    run: Path
    """Folder of the other run, which is not changed."""
    samples: int | None = None
    """Sample counter of the checkpoint; None: the newest good one."""

    def checkpoint(self) -> tuple[Checkpoint, list[str]]:
        """Return the checkpoint, and the newer ones that were skipped with the reasons. Raises RunError."""
        folder = self.run / "checkpoints"
        if self.samples is not None:
            return checkpoint_at(folder, self.samples), []
        checkpoint, skipped = newest_good(folder)
        if checkpoint is None:
            raise RunError(f"{self.run} holds no checkpoint to fork from")
        return checkpoint, skipped


def fork_run(
    origin: Origin,
    folder: Path,
    plan: Plan,
    records: Mapping[str, bytes],
    check: Callable[[Checkpoint], None],
    notes: list[str],
) -> Checkpoint:
    """Make a run folder from a checkpoint of another run.

    The folder appears under its name complete, or not at all.

    Args:
        origin: the checkpoint.
        folder: the new folder.
        plan: plan of the new run.
        records: contents of further files of the new run.
        check: raises RunError if a checkpoint does not fit the network.
        notes: receives notes for the user.

    Returns:
        the checkpoint to continue from.

    Raises:
        RunError: the folder exists, the other run has no good checkpoint, or the job cannot continue from it.
    """
    if folder.exists():
        raise RunError(
            f"{folder} exists already: resume it with --name {folder.name} --resume auto, or fork under another name"
        )
    checkpoint, skipped = origin.checkpoint()
    plan, decided = _decided(checkpoint, plan)
    deciding = plan.job.deciding(plan.num_samples)
    changed = changes(plan.job.completed(checkpoint.deciding), deciding)
    _check(origin.run, checkpoint, plan, changed)
    check(checkpoint)
    forked_from = {"run": str(origin.run.absolute()), "samples": checkpoint.samples, "changed": changed}
    record = json_bytes({"forked_from": forked_from, "attempts": []})
    folder.parent.mkdir(parents=True, exist_ok=True)
    with new_folder(folder) as aside:
        (aside / "checkpoints").mkdir()
        for name in _RECORDS:
            if (origin.run / name).exists():
                shutil.copyfile(origin.run / name, aside / name)
        for name, content in {**records, **decided, **_branches(origin.run, checkpoint), "record.json": record}.items():
            (aside / name).write_bytes(content)
        growth = _growth(checkpoint, plan.job, changed)
        # The new run selects among its results only.
        checkpoint = replace(checkpoint, deciding=deciding, best={}, growth=growth)
        write_checkpoint(aside / "checkpoints", checkpoint, 1, ())
    lines = [f"{key} was {was!r}, is {now!r}" for key, (was, now) in changed.items()]
    notes += [f"skipped a checkpoint of {origin.run}: {reason}" for reason in skipped]
    notes.append(f"forked from {origin.run} at sample {checkpoint.samples:,}: {'; '.join(lines) or 'the same job'}")
    return checkpoint


def _decided(checkpoint: Checkpoint, plan: Plan) -> tuple[Plan, dict[str, bytes]]:
    """Return the plan after the decisions that led to a checkpoint, and the file that records them, if any.

    Decisions beyond the checkpoint are dropped, because the new job may decide differently; replayed ones are kept.
    """
    made = tuple(map(Decision.from_dict, checkpoint.growth.get("decisions", ())))
    if not plan.job.is_adaptive or not made:
        return plan, {}
    source = checkpoint.growth["replayed_from"]
    kept = made if source else tuple(decision for decision in made if decision.samples <= checkpoint.samples)
    after = compile_plan(plan.job, plan.num_ranks, plan.num_samples, None, kept)
    return after, {"decisions.jsonl": decisions_text(source, kept)}


def _branches(run: Path, checkpoint: Checkpoint) -> dict[str, bytes]:
    """Return the file of a trigger's branches up to a checkpoint, if it has lines. They are part of the run's cost."""
    lines = [line for line in read_json_lines(run / "branches.jsonl") if line["samples"] <= checkpoint.samples]
    return {"branches.jsonl": "".join(f"{dump_json(line)}\n" for line in lines).encode()} if lines else {}


def _growth(checkpoint: Checkpoint, job: Job, changed: Mapping[str, tuple[Any, Any]]) -> dict[str, Any]:
    """Return the measurements and decisions; without the state of a trigger whose keys have changed."""
    growth = checkpoint.growth
    is_other = "trigger.name" in changed or not trigger_of(job).keeps_state
    if not growth or growth["replayed_from"] or not is_other or not any(key.startswith("trigger.") for key in changed):
        return growth
    return {**growth, "trigger": {}, "best": {}, "best_average": {}}


def _check(origin: Path, checkpoint: Checkpoint, plan: Plan, changed: Mapping[str, tuple[Any, Any]]) -> None:
    """Raise RunError if a changed key is fixed, nothing is left to train, or no update of the job starts here."""
    if fixed := sorted(FIXED & set(changed)):
        lines = [f"{key}: was {changed[key][0]!r}, is {changed[key][1]!r}" for key in fixed]
        raise RunError(
            f"{origin} cannot be forked with a change of\n  "
            + "\n  ".join(lines)
            + "\n  start a new run instead: --name NAME"
        )
    samples, ghost_batch = checkpoint.samples, plan.ghost_batch
    if samples >= plan.schedule.end_samples:
        raise RunError(
            f"{origin} is at sample {samples:,}, and this job ends at {plan.schedule.end_samples:,}: "
            "nothing is left to train"
        )
    phase = plan.schedule.at(samples)
    done = samples - phase.start_samples
    if samples % ghost_batch or done % phase.global_batch:
        raise RunError(
            f"{origin} is at sample {samples:,}, {done / phase.global_batch:.2f} updates of {phase.global_batch} into "
            f"the phase that begins at {phase.start_samples:,}: no update of this job starts there. {_KEEP}"
        )
    if plan.job.is_adaptive:  # its decisions up to here are kept
        return
    trained = [(phase["start_samples"], phase["global_batch"]) for phase in read_plan(origin)["phases"]]
    planned = [(phase.start_samples, phase.global_batch) for phase in plan.schedule.phases]
    if (before := _batches(trained, samples)) != (now := _batches(planned, samples)):
        raise RunError(
            f"{origin} had trained {before} up to sample {samples:,}, and this job would have trained {now}: its "
            f"updates could not be counted. {_KEEP}"
        )


def _batches(phases: Sequence[tuple[int, int]], samples: int) -> str:
    """Return the batches before a sample counter, of pairs of first sample and batch, in words."""
    changed: list[tuple[int, int]] = []
    for start, batch in phases:
        if start < samples and (not changed or changed[-1][1] != batch):
            changed.append((start, batch))
    return ", ".join(f"batch {batch:,}" + (f" from sample {start:,}" if start else "") for start, batch in changed)
