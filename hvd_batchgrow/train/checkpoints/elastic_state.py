"""What a rank keeps of a life of its run that ended because others were lost."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hvd_batchgrow.train.checkpoints.checkpoint import Checkpoint, checkpoint_paths, write_checkpoint
from hvd_batchgrow.train.events import UpdateDone


@dataclass
class ElasticState:
    """The state after the last whole update; empty, where the loss came while it was being recorded."""

    checkpoint: Checkpoint | None = None
    last_update: UpdateDone | None = None
    """The update before that state: rank 0 may have been lost before it was recorded."""
    num_updates: int = 0
    """How many this rank has taken part in, in all lives."""

    def leave(self, folder: Path, keep: int) -> None:
        """Write the state as a checkpoint, unless the run has a newer one; rank 0 alone does so.

        Raises:
            RunError: it could not be written.
        """
        checkpoints = folder / "checkpoints"
        if self.checkpoint is None or not checkpoints.is_dir():
            return
        if not any(path.stem >= f"samples-{self.checkpoint.samples:015d}" for path in checkpoint_paths(checkpoints)):
            write_checkpoint(checkpoints, self.checkpoint, keep, ())
