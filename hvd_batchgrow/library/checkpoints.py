"""Checkpoints of a custom training loop."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

from hvd_batchgrow.comm.broadcast_object import broadcast_object
from hvd_batchgrow.comm.ranks import Ranks
from hvd_batchgrow.messages.errors import RunError, reason_of, unwritable
from hvd_batchgrow.storage.atomic import write_atomically
from hvd_batchgrow.storage.regular_files import read_regular
from hvd_batchgrow.train.checkpoints.sealed_file import read_sealed, write_sealed


def save_checkpoint(path: str | PathLike[str], state: Mapping[str, Any], ranks: Ranks) -> None:
    """Write a dict to a file atomically. Rank 0 writes the file; all ranks call the function together.

    The file has torch's format, followed by a line with a SHA-256; `torch.load` reads it too.

    Args:
        path: the file, whose folder must exist; an earlier checkpoint of this name is replaced.
        state: tensors and plain values, such as state dicts; "samples" is the sample counter.
        ranks: of `connect`.

    Raises:
        ValueError: "samples" is missing or negative, or not equal on all ranks.
        CollectiveError: rank 0 cannot write the file; an earlier checkpoint is unchanged.
    """
    counters = ranks.all_gather([_samples_of(state)], "save_checkpoint.samples").flatten().tolist()
    if len({*counters}) > 1:
        raise ValueError(f'ranks save different sample counters, state["samples"] = {counters}')
    if counters[0] < 0:
        raise ValueError('state["samples"] must be the sample counter, a whole number >= 0, such as scheduler.samples')
    file = Path(path)

    def write() -> None:
        try:
            write_atomically(file, partial(write_sealed, values=dict(state)))
        except OSError as error:
            raise unwritable(f"checkpoint {file}", error) from error

    ranks.run_on_rank0(write)


def _samples_of(state: Mapping[str, Any]) -> int:
    """Return the sample counter, or -1 if it is not valid, so that all ranks raise the error together."""
    samples = state.get("samples")
    return samples if isinstance(samples, int) and not isinstance(samples, bool) and samples >= 0 else -1


def load_checkpoint(path: str | PathLike[str], ranks: Ranks) -> dict[str, Any] | None:
    """Return what `save_checkpoint` wrote, equal on all ranks; None if there is no such file.

    Rank 0 reads the file and broadcasts it, so the other ranks do not need to see it. All ranks call it together.

    Args:
        path: the file.
        ranks: of `connect`; their number may differ from the number at the save.

    Returns:
        the dict, with its tensors on the CPU.

    Raises:
        CollectiveError: the file cannot be read, is damaged, or is not a checkpoint of `save_checkpoint`.
    """
    state = ranks.run_on_rank0(lambda: _read(Path(path)))
    found: dict[str, Any] | None = broadcast_object(ranks, state, "load_checkpoint")
    return found


def _read(path: Path) -> dict[str, Any] | None:
    try:
        state = read_sealed(read_regular(path))
    except FileNotFoundError:
        return None
    except (OSError, RunError) as error:
        raise RunError(f"checkpoint {path}: {reason_of(error)}") from error
    if not isinstance(state, dict) or _samples_of(state) < 0:
        raise RunError(
            f'checkpoint {path}: it is not a dict with a sample counter "samples", as save_checkpoint writes'
        )
    return state
