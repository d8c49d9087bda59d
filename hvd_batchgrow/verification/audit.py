"""Check, from the record of a run, which samples it has used."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvd_batchgrow.config.source_specs import ReportProgress
from hvd_batchgrow.data.order.order_digest import index_digests
from hvd_batchgrow.data.order.stream import Stream
from hvd_batchgrow.messages.errors import RunError
from hvd_batchgrow.results.plan_file import read_plan
from hvd_batchgrow.storage.json_lines import read_json_lines
from hvd_batchgrow.train.checkpoints.checkpoint import newest_good
from hvd_batchgrow.train.run.record_gaps import MISSING_TO

_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class Consumed:
    """The recorded updates of a run, in order."""

    run: Path
    num_samples: int
    """N."""
    seed: int
    bounds: NDArray[np.int64]
    """(updates + 1,) sample counter before the first update and after each."""
    digests: NDArray[np.uint64]
    """(updates,) `order_digest.digest` of each update, over all ranks; 0 if it was not recorded."""
    is_known: NDArray[np.bool_]
    """(updates,) False for a gap that a resume has recorded in place of the missing updates."""
    replaced: dict[int, int]
    """Maps the stream index of a bad sample to the sample that replaced it."""

    @property
    def gaps(self) -> list[tuple[int, int]]:
        """Return the first and end sample counter of each gap in the record."""
        starts, ends = self.bounds[:-1][~self.is_known], self.bounds[1:][~self.is_known]
        return list(zip(starts.tolist(), ends.tolist(), strict=True))


@dataclass(frozen=True)
class EpochCount:
    """How often the samples of one epoch were used."""

    epoch: int
    num_reached: int
    """Samples of the epoch that the run has reached; N if it finished the epoch."""
    once: int
    missing: int
    """Samples that were not used. In an unfinished epoch, the samples yet to come do not count."""
    repeated: int
    """Samples that were used more than once."""
    unknown: int = 0
    """Samples in a gap that a resume has recorded: which samples were used there is unknown."""


@dataclass(frozen=True)
class Audit:
    """What the record of a run proves."""

    consumed: Consumed
    wrong_updates: tuple[int, ...]
    """Updates, counted from 0, whose samples differ from the stream of the run's seed."""
    epochs: tuple[EpochCount, ...]

    @property
    def passed(self) -> bool:
        """Whether every recorded update used the stream's samples, each once an epoch.

        Recorded replacements of bad samples and recorded gaps do not fail the audit.
        """
        uneven = any(epoch.missing or epoch.repeated for epoch in self.epochs)
        return not self.wrong_updates and (not uneven or bool(self.consumed.replaced))


def read_consumed(run: Path) -> Consumed:
    """Read `consumed.jsonl` of a run folder.

    Raises:
        RunError: the file has no updates, or an update is missing or repeated and no resume recorded a gap.
    """
    plan = read_plan(run)
    lines = read_json_lines(run / "consumed.jsonl")
    if not lines:
        raise RunError(f"{run / 'consumed.jsonl'} has no updates: nothing to audit")
    if (wrong := next((k for k, line in enumerate(lines, 1) if not _is_update(line)), None)) is not None:
        raise RunError(f"{run / 'consumed.jsonl'} is damaged: line {wrong} is not an update")
    starts = np.array([line["samples"] for line in lines], dtype=np.int64)
    lengths = [line[MISSING_TO] - line["samples"] if MISSING_TO in line else line["global_batch"] for line in lines]
    bounds = np.append(starts, starts[-1] + lengths[-1])
    if len(gaps := np.flatnonzero(np.diff(bounds) != lengths)) or starts[0]:
        where = int(bounds[gaps[0]]) if len(gaps) else 0
        fault = f"the update at sample {where} is missing or recorded twice, and no resume recorded a gap"
        raise RunError(f"{run / 'consumed.jsonl'}: {fault}")
    if (reached := _saved_at(run)) > bounds[-1]:
        raise RunError(
            f"{run / 'consumed.jsonl'} ends at sample {bounds[-1]}, but the newest checkpoint is at {reached}: "
            "the updates in between are missing; train --resume auto records the gap"
        )
    digests = np.array([int(line.get("digest", "0"), 16) for line in lines], dtype=np.uint64)
    is_known = np.array([MISSING_TO not in line for line in lines])
    replaced = {index: id_ for line in lines for index, id_ in line.get("replaced", ())}
    return Consumed(run, plan["num_samples"], plan["job_file"]["seed"], bounds, digests, is_known, replaced)


def _saved_at(run: Path) -> int:
    """Return the sample counter of the newest good checkpoint, 0 without one."""
    try:
        checkpoint, _ = newest_good(run / "checkpoints")
    except RunError:
        return 0
    return checkpoint.samples if checkpoint else 0


def _is_update(line: Mapping[str, Any]) -> bool:
    """Return whether a line has the form that a run writes for an update or for a gap."""
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
    """Compare the samples of every update with the stream, and count the uses of each sample in each epoch.

    If the digest of an update equals the stream's, the update used exactly the stream's samples (up to a
    chance of 1 in 2⁶⁴). The uses are therefore counted over the stream.

    Args:
        consumed: of `read_consumed`.
        report: receives the number of samples checked.
    """
    stream = Stream(consumed.num_samples, consumed.seed)
    end = int(consumed.bounds[-1])
    expected = np.zeros(len(consumed.digests), dtype=np.uint64)
    counts: list[EpochCount] = []
    uses, unknown = np.zeros(consumed.num_samples, dtype=np.uint8), 0
    for start, stop in _segments(end, consumed.num_samples):
        stream_index = np.arange(start, stop)
        ids = _ids(stream, stream_index, consumed)
        first = int(np.searchsorted(consumed.bounds, start, side="right")) - 1
        updates = np.searchsorted(consumed.bounds, stream_index, side="right") - 1 - first
        np.add.at(expected[first:], updates, index_digests(stream_index, ids))
        is_known = consumed.is_known[updates + first]
        np.add.at(uses, ids[is_known], 1)
        unknown += int((~is_known).sum())
        if stop % consumed.num_samples == 0 or stop == end:
            counts.append(_count(uses, stop, consumed.num_samples, unknown))
            uses[:], unknown = 0, 0
        report("checking the order", stop, end, "samples")
    wrong = tuple(np.flatnonzero((expected != consumed.digests) & consumed.is_known).tolist())
    return Audit(consumed, wrong, tuple(counts))


def compare_orders(first: Consumed, second: Consumed) -> tuple[bool, str]:
    """Return whether two runs used the same samples in the same order, whatever their batches, and a line that says so.

    The digest of several updates is the sum of their digests. The sums of both runs are compared between the
    sample counters at which both runs finished an update, except where one of them has a gap.
    """
    common, at_first, at_second = np.intersect1d(first.bounds, second.bounds, return_indices=True)
    parts = ((first, at_first), (second, at_second))
    sums = [np.diff(np.insert(np.cumsum(c.digests, dtype=np.uint64), 0, 0)[at]) for c, at in parts]
    num_gaps = [np.diff(np.insert(np.cumsum(~c.is_known), 0, 0)[at]) for c, at in parts]
    is_known = (num_gaps[0] == 0) & (num_gaps[1] == 0)
    different = np.flatnonzero((sums[0] != sums[1]) & is_known)
    runs = f"{first.run} and {second.run}"
    if not is_known.any():
        return False, f"{runs}: the orders cannot be compared: no sample counter at which both finished an update"
    if len(different):
        k = different[0]
        return False, f"{runs}: different samples between {common[k]:,} and {common[k + 1]:,}"
    counts = f"compared at {int(is_known.sum()):,} counts"
    lost = int(np.diff(common)[~is_known].sum())
    counts += f", except for {lost:,} samples that were not recorded" if lost else ""
    return True, f"{runs}: the same samples in the same order up to {common[-1]:,}, {counts}"


def _segments(end: int, num_samples: int) -> Iterator[tuple[int, int]]:
    """Yield first and end index of consecutive segments of at most `_AT_ONCE` samples, each within one epoch."""
    start = 0
    while start < end:
        stop = min(end, start + _AT_ONCE, (start // num_samples + 1) * num_samples)
        yield start, stop
        start = stop


def _ids(stream: Stream, stream_index: NDArray[np.int64], consumed: Consumed) -> NDArray[np.int64]:
    _, ids = stream.at(stream_index)
    for index in consumed.replaced.keys() & set(stream_index.tolist()) if consumed.replaced else ():
        ids[index - stream_index[0]] = consumed.replaced[index]
    return ids


def _count(uses: NDArray[np.uint8], stop: int, num_samples: int, unknown: int) -> EpochCount:
    num_reached = (stop - 1) % num_samples + 1
    once, never = int((uses == 1).sum()), int((uses == 0).sum())
    missing = never - unknown - (num_samples - num_reached)  # without those yet to come
    return EpochCount((stop - 1) // num_samples, num_reached, once, missing, num_samples - once - never, unknown)


def replaced_samples(consumed: Consumed, most: int) -> Sequence[str]:
    """Return a line for each of the first bad samples, with the sample that replaced it."""
    stream = Stream(consumed.num_samples, consumed.seed)
    stream_index = np.array(sorted(islice(consumed.replaced, most)), dtype=np.int64)
    epochs, ids = stream.at(stream_index)
    return [
        f"epoch {epoch}: sample {id_} was bad, sample {consumed.replaced[int(index)]} was used in its place"
        for index, epoch, id_ in zip(stream_index, epochs, ids, strict=True)
    ]
