"""Phases on some of the ranks: the first ranks train while the others wait, then all ranks get the new state."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any, Protocol

from hvd_batchgrow.comm.broadcast_object import broadcast_tree
from hvd_batchgrow.comm.ranks import CollectiveError, Ranks, RankSubset
from hvd_batchgrow.messages.errors import ExitCode, JobError, RunError
from hvd_batchgrow.train.checkpoints.checkpoint import Checkpoint
from hvd_batchgrow.train.liveness.stop import Stop


class Trains(Protocol):
    """A trainer whose state can be moved to another rank."""

    ranks: Ranks

    def use(self, team: Ranks) -> None:
        """Train on these ranks, which include this one, from now on."""

    def capture(self) -> Checkpoint:
        """Return its state."""

    def adopt(self, checkpoint: Checkpoint) -> None:
        """Continue from a state."""


def train_on_first(trainer: Trains, count: int, train: Callable[[Callable[[], bool]], bool], stop: Stop) -> bool:
    """Train on the first ranks while the others wait; afterwards all ranks have the same state.

    All ranks call it together. A CollectiveError of the training ranks is raised on all ranks.

    Args:
        trainer: of this rank.
        count: number of ranks that train.
        train: trains, and returns whether it was stopped; its argument returns whether a stop is requested.
        stop: source of stop requests on this rank; those of idle ranks count too.

    Returns:
        the result of `train`, on every rank.

    Raises:
        CollectiveError: raised by `train`.
        RunError: rank 0 has ended.
    """
    if count == trainer.ranks.size:
        return train(lambda: stop.stop_requested)
    subset = trainer.ranks.subset(count)
    if subset is None:
        trainer.ranks.wait_until_woken(lambda: stop.stop_requested)
        return _synchronize(trainer, {}, None)
    outcome, error = _train(trainer, subset, train, stop)
    return _synchronize(trainer, outcome, error)


def _train(
    trainer: Trains, subset: RankSubset, train: Callable[[Callable[[], bool]], bool], stop: Stop
) -> tuple[dict[str, Any], JobError | RunError | None]:
    """Train on the subset; return the outcome, and the error that this rank reports, if any."""
    trainer.use(subset)
    error = None
    try:
        stopped = train(lambda: stop.stop_requested or subset.stop_requested_elsewhere())
        outcome: dict[str, Any] = {"stopped": stopped, "failed": 0}
    except CollectiveError as failure:
        outcome, error = {"stopped": True, "failed": int(failure.code)}, failure.error
    subset.close()
    return outcome, error


def _synchronize(trainer: Trains, outcome: dict[str, Any], error: JobError | RunError | None) -> bool:
    """Broadcast rank 0's outcome and state to all ranks. `outcome` is empty on ranks that waited."""
    waited = not outcome
    trainer.use(trainer.ranks)
    state = _plain(trainer.capture()) if trainer.ranks.rank == 0 else {}
    received = broadcast_tree(trainer.ranks, {"outcome": outcome, "state": state}, "synchronize")
    if received["outcome"]["failed"]:
        raise CollectiveError(error, ExitCode(received["outcome"]["failed"]))
    if waited:
        trainer.adopt(Checkpoint(**received["state"]))
    return bool(received["outcome"]["stopped"])


def _plain(checkpoint: Checkpoint) -> dict[str, Any]:
    return {field.name: getattr(checkpoint, field.name) for field in fields(checkpoint)}
