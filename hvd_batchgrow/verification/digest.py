"""The final weights of a run: their digest, and the difference between two runs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from hvd_batchgrow.messages.errors import RunError
from hvd_batchgrow.nn.state.extra_state import is_extra_state
from hvd_batchgrow.results.plan_file import read_plan
from hvd_batchgrow.train.checkpoints.checkpoint import newest_good
from hvd_batchgrow.verification.tensor_distance import distance, norm
from hvd_batchgrow.verification.tree_digest import tree_digest


@dataclass(frozen=True)
class Weights:
    """Parameters and buffers of a run, from its newest good checkpoint."""

    run: Path
    samples: int
    is_final: bool
    """Whether the run had reached the end of its plan."""
    tensors: dict[str, Tensor]
    """Without the extra state of modules."""
    digest: str
    """SHA-256 over all tensors and the extra state of modules."""
    skipped: tuple[str, ...] = ()
    """A line for each newer checkpoint that is damaged, with the reason."""


def final_weights(run: Path) -> Weights:
    """Read the weights from the newest good checkpoint of a run.

    Args:
        run: a run folder.

    Raises:
        RunError: the folder holds no good checkpoint.
    """
    end_samples = read_plan(run)["end_samples"]
    checkpoint, skipped = newest_good(run / "checkpoints")
    if checkpoint is None:
        raise RunError(f"{run} holds no checkpoint")
    is_final = checkpoint.samples >= end_samples
    tensors = {name: value for name, value in checkpoint.model.items() if not is_extra_state(name)}
    return Weights(run, checkpoint.samples, is_final, tensors, tree_digest(checkpoint.model), tuple(skipped))


def compare_weights(first: Weights, second: Weights) -> str:
    """Return one line: "bit-identical", or the tensor with the largest |a - b| / |a| in the 2-norm."""
    if first.samples != second.samples:
        return f"at another sample: {second.samples} instead of {first.samples}"
    if first.digest == second.digest:
        return "bit-identical"
    shapes = [{name: tensor.shape for name, tensor in weights.tensors.items()} for weights in (first, second)]
    if shapes[0] != shapes[1]:
        return "has other tensors: another model"
    difference, worst = largest_difference(first, second)
    if tree_digest(first.tensors) == tree_digest(second.tensors):
        return "differs in the extra state of modules only"
    return f"differs by {difference:.1e} of the norm of {worst}"


def largest_difference(first: Weights, second: Weights) -> tuple[float, str]:
    """Return the largest |a - b| / |a| in the 2-norm of a tensor of two runs of one model, and its name.

    It is |a - b| if a is 0. NaN, if a tensor has it in one run only, is the largest.
    """
    differences = {
        name: distance(tensor, second.tensors[name]) / (norm(tensor) or 1.0) for name, tensor in first.tensors.items()
    }
    worst = max(differences, key=lambda name: (math.isnan(differences[name]), differences[name]))
    return differences[worst], worst
