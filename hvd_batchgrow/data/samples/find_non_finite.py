"""Find the sample with a NaN or an infinity, after a loss was not finite."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from hvd_batchgrow.data.datasets.dataset import Dataset, Ids
from hvd_batchgrow.data.datasets.subset import resolve
from hvd_batchgrow.data.samples.keyed_fetch import fetch_of_epochs
from hvd_batchgrow.data.samples.sample_dataset import SampleDataset
from hvd_batchgrow.data.tensor_tree import tensors_in
from hvd_batchgrow.messages.errors import RunError

_MOST_SAMPLES = 16_384
"""Samples that are read again at most, which may take as many seconds as they took before."""
_CHUNK = 64


def non_finite_sample(samples: Dataset, epochs: Ids, ids: Ids) -> str | None:
    """Return which of some samples is the first with a value that is not finite, such as `the input of … has a NaN`.

    Args:
        samples: the set. Images and tokens are integers, which are always finite.
        epochs: of the samples, which key their random numbers, (n,).
        ids: of the samples, (n,).

    Returns:
        None if all are finite, or cannot be read again.
    """
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
    return None


def _draw(samples: Dataset, epochs: Ids, ids: Ids) -> dict[str, Any]:
    """Return the inputs of samples, and of a torch Dataset their targets; nothing if they are integers."""
    whole, whole_ids = resolve(samples, ids)
    if isinstance(whole, SampleDataset):
        drawn = whole.draw(epochs, whole_ids)
        return {"input": drawn.inputs, "target": drawn.targets}
    if samples.kind != "rows":
        return {}
    return {"input": torch.from_numpy(np.asarray(fetch_of_epochs(samples, ids, epochs)))}
