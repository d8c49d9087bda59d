"""The seal of a checkpoint: a last line with a SHA-256 of all bytes before it."""

from __future__ import annotations

import hashlib
import re
from typing import TYPE_CHECKING

from hvd_batchgrow.messages.errors import RunError

if TYPE_CHECKING:
    from hashlib import _Hash

_SEAL = re.compile(rb"\nsha256 ([0-9a-f]{64})\n")
_SEAL_BYTES = 73


def seal_of(digest: _Hash) -> bytes:
    """Return the line that follows content with this SHA-256."""
    return f"\nsha256 {digest.hexdigest()}\n".encode()


def check_seal(data: bytes) -> None:
    """Raise RunError if the seal is missing or does not match."""
    if not (found := _SEAL.fullmatch(data[-_SEAL_BYTES:])):
        raise RunError("cut short, or not a checkpoint of this program: it does not end with a SHA-256")
    if hashlib.sha256(memoryview(data)[:-_SEAL_BYTES]).hexdigest().encode() != found[1]:
        raise RunError("damaged: its bytes do not match its SHA-256")
