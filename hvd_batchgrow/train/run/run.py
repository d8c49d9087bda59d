"""Run a job: plan it, load its data, open its run folder, train."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from hvd_batchgrow.comm.hardware import hardware_of
from hvd_batchgrow.comm.ranks import Ranks
from hvd_batchgrow.config import Job
from hvd_batchgrow.config.source_specs import ReportProgress
from hvd_batchgrow.train.checkpoints.checkpoint import checkpoint_paths
from hvd_batchgrow.train.checkpoints.compatibility import check_fits
from hvd_batchgrow.train.checkpoints.elastic_state import ElasticState
from hvd_batchgrow.train.events import Observer, RunEnded
from hvd_batchgrow.train.liveness.stop import Stop
from hvd_batchgrow.train.parts import TrainingParts
from hvd_batchgrow.train.run.fork import Origin
from hvd_batchgrow.train.run.model_description import describe_model
from hvd_batchgrow.train.run.notes import notes_on_data, notes_on_gaps, notes_on_network, notes_on_ranks
from hvd_batchgrow.train.run.phase_range import check_reached, end_of
from hvd_batchgrow.train.run.plan_for_ranks import plan_for_ranks
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
    loaded = ranks.run_on_all(load)
    job = loaded.model_copy(update={"name": options.fork}) if options.fork else loaded
    plan, shown = ranks.run_on_all(lambda: plan_for_ranks(job, ranks, options.phases, options.replay))
    source = load_together(job, ranks, report)
    placement = prepare_rank(job, ranks)
    hardware = hardware_of(ranks, placement.device, placement.gpus_per_host)
    folder = options.runs_dir / job.name
    elastic = elastic or ElasticState()
    with RunLock(folder) as lock, ExitStack() as stack:
        stack.callback(source.close)
        ranks.run_on_rank0(lambda: lock.take(report))
        observers = ranks.run_on_rank0(lambda: make_observers(job)) or ()
        # Before the folder is opened: if the network cannot be built, --overwrite must not remove the old run.
        pretrained = job.model.pretrained is not None and not _has_checkpoint(folder, options, elastic, ranks)
        parts = TrainingParts(job, source, ranks, placement.device, pretrained=pretrained)
        if ranks.rank == 0:
            stack.enter_context(removed_if_unused(folder, elastic, overwrite=options.overwrite))
        ranks.run_on_rank0(lambda: elastic.write_if_newer(folder))
        checkpoint, notes = open_run(
            folder,
            job,
            shown,
            ranks,
            hardware,
            resume=options.resume,
            overwrite=options.overwrite,
            origin=options.origin(loaded.name),
            check=lambda checkpoint: check_fits(checkpoint, parts.model, parts.optimizer, folder),
            pretrained=parts.pretrained,
            schema=source.schema and {**source.schema, "mean": source.mean, "std": source.std},
            description=ranks.run_on_all(lambda: describe_model(job, source)),
        )
        ranks.run_on_all(lambda: check_reached(plan, options.phases, checkpoint, folder))
        notes += ranks.run_on_rank0(lambda: notes_on_gaps(folder, plan, checkpoint, elastic)) or []
        notes += [*placement.notes, *plan.notes, *notes_on_data(source), *notes_on_network(parts)]
        notes += notes_on_ranks(plan, ranks.size) if options.phases is None else []
        trainer = Trainer(
            parts,
            plan,
            ranks,
            folder,
            observers,
            hardware=hardware,
            elastic=elastic,
            max_updates=options.max_updates,
            end_samples=end_of(plan, options.phases),
        )
        return trainer.run(stop, checkpoint, notes, options.replay)


def _has_checkpoint(folder: Path, options: RunOptions, elastic: ElasticState, ranks: Ranks) -> bool:
    """Return whether the run continues from a checkpoint, or ends with an error because no checkpoint is good."""
    found = bool(checkpoint_paths(folder / "checkpoints")) or elastic.checkpoint is not None
    return bool(options.fork or options.fork_from) or (options.resume and ranks.any(flag=ranks.rank == 0 and found))
