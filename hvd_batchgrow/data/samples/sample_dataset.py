"""A torch Dataset as a set of samples."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from itertools import tee
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvd_batchgrow.config.source_specs import Kind
from hvd_batchgrow.config.task_specs import IGNORED_TOKEN
from hvd_batchgrow.data.datasets.class_labels import one_based_hint
from hvd_batchgrow.data.datasets.dataset import NO_SIZES, Ids
from hvd_batchgrow.data.datasets.example import Example
from hvd_batchgrow.data.samples.keyed_samples import Drawn, KeyedSamples, Request, drawn_or_raise
from hvd_batchgrow.data.samples.worker_pool import WorkerPool
from hvd_batchgrow.data.tensor_tree import Tree
from hvd_batchgrow.messages.errors import RunError

_NUM_EXAMPLES = 8


class SampleDataset:
    """One set of `KeyedSamples`, whose samples are trees of tensors. `Dataset` describes the members.

    Args:
        samples: all sets of the source.
        part: "train", "validation" or "test".
        pool: draws the samples of `read`; None: this process draws them.
        num_classes: the classes, if targets are class numbers, or the size of the vocabulary, if they are tokens; they
            are checked as they are read.
        has_tokens: whether targets are tokens, int64 (n, L).
    """

    kind: Kind = "samples"
    sizes: NDArray[np.int32] = NO_SIZES
    targets: Any = None
    """They are known only when the samples are drawn; see `read` and `example`."""

    def __init__(
        self, samples: KeyedSamples, part: str, pool: WorkerPool | None, num_classes: int, *, has_tokens: bool = False
    ) -> None:
        self._samples, self._part, self._pool, self._num_classes = samples, part, pool, num_classes
        self._has_tokens = has_tokens

    def __len__(self) -> int:
        return len(self._samples.sets[self._part])

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """Shape of a sample's inputs, if they are one tensor; otherwise ()."""
        inputs = self.example.inputs
        return tuple(inputs.shape[1:]) if hasattr(inputs, "shape") else ()

    def fetch(self, ids: Ids) -> Tree:
        """Return the inputs of some samples, drawn with epoch 0."""
        return self._draw(ids).inputs

    def read(self, requests: Iterator[tuple[Ids, Ids]]) -> Iterator[Drawn]:
        """Yield the samples of each request, in order, while workers draw those of the next requests.

        Args:
            requests: epochs and ids of the samples of a batch.

        Raises:
            RunError: `__getitem__` failed, or a target is not a class. It is raised when the batch is next.
        """
        to_draw, to_check = tee(Request(self._part, epochs, ids) for epochs, ids in requests)
        results = self._pool.draw(to_draw) if self._pool else map(self._samples.draw, to_draw)
        for request, result in zip(to_check, results, strict=False):
            drawn = drawn_or_raise(result)
            self._check_classes(drawn.targets, request.ids)
            yield drawn

    def locate(self, sample_id: int) -> str:
        """See `Dataset`."""
        return self._samples.locate(self._part, sample_id)

    @cached_property
    def example(self) -> Example:
        """The first samples, drawn with epoch 0."""
        drawn = self._draw(np.arange(min(_NUM_EXAMPLES, len(self))))
        return Example(drawn.inputs, drawn.targets)

    def draw(self, epochs: Ids, ids: Ids) -> Drawn:
        """Return some samples, drawn by this process. Raises RunError if `__getitem__` fails."""
        return drawn_or_raise(self._samples.draw(Request(self._part, epochs, ids)))

    def _draw(self, ids: Ids) -> Drawn:
        return self.draw(np.zeros(len(ids), dtype=np.int64), ids)

    def _check_classes(self, targets: Any, ids: Ids) -> None:
        """Check targets that look like class numbers, one integer per sample, and tokens."""
        if not hasattr(targets, "dtype") or targets.is_floating_point():
            return
        if targets.dim() != 1 and not self._has_tokens:
            return
        is_wrong = (targets < 0) | (targets >= self._num_classes)
        if self._has_tokens:
            is_wrong &= targets != IGNORED_TOKEN
        wrong = is_wrong.nonzero().tolist()
        if wrong:
            place = tuple(wrong[0])
            shown = f"{self.locate(int(ids[place[0]]))} has the target {int(targets[place])}"
            rest = f", or {IGNORED_TOKEN} where a token does not count" if self._has_tokens else ""
            least, largest = int(targets.min()), int(targets.max())
            hint = "" if self._has_tokens else one_based_hint(least, largest, self._num_classes)
            raise RunError(f"{shown}; targets must be in 0 … {self._num_classes - 1} (data.num_classes){rest}{hint}")
