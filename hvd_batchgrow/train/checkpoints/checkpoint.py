"""Checkpoints: plain tensors and plain types, whole or not there."""

from __future__ import annotations

import hashlib
import io
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from hvd_batchgrow.messages.errors import RunError
from hvd_batchgrow.storage.atomic import UnbufferedFile, sync, write_atomically
from hvd_batchgrow.storage.regular_files import read_regular
from hvd_batchgrow.train.checkpoints.schema import check_contents

FORMAT = 4
_READ_TOO = {2, 3}
"""Older ones: 3 knew nothing of measured growth, 2 had no seal either."""
_UNSEALED_FORMAT = 2
_SEAL = re.compile(rb"\nsha256 ([0-9a-f]{64})\n")
_SEAL_BYTES = 73
_NAME = re.compile(r"samples-(\d{15})\.pt")


@dataclass(frozen=True)
class Checkpoint:
    """All that a run needs to go on as if it had never stopped."""

    samples: int
    """The sample counter; everything the schedule and the stream say follows from it."""
    deciding: dict[str, Any]
    """`Job.deciding()` of the run."""
    model: dict[str, Any]
    """The network's `state_dict`: tensors, and plain values for extra state."""
    optimizer: dict[str, Any]
    elapsed_s: float
    """Wall time of the run so far, over all its lives."""
    evaluation: dict[str, float]
    """The last evaluation: `samples`, `loss`, `top1`; empty before the first."""
    average: dict[str, Tensor]
    """Averaged weights; empty where none are kept."""
    loss_scale: dict[str, Any]
    """`value` and `good_samples`; empty where there is none."""
    num_skipped: int
    """Updates left out so far."""
    growth: dict[str, Any] = field(default_factory=dict)
    """What was measured and decided: `GrowthController.state()`; empty in older files."""

    def to_bytes(self) -> bytes:
        """A file's content: see `write_to`."""
        buffer = io.BytesIO()
        self.write_to(buffer)
        return buffer.getvalue()

    def write_to(self, file: BinaryIO) -> None:
        """Write torch's format: a SHA-256 over all values inside, and one over the file at its end.

        The one inside is of what the file means, whoever wrote it, and does not see a bit of padding change.

        Raises:
            OSError: of the file.
        """
        values = {"format": FORMAT} | {field.name: getattr(self, field.name) for field in fields(self)}
        sink = _Sink(file)
        try:
            torch.save({**values, "sha256": tree_digest(values)}, sink)  # type: ignore[arg-type]
        except RuntimeError as error:
            raise sink.error or error from None
        sink.write(sink.seal())

    @classmethod
    def from_bytes(cls, data: bytes) -> Checkpoint:
        """The inverse of `to_bytes`.

        Raises:
            RunError: damaged, of another program, or of a newer format.
        """
        is_sealed = _check_seal(data)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of a foreign file it is enough to hear that it cannot be read
                values = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        except Exception as error:  # damage can make the reader stumble anywhere
            reason = str(error).partition("\n")[0] or type(error).__name__
            if "weights_only" in reason:  # torch advises to load it without
                reason = "it is no file of tensors and plain values"
            raise RunError(f"not readable ({reason})") from None
        if not isinstance(values, dict) or "sha256" not in values:
            raise RunError("not a checkpoint of this program")
        digest, file_format = values.pop("sha256"), values.pop("format", None)
        if file_format not in {FORMAT, *_READ_TOO}:
            raise RunError(f"of format {file_format}, this version reads {FORMAT}")
        if file_format != _UNSEALED_FORMAT and not is_sealed:
            raise RunError("damaged: its end is missing")
        try:
            found = tree_digest({"format": file_format, **values})
        except (RuntimeError, TypeError, RecursionError) as error:  # sparse tensors, say, which no run has
            raise RunError(f"not a checkpoint of this version: {error}") from None
        if digest != found:
            raise RunError("damaged: its values do not match its SHA-256")
        check_contents(values)
        return cls(**values)


class _Sink(UnbufferedFile):
    """A file with a SHA-256 of what was written. It keeps the system's error: torch's writer reports another one."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file)
        self._digest = hashlib.sha256()

    def seal(self) -> bytes:
        """Return the line that follows the content written so far."""
        return f"\nsha256 {self._digest.hexdigest()}\n".encode()

    def write(self, data: bytes | memoryview) -> int:
        """Write all of the data, and add it to the SHA-256."""
        self._digest.update(data)
        return super().write(data)

    def flush(self) -> None:
        """Nothing is kept here."""


def _check_seal(data: bytes) -> bool:
    """Whether there is a seal. Raises RunError if it is broken."""
    if not (found := _SEAL.fullmatch(data[-_SEAL_BYTES:])):
        return False
    if hashlib.sha256(memoryview(data)[:-_SEAL_BYTES]).hexdigest().encode() != found[1]:
        raise RunError("damaged: its bytes do not match its SHA-256")
    return True


def tree_digest(tree: Any) -> str:
    """SHA-256 over a tree of dicts, lists, tensors and plain values, the same on every machine.

    Dicts count in the order of their keys, tensors by name, dtype, shape and bytes in C order.
    """
    digest = hashlib.sha256()
    for piece in _pieces("", tree):
        digest.update(piece)
    return digest.hexdigest()


def _pieces(path: str, value: Any) -> Iterable[bytes | memoryview]:
    if isinstance(value, Mapping):
        for key in sorted(value, key=str):
            yield from _pieces(f"{path}/{key}", value[key])
    elif isinstance(value, (list, tuple)):
        yield f"{path}[{len(value)}]\0".encode()
        for index, item in enumerate(value):
            yield from _pieces(f"{path}/{index}", item)
    elif isinstance(value, Tensor):
        yield f"{path}:{value.dtype}{tuple(value.shape)}\0".encode()
        # Its memory itself: a copy of each tensor would be made under Python's lock, while training waits.
        yield value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    else:
        yield f"{path}={value!r}\0".encode()


def write_checkpoint(folder: Path, checkpoint: Checkpoint, keep: int, milestones: Iterable[int]) -> Path:
    """Write a checkpoint whole, then remove old ones.

    Args:
        folder: of the run's checkpoints.
        checkpoint: what to write.
        keep: how many of the newest to keep.
        milestones: sample counters whose checkpoints are kept for good.

    Raises:
        RunError: it could not be written; those written before are untouched.
    """
    path = folder / f"samples-{checkpoint.samples:015d}.pt"
    try:
        # What the run has recorded up to here goes to the disk first: no checkpoint is ahead of its record.
        for record in folder.parent.glob("*.jsonl"):
            sync(record)
        write_atomically(path, checkpoint.write_to)
        _remove_old(folder, checkpoint.samples, keep, set(milestones))
    except OSError as error:
        raise RunError(f"checkpoint {path} could not be written: {error.strerror or error}") from error
    return path


def _remove_old(folder: Path, samples: int, keep: int, kept: set[int]) -> None:
    # Those beyond this one were damaged, else the run would have gone on from them: they keep nobody's place.
    older = [old for old in checkpoint_paths(folder) if _samples_of(old) <= samples]
    for old in older[:-keep]:
        if _samples_of(old) not in kept:
            old.unlink()


def checkpoint_paths(folder: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    return sorted(path for path in folder.glob("samples-*.pt") if _NAME.fullmatch(path.name))


def newest_good(folder: Path) -> tuple[bytes | None, list[str]]:
    """Content of the newest checkpoint that can be trusted, and what was skipped on the way, and why.

    Raises:
        RunError: there are checkpoints, but none is good.
    """
    skipped: list[str] = []
    for path in reversed(checkpoint_paths(folder)):
        try:
            data = read_regular(path)
            Checkpoint.from_bytes(data)
        except (OSError, RunError) as error:
            skipped.append(f"{path}: {getattr(error, 'strerror', None) or error}")
        else:
            return data, skipped
    if skipped:
        raise RunError("no good checkpoint is left:\n  " + "\n  ".join(skipped))
    return None, skipped


def _samples_of(path: Path) -> int:
    return int(path.stem.removeprefix("samples-"))
