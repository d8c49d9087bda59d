"""Run a job: plan it, load its data, open its run folder, train."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from hvd_batchgrow.comm.ranks import Ranks, RanksLost
from hvd_batchgrow.config import Job
from hvd_batchgrow.data.datasets.dataset import Dataset, DatasetPair, ReportProgress
from hvd_batchgrow.data.images.encoded_dataset import EncodedDataset
from hvd_batchgrow.data.pipeline.reader import choose_pipeline
from hvd_batchgrow.data.pipeline.sampler import known_bad
from hvd_batchgrow.data.sources.specs import known_num_samples
from hvd_batchgrow.messages.errors import Fault, JobError, faults_of
from hvd_batchgrow.messages.schema_messages import counted
from hvd_batchgrow.nn.networks.registry import check_model
from hvd_batchgrow.schedule.adaptive.decisions import check_replay
from hvd_batchgrow.schedule.plan import Plan, compile_plan
from hvd_batchgrow.train.checkpoints.checkpoint import Checkpoint
from hvd_batchgrow.train.checkpoints.compatibility import check_fits
from hvd_batchgrow.train.checkpoints.elastic_state import ElasticState
from hvd_batchgrow.train.events import Observer, RunEnded
from hvd_batchgrow.train.liveness.stop import Stop, StopAfter
from hvd_batchgrow.train.run.phase_range import check_reached, check_width, end_of
from hvd_batchgrow.train.run.record_gaps import gap_notes
from hvd_batchgrow.train.run.run_folder import open_run, removed_if_unused
from hvd_batchgrow.train.run.run_lock import RunLock
from hvd_batchgrow.train.run.setup import load_together, set_threads
from hvd_batchgrow.train.trainer import Trainer
from hvd_batchgrow.train.update.gradients import check_wire_type, wire_type_of


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
    max_updates: int | None = None
    """Stop after this number of updates, counted over all attempts that share an `ElasticState`."""
    replay: Path | None = None
    """A file of decisions to follow instead of the trigger's; None: the job's trigger decides."""


def run_job(
    load: Callable[[], Job],
    ranks: Ranks,
    options: RunOptions,
    report: ReportProgress,
    make_observers: Callable[[Job], Sequence[Observer]],
    stop: Stop,
    state: ElasticState | None = None,
) -> RunEnded:
    """Train a job to its end, or until a stop is requested. All ranks call it together.

    Args:
        load: returns the job; called on every rank.
        ranks: of the job.
        options: the run folder, and what to do with it.
        report: receives the progress of downloads.
        make_observers: makes the observers of the run; called on rank 0 only.
        stop: whether a stop is requested on this rank.
        state: of an elastic job: what the previous attempt has left; filled if this attempt loses ranks.

    Raises:
        RanksLost: an elastic job has lost ranks.
        CollectiveError: the job cannot be planned, or its data, packages or run folder cannot be used.
        RunError: a checkpoint could not be written.
    """
    loaded = ranks.run_on_all(load)
    job = loaded.model_copy(update={"name": options.fork}) if options.fork else loaded
    plan, shown = ranks.run_on_all(lambda: _prepare(job, ranks, options))
    source = load_together(job, ranks, report)
    set_threads(job, ranks)
    folder = options.runs_dir / job.name
    origin = options.runs_dir / loaded.name if options.fork else None
    state = state or ElasticState()
    with RunLock(folder) as lock, ExitStack() as stack:
        ranks.run_on_all(lambda: lock.take(report) if ranks.rank == 0 else None)
        observers = make_observers(job) if ranks.rank == 0 else ()
        # Before the folder is opened: if the network cannot be built, --overwrite must not remove the old run.
        trainer = Trainer(job, plan, source, ranks, folder, observers)
        if ranks.rank == 0:
            unused = removed_if_unused(folder, overwrite=options.overwrite, is_used=lambda: trainer.num_updates > 0)
            stack.enter_context(unused)
        ranks.run_on_all(lambda: state.write_if_newer(folder, job.checkpoint.keep) if ranks.rank == 0 else None)
        checkpoint, notes = _open(trainer, source, shown, options, origin)
        notes += _notes(trainer, source, options, checkpoint, state)
        ranks.run_on_all(lambda: check_reached(plan, options.phases, checkpoint, folder))
        return _train(trainer, options, stop, checkpoint, notes, state)


def _open(
    trainer: Trainer, source: DatasetPair, shown: Plan, options: RunOptions, origin: Path | None
) -> tuple[Checkpoint | None, list[str]]:
    """Open the run folder; return the checkpoint to resume from, and notes for the user."""
    return open_run(
        trainer.folder,
        trainer.job,
        shown,
        trainer.ranks,
        resume=options.resume,
        overwrite=options.overwrite,
        origin=origin,
        check=lambda checkpoint: check_fits(checkpoint, trainer.model, trainer.optimizer, trainer.folder),
        schema=source.schema and {**source.schema, "mean": source.mean, "std": source.std},
    )


def _train(
    trainer: Trainer,
    options: RunOptions,
    stop: Stop,
    checkpoint: Checkpoint | None,
    notes: Sequence[str],
    state: ElasticState,
) -> RunEnded:
    """Train, and keep in `state` what the next attempt of an elastic job needs."""
    before = state.num_updates
    if options.max_updates is not None:
        stop = StopAfter(stop, lambda: before + trainer.num_updates, options.max_updates)
    try:
        end_samples = end_of(trainer.plan, options.phases)
        return trainer.run(stop, checkpoint, notes, end_samples, state.last_update, options.replay)
    except RanksLost:
        trainer.break_off(state)
        raise
    finally:
        state.num_updates = before + trainer.num_updates


def _notes(
    trainer: Trainer, source: DatasetPair, options: RunOptions, checkpoint: Checkpoint | None, state: ElasticState
) -> list[str]:
    """Return what the user should know before training starts. All ranks call it together."""
    job, plan, ranks = trainer.job, trainer.plan, trainer.ranks
    notes = ranks.run_on_all(lambda: _notes_on_gaps(trainer.folder, plan, checkpoint, state) if ranks.rank == 0 else [])
    notes += [*plan.notes, *source.notes, *_notes_on_bad(source)]
    notes += _notes_on_ranks(plan, ranks.size) if options.phases is None else []
    notes += [f"results of {job.model.name} depend on the layout: {hazard}" for hazard in trainer.hazards]
    notes += trainer.forward_state.notes(job.model.name, exact=job.layout.exact)
    if source.train.kind == "encoded" and choose_pipeline(job.data.pipeline, source.train) == "torch":
        notes.append(
            "images are decoded in the training thread; DALI decodes to the same pixels faster: "
            "pip install 'hvd_batchgrow[dali-cuda130]'"
        )
    return notes


def _notes_on_ranks(plan: Plan, num_ranks: int) -> list[str]:
    """Return a note if some ranks are idle in every phase."""
    never = num_ranks - plan.peak_ranks
    return [f"{never} of {counted(num_ranks, 'rank')} {'is' if never == 1 else 'are'} never used"] if never > 0 else []


def _notes_on_gaps(folder: Path, plan: Plan, checkpoint: Checkpoint | None, state: ElasticState) -> list[str]:
    """Return notes on records that end before the checkpoint."""
    if checkpoint is None:
        return []
    decided = [decision["new_batch"] for decision in checkpoint.growth.get("decisions", ())]
    largest = max([*decided, *(phase.global_batch for phase in plan.schedule.phases)])
    interval = plan.num_samples / plan.job.logging.logs_per_epoch + largest
    return gap_notes(folder, checkpoint.samples, state.last_update, interval)


def _notes_on_bad(source: DatasetPair) -> list[str]:
    """Return notes on samples that were found to be bad when the source was opened."""
    return [
        f"{len(bad)} of {len(samples)} {name} samples are bad and will be {fate}: {_first_bad(samples, min(bad))}, …"
        for name, samples, fate in (("training", source.train, "replaced"), ("test", source.test, "skipped"))
        if (bad := known_bad(samples))
    ]


def _first_bad(samples: Dataset, sample_id: int) -> str:
    fault = f" {samples.fault(sample_id)}" if isinstance(samples, EncodedDataset) else ""
    return samples.locate(sample_id) + fault


def _prepare(job: Job, ranks: Ranks, options: RunOptions) -> tuple[Plan, Plan]:
    """Return the plan for these ranks, and the plan to write; an elastic job's is for the most ranks it may use."""
    phases = options.phases
    if options.replay is not None:
        check_replay(job, job.name)
    with faults_of(job.name):
        num_samples = known_num_samples(job.data)
    # From the written plan, a host discovery script reads how many ranks the elastic job can use.
    most_ranks = max(ranks.size, job.layout.max_ranks or 0) if ranks.elastic else ranks.size
    shown = compile_plan(job, most_ranks, num_samples)
    plan = compile_plan(for_any_ranks(job), ranks.size, num_samples) if ranks.elastic else shown
    if phases is not None:
        check_width(plan, phases, ranks.size)
        check_model(job)
        return plan, shown
    if plan.peak_ranks > ranks.size:
        fault = f"a phase is planned for {plan.peak_ranks} ranks, but {ranks.size} are launched"
        raise JobError([Fault("layout.ranks_per_phase", f"{fault}; launch {plan.peak_ranks}")], job.name)
    check_model(job)
    try:
        check_wire_type(wire_type_of(job.update), ranks, exact=False)
    except ValueError as error:
        raise JobError([Fault("update.allreduce_dtype", str(error))], job.name) from None
    return plan, shown


def for_any_ranks(job: Job) -> Job:
    """Return the job with a layout for any number of ranks: all of them train, and their shares may be unequal."""
    return job.model_copy(update={"layout": job.layout.grown_by("accumulation", uneven_ranks=True)})
