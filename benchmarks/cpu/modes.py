"""`hvd-batchgrow train` in two modes, in turns: exact beside fast, and all telemetry beside none."""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.cpu.cases import case_of
from benchmarks.cpu.contestant import closing_all
from benchmarks.cpu.loops import in_turns, ours
from benchmarks.rows.figures import Group, Outcome, compare
from benchmarks.rows.row import Settings, say

_NOISE = {"measure": True}
MODES: dict[str, dict[str, dict[str, dict[str, Any]]]] = {
    "exact": {"fast": {}, "exact": {"layout": {"exact": True}}},
    "telemetry": {
        "none": {"logging": {"tensorboard": False, "logs_per_epoch": 1}},
        "TensorBoard, 100 records": {"logging": {"tensorboard": True, "logs_per_epoch": 100}},
        "… and gradient noise": {"logging": {"tensorboard": True, "logs_per_epoch": 100}, "gradient_noise": _NOISE},
    },
}
"""Sections of the job of each contestant of a row; the first one is the reference."""


def run(name: str, settings: Settings) -> Outcome:
    """Measure a row of `MODES`, on one rank, and exact mode also on two."""
    case = case_of("small", is_tiny=settings.is_tiny)
    variants = [(ranks, *sizes) for ranks in ((1, 2) if name == "exact" else (1,)) for sizes in case.batches]
    groups: list[Group] = []
    for index, (num_ranks, batch, num_updates) in enumerate(variants):
        say(f"B {batch}, ranks: {num_ranks}: starting")
        with tempfile.TemporaryDirectory() as folder, closing_all() as started:
            for mode, sections in MODES[name].items():
                begin = partial(ours, Path(folder), mode.replace(" ", "_"), case, batch, num_updates, num_ranks)
                started[mode] = begin(**{key: dict(value) for key, value in sections.items()})
            rates = in_turns(started, settings, index, len(variants))
        title = f"{case.title}, B {batch:,}, ranks: {num_ranks}"
        groups.append(compare(title, "samples/s", rates, next(iter(rates))))
    return Outcome(groups)
