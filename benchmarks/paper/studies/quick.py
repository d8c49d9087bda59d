"""A small network on images that are made in memory: a trial of everything that `make paper` does."""

from __future__ import annotations

from benchmarks.paper.studies.fashion_mnist import MARGIN
from benchmarks.paper.studies.study import QUIET, Arm, Study, Table, keys

JOB = "benchmarks/paper/jobs/quick.toml"

QUICK = Study(
    "quick",
    (
        Arm("grow", JOB, has_twin=True),
        Arm("hybrid", JOB, keys(schedule__policy="hybrid", schedule__growing_boundaries="1")),
        Arm("max_batch_128", JOB, keys(schedule__max_batch="128")),
    ),
    seeds=(0, 1, 2),
    changes=QUIET,
)

TABLES = (
    Table(
        "quick", QUICK, "results.md", ("grow-twin", "hybrid", "grow", "max_batch_128"), margin=MARGIN, with_figures=True
    ),
)
