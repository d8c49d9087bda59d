"""The task `language_model`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.nn.functional import cross_entropy

from hvd_batchgrow.config.task import TaskSection
from hvd_batchgrow.config.task_specs import IGNORED_TOKEN, TASKS, Direction
from hvd_batchgrow.tasks.task import Losses


class LanguageModel:
    """Cross-entropy of the next token at each of L positions; every token has the same weight.

    Outputs are logits (n, L, V). Targets are tokens, int64 (n, L), or -100 where a token does not count. The loss of a
    sample is the sum over its tokens, and its weight is their number, so the gradient of an update is that of the mean
    over its tokens.

    Metrics: `bits_per_token`, the cross-entropy without label smoothing in bits; of bytes as tokens, bits per byte. And
    `top1`, the fraction of tokens predicted correctly.

    Args:
        label_smoothing: fraction of each target that is spread evenly over all tokens, in training.
    """

    metrics: Mapping[str, Direction] = TASKS["language_model"].metrics

    def __init__(self, label_smoothing: float = 0.0) -> None:
        self.label_smoothing = label_smoothing

    def __call__(self, outputs: Tensor, targets: Tensor, *, training: bool) -> Losses:
        """See `Task`."""
        logits, counts = outputs.flatten(0, 1), targets != IGNORED_TOKEN
        flat = targets.flatten()
        plain = cross_entropy(logits, flat, reduction="none", ignore_index=IGNORED_TOKEN).view_as(targets)
        each = plain
        if training and self.label_smoothing:
            smoothing = self.label_smoothing
            smoothed = cross_entropy(
                logits, flat, reduction="none", ignore_index=IGNORED_TOKEN, label_smoothing=smoothing
            )
            each = smoothed.view_as(targets)
        total = counts.sum()
        right = ((outputs.detach().argmax(2) == targets) & counts).sum()
        metrics = {"bits_per_token": (plain.detach().double().sum() / math.log(2), total), "top1": (right, total)}
        return Losses(each.sum(1), counts.sum(1).to(each.dtype), metrics)


def load(section: TaskSection, num_outputs: int, schema: Mapping[str, Any]) -> LanguageModel:
    """Return the task of a section."""
    return LanguageModel(section.label_smoothing)
