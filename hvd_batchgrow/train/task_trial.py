"""Call a custom task on a few samples before training, so that its mistakes are found at the start."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hvd_batchgrow.config import Job
from hvd_batchgrow.config.task_specs import TASKS
from hvd_batchgrow.data.datasets.dataset import Datasets
from hvd_batchgrow.data.datasets.example import Example, InputForm
from hvd_batchgrow.data.datasets.targets import first_targets
from hvd_batchgrow.data.tensor_tree import form_of, has_rows, moved, take_rows
from hvd_batchgrow.messages.errors import Fault, JobError, RunError, describe_error
from hvd_batchgrow.nn.state.side_effect_free import alike, dry_run, generator_states, trial_samples
from hvd_batchgrow.tasks.checked_losses import losses_of
from hvd_batchgrow.tasks.task import Losses, Task
from hvd_batchgrow.train.update.forward import autocast, widened

_NUM_SAMPLES, _NUM_TARGETS = 4, 16


def try_task(job: Job, task: Task, model: nn.Module, form: InputForm, source: Datasets) -> tuple[list[str], list[str]]:
    """Call a custom task on outputs of the network and real targets, as training and evaluation do.

    A task of this package is not called, nor one whose targets are mixed.

    Args:
        job: names the task.
        task: of the job.
        model: the network, on its device; nothing in it changes.
        form: from `input_form`.
        source: has the targets.

    Returns:
        A line if the task draws random numbers or keeps state, or if the loss of a sample depends on the other samples
        of its micro-batch; and notes: metrics that do not add up over micro-batches, or that the network's outputs do
        not allow these checks.

    Raises:
        JobError: the task fails, returns something else than `Losses` of each sample, or losses without a gradient;
            or the job is exact or sets `checks.replay_every`, and there is such a line.
    """
    if TASKS.get(job.task.name) or job.data.mixes_samples:
        return [], []
    name, device = job.task.name, next(model.parameters()).device
    targets = moved(_targets(form, source), device)
    with dry_run(model, _NUM_SAMPLES, training=True, gradients=True, num_ghost_batches=2):
        with autocast(device, job.update.precision):
            # Not `model(…)`, which would compile the network for this number of samples with `layout.compile`.
            outputs = widened(model.forward(trial_samples(model, _NUM_SAMPLES, form)))
        can_halve = has_rows(outputs, _NUM_SAMPLES)
        calls = _call(job, task, outputs, targets, device, can_halve=can_halve)
        others = _with_other_targets(task, outputs, targets) if can_halve and task.metrics else []
    if not calls.whole.each.requires_grad:
        fault = f"the losses of {name} have no gradient: detach(), item() or no_grad() separates them from the outputs"
        raise _refusal(job, fault)
    if found := _layout_fault(calls):
        keys = {"layout.exact": job.layout.exact, "checks.replay_every": job.checks.replay_every}
        if faults := [Fault(key, f"is not possible with the task {name}: it {found}") for key in keys if keys[key]]:
            raise JobError(faults, job.name)
        return [f"the task {name} {found}"], []
    if not can_halve:
        why = f"the outputs of {job.model.name} cannot be divided by sample"
        return [], [f"it was not checked whether the task {name} mixes the samples of a micro-batch: {why}"]
    trials = [(calls.whole, calls.halves), *others]
    return [], [note for metric in task.metrics if (note := _metric_note(name, metric, trials))]


@dataclass(frozen=True)
class _Calls:
    """What a task returned for the same samples."""

    whole: Losses
    halves: Sequence[Losses]
    """Of each half of the samples; empty: the outputs cannot be divided."""
    again: Losses
    """Of all samples, in the last call."""
    draws: bool
    """Whether the calls have advanced a global random generator."""


def _call(job: Job, task: Task, outputs: Any, targets: Any, device: torch.device, *, can_halve: bool) -> _Calls:
    """Call a task on all samples, on their halves, and on all again. Raises JobError if it fails."""
    own = take_rows(targets, slice(_NUM_SAMPLES))
    try:
        before = generator_states(device)
        losses_of(task, outputs, own, _NUM_SAMPLES, training=False)
        whole = losses_of(task, outputs, own, _NUM_SAMPLES, training=True)
        halves = _of_pairs(task, outputs, own) if can_halve else []
        again = losses_of(task, outputs, own, _NUM_SAMPLES, training=True)
        return _Calls(whole, halves, again, draws=generator_states(device) != before)
    except RunError as error:
        raise _refusal(job, str(error)) from None
    except Exception as error:  # the user's own code
        call = f"called as task(outputs, targets, training=…) with {_NUM_SAMPLES} samples"
        forms = f"a sample has the outputs {form_of(outputs)} and the targets {form_of(own)}"
        raise _refusal(job, f"{job.task.name} fails, {call}: {describe_error(error)}; {forms}") from error


def _of_pairs(task: Task, outputs: Any, targets: Any) -> list[Losses]:
    """Return the losses of the first two samples, and of the last two."""
    pairs = slice(0, 2), slice(2, 4)
    return [losses_of(task, take_rows(outputs, own), take_rows(targets, own), 2, training=True) for own in pairs]


@torch.no_grad()
def _with_other_targets(task: Task, outputs: Any, targets: Any) -> list[tuple[Losses, list[Losses]]]:
    """Return the losses of samples together, and of each pair of them, with targets of other samples.

    Unequal numbers of each class, and some right predictions, show a metric that is a mean of means.
    """
    with suppress(Exception):  # a task may refuse the targets of other samples
        chosen = [take_rows(targets, [k, k, k, k + 1]) for k in range(_NUM_TARGETS - 1)]
        return [
            (losses_of(task, outputs, part, _NUM_SAMPLES, training=True), _of_pairs(task, outputs, part))
            for part in chosen
        ]
    return []


def _layout_fault(calls: _Calls) -> str | None:
    """Return why losses depend on the layout, as the end of a sentence; None if they do not."""
    # The limit is low, because a running mean moves by little from call to call.
    if not alike(calls.whole.each, calls.again.each, tolerance=1e-5):
        return "gives the same samples another loss in a second call: it draws random numbers or keeps state"
    if calls.draws:
        return "draws random numbers that are not keyed by sample"
    if calls.halves and not alike(calls.whole.each, torch.cat([half.each for half in calls.halves])):
        return "gives a sample another loss if its micro-batch has other samples"
    return None


def _metric_note(name: str, metric: str, trials: Sequence[tuple[Losses, Sequence[Losses]]]) -> str | None:
    """Return a note if a metric's sum and count for some samples are not the totals of those for two pairs of them.

    Args:
        name: of the task.
        metric: its name.
        trials: losses of samples together, and of each pair of them.
    """
    for whole, pairs in trials:
        together, *parts = (_sum_and_count(losses, metric) for losses in (whole, *pairs))
        totals = torch.stack(parts).sum(0)
        # The pairs are compared too, so that sums which cancel are compared with the size of their terms.
        compared = torch.stack([together, *parts]).T, torch.stack([totals, *parts]).T
        if not all(map(alike, *compared)):
            (total, count), (sum_of_pairs, count_of_pairs) = together.tolist(), totals.tolist()
            return (
                f"the metric {metric} of the task {name} depends on ranks and micro-batches: for {_NUM_SAMPLES} "
                f"samples it has the sum {total:g} and the count {count:g}, and for two pairs of them "
                f"{sum_of_pairs:g} and {count_of_pairs:g} in total; return a sum and a count that add up over samples"
            )
    return None


def _sum_and_count(losses: Losses, metric: str) -> Tensor:
    return torch.tensor([float(number) for number in losses.metrics[metric]], dtype=torch.float64)


def _targets(form: InputForm, source: Datasets) -> Any:
    """Return `_NUM_TARGETS` targets: those of the first samples, and others from all parts of the data."""
    if isinstance(form, Example):
        return form.take(_NUM_TARGETS).targets
    targets = first_targets(source.train)
    spread = np.linspace(0, len(targets) - 1, _NUM_TARGETS - _NUM_SAMPLES).astype(int)
    return torch.from_numpy(targets[np.concatenate([np.arange(_NUM_SAMPLES) % len(targets), spread])])


def _refusal(job: Job, fault: str) -> JobError:
    return JobError([Fault("task.name", fault)], job.name)
