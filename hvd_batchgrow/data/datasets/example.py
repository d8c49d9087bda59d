"""Samples for trial passes of a network, before training starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hvd_batchgrow.data.datasets.dataset import Dataset
from hvd_batchgrow.data.datasets.subset import whole_of
from hvd_batchgrow.data.tensor_tree import Tree, form_of, num_rows, take_rows


@dataclass(frozen=True)
class Example:
    """A few samples of a dataset whose inputs are not just numbers of one shape, such as token ids or several tensors.

    A dataset whose `kind` is "samples" has one as its attribute `example`.
    """

    inputs: Tree
    """n >= 1 samples, as the pipeline would give them to the network, on the CPU."""
    targets: Any
    """Their targets."""

    def take(self, count: int) -> Example:
        """Return so many samples; if there are too few, from the first one again."""
        rows = [index % num_rows(self.inputs) for index in range(count)]
        return Example(take_rows(self.inputs, rows), take_rows(self.targets, rows))

    @property
    def shape(self) -> tuple[int, ...] | None:
        """Shape of one sample, (C, H, W) or (features,), if the inputs are like images or rows; otherwise None."""
        inputs = self.inputs
        if not isinstance(inputs, Tensor) or not inputs.is_floating_point() or inputs.dim() not in {2, 4}:
            return None
        return tuple(inputs.shape[1:])

    def __str__(self) -> str:
        return form_of(self.inputs)


InputForm = Sequence[int] | Example
"""What the inputs of a network are: the shape of one sample of random numbers, or real samples."""


def input_form(samples: Dataset) -> InputForm:
    """Return the shape of a dataset's samples; the example of a dataset that has one."""
    return getattr(whole_of(samples), "example", None) or samples.shape
