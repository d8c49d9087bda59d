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


NARROW = {"model.channels": "[8, 16, 16, 32, 32]", "logging.tensorboard": "false"}
"""The network of the quickstart with half as many channels: 4 minutes become 2 on one core."""

FOLLOW_NOISE = ("gradient_noise", "similarity", "norm_test", "cabs")
"""Triggers that follow the gradient's noise; by default they decide in the second half of the run."""

TRIGGERS = Study(
    "triggers",
    (
        Arm("grow", "fashion_mnist_grow", has_twin=True),
        *(Arm(f"{name}_second_half", f"fashion_mnist_{name}", has_twin=True) for name in FOLLOW_NOISE),
        Arm("late", "fashion_mnist_late", has_twin=True),
        Arm("plateau", "fashion_mnist_plateau", has_twin=True),
        Arm("branch", "fashion_mnist_branch", has_twin=True),
        Arm("adascale", "fashion_mnist_adascale"),
        *(
            Arm(f"{name}_from_start", f"fashion_mnist_{name}", {"trigger.first_decision_epoch": "0"}, has_twin=True)
            for name in FOLLOW_NOISE
        ),
    ),
    seeds=(0, 1, 2),
    changes=NARROW,
)

STUDIES = {study.name: study for study in (TRIGGERS,)}
