"""Branches of a run: short runs from one of its checkpoints, with larger batches, over the same samples.

Source: Merrill et al. 2025 (arXiv 2505.23971), who train branches to find the largest batch that is not worse. Their
branches read different data; these read the same samples in the same order.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from hvd_batchgrow.config import GradientNoiseSection, Job
from hvd_batchgrow.config.optim import AdamSection, OptimBase
from hvd_batchgrow.messages.errors import Fault, JobError
from hvd_batchgrow.messages.wording import counted
from hvd_batchgrow.schedule.phases import Phase, Schedule
from hvd_batchgrow.schedule.plan import Plan, compile_plan
from hvd_batchgrow.schedule.policies.steps import StepsSchedule
from hvd_batchgrow.schedule.triggers.none import NoTrigger

BranchLrRule = Literal["none", "sqrt", "linear"]
_FOLDER = re.compile(r"at-(\d{1,18})-for-(\d{1,18})-(none|sqrt|linear)")
_POWER: dict[BranchLrRule, float] = {"none": 0.0, "sqrt": 0.5, "linear": 1.0}
LEAST_BLOCKS = 16
"""Fewest blocks of a comparison, whose second half counts."""
DEFAULT_BLOCKS = 32


@dataclass(frozen=True)
class BranchPoint:
    """A checkpoint of a run, and the update that follows it."""

    job: Job
    """The run's."""
    num_samples: int
    """N."""
    samples: int
    """Sample counter of the checkpoint."""
    phase: Phase
    """Batch, learning rate, momentum and weight decay of the run's next update."""
    history: tuple[tuple[int, int], ...]
    """Sample counters with the run's batch from there on, up to the checkpoint."""

    @property
    def global_batch(self) -> int:
        """B: samples of the run's next update."""
        return self.phase.global_batch

    @property
    def default_lr_rule(self) -> BranchLrRule:
        """sqrt for Adam (Malladi et al. 2022, arXiv 2205.10287), linear for SGD and LARS (Goyal et al. 2017)."""
        return "sqrt" if isinstance(self.job.optim, AdamSection) else "linear"


@dataclass(frozen=True)
class BranchRequest:
    """Which branches are compared, and over how many samples."""

    factors: tuple[int, ...]
    """k, ascending, the first 1."""
    lr_rule: BranchLrRule
    block: int
    """Samples after which every branch has done whole updates: the least common multiple of the factors, times B."""
    num_samples: int
    """Δ: samples that every branch trains on, a whole number of blocks."""

    @property
    def total_samples(self) -> int:
        """Samples of all branches together."""
        return len(self.factors) * self.num_samples


def branches_folder(samples: int, num_samples: int, lr_rule: str) -> str:
    """Return the name of the folder of branches: their checkpoint, samples of each, and learning-rate rule."""
    return f"at-{samples}-for-{num_samples}-{lr_rule}"


def parse_branches_folder(name: str) -> tuple[int, int, str] | None:
    """Invert `branches_folder`; None: it is not such a name."""
    found = _FOLDER.fullmatch(name)
    return (int(found[1]), int(found[2]), found[3]) if found else None


def branch_point(job: Job, decisions: Sequence[Any], num_samples: int, samples: int) -> BranchPoint:
    """Return where a run is at one of its checkpoints.

    Args:
        job: the run's.
        decisions: those of its trigger, if it has one; later ones do not count.
        num_samples: N.
        samples: sample counter of the checkpoint.

    Raises:
        JobError: the run ends there, or no update starts there.
    """
    made = tuple(decision for decision in decisions if decision.samples <= samples)
    # The layout does not matter here, and one rank can form every batch.
    schedule = compile_plan(with_layout(job, ()), 1, num_samples, None, made).schedule
    if samples >= schedule.end_samples:
        fault = f"{samples:,} is the end of the run, where no update follows; use an earlier checkpoint"
        raise JobError([Fault("--at", fault)], job.name)
    phase = schedule.at(samples)
    if (samples - phase.start_samples) % phase.global_batch:
        fault = f"no update of {phase.global_batch} starts at sample {samples:,}: the checkpoint is of another schedule"
        raise JobError([Fault("--at", fault)], job.name)
    return BranchPoint(job, num_samples, samples, phase, tuple(_history(schedule, samples)))


def _history(schedule: Schedule, samples: int) -> Iterator[tuple[int, int]]:
    last = 0
    for phase in schedule.phases:
        if phase.num_updates and phase.start_samples < samples and phase.global_batch != last:
            last = phase.global_batch
            yield phase.start_samples, last


def branch_request(
    point: BranchPoint, factors: Sequence[int], samples: int | None, lr_rule: BranchLrRule | None
) -> BranchRequest:
    """Return what to compare.

    Args:
        point: of the run.
        factors: in any order.
        samples: requested number of samples, rounded up to whole blocks. None: half an epoch, at least 32 blocks.
        lr_rule: None: `BranchPoint.default_lr_rule`.

    Raises:
        JobError: a factor is below 1 or repeated, 1 is missing, or the samples are less than 16 blocks.
    """
    wrong = [factor for factor in factors if factor < 1]
    if wrong or 1 not in factors or len({*factors}) != len(factors) or len(factors) < 2:
        fault = f"must be distinct whole numbers >= 1, including 1 (the run's batch), got {','.join(map(str, factors))}"
        raise JobError([Fault("--factors", f"{fault}; for example 1,2,4,8")], "command line")
    block = math.lcm(*factors) * point.global_batch
    wanted = max(-(-point.num_samples // 2), DEFAULT_BLOCKS * block) if samples is None else samples
    num_blocks = -(-wanted // block)
    if num_blocks < LEAST_BLOCKS:
        fault = f"{wanted:,} make {counted(num_blocks, 'block')} of {block:,} samples, too few for an interval"
        remedy = f"use >= {LEAST_BLOCKS * block:,}, or smaller factors"
        raise JobError([Fault("--samples", f"{fault}; {remedy}")], "command line")
    return BranchRequest(tuple(sorted(factors)), lr_rule or point.default_lr_rule, block, num_blocks * block)


def branch_job(point: BranchPoint, wanted: BranchRequest, factor: int, ranks: int) -> Job:
    """Return the job of a branch: the run's batches up to the checkpoint, then B k at a constant learning rate ε f(k).

    The job differs from the run's in the schedule and the optimizer's settings. It logs every update, evaluates at its
    end, and skips updates that are not finite, so that a branch that diverges can be compared.

    Args:
        point: of the run.
        wanted: of `branch_request`.
        factor: k.
        ranks: number of ranks that train it.

    Raises:
        JobError: weight decay per epoch cannot be held.
    """
    job, start = point.job, point.samples
    epochs = (start + wanted.num_samples) / point.num_samples
    steps = [*point.history, (start, factor * point.global_batch)]
    schedule = StepsSchedule(
        policy="steps", epochs=epochs, batch_steps=" ".join(f"{at}:{batch}" for at, batch in steps)
    )
    changes = {
        "name": f"k{factor}",
        "optim": _optim(job.optim, point.phase, factor, wanted.lr_rule),
        "schedule": schedule,
        "trigger": NoTrigger(name="none"),
        "gradient_noise": GradientNoiseSection(),
        "update": job.update.model_copy(update={"on_nonfinite": "skip"}),
        "evaluation": job.evaluation.model_copy(update={"every_epochs": 2 * epochs}),
        "checkpoint": job.checkpoint.model_copy(update={"keep": 1, "keep_best": None}),
        "logging": job.logging.model_copy(
            update={"logs_per_epoch": point.num_samples, "tensorboard": False, "observers": ()}
        ),
    }
    # Phases that the run has trained on other ranks need not be formable on these.
    return with_layout(job, (1,) * len(point.history) + (ranks,)).model_copy(update=changes)


def with_layout(job: Job, ranks_per_phase: tuple[int, ...]) -> Job:
    """Return a job with these ranks; without any, its batches grow by accumulation."""
    if not ranks_per_phase:
        return job.model_copy(update={"layout": job.layout.grown_by("accumulation")})
    layout = job.layout.grown_by("ranks", ranks_per_phase=ranks_per_phase, max_ranks=None)
    return job.model_copy(update={"layout": layout})


def plan_branch(point: BranchPoint, wanted: BranchRequest, factor: int, ranks: int) -> Plan:
    """Return the plan of a branch.

    Raises:
        JobError: the ranks cannot form the batch; the message has the nearest valid values.
    """
    try:
        return compile_plan(branch_job(point, wanted, factor, ranks), ranks, point.num_samples)
    except JobError as error:
        batch = f"{factor} · {point.global_batch}"
        faults = [
            Fault("--factors", f"{batch}: {fault.message}") if fault.path.startswith(_OF_BATCH) else fault
            for fault in error.faults
        ]
        raise JobError(faults, "command line") from None


def only_branch(plan: Plan) -> Plan:
    """Return the plan of a branch without the phases that the run has trained."""
    schedule = replace(plan.schedule, phases=plan.schedule.phases[-1:])
    return replace(plan, schedule=schedule, layouts=plan.layouts[-1:])


_OF_BATCH = ("schedule.batch_steps", "phase ")
"""Where the faults of a branch's batch are, which the command line states by --factors."""


def lr_text(point: BranchPoint, rule: BranchLrRule) -> str:
    """Return how the learning rate of a branch follows its batch."""
    scaled = {"none": "ε", "sqrt": "ε √k", "linear": "ε k"}[rule]
    others = ", with β₁ᵏ, β₂ᵏ and eps/√k" if rule == "sqrt" and isinstance(point.job.optim, AdamSection) else ""
    return f"{scaled}{others} (--lr-rule {rule})"


def _optim(optim: OptimBase, phase: Phase, factor: int, rule: BranchLrRule) -> OptimBase:
    """Return the optimizer's section of a branch, in which everything that the schedule sets is constant."""
    scale = factor ** _POWER[rule]
    lr = phase.lr * scale
    changed = _held_weight_decay(optim, phase, factor / scale)
    if not isinstance(changed, AdamSection):
        return changed.starting_at(lr, phase.momentum)
    beta2 = changed.betas[1] if phase.beta2 is None else phase.beta2
    eps = changed.eps if phase.eps is None else phase.eps
    kappa = factor if rule == "sqrt" else 1  # as lr_rule = "adam"
    betas = (phase.momentum**kappa, beta2**kappa)
    return changed.model_copy(update={"lr": lr, "betas": betas, "eps": eps / kappa**0.5})


def held_decay_fault(optim: OptimBase) -> Fault | None:
    """Return the fault of weight decay that branches cannot hold per epoch; None: they can."""
    if optim.weight_decay_rule == "per_update" or not any(group.weight_decay for group in optim.groups):
        return None
    fault = "'per_epoch' with a weight decay in optim.groups is not possible in branches"
    return Fault("optim.weight_decay_rule", f"{fault}: it changes settings that a fork must keep")


def _held_weight_decay(optim: OptimBase, phase: Phase, growth: float) -> OptimBase:
    """Return the section with the weight decay of a phase; per_epoch: scaled, so that the branch keeps λ ε / B."""
    if optim.weight_decay_rule == "per_update":
        return optim
    if fault := held_decay_fault(optim):
        raise JobError([fault])
    factor = 1.0 if phase.weight_decay_factor is None else phase.weight_decay_factor
    changes = {"weight_decay_rule": "per_update", "weight_decay": optim.weight_decay * factor * growth}
    return optim.model_copy(update=changes)
