"""What is known about a task without importing torch: one spec per task, in its file in `tasks/kinds`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from hvd_batchgrow.config.own_code import checked_name
from hvd_batchgrow.config.registry import Registry

Direction = Literal["up", "down"]
"""Whether a metric improves when it rises or when it falls."""
TargetKind = Literal["class", "values", "tokens"]
"""Targets of a sample: its class, int64 (); K numbers, float32 (K,); or the next token of each token, int64 (L,)."""
IGNORED_TOKEN = -100
"""Target of a token that counts neither in the loss nor in the metrics, as in torch's `cross_entropy`."""
Answer = Literal["class", "labels", "values"]
"""What `predict` prints: the probability of each class, of each label, or the predicted numbers."""


@dataclass(frozen=True)
class TaskSpec:
    """A kind of task."""

    name: str
    """Value of `task.name`."""
    doc: str
    """Its line in the table of docs/job-file.md: loss and metrics."""
    target: TargetKind
    """Targets that it needs."""
    metrics: Mapping[str, Direction]
    """Its metrics besides the loss; the first one is the main result of a run."""
    keys: frozenset[str]
    """Keys of `[task]` that it uses, besides its name."""
    module: str
    """The module whose `load` returns the task for its section, the number of the network's outputs, and the schema of
    the source. It imports torch, which takes seconds."""
    output_shape: Callable[[Sequence[int], int], tuple[int, ...]]
    """Returns the shape of the network's output for one sample, given an input's shape and the number of outputs."""
    answer: Answer | None = None
    """None: `predict` does not support the task."""


TASKS = Registry[TaskSpec]("hvd_batchgrow.tasks.kinds")


def check_task(name: str) -> str:
    """Return the name. Raises ValueError if it is neither a task nor `module:name`; the message suggests one."""
    return checked_name(name, TASKS.names())
