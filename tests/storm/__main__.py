"""The long form, with figures: python -m tests.storm [--kills 200] [--seed 0] [--folder DIR]."""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from tests.storm.nursery import Nursery
from tests.storm.storm import Storm, write_job

SHARES = {
    ("1 rank",): 0.3,
    ("2 ranks",): 0.25,
    ("mpirun",): 0.1,
    ("horovodrun-gloo",): 0.1,
    ("1 rank", "2 ranks", "3 ranks", "mpirun", "horovodrun-gloo"): 0.25,
}
"""Of the kills; of several forms each life draws one, in exact mode."""
MEASURED = frozenset({("1 rank",), ("1 rank", "2 ranks", "3 ranks", "mpirun", "horovodrun-gloo")})
"""Half of the kills of these are of a job whose batch grows by what it measures."""


def main() -> None:
    """Storm, and print a line for each kind of run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=None)
    arguments = parser.parse_args()
    total: Counter[str] = Counter()
    with Nursery() as nursery:
        for forms, share, measured in _parts():
            with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
                write_job(Path(folder), measured=measured)
                begin = time.monotonic()
                storm = Storm(Path(folder), nursery, arguments.seed, forms)
                tally = storm.until(round(share * arguments.kills), begin + 3600)
            total += tally.blows
            blows = ", ".join(f"{count} {blow}" for blow, count in sorted(tally.blows.items()))
            mode = "measured, " * measured + "exact mode, drawn from " * (len(forms) > 1)
            print(
                f"{mode}{', '.join(forms)}: {tally.lives} lives, of which {tally.blows.total()} were ended ({blows}); "
                f"all {tally.runs} runs equal to the bit, each sample once an epoch; {time.monotonic() - begin:.0f} s",
                flush=True,
            )
    print(f"{total.total()} blows: {', '.join(f'{count} {blow}' for blow, count in sorted(total.items()))}")


def _parts() -> Iterator[tuple[tuple[str, ...], float, bool]]:
    for forms, share in SHARES.items():
        jobs = (False, True) if forms in MEASURED else (False,)
        yield from ((forms, share / len(jobs), measured) for measured in jobs)


if __name__ == "__main__":
    main()
