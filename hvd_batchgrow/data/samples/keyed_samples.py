"""Draw samples of torch Datasets, with random generators that are keyed by (seed, epoch, sample id)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from hvd_batchgrow.data.datasets.dataset import Ids
from hvd_batchgrow.data.order.keyed_generators import sample_words, seed_global_generators, separate_generators
from hvd_batchgrow.data.samples.collate import SampleFault, collate, split_sample
from hvd_batchgrow.data.tensor_tree import Tree, form_of
from hvd_batchgrow.messages.errors import RunError, describe_error


class Request(NamedTuple):
    """Samples to draw."""

    part: str
    """Name of their set: "train", "validation" or "test"."""
    epochs: Ids
    """(n,) the epoch of each sample, which keys its random numbers."""
    ids: Ids
    """(n,) sample ids."""


class Drawn(NamedTuple):
    """n samples, collated."""

    inputs: Tree
    targets: Tree


class Failed(NamedTuple):
    """Why samples could not be drawn. It is returned because some exceptions cannot be pickled."""

    message: str


@dataclass(frozen=True)
class KeyedSamples:
    """The sets of a source, each an object with `__getitem__` and `__len__`.

    Before each `__getitem__`, the global generators of `random`, NumPy and torch are seeded from (seed, epoch, sample
    id). A sample is then the same in every process, and does not depend on the samples drawn before.
    """

    source: str
    """`data.source`, for messages."""
    sets: Mapping[str, Any]
    seed: int
    form: str = ""
    """`form_of` inputs and targets, which all samples must have; empty: any."""

    def draw(self, request: Request) -> Drawn | Failed:
        """Draw samples and collate them. The global generators of this process are the same before and after."""
        with separate_generators():
            samples = []
            all_words = sample_words(self.seed, request.epochs, request.ids).tolist()
            for epoch, sample_id, words in zip(request.epochs.tolist(), request.ids.tolist(), all_words, strict=True):
                seed_global_generators(words)
                try:
                    samples.append(split_sample(self.sets[request.part][sample_id]))
                except Exception as error:  # the user's own code
                    return Failed(f"{self.locate(request.part, sample_id)}, epoch {epoch}, {_reason(error)}")
            try:
                drawn = Drawn(*collate(samples))
            except SampleFault as error:
                return Failed(f"{self._locate_all(request)}: {error}")
        return self._with_known_form(request, drawn)

    def _with_known_form(self, request: Request, drawn: Drawn) -> Drawn | Failed:
        form = form_of(drawn)
        if self.form and form != self.form:
            fault = f"{self._locate_all(request)}: [inputs, target] are {form}; those of training sample 0 are"
            return Failed(f"{fault} {self.form}. All samples must have one form")
        return drawn

    def locate(self, part: str, sample_id: int) -> str:
        """Return the location of a sample, for messages."""
        kind = type(self.sets[part]).__name__
        return f"data.source = {self.source!r}, {_PART_TEXT[part]} ({kind}), sample {sample_id}"

    def _locate_all(self, request: Request) -> str:
        ids = request.ids.tolist()
        others = f" and the {len(ids) - 1} after it" if len(ids) > 1 else ""
        return self.locate(request.part, ids[0]) + others


_PART_TEXT = {"train": "training set", "validation": "validation set", "test": "test set"}


def _reason(error: Exception) -> str:
    if isinstance(error, SampleFault):
        return str(error)
    return f"failed: {error if isinstance(error, RunError) else describe_error(error)}"


def drawn_or_raise(result: Drawn | Failed) -> Drawn:
    """Return what was drawn. Raise RunError if it failed."""
    if isinstance(result, Failed):
        raise RunError(result.message)
    return result
