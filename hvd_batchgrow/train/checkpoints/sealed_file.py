"""Files in torch's format that end with a SHA-256 of all bytes before it."""

from __future__ import annotations

import hashlib
import io
from typing import Any, BinaryIO

import torch

from hvd_batchgrow.messages.errors import RunError
from hvd_batchgrow.storage.atomic import UnbufferedFile
from hvd_batchgrow.storage.seal import check_seal, seal_of


def write_sealed(file: BinaryIO, values: dict[str, Any]) -> None:
    """Write torch's format, followed by a seal: a line with a SHA-256 of all bytes before it.

    Raises:
        OSError: the file cannot be written.
    """
    sink = _Sink(file)
    try:
        torch.save(values, sink)  # type: ignore[arg-type]
    except RuntimeError as error:
        raise sink.error or error from None
    sink.write(sink.seal())


def read_sealed(data: bytes) -> Any:
    """Return the values of a file of `write_sealed`, with their tensors on the CPU.

    Raises:
        RunError: the file is damaged, or another program wrote it.
    """
    check_seal(data)
    try:
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # a foreign file can raise any error
        reason = str(error).partition("\n")[0] or type(error).__name__
        if "weights only" in reason.lower().replace("_", " "):  # torch advises loading it without this protection
            reason = "it does not contain only tensors and plain values"
        raise RunError(f"not readable ({reason})") from None


class _Sink(UnbufferedFile):
    """A file with a SHA-256 of what was written. It keeps the system's error: torch's writer reports another one."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file)
        self._digest = hashlib.sha256()

    def seal(self) -> bytes:
        """Return the line that follows the content written so far."""
        return seal_of(self._digest)

    def write(self, data: bytes | memoryview) -> int:
        """Write all of the data, and add it to the SHA-256."""
        self._digest.update(data)
        return super().write(data)

    def flush(self) -> None:
        """Do nothing: the file is unbuffered."""
