"""Call a custom task on a few samples before training, so that its mistakes are found at the start."""

from __future__ import annotations

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
from hvd_batchgrow.nn.state.side_effect_free import alike, dry_run, trial_samples
from hvd_batchgrow.tasks.checked_losses import losses_of
from hvd_batchgrow.tasks.task import Task
from hvd_batchgrow.train.update.forward import autocast, widened

_NUM_SAMPLES = 4


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
        A line if the loss of a sample depends on the other samples of its micro-batch; and a note if the network's
        outputs do not allow this check.

    Raises:
        JobError: the task fails, returns something else than `Losses` of each sample, or losses without a gradient;
            or the job is exact, and its losses depend on other samples.
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

        def losses(*, training: bool = True) -> Tensor:
            return losses_of(task, outputs, targets, _NUM_SAMPLES, training=training).each

        def losses_of_half(rows: slice) -> Tensor:
            parts = take_rows(outputs, rows), take_rows(targets, rows)
            return losses_of(task, *parts, _NUM_SAMPLES // 2, training=True).each

        try:
            losses(training=False)
            whole, again = losses(), losses()
            halves = torch.cat([losses_of_half(slice(2)), losses_of_half(slice(2, 4))]) if can_halve else whole
        except RunError as error:
            raise _refusal(job, str(error)) from None
        except Exception as error:  # the user's own code
            call = f"called as task(outputs, targets, training=…) with {_NUM_SAMPLES} samples"
            forms = f"a sample has the outputs {form_of(outputs)} and the targets {form_of(targets)}"
            raise _refusal(job, f"{name} fails, {call}: {describe_error(error)}; {forms}") from error
    if not whole.requires_grad:
        fault = f"the losses of {name} have no gradient: detach(), item() or no_grad() separates them from the outputs"
        raise _refusal(job, fault)
    if not can_halve:
        why = f"the outputs of {job.model.name} cannot be divided by sample"
        return [], [f"it was not checked whether the task {name} mixes the samples of a micro-batch: {why}"]
    if not alike(whole, again) or alike(whole, halves):  # random losses cannot be compared
        return [], []
    found = f"{name} gives a sample another loss if its micro-batch has other samples"
    if job.layout.exact:
        raise JobError([Fault("layout.exact", f"is not possible with the task {name}: {found}")], job.name)
    return [f"the task {found}"], []


def _targets(form: InputForm, source: Datasets) -> Any:
    if isinstance(form, Example):
        return form.take(_NUM_SAMPLES).targets
    targets = first_targets(source.train)
    return torch.from_numpy(targets[np.arange(_NUM_SAMPLES) % len(targets)])


def _refusal(job: Job, fault: str) -> JobError:
    return JobError([Fault("task.name", fault)], job.name)
