"""`name = "branch"`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field, NonNegativeInt

from hvd_batchgrow.config import Job
from hvd_batchgrow.config.optim import AdamSection
from hvd_batchgrow.config.schedules import LrRule
from hvd_batchgrow.config.types import PositiveFloat, PositiveInt, tuples
from hvd_batchgrow.messages.errors import Fault
from hvd_batchgrow.messages.wording import counted
from hvd_batchgrow.schedule.adaptive.batch_requests import BatchRequest
from hvd_batchgrow.schedule.adaptive.decisions import Decision
from hvd_batchgrow.schedule.branches import DEFAULT_BLOCKS, LEAST_BLOCKS, BranchLrRule, BranchRequest, held_decay_fault
from hvd_batchgrow.schedule.rounding import decimal, period_ends, periods_done, samples_at
from hvd_batchgrow.schedule.stages import Start, make_start
from hvd_batchgrow.schedule.trigger import TRIGGERS, Measurement, RuleState, Trigger, TriggerRule

_MOST_BUDGET = 0.1


class BranchState(RuleState):
    """What the branches have cost, and the round that is due."""

    round_at: NonNegativeInt | None = None
    """Sample counter at which branches are to be trained before the next update; None: no round is due."""
    spent_samples: NonNegativeInt = 0
    """Samples of all branches of the rounds so far."""
    over_budget_at: NonNegativeInt | None = None
    """Sample counter of the first round that did not fit the budget."""


@TRIGGERS.add
class BranchTrigger(Trigger):
    """Grow to the critical batch, which branches of the run measure: see `schedule.branches`."""

    name: Literal["branch"]
    every_epochs: PositiveFloat = 1.0
    """Epochs between two rounds of branches."""
    first_decision_epoch: Annotated[float, Field(ge=0)] | None = None
    """Earliest epoch of a round. None: the end of the warm-up."""
    factors: Annotated[tuple[PositiveInt, ...], BeforeValidator(tuples)] = (1, 2, 4)
    """Batches of the branches, as multiples of the run's; 1 must be among them. A factor above `max_batch` is not
    trained."""
    branch_samples: PositiveInt | None = None
    """Samples of each branch, rounded up to at least 16 whole blocks: B times the least common multiple of the factors.
    None: 32 blocks."""
    tolerance: PositiveFloat | None = None
    """A larger batch is not worse if the 95 % interval of its loss difference is below this number. None: if the
    interval is not entirely above 0."""
    budget: Annotated[float, Field(gt=0, le=_MOST_BUDGET)] = _MOST_BUDGET
    """Largest share of the run's samples that all branches together may use; at most 0.1."""

    trains_branches: ClassVar[bool] = True
    state_model: ClassVar[type[RuleState]] = BranchState
    keeps_state: ClassVar[bool] = True  # the samples of branches count towards a changed budget too

    def make(self, job: Job, num_samples: int) -> BranchRule:
        return BranchRule(self, job, num_samples)

    def faults(self, job: Job, num_samples: int) -> list[Fault]:
        found = [*self._factor_faults(), *_lr_rule_faults(job)]
        if fault := held_decay_fault(job.optim):
            found.append(fault)
        return found

    def _factor_faults(self) -> Iterator[Fault]:
        if 1 not in self.factors or len({*self.factors}) != len(self.factors) or len(self.factors) < 2:
            fault = f"must be distinct whole numbers >= 1, including 1 (the run's batch), got {list(self.factors)}"
            yield Fault("trigger.factors", f"{fault}; for example [1, 2, 4]")

    def batch_faults(self, job: Job, start: Start) -> list[Fault]:
        """Return a fault unless the budget allows a round at the first batch, whose growth is possible."""
        if [*self._factor_faults()]:
            return []
        limit, least = _limit(start), sorted(self.factors)[1]
        wanted = self.request(start.global_batch, limit, "none")
        if wanted is None:
            fault = f"{list(self.factors)}: the smallest growth, {least} × {start.global_batch}, is above the limit of "
            fault += f"{limit} (schedule.max_batch): the batch would never grow"
            near = f"a first batch of at most {limit // least}" if limit // least else "a larger training set"
            return [Fault("trigger.factors", f"{fault}; use {near}")]
        return [
            *self._size_faults(start.global_batch, wanted),
            *self._budget_faults(job, start, wanted),
            *self._time_faults(job, start, wanted),
        ]

    def _size_faults(self, batch: int, wanted: BranchRequest) -> Iterator[Fault]:
        asked = self.branch_samples
        if asked is not None and asked <= (LEAST_BLOCKS - 1) * wanted.block:
            blocks = (
                f"{counted(-(-asked // wanted.block), 'block')} of {wanted.block:,} samples, too few for an interval"
            )
            least = f"use >= {(LEAST_BLOCKS - 1) * wanted.block + 1}, or smaller factors"
            yield Fault("trigger.branch_samples", f"{asked:,} make {blocks} at the first batch, {batch}; {least}")

    def _budget_faults(self, job: Job, start: Start, wanted: BranchRequest) -> Iterator[Fault]:
        num_samples, cost = start.noise.num_samples, wanted.total_samples
        run = samples_at(job.schedule.epochs, num_samples)
        if cost <= _share(self.budget, run):
            return
        branches = f"{len(wanted.factors)} branches of {wanted.num_samples:,} samples"
        fault = f"{self.budget:g} of the run's {run:,} samples are {_share(self.budget, run):,}, and a round at the "
        fault += f"first batch, {start.global_batch}, takes {cost:,}: {branches}"
        ways = [*self._cheaper(start.global_batch, run, wanted)]
        ways.append(f"schedule.epochs >= {math.ceil(1000 * cost / self.budget / num_samples) / 1000:g}")
        yield Fault("trigger.budget", f"{fault}; nearest: {', or '.join(ways)}")

    def _time_faults(self, job: Job, start: Start, wanted: BranchRequest) -> Iterator[Fault]:
        """Yield a fault if the first round, which follows a whole update, is too late for its branches."""
        num_samples, batch = start.noise.num_samples, start.global_batch
        first, end = self.first_round_epoch(job), samples_at(job.schedule.epochs, num_samples)
        at, last = -(-samples_at(first, num_samples) // batch) * batch, (end - wanted.num_samples) // batch * batch
        if at <= last or last <= 0:  # a run that is so short has no budget for a round
            return
        num_periods = periods_done(last, self.every_epochs, num_samples)
        if num_periods == 0:
            key, value, most = "trigger.every_epochs", self.every_epochs, math.floor(1000 * last / num_samples) / 1000
        else:
            key = "schedule.warmup_epochs" if self.first_decision_epoch is None else "trigger.first_decision_epoch"
            value, most = self.earliest_epoch(job), float(num_periods * decimal(self.every_epochs))
        fault = f"the first round is at epoch {first:g}, and its branches train on {wanted.num_samples:,} samples"
        yield Fault(key, f"{value:g}: {fault}, but only {max(0, end - at):,} are left; use <= {most:g}")

    def _cheaper(self, batch: int, run: int, wanted: BranchRequest) -> Iterator[str]:
        """Yield values of other keys with which a round fits the budget."""
        share = math.ceil(1000 * wanted.total_samples / run) / 1000
        if share <= _MOST_BUDGET:
            yield f"{share:g}"
        allowed = _share(self.budget, run)
        blocks = allowed // (len(wanted.factors) * wanted.block)
        if blocks >= LEAST_BLOCKS:
            yield f"branch_samples = {blocks * wanted.block}"
        least = LEAST_BLOCKS * 2 * batch
        if wanted.factors != (1, 2) and blocks < LEAST_BLOCKS and 2 * least <= allowed:
            yield f"factors = [1, 2] with branch_samples = {least}"

    def first_round_epoch(self, job: Job) -> float:
        """Return the epoch of the first round: the first multiple of `every_epochs` that may have one."""
        earliest = decimal(self.earliest_epoch(job))
        every = decimal(self.every_epochs)
        return float(max(1, math.ceil(earliest / every)) * every)

    def earliest_epoch(self, job: Job) -> float:
        """Return the epoch before which no branches are trained."""
        return job.schedule.warmup_epochs if self.first_decision_epoch is None else self.first_decision_epoch

    def request(self, batch: int, limit: int, lr_rule: BranchLrRule) -> BranchRequest | None:
        """Return the branches of a round at a batch; None: no larger one is possible.

        Args:
            batch: B, samples.
            limit: the largest possible batch, samples.
            lr_rule: what their learning rates follow.
        """
        factors = tuple(factor for factor in sorted(self.factors) if factor * batch <= limit)
        if len(factors) < 2:
            return None
        block = math.lcm(*factors) * batch
        blocks = DEFAULT_BLOCKS if self.branch_samples is None else -(-self.branch_samples // block)
        return BranchRequest(factors, lr_rule, block, max(LEAST_BLOCKS, blocks) * block)

    def notes(self, job: Job, start: Start) -> list[str]:
        """Return what a round costs, and how many the budget allows, at the first batch."""
        num_samples, batch = start.noise.num_samples, start.global_batch
        wanted = self.request(batch, _limit(start), branch_lr_rule(job) or "none")
        if wanted is None:
            return []
        allowed = _share(self.budget, samples_at(job.schedule.epochs, num_samples))
        updates = [wanted.num_samples // (factor * batch) for factor in wanted.factors]
        cost = f"{len(updates)} branches of {wanted.num_samples:,} samples take {' + '.join(map(str, updates))} updates"
        rounds = allowed // wanted.total_samples
        found = [
            f"trigger 'branch': at the first batch, {cost} per round, and the budget of {self.budget:g} = {allowed:,} "
            f"samples allows {rounds} round{'s' * (rounds != 1)}; a round at a larger batch takes more samples"
        ]
        if job.schedule.rule == "none":
            lower = "schedule.lr_rule = 'none': a branch with a larger batch has less noise, which lowers its loss at"
            found.append(f"{lower} once, as a decay of the learning rate would; 'linear' keeps the noise scale of SGD")
        return found


class BranchRule(TriggerRule):
    """Says when branches are trained, and requests the critical batch that they show.

    Every decision is a function of the sample counter, the batch and the samples of earlier rounds, so all ranks agree.

    Args:
        section: the job's section.
        job: the job.
        num_samples: N.
    """

    state: BranchState

    def __init__(self, section: BranchTrigger, job: Job, num_samples: int) -> None:
        self._section, self._num_samples = section, num_samples
        self._limit = _limit(make_start(job, num_samples))
        self._lr_rule: BranchLrRule = branch_lr_rule(job) or "none"
        self._first = samples_at(section.earliest_epoch(job), num_samples)
        self._end = samples_at(job.schedule.epochs, num_samples)
        self.allowed_samples = _share(section.budget, self._end)
        """Most samples of all branches together."""
        self.state = BranchState()

    @property
    def tolerance(self) -> float | None:
        """The largest difference of a batch that is not worse."""
        return self._section.tolerance

    def request(self, batch: int) -> BranchRequest | None:
        """Return the branches of a round at a batch; None: no larger one is possible."""
        return self._section.request(batch, self._limit, self._lr_rule)

    def plan_round(self, before: int, samples: int, batch: int) -> bool:
        """After an update, note whether branches are trained before the next one, and return it.

        Args:
            before: sample counter before the update.
            samples: sample counter after it.
            batch: B of the next update.
        """
        if samples < self._first or not period_ends(before, samples, self._section.every_epochs, self._num_samples):
            return False
        if self.fits(samples, batch):
            self.state.round_at = samples
            return True
        wanted = self.request(batch)
        if wanted and samples + wanted.num_samples <= self._end and self.state.over_budget_at is None:
            self.state.over_budget_at = samples
        return False

    def fits(self, samples: int, batch: int) -> bool:
        """Return whether a round is possible: a larger batch, and enough of the run and of the budget."""
        wanted = self.request(batch)
        if wanted is None or samples + wanted.num_samples > self._end:
            return False
        return self.state.spent_samples + wanted.total_samples <= self.allowed_samples

    def end_round(self, batch: int) -> None:
        """Count the branches of a round, trained now or before the run resumed, at a batch of B samples."""
        wanted = self.request(batch)
        assert wanted is not None
        self.state.round_at = None
        self.state.spent_samples += wanted.total_samples

    def over_budget(self, batch: int) -> str:
        """Return why no round is trained at a batch, in words."""
        wanted, spent = self.request(batch), self.state.spent_samples
        assert wanted is not None
        left = f"{self.allowed_samples - spent:,} of {self.allowed_samples:,} samples of the budget are left"
        branches = f"{len(wanted.factors)} branches of {wanted.num_samples:,} samples at the batch {batch:,}"
        stays = f"the batch stays {batch:,} for the rest of the run"
        return f"no branches: {left}, and {branches} take {wanted.total_samples:,}; {stays}"

    def look(self, now: Measurement) -> BatchRequest | None:
        """Return a request for the critical batch if branches have shown one above the current batch."""
        critical = now.branches.get("critical_batch", 0.0)
        if critical <= now.global_batch:
            return None
        return BatchRequest(now.branches_text, batch=critical, most=critical)

    def decided(self, decision: Decision) -> None:
        """Do nothing: the next round follows the sample counter."""


def branch_lr_rule(job: Job) -> BranchLrRule | None:
    """Return the rule of branches whose learning rate follows `schedule.lr_rule`; None: no branch can follow it.

    For Adam, branches with sqrt also change β₁, β₂ and eps, as "adam" does and "sqrt" does not.
    """
    rules: dict[LrRule, BranchLrRule] = {"none": "none", "linear": "linear", "sqrt": "sqrt"}
    if isinstance(job.optim, AdamSection):
        rules = {"none": "none", "linear": "linear", "adam": "sqrt"}
    return rules.get(job.schedule.rule)


def _lr_rule_faults(job: Job) -> Iterator[Fault]:
    if not isinstance(job.optim, AdamSection):  # only Adam has a rule that no branch follows; another fault says so
        return
    if branch_lr_rule(job) is None and job.schedule.rule in {"sqrt", "adam_linear"}:
        fault = f"{job.schedule.rule!r} is not possible with the trigger 'branch': no branch is trained with that rule"
        yield Fault("schedule.lr_rule", f"{fault}; for {job.optim.name!r} use 'adam', 'linear' or 'none'")


def _limit(start: Start) -> int:
    """Return the largest batch that a decision may form, as `form_decision` limits it."""
    return start.max_batch or start.noise.num_samples // 2


def _share(budget: float, samples: int) -> int:
    """Return the largest whole number of samples within a share."""
    return math.floor(decimal(budget) * samples)
