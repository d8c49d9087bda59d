"""The state that a rank keeps when an attempt of its elastic run ends because other ranks were lost."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hvd_batchgrow.comm.ranks import Ranks
from hvd_batchgrow.train.checkpoints.checkpoint import Checkpoint, checkpoint_paths, write_checkpoint
from hvd_batchgrow.train.events import UpdateDone


@dataclass
class ElasticState:
    """The state after the last complete update; empty if the ranks were lost while it was being captured."""

    checkpoint: Checkpoint | None = None
    """In host memory: the next attempt must not share the device with the state of the last one."""
    last_update: UpdateDone | None = None
    """The update that led to that state: rank 0 may have been lost before it recorded it."""
    num_updates: int = 0
    """Number of updates of the run over all attempts, from those of the ranks of the last one that began."""
    has_opened: bool = False
    """Whether an attempt has opened the run folder: the next one resumes the run, and removes nothing."""

    def count_with(self, ranks: Ranks) -> None:
        """At the start of an attempt, take the largest number of updates, because ranks that join have counted 0.

        All ranks call it together.
        """
        self.num_updates = int(ranks.all_gather([self.num_updates], "updates so far").max())

    def write_if_newer(self, folder: Path) -> None:
        """Write the state as a checkpoint unless the run has one as new; only rank 0 calls it.

        No other checkpoint is removed: the run does so at its next one, when it knows its phase boundaries.

        Raises:
            RunError: it could not be written.
        """
        checkpoints = folder / "checkpoints"
        if self.checkpoint is None or not checkpoints.is_dir():
            return
        existing = list(checkpoint_paths(checkpoints))
        if not any(path.stem >= f"samples-{self.checkpoint.samples:015d}" for path in existing):
            write_checkpoint(checkpoints, self.checkpoint, len(existing) + 1, ())
