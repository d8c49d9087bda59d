"""Load the weights of a file into a network, and report everything that does not fit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn

from hvd_batchgrow.messages.errors import MOST_REPORTED, Fault, JobError, describe_error
from hvd_batchgrow.messages.wording import counted
from hvd_batchgrow.nn.ghost.ghost_batch_norm import GhostBatchNorm
from hvd_batchgrow.nn.name_patterns import names_of_parameters
from hvd_batchgrow.nn.weights_file import WeightsFile

_PREFIXES = ("module.", "_orig_mod.", "model.")
"""What DataParallel and DistributedDataParallel, `torch.compile` and Lightning put before all names."""


def load_weights(model: nn.Module, file: WeightsFile, num_classes: int, *, allow_new_head: bool) -> list[str]:
    """Load all weights of a file, whose names must be those of the network before its norms became ghost norms.

    Args:
        model: changed in place, if everything fits.
        file: from `read_weights`.
        num_classes: number of classes of the data.
        allow_new_head: whether a classifier keeps its values if the file does not have it, has it with another number
            of classes, or has the other kind of classifier, linear or Hadamard. False: each of these is a fault.

    Returns:
        Notes for the user.

    Raises:
        JobError: names or shapes differ; the message lists the differences, with the nearest names.
    """
    own = model.state_dict()
    values, prefix = _renamed(file.values, own)
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, GhostBatchNorm):
            values.pop(f"{name}.num_batches_tracked".removeprefix("."), None)
    faults = _add_tied(model, values)
    heads = [names for names in _classifiers(model, num_classes) if _is_other_head(names, own, values)]
    skipped = {name for names in heads for name in names if allow_new_head}
    unused = {name for names in heads for name in _of_other_kind(names, values) if allow_new_head}
    loaded = {name: value for name, value in values.items() if name not in skipped | unused}
    faults += _differences(loaded, {name: value for name, value in own.items() if name not in skipped})
    if faults and heads and not allow_new_head:
        faults.append(f"{_about(heads, values, num_classes)}; model.allow_new_head = true keeps its initial weights")
    if faults:
        raise JobError([Fault("model.pretrained", f"{file.path}: {fault}") for fault in faults])
    try:
        model.load_state_dict(loaded | {name: own[name] for name in skipped})
    except Exception as error:  # extra state is loaded by the user's own code
        raise JobError([Fault("model.pretrained", f"{file.path}: {describe_error(error)}")]) from error
    entry = f", from its entry {file.entry}" if file.entry else ""
    without = f", without the prefix {prefix}" if prefix else ""
    notes = [f"initial weights: {counted(len(loaded), 'tensor')} of {file.path}{entry}{without}"]
    if skipped:
        notes.append(f"{_about(heads, values, num_classes)}: it keeps its initial weights")
    if types := sorted({text for name, value in loaded.items() if (text := _conversion(value, own[name]))}):
        notes.append(f"initial weights are converted from {', '.join(types)}")
    return notes


def _renamed(values: Mapping[str, Any], own: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """Return the values without the prefixes that wrappers have put before all their names, and these prefixes."""
    removed = ""
    while prefix := next((prefix for prefix in _PREFIXES if _is_additional(prefix, values, own)), ""):
        removed += prefix
        values = {name.removeprefix(prefix): value for name, value in values.items()}
    if not any("._orig_mod." in name for name in own):  # modules within the network may have been compiled
        values = {name.replace("._orig_mod.", "."): value for name, value in values.items()}
    return dict(values), removed


def _is_additional(prefix: str, values: Mapping[str, Any], own: Mapping[str, Any]) -> bool:
    if not all(name.startswith(prefix) for name in values):
        return False
    before = len(values.keys() & own.keys())
    after = len({name.removeprefix(prefix) for name in values} & own.keys())
    return after > before or not (before or any(name.startswith(prefix) for name in own))


def _add_tied(model: nn.Module, values: dict[str, Any]) -> list[str]:
    """Add the further names of tied parameters, of which some formats save one only. Return faults."""
    faults = []
    for names in names_of_parameters(model).values():
        first, *others = [name for name in names if name in values] or [""]
        for name in names if first else ():
            values.setdefault(name, values[first])
        faults += [
            f"{first} and {other} are one parameter of the network, but differ in the file"
            for other in others
            if not _is_equal(values[first], values[other])
        ]
    return faults


def _is_equal(a: Any, b: Any) -> bool:
    return isinstance(a, Tensor) and isinstance(b, Tensor) and torch.equal(a, b)


def _classifiers(model: nn.Module, num_classes: int) -> Iterator[list[str]]:
    """Yield the names of the parameters of each module whose weight has a row for each class."""
    for path, module in model.named_modules():
        own = dict(module.named_parameters(prefix=path, recurse=False))
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.ndim > 1 and len(weight) == num_classes and own:
            yield list(own)


def _is_other_head(names: list[str], own: Mapping[str, Tensor], values: Mapping[str, Any]) -> bool:
    """Return whether a file lacks a classifier, or has one of the other kind or with another number of rows."""
    found = [(own[name], values[name]) for name in names if name in values]
    if not found or _of_other_kind(names, values):
        return True
    is_row = [theirs.ndim == ours.ndim and theirs.shape[1:] == ours.shape[1:] for ours, theirs in found]
    return len(found) == len(names) and all(is_row) and any(theirs.shape != ours.shape for ours, theirs in found)


def _of_other_kind(names: list[str], values: Mapping[str, Any]) -> set[str]:
    """Return the name of the tensor that only the other kind of a classifier has, if a file has it; otherwise nothing.

    A linear classifier has a weight and no scale. A Hadamard classifier has a scale, and files do not have its weight.
    """
    path = names[0].rpartition(".")[0]
    weight, scale = (f"{path}.{name}".removeprefix(".") for name in ("weight", "scale"))
    pairs = {weight: scale, scale: weight}
    return {theirs for theirs, own in pairs.items() if own in names and own not in values and theirs in values}


def _differences(values: Mapping[str, Any], own: Mapping[str, Any]) -> list[str]:
    """Return a line for each name that the network or the file lacks, and for each tensor of another shape or kind."""
    missing, unexpected = ([name for name in a if name not in b] for a, b in ((own, values), (values, own)))
    lines = [f"{name} {_described(own[name])} is missing{_near(name, own, unexpected, values)}" for name in missing]
    lines += [
        f"{name} {_described(values[name])} is not in the network{_near(name, values, missing, own)}"
        for name in unexpected
    ]
    lines += [
        f"{name} is {_described(values[name])}, must be {_described(own[name])}"
        for name in own
        if name in values and not _fits(values[name], own[name])
    ]
    return lines


def _fits(theirs: Any, ours: Any) -> bool:
    if not isinstance(ours, Tensor) or not isinstance(theirs, Tensor):
        return isinstance(ours, Tensor) == isinstance(theirs, Tensor)
    return theirs.shape == ours.shape and _kind(theirs) == _kind(ours)


def _kind(tensor: Tensor) -> tuple[bool, bool]:
    """Return what a conversion must not change: whether a type has fractions, and whether it has imaginary parts."""
    return tensor.is_floating_point(), tensor.is_complex()


def _described(value: Any) -> str:
    if not isinstance(value, Tensor):
        return "extra state"
    kind = "" if value.is_floating_point() else f" of {str(value.dtype).removeprefix('torch.')}"
    return f"{tuple(value.shape)}{kind}"


def _near(name: str, of: Mapping[str, Any], others: list[str], theirs: Mapping[str, Any]) -> str:
    """Suggest the most similar name, preferably one with the same shape."""
    if not others or len(others) > 10 * MOST_REPORTED:
        return ""
    alike = [other for other in others if _fits(of[name], theirs[other])]
    near = get_close_matches(name, alike, n=1, cutoff=0.3) or get_close_matches(name, others, n=1, cutoff=0.6)
    return f"; nearest: {near[0]}" if near else ""


def _about(heads: list[list[str]], values: Mapping[str, Any], num_classes: int) -> str:
    names = [name for of in heads for name in of]
    if others := [name for of in heads for name in _of_other_kind(of, values)]:
        kinds = ("linear", "hadamard") if others[0].endswith("weight") else ("hadamard", "linear")
        return f"the classifier ({', '.join(names)}) is {kinds[0]} in the file, {kinds[1]} in the job"
    size = next((len(values[name]) for name in names if name in values), None)
    where = f"has {size} classes in the file, {num_classes} in the data" if size else "is not in the file"
    return f"the classifier ({', '.join(names)}) {where}"


def _conversion(value: Any, own: Any) -> str:
    """Return from which type to which a tensor is converted; empty if its type stays."""
    if not isinstance(value, Tensor) or value.dtype == own.dtype:
        return ""
    return " to ".join(str(tensor.dtype).removeprefix("torch.") for tensor in (value, own))
