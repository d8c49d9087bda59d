"""The plateau rule on tables: docs/results.md."""

from __future__ import annotations

from benchmarks.paper.studies.fashion_mnist import MARGIN, PAGE
from benchmarks.paper.studies.study import QUIET, Arm, Study, Table, keys


def _plateau(name: str, batch: int) -> Study:
    job = f"benchmarks/paper/jobs/{name}_plateau.toml"
    return Study(
        name,
        (
            Arm("reduce_lr", job, keys(schedule__max_batch=str(batch))),
            Arm("grow_batch", job),
            Arm("fixed", f"benchmarks/paper/jobs/{name}_grow.toml", has_twin=True),
        ),
        seeds=(0, 1, 2, 3, 4),
        changes=QUIET | keys(data__validation_fraction="0.1"),
    )


LETTER, SHUTTLE = _plateau("letter", 64), _plateau("shuttle", 128)
ROWS = ("reduce_lr", "grow_batch", "fixed-twin", "fixed")
TABLES = (
    *(Table(study.name, study, PAGE, ROWS, margin=MARGIN, with_seconds=True) for study in (LETTER, SHUTTLE)),
    *(
        Table(f"{study.name}_loss", study, PAGE, ROWS[:2], dataset="validation", result="loss", with_figures=True)
        for study in (LETTER, SHUTTLE)
    ),
)
