"""Holes in `consumed.jsonl`: updates that led to a checkpoint and are not on record.

A run never writes a checkpoint ahead of its record. A copy of its folder can have one that is, if it was taken file by
file while the run wrote. A resume from such a copy adds a line that says so: {"samples": 80, "missing_to": 688}.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

from hvd_batchgrow.storage.json_lines import Line, read_json_lines
from hvd_batchgrow.train.events import UpdateDone

MISSING_TO = "missing_to"
"""Key of a line that explains a hole: the sample counter at its end. `samples` is that at its start."""


def is_before(line: Line, samples: int) -> bool:
    """Whether a line of `consumed.jsonl` lies before a sample counter: an update by its start, a hole by its end."""
    end = line.get(MISSING_TO)
    return line["samples"] < samples and not (isinstance(end, int) and end > samples)


def record_gap(path: Path, samples: int, last_update: UpdateDone | None = None) -> tuple[int, int] | None:
    """The sample counters between which the record of a run has a hole, up to where it resumes; None: it has no hole.

    Args:
        path: of `consumed.jsonl`.
        samples: sample counter of the checkpoint.
        last_update: the update that led to it, if the caller has it and will record it.

    Raises:
        RunError: the file cannot be read.
    """
    lines = [line for line in read_json_lines(path, lambda line: is_before(line, samples)) if is_before(line, samples)]
    end = _end(lines[-1]) if lines else 0
    if last_update and end < samples == last_update.samples + last_update.global_batch:
        samples = last_update.samples
    return (end, samples) if end < samples else None


def gap_notes(folder: Path, samples: int, last_update: UpdateDone | None, interval: float) -> list[str]:
    """What the user should know of holes up to where a run resumes: a line for each record that has one.

    Args and Raises as `record_gap`; and
        interval: the most samples that may lie between the last line of `metrics.jsonl` and a checkpoint.
    """
    notes, why = [], "as in a copy that was taken while the run wrote"
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
    """The sample counter after an update, or after a hole."""
    end, batch = line.get(MISSING_TO), line.get("global_batch")
    if isinstance(end, int):
        return end
    return int(line["samples"]) + (batch if isinstance(batch, int) else 0)
