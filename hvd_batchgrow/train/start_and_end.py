"""The events of the start and the end of a run, which describe what was trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from hvd_batchgrow.data.pipeline.reader import choose_pipeline
from hvd_batchgrow.optim.groups import is_divided
from hvd_batchgrow.train.checkpoints.best import best_path
from hvd_batchgrow.train.events import RunEnded, RunStarted

if TYPE_CHECKING:  # it imports this module
    from hvd_batchgrow.train.trainer import Trainer


def started(trainer: Trainer, notes: Sequence[str]) -> RunStarted:
    """Return the event of a start: what is trained, and on what."""
    return RunStarted(
        job=trainer.job,
        plan=trainer.plan,
        folder=trainer.folder,
        samples=trainer.state.samples,
        hardware=trainer.hardware,
        backend=trainer.ranks.backend,
        ranks=trainer.ranks.size,
        threads_per_rank=torch.get_num_threads(),
        pipeline=choose_pipeline(trainer.job.data, trainer.parts.source.train),
        num_parameters=sum(p.numel() for p in trainer.parts.model.parameters()),
        notes=tuple(notes),
        num_frozen=sum(p.numel() for p in trainer.parts.model.parameters() if not p.requires_grad),
        groups=tuple(group.describe() for group in trainer.parts.groups) if is_divided(trainer.job.optim) else (),
        last_update=trainer.elastic.last_update,
        repeats_evaluation=trainer.state.unfinished is not None,
    )


def ended_at(trainer: Trainer, end_samples: int) -> RunEnded:
    """Return the event of an end; the run is done if it has reached this sample counter."""
    schedule, samples = trainer.plan.schedule, trainer.state.samples
    return RunEnded(
        job_name=trainer.job.name,
        folder=trainer.folder,
        done=samples >= end_samples,
        samples=samples,
        updates=schedule.updates_at(samples),
        num_updates=schedule.num_updates,
        elapsed_s=trainer.state.elapsed_s,
        evaluation=trainer.state.evaluation,
        best=_best(trainer),
        replay_checks=trainer.state.replays.describe(trainer.state.elapsed_s)
        if trainer.job.checks.replay_every
        else None,
    )


def _best(trainer: Trainer) -> str | None:
    """Return the result and the checkpoint of the best evaluation."""
    best, path = trainer.state.best, best_path(trainer.folder / "checkpoints", trainer.state.best)
    if path is None:
        return None
    return f"best {best['metric']} {best['value']:.4f} at sample {best['samples'][-1]:,}: {path}"
