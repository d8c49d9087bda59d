"""Which evaluation was the best so far, and which files of earlier bests are still needed.

Both follow from what checkpoints record, never from the times of files.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from hvd_batchgrow.train.events import Evaluation

_NAME = re.compile(r"best-(\d{15})\.pt")


def improved(best: Mapping[str, Any], metric: str, evaluation: Evaluation) -> dict[str, Any] | None:
    """Return what a checkpoint records after an evaluation that is better than all before; None: it is not better.

    An evaluation with an infinite or NaN loss is never better, and of two equal ones the first is kept.

    Args:
        best: `Checkpoint.best`; empty before the first evaluation.
        metric: `checkpoint.keep_best`.
        evaluation: of the validation set.

    Returns:
        the metric, its value, and the sample counter of each evaluation that was the best when it was made.
    """
    value = evaluation.loss if metric == "val/loss" else evaluation.top1
    if not math.isfinite(evaluation.loss):
        return None
    if best and not (value < best["value"] if metric == "val/loss" else value > best["value"]):
        return None
    return {"metric": metric, "value": value, "samples": [*best.get("samples", ()), evaluation.samples]}


def still_needed(samples: Sequence[int], oldest: int) -> set[int]:
    """Return the bests whose files must be kept: a run may resume from any checkpoint from `oldest` on.

    Args:
        samples: sample counters of the evaluations that were the best when they were made, ascending.
        oldest: sample counter of the oldest checkpoint that is kept as one of the newest.
    """
    return {now for now, following in pairwise([*samples, math.inf]) if following > oldest}  # type: ignore[misc]


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


def remove_superseded(folder: Path, best: Mapping[str, Any], oldest: int, samples: int) -> None:
    """Remove the files of bests that no checkpoint can need again.

    Args:
        folder: the run's checkpoint folder.
        best: `Checkpoint.best` of the newest checkpoint; empty: nothing is removed.
        oldest: as for `still_needed`.
        samples: sample counter of the newest checkpoint; a later file, of an attempt that was killed, is kept until
            the run is there again.

    Raises:
        OSError: a file cannot be removed.
    """
    if not best:
        return
    needed = still_needed(best["samples"], oldest)
    for path in folder.glob("best-*.pt"):
        if (found := _NAME.fullmatch(path.name)) and int(found[1]) <= samples and int(found[1]) not in needed:
            path.unlink()
