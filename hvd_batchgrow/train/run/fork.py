"""A new run from a checkpoint of another, by a job that may lead to other weights."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from hvd_batchgrow.messages.errors import RunError
from hvd_batchgrow.schedule.adaptive.decisions import Decision, decisions_text
from hvd_batchgrow.schedule.plan import Plan, compile_plan
from hvd_batchgrow.storage.atomic import sync, write_atomically
from hvd_batchgrow.storage.strict_json import dump_json
from hvd_batchgrow.train.checkpoints.checkpoint import Checkpoint, newest_good, write_checkpoint

_FIXED = frozenset(
    {
        *("seed", "data.num_samples"),  # the order of samples, which the run is in the midst of
        *("model.name", "model.kwargs", "model.channels", "optim.name", "update.ema_samples"),  # what is saved
    }
)
_RECORDS = ("metrics.jsonl", "consumed.jsonl")


def fork_run(
    origin: Path, folder: Path, plan: Plan, records: Mapping[str, bytes], check: Callable[[Checkpoint], None]
) -> list[str]:
    """Make a run folder that another run could have led to, from the newest good checkpoint of that.

    The folder comes to be under its name at once, or not at all.

    Args:
        origin: folder of the other run, which stays as it is.
        folder: the new one.
        plan: of the new run.
        records: further files that it starts with.
        check: raises RunError where a checkpoint is of another network.

    Returns:
        notes for the user.

    Raises:
        RunError: the folder is there already, the other run has no good checkpoint, or the job cannot go on
            from it.
    """
    if folder.exists():
        raise RunError(
            f"{folder} exists already: go on with it by --name {folder.name} --resume auto, or fork by another"
        )
    data, skipped = newest_good(origin / "checkpoints")
    if data is None:
        raise RunError(f"{origin} holds no checkpoint to fork from")
    checkpoint = Checkpoint.from_bytes(data)
    plan, decided = _decided(checkpoint, plan)
    deciding = plan.job.deciding(plan.num_samples)
    told = changes(plan.job.completed(checkpoint.deciding), deciding)
    _check(origin, checkpoint, plan, told)
    check(checkpoint)
    came_from = {"run": str(origin.absolute()), "samples": checkpoint.samples, "changed": told}
    aside = folder.with_name(f".{folder.name}.forking")
    shutil.rmtree(aside, ignore_errors=True)
    (aside / "checkpoints").mkdir(parents=True)
    for name in _RECORDS:
        if (origin / name).exists():
            shutil.copyfile(origin / name, aside / name)
    for name, content in {
        **records,
        **decided,
        "record.json": json_bytes({"forked_from": came_from, "lives": []}),
    }.items():
        write_atomically(aside / name, content)
    write_checkpoint(aside / "checkpoints", replace(checkpoint, deciding=deciding), 1, ())
    os.rename(aside, folder)
    sync(folder.parent)
    lines = [f"{key} was {was!r}, is {now!r}" for key, (was, now) in told.items()]
    return [f"skipped a checkpoint of {origin}: {reason}" for reason in skipped] + [
        f"forked from {origin} at sample {checkpoint.samples:,}: {'; '.join(lines) or 'the same job'}"
    ]


def _decided(checkpoint: Checkpoint, plan: Plan) -> tuple[Plan, dict[str, bytes]]:
    """The plan after the decisions that led to a checkpoint, and the record of them, where a trigger made any.

    Those ahead of it are left out, unless they are replayed: the new job may decide otherwise.
    """
    made = tuple(map(Decision.from_dict, checkpoint.growth.get("decisions", ())))
    if not plan.job.is_adaptive or not made:
        return plan, {}
    source = checkpoint.growth["replayed_from"]
    kept = made if source else tuple(decision for decision in made if decision.samples <= checkpoint.samples)
    after = compile_plan(plan.job, plan.num_ranks, plan.num_samples, None, kept)
    return after, {"decisions.jsonl": decisions_text(source, kept)}


def _check(origin: Path, checkpoint: Checkpoint, plan: Plan, told: Mapping[str, tuple[Any, Any]]) -> None:
    """A run may change its ways in its midst, but not what it is."""
    if fixed := sorted(_FIXED & set(told)):
        lines = [f"{key}: was {told[key][0]!r}, is {told[key][1]!r}" for key in fixed]
        raise RunError(
            f"{origin} cannot be forked with another\n  " + "\n  ".join(lines) + "\n  start anew: --name NAME"
        )
    samples, group = checkpoint.samples, plan.group
    if samples >= plan.schedule.end_samples:
        raise RunError(
            f"{origin} stands at sample {samples:,}, and this job ends at {plan.schedule.end_samples:,}: "
            "nothing is left to train"
        )
    phase = plan.schedule.at(samples)
    done = samples - phase.start_samples
    if samples % group or done % phase.global_batch:
        raise RunError(
            f"{origin} stands at sample {samples:,}, {done / phase.global_batch:.2f} updates of {phase.global_batch} "
            f"into the phase that begins at {phase.start_samples:,}: this job is never there. Fork with batches and "
            "boundaries up to there as they were"
        )


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The keys that differ, with both values."""
    return {key: (before.get(key), now.get(key)) for key in sorted({*before, *now}) if before.get(key) != now.get(key)}


def json_bytes(tree: Any) -> bytes:
    """The content of a JSON file that people read."""
    return (dump_json(tree, indent=2) + "\n").encode()
