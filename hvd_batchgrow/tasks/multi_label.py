"""The task `multi_label`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from hvd_batchgrow.config.task import TaskSection
from hvd_batchgrow.config.task_specs import TASKS, Direction
from hvd_batchgrow.messages.errors import RunError
from hvd_batchgrow.tasks.alignment import aligned
from hvd_batchgrow.tasks.task import Losses
from hvd_batchgrow.tasks.weights import weights_of


class MultiLabel:
    """Binary cross-entropy of K labels per sample, of which any number may be present.

    Outputs are logits (n, K); a label is predicted if its logit is above 0, a probability of 1/2. Targets are 0 or 1,
    (n, K) of a floating type. The loss of a sample is the mean over its labels, as in torch's
    `binary_cross_entropy_with_logits`; it is NaN if a target is neither 0 nor 1.

    Metrics: `f1`, of all labels together (micro-averaged): 2 TP / (2 TP + FP + FN); and `label_accuracy`, the fraction
    of labels that are predicted correctly.

    Args:
        pos_weights: (K,) factor on the loss where a label is present; None: 1 each.
    """

    metrics: Mapping[str, Direction] = TASKS["multi_label"].metrics

    def __init__(self, pos_weights: Tensor | None = None) -> None:
        self.pos_weights = pos_weights

    def check_targets(self, targets: NDArray[Any]) -> None:
        """Raise RunError unless all targets (N, K) are 0 or 1."""
        wrong = np.argwhere((targets != 0) & (targets != 1))
        if len(wrong):
            shown = "; ".join(f"sample {k}, label {j} is {targets[k, j]:g}" for k, j in wrong[:5])
            raise RunError(f"task.name = 'multi_label' needs targets of 0 and 1; {len(wrong)} are not: {shown}")

    def __call__(self, outputs: Tensor, targets: Tensor, *, training: bool) -> Losses:
        """See `Task`."""
        targets = aligned(targets, outputs)
        if self.pos_weights is not None and self.pos_weights.device != outputs.device:
            self.pos_weights = self.pos_weights.to(outputs.device)
        each = binary_cross_entropy_with_logits(outputs, targets, reduction="none", pos_weight=self.pos_weights)
        each = each.where((targets == 0) | (targets == 1), math.nan).mean(1)  # the run then ends and names the samples
        predicted, present = outputs.detach() > 0, targets > 0.5
        both = (predicted & present).sum()
        metrics: dict[str, tuple[Tensor | float, Tensor | float]] = {
            "f1": (2 * both, predicted.sum() + present.sum()),
            "label_accuracy": ((predicted == present).sum(), targets.numel()),
        }
        return Losses(each, metrics=metrics)


def load(section: TaskSection, num_outputs: int, schema: Mapping[str, Any]) -> MultiLabel:
    """Return the task of a section. Raises JobError if there are more or fewer weights than labels."""
    return MultiLabel(weights_of(section.pos_weights, num_outputs, "pos_weights", "labels"))
