"""Checkpoints: files of tensors and plain values that appear complete or not at all."""

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
"""Older formats: 3 has no `growth`, and 2 has no seal either."""
_UNSEALED_FORMAT = 2
_SEAL = re.compile(rb"\nsha256 ([0-9a-f]{64})\n")
_SEAL_BYTES = 73
_NAME = re.compile(r"samples-(\d{15})\.pt")


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
    evaluation: dict[str, float]
    """The last evaluation: `samples`, `loss`, `top1`; empty before the first."""
    average: dict[str, Tensor]
    """Averaged weights; empty if the run does not average."""
    loss_scale: dict[str, Any]
    """`value` and `good_samples`; empty without loss scaling."""
    num_skipped: int
    """Number of updates skipped so far."""
    growth: dict[str, Any] = field(default_factory=dict)
    """Measurements and decisions, `GrowthController.state()`; empty in older files."""

    def to_bytes(self) -> bytes:
        """Return the content of the file; see `write_to`."""
        buffer = io.BytesIO()
        self.write_to(buffer)
        return buffer.getvalue()

    def write_to(self, file: BinaryIO) -> None:
        """Write torch's format with a SHA-256 of all values inside, and a SHA-256 of the file at its end.

        The SHA-256 inside depends on the values only, so it does not notice a change in the file's padding.

        Raises:
            OSError: the file cannot be written.
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
        """Invert `to_bytes`.

        Raises:
            RunError: the file is damaged, of another program, or of a newer format.
        """
        is_sealed = _check_seal(data)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # for a foreign file, the error below is enough
                values = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged file can raise any error
            reason = str(error).partition("\n")[0] or type(error).__name__
            if "weights_only" in reason:  # torch's message advises loading the file without this protection
                reason = "it does not contain only tensors and plain values"
            raise RunError(f"not readable ({reason})") from None
        if not isinstance(values, dict) or "sha256" not in values:
            raise RunError("not a checkpoint of this program")
        digest, file_format = values.pop("sha256"), values.pop("format", None)
        if file_format not in {FORMAT, *_READ_TOO}:
            raise RunError(f"its format is {file_format}, but this version reads format {FORMAT}")
        if file_format != _UNSEALED_FORMAT and not is_sealed:
            raise RunError("damaged: its end is missing")
        try:
            found = tree_digest({"format": file_format, **values})
        except (RuntimeError, TypeError, RecursionError) as error:  # for instance sparse tensors, which no run saves
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
        """Do nothing: the file is unbuffered."""


def _check_seal(data: bytes) -> bool:
    """Return whether the file has a seal. Raises RunError if the seal does not match."""
    if not (found := _SEAL.fullmatch(data[-_SEAL_BYTES:])):
        return False
    if hashlib.sha256(memoryview(data)[:-_SEAL_BYTES]).hexdigest().encode() != found[1]:
        raise RunError("damaged: its bytes do not match its SHA-256")
    return True


def tree_digest(tree: Any) -> str:
    """Return a SHA-256 of a tree of dicts, lists, tensors and plain values, the same on every machine.

    Dicts are hashed in the order of their keys, and tensors by path, dtype, shape and bytes in C order.
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
        # The tensor's memory without a copy: a copy would hold Python's lock, and training would wait.
        yield value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    else:
        yield f"{path}={value!r}\0".encode()


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
    path = folder / f"samples-{checkpoint.samples:015d}.pt"
    try:
        # The records go to the disk first, so that no checkpoint is ahead of its record.
        for record in folder.parent.glob("*.jsonl"):
            sync(record)
        write_atomically(path, checkpoint.write_to)
        _remove_old(folder, checkpoint.samples, keep, set(milestones))
    except OSError as error:
        raise RunError(f"checkpoint {path} could not be written: {error.strerror or error}") from error
    return path


def _remove_old(folder: Path, samples: int, keep: int, kept: set[int]) -> None:
    # Newer ones are damaged, otherwise the run would have resumed from them: they do not count for `keep`.
    older = [old for old in checkpoint_paths(folder) if _samples_of(old) <= samples]
    for old in older[:-keep]:
        if _samples_of(old) not in kept:
            old.unlink()


def checkpoint_paths(folder: Path) -> list[Path]:
    """Return the checkpoints of a run, oldest first."""
    return sorted(path for path in folder.glob("samples-*.pt") if _NAME.fullmatch(path.name))


def newest_good(folder: Path) -> tuple[bytes | None, list[str]]:
    """Return the content of the newest good checkpoint, and the paths of newer ones with the reasons to skip them.

    Raises:
        RunError: there are checkpoints, but all of them are damaged.
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
