"""Schedules that grow by measurement beside fixed ones: docs/triggers.md and docs/critical-batch.md."""

from __future__ import annotations

from benchmarks.paper.studies.study import Arm, Study, Table, keys

NETWORK = keys(
    model__channels="[16, 32, 32, 64, 64]",
    data__crop_padding="2",
    data__channels_last="false",
    logging__tensorboard="false",
)
"""The network of the jobs when these studies were trained."""
HALF = NETWORK | keys(model__channels="[8, 16, 16, 32, 32]", schedule__epochs="6")
"""Half the channels and half the epochs: a run takes a fourth of the time."""
BOUNDARIES = "[1.5, 3.5, 5]"
"""Half of the jobs' own."""

FOLLOW_NOISE = ("gradient_noise", "similarity", "norm_test", "cabs")
"""Triggers that follow the gradient's noise; by default they decide in the second half of the run."""


def _trigger(name: str, **changes: str) -> Arm:
    return Arm(name, f"jobs/fashion_mnist_{name}.toml", keys(**changes), has_twin=True)


TRIGGERS = Study(
    "triggers",
    (
        _trigger("grow", schedule__boundaries_epochs=BOUNDARIES),
        _trigger("late"),
        *(_trigger(name) for name in FOLLOW_NOISE),
        _trigger("plateau", trigger__patience_epochs="0.25", evaluation__every_epochs="0.25"),
        _trigger("branch", trigger__first_decision_epoch="1.5", schedule__lr_boundaries_epochs=BOUNDARIES),
        Arm("adascale", "jobs/fashion_mnist_adascale.toml", keys(schedule__lr_boundaries_epochs=BOUNDARIES)),
        *(
            Arm(
                f"{name}_from_start",
                f"jobs/fashion_mnist_{name}.toml",
                keys(trigger__first_decision_epoch="0"),
                has_twin=True,
            )
            for name in FOLLOW_NOISE
        ),
    ),
    seeds=(0, 1, 2),
    changes=HALF,
)

SCHEDULES = Study(
    "schedules",
    (
        Arm(
            "decay",
            "jobs/fashion_mnist_decay.toml",
            keys(gradient_noise__measure="true", gradient_noise__estimator="norm_layers"),
        ),
        Arm("late", "jobs/fashion_mnist_late.toml"),
        Arm("gradient_noise", "jobs/fashion_mnist_gradient_noise.toml"),
        Arm("branch", "jobs/fashion_mnist_branch.toml"),
    ),
    seeds=(0, 1, 2),
    changes=NETWORK,
)

TABLES = (
    Table("triggers", TRIGGERS, "triggers.md", with_twins=True),
    Table("schedules", SCHEDULES, "critical-batch.md"),
)
