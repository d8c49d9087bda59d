"""Find the sample with a NaN, an infinity or a target that the task refuses, after a loss was not finite."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hvd_batchgrow.data.datasets.dataset import Dataset, Ids
from hvd_batchgrow.data.datasets.subset import resolve
from hvd_batchgrow.data.samples.keyed_fetch import fetch_of_epochs
from hvd_batchgrow.data.samples.sample_dataset import SampleDataset
from hvd_batchgrow.data.tensor_tree import tensors_in
from hvd_batchgrow.messages.errors import RunError
from hvd_batchgrow.messages.wording import shown

_MOST_SAMPLES = 16_384
"""Samples that are read again at most, which may take as many seconds as they took before."""
_CHUNK = 64


Check = Callable[[Any], object]
"""A task's `check_targets`, which raises an error for targets (n, …) that it refuses."""


def non_finite_sample(samples: Dataset, epochs: Ids, ids: Ids, check: Check | None = None) -> str | None:
    """Return which of some samples is the first with a value that is not finite, such as `the input of … has a NaN`.

    If the values are finite, return which one is the first whose target the task refuses.

    Args:
        samples: the set. Images and tokens are integers, which are always finite.
        epochs: of the samples, which key their random numbers, (n,).
        ids: of the samples, (n,).
        check: of the task; None: it accepts all finite targets.

    Returns:
        None if all are finite and accepted, or cannot be read again.
    """
    refused = None
    for start in range(0, min(len(ids), _MOST_SAMPLES), _CHUNK):
        part = slice(start, start + _CHUNK)
        try:
            drawn = _draw(samples, epochs[part], ids[part])
        except RunError:
            return None
        for what, tree in drawn.items():
            for tensor in tensors_in(tree):
                wrong = (~torch.isfinite(tensor.reshape(len(tensor), -1)).all(1)).nonzero()
                if len(wrong):
                    row = int(wrong[0])
                    value = "a NaN" if tensor[row].isnan().any() else "an infinite value"
                    return f"the {what} of {samples.locate(int(ids[part][row]))} has {value}"
        if check and not refused and isinstance(targets := drawn.get("target"), Tensor):
            refused = _refused(samples, ids[part], targets, check)
    return refused


def _refused(samples: Dataset, ids: Ids, targets: Tensor, check: Check) -> str | None:
    """Return which sample is the first whose target the task refuses, and the first clause of its error."""
    for sample_id, target in zip(ids.tolist(), targets, strict=True):
        try:
            check(target[None].numpy())
        except Exception as error:  # perhaps the user's own code
            rule = str(error).partition(";")[0]
            return f"the target of {samples.locate(sample_id)} is {shown(target.tolist())}, which is refused: {rule}"
    return None


def _draw(samples: Dataset, epochs: Ids, ids: Ids) -> dict[str, Any]:
    """Return inputs and targets of samples, without images and tokens, and without targets that are in an array."""
    whole, whole_ids = resolve(samples, ids)
    if isinstance(whole, SampleDataset):
        drawn = whole.draw(epochs, whole_ids)
        return {"input": drawn.inputs, "target": drawn.targets}
    found: dict[str, Any] = {}
    if samples.kind == "rows":
        found["input"] = torch.from_numpy(np.asarray(fetch_of_epochs(samples, ids, epochs)))
    if not isinstance(whole.targets, np.ndarray) and (targets := np.asarray(samples.targets[ids])).dtype.kind == "f":
        found["target"] = torch.from_numpy(targets)
    return found
