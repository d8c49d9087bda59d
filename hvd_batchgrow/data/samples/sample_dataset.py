"""A torch Dataset as a set of samples."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from itertools import tee
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hvd_batchgrow.config.source_specs import Kind
from hvd_batchgrow.config.task_specs import IGNORED_TOKEN, TargetKind
from hvd_batchgrow.data.datasets.class_labels import one_based_hint
from hvd_batchgrow.data.datasets.dataset import NO_SIZES, Ids
from hvd_batchgrow.data.datasets.example import Example
from hvd_batchgrow.data.samples.keyed_samples import Drawn, KeyedSamples, Request, drawn_or_raise
from hvd_batchgrow.data.samples.worker_pool import WorkerPool
from hvd_batchgrow.data.tensor_tree import Tree
from hvd_batchgrow.messages.errors import RunError
from hvd_batchgrow.messages.wording import shown

_NUM_EXAMPLES = 8
_SUM_TOLERANCE = 1e-3
"""Largest difference of the sum of probabilities from 1, or the resolution of their type if that is larger."""


class SampleDataset:
    """One set of `KeyedSamples`, whose samples are trees of tensors. `Dataset` describes the members.

    Args:
        samples: all sets of the source.
        part: "train", "validation" or "test".
        pool: draws the samples of `read`; None: this process draws them.
        num_classes: the classes, if targets are class numbers, or the size of the vocabulary, if they are tokens.
        target: that the task needs; classes, their probabilities and tokens are checked as they are read.
    """

    kind: Kind = "samples"
    sizes: NDArray[np.int32] = NO_SIZES
    targets: Any = None
    """They are known only when the samples are drawn; see `read` and `example`."""

    def __init__(
        self, samples: KeyedSamples, part: str, pool: WorkerPool | None, num_classes: int, target: TargetKind | None
    ) -> None:
        self._samples, self._part, self._pool, self._num_classes = samples, part, pool, num_classes
        self._target = target

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
            RunError: `__getitem__` failed, or a target is not what the task needs. It is raised when the batch is next.
        """
        to_draw, to_check = tee(Request(self._part, epochs, ids) for epochs, ids in requests)
        results = self._pool.draw(to_draw) if self._pool else map(self._samples.draw, to_draw)
        for request, result in zip(to_check, results, strict=False):
            drawn = drawn_or_raise(result)
            self._check_targets(drawn.targets, request.ids)
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

    def _check_targets(self, targets: Any, ids: Ids) -> None:
        """Check classes (n,), probabilities of classes (n, C), and tokens (n, L)."""
        if self._target not in {"class", "tokens"} or not isinstance(targets, Tensor):
            return
        if self._target == "class" and targets.is_floating_point():
            self._check_probabilities(targets, ids)
            return
        found, has_tokens = targets.long(), self._target == "tokens"  # some unsigned types have no comparison
        is_wrong = (found < 0) | (found >= self._num_classes)
        if has_tokens:
            is_wrong &= found != IGNORED_TOKEN
        wrong = is_wrong.nonzero().tolist()
        if wrong:
            place = tuple(wrong[0])
            given = f"{self.locate(int(ids[place[0]]))} has the target {int(found[place])}"
            rest = f", or {IGNORED_TOKEN} where a token does not count" if has_tokens else ""
            hint = "" if has_tokens else one_based_hint(int(found.min()), int(found.max()), self._num_classes)
            raise RunError(f"{given}; targets must be in 0 … {self._num_classes - 1} (data.num_classes){rest}{hint}")

    def _check_probabilities(self, targets: Tensor, ids: Ids) -> None:
        tolerance = max(_SUM_TOLERANCE, torch.finfo(targets.dtype).eps)
        is_right = (targets >= 0).all(1) & ((targets.double().sum(1) - 1).abs() <= tolerance)
        wrong = (~is_right).nonzero().flatten().tolist()
        if wrong:
            given = f"{self.locate(int(ids[wrong[0]]))} has the target {shown(targets[wrong[0]].tolist())}"
            rule = "for classification, probabilities of the classes must be at least 0 and have the sum 1"
            raise RunError(f"{given}; {rule}; for labels or numbers, set task.name = 'multi_label' or 'regression'")
