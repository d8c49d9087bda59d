"""The updates of a plan, and each rank's share of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from hvd_batchgrow.data.datasets.dataset import Ids
from hvd_batchgrow.data.order.stream import Stream, micro_batches_of_rank
from hvd_batchgrow.job_file import parse_job
from hvd_batchgrow.messages.errors import Fault, JobError
from hvd_batchgrow.messages.wording import counted, shown
from hvd_batchgrow.nn.keyed_random import sample_keys
from hvd_batchgrow.schedule.phases import Phase, Schedule
from hvd_batchgrow.schedule.plan import Plan, compile_plan
from hvd_batchgrow.train.update.forward import MicroBatch

_IN_GROUPS = "set it in the parameter groups of your optimizer"
_SET_ELSEWHERE = {
    "lr": "give plan_updates(…, lr=…)",
    "momentum": "give plan_updates(…, momentum=…), or betas for Adam",
    "nesterov": "set it in your optimizer",
    "trust_coefficient": "set it in your optimizer",
    "decay_norm_and_bias": f"{_IN_GROUPS}: weight_decay of each",
    "groups": f"{_IN_GROUPS}: lr and weight_decay of each",
    "layer_decay": f"{_IN_GROUPS}: lr of each",
}
"""Keys of `[optim]` that do not affect a plan, and where to set them."""


@dataclass(frozen=True)
class PlannedMicroBatch:
    """The samples of one micro-batch of this rank."""

    slots: tuple[int, ...]
    """Position of each of its ghost batches in the update."""
    epochs: Ids
    """(k·γ,) epoch of each sample."""
    ids: Ids
    """(k·γ,) sample ids."""
    keys: Tensor
    """(k·γ,) keys for keyed dropout, see `sample_keys`."""

    def micro_batch(self, inputs: Any, targets: Any) -> MicroBatch:
        """Return a micro-batch for `UpdateEngine.update`; the rows must be in the order of `ids`."""
        return MicroBatch(inputs, targets, self.slots, keys=self.keys)


@dataclass(frozen=True)
class Update:
    """One update, and this rank's share of it."""

    samples: int
    """Sample counter before the update."""
    phase: Phase
    """Learning rate, momentum and batch."""
    num_ghost_batches: int
    """Number of ghost batches of the whole update, B/γ."""
    micro_batches: tuple[PlannedMicroBatch, ...]
    """Those of this rank."""


def plan_updates(
    schedule: Mapping[str, Any],
    *,
    lr: float,
    momentum: float | None = None,
    num_samples: int,
    ghost_batch: int,
    optim: Mapping[str, Any] | None = None,
    num_ranks: int = 1,
    max_micro_batch: int | None = None,
    exact: bool = False,
    uneven_ranks: bool = False,
) -> Plan:
    """Compile a schedule for a custom training loop.

    Args:
        schedule: keys of `[schedule]` in a job file, with any policy but adaptive, whose triggers decide in a run.
        lr: initial learning rate ε.
        momentum: initial momentum m; None: β₁ of `optim`.
        num_samples: N, the size of the training set.
        ghost_batch: γ, the number of samples of a ghost batch.
        optim: other keys of `[optim]`, for policies and rules that depend on the optimizer: "name", and for Adam
            "betas" (instead of `momentum`) and "eps"; "weight_decay" with "weight_decay_rule"; "rescale_momentum" for
            `PlanLR`. None: SGD.
        num_ranks: R.
        max_micro_batch: largest number of samples of a micro-batch; None: the default of a job file.
        exact: use one ghost batch per micro-batch, as an exact engine requires.
        uneven_ranks: allow ranks to have different numbers of ghost batches.

    Raises:
        JobError: an argument is wrong, or the plan is impossible; the message has the arithmetic and the nearest valid
            value.
        ValueError: there is neither a momentum nor betas, or the policy is adaptive.
    """
    tables = ("schedule", schedule), ("optim", optim or {})
    if faults := [
        Fault(name, f"must be a dict of keys and values, got {shown(table)}")
        for name, table in tables
        if not isinstance(table, Mapping)
    ]:
        raise JobError(faults, "plan_updates")
    if schedule.get("policy") == "adaptive":
        fault = "plan_updates plans all updates in advance, and the triggers of policy = 'adaptive' decide during a run"
        raise ValueError(f"{fault}: use another policy, such as 'grow', or train the job with hvd-batchgrow train")
    given = {"name": "sgd", **(optim or {})}
    if unused := [key for key in given if key in _SET_ELSEWHERE]:
        faults = [Fault(f"optim.{key}", f"has no effect on a plan; {_SET_ELSEWHERE[key]}") for key in unused]
        raise JobError(faults, "plan_updates")
    if momentum is None and "betas" not in given:
        raise ValueError("the plan sets the momentum of your optimizer: give momentum, or betas of Adam in optim")
    layout = {"max_micro_batch": max_micro_batch, "exact": exact, "uneven_ranks": uneven_ranks}
    tree = {
        "name": "plan_updates",
        # Only the number of samples and the ghost batch affect the schedule.
        "data": {"source": "synthetic_rows", "shape": [1], "num_samples": num_samples},
        "model": {"name": "unused:network", "ghost_batch": ghost_batch},
        "optim": given | {"lr": lr} | ({} if momentum is None else {"momentum": momentum}),
        "schedule": dict(schedule),
        "layout": {key: value for key, value in layout.items() if value is not None},
    }
    return compile_plan(parse_job(tree, "plan_updates"), num_ranks, num_samples)


def updates(plan: Plan, seed: int, rank: int = 0, num_ranks: int = 1, *, start_samples: int = 0) -> Iterator[Update]:
    """Yield the updates of a plan from a sample counter to the end.

    Args:
        plan: compiled for these ranks.
        seed: determines the order of the samples.
        rank: this rank.
        num_ranks: R, as in the plan.
        start_samples: sample counter, between two updates, at which an earlier loop stopped.

    Raises:
        ValueError: the plan is for another number of ranks, there is no such rank, or `start_samples` is not an update
            boundary.
    """
    check_ranks(plan, rank, num_ranks)
    check_boundary(plan.schedule, start_samples)
    stream, samples, ghost_batch = Stream(plan.num_samples, seed), start_samples, plan.ghost_batch
    while samples < plan.schedule.end_samples:
        phase, layout = plan.schedule.at(samples), plan.layouts[plan.schedule.index_at(samples)]
        micro_batches = micro_batches_of_rank(
            samples, phase.global_batch, ghost_batch, layout.micro_batch, rank, num_ranks
        )
        share = tuple(_planned(stream, seed, samples, slots, ghost_batch) for slots in micro_batches)
        yield Update(samples, phase, phase.global_batch // ghost_batch, share)
        samples += phase.global_batch


def check_ranks(plan: Plan, rank: int, num_ranks: int) -> None:
    """Raise ValueError if a plan is for another number of ranks, or there is no such rank."""
    if any(layout.ranks != num_ranks for _, _, layout in plan.trained_phases):
        hint = f"use plan_updates(…, num_ranks={num_ranks})"
        raise ValueError(f"the plan is for {counted(plan.peak_ranks, 'rank')}, got {num_ranks}: {hint}")
    if not 0 <= rank < num_ranks:
        raise ValueError(f"rank = {rank} must be in 0 … {num_ranks - 1}")


def check_boundary(schedule: Schedule, samples: int) -> None:
    """Raise ValueError if a sample counter is outside the run or within an update; the end of the run is allowed."""
    if samples == schedule.end_samples:
        return
    phase = schedule.phases[schedule.index_at(samples)]
    if inside := (samples - phase.start_samples) % phase.global_batch:
        before = samples - inside
        raise ValueError(
            f"sample counter {samples} is within an update of this plan, whose batch is {phase.global_batch}; "
            f"nearest update boundaries: {before}, {before + phase.global_batch}"
        )


def _planned(stream: Stream, seed: int, samples: int, slots: tuple[int, ...], ghost_batch: int) -> PlannedMicroBatch:
    starts = samples + ghost_batch * np.array(slots)
    epochs, ids = stream.at((starts[:, None] + np.arange(ghost_batch)).reshape(-1))
    return PlannedMicroBatch(slots, epochs, ids, sample_keys(seed, epochs, ids))
