"""Ghost batches and LARS at a large batch: docs/results.md."""

from __future__ import annotations

from benchmarks.paper.studies.fashion_mnist import FIVE, MARGIN, PAGE, ghost_batch
from benchmarks.paper.studies.study import QUIET, Arm, Study, Table, keys

JOB = "benchmarks/paper/jobs/fashion_mnist_large.toml"


def nesterov(lr: str) -> dict[str, str]:
    """Return the changes for Nesterov momentum with a learning rate."""
    return keys(optim__nesterov="true", optim__lr=lr)


def lars(lr: str) -> dict[str, str]:
    """Return the changes for LARS with a learning rate."""
    return keys(optim__name="lars", optim__lr=lr)


TUNING = Study(
    "large_batch_tuning",
    (
        *(Arm(f"nesterov_{lr}", JOB, nesterov(lr)) for lr in ("0.2", "0.4", "0.8", "1.6", "3.2", "6.4")),
        *(Arm(f"lars_{lr}", JOB, lars(lr)) for lr in ("2", "4", "8", "16", "32", "64")),
    ),
    seeds=(0,),
    changes=QUIET | keys(data__validation_fraction="0.1"),
)
"""Six trials for each optimizer, chosen by the accuracy on the validation set."""

NESTEROV, LARS = nesterov("0.4"), lars("16")
"""The learning rates with the highest accuracy in `TUNING`."""

LARGE = Study(
    "large_batch",
    (
        Arm("nesterov", JOB, NESTEROV),
        Arm("lars", JOB, LARS),
        *(Arm(f"ghost_{ghost}", JOB, NESTEROV | ghost_batch(ghost)) for ghost in (32, 128)),
        Arm("one_ghost_batch", JOB, NESTEROV | ghost_batch(4096)),
    ),
    seeds=FIVE[:3],
    changes=QUIET,
)
"""Batch norm over the whole batch, `one_ghost_batch`, is what torch does on one device."""

TABLES = (
    Table("large_batch_tuning", TUNING, PAGE, dataset="validation"),
    Table("large_batch", LARGE, PAGE, ("nesterov", "lars"), margin=MARGIN, with_figures=True),
    Table("ghost_batches", LARGE, PAGE, ("one_ghost_batch", "ghost_128", "nesterov", "ghost_32"), margin=MARGIN),
)
