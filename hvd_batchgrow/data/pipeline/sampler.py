"""Feeds: what pipelines are fed, group by group: bytes or pixels, and where to cut them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvd_batchgrow.data.datasets.dataset import BadSample, Dataset, Ids, raise_bad
from hvd_batchgrow.data.order.stream import Stream, sample_draws
from hvd_batchgrow.data.pipeline.crops import Augment, CropParams
from hvd_batchgrow.messages.errors import RunError

OnBad = Callable[[BadSample], None]
"""Told of a sample that is replaced from now on; raises it instead where the job wants that."""

_DRAWN_AT_ONCE = 2048
"""Samples whose ids and draws are made by one call: what it costs beside its numbers is spread over them."""


@dataclass(frozen=True)
class RawBatch:
    """Samples that go through a pipeline together."""

    group: int
    """Its number in the feed, by which a pipeline that is opened anew goes on behind it."""
    entries: Ids
    """(γ,) their places in the stream."""
    ids: Ids
    """(γ,) the samples that stand there, after replacement of bad ones."""
    labels: NDArray[np.int64]
    """(γ,)."""
    values: Any
    """Of `Dataset.fetch`."""
    placement: CropParams | None
    """None for rows."""
    replaced: NDArray[np.bool_]
    """(γ,) where another sample stands than the stream has there."""


class TrainSampler:
    """The groups of one rank, in stream order.

    A bad sample's place is taken by the sample of the next place in the stream, and so on until one
    is good: the same one in every layout.

    Args:
        samples: the training set.
        stream: over its ids.
        augment: how images are placed; None for rows.
        group: γ.
        on_bad_sample: asked before a bad sample is replaced.
    """

    def __init__(
        self, samples: Dataset, stream: Stream, augment: Augment | None, group: int, on_bad_sample: OnBad = raise_bad
    ) -> None:
        self.samples, self.stream, self.augment, self.group, self.on_bad_sample = (
            samples,
            stream,
            augment,
            group,
            on_bad_sample,
        )
        self._bad = known_bad(samples)
        self.not_for_dali: set[int] = set()
        """Samples that DALI failed on and Pillow decodes."""

    def raw_groups(self, first_group: int, stride: int) -> Iterator[RawBatch]:
        """Groups first_group, first_group + stride, … without an end. Raises BadSample as it meets one."""
        num_groups = max(1, _DRAWN_AT_ONCE // self.group)
        for start in count(first_group, num_groups * stride):
            groups = range(start, start + num_groups * stride, stride)
            entries = (np.array(groups)[:, None] * self.group + np.arange(self.group)).reshape(-1)
            epochs, ids, replaced = self._good(entries)
            placement = self._place(epochs, ids)
            for j, group in enumerate(groups):
                part = slice(j * self.group, (j + 1) * self.group)
                yield _fill(
                    self.samples, group, entries[part], ids[part], placement and placement[part], replaced[part]
                )

    def replace(self, bad: BadSample) -> None:
        """From now on take others in its place. Raises what `on_bad_sample` does."""
        self.on_bad_sample(bad)
        self._bad.add(bad.sample_id)

    def _place(self, epochs: Ids, ids: Ids) -> CropParams | None:
        if self.augment is None:
            return None
        draws = sample_draws(self.stream.seed, epochs, ids, self.augment.num_draws)
        return self.augment.sample_crops(draws, sizes_of(self.samples, ids))

    def _good(self, entries: Ids) -> tuple[Ids, Ids, NDArray[np.bool_]]:
        """Epochs and ids of places in the stream, none of them bad, and which were replaced."""
        epochs, ids = self.stream.at(entries)
        replaced = np.zeros(len(entries), dtype=bool)
        if not self._bad:
            return epochs, ids, replaced
        if len(self._bad) == len(self.samples):
            raise RunError(f"all {len(self.samples)} training samples are bad: {self.samples.locate(0)}, …")
        bad = np.array(sorted(self._bad))
        ahead = 1
        while len(where := np.flatnonzero(np.isin(ids, bad))):
            epochs[where], ids[where] = self.stream.at(entries[where] + ahead)
            replaced[where] = True
            ahead += 1
        return epochs, ids, replaced


class EvalSampler:
    """Stretches of a set, in order and without augmentation; samples known to be bad are left out.

    Args:
        samples: the test set.
        augment: a rule without draws; None for rows.
        chunks: the stretches.
        on_bad_sample: asked before a bad sample is left out.
    """

    def __init__(
        self, samples: Dataset, augment: Augment | None, chunks: Sequence[range], on_bad_sample: OnBad = raise_bad
    ) -> None:
        self.samples, self.augment, self.chunks, self.on_bad_sample = samples, augment, chunks, on_bad_sample
        self._bad = known_bad(samples)
        self.not_for_dali: set[int] = set()
        """Samples that DALI failed on and Pillow decodes."""

    def raw_groups(self, first_group: int, stride: int) -> Iterator[RawBatch]:
        """The stretches from one on. Raises BadSample as it meets one."""
        for group in range(first_group, len(self.chunks), stride):
            chunk = self.chunks[group]
            ids = np.array([k for k in chunk if k not in self._bad], dtype=np.int64)
            placement = None
            if self.augment is not None:
                placement = self.augment.sample_crops(np.empty((len(ids), 0)), sizes_of(self.samples, ids))
            if len(ids):
                yield _fill(self.samples, group, ids, ids, placement, np.zeros(len(ids), dtype=bool))

    def replace(self, bad: BadSample) -> None:
        """From now on leave it out. Raises what `on_bad_sample` does."""
        self.on_bad_sample(bad)
        self._bad.add(bad.sample_id)


Sampler = TrainSampler | EvalSampler


def _fill(
    samples: Dataset,
    group: int,
    entries: Ids,
    ids: Ids,
    placement: CropParams | None,
    replaced: NDArray[np.bool_],
) -> RawBatch:
    return RawBatch(group, entries, ids, samples.labels[ids], samples.fetch(ids), placement, replaced)


def sizes_of(samples: Dataset, ids: Ids) -> NDArray[np.int32]:
    """(n, 2) height and width of images."""
    if samples.kind == "encoded":
        return samples.sizes[ids]
    return np.broadcast_to(np.array(samples.shape[:2], dtype=np.int32), (len(ids), 2))


def known_bad(samples: Dataset) -> set[int]:
    """Ids of samples that were found to be bad when the source was indexed."""
    return set(np.flatnonzero(samples.sizes.min(axis=1) == 0).tolist()) if samples.kind == "encoded" else set()
