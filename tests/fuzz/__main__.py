"""The long form, with figures: python -m tests.fuzz [--cases 10000] [--seed 0] [--first 0] [--case K]."""

from __future__ import annotations

import argparse
import io
import os
import resource
import sys
import tempfile
import time
import warnings
from collections import Counter, defaultdict
from contextlib import redirect_stderr
from pathlib import Path

from hvd_batchgrow.cli import main as command
from tests.devices import hide_gpus
from tests.fuzz.cases import make_case
from tests.fuzz.image_forms import forms
from tests.fuzz.images import check_forms
from tests.fuzz.runner import Outcome, folder, run
from tests.fuzz.world import World

_NUM_IMAGE_SEEDS = 3
_MOST_BYTES = 8 << 30
"""Of addresses: a job may ask for a network that no machine holds, and must not take this one down."""


def main() -> int:
    """Run the cases, print a line for each that fails and a table; 1 if any has failed."""
    hide_gpus()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--case", type=int, default=None, help="this one alone, with all that it says")
    arguments = parser.parse_args()
    wrong_images = 0 if arguments.case is not None else _check_images(arguments.seed)
    warnings.simplefilter("error")
    resource.setrlimit(resource.RLIMIT_AS, (_MOST_BYTES, _MOST_BYTES))
    alone = arguments.case is not None
    numbers = [arguments.case] if alone else range(arguments.first, arguments.first + arguments.cases)
    codes: dict[str, Counter[str]] = defaultdict(Counter)
    failed: list[int] = []
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as base:
        world = make_world(Path(base))
        for count, number in enumerate(numbers, 1):
            with folder(Path(base) / "at"):
                case = make_case(arguments.seed, number, world)
                outcome = run(case)
            codes[case.kind]["raised" if outcome.code is None else str(outcome.code)] += 1
            if alone:
                print(f"{case}\n{outcome.text}\n{outcome}")
            if outcome.faults:
                failed.append(number)
                _tell(number, arguments.seed, case.kind, case.about, list(case.words), outcome)
            if count % 500 == 0:
                print(f"{count} cases, {len(failed)} failed, {time.monotonic() - begin:.0f} s", flush=True)
    _table(codes)
    print(f"{len(numbers)} cases of seed {arguments.seed}, {len(failed)} failed, {time.monotonic() - begin:.0f} s")
    return 1 if failed or wrong_images else 0


def _check_images(seed: int) -> int:
    """Read every form of image file, with the pixels and sizes of several seeds; the number of faults."""
    faults: list[str] = []
    for number in range(seed, seed + _NUM_IMAGE_SEEDS):
        made = forms(number)
        with tempfile.TemporaryDirectory() as base, folder(Path(base) / "at"):
            os.environ["HVD_BATCHGROW_CACHE"] = "cache"
            faults += (found := check_forms(made, Path("data")))
        refused = sum(form.expected is None for form in made)
        print(f"{len(made)} image forms of seed {number}, {refused} of them to refuse: {len(found)} faults", flush=True)
    for fault in faults:
        print(f"    {fault}")
    return len(faults)


def make_world(base: Path) -> World:
    """The world of a folder, with a run in it; the cache of all that follows is there too."""
    os.environ["HVD_BATCHGROW_CACHE"] = "cache"
    (base / "world").mkdir()
    world = World(base / "world")
    with folder(base / "first"), redirect_stderr(io.StringIO()):
        world.add_run(command)
    return world


def _tell(number: int, seed: int, kind: str, about: str, words: list[str], outcome: Outcome) -> None:
    print(f"\n--- case {number}, {kind}: {about}\n    {repr(words)[:500]}")
    print(f"    ended with {outcome.code}, {outcome.seconds:.1f} s")
    for fault in outcome.faults:
        print("    " + fault[-3000:].replace("\n", "\n    "))
    print("    its errors: " + outcome.text[:600].replace("\n", "\n    "))
    print(f"    again: python -m tests.fuzz --seed {seed} --case {number}", flush=True)


def _table(codes: dict[str, Counter[str]]) -> None:
    columns = sorted({code for counter in codes.values() for code in counter})
    print(f"\n{'kind':<22}" + "".join(f"{code:>8}" for code in columns))
    for kind in sorted(codes):
        print(f"{kind:<22}" + "".join(f"{codes[kind][code]:>8}" for code in columns))
    total = sum(codes.values(), Counter())
    print(f"{'all':<22}" + "".join(f"{total[code]:>8}" for code in columns))


if __name__ == "__main__":
    sys.exit(main())
