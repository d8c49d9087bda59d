"""Phases on some of the ranks: the first ranks train while the others wait, then all ranks get the new state."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from hvd_batchgrow.comm.broadcast_object import broadcast_object
from hvd_batchgrow.comm.ranks import CollectiveError, Ranks
from hvd_batchgrow.messages.errors import ExitCode
from hvd_batchgrow.train.checkpoints.checkpoint import Checkpoint
from hvd_batchgrow.train.liveness.stop import Stop
from hvd_batchgrow.train.train_state import TrainState


@dataclass
class PhaseRanks:
    """The ranks that train a phase."""

    team: Ranks | None
    """None on a rank that waits."""
    stopped: bool = False
    """Set by the ranks of the team if a stop was requested; equal on all ranks after the phase."""


@contextmanager
def ranks_of_phase(ranks: Ranks, count: int, state: TrainState, stop: Stop) -> Iterator[PhaseRanks]:
    """Let the first ranks train within a `with` block, while the others wait at its end for the new state.

    All ranks enter it together.

    Args:
        ranks: of the job.
        count: number of ranks that train.
        state: of this rank; replaced by that of rank 0 if this rank waited.
        stop: stop requests on this rank; those of idle ranks count too.

    Raises:
        CollectiveError: on all ranks, if the block raised it on the ranks that train.
        RunError: rank 0 has ended.
    """
    if count == ranks.size:
        yield PhaseRanks(ranks)
        return
    subset = ranks.subset(count)
    phase, failure = PhaseRanks(subset), None
    try:
        yield phase
    except CollectiveError as error:
        failure = error
    if subset is None:
        ranks.wait_until_woken(lambda: stop.stop_requested)
    else:
        subset.close()
    code = int(failure.code) if failure else 0
    checkpoint = state.capture() if ranks.rank == 0 and not failure else None
    code, phase.stopped, values = broadcast_object(
        ranks, (code, phase.stopped, checkpoint and vars(checkpoint)), "state after phase"
    )
    if code:
        raise CollectiveError(failure.error if failure else None, ExitCode(code))
    if subset is None:
        state.load(Checkpoint(**values))
