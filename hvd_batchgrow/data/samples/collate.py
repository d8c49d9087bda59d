"""From the samples of a torch Dataset to a batch of inputs and targets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import default_collate

from hvd_batchgrow.data.tensor_tree import Tree, form_of, map_tensors
from hvd_batchgrow.messages.wording import with_article

TARGET_KEYS = ("target", "targets", "label", "labels")
"""Keys under which a dict sample may have its target."""
_RULE = f"return (inputs, target), or a dict with one of the keys {', '.join(TARGET_KEYS)}"


class SampleFault(ValueError):  # noqa: N818  # it names what is wrong with a sample
    """A sample of a Dataset cannot be used."""


def split_sample(sample: Any) -> tuple[Any, Any]:
    """Return the inputs and the target of a sample of a torch Dataset.

    The last part of a tuple or list is the target. If one part precedes it, that part is the inputs; if several do, the
    inputs are a tuple of them. In a dict, the target has one of `TARGET_KEYS`, and the inputs are the dict without it.

    Raises:
        SampleFault: the sample is neither; the message names the accepted forms.
    """
    if isinstance(sample, Mapping):
        found = [key for key in TARGET_KEYS if key in sample]
        if len(found) != 1 or len(sample) < 2:
            keys = ", ".join(map(repr, sample))
            fault = f"has {len(found)} keys for its target" if len(found) != 1 else "has no inputs besides its target"
            raise SampleFault(f"is a dict that {fault} ({keys}); {_RULE}")
        return {key: value for key, value in sample.items() if key != found[0]}, sample[found[0]]
    if not isinstance(sample, (tuple, list)) or len(sample) < 2:
        size = f" of {len(sample)} part" if isinstance(sample, (tuple, list)) else ""
        raise SampleFault(f"is {with_article(type(sample).__name__)}{size}; {_RULE}")
    *inputs, target = sample
    return (inputs[0] if len(inputs) == 1 else tuple(inputs)), target


def collate(samples: Sequence[tuple[Any, Any]]) -> tuple[Tree, Tree]:
    """Collate inputs and targets by torch's rules: numbers and arrays become tensors, and tensors are stacked.

    Args:
        samples: at least one pair of `split_sample`.

    Returns:
        Trees of tensors with a row for each sample.

    Raises:
        SampleFault: the samples differ in form, or a part of them cannot become a tensor.
    """
    try:
        inputs, targets = (default_collate([_plain(sample[part]) for sample in samples]) for part in (0, 1))
    except SampleFault:
        raise
    except (TypeError, RuntimeError, KeyError, ValueError) as error:
        forms = list(dict.fromkeys(_form_alone(sample) for sample in samples))
        if len(forms) > 1:
            fault = f"the samples of a batch differ: {forms[0]} and {forms[1]}"
            raise SampleFault(f"{fault}; give all samples one shape, for instance by padding or cropping") from error
        raise SampleFault(f"cannot become tensors: {' '.join(str(error).split())[:300]}") from error
    for name, tree in (("inputs", inputs), ("target", targets)):
        if (wrong := _not_a_tensor(tree, name)) is not None:
            raise SampleFault(wrong)
    inputs, targets = (map_tensors(Tensor.detach, tree) for tree in (inputs, targets))
    return inputs, targets


def masked_fault(array: object) -> str:
    """Return what is wrong with an array of which some entries are masked; empty for any other value."""
    if not isinstance(array, np.ma.MaskedArray) or not np.ma.is_masked(array):
        return ""
    count = int(np.ma.getmaskarray(array).sum())
    return f"has {count:,} of {array.size:,} entries masked; numpy.ma.filled(array, …) replaces them"


def _plain(value: Any) -> Any:
    """Return a value with tensors of subclasses as plain tensors, and with other mappings as dicts.

    Raises:
        SampleFault: an array has masked entries, of which a tensor would have the numbers below the mask.
    """
    if fault := masked_fault(value):
        raise SampleFault(f"an array {fault}")
    if isinstance(value, Tensor):
        return value.as_subclass(Tensor) if type(value) is not Tensor else value
    if isinstance(value, Mapping):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, (tuple, list)):
        parts = [_plain(part) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else parts
    return value


def _form_alone(sample: tuple[Any, Any]) -> str:
    """Return the form of one sample; its types if it cannot be collated."""
    try:
        return form_of(tuple(default_collate([_plain(part)]) for part in sample))
    except (TypeError, RuntimeError, AttributeError):
        return f"[{type(sample[0]).__name__}, {type(sample[1]).__name__}]"


def _not_a_tensor(tree: Any, name: str) -> str | None:
    if isinstance(tree, Tensor):
        return None
    if isinstance(tree, dict):
        parts = {f"{name}[{key!r}]": part for key, part in tree.items()}
    elif isinstance(tree, (tuple, list)) and not any(isinstance(part, (str, bytes)) for part in tree):
        parts = {f"{name}[{index}]": part for index, part in enumerate(tree)}
    else:
        kind = "text" if isinstance(tree, (tuple, list)) else type(tree).__name__
        return f"{name} is {kind}, which cannot become a tensor; remove it, or encode it as numbers"
    if not parts:
        return f"{name} is empty"
    return next((fault for key, part in parts.items() if (fault := _not_a_tensor(part, key))), None)
