"""Check the metrics that a job's trigger and `checkpoint.keep_best` name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from difflib import get_close_matches

from hvd_batchgrow.config import Job
from hvd_batchgrow.config.task_specs import Direction
from hvd_batchgrow.messages.errors import Fault

_MODES = {"up": "max", "down": "min"}


def metric_faults(job: Job, directions: Mapping[str, Direction]) -> Iterator[Fault]:
    """Yield a fault for each metric that the task does not have, and for a `trigger.mode` that contradicts it.

    Args:
        job: the job.
        directions: of the loss and of each metric of its task.
    """
    trigger, best = job.trigger, job.checkpoint.keep_best
    named = [("trigger.metric", trigger.test_metric, "")]
    named += [("checkpoint.keep_best", best and best.removeprefix("val/"), "val/")]
    for key, metric, prefix in named:
        if metric is not None and metric not in directions:
            near = get_close_matches(metric, directions, n=1)
            hint = f"did you mean {prefix + near[0]!r}? " if near else ""
            known = ", ".join(repr(prefix + name) for name in directions)
            yield Fault(key, f"{prefix + metric!r} is not a metric of the task {job.task.name!r}; {hint}one of {known}")
    mode, direction = getattr(trigger, "mode", None), directions.get(trigger.test_metric or "")
    if mode and direction and mode != _MODES[direction]:
        verb = "rises" if direction == "up" else "falls"
        fault = f"{mode!r}: {trigger.test_metric} improves when it {verb}; use {_MODES[direction]!r}, or remove the key"
        yield Fault("trigger.mode", fault)
