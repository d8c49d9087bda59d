"""The task `classification`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.nn.functional import cross_entropy

from hvd_batchgrow.config.task import TaskSection
from hvd_batchgrow.config.task_specs import TASKS, Direction
from hvd_batchgrow.tasks.task import Losses
from hvd_batchgrow.tasks.weights import weights_of

_NO_TARGET = -(2**63)
"""The target that torch ignores: the smallest integer, which no data has."""


class Classification:
    """Cross-entropy of logits and one class per sample, and the fraction of samples classified correctly.

    Outputs are logits (n, C). Targets are classes, integers (n,), or probabilities of the classes, (n, C) of a floating
    type, as Mixup makes them; the class of highest probability is then the right one. A target that is not a class,
    such as -100, is an error: every sample counts.

    With class weights the loss of a batch is Σ w l / Σ w, as in torch's `cross_entropy` without smoothing. With
    probabilities y, each class counts by its own weight: Σᵢ Σ_c w_c yᵢ_c lᵢ_c / Σᵢ Σ_c w_c yᵢ_c, where lᵢ_c is the loss
    of sample i if c were its class. Smoothing changes lᵢ_c, as for a target that is a class.

    Args:
        label_smoothing: fraction of each target that is spread evenly over all classes, in training.
        class_weights: (C,); None: 1 each.
    """

    metrics: Mapping[str, Direction] = TASKS["classification"].metrics

    def __init__(self, label_smoothing: float = 0.0, class_weights: Tensor | None = None) -> None:
        self.label_smoothing, self.class_weights = label_smoothing, class_weights

    def __call__(self, outputs: Tensor, targets: Tensor, *, training: bool) -> Losses:
        """See `Task`."""
        smoothing, is_soft = self.label_smoothing if training else 0.0, targets.is_floating_point()
        targets = targets.to(outputs.dtype) if is_soft else targets.long()
        classes = targets.argmax(1) if is_soft else targets
        correct = outputs.detach().argmax(1) == classes
        metrics = {"top1": (correct.sum(), len(classes))}
        if self.class_weights is None:
            return Losses(_losses(outputs, targets, smoothing), metrics=metrics, correct=correct)
        if (self.class_weights.device, self.class_weights.dtype) != (outputs.device, outputs.dtype):
            self.class_weights = self.class_weights.to(outputs)
        if is_soft:
            weighted = targets * self.class_weights
            weights = weighted.sum(1)
            # Each w_c y_c is smoothed like a target of class c: torch's own smoothing requires that they sum to 1.
            smoothed = (1 - smoothing) * weighted + smoothing / outputs.shape[1] * weights[:, None]
            return Losses(cross_entropy(outputs, smoothed, reduction="none"), weights, metrics, correct)
        each = _losses(outputs, targets, smoothing)
        weights = self.class_weights[targets]
        return Losses(each * weights, weights, metrics, correct)


def _losses(outputs: Tensor, targets: Tensor, smoothing: float) -> Tensor:
    """Return the loss of each sample. Raises IndexError on a CPU if a target is not a class, also for torch's -100."""
    return cross_entropy(outputs, targets, reduction="none", label_smoothing=smoothing, ignore_index=_NO_TARGET)


def load(section: TaskSection, num_outputs: int, schema: Mapping[str, Any]) -> Classification:
    """Return the task of a section. Raises JobError if there are more or fewer weights than classes."""
    return Classification(
        section.label_smoothing, weights_of(section.class_weights, num_outputs, "class_weights", "classes")
    )
