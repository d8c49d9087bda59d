"""Run a job: plan it, load its data, open its run folder, train."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hvd_batchgrow.comm.hardware import Hardware, hardware_of
from hvd_batchgrow.comm.ranks import Ranks
from hvd_batchgrow.config import Job
from hvd_batchgrow.config.source_specs import ReportProgress
from hvd_batchgrow.data.data_record import data_record
from hvd_batchgrow.data.datasets.dataset import Datasets
from hvd_batchgrow.job_file import parse_job
from hvd_batchgrow.schedule.plan import Plan, compile_plan
from hvd_batchgrow.train.branch_rounds import BranchRounds
from hvd_batchgrow.train.checkpoints.checkpoint import Checkpoint, checkpoint_paths
from hvd_batchgrow.train.checkpoints.compatibility import check_fits
from hvd_batchgrow.train.checkpoints.elastic_state import ElasticState
from hvd_batchgrow.train.elastic import free_device_memory
from hvd_batchgrow.train.events import Observer, RunEnded
from hvd_batchgrow.train.liveness.stop import Stop
from hvd_batchgrow.train.liveness.watchdog import Heartbeat
from hvd_batchgrow.train.parts import TrainingParts
from hvd_batchgrow.train.run.attempt_record import error_recorded
from hvd_batchgrow.train.run.fork import Origin
from hvd_batchgrow.train.run.model_description import describe_model
from hvd_batchgrow.train.run.notes import notes_on_data, notes_on_gaps, notes_on_network, notes_on_ranks
from hvd_batchgrow.train.run.phase_range import check_reached, end_of
from hvd_batchgrow.train.run.plan_for_ranks import plan_for_ranks
from hvd_batchgrow.train.run.restart import LOCK_WAIT_S, agents_of, is_restart, notes_on_restarts
from hvd_batchgrow.train.run.run_folder import open_run, removed_if_unused
from hvd_batchgrow.train.run.run_lock import RunLock
from hvd_batchgrow.train.run.setup import load_together, prepare_rank
from hvd_batchgrow.train.trainer import Trainer


@dataclass(frozen=True)
class RunOptions:
    """Folder of the runs, and what to do with a run that exists."""

    runs_dir: Path
    resume: bool = False
    overwrite: bool = False
    phases: tuple[int, int] | None = None
    """First and last phase to train, from 1; None: all. The launched ranks must be those that these phases use."""
    fork: str | None = None
    """Name of a new run to make from the newest good checkpoint of the job's run; None: train the job's run."""
    fork_from: Origin | None = None
    """Checkpoint of any run to make the job's run from, which must not exist; None: as `fork` says."""
    max_updates: int | None = None
    """Stop after this number of updates, counted over all attempts that share an `ElasticState`."""
    replay: Path | None = None
    """A file of decisions to follow instead of the trigger's; None: the job's trigger decides."""

    def origin(self, name: str) -> Origin | None:
        """Return the checkpoint to fork from; None: the job's run is not forked. `name` is the job's before a fork."""
        return self.fork_from or (Origin(self.runs_dir / name) if self.fork else None)


@dataclass(frozen=True)
class RankResources:
    """What a rank trains on, whatever the job."""

    source: Datasets
    device: torch.device
    hardware: Hardware
    notes: tuple[str, ...] = ()


def run_job(
    load: Callable[[], Job],
    ranks: Ranks,
    options: RunOptions,
    report: ReportProgress,
    make_observers: Callable[[Job], Sequence[Observer]],
    stop: Stop,
    elastic: ElasticState | None = None,
) -> RunEnded:
    """Train a job to its end, or until a stop is requested. All ranks call it together.

    Args:
        load: returns the job; called on every rank.
        ranks: of the job.
        options: the run folder, and what to do with it.
        report: receives the progress of downloads.
        make_observers: makes the observers of the run; called on rank 0 only.
        stop: whether a stop is requested on this rank.
        elastic: what the attempts of an elastic job share; None: this is the only attempt.

    Raises:
        RanksLost: an elastic job has lost ranks.
        CollectiveError: the job cannot be planned, or its data, packages or run folder cannot be used.
        RunError: a checkpoint could not be written.
    """
    if elastic is not None and ranks.elastic:
        elastic.count_with(ranks)
    loaded = ranks.run_on_all(load)
    job = loaded.model_copy(update={"name": options.fork}) if options.fork else loaded
    plan, shown = ranks.run_on_all(lambda: plan_for_ranks(job, ranks, options.phases, options.replay))
    source = load_together(job, ranks, report)
    with ExitStack() as stack:
        stack.callback(source.close)
        placement = prepare_rank(job, ranks)
        hardware = hardware_of(ranks, placement.device, placement.gpus_per_host)
        resources = RankResources(source, placement.device, hardware, tuple(placement.notes))
        options = replace(options, fork=None, fork_from=options.origin(loaded.name))
        return _train_in_folder(
            (plan, shown),
            ranks,
            options,
            resources,
            report=report,
            make_observers=lambda: make_observers(job),
            stop=stop,
            elastic=elastic or ElasticState(),
        )


def _train_in_folder(
    plans: tuple[Plan, Plan],
    ranks: Ranks,
    options: RunOptions,
    resources: RankResources,
    *,
    report: ReportProgress,
    make_observers: Callable[[], Sequence[Observer]],
    stop: Stop,
    elastic: ElasticState,
    parent: Heartbeat | None = None,
) -> RunEnded:
    """Open the run folder and train, as `run_job` does with a plan and the data.

    Args:
        plans: from `plan_for_ranks`.
        parent: the heartbeat of the run that trains this one as a branch; None: this is not a branch.
    """
    plan, shown = plans
    folder = options.runs_dir / shown.job.name
    if folder.is_symlink():
        folder = Path(os.path.realpath(folder))  # --overwrite replaces the real folder
    with RunLock(folder) as lock, ExitStack() as stack:
        ranks.run_on_rank0(lambda: lock.take(report, LOCK_WAIT_S if ranks.restarts else 0.0))
        observers = ranks.run_on_rank0(make_observers) or ()
        parts, checkpoint, notes = _open(folder, stack, shown, ranks, options, resources, elastic, parent)
        ranks.run_on_all(lambda: check_reached(plan, options.phases, checkpoint, folder))
        notes += ranks.run_on_rank0(lambda: notes_on_gaps(folder, plan, checkpoint, elastic)) or []
        notes += _start_notes(plan, ranks, options, resources, parts)
        trainer = Trainer(
            parts,
            plan,
            ranks,
            folder,
            observers,
            shown=shown,
            hardware=resources.hardware,
            elastic=elastic,
            max_updates=options.max_updates,
            end_samples=end_of(plan, options.phases),
            is_branch=parent is not None,
        )
        trainer.rounds = _branch_rounds(trainer, resources)
        return trainer.run(stop, checkpoint, notes, options.replay)


def _open(
    folder: Path,
    stack: ExitStack,
    plan: Plan,
    ranks: Ranks,
    options: RunOptions,
    resources: RankResources,
    elastic: ElasticState,
    parent: Heartbeat | None,
) -> tuple[TrainingParts, Checkpoint | None, list[str]]:
    """Build what trains, then open the locked run folder.

    Args:
        folder: runs/NAME.
        stack: on rank 0, closes the folder: it removes an unused one, and records an error in another.
        plan: of the job as the user wrote it.
        ranks: all ranks call this together.
        options: what to do with a run that exists.
        resources: of this rank.
        elastic: its checkpoint is written to the folder, if it is newer. If it says that an earlier attempt has opened
            the folder, this one resumes the run.
        parent: see `_train_in_folder`.

    Returns:
        the parts; the checkpoint to resume from, None: start from the beginning; and notes for the user.
    """
    job, source, agents = plan.job, resources.source, agents_of(ranks)
    continues = ranks.rank == 0 and (elastic.has_opened or is_restart(folder, agents))
    if (agents or ranks.elastic) and parent is None and ranks.any(flag=continues):
        options = replace(options, resume=True, overwrite=False, fork_from=None)
    # Before the folder is opened: if the network cannot be built, --overwrite must not remove the old run.
    pretrained = job.model.pretrained is not None and not _has_checkpoint(folder, options, elastic, ranks)
    parts = TrainingParts(job, source, ranks, resources.device, pretrained=pretrained, heartbeat=parent)
    if ranks.rank == 0:
        stack.enter_context(removed_if_unused(folder, elastic, overwrite=options.overwrite))
    ranks.run_on_rank0(lambda: elastic.write_if_newer(folder))
    checkpoint, notes = open_run(
        folder,
        job,
        plan,
        ranks,
        resources.hardware,
        resume=options.resume,
        overwrite=options.overwrite,
        origin=options.fork_from,
        check=lambda checkpoint: check_fits(checkpoint, parts.model, parts.optimizer, folder),
        pretrained=parts.pretrained,
        schema=ranks.run_on_rank0(lambda: data_record(source)),
        description=ranks.run_on_all(lambda: describe_model(job, source)),
        agents=agents,
        elastic=elastic,
    )
    if ranks.rank == 0:
        stack.enter_context(error_recorded(folder))
    return parts, checkpoint, notes


def _start_notes(
    plan: Plan, ranks: Ranks, options: RunOptions, resources: RankResources, parts: TrainingParts
) -> list[str]:
    """Return what the user should know before training starts, other than on the records."""
    notes = [*resources.notes, *plan.notes, *notes_on_data(resources.source), *notes_on_network(parts)]
    notes += notes_on_ranks(plan, ranks.size) if options.phases is None else []
    return notes + notes_on_restarts(os.environ, plan, parts.job, ranks.size, resume=options.resume)


def _branch_rounds(trainer: Trainer, resources: RankResources) -> BranchRounds | None:
    """Return what trains the branches of a run; None: its trigger trains none."""
    if not trainer.job.trigger.trains_branches:
        return None
    train = partial(_train_branch, resources, trainer.plan.num_samples, trainer)
    return BranchRounds(trainer.folder, trainer.observers, train, trainer.parts.heartbeat)


def _train_branch(
    resources: RankResources, num_samples: int, trainer: Trainer, work: Mapping[str, Any], ranks: Ranks, stop: Stop
) -> RunEnded:
    """Train a branch of a run that pauses, or resume it. All ranks call it together with the same `Branch.work`.

    While it trains, the memory holds a second network with its gradients and optimizer.
    """
    job, exists = parse_job(work["job"]), work["exists"]
    plan = compile_plan(job, ranks.size, num_samples)
    origin = None if exists else Origin(Path(work["origin"]), work["start"])
    options = RunOptions(Path(work["runs_dir"]), resume=exists, fork_from=origin)
    devices = [resources.device] if resources.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        ended = _train_in_folder(
            (plan, plan),
            ranks,
            options,
            replace(resources, notes=()),
            report=lambda *_: None,
            make_observers=trainer.observers.for_branch,
            stop=stop,
            elastic=ElasticState(),
            parent=trainer.parts.heartbeat,
        )
    free_device_memory()
    return ended


def _has_checkpoint(folder: Path, options: RunOptions, elastic: ElasticState, ranks: Ranks) -> bool:
    """Return whether the run continues from a checkpoint, or ends with an error because no checkpoint is good.

    All ranks call it together; rank 0's options and files count.
    """
    found = bool(checkpoint_paths(folder / "checkpoints")) or elastic.checkpoint is not None
    continues = options.fork_from is not None or (options.resume and found)
    return ranks.any(flag=ranks.rank == 0 and continues)  # a rank that joins an elastic job has other options
