"""Samples for trial passes of a network, before training starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hvd_batchgrow.config.task_specs import TargetKind
from hvd_batchgrow.data.datasets.dataset import Dataset, Datasets
from hvd_batchgrow.data.datasets.subset import whole_of
from hvd_batchgrow.data.tensor_tree import Tree, form_of, num_rows, take_rows


@dataclass(frozen=True)
class Example:
    """A few samples of a dataset whose inputs are not just numbers of one shape, such as token ids or several tensors.

    A dataset whose `kind` is "samples" has one as its attribute `example`. For tokens, `source_form` makes one.
    """

    inputs: Tree
    """n >= 1 samples, as the pipeline would give them to the network, on the CPU."""
    targets: Any
    """Their targets."""

    def take(self, count: int) -> Example:
        """Return `count` samples; if there are too few, the samples are repeated from the first one."""
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


_NUM_SAMPLES = 8

InputForm = Sequence[int] | Example
"""Form of a network's inputs: the shape of one sample, for which random numbers are drawn, or real samples."""


def source_form(source: Datasets, target: TargetKind | None) -> InputForm:
    """Return the form of the inputs of a network for a source: its `input_form`, or random tokens of its vocabulary.

    Args:
        source: the samples.
        target: that the task needs; None: any. If it is tokens, `num_classes` is the size of the vocabulary.
    """
    if source.train.kind == "tokens" and target == "tokens":
        return random_tokens(source.train.shape[0], source.num_classes)
    return input_form(source.train)


def input_form(samples: Dataset) -> InputForm:
    """Return the shape of a dataset's samples; the example of a dataset that has one; the first windows of tokens."""
    if samples.kind == "tokens":
        ids = np.arange(min(_NUM_SAMPLES, len(samples)))
        return Example(torch.from_numpy(samples.fetch(ids)), torch.from_numpy(samples.targets[ids]))
    return getattr(whole_of(samples), "example", None) or samples.shape


def random_tokens(context: int, vocabulary: int) -> Example:
    """Return samples of random tokens, the same in each call; the largest one is among them.

    Args:
        context: tokens of a sample.
        vocabulary: the tokens are 0 … vocabulary - 1.
    """
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocabulary, (_NUM_SAMPLES, context + 1), generator=generator)
    tokens[:, 0] = vocabulary - 1  # an embedding that is too small fails in the trial
    return Example(tokens[:, :-1], tokens[:, 1:])
