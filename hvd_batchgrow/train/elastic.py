"""A run whose ranks join and leave: each change begins a new attempt, which resumes where the last one ended."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from hvd_batchgrow.comm.ranks import RanksLost
from hvd_batchgrow.train.events import RunEnded

if TYPE_CHECKING:  # it imports Horovod
    from hvd_batchgrow.comm.elastic import ElasticRanks


def run_elastic(
    attempt: Callable[[], RunEnded], ranks: ElasticRanks, is_over: Callable[[], bool], notify: Callable[[str], None]
) -> RunEnded:
    """Train to the end, or until the user stops the run, on whatever ranks are available.

    Ranks that join begin with a first attempt, and resume the run like any resume does. If ranks are lost during an
    update, each remaining rank keeps its state after the update before. The state of the new rank 0, which is the
    first remaining rank, is the one that the next attempt resumes from.

    Args:
        attempt: trains on the current ranks; it resumes the run if an earlier attempt has opened its folder.
        ranks: the current ranks.
        is_over: whether the user wants to end the run; otherwise the end of an attempt begins the next one.
        notify: receives a line about each change of the ranks.
    """
    while True:
        try:
            ended = attempt()
            if ended.done or ranks.any(flag=is_over()):
                return ended
            why = f"hosts have joined or left ({ranks.size} ranks until now)"
        except RanksLost:
            why = f"some of {ranks.size} ranks are lost"
        ranks.reform()
        free_device_memory()
        notify(f"{why}: continuing with {ranks.size}")


def free_device_memory() -> None:
    """Free what an attempt or a branch that has ended had on its device.

    A network that refers to itself, as a compiled one does, is freed only by a collection.
    """
    gc.collect()
    torch.cuda.empty_cache()
