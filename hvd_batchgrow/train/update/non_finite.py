"""Losses and gradients that are infinite or NaN."""

from __future__ import annotations

import math

import numpy as np

from hvd_batchgrow.data.datasets.dataset import Dataset
from hvd_batchgrow.data.order.stream import Stream
from hvd_batchgrow.data.samples.find_non_finite import Check, non_finite_sample
from hvd_batchgrow.messages.errors import RunError
from hvd_batchgrow.schedule.plan import Plan
from hvd_batchgrow.train.events import Evaluation


class NonFinite(RunError):  # noqa: N818  # the name states the fault
    """A loss or gradient is infinite or NaN; raised by all ranks together.

    Args:
        slots: indices in the update of the ghost batches whose loss is not finite; empty: only the gradient
            is not finite.
    """

    def __init__(self, slots: tuple[int, ...]) -> None:
        self.slots = slots
        super().__init__("the loss is not finite" if slots else "the gradient is not finite")


def describe(
    fault: NonFinite | OverflowError,
    plan: Plan,
    stream: Stream,
    samples: int,
    train: Dataset,
    check: Check | None = None,
) -> str:
    """Return the message for an update that is not finite: its samples, its first bad ghost batches, the remedy.

    Args:
        fault: the error of the update; OverflowError: an exact sum has left its range.
        plan: of the run.
        stream: of the run.
        samples: sample counter before the update.
        train: the training set, whose samples are read again to find one that is not finite.
        check: the task's `check_targets`; None: it accepts any.
    """
    phase = plan.schedule.at(samples)
    update, end = plan.schedule.updates_at(samples), samples + phase.global_batch
    lines = [f"update {update}, samples {samples:,} … {end - 1:,}, learning rate {phase.lr:.4g}: {fault}"]
    if isinstance(fault, OverflowError):
        lines.append("a lower learning rate or a warm-up may prevent it; layout.exact = false has no such limit")
        return "\n  ".join(lines)
    for slot in fault.slots[:3]:
        first = samples + slot * plan.ghost_batch
        ids = stream.ids(first, first + plan.ghost_batch).tolist()
        lines.append(
            f"in the micro-batch of the ghost batch with samples {first:,} … {first + len(ids) - 1:,}, "
            f"ids {ids[:8]}{' …' if len(ids) > 8 else ''}"
        )
    if fault.slots:
        starts = samples + np.array(fault.slots) * plan.ghost_batch
        epochs, all_ids = stream.at((starts[:, None] + np.arange(plan.ghost_batch)).reshape(-1))
        if (found := non_finite_sample(train, epochs, all_ids, check)) is not None:
            return "\n  ".join([*lines, f"{found}: correct the data"])
    lines.append("update.on_nonfinite = 'skip' skips such updates; a lower learning rate or a warm-up may prevent them")
    return "\n  ".join(lines)


def describe_evaluation(evaluation: Evaluation, precision: str, evaluated: Dataset, check: Check | None = None) -> str:
    """Return the message for an evaluation whose loss is infinite or NaN, with what may help.

    Args:
        evaluation: an evaluation whose `is_finite` is False.
        precision: `update.precision`, in which the set was evaluated too.
        evaluated: the set, whose samples are read again to find one that is not finite.
        check: the task's `check_targets`; None: it accepts any.
    """
    is_average = math.isfinite(evaluation.loss)
    which = f"{evaluation.dataset} loss{' of the averaged weights' * is_average}"
    loss = evaluation.average_loss if is_average else evaluation.loss
    has_full_range = precision in {"float32", "tf32"}
    lower = "" if has_full_range else f"; update.precision = 'float32' has a larger range than {precision!r}"
    head = f"evaluation at sample {evaluation.samples:,} (epoch {evaluation.epoch:.2f}): the {which} is {loss}\n  "
    ids = np.arange(len(evaluated))
    if (found := non_finite_sample(evaluated, np.zeros_like(ids), ids, check)) is not None:
        return f"{head}{found}: correct the data"
    return (
        f"{head}a lower learning rate or a warm-up may prevent it{lower}\n  "
        "update.on_nonfinite = 'skip' ignores such an evaluation and continues"
    )
