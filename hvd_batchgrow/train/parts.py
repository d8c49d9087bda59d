"""The parts that a job trains with on one rank: reader, network, optimizer and update engine."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from hvd_batchgrow.comm.broadcast_object import broadcast_object
from hvd_batchgrow.comm.ranks import Ranks
from hvd_batchgrow.config import Job
from hvd_batchgrow.data.datasets.dataset import BadSample, Dataset, Datasets, raise_bad
from hvd_batchgrow.data.datasets.example import source_form
from hvd_batchgrow.data.datasets.targets import first_targets
from hvd_batchgrow.data.order.stream import Stream, ghost_batches_of_rank
from hvd_batchgrow.data.pipeline.reader import GhostBatchStream, Reader
from hvd_batchgrow.data.pipeline.sampler import NumGhostBatches, OnBad, one_by_one
from hvd_batchgrow.messages.errors import Fault, JobError, RunError, describe_error, faults_of
from hvd_batchgrow.nn.build import (
    build_model,
    check_deterministic,
    check_norm_layers,
    forward_state,
    hazards,
    input_form,
    load_pretrained,
)
from hvd_batchgrow.nn.norm_gradients import NormGradients
from hvd_batchgrow.nn.state.forward_state import ForwardState
from hvd_batchgrow.nn.weights_file import WeightsFile, read_weights
from hvd_batchgrow.optim.build import build_optimizer
from hvd_batchgrow.optim.groups import ParameterGroup, parameter_groups
from hvd_batchgrow.schedule.validation.metric_checks import metric_faults
from hvd_batchgrow.tasks.load_task import load_task
from hvd_batchgrow.tasks.task import Task
from hvd_batchgrow.train.liveness.watchdog import Heartbeat
from hvd_batchgrow.train.task_trial import try_task
from hvd_batchgrow.train.update.engine import UpdateEngine
from hvd_batchgrow.train.update.forward import autocast, forward_of


class TrainingParts:
    """Builds the parts; all ranks do so together.

    Args:
        job: the job to train.
        source: its data.
        ranks: the processes that train together.
        device: of this rank, from `prepare_rank`.
        pretrained: whether to load the job's pretrained weights; not if a checkpoint will replace them.
        heartbeat: receives the stages of this rank; None: a new one.

    Raises:
        CollectiveError: the network cannot be built or trained, or the pretrained weights cannot be loaded.
    """

    def __init__(
        self,
        job: Job,
        source: Datasets,
        ranks: Ranks,
        device: torch.device,
        *,
        pretrained: bool = True,
        heartbeat: Heartbeat | None = None,
    ) -> None:
        self.job, self.source = job, source
        self.heartbeat = heartbeat or Heartbeat()
        self.device = device
        torch.manual_seed(job.seed)
        self.stream = Stream(len(source.train), job.seed)
        max_samples = max(job.micro_batch_limit, job.model.ghost_batch, job.evaluation.batch_size)
        on_bad, on_skipped = (_on_bad_sample(job, ranks, what) for what in ("the next sample replaces it", "skipped"))
        self.reader = Reader(
            job.data, source, self.device, torch.get_num_threads(), on_bad, max_samples, on_skipped_sample=on_skipped
        )
        file = _read_pretrained(job, ranks) if pretrained else None
        self.pretrained = {"path": file.path, "sha256": file.sha256} if file else {}
        """The file of the initial weights, if the job names one and it was read."""
        self.model, self.weight_notes, self.hazards, self.forward_state = ranks.run_on_all(
            lambda: _build_network(job, source, file, self.device)
        )
        self.task = ranks.run_on_all(self._load_task)
        self.groups = ranks.run_on_all(lambda: _groups(job, self.model))
        self.optimizer = build_optimizer(self.model, job.optim)
        self.engine = UpdateEngine(
            self.model,
            self.optimizer,
            ranks,
            rule=job.update,
            forward=forward_of(self.task, job.update.precision),
            rescale_momentum=getattr(job.optim, "rescale_momentum", False),
            exact=job.layout.exact,
            forward_state=self.forward_state,
            at=self.heartbeat.at,
        )
        self.keyed_by = (job.seed, len(source.train)) if self.engine.keyed_modules else None
        """Seed and N, if the network draws dropout by sample."""

    @property
    def check_targets(self) -> Callable[[Any], object] | None:
        """The task's `check_targets`, which raises an error for targets that it refuses; None without one."""
        check: Callable[[Any], object] | None = getattr(self.task, "check_targets", None)
        return check

    def _load_task(self) -> Task:
        """Return the job's task; what `try_task` finds is added to `hazards` and `task_notes`."""
        job, source = self.job, self.source
        task = _load_task(job, source)
        form = input_form(job, source_form(source, job.task.target))
        hazards, self.task_notes = try_task(job, task, self.model, form, source)
        self.hazards += hazards
        return task

    def measure_noise(self) -> None:
        """Measure the noise in the gradient of each following update, as the job says."""
        section, layers = self.job.gradient_noise, None
        if section.estimator == "norm_layers":
            layers = NormGradients(self.model, mixes_samples=self.job.data.mixes_samples)
        self.engine.measure_noise(
            preconditioned=section.preconditioned, per_layer_group=section.per_layer_group, layers=layers
        )

    def ghost_batches(
        self,
        samples: int,
        ranks: Ranks,
        num_ghost_batches: NumGhostBatches = one_by_one,
        *,
        rank: int | None = None,
        keep_prefetched: bool = False,
    ) -> GhostBatchStream:
        """Return a rank's ghost batches of the stream from a sample counter on.

        Args:
            samples: the sample counter.
            ranks: those that share the stream.
            num_ghost_batches: how many ghost batches are read as one batch; those of a pass need no copy then.
            rank: the rank whose ghost batches are returned; None: this rank.
            keep_prefetched: leave what is prefetched for training as it is.
        """
        ghost_batch = self.job.model.ghost_batch
        of_rank = ranks.rank if rank is None else rank
        first = ghost_batches_of_rank(samples // ghost_batch, ranks.size, of_rank, ranks.size)[0]
        batches = self.reader.training(
            self.stream, ghost_batch, first, ranks.size, num_ghost_batches, keep_prefetched=keep_prefetched
        )
        return GhostBatchStream(batches, ghost_batch)


def _on_bad_sample(job: Job, ranks: Ranks, consequence: str) -> OnBad:
    """Return what raises or reports a bad sample. It is reported once, though each evaluation finds it again."""
    if job.data.on_bad_sample == "error":
        return raise_bad
    reported: set[str] = set()

    def report(bad: BadSample) -> None:
        if bad.where not in reported:
            reported.add(bad.where)
            print(f"rank {ranks.rank}: {bad.describe()}; {consequence}", file=sys.stderr, flush=True)

    return report


def _load_task(job: Job, source: Datasets) -> Task:
    """Return the job's task. It must have the metrics that the trigger and `checkpoint.keep_best` name."""
    with faults_of(job.name):
        task = load_task(job.task, source.num_classes, source.schema)
        if faults := list(metric_faults(job, {"loss": "down", **task.metrics})):
            raise JobError(faults)
        if check := getattr(task, "check_targets", None):
            for samples in filter(None, (source.train, source.validation, source.test)):
                _call_check(check, samples, job.task.name)
    return task


def _call_check(check: Callable[[Any], object], samples: Dataset, name: str) -> None:
    """Call a task's `check_targets`. Raises JobError for any error of a custom one."""
    targets = first_targets(samples)
    try:
        check(targets)
    except (JobError, RunError):
        raise
    except Exception as error:  # the user's own code
        raise JobError([Fault("task.name", f"{name} refuses the targets: {describe_error(error)}")]) from error


def _groups(job: Job, model: nn.Module) -> list[ParameterGroup]:
    with faults_of(job.name):
        return parameter_groups(model, job.optim)


def _read_pretrained(job: Job, ranks: Ranks) -> WeightsFile | None:
    """Read the job's pretrained weights on rank 0, which sends them to all ranks; None if it names none."""
    path = job.model.pretrained
    if path is None:
        return None

    def read() -> WeightsFile:
        with faults_of(job.name):
            return read_weights(path)

    file = ranks.run_on_rank0(read)
    return WeightsFile(**broadcast_object(ranks, vars(file) if file else None, "pretrained weights"))


def _build_network(
    job: Job, source: Datasets, file: WeightsFile | None, device: torch.device
) -> tuple[nn.Module, list[str], list[str], ForwardState]:
    """Return the job's network ready for training, notes on its weights, its `hazards`, and the state it changes.

    Raises:
        JobError: as `build_model`, `load_pretrained`, `check_deterministic`, `forward_state` and `check_norm_layers`;
            or the job is exact and the network has hazards.
    """
    form = source_form(source, job.task.target)
    model = build_model(job, form, source.num_classes)
    notes = load_pretrained(job, model, file, source.num_classes) if file else []
    model = model.to(device)
    with autocast(device, job.update.precision):  # which may select other kernels
        check_deterministic(job, model, form)
    state = forward_state(job, model, form)
    found = hazards(job, model, form)
    if found and job.layout.exact:
        fault = f"is not possible with {job.model.name}; at {'; '.join(found)}"
        raise JobError([Fault("layout.exact", fault)], job.name)
    if job.checks.replay_every and (reasons := [*found, *state.attributes]):
        fault = f"is not possible with {job.model.name}, whose repeated passes may differ; at {'; '.join(reasons)}"
        raise JobError([Fault("checks.replay_every", fault)], job.name)
    check_norm_layers(job, model, form)
    if job.data.channels_last:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if job.layout.compile:
        model.compile()  # in place, so that parameters keep their names; a copy is not compiled
    return model, notes, found, state
