"""Warn before the run if a batch that should grow cannot, and suggest values that let it grow."""

from __future__ import annotations

import math
from collections.abc import Sequence

from hvd_batchgrow.config import Job
from hvd_batchgrow.schedule.phases import Phase
from hvd_batchgrow.schedule.policy import policy_of
from hvd_batchgrow.schedule.stages import Start
from hvd_batchgrow.schedule.trigger import WindowTrigger


def growth_notes(job: Job, start: Start, phases: Sequence[Phase]) -> list[str]:
    """Return why the batch never grows, or not even once by the requested factor; empty if it does.

    Args:
        job: the job.
        start: its start.
        phases: its compiled phases, before any decision of a trigger.
    """
    policy = policy_of(job)
    if job.is_adaptive:
        return _adaptive_notes(job, job.trigger, start) if isinstance(job.trigger, WindowTrigger) else []
    if policy.states_batches:
        return []
    batches = [phase.global_batch for phase in phases if phase.num_updates]
    if len(batches) < 2:
        why = policy.no_growth() or "no boundary comes before the end of the run; lower its epochs, or train for longer"
        return [f"the batch never grows: {why}"]
    wanted = next((phase.wanted_batch for phase in phases[1:] if phase.wanted_batch > batches[0]), float(batches[0]))
    if max(batches) > batches[0]:
        # The plan shows cut batches. A batch that does not even double probably has a limit for another data set.
        return _cut_note(job, start, wanted, "boundary") if max(batches) < 2 * batches[0] else []
    decays = "the learning rate decays instead at every boundary"
    instead = f", and {_unless_rule(job, decays)}" if wanted > batches[0] else ""
    return [f"the batch never grows{instead}: {_why(job, start, wanted)}"]


def _adaptive_notes(job: Job, trigger: WindowTrigger, start: Start) -> list[str]:
    wanted = _wanted_first(start, trigger.factor)
    if why := trigger.no_growth(job):
        return [f"the batch never grows: the {job.schedule.epochs:g} epochs end before the first decision, by {why}"]
    if start.max_batch is None or start.max_batch >= start.global_batch + start.batch_unit:
        return _cut_note(job, start, wanted, "decision") if trigger.lowers_noise else []
    effect = (
        "every decision of the trigger lowers the learning rate instead"
        if trigger.lowers_noise
        else f"no decision of the trigger {trigger.name!r} is possible"
    )
    return [f"the batch never grows, and {effect}: {_why(job, start, wanted)}"]


def _wanted_first(start: Start, factor: float) -> float:
    """Return the batch, in samples, that divides the noise scale by a factor; N if it overflows."""
    most = float(start.noise.num_samples)
    try:
        return min(start.noise.batch_for(start.first_noise / factor, start.momentum, start.lr), most)
    except ArithmeticError:
        return most


def _cut_note(job: Job, start: Start, wanted: float, when: str) -> list[str]:
    """Return a note if the limit cuts the first growth."""
    cap = start.max_batch
    if cap is None or wanted <= cap + start.batch_unit / 2:
        return []
    decays = _unless_rule(job, "the learning rate decays by the remaining factor")
    limit = f"{_limit(job, start)}{_remedy(job, start, wanted)}"
    return [f"the first {when} requests a batch of {wanted:.6g}: it grows to at most {cap}, and {decays}: {limit}"]


def _unless_rule(job: Job, decays: str) -> str:
    """Return what the learning rate does if the batch cannot grow as requested."""
    if job.schedule.rule == "none":
        return decays
    return f"with schedule.lr_rule = {job.schedule.rule!r} the learning rate does not decay instead"


def _why(job: Job, start: Start, wanted: float) -> str:
    policy, first, unit = policy_of(job), start.global_batch, start.batch_unit
    if why := policy.no_growth():
        return why
    if start.max_batch is not None and start.max_batch < first + unit:
        return f"{_limit(job, start)}{_remedy(job, start, wanted)}"
    if wanted <= first:
        return f"schedule.{policy.factor_key} does not enlarge the batch"
    remedy = "use a larger factor" if unit == job.model.ghost_batch else "use a smaller schedule.batch_multiple"
    return f"the requested {wanted:.6g} is rounded to {first}, a whole multiple of {unit}; {remedy}"


def _limit(job: Job, start: Start) -> str:
    given = job.schedule.stated_limit
    shown = f"{given!r} = {start.max_batch}" if isinstance(given, str) else f"{given}"
    return f"schedule.max_batch = {shown}, with a first batch of {start.global_batch}"


def _remedy(job: Job, start: Start, wanted: float) -> str:
    """Suggest a first batch or a limit that allows the requested first growth."""
    assert start.max_batch is not None
    unit, factor = start.batch_unit, wanted / start.global_batch
    first = start.wanted_batch or start.global_batch  # before the limit, which a larger max_batch lifts
    if factor <= 1:  # such as the policy late, which grows to its limit
        return f"; for growth use max_batch > {first:.6g}"
    lower = int(start.max_batch / factor / first * job.schedule.first_batch / unit) * unit
    least = math.ceil(factor * first / unit - 1e-9) * unit
    ways = [f"global_batch <= {lower}"] if lower else []
    ways += [f"max_batch >= {least}"] if least < start.noise.num_samples else []
    return f"; for growth use {', or '.join(ways)}" if ways else "; the training set is too small for its growth"
