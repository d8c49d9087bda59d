"""Load the task of a job."""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from typing import Any

from hvd_batchgrow.config.task import TaskSection
from hvd_batchgrow.config.task_specs import TASKS, TargetKind
from hvd_batchgrow.import_string import NotFound, find_callable
from hvd_batchgrow.messages.errors import Fault, JobError, describe_error
from hvd_batchgrow.tasks.task import Task

RESERVED = frozenset(
    {
        *("kind", "dataset", "samples", "epoch", "progress_epochs", "updates", "phase", "lr", "momentum"),
        *("global_batch", "accumulation", "ranks", "noise_scale", "loss", "samples_per_s", "data_wait_pct"),
        *("backward_pct", "allreduce_pct", "optimizer_pct", "trust_ratio", "skipped", "gradient_noise"),
        *("norm_layers", "elapsed_s", "loss_weight", "replay_checks"),
    }
)
"""Names of other values in the lines of metrics.jsonl; a metric must have another name."""


def load_task(section: TaskSection, num_outputs: int, schema: Mapping[str, Any]) -> Task:
    """Return the task of a job.

    Args:
        section: `[task]`.
        num_outputs: `Datasets.num_classes`.
        schema: of the source.

    Raises:
        JobError: a list of weights has the wrong length, or a custom task cannot be loaded or has no valid metrics.
    """
    if spec := TASKS.get(section.name):
        task: Task = importlib.import_module(spec.module).load(section, num_outputs, schema)
        return task
    return load_own_task(section)


def load_own_task(section: TaskSection) -> Task:
    """Call `module:name` with `task.kwargs`. Raises JobError if that fails, or does not return a `Task`."""
    name = section.name
    try:
        made = find_callable(name)(**section.kwargs)
    except NotFound as error:
        raise _refusal(str(error)) from error
    except (Exception, SystemExit) as error:  # the user's own code
        given = ", ".join(f"{key}={value!r}" for key, value in section.kwargs.items())
        raise _refusal(f"{name}({given}) failed: {describe_error(error)}") from error
    if not callable(made):
        raise _refusal(
            f"{name} must return a task, a callable with the attribute `metrics`; it returned {type(made).__name__}"
        )
    metrics = getattr(made, "metrics", None)
    if not isinstance(metrics, Mapping) or not {*metrics.values()} <= {"up", "down"}:
        raise _refusal(f'{name}: metrics must be a dict such as {{"top1": "up", "mae": "down"}}, is {metrics!r}')
    for metric in metrics:
        if isinstance(metric, str) and metric.startswith("average_"):
            raise _refusal(
                f"{name}: the metric {metric!r} must not begin with average_, which in metrics.jsonl is the prefix of "
                f"the results of averaged weights; rename it, for example to 'mean_{metric.removeprefix('average_')}'"
            )
        if not isinstance(metric, str) or not re.fullmatch(r"[a-z]\w*", metric):
            raise _refusal(f'{name}: the metric {metric!r} needs a name of letters, digits and _, such as "top1"')
        if metric in RESERVED:
            raise _refusal(f"{name}: the metric {metric!r} has the name of another value in metrics.jsonl; rename it")
    task: Task = made
    return task


def target_of(section: TaskSection) -> TargetKind | None:
    """Return the targets that a built-in source must provide.

    A custom task has an attribute `target`, "class", "values" or "tokens"; without the attribute, the task
    accepts the source's default targets, and the result is None.

    Raises:
        JobError: as `load_own_task`; or a custom task has another `target`.
    """
    if section.target:
        return section.target
    target: TargetKind | None = getattr(load_own_task(section), "target", None)
    if target not in {None, "class", "values", "tokens"}:
        raise _refusal(f'{section.name}: target must be "class", "values" or "tokens", is {target!r}')
    return target


def _refusal(fault: str) -> JobError:
    return JobError([Fault("task.name", fault)])
