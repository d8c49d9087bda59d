"""A run whose ranks come and go: each change begins another life of it, from where the last one stood."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from hvd_batchgrow.comm.ranks import RanksLost
from hvd_batchgrow.train.events import RunEnded
from hvd_batchgrow.train.liveness.stop import Stop

if TYPE_CHECKING:  # it imports Horovod
    from hvd_batchgrow.comm.elastic import ElasticRanks


class StopOrChange:
    """Asks for an end at the next update boundary when the user does, or when other hosts are there.

    Args:
        stop: the user's.
        ranks: those of the moment.
    """

    def __init__(self, stop: Stop, ranks: ElasticRanks) -> None:
        self._stop, self._ranks = stop, ranks

    @property
    def stop_requested(self) -> bool:
        """Whether either does."""
        return self._stop.stop_requested or self._ranks.changed


def run_elastic(
    life: Callable[[bool], RunEnded], ranks: ElasticRanks, is_over: Callable[[], bool], tell: Callable[[str], None]
) -> RunEnded:
    """Train to the end, or to a stop by the user, on whatever ranks there are.

    Ranks that join begin at the first life, and find the run as any resume does. Where ranks were
    lost in mid-update, each that is left has kept what the update before it led to, and what the new
    rank 0 has counts: the first of those that are left.

    Args:
        life: trains on the ranks of the moment; whether it has to go on from what is there is its argument.
        ranks: those of the moment.
        is_over: whether the user wants no more; what asks for the end of a life is up to `life`.
        tell: told of changes.
    """
    again = False
    while True:
        try:
            ended = life(again)
            if ended.done or ranks.any(flag=is_over()):
                return ended
            why = f"hosts have come or gone, there were {ranks.size} ranks"
        except RanksLost:
            why = f"some of {ranks.size} ranks are lost"
        ranks.reform()
        tell(f"{why}: {ranks.size} from here on")
        again = True
