"""Check `[task]` without torch and without the data."""

from __future__ import annotations

from hvd_batchgrow.config.task import TaskSection
from hvd_batchgrow.config.task_specs import TASKS
from hvd_batchgrow.messages.errors import Fault
from hvd_batchgrow.messages.wording import counted


def check_task_keys(task: TaskSection) -> list[Fault]:
    """Return a fault for each key that the task would ignore, unless it has its default value."""
    spec = TASKS.get(task.name)
    used = spec.keys if spec else {"kwargs"}
    defaults = TaskSection(name=task.name)
    given = {key for key in TaskSection.model_fields if getattr(task, key) != getattr(defaults, key)}
    faults = [
        Fault(f"task.{key}", f"is not used by {task.name!r}, but by {_users(key)}") for key in sorted(given - used)
    ]
    if "huber_delta" in given & used and task.loss != "huber":
        faults.append(Fault("task.huber_delta", f"is not used with task.loss = {task.loss!r}, but with 'huber'"))
    return faults


def check_weights(task: TaskSection, num_classes: int | None) -> list[Fault]:
    """Return a fault for weights of more or fewer classes than the job states; None: only the data has their number."""
    return [
        Fault(f"task.{key}", f"has {counted(len(weights), 'number')}, and data.num_classes = {num_classes}")
        for key, weights in (("class_weights", task.class_weights), ("pos_weights", task.pos_weights))
        if weights is not None and num_classes not in {None, len(weights)}
    ]


def _users(key: str) -> str:
    return ", ".join(spec.name for spec in TASKS.specs() if key in spec.keys) or "your own module:name"
