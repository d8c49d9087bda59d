"""The studies: each a table of arms, trained with the same seeds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Arm:
    """A job of a study."""

    name: str
    job: str
    """Name of its job file in jobs/, without the ending."""
    changes: Mapping[str, str] = field(default_factory=dict)
    """Keys of the job with the values that replace its own."""
    has_twin: bool = False
    """Whether its twin, which decays the learning rate where the arm grows the batch, is trained too."""


@dataclass(frozen=True)
class Study:
    """Arms that one table compares."""

    name: str
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...]
    changes: Mapping[str, str]
    """Changes of every arm."""
    page: str
    """Name of the page in docs/ that has its table."""


HALF = {
    "model.channels": "[8, 16, 16, 32, 32]",
    "schedule.epochs": "6",
    "logging.tensorboard": "false",
}
"""Half the channels and half the epochs of the quickstart: a run takes a fourth of the time."""
BOUNDARIES = "[1.5, 3.5, 5]"
"""Half of the quickstart's."""

FOLLOW_NOISE = ("gradient_noise", "similarity", "norm_test", "cabs")
"""Triggers that follow the gradient's noise; by default they decide in the second half of the run."""


def _trigger(name: str, **changes: str) -> Arm:
    keys = {key.replace("__", "."): value for key, value in changes.items()}
    return Arm(name, f"fashion_mnist_{name}", keys, has_twin=True)


TRIGGERS = Study(
    "triggers",
    (
        _trigger("grow", schedule__boundaries_epochs=BOUNDARIES),
        _trigger("late"),
        *(_trigger(name) for name in FOLLOW_NOISE),
        _trigger("plateau", trigger__patience_epochs="0.25", evaluation__every_epochs="0.25"),
        _trigger("branch", trigger__first_decision_epoch="1.5", schedule__lr_boundaries_epochs=BOUNDARIES),
        Arm("adascale", "fashion_mnist_adascale", {"schedule.lr_boundaries_epochs": BOUNDARIES}),
        *(
            Arm(f"{name}_from_start", f"fashion_mnist_{name}", {"trigger.first_decision_epoch": "0"}, has_twin=True)
            for name in FOLLOW_NOISE
        ),
    ),
    seeds=(0, 1, 2),
    changes=HALF,
    page="triggers.md",
)

SCHEDULES = Study(
    "schedules",
    (
        Arm(
            "decay",
            "fashion_mnist_decay",
            {"gradient_noise.measure": "true", "gradient_noise.estimator": "norm_layers"},
        ),
        Arm("late", "fashion_mnist_late"),
        Arm("gradient_noise", "fashion_mnist_gradient_noise"),
        Arm("branch", "fashion_mnist_branch"),
    ),
    seeds=(0, 1, 2),
    changes={"logging.tensorboard": "false"},
    page="critical-batch.md",
)

STUDIES = {study.name: study for study in (TRIGGERS, SCHEDULES)}
