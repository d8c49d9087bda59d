"""Proof, from what a run recorded, of which samples it has used."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvd_batchgrow.data.datasets.dataset import ReportProgress
from hvd_batchgrow.data.order.order_digest import entry_digests
from hvd_batchgrow.data.order.stream import Stream
from hvd_batchgrow.messages.errors import RunError
from hvd_batchgrow.storage.json_lines import read_json_lines
from hvd_batchgrow.train.checkpoints.checkpoint import Checkpoint, newest_good
from hvd_batchgrow.train.run.record_gaps import MISSING_TO
from hvd_batchgrow.train.run.run_folder import read_plan

_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class Consumed:
    """What a run recorded of its updates, in order."""

    run: Path
    num_samples: int
    """N."""
    seed: int
    bounds: NDArray[np.int64]
    """(updates + 1,) sample counter before the first update and after each."""
    digests: NDArray[np.uint64]
    """(updates,) `consumed.digest` of each, over all ranks; 0 where it is not on record."""
    is_known: NDArray[np.bool_]
    """(updates,) False for a hole that a resume has recorded, which stands for the updates that are missing there."""
    replaced: dict[int, int]
    """Place in the stream to the sample that stood in there for a bad one."""

    @property
    def holes(self) -> list[tuple[int, int]]:
        """Sample counters between which nothing is on record."""
        starts, ends = self.bounds[:-1][~self.is_known], self.bounds[1:][~self.is_known]
        return list(zip(starts.tolist(), ends.tolist(), strict=True))


@dataclass(frozen=True)
class EpochCount:
    """How often the samples of one epoch were used."""

    epoch: int
    entries: int
    """Places of the epoch that the run has reached; N: all of it."""
    once: int
    missing: int
    """Samples that were not used; in an epoch that the run did not finish, not beyond those yet to come."""
    repeated: int
    """Samples that were used more than once."""
    unknown: int = 0
    """Samples of which nothing is on record, because of a hole that a resume has recorded."""


@dataclass(frozen=True)
class Audit:
    """What the record of a run proves."""

    consumed: Consumed
    wrong_updates: tuple[int, ...]
    """Updates, counted from 0, that consumed something else than the stream of the run's seed gives."""
    epochs: tuple[EpochCount, ...]

    @property
    def passed(self) -> bool:
        """Every sample once an epoch, in the order of the stream, as far as there is a record.

        Bad samples that were replaced on record, and holes that a resume has recorded, are no failure.
        """
        uneven = any(epoch.missing or epoch.repeated for epoch in self.epochs)
        return not self.wrong_updates and (not uneven or bool(self.consumed.replaced))


def read_consumed(run: Path) -> Consumed:
    """Read `consumed.jsonl` of a run folder.

    Raises:
        RunError: there is none, or its updates do not follow one another and no resume has recorded why.
    """
    plan = read_plan(run)
    lines = read_json_lines(run / "consumed.jsonl")
    if not lines:
        raise RunError(f"{run / 'consumed.jsonl'} holds no update: nothing to audit")
    if (wrong := next((k for k, line in enumerate(lines, 1) if not _is_update(line)), None)) is not None:
        raise RunError(f"{run / 'consumed.jsonl'} is damaged: line {wrong} is no update")
    starts = np.array([line["samples"] for line in lines], dtype=np.int64)
    lengths = [line[MISSING_TO] - line["samples"] if MISSING_TO in line else line["global_batch"] for line in lines]
    bounds = np.append(starts, starts[-1] + lengths[-1])
    if len(gaps := np.flatnonzero(np.diff(bounds) != lengths)) or starts[0]:
        where = int(bounds[gaps[0]]) if len(gaps) else 0
        fault = f"what follows sample {where} is missing or there twice, and no resume recorded that"
        raise RunError(f"{run / 'consumed.jsonl'}: {fault}")
    if (reached := _saved_at(run)) > bounds[-1]:
        raise RunError(
            f"{run / 'consumed.jsonl'} ends at sample {bounds[-1]}, and the newest checkpoint stands at {reached}: "
            "what lies between is missing; train --resume auto records that"
        )
    digests = np.array([int(line.get("digest", "0"), 16) for line in lines], dtype=np.uint64)
    is_known = np.array([MISSING_TO not in line for line in lines])
    replaced = {entry: id_ for line in lines for entry, id_ in line.get("replaced", ())}
    return Consumed(run, plan["num_samples"], plan["job_file"]["seed"], bounds, digests, is_known, replaced)


def _saved_at(run: Path) -> int:
    """Sample counter of the newest good checkpoint; 0 without one."""
    try:
        data, _ = newest_good(run / "checkpoints")
    except RunError:
        return 0
    return Checkpoint.from_bytes(data).samples if data else 0


def _is_update(line: Mapping[str, Any]) -> bool:
    """Whether a line is of the form that a run writes, for an update or for a hole."""
    if MISSING_TO in line:
        end = line[MISSING_TO]
        return type(end) is int and 0 <= line["samples"] < end < 1 << 62 and len(line) == 2
    counts = (line["samples"], line.get("global_batch"))
    digest, replaced = line.get("digest"), line.get("replaced", [])
    return (
        all(type(count) is int and 0 <= count < 1 << 62 for count in counts)
        and isinstance(digest, str)
        and re.fullmatch("[0-9a-f]{16}", digest) is not None
        and isinstance(replaced, list)
        and all(isinstance(pair, list) and list(map(type, pair)) == [int, int] for pair in replaced)
    )


def audit(consumed: Consumed, report: ReportProgress) -> Audit:
    """Compare what every update consumed with the stream, and count how often each sample comes in an epoch.

    An update whose digest is the stream's has consumed just those samples (but for one chance in 2⁶⁴);
    so the stream's own entries are counted.

    Args:
        consumed: of `read_consumed`.
        report: told of samples checked.
    """
    stream = Stream(consumed.num_samples, consumed.seed)
    end = int(consumed.bounds[-1])
    expected = np.zeros(len(consumed.digests), dtype=np.uint64)
    counts: list[EpochCount] = []
    uses, unknown = np.zeros(consumed.num_samples, dtype=np.uint8), 0
    for start, stop in _stretches(end, consumed.num_samples):
        entries = np.arange(start, stop)
        ids = _ids(stream, entries, consumed)
        first = int(np.searchsorted(consumed.bounds, start, side="right")) - 1
        updates = np.searchsorted(consumed.bounds, entries, side="right") - 1 - first
        np.add.at(expected[first:], updates, entry_digests(entries, ids))
        is_known = consumed.is_known[updates + first]
        np.add.at(uses, ids[is_known], 1)
        unknown += int((~is_known).sum())
        if stop % consumed.num_samples == 0 or stop == end:
            counts.append(_count(uses, stop, consumed.num_samples, unknown))
            uses[:], unknown = 0, 0
        report("checking samples", stop, end)
    wrong = tuple(np.flatnonzero((expected != consumed.digests) & consumed.is_known).tolist())
    return Audit(consumed, wrong, tuple(counts))


def compare_orders(first: Consumed, second: Consumed) -> str:
    """One line on whether two runs consumed the same samples in the same order, whatever their batches.

    Digests add up: the sums of both are compared between the counters at which both runs were between two updates,
    except where one of them has a hole.
    """
    common, at_first, at_second = np.intersect1d(first.bounds, second.bounds, return_indices=True)
    parts = ((first, at_first), (second, at_second))
    sums = [np.diff(np.insert(np.cumsum(c.digests, dtype=np.uint64), 0, 0)[at]) for c, at in parts]
    holes = [np.diff(np.insert(np.cumsum(~c.is_known), 0, 0)[at]) for c, at in parts]
    is_known = (holes[0] == 0) & (holes[1] == 0)
    different = np.flatnonzero((sums[0] != sums[1]) & is_known)
    runs = f"{first.run} and {second.run}"
    if len(different):
        k = different[0]
        return f"{runs}: other samples between {common[k]:,} and {common[k + 1]:,}"
    counts = f"compared at {int(is_known.sum()):,} counts"
    lost = int(np.diff(common)[~is_known].sum())
    counts += f", except for {lost:,} samples that are not on record" if lost else ""
    return f"{runs}: the same samples in the same order up to {common[-1]:,}, {counts}"


def _stretches(end: int, num_samples: int) -> Iterator[tuple[int, int]]:
    """Of moderate size, none of which spans two epochs."""
    start = 0
    while start < end:
        stop = min(end, start + _AT_ONCE, (start // num_samples + 1) * num_samples)
        yield start, stop
        start = stop


def _ids(stream: Stream, entries: NDArray[np.int64], consumed: Consumed) -> NDArray[np.int64]:
    _, ids = stream.at(entries)
    for entry in consumed.replaced.keys() & set(entries.tolist()) if consumed.replaced else ():
        ids[entry - entries[0]] = consumed.replaced[entry]
    return ids


def _count(uses: NDArray[np.uint8], stop: int, num_samples: int, unknown: int) -> EpochCount:
    entries = (stop - 1) % num_samples + 1
    once, never = int((uses == 1).sum()), int((uses == 0).sum())
    missing = never - unknown - (num_samples - entries)  # without those yet to come
    return EpochCount((stop - 1) // num_samples, entries, once, missing, num_samples - once - never, unknown)


def replaced_samples(consumed: Consumed, most: int) -> Sequence[str]:
    """Lines that name samples that were bad, and what stood in for them."""
    stream = Stream(consumed.num_samples, consumed.seed)
    entries = np.array(sorted(islice(consumed.replaced, most)), dtype=np.int64)
    epochs, ids = stream.at(entries)
    return [
        f"epoch {epoch}: sample {id_} was bad, sample {consumed.replaced[int(entry)]} was used in its place"
        for entry, epoch, id_ in zip(entries, epochs, ids, strict=True)
    ]
