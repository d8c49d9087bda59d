"""Predict how long a run pauses for the branches of its trigger."""

from __future__ import annotations

import math

from hvd_batchgrow.messages.wording import short_time
from hvd_batchgrow.schedule.branches import branch_point, only_branch, plan_branch
from hvd_batchgrow.schedule.cost.cost import predict
from hvd_batchgrow.schedule.cost.cost_file import CostFile
from hvd_batchgrow.schedule.plan import Plan
from hvd_batchgrow.schedule.rounding import samples_at
from hvd_batchgrow.schedule.trigger import make_trigger
from hvd_batchgrow.schedule.triggers.branch import BranchRule, BranchTrigger


def round_notes(plan: Plan, figures: CostFile) -> list[str]:
    """Return how long the first round takes; empty if the job's trigger trains no branches.

    Raises:
        JobError: the figures do not fit the job.
    """
    trigger, batch = plan.job.trigger, plan.start.global_batch
    if not isinstance(trigger, BranchTrigger) or plan.decisions:
        return []
    rule = make_trigger(plan.job, plan.num_samples)
    assert isinstance(rule, BranchRule)
    wanted, first = rule.request(batch), samples_at(trigger.first_round_epoch(plan.job), plan.num_samples)
    assert wanted is not None  # otherwise the plan is an error
    point = branch_point(plan.job, (), plan.num_samples, math.ceil(first / batch) * batch)
    ranks = plan.layouts[0].ranks
    branches = [only_branch(plan_branch(point, wanted, factor, ranks)) for factor in wanted.factors]
    seconds = math.fsum(predict(branch, figures).seconds for branch in branches)
    return [f"trigger 'branch': a round at the first batch takes {short_time(seconds)}, without its start-up"]
