"""The claims on a second set of images, characters of fonts: docs/results.md."""

from __future__ import annotations

from benchmarks.paper.studies.fashion_mnist import FIVE, MARGIN, PAGE, PER_EPOCH, SEESAW, WEIGHT_DECAY
from benchmarks.paper.studies.study import QUIET, Arm, Study, Table, keys

JOB = "benchmarks/paper/jobs/fonts62_grow.toml"
ADAMW = "benchmarks/paper/jobs/fonts62_adamw.toml"

FONTS = Study(
    "fonts62",
    (
        Arm("grow", JOB, has_twin=True),
        Arm("hybrid", JOB, keys(schedule__policy="hybrid", schedule__growing_boundaries="1")),
        Arm("late", "benchmarks/paper/jobs/fonts62_late.toml"),
        Arm("branch", "benchmarks/paper/jobs/fonts62_branch.toml", seeds=FIVE[:3]),
        Arm("adamw", ADAMW, has_twin=True, seeds=FIVE[:3]),
        Arm("adamw_per_epoch", ADAMW, PER_EPOCH, seeds=FIVE[:3]),
        Arm("adamw_seesaw", ADAMW, SEESAW, seeds=FIVE[:3]),
        Arm("adamw_seesaw_per_epoch", ADAMW, SEESAW | PER_EPOCH, seeds=FIVE[:3]),
    ),
    seeds=FIVE,
    changes=QUIET,
)

TABLES = (
    Table(
        "fonts62",
        FONTS,
        PAGE,
        ("grow-twin", "hybrid", "grow", "late", "branch"),
        margin=MARGIN,
        with_figures=True,
    ),
    Table("fonts62_weight_decay", FONTS, PAGE, WEIGHT_DECAY, margin=MARGIN),
)
