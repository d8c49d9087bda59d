"""The studies, in the order in which they are trained, and their tables."""

from __future__ import annotations

from benchmarks.paper.studies import fashion_mnist, fonts, quick, tables, triggers

STUDIES = (
    fashion_mnist.ABLATION,
    fashion_mnist.CLAIMS,
    tables.LETTER,
    tables.SHUTTLE,
    fonts.FONTS,
    triggers.TRIGGERS,
    triggers.SCHEDULES,
    quick.QUICK,
)
TABLES = (*fashion_mnist.TABLES, *tables.TABLES, *fonts.TABLES, *triggers.TABLES, *quick.TABLES)
