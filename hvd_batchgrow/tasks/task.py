"""What a task is: a function from a network's outputs and the targets of its samples to losses and metrics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from hvd_batchgrow.config.task_specs import Direction


@dataclass(frozen=True)
class Losses:
    """The losses and metrics of a micro-batch."""

    each: Tensor
    """(n,): the loss of each sample, attached to the autograd graph; not averaged. With `weights`, it includes the
    weight: for instance the sum of the losses of a sample's tokens."""
    weights: Tensor | None = None
    """(n,): the weight of each sample, such as the number of its tokens; None: 1 each. The gradient of an update is
    the gradient of the sum of all its losses, divided once by the sum of all its weights. Weights are at least 0 and
    have no gradient. Exact mode sums them in multiples of 2⁻²⁴."""
    metrics: Mapping[str, tuple[Tensor | float, Tensor | float]] = field(default_factory=dict)
    """For each metric a sum and a count, numbers or tensors (). The metric of many samples is the total of their sums,
    divided by the total of their counts. Every micro-batch has the same metrics."""
    correct: Tensor | None = None
    """(n,), of type bool: whether the prediction for each sample is right; None: the task does not return it. It is
    read only in the test at the end of a run, and written to `outcomes.npz` to compare networks sample by sample."""


class Task(Protocol):
    """What the network learns.

    A custom task, `task.name = "module:name"`, is the return value of a callable, such as an instance of a class.
    """

    @property
    def metrics(self) -> Mapping[str, Direction]:
        """The names of the metrics that a call returns, and whether each improves by rising ("up") or falling ("down").

        The first one is the main result of a run.
        """

    def __call__(self, outputs: Any, targets: Any, *, training: bool) -> Losses:
        """Return the losses and metrics of n samples. The result for a sample must not depend on the others.

        Args:
            outputs: what the network returns for n samples; floating-point tensors, also those in tuples, lists, dicts
                and dataclasses, have float32 or a wider type.
            targets: of the same samples, (n, …), on the same device.
            training: whether the samples train the network; false in evaluations, where labels are not smoothed.
        """
