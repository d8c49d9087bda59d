"""`hvd-batchgrow train` in several modes, in turns: exact and fast, Horovod and torch.distributed, with telemetry."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.cpu.cases import case_of
from benchmarks.cpu.contestant import closing_all
from benchmarks.cpu.loops import in_turns, ours
from benchmarks.rows.figures import Group, Outcome, compare
from benchmarks.rows.row import Settings, say

_LOGGING = {"tensorboard": True, "logs_per_epoch": 100}


@dataclass(frozen=True)
class Mode:
    """What distinguishes a contestant: options of `train`, and sections of its job."""

    options: tuple[str, ...] = ()
    sections: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


MODES: dict[str, dict[str, Mode]] = {
    "exact": {"fast": Mode(), "exact": Mode(sections={"layout": {"exact": True}})},
    "backends": {"Horovod": Mode(("--backend", "horovod")), "torch.distributed": Mode(("--backend", "torch"))},
    "telemetry": {
        "none": Mode(sections={"logging": {"tensorboard": False, "logs_per_epoch": 1}}),
        "TensorBoard, 100 records": Mode(sections={"logging": _LOGGING}),
        "… and gradient noise": Mode(sections={"logging": _LOGGING, "gradient_noise": {"measure": True}}),
    },
}
"""The contestants of each row; the first one is the reference."""
RANKS = {"exact": (1, 2), "backends": (2,), "telemetry": (1,)}


def run(name: str, settings: Settings) -> Outcome:
    """Measure a row of `MODES`; `…_wrn` is WRN-16-4."""
    what, _, network = name.partition("_")
    case = case_of(network or "small", is_tiny=settings.is_tiny)
    variants = [(ranks, *sizes) for ranks in RANKS[what] for sizes in case.batches]
    groups: list[Group] = []
    for index, (num_ranks, batch, num_updates) in enumerate(variants):
        say(f"B {batch}, ranks: {num_ranks}: starting")
        with tempfile.TemporaryDirectory() as folder, closing_all() as started:
            for number, (title, mode) in enumerate(MODES[what].items()):
                begin = partial(ours, Path(folder), f"run{number}", case, batch, num_updates, num_ranks, mode.options)
                started[title] = begin(**{key: dict(value) for key, value in mode.sections.items()})
            rates = in_turns(started, settings, index, len(variants))
        title = f"{case.title}, B {batch:,}, ranks: {num_ranks}"
        groups.append(compare(title, "samples/s", rates, next(iter(rates))))
    return Outcome(groups)
