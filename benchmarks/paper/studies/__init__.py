"""The studies, in the order in which they are trained, and their tables."""

from __future__ import annotations

from benchmarks.paper.studies import fashion_mnist, fonts, large_batch, quick, tables, triggers

STUDIES = (
    fashion_mnist.ABLATION,
    fashion_mnist.CLAIMS,
    large_batch.TUNING,
    large_batch.LARGE,
    tables.LETTER,
    tables.SHUTTLE,
    fonts.FONTS,
    triggers.TRIGGERS,
    triggers.SCHEDULES,
    quick.QUICK,
)
TABLES = (*fashion_mnist.TABLES, *large_batch.TABLES, *tables.TABLES, *fonts.TABLES, *triggers.TABLES, *quick.TABLES)
