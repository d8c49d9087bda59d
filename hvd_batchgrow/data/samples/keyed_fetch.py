"""A user's arrays whose `fetch` augments: it receives the epochs of the samples and keyed generators."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np

from hvd_batchgrow.data.datasets.dataset import Dataset, Ids, Targets
from hvd_batchgrow.data.datasets.subset import resolve
from hvd_batchgrow.data.datasets.wrapped_dataset import WrappedDataset
from hvd_batchgrow.data.order.keyed_generators import numpy_generators
from hvd_batchgrow.data.samples.reproducible import check_reproducible, ids_to_compare
from hvd_batchgrow.messages.errors import RunError

_KEYS = ("epochs", "generators")


class KeyedFetch(WrappedDataset):
    """A dataset whose `fetch` accepts `epochs`, `generators`, or both. `Dataset` describes the members.

    Args:
        samples: images of one size, or rows.
        keys: those of "epochs" and "generators" that its `fetch` accepts.
        seed: of the job.
    """

    def __init__(self, samples: Dataset, keys: tuple[str, ...], seed: int) -> None:
        super().__init__(samples)
        self._keys, self._seed = keys, seed

    @property
    def targets(self) -> Targets:
        """See `Dataset`."""
        return self._samples.targets

    def fetch(self, ids: Ids) -> Any:
        """Return some samples, drawn with epoch 0."""
        return self.fetch_of_epochs(ids, np.zeros(len(ids), dtype=np.int64))

    def fetch_of_epochs(self, ids: Ids, epochs: Ids) -> Any:
        """Return some samples, drawn with the given epochs, (n,)."""
        given: dict[str, Any] = {}
        if "epochs" in self._keys:
            given["epochs"] = epochs
        if "generators" in self._keys:
            given["generators"] = numpy_generators(self._seed, epochs, ids)
        return self._samples.fetch(ids, **given)


def with_keyed_fetch(samples: Dataset, seed: int) -> Dataset:
    """Return a dataset whose `fetch` receives epochs and generators; the dataset itself if it accepts only ids.

    Raises:
        RunError: it has encoded images, which the pipeline augments.
    """
    try:
        accepted = inspect.signature(samples.fetch).parameters
    except (AttributeError, TypeError, ValueError):  # no fetch; some compiled callables have no signature
        return samples
    keys = tuple(key for key in _KEYS if key in accepted)
    if keys and samples.kind == "encoded":
        fault = f"fetch of encoded images gets no {' and '.join(keys)}: it must return the bytes of each image"
        raise RunError(f"{samples.locate(0)}: {fault}; return images of one size to augment them")
    return KeyedFetch(samples, keys, seed) if keys else samples


def fetch_of_epochs(samples: Dataset, ids: Ids, epochs: Ids) -> Any:
    """Return some samples, drawn with the given epochs. Raises BadSample."""
    whole, whole_ids = resolve(samples, ids)
    return whole.fetch_of_epochs(whole_ids, epochs) if isinstance(whole, KeyedFetch) else samples.fetch(ids)


def check_same_again(samples: Dataset, place: str) -> None:
    """Fetch a few samples twice, and compare them. Raises RunError if they differ."""
    epochs = np.ones(1, dtype=np.int64)
    check_reproducible(
        lambda sample_id: fetch_of_epochs(samples, np.array([sample_id]), epochs),
        ids_to_compare(len(samples)).tolist(),
        lambda ours, theirs: _bytes(ours) == _bytes(theirs),
        lambda sample_id: f"{place}, {samples.locate(sample_id)}",
    )


def _bytes(fetched: Any) -> list[bytes]:
    return [np.asarray(sample).tobytes() for sample in fetched]
