"""outcomes.npz of a run: the loss of each test sample at the end, and whether its prediction was right."""

from __future__ import annotations

import io
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvd_batchgrow.messages.errors import RunError, unreadable
from hvd_batchgrow.storage.atomic import write_atomically
from hvd_batchgrow.storage.regular_files import read_regular

FILE = "outcomes.npz"
_MOST_BYTES = 1 << 32
"""Most bytes that the arrays of a file may unpack to: a damaged file must not fill the memory."""


@dataclass(frozen=True)
class Outcomes:
    """The outcome of each sample of the test set, in the order of the sample ids."""

    samples: int
    """Sample counter of the weights that were evaluated."""
    losses: NDArray[np.float32]
    """(n,): loss of each sample; with `weights` it includes the weight. NaN: a bad sample that was skipped."""
    correct: NDArray[np.bool_] | None = None
    """(n,): whether the prediction for each sample is right; None: the task does not return it."""
    weights: NDArray[np.float32] | None = None
    """(n,): weight of each sample; None: 1 each."""


def write_outcomes(folder: Path, outcomes: Outcomes) -> None:
    """Replace `outcomes.npz` of a run folder.

    Raises:
        OSError: it cannot be written.
    """
    arrays: dict[str, NDArray[Any]] = {"samples": np.array(outcomes.samples, np.int64), "losses": outcomes.losses}
    if outcomes.correct is not None:
        arrays["correct"] = outcomes.correct
    if outcomes.weights is not None:
        arrays["weights"] = outcomes.weights
    content = io.BytesIO()
    np.savez_compressed(content, allow_pickle=False, **arrays)
    write_atomically(folder / FILE, content.getvalue())


def read_outcomes(folder: Path) -> Outcomes | None:
    """Return the outcomes in a run folder; None: the run has no such file, for example because it is unfinished.

    Raises:
        RunError: the file cannot be read, or is damaged.
    """
    path = folder / FILE
    try:
        data = io.BytesIO(read_regular(path))
        with zipfile.ZipFile(data) as archive:
            size = sum(member.file_size for member in archive.infolist())
        if size > _MOST_BYTES:
            raise ValueError(f"its arrays have {size:,} bytes, and at most {_MOST_BYTES:,} are read")
        with np.load(data, allow_pickle=False) as arrays:
            return _checked({name: arrays[name] for name in arrays.files})
    except FileNotFoundError:
        return None
    except OSError as error:
        raise unreadable(path, error) from None
    except (*_DAMAGE, MemoryError) as error:
        raise RunError(f"{path} is damaged: {error}") from None


_DAMAGE = (ValueError, KeyError, TypeError, EOFError, RuntimeError, SyntaxError, zipfile.BadZipFile, zlib.error)
"""Exceptions of zipfile and NumPy for damaged files."""


def _checked(arrays: dict[str, NDArray[Any]]) -> Outcomes:
    """Return arrays of `write_outcomes` as outcomes. Raises ValueError or KeyError if a name, type or shape differs."""
    samples, losses = arrays["samples"], arrays["losses"]
    kinds = {"samples": np.int64, "losses": np.float32, "correct": np.bool_, "weights": np.float32}
    for name, kind in kinds.items():
        if name in arrays:
            array, shape = arrays[name], () if name == "samples" else (losses.size,)
            if array.dtype != kind or array.shape != shape:
                raise ValueError(f"{name} has type {array.dtype} and shape {array.shape}")
    return Outcomes(int(samples), losses, arrays.get("correct"), arrays.get("weights"))
