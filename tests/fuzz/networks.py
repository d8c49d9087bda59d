"""Train each network of the zoo in several layouts, and compare with plain torch: python -m tests.fuzz.networks.

Under mpirun several ranks train together; without it one rank trains in several micro-batches. The weights must
agree with the reference, or the network must be rejected in one line before training.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from hvd_batchgrow.comm import backend
from hvd_batchgrow.comm.backend import connect
from hvd_batchgrow.comm.ranks import Ranks
from hvd_batchgrow.train.checkpoints.checkpoint import newest_good
from hvd_batchgrow.verification.digest import final_weights
from hvd_batchgrow.verification.tree_digest import tree_digest
from tests.devices import hide_gpus
from tests.fuzz.network_job import command_lines, write_case
from tests.fuzz.reference import Layout, distance, extra_state, limits, reference, tensors, without_extra
from tests.fuzz.runner import Case, Outcome, folder, run
from tests.fuzz.zoo import ENTRIES, Entry
from tests.fuzz.zoo.generated import variation

ALONE = (Layout(1, 4), Layout(1, 1), Layout(1, 2), Layout(1, 1, exact=True), Layout(1, 1, resumed=True))
TOGETHER = (Layout(2, 2), Layout(2, 1), Layout(2, 1, exact=True))
_MOST_CHARACTERS = 600
"""Most characters of a message that counts as one line."""


@dataclass(frozen=True)
class Verdict:
    """The result of a network in a layout."""

    outcome: str
    """equal, refused, stopped, not compared, or wrong."""
    faults: tuple[str, ...] = ()
    """A line for each fault."""
    text: str = ""
    """The output of the command."""


def main() -> int:
    """Train all networks, and print the faults and a summary. Return 1 if any network failed."""
    hide_gpus()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="pattern of the names of the networks to train")
    parser.add_argument("--generated", type=int, default=60, help="number of networks generated from seeds")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first generated network")
    parser.add_argument("--backend", default="auto", choices=["auto", "horovod", "torch"])
    parser.add_argument("--verbose", action="store_true", help="print all that each run prints")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    ranks = connect(arguments.backend)
    made = [variation(seed) for seed in range(arguments.seed, arguments.seed + arguments.generated)]
    entries = [entry for entry in [*ENTRIES, *made] if re.search(arguments.only, entry.title)]
    counts: Counter[str] = Counter()
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as base, joined(ranks):
        for entry in entries:
            verdicts = {layout: check(entry, layout, ranks, Path(base)) for layout in layouts(entry, ranks.size)}
            counts.update(verdict.outcome for verdict in verdicts.values())
            if ranks.rank == 0:
                _report(entry, verdicts, verbose=arguments.verbose)
    if ranks.rank == 0:
        outcomes = ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items()))
        seconds = time.monotonic() - begin
        print(f"{len(entries)} networks, {ranks.size} ranks ({ranks.backend}), {seconds:.0f} s: {outcomes}")
    ranks.close()
    return 1 if counts["wrong"] else 0


def _report(entry: Entry, verdicts: Mapping[Layout, Verdict], *, verbose: bool) -> None:
    for layout, verdict in verdicts.items():
        if verdict.faults or verbose:
            print(f"--- {entry.title}, {layout}: {verdict.outcome}", *verdict.faults, sep="\n    ", flush=True)
        if verbose:
            print(verdict.text)


def layouts(entry: Entry, num_ranks: int) -> Sequence[Layout]:
    """Return the layouts for a number of ranks; only one for a network that is always rejected."""
    found = ALONE if num_ranks == 1 else TOGETHER
    return found[:1] if entry.refused else found


def check(entry: Entry, layout: Layout, ranks: Ranks, base: Path) -> Verdict:
    """Train a network in a layout on all ranks, and return the verdict on rank 0."""
    with folder(base / f"rank{ranks.rank}"):
        write_case(entry, layout, Path.cwd())
        outcomes = []
        for words in command_lines(layout):
            cache = {"HVD_BATCHGROW_CACHE": "cache"}
            outcomes.append(run(Case("network", entry.title, words, frozenset({0, 1, 2, 75}), environment=cache)))
        codes = torch.zeros(ranks.size, dtype=torch.int64)
        codes[ranks.rank] = -1 if outcomes[-1].code is None else outcomes[-1].code
        ranks.all_reduce(codes, "codes")
        if ranks.rank:
            return Verdict("of rank 0")
        if len(set(codes.tolist())) > 1:
            return Verdict("wrong", (f"ranks end with {codes.tolist()}",))
        faults, outcome = _faults(entry, layout, outcomes)
        return Verdict("wrong" if faults else outcome, tuple(faults), "\n".join(o.text for o in outcomes))


def _faults(entry: Entry, layout: Layout, outcomes: Sequence[Outcome]) -> tuple[list[str], str]:
    """Return the faults and the outcome of a run."""
    text, code = "\n".join(outcome.text for outcome in outcomes), outcomes[-1].code
    if entry.raises and code is None:
        return _lacking(entry.stops, text), "stopped"
    if faults := [fault for outcome in outcomes for fault in outcome.faults]:
        return [*faults, text[-1500:]], ""
    if outcomes[0].code == 2:
        return _refusal_faults(entry.refused or (entry.exact_refused if layout.exact else ""), text), "refused"
    if code == 1:
        return (_lacking(entry.stops, text) if entry.stops else [text]), "stopped"
    expected = entry.refused or entry.stops or (entry.exact_refused if layout.exact else "")
    faults = [f"ends with {code}, but must be rejected or stop: {expected}"] if expected else []
    faults += _lacking(entry.named, text) + ([] if layout.exact else _lacking(entry.exact_refused, text))
    if not entry.compared:
        return faults, "not compared"
    return faults + _differences(entry, layout), "equal"


def _lacking(pattern: str, text: str) -> list[str]:
    return [] if re.search(pattern, text) else [f"does not print {pattern!r}", text]


def _refusal_faults(pattern: str, text: str) -> list[str]:
    """Return the faults of a rejection, which must be one line that gives the reason."""
    if not pattern:
        return ["is rejected, though torch trains it", *_last_lines(text)]
    lines = re.split(r"^.*: \d+ faults?$", text, flags=re.MULTILINE)[-1].strip().splitlines()
    faults = _lacking(pattern, "\n".join(lines))
    faults += [f"is rejected in {len(lines)} lines", *lines] if len(lines) != 1 else []
    return faults + [f"is rejected in {len(line)} characters" for line in lines if len(line) > _MOST_CHARACTERS]


def _last_lines(text: str) -> list[str]:
    return text.strip().splitlines()[-2:]


def _differences(entry: Entry, layout: Layout) -> list[str]:
    """Return a line for each tensor that differs from the reference by more than rounding explains."""
    try:
        expected, allowed = _expected(entry, layout)
    except Exception as error:
        return [f"plain torch fails: {type(error).__name__}: {error}"]
    found = final_weights(Path("runs/run")).tensors
    made = entry.make(**entry.arguments)
    saved = without_extra(made.state_dict())
    if lacking := saved.keys() - found.keys():
        return [f"the checkpoint lacks {sorted(lacking)}"]
    faults = []
    for name, value in without_extra(found).items():
        if not (gap := distance(value, expected[name])) <= allowed[name]:
            faults.append(f"{name} differs by {gap:.2g}, rounding explains {allowed[name]:.2g}")
    return faults + _extra_state_faults(extra_state(made))


def _extra_state_faults(expected: dict[str, Any]) -> list[str]:
    """Return a line for each extra state that differs in the checkpoint. Networks of the zoo never change it."""
    checkpoint, _ = newest_good(Path("runs/run/checkpoints"))
    assert checkpoint is not None
    found = checkpoint.model
    return [
        f"{name} is {found.get(name)!r}"
        for name, value in expected.items()
        if tree_digest({"": found.get(name)}) != tree_digest({"": value})
    ]


@lru_cache(maxsize=8)
def _expected(entry: Entry, layout: Layout) -> tuple[dict[str, Tensor], dict[str, float]]:
    expected = tensors(reference(entry, layout))
    return expected, limits(entry, layout, expected)


@contextmanager
def joined(ranks: Ranks) -> Iterator[None]:
    """Run commands on ranks that stay connected."""
    with (
        patch.object(backend, "connect", lambda *_: ranks),
        patch.object(ranks, "close", lambda: None),
        patch.object(ranks, "abort", lambda code: None),
    ):
        yield


if __name__ == "__main__":
    sys.exit(main())
