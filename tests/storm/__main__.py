"""The long form, with figures: python -m tests.storm [--kills 200] [--minutes 120] [--seed 0] [--figures FILE]."""

from __future__ import annotations

import argparse
import json
import math
import shutil
import tempfile
import time
from pathlib import Path

from tests.storm.nursery import Nursery
from tests.storm.storm import Storm, Tally, write_job

SHARES = {
    ("1 rank",): 0.3,
    ("2 ranks",): 0.25,
    ("mpirun",): 0.1,
    ("horovodrun-gloo",): 0.1,
    ("1 rank", "2 ranks", "3 ranks", "mpirun", "horovodrun-gloo"): 0.25,
}
"""Of the kills; of several forms each life draws one, in exact mode."""


def main() -> None:
    """Storm, all kinds of runs by turns, and print a line for each kind."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--minutes", type=float, default=math.inf, help="no kill after so many; all runs then end")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=None, help="where runs are made")
    parser.add_argument("--figures", type=Path, default=None, help="kept after each run, and what is there is added to")
    arguments = parser.parse_args()
    deadline = time.monotonic() + 60 * arguments.minutes
    tallies = _read(arguments.figures)
    wanted = {forms: round(share * arguments.kills) for forms, share in SHARES.items()}
    storms: dict[tuple[str, ...], Storm] = {}
    folder = Path(tempfile.mkdtemp(prefix="storm-", dir=arguments.folder))
    print(f"runs are made in {folder}, which stays if something is lost", flush=True)
    with Nursery() as nursery:
        # Whoever lacks most of its share comes next: whenever it ends, all kinds have had theirs.
        while (forms := min(SHARES, key=lambda forms: tallies[forms].kills / wanted[forms])) and (
            tallies[forms].kills < wanted[forms] and time.monotonic() < deadline
        ):
            if forms not in storms:
                storms[forms] = _begin(folder / str(len(storms)), nursery, arguments.seed, forms, tallies[forms])
            storms[forms].weather(wanted[forms], deadline)
            _write(arguments.figures, tallies)
            print(f"{sum(tally.kills for tally in tallies.values())} of {sum(wanted.values())} kills", flush=True)
    shutil.rmtree(folder)
    for forms, tally in tallies.items():
        print(f"{'exact mode, drawn from ' if len(forms) > 1 else ''}{', '.join(forms)}: {tally.told()}")
    total = sum((tally.blows for tally in tallies.values()), Tally().blows)
    print(f"{total.total()} kills: {', '.join(f'{count} {blow}' for blow, count in sorted(total.items()))}")


def _begin(folder: Path, nursery: Nursery, seed: int, forms: tuple[str, ...], tally: Tally) -> Storm:
    folder.mkdir()
    write_job(folder)
    return Storm(folder, nursery, seed, forms, tally)


def _read(figures: Path | None) -> dict[tuple[str, ...], Tally]:
    known = json.loads(figures.read_text()) if figures and figures.exists() else {}
    return {forms: Tally.of(known.get(", ".join(forms), {})) for forms in SHARES}


def _write(figures: Path | None, tallies: dict[tuple[str, ...], Tally]) -> None:
    if figures:
        figures.write_text(json.dumps({", ".join(forms): vars(tally) for forms, tally in tallies.items()}, indent=2))


if __name__ == "__main__":
    main()
