"""Each network of the zoo in several layouts, against plain torch: python -m tests.fuzz.networks.

Under mpirun the ranks train together; alone, one rank trains in several passes. A network must end as
the reference does, or be rejected in one line before training. Nothing else is right.
"""

from __future__ import annotations

import argparse
import io
import os
import re
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w
import torch

from hvd_batchgrow.comm import connect as connecting
from hvd_batchgrow.comm.connect import connect
from hvd_batchgrow.comm.ranks import Ranks
from hvd_batchgrow.proof.digest import final_weights
from tests.fuzz.reference import (
    BATCHES, BETA2, DECAY, EPS, GHOST, LR, MOMENTUM, NUM_SAMPLES, SEED, TRUST,
    Layout, distance, limits, reference, resumes, rows, tensors,
)  # fmt: skip
from tests.fuzz.runner import Case, Outcome, folder, run
from tests.fuzz.zoo import ENTRIES, Entry

ALONE = (Layout(1, 4), Layout(1, 1), Layout(1, 3), Layout(1, 1, exact=True), Layout(1, 1, resumed=True))
TOGETHER = (Layout(2, 2), Layout(2, 1), Layout(2, 1, exact=True))
_MOST_CHARACTERS = 600
"""Of a message that is to be read as one line."""


@dataclass(frozen=True)
class Verdict:
    """What a network did in a layout."""

    outcome: str
    """equal, refused, stopped, not compared, or wrong."""
    faults: tuple[str, ...] = ()


def main() -> int:
    """Train all of them; print a line for each that fails and a table; 1 if any has failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="pattern of the names of the networks to train")
    parser.add_argument("--comm", default="auto", choices=["auto", "horovod", "torch"])
    parser.add_argument("--verbose", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    ranks = connect(arguments.comm)
    counts: Counter[str] = Counter()
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as base, joined(ranks):
        for entry in [entry for entry in ENTRIES if re.search(arguments.only, entry.title)]:
            for layout in layouts(ranks.size):
                if ranks.rank == 0 and arguments.verbose:
                    print(f"{entry.title}, {layout} …", flush=True)
                verdict = check(entry, layout, ranks, Path(base))
                counts[verdict.outcome] += 1
                if ranks.rank == 0 and verdict.faults:
                    print(f"--- {entry.title}, {layout}\n    " + "\n    ".join(verdict.faults), flush=True)
    if ranks.rank == 0:
        print(f"{len(ENTRIES)} networks on {ranks.size} ranks ({ranks.backend}), {time.monotonic() - begin:.0f} s:", end=" ")
        print(", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items())))
    ranks.close()
    return 1 if counts["wrong"] else 0


def layouts(num_ranks: int) -> Sequence[Layout]:
    """Those of so many ranks."""
    return ALONE if num_ranks == 1 else TOGETHER


def check(entry: Entry, layout: Layout, ranks: Ranks, base: Path) -> Verdict:
    """Train a network in a layout on all ranks; the verdict is rank 0's, and empty on others."""
    with folder(base / f"rank{ranks.rank}"):
        write_case(entry, layout, Path.cwd())
        outcomes = [run(Case("network", entry.title, ["train", "job.toml", *words], frozenset({0, 1, 2, 75}))) for words in resumes(layout)]
        # A run folder is there once the last rank has done with it.
        codes = torch.zeros(ranks.size, dtype=torch.int64)
        codes[ranks.rank] = -1 if outcomes[-1].code is None else outcomes[-1].code
        ranks.sum(codes, "codes")
        if ranks.rank:
            return Verdict("equal")
        if len(set(codes.tolist())) > 1:
            return Verdict("wrong", (f"ranks end with {codes.tolist()}",))
        try:
            return _verdict(entry, layout, outcomes)
        except Exception:
            return Verdict("wrong", (f"the comparison fails:\n{traceback.format_exc()}",))


def write_case(entry: Entry, layout: Layout, place: Path) -> None:
    """Job and data."""
    features, labels = rows()
    data = place / "data"
    data.mkdir()
    for part in ("train", "test"):
        np.save(data / f"{part}_rows.npy", features)
        np.save(data / f"{part}_labels.npy", labels)
    place.joinpath("job.toml").write_text(tomli_w.dumps(job_tree(entry, layout)))


def job_tree(entry: Entry, layout: Layout) -> dict[str, Any]:
    """The job whose updates `reference` does by hand."""
    optim: dict[str, Any] = {"name": entry.optim, "lr": LR[entry.optim], "momentum": MOMENTUM, "weight_decay": DECAY}
    optim |= {"beta2": BETA2, "eps": EPS} if entry.optim in {"adam", "adamw"} else {}
    optim |= {"trust_coefficient": TRUST} if entry.optim == "lars" else {}
    features = rows()[0].shape[1]
    return {
        "name": "run",
        "seed": SEED,
        "data": {"source": "numpy", "root": "data", "num_samples": NUM_SAMPLES, "mean": [0.0] * features, "deviation": [1.0] * features},
        "model": {"name": entry.name, "ghost_batch": GHOST, "arguments": entry.arguments},
        "optim": optim,
        "schedule": {
            "policy": "grow", "epochs": 1.0, "boundaries_epochs": [0.5], "factor": 2.0,
            "global_batch": BATCHES[0], "max_batch": BATCHES[-1],
        },
        "layout": {"threads_per_rank": 1, "ragged": True} | ({"exact": True} if layout.exact else {"max_micro_batch": GHOST * layout.groups}),
        "evaluation": {"batch": 32},
        "watch": {"tensorboard": False},
    }  # fmt: skip


def _verdict(entry: Entry, layout: Layout, outcomes: Sequence[Outcome]) -> Verdict:
    last = outcomes[-1]
    texts = "\n".join(outcome.text for outcome in outcomes)
    if faults := [fault for outcome in outcomes for fault in outcome.faults]:
        return Verdict("wrong", (*faults, f"its errors: {texts[-1500:]}"))
    pattern = entry.refused or (entry.exact_refused if layout.exact else "")
    if outcomes[0].code == 2:
        wrong = [] if pattern else ["is rejected, which torch trains"]
        lines = [line for line in outcomes[0].text.splitlines() if line.startswith("  ")]
        wrong += [f"is rejected in {len(lines)} lines"] if len(lines) != 1 else []
        wrong += [f"is rejected in {len(lines[0])} characters"] if lines and len(lines[0]) > _MOST_CHARACTERS else []
        wrong += [f"does not say {pattern!r}"] if pattern and not re.search(pattern, "\n".join(lines)) else []
        return Verdict("wrong", (*wrong, texts)) if wrong else Verdict("refused")
    if last.code == 1:
        right = bool(entry.stops) and re.search(entry.stops, texts)
        return Verdict("stopped") if right else Verdict("wrong", ("ends with 1", texts))
    if pattern or entry.stops:
        right = f"be rejected: {pattern}" if pattern else f"stop: {entry.stops}"
        return Verdict("wrong", (f"ends with {last.code} and should {right}", *_differences(entry, layout)))
    if entry.exact_refused and not re.search(entry.exact_refused, texts):
        return Verdict("wrong", (f"does not name the hazard {entry.exact_refused!r} in fast mode", texts))
    if not entry.compared:
        return Verdict("not compared")
    differences = _differences(entry, layout)
    return Verdict("wrong", (*differences, texts)) if differences else Verdict("equal")


def _differences(entry: Entry, layout: Layout) -> list[str]:
    """Each tensor that is further from the reference than rounding explains."""
    try:
        network = reference(entry, layout)
        expected = tensors(network)
        allowed = limits(entry, layout, expected)
    except Exception as error:
        return [f"plain torch fails: {type(error).__name__}: {error}"]
    found = final_weights(Path("runs/run")).tensors
    found_tensors = {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}
    if found_tensors.keys() != expected.keys():
        return [f"holds other tensors: {sorted(found_tensors.keys() ^ expected.keys())}"]
    gaps = {name: distance(value, found_tensors[name]) for name, value in expected.items()}
    return [
        f"{name} differs by {gaps[name]:.2g}, rounding explains {allowed[name]:.2g}"
        for name in expected
        if not gaps[name] <= allowed[name]
    ]


@contextmanager
def joined(ranks: Ranks) -> Iterator[None]:
    """Commands run on ranks that stay joined."""
    kept = connecting.connect, ranks.close, ranks.abort
    connecting.connect = lambda comm="auto": ranks  # type: ignore[assignment]
    ranks.close = lambda: None  # type: ignore[method-assign]
    ranks.abort = lambda code: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        connecting.connect, ranks.close, ranks.abort = kept  # type: ignore[method-assign]


if __name__ == "__main__":
    sys.exit(main())
