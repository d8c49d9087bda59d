"""Gaps in `consumed.jsonl`: updates before a checkpoint that are not recorded.

A run never writes a checkpoint before its record. But if its folder is copied file by file while the run writes, the
copied checkpoint can be newer than the copied record. A resume from such a copy adds a line for the gap:
{"samples": 80, "missing_to": 688}.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

from hvd_batchgrow.storage.json_lines import Line, read_json_lines
from hvd_batchgrow.train.events import UpdateDone

MISSING_TO = "missing_to"
"""Key of a line for a gap: the sample counter at its end; `samples` is the one at its start."""


def is_before(line: Line, samples: int) -> bool:
    """Return whether an update in `consumed.jsonl` starts, or a gap ends, before a sample counter."""
    end = line.get(MISSING_TO)
    return line["samples"] < samples and not (isinstance(end, int) and end > samples)


def record_gap(path: Path, samples: int, last_update: UpdateDone | None = None) -> tuple[int, int] | None:
    """Return the sample counters between which the record of a run has a gap before its checkpoint; None: no gap.

    Args:
        path: of `consumed.jsonl`.
        samples: sample counter of the checkpoint.
        last_update: the update that led to the checkpoint, if the caller has it and will record it.

    Raises:
        RunError: the file cannot be read.
    """
    lines = [line for line in read_json_lines(path, lambda line: is_before(line, samples)) if is_before(line, samples)]
    end = _end(lines[-1]) if lines else 0
    if last_update and end < samples == last_update.samples + last_update.global_batch:
        samples = last_update.samples
    return (end, samples) if end < samples else None


def gap_notes(folder: Path, samples: int, last_update: UpdateDone | None, interval: float) -> list[str]:
    """Return a note for each record that has a gap before the checkpoint from which a run resumes.

    Args and Raises as `record_gap`; and
        interval: the largest usual number of samples between the last line of `metrics.jsonl` and a checkpoint.
    """
    notes, why = [], "as in a copy made while the run was writing"
    if gap := record_gap(folder / "consumed.jsonl", samples, last_update):
        found = f"consumed.jsonl ends at sample {gap[0]:,}, and the checkpoint is at sample {gap[1]:,}, {why}"
        notes.append(f"{found}: these samples are recorded as missing, and audit reports them")
    lines = read_json_lines(folder / "metrics.jsonl", lambda line: line["samples"] <= samples)
    at = [0, *sorted(line["samples"] for line in lines if line["samples"] <= samples)]
    usual = max(interval, *(after - before for before, after in pairwise(at)), 0)
    if samples - at[-1] > usual:
        found = f"metrics.jsonl ends at sample {at[-1]:,}, and the checkpoint is at sample {samples:,}, {why}"
        notes.append(f"{found}: the curves have a gap there")
    return notes


def _end(line: Line) -> int:
    """Return the sample counter after an update or a gap."""
    end, batch = line.get(MISSING_TO), line.get("global_batch")
    if isinstance(end, int):
        return end
    return int(line["samples"]) + (batch if isinstance(batch, int) else 0)
