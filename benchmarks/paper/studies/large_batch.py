"""Ghost batches and LARS at a large batch: docs/results.md."""

from __future__ import annotations

from benchmarks.paper.studies.fashion_mnist import PAGE
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

TABLES = (Table("large_batch_tuning", TUNING, PAGE, dataset="validation"),)
