"""Read a file of weights: a `state_dict` that torch or safetensors saved."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hvd_batchgrow.messages.errors import Fault, JobError, reason_of
from hvd_batchgrow.messages.suggest import near_path
from hvd_batchgrow.nn.state.extra_state import is_extra_state
from hvd_batchgrow.storage.regular_files import read_regular

ENTRIES = ("state_dict", "model_state_dict", "model")
"""Entries of a checkpoint that hold the weights; the first that exists is used."""


@dataclass(frozen=True)
class WeightsFile:
    """The content of a file of weights."""

    path: str
    sha256: str
    """Of the file, in hexadecimal digits."""
    entry: str
    """Path of the entry that holds the weights, such as state_dict; empty: the file holds nothing else."""
    values: dict[str, Any]
    """Tensors, and plain values of extra state, by their names in the file."""


def read_weights(path: str) -> WeightsFile:
    """Read a .safetensors file by safetensors, any other by `torch.load` with `weights_only=True`. No code is run.

    Raises:
        JobError: the file cannot be read, or does not hold weights.
    """
    try:
        data = read_regular(Path(path))
    except OSError as error:
        raise _refusal(f"{path} cannot be read: {reason_of(error)}{near_path(Path(path))}") from None
    values = _from_safetensors(path, data) if path.endswith(".safetensors") else _from_torch(path, data)
    entries: list[str] = []
    while found := [key for key in ENTRIES if isinstance(values, Mapping) and isinstance(values.get(key), Mapping)]:
        values = values[found[0]]
        entries.append(found[0])
    if fault := _fault(values):
        where = f"{path}, entry {'.'.join(entries)}," if entries else path
        raise _refusal(f"{where} is not a state_dict: {fault}; save model.state_dict()")
    return WeightsFile(path, hashlib.sha256(data).hexdigest(), ".".join(entries), dict(values))


def _from_safetensors(path: str, data: bytes) -> dict[str, Tensor]:
    try:
        from safetensors.torch import load
    except ImportError:
        raise _refusal(f"{path} needs the package safetensors: pip install safetensors") from None
    try:
        return load(data)
    except Exception as error:  # its own class, and any other for damaged contents
        raise _refusal(f"{path} is damaged, or not a safetensors file: {_first_line(error)}") from None


def _from_torch(path: str, data: bytes) -> Any:
    try:
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # a foreign file can raise any error
        reason = _first_line(error)
        if "weights_only" in str(error):  # torch's message advises loading the file without this protection
            reason = "it does not hold only tensors and plain values; save model.state_dict()"
        raise _refusal(f"{path} cannot be read as weights: {reason}") from None


def _fault(values: Any) -> str | None:
    """Return why a value is not a `state_dict`; None if it is."""
    if not isinstance(values, Mapping):
        return f"it is a {type(values).__name__}"
    for name, value in values.items():
        if not isinstance(name, str):
            return f"it has the key {name!r}, which is not text"
        if not isinstance(value, Tensor) and not is_extra_state(name):
            return f"{name} is a {type(value).__name__}"
        if isinstance(value, Tensor) and (value.layout != torch.strided or value.is_quantized):
            return f"{name} is sparse or quantized"
    return None if values else "it is empty"


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _refusal(fault: str) -> JobError:
    return JobError([Fault("model.pretrained", fault)])
