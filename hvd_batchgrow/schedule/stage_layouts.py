"""The layout of each stage of a job."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from hvd_batchgrow.config import Job
from hvd_batchgrow.messages.errors import Fault, JobError
from hvd_batchgrow.schedule.layout import Layout, form_layout, ranks_for_full_passes
from hvd_batchgrow.schedule.stages import Stage

ChooseRanks = Callable[[Stage], int]
"""Returns the number of ranks for a stage's batch."""


def layouts_for(stages: Sequence[Stage], job: Job, ranks: int, choose_ranks: ChooseRanks | None) -> tuple[Layout, ...]:
    """Return the layout of each stage. Raises JobError with the faults of all of them."""
    faults: list[Fault] = []
    layouts = []
    for k, (stage, phase_ranks) in enumerate(zip(stages, _phase_ranks(stages, job, ranks, choose_ranks), strict=True)):
        if stage.global_batch % job.model.ghost_batch and not job.is_adaptive:
            continue  # the fault of the key is already reported
        try:
            layouts.append(layout_for(stage, phase_ranks, job))
        except ValueError as error:
            hint = _multiple_hint(job, phase_ranks)
            faults.append(Fault(f"phase {k + 1} (from epoch {stage.start_epoch:g})", f"{error}{hint}"))
    if faults:
        raise JobError(faults, job.name)
    return tuple(layouts)


def _multiple_hint(job: Job, ranks: int) -> str:
    """Return the `batch_multiple` of which these ranks can form every multiple, if the first batch is one of them."""
    section, every = job.schedule, ranks * job.model.ghost_batch
    has_key = "batch_multiple" in type(section).model_fields and job.layout.grow_by == "accumulation"
    if not has_key or job.is_adaptive or section.first_batch % every or section.stated_unit == every:
        return ""
    effect = ", and the learning rate makes up for the difference" if section.rule == "none" else ""
    return f"; or schedule.batch_multiple = {every}{effect}"


def layout_for(stage: Stage, ranks: int, job: Job) -> Layout:
    """Return the layout of a stage's batch. Raises ValueError as `form_layout` does."""
    ghost_batch = job.model.ghost_batch
    # `key_faults` reports a limit that is not whole ghost batches.
    limit = max(1, job.micro_batch_limit // ghost_batch) * ghost_batch
    return form_layout(stage.global_batch, ranks, ghost_batch, limit, uneven_ranks=job.layout.uneven_ranks)


def _phase_ranks(stages: Sequence[Stage], job: Job, ranks: int, choose_ranks: ChooseRanks | None) -> list[int]:
    layout, ghost_batch = job.layout, job.model.ghost_batch
    if layout.grow_by == "accumulation":
        return [ranks] * len(stages)
    if layout.grow_by == "auto":
        if choose_ranks is None:
            fault = "'auto' needs costs: --cost with a PROBE.json, which hvd-batchgrow probe writes, or a MACHINE.toml"
            raise JobError([Fault("layout.grow_by", fault)])
        return [choose_ranks(stage) for stage in stages]
    if layout.ranks_per_phase:
        if len(layout.ranks_per_phase) != len(stages):
            fault = f"{len(layout.ranks_per_phase)} numbers for {len(stages)} phases; give one for each phase"
            raise JobError([Fault("layout.ranks_per_phase", fault)])
        return list(layout.ranks_per_phase)
    most = min(layout.max_ranks or ranks, ranks)
    return [
        ranks_for_full_passes(
            stage.global_batch, most, ghost_batch, job.micro_batch_limit, uneven_ranks=layout.uneven_ranks
        )
        for stage in stages
    ]
