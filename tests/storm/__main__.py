"""The long form, with figures: python -m tests.storm [--kills 200] [--minutes 120] [--seed 0] [--figures FILE]."""

from __future__ import annotations

import argparse
import json
import math
import shutil
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from tests.devices import hide_gpus
from tests.storm.nursery import Nursery
from tests.storm.storm import Storm, Tally, write_job


class Kind(NamedTuple):
    """Of run."""

    forms: tuple[str, ...]
    """If there are several, each attempt draws one, in exact mode."""
    measured: bool = False
    """Its batch grows by what it measures."""

    def describe(self) -> str:
        """In words."""
        drawn = "exact mode, drawn from " if len(self.forms) > 1 else ""
        return f"{'measured, ' if self.measured else ''}{drawn}{', '.join(self.forms)}"


ALL = ("1 rank", "2 ranks", "3 ranks", "mpirun", "horovodrun-gloo")
SHARES = {
    Kind(("1 rank",)): 0.15,
    Kind(("1 rank",), measured=True): 0.15,
    Kind(("2 ranks",)): 0.25,
    Kind(("mpirun",)): 0.1,
    Kind(("horovodrun-gloo",)): 0.1,
    Kind(ALL): 0.125,
    Kind(ALL, measured=True): 0.125,
}
"""Of the kills."""


def main() -> None:
    """Storm all kinds of runs in turn, and print a line for each kind."""
    hide_gpus()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--minutes", type=float, default=math.inf, help="no kill after so many; all runs then end")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=None, help="where runs are made")
    parser.add_argument("--figures", type=Path, default=None, help="kept after each run, and what is there is added to")
    arguments = parser.parse_args()
    deadline = time.monotonic() + 60 * arguments.minutes
    tallies = _read(arguments.figures)
    wanted = {kind: round(share * arguments.kills) for kind, share in SHARES.items()}
    storms: dict[Kind, Storm] = {}
    folder = Path(tempfile.mkdtemp(prefix="storm-", dir=arguments.folder))
    print(f"runs are made in {folder}, which stays if something is lost", flush=True)
    with Nursery() as nursery:
        # Whoever lacks most of its share comes next: whenever it ends, all kinds have had theirs.
        while (kind := min(SHARES, key=lambda kind: tallies[kind].kills / wanted[kind])) and (
            tallies[kind].kills < wanted[kind] and time.monotonic() < deadline
        ):
            if kind not in storms:
                storms[kind] = _begin(folder / str(len(storms)), nursery, arguments.seed, kind, tallies[kind])
            storms[kind].weather(wanted[kind], deadline)
            _write(arguments.figures, tallies)
            print(f"{sum(tally.kills for tally in tallies.values())} of {sum(wanted.values())} kills", flush=True)
    shutil.rmtree(folder)
    for kind, tally in tallies.items():
        print(f"{kind.describe()}: {tally.describe()}")
    total = sum((tally.blows for tally in tallies.values()), Tally().blows)
    print(f"{total.total()} kills: {', '.join(f'{count} {blow}' for blow, count in sorted(total.items()))}")


def _begin(folder: Path, nursery: Nursery, seed: int, kind: Kind, tally: Tally) -> Storm:
    folder.mkdir()
    write_job(folder, measured=kind.measured)
    return Storm(folder, nursery, seed, kind.forms, tally)


def _read(figures: Path | None) -> dict[Kind, Tally]:
    known = json.loads(figures.read_text()) if figures and figures.exists() else {}
    return {kind: Tally.of(known.get(kind.describe(), {})) for kind in SHARES}


def _write(figures: Path | None, tallies: dict[Kind, Tally]) -> None:
    if figures:
        figures.write_text(json.dumps({kind.describe(): vars(tally) for kind, tally in tallies.items()}, indent=2))


if __name__ == "__main__":
    main()
