"""Checkpoints of a custom training loop."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Mapping
from functools import partial
from io import BytesIO
from operator import is_
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hvd_batchgrow.comm.broadcast_object import broadcast_object
from hvd_batchgrow.comm.ranks import Ranks
from hvd_batchgrow.messages.errors import RunError, reason_of, unwritable
from hvd_batchgrow.messages.wording import with_article
from hvd_batchgrow.storage.atomic import write_atomically
from hvd_batchgrow.storage.regular_files import read_regular
from hvd_batchgrow.train.checkpoints.sealed_file import read_sealed, write_sealed

_PLAIN = (int, float, complex, str, bytes, bool, type(None))
_TENSORS = (Tensor, nn.Parameter)
_MAPPINGS, _SEQUENCES = (dict, OrderedDict, Counter), (list, tuple, set)
_REMEDY = "save tensors, numbers, texts, and dicts, lists, tuples and sets of them"


def save_checkpoint(path: str | PathLike[str], state: Mapping[str, Any], ranks: Ranks) -> None:
    """Write a dict to a file atomically. Rank 0 writes the file; all ranks call the function together.

    The file has torch's format, followed by a line with a SHA-256; `torch.load` reads it too.

    Args:
        path: the file, whose folder must exist; an earlier checkpoint of this name is replaced.
        state: tensors and plain values, such as state dicts; "samples" is the sample counter. Scalars of NumPy are
            stored as numbers of Python.
        ranks: of `connect`.

    Raises:
        ValueError: "samples" is missing or negative, or not equal on all ranks.
        CollectiveError: rank 0 cannot write the file, or `load_checkpoint` could not read an entry of the dict; an
            earlier checkpoint is unchanged.
    """
    counters = ranks.all_gather([_samples_of(state)], "save_checkpoint.samples").flatten().tolist()
    if len({*counters}) > 1:
        raise ValueError(f'ranks save different sample counters, state["samples"] = {counters}')
    if counters[0] < 0:
        raise ValueError('state["samples"] must be the sample counter, a whole number >= 0, such as scheduler.samples')
    file = Path(path)

    def write() -> None:
        values = _storable(dict(state), "state")
        try:
            write_atomically(file, partial(write_sealed, values=values))
        except OSError as error:
            raise unwritable(f"checkpoint {file}", error) from error

    ranks.run_on_rank0(write)


def _storable(value: Any, place: str) -> Any:
    """Return a value that `torch.load` reads with `weights_only`. A value without NumPy's scalars is returned itself.

    Args:
        value: to be stored.
        place: of the value in the user's dict, for the message.

    Raises:
        RunError: it has another type, or contains such a value.
    """
    kind = type(value)
    if isinstance(value, np.generic) and isinstance(value.item(), _PLAIN):
        return value.item()
    if kind in _MAPPINGS:
        pairs = [
            (_storable(key, f"a key of {place}"), _storable(part, f"{place}[{key!r}]")) for key, part in value.items()
        ]
        same = all(a is c and b is d for (a, b), (c, d) in zip(pairs, value.items(), strict=True))
        return value if same else kind(pairs)
    if kind in _SEQUENCES:
        parts = [_storable(part, f"{place}[{index}]") for index, part in enumerate(value)]
        return value if all(map(is_, parts, value)) else kind(parts)
    if kind in _PLAIN or kind in _TENSORS or _is_readable(value):
        return value
    remedy = "torch.as_tensor converts it" if isinstance(value, np.ndarray) else _REMEDY
    raise RunError(f"{place} is {with_article(kind.__name__)}, which load_checkpoint could not read; {remedy}")


def _is_readable(value: Any) -> bool:
    """Return whether `torch.load` reads a value with `weights_only`."""
    file = BytesIO()
    try:
        torch.save(value, file)
        file.seek(0)
        torch.load(file, weights_only=True)
    except Exception:  # pickle raises what the value raises
        return False
    return True


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
