"""Phases that need fewer ranks than there are: the first train, the others wait and take over what they came to."""

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
    """What trains, and can be taken up elsewhere."""

    ranks: Ranks

    def use(self, team: Ranks) -> None:
        """From now on these ranks train, this one among them."""

    def capture(self) -> Checkpoint:
        """Its state."""

    def adopt(self, checkpoint: Checkpoint) -> None:
        """Go on from a state."""


def train_on_first(trainer: Trains, count: int, train: Callable[[Callable[[], bool]], bool], stop: Stop) -> bool:
    """Train on the first ranks while the others wait; after that all ranks stand where these have come to.

    All ranks call it together. A failure that the training ranks agree on is raised on all.

    Args:
        trainer: of this rank.
        count: how many ranks train.
        train: does so, asking what it is given whether this rank wants to stop; whether it was stopped.
        stop: says whether this rank is asked to; that of a rank that waits is heard too.

    Returns:
        what `train` gave, on every rank.

    Raises:
        CollectiveError: of `train`.
        RunError: rank 0 is gone.
    """
    if count == trainer.ranks.size:
        return train(lambda: stop.stop_requested)
    part = trainer.ranks.subset(count)
    if part is None:
        trainer.ranks.wait_until_woken(lambda: stop.stop_requested)
        return _take_over(trainer, {}, None)
    outcome, error = _outcome(trainer, part, train, stop)
    return _take_over(trainer, outcome, error)


def _outcome(
    trainer: Trains, part: RankSubset, train: Callable[[Callable[[], bool]], bool], stop: Stop
) -> tuple[dict[str, Any], JobError | RunError | None]:
    """How it ended here, and what this rank has to tell the user."""
    trainer.use(part)
    error = None
    try:
        stopped = train(lambda: stop.stop_requested or part.stop_requested_elsewhere())
        outcome: dict[str, Any] = {"stopped": stopped, "failed": 0}
    except CollectiveError as failure:
        outcome, error = {"stopped": True, "failed": int(failure.code)}, failure.error
    part.close()
    trainer.use(trainer.ranks)
    return outcome, error


def _take_over(trainer: Trains, outcome: dict[str, Any], error: JobError | RunError | None) -> bool:
    """All ranks: hear how it ended, and be where rank 0 is. `outcome` is empty on ranks that waited."""
    waited = not outcome
    state = _plain(trainer.capture()) if trainer.ranks.rank == 0 else {}
    told = broadcast_tree(trainer.ranks, {"outcome": outcome, "state": state}, "hand_over")
    if told["outcome"]["failed"]:
        raise CollectiveError(error, ExitCode(told["outcome"]["failed"]))
    if waited:
        trainer.adopt(Checkpoint(**told["state"]))
    return bool(told["outcome"]["stopped"])


def _plain(checkpoint: Checkpoint) -> dict[str, Any]:
    return {field.name: getattr(checkpoint, field.name) for field in fields(checkpoint)}
