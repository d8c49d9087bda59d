"""What consumed.jsonl says without torch: whether it is whole, and whether runs used the same samples.

Each update has a digest of (stream index, sample id) of its samples, and the digest of several updates is the sum of
theirs modulo 2⁶⁴. Two runs whose sums agree at a sample counter used the same samples in the same order up to there.
"""

from __future__ import annotations

import re
from array import array
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hvd_batchgrow.messages.errors import RunError
from hvd_batchgrow.storage.json_lines import Line, scan_json_lines


@dataclass(frozen=True)
class OrderRecord:
    """The updates of consumed.jsonl."""

    bounds: NDArray[np.int64]
    """Sample counter after each update."""
    sums: NDArray[np.uint64]
    """Digest of all samples up to there."""
    gaps: tuple[tuple[int, int], ...]
    """First and end sample counter of what a resume recorded as missing."""
    num_replaced: int
    """Bad samples that were replaced by others."""
    fault: str = ""
    """Why the record is not whole; empty if it is."""


def read_order(path: Path) -> OrderRecord:
    """Read consumed.jsonl up to its first fault; a last line that a kill cut short is skipped."""
    bounds, digests = array("q", [0]), array("Q", [0])
    gaps: list[tuple[int, int]] = []
    num_replaced, unreadable, fault = 0, 0, ""
    try:
        for number, line in scan_json_lines(path):
            unreadable = unreadable or (number if line is None else 0)
            if line is None:
                continue
            end = _end(line)
            if unreadable or end is None or line["samples"] != bounds[-1]:
                fault = (
                    f"line {unreadable} cannot be read"
                    if unreadable
                    else f"line {number} does not follow line {number - 1}"
                )
                break
            if "missing_to" in line:
                gaps.append((bounds[-1], end))
            bounds.append(end)
            digests.append(int(line.get("digest", "0"), 16))
            num_replaced += len(line.get("replaced", ()))
    except RunError as error:
        fault = str(error)
    sums = np.cumsum(np.frombuffer(digests, dtype=np.uint64), dtype=np.uint64)
    return OrderRecord(np.frombuffer(bounds, dtype=np.int64)[1:], sums[1:], tuple(gaps), num_replaced, fault)


def _end(line: Line) -> int | None:
    """Return the sample counter after an update or gap; None if the line is neither."""
    start, end = line["samples"], line.get("missing_to")
    if "missing_to" not in line:
        batch, digest = line.get("global_batch"), line.get("digest")
        is_update = type(batch) is int and isinstance(digest, str) and re.fullmatch("[0-9a-f]{16}", digest)
        end = start + batch if is_update and isinstance(line.get("replaced", []), list) else None
    return end if type(end) is int and 0 <= start < end < 1 << 62 else None


def common_order(first: OrderRecord, second: OrderRecord) -> tuple[int, int | None]:
    """Compare the sample orders of two runs at the sample counters at which both finished an update.

    Returns:
        the last counter up to which they used the same samples in the same order, and the next counter, before which
        they used others; None: there is no difference on record. Nothing is compared after a gap.
    """
    ends = [record.gaps[0][0] if record.gaps else np.inf for record in (first, second)]
    common, at_first, at_second = np.intersect1d(first.bounds, second.bounds, return_indices=True)
    before_gap = common <= min(ends)
    common = common[before_gap]
    different = np.flatnonzero(first.sums[at_first[before_gap]] != second.sums[at_second[before_gap]])
    if not len(different):
        return int(common[-1]) if len(common) else 0, None
    k = int(different[0])
    return int(common[k - 1]) if k else 0, int(common[k])
