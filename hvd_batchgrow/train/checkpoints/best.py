"""Which evaluation was the best so far, and which files of earlier bests are still needed.

Both follow from what checkpoints record, never from the times of files.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hvd_batchgrow.train.events import Evaluation

_NAME = re.compile(r"best-(\d{15})\.pt")


def improved(best: Mapping[str, Any], metric: str, direction: str, evaluation: Evaluation) -> dict[str, Any] | None:
    """Return what a checkpoint records after an evaluation that is better than all before; None: it is not better.

    An evaluation with an infinite or NaN loss is never better, and of two equal ones the first is kept.

    Args:
        best: `Checkpoint.best`; empty before the first evaluation.
        metric: `checkpoint.keep_best`.
        direction: "up" if it improves by rising, else "down".
        evaluation: of the validation set.

    Returns:
        the metric, its value, and the sample counter of each evaluation that was the best when it was made.
    """
    value = evaluation.named()[metric.removeprefix("val/")]
    if not (math.isfinite(evaluation.loss) and math.isfinite(value)):
        return None
    if best and not (value < best["value"] if direction == "down" else value > best["value"]):
        return None
    return {"metric": metric, "value": value, "samples": [*best.get("samples", ()), evaluation.samples]}


def still_needed(samples: Sequence[int], checkpoints: Sequence[int]) -> set[int]:
    """Return the bests whose files must be kept: for each checkpoint, the one that was the best there.

    Args:
        samples: sample counters of the evaluations that were the best when they were made, ascending.
        checkpoints: sample counters of the newest checkpoints, from which the run may resume.
    """
    return {max(best for best in samples if best <= counter) for counter in checkpoints if samples[0] <= counter}


def best_name(samples: int) -> str:
    """Return the name of the file with the weights of the best evaluation, made at a sample counter."""
    return f"best-{samples:015d}.pt"


def best_path(folder: Path, best: Mapping[str, Any]) -> Path | None:
    """Return the file with the weights of the best evaluation; None: no evaluation was kept.

    Args:
        folder: the run's checkpoint folder.
        best: `Checkpoint.best` of the newest good checkpoint.
    """
    return folder / best_name(best["samples"][-1]) if best else None


def remove_superseded(folder: Path, best: Mapping[str, Any], checkpoints: Sequence[int]) -> None:
    """Remove the files of bests that no checkpoint can need again.

    Args:
        folder: the run's checkpoint folder.
        best: `Checkpoint.best` of the newest checkpoint; empty: nothing is removed.
        checkpoints: as for `still_needed`, ascending. A file after the last one, of an attempt that was killed, is kept
            until the run is there again.

    Raises:
        OSError: a file cannot be removed.
    """
    if not best:
        return
    needed = still_needed(best["samples"], checkpoints)
    for path in folder.glob("best-*.pt"):
        if (found := _NAME.fullmatch(path.name)) and int(found[1]) <= checkpoints[-1] and int(found[1]) not in needed:
            path.unlink(missing_ok=True)
