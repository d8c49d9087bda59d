"""Checkpoints: files of tensors and plain values that appear complete or not at all."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from torch import Tensor

from hvd_batchgrow.comm.broadcast_object import broadcast_object
from hvd_batchgrow.comm.ranks import Ranks
from hvd_batchgrow.messages.errors import RunError, reason_of
from hvd_batchgrow.storage.atomic import sync, write_atomically
from hvd_batchgrow.storage.regular_files import read_regular
from hvd_batchgrow.train.checkpoints.best import best_name, remove_superseded
from hvd_batchgrow.train.checkpoints.checkpoint_names import checkpoint_name, saved_samples
from hvd_batchgrow.train.checkpoints.schema import check_contents
from hvd_batchgrow.train.checkpoints.sealed_file import read_sealed, write_sealed

FORMAT = 6


@dataclass(frozen=True)
class Checkpoint:
    """Everything that a run needs to continue as if it had not stopped."""

    samples: int
    """The sample counter, from which the state of the schedule and of the stream follows."""
    deciding: dict[str, Any]
    """`Job.deciding()` of the run."""
    model: dict[str, Any]
    """The network's `state_dict`: tensors, and plain values for extra state."""
    optimizer: dict[str, Any]
    elapsed_s: float
    """Wall time of the run so far, over every attempt."""
    evaluation: dict[str, Any]
    """The last evaluation, by names of `Evaluation`; empty before the first."""
    average: dict[str, Tensor]
    """Averaged weights and running statistics, by name; empty if the run does not average."""
    loss_scale: dict[str, Any]
    """`value`, `good_updates` and `growth_updates`; empty without loss scaling."""
    num_skipped: int
    """Number of updates skipped so far."""
    growth: dict[str, Any] = field(default_factory=dict)
    """Measurements and decisions, `GrowthController.state()`."""
    best: dict[str, Any] = field(default_factory=dict)
    """The best evaluation so far, from `improved`; empty if the job keeps none."""
    gradient_magnitudes: list[int] = field(default_factory=list)
    """`GradientBuckets.magnitudes`; empty without exact mode."""
    replays: dict[str, Any] = field(default_factory=dict)
    """`ReplayTally` of the run; empty before the first passed check."""
    unfinished: int | None = None
    """Sample counter before the last update, if an elastic run lost ranks before the evaluation, decision or
    re-estimation that follows it was finished; a resume does all of them again. None: nothing is left to do."""

    def write_to(self, file: BinaryIO) -> None:
        """Write a file of `write_sealed`. Raises OSError if it cannot be written."""
        write_sealed(file, {"format": FORMAT, **vars(self)})

    @classmethod
    def from_bytes(cls, data: bytes) -> Checkpoint:
        """Return the checkpoint in the content of a file; the inverse of `write_to`.

        Raises:
            RunError: the file is damaged, of another program, or of another format.
        """
        values = read_sealed(data)
        if not isinstance(values, dict) or "format" not in values:
            raise RunError("not a checkpoint of this program")
        if (file_format := values.pop("format")) != FORMAT:
            raise RunError(f"its format is {file_format}, but this version reads format {FORMAT}")
        check_contents(values)
        return cls(**values)


def write_checkpoint(folder: Path, checkpoint: Checkpoint, keep: int, milestones: Iterable[int]) -> Path:
    """Write a checkpoint atomically, then remove old ones.

    Args:
        folder: the run's checkpoint folder.
        checkpoint: the state to write.
        keep: number of newest checkpoints to keep.
        milestones: sample counters whose checkpoints are never removed.

    Raises:
        RunError: it could not be written; earlier checkpoints are unchanged.
    """
    path = folder / checkpoint_name(checkpoint.samples)
    with _reported(path):
        # The records go to the disk first, so that no checkpoint is ahead of its record.
        for record in folder.parent.glob("*.jsonl"):
            sync(record)
        write_atomically(path, checkpoint.write_to)
        _remove_old(folder, checkpoint, keep, set(milestones))
    return path


def write_best(folder: Path, checkpoint: Checkpoint) -> None:
    """Write the state at the best evaluation so far. Runs do not resume from it, and it replaces no other file.

    Raises:
        RunError: it could not be written.
    """
    path = folder / best_name(checkpoint.samples)
    with _reported(path):
        write_atomically(path, checkpoint.write_to)


@contextmanager
def _reported(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunError(f"checkpoint {path} could not be written: {reason_of(error)}") from error


def _remove_old(folder: Path, newest: Checkpoint, keep: int, kept: set[int]) -> None:
    # Newer ones are damaged, otherwise the run would have resumed from them: they do not count for `keep`.
    older = [old for old in checkpoint_paths(folder) if _samples_of(old) <= newest.samples]
    for old in older[:-keep]:
        if _samples_of(old) not in kept:
            old.unlink(missing_ok=True)  # another client of the same NFS may have removed it
    remove_superseded(folder, newest.best, [_samples_of(path) for path in older[-keep:]])


def checkpoint_paths(folder: Path) -> list[Path]:
    """Return the checkpoints of a run, oldest first."""
    return [folder / checkpoint_name(samples) for samples in saved_samples(folder)]


def checkpoint_samples(folder: Path) -> int | None:
    """Return the sample counter of the newest checkpoint by its name, good or not; None: there is no checkpoint."""
    paths = checkpoint_paths(folder)
    return _samples_of(paths[-1]) if paths else None


def newest_good(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """Return the newest good checkpoint, and the paths of newer ones with the reasons to skip them.

    Raises:
        RunError: there are checkpoints, but all of them are damaged.
    """
    skipped: list[str] = []
    for path in reversed(checkpoint_paths(folder)):
        try:
            return Checkpoint.from_bytes(read_regular(path)), skipped
        except (OSError, RunError) as error:
            skipped.append(f"{path}: {reason_of(error)}")
    if skipped:
        raise RunError("no good checkpoint is left:\n  " + "\n  ".join(skipped))
    return None, skipped


def checkpoint_at(folder: Path, samples: int) -> Checkpoint:
    """Return the checkpoint at a sample counter.

    Raises:
        RunError: it does not exist, or is damaged; the message lists those that exist.
    """
    path = folder / checkpoint_name(samples)
    try:
        return Checkpoint.from_bytes(read_regular(path))
    except (OSError, RunError) as error:
        others = ", ".join(f"{saved:,}" for saved in saved_samples(folder) if saved != samples) or "no other sample"
        fault = f"{path} cannot be used: {reason_of(error)}"
        raise RunError(f"{fault}; checkpoints exist at {others}") from None


def broadcast_checkpoint(ranks: Ranks, checkpoint: Checkpoint | None) -> Checkpoint | None:
    """Return rank 0's checkpoint on every rank. All ranks call it together; `checkpoint` is ignored elsewhere."""
    values = broadcast_object(ranks, checkpoint and vars(checkpoint), "checkpoint")
    return values and Checkpoint(**values)


def _samples_of(path: Path) -> int:
    return int(path.stem.removeprefix("samples-"))
