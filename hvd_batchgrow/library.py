"""The parts for a training loop of your own, under one name: docs/library.md."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from hvd_batchgrow.comm.backend import connect
from hvd_batchgrow.comm.ranks import Ranks, SingleRank
from hvd_batchgrow.config import UpdateSection
from hvd_batchgrow.data.datasets.dataset import ArrayDataset, DatasetPair, Ids
from hvd_batchgrow.data.order.stream import Stream, passes_of_rank
from hvd_batchgrow.job_file import parse_job
from hvd_batchgrow.nn.dropout import KeyedDropout, convert_dropout, sample_keys
from hvd_batchgrow.nn.ghost.convert import convert_ghost_batch_norm
from hvd_batchgrow.nn.ghost.ghost_batch_norm import GhostBatchNorm1d, GhostBatchNorm2d
from hvd_batchgrow.optim.lars import Lars
from hvd_batchgrow.schedule.phases import Phase, Schedule
from hvd_batchgrow.schedule.plan import Plan, compile_plan
from hvd_batchgrow.train.update.engine import UpdateEngine, UpdateResult
from hvd_batchgrow.train.update.forward import Losses, MicroBatch

__all__ = [
    "ArrayDataset",
    "DatasetPair",
    "GhostBatchNorm1d",
    "GhostBatchNorm2d",
    "KeyedDropout",
    "Lars",
    "Losses",
    "MicroBatch",
    "Pass",
    "Phase",
    "Plan",
    "Ranks",
    "Schedule",
    "SingleRank",
    "Stream",
    "Update",
    "UpdateEngine",
    "UpdateResult",
    "UpdateSection",
    "connect",
    "convert_dropout",
    "convert_ghost_batch_norm",
    "plan_updates",
    "updates",
]


@dataclass(frozen=True)
class Pass:
    """One forward and backward of this rank."""

    positions: tuple[int, ...]
    """Place of each of its groups among the update's."""
    epochs: Ids
    """(k·γ,) epoch of each sample."""
    ids: Ids
    """(k·γ,) sample ids."""
    keys: Tensor
    """(k·γ,) `sample_keys`, for keyed dropout."""

    def micro_batch(self, inputs: Any, labels: Any) -> MicroBatch:
        """Its samples, as `UpdateEngine.update` takes them: rows in the order of `ids`."""
        return MicroBatch(inputs, labels, self.positions, keys=self.keys)


@dataclass(frozen=True)
class Update:
    """One update, and this rank's share of it."""

    samples: int
    """Sample counter before it."""
    phase: Phase
    """Learning rate, momentum and batch."""
    num_groups: int
    """Groups of the whole update, B/γ."""
    passes: tuple[Pass, ...]


def plan_updates(
    schedule: Mapping[str, Any],
    *,
    lr: float,
    momentum: float,
    num_samples: int,
    ghost_batch: int,
    ranks: int = 1,
    max_micro_batch: int | None = None,
    exact: bool = False,
    uneven_ranks: bool = False,
) -> Plan:
    """Compile a schedule for a loop of your own.

    Args:
        schedule: keys of `[schedule]` of a job file; its policies are all there.
        lr: ε to start from.
        momentum: m to start from.
        num_samples: N, size of the training set.
        ghost_batch: γ, samples of a group.
        ranks: R.
        max_micro_batch: most samples of a pass; None: as in a job file.
        exact: one group a pass, for an engine that is exact.
        uneven_ranks: allow ranks to hold unequal numbers of groups.

    Raises:
        JobError: it cannot be formed; with the arithmetic and the nearest that can.
    """
    layout = {"max_micro_batch": max_micro_batch, "exact": exact, "uneven_ranks": uneven_ranks}
    tree = {
        "name": "plan_updates",
        # Of no effect on a schedule, but for their lengths.
        "data": {"source": "synthetic_rows", "shape": [1], "num_samples": num_samples},
        "model": {"name": "dense7", "ghost_batch": ghost_batch},
        "optim": {"name": "sgd", "lr": lr, "momentum": momentum},
        "schedule": dict(schedule),
        "layout": {key: value for key, value in layout.items() if value is not None},
    }
    return compile_plan(parse_job(tree, "plan_updates"), ranks, num_samples)


def updates(plan: Plan, seed: int, rank: int, ranks: int, start_samples: int = 0) -> Iterator[Update]:
    """The updates of a plan, from a sample counter to the end.

    Args:
        plan: compiled for these ranks.
        seed: of the order of the samples.
        rank: this rank.
        ranks: R, as the plan has it.
        start_samples: where an earlier loop has stopped, between two updates.

    Raises:
        ValueError: the plan is for another number of ranks.
    """
    if any(layout.ranks != ranks for layout in plan.layouts):
        raise ValueError(f"the plan is for {plan.peak_ranks} ranks, these are {ranks}: plan_updates(…, ranks={ranks})")
    stream, samples, group = Stream(plan.num_samples, seed), start_samples, plan.group
    while samples < plan.schedule.end_samples:
        phase, layout = plan.schedule.at(samples), plan.layouts[plan.schedule.index_at(samples)]
        passes = passes_of_rank(samples, phase.global_batch, group, layout.micro_batch, rank, ranks)
        share = tuple(_pass(stream, seed, samples, positions, group) for positions in passes)
        yield Update(samples, phase, phase.global_batch // group, share)
        samples += phase.global_batch


def _pass(stream: Stream, seed: int, samples: int, positions: tuple[int, ...], group: int) -> Pass:
    starts = samples + group * np.array(positions)
    epochs, ids = stream.at((starts[:, None] + np.arange(group)).reshape(-1))
    return Pass(positions, epochs, ids, sample_keys(seed, epochs, ids))
