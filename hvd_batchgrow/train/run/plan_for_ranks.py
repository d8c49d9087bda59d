"""Plan a job for the launched ranks, and refuse what they cannot train."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from hvd_batchgrow.comm.ranks import Ranks
from hvd_batchgrow.config import Job
from hvd_batchgrow.data.source_checks import known_num_samples
from hvd_batchgrow.messages.errors import Fault, JobError, faults_of
from hvd_batchgrow.messages.wording import counted
from hvd_batchgrow.schedule.adaptive.decisions import Decision, check_replay
from hvd_batchgrow.schedule.plan import Plan, compile_plan
from hvd_batchgrow.schedule.policy import compile_stages
from hvd_batchgrow.schedule.rounding import half_up
from hvd_batchgrow.schedule.stages import make_start
from hvd_batchgrow.schedule.validation.job_check import one_gradient
from hvd_batchgrow.train.run.phase_range import check_width
from hvd_batchgrow.train.update.gradients import check_wire_type, wire_type_of


def plan_for_ranks(
    job: Job, ranks: Ranks, phases: tuple[int, int] | None = None, replay: Path | None = None
) -> tuple[Plan, Plan]:
    """Return the plan for these ranks, and the plan to write; an elastic job's is for the most ranks it may use.

    If ranks may join or leave, there is a plan for any number of them; only a trigger that measures gradients needs
    more than one ghost batch.

    Args:
        job: the job.
        ranks: the launched ranks.
        phases: first and last phase to train, from 1; None: all.
        replay: decisions to follow, if any.

    Raises:
        JobError: the job cannot be planned, or not be trained on these ranks.
    """
    if replay is not None:
        check_replay(job, job.name)
    elif ranks.elastic and job.trigger.trains_branches:
        fault = f"{job.trigger.name!r} does not run as an elastic job, whose ranks may change during a branch"
        raise JobError([Fault("trigger.name", f"{fault}; launch it on fixed ranks, or with --replay")], job.name)
    with faults_of(job.name):
        num_samples = known_num_samples(job.data)
    # From the written plan, a host discovery script reads how many ranks the elastic job can use.
    most_ranks = max(ranks.size, job.layout.max_ranks or 0) if ranks.elastic else ranks.size
    if ranks.restarts and phases is None:
        plan = _plan_for_any_ranks(job, ranks.size, num_samples)
        shown = replace(plan, job=job)  # the run keeps the job as the user wrote it
    else:
        compiled = measurable_plan if ranks.elastic else compile_plan
        shown = replace(compiled(job, most_ranks, num_samples), job=job)
        plan = _flexible_plan(job, ranks.size, num_samples) if ranks.elastic else shown
    if phases is not None:
        check_width(plan, phases, ranks.size)
        # The other jobs of the chain launch their own ranks.
        plan, shown = (replace(each, num_ranks=max(each.num_ranks, each.peak_ranks)) for each in (plan, shown))
        return plan, shown
    if plan.peak_ranks > ranks.size:
        fault = f"a phase is planned for {plan.peak_ranks} ranks, but the run has {counted(ranks.size, 'rank')}"
        raise JobError([Fault("layout.ranks_per_phase", f"{fault}; launch {plan.peak_ranks}")], job.name)
    try:
        check_wire_type(wire_type_of(job.update), ranks, exact=False)
    except ValueError as error:
        raise JobError([Fault("update.allreduce_dtype", str(error))], job.name) from None
    return plan, shown


def plan_to_write(plan: Plan, shown: Plan, ranks: Ranks) -> Plan:
    """Return the plan to write after decisions.

    Args:
        plan: for these ranks, with the decisions.
        shown: the plan to write without them, from `plan_for_ranks`.
        ranks: the launched ranks.
    """
    if ranks.elastic:
        written = measurable_plan(shown.job, shown.num_ranks, plan.num_samples, plan.decisions)
        return replace(written, job=shown.job)
    return replace(plan, job=shown.job)


def measurable_plan(job: Job, num_ranks: int, num_samples: int, decisions: Sequence[Decision] = ()) -> Plan:
    """Return the plan of a job; if its trigger needs two gradients and one rank has one, in smaller micro-batches.

    Raises:
        JobError: the job cannot be planned.
    """
    try:
        return compile_plan(job, num_ranks, num_samples, None, decisions)
    except JobError as error:
        ghost_batch, batch = job.model.ghost_batch, half_up(job.schedule.enlarged_batch)
        half = batch // 2 // ghost_batch * ghost_batch
        if [*error.faults] != [one_gradient(job, batch)] or half == 0:
            raise
    layout = job.layout.model_copy(update={"max_micro_batch": half})
    return compile_plan(job.model_copy(update={"layout": layout}), num_ranks, num_samples, None, decisions)


def _plan_for_any_ranks(job: Job, num_ranks: int, num_samples: int) -> Plan:
    """Return the plan of the job's layout if these ranks can train it; otherwise one in which shares may be unequal.

    Phases with fewer ghost batches than ranks leave the other ranks idle.

    Raises:
        JobError: the job cannot be planned on any number of ranks.
    """
    for compiled in (compile_plan, _flexible_plan):
        try:
            plan = compiled(job, num_ranks, num_samples)
        except JobError as error:
            # Gradients cannot be measured in one micro-batch on one rank: `layout.max_micro_batch`.
            if {path for fault in error.faults if (path := fault.path).startswith("layout.")} - {
                "layout.max_micro_batch"
            }:
                raise  # also a fault on any other number of ranks
        else:
            if plan.peak_ranks <= num_ranks:
                return plan
    stages, _ = compile_stages(job, make_start(job, num_samples))
    usable = [min(num_ranks, stage.global_batch // job.model.ghost_batch) for stage in stages]
    if job.is_adaptive or min(usable) == num_ranks:  # later batches of an adaptive schedule are not known
        return _flexible_plan(job, min(usable), num_samples)
    layout = _for_any_ranks(job).layout.grown_by("ranks", ranks_per_phase=tuple(usable))
    return compile_plan(job.model_copy(update={"layout": layout}), num_ranks, num_samples)


def _flexible_plan(job: Job, num_ranks: int, num_samples: int) -> Plan:
    """Return the plan of `_for_any_ranks`."""
    return measurable_plan(_for_any_ranks(job), num_ranks, num_samples)


def _for_any_ranks(job: Job) -> Job:
    """Return the job with a layout for any number of ranks: all of them train, and their shares may be unequal."""
    return job.model_copy(update={"layout": job.layout.grown_by("accumulation", uneven_ranks=True)})
