"""Find what makes the results of a network depend on how a batch is divided."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hvd_batchgrow.nn.checks.forward_trace import Outputs, first_difference, numbered, trace_forward
from hvd_batchgrow.nn.checks.rng_use import WHOLE, own_randomness
from hvd_batchgrow.nn.ghost.ghost_batch_norm import ghost_norms
from hvd_batchgrow.nn.state.forward_state import listed
from hvd_batchgrow.nn.state.side_effect_free import dry_run, trial_samples

NUM_SAMPLES = 7
"""Of each trial forward. Few tensors have 7 rows unless each row is a sample."""


def layout_hazards(model: nn.Module, sample_shape: Sequence[int]) -> list[str]:
    """Return a line that names the modules that draw random numbers, or those that mix the samples of a batch.

    Args:
        model: is not changed.
        sample_shape: shape of one input sample, (C, H, W) or (features,).

    Returns:
        At most one line; empty if no hazard was found.
    """
    example = trial_samples(model, NUM_SAMPLES, sample_shape)
    if drawing := own_randomness(model, example):
        return [f"{listed(drawing)}: random numbers that are not keyed by sample"]
    if coupling := coupled_samples(model, example):
        return [f"{listed(coupling)}: samples of a batch affect each other outside of ghost norms"]
    return []


def coupled_samples(model: nn.Module, example: Tensor) -> list[str]:
    """Return the path of the innermost module whose output for one sample depends on the other samples, in training.

    Ghost norms are in evaluation mode meanwhile: their ghost batches are the same in every layout.

    Args:
        model: is not changed; must not draw random numbers.
        example: two samples or more. The first one stays, the others change.
    """
    others = torch.cat([example[:1], example[1:].flip(0) * -0.5 + 0.25])
    before, after = (_outputs(model, batch) for batch in (example, others))
    return [path or WHOLE for path in first_difference(*_first_rows(before, after, len(example)))]


def _outputs(model: nn.Module, batch: Tensor) -> Outputs:
    with dry_run(model, len(batch), training=True):
        for norm in ghost_norms(model):
            norm.training = False
        return trace_forward(model, batch).outputs


def _first_rows(before: Outputs, after: Outputs, num_samples: int) -> tuple[Outputs, Outputs]:
    """Return the output of each module for the first sample, in both forwards.

    Outputs that do not have a row for each sample in both forwards are skipped, such as those of an expert that gets
    some of the samples. A later module reveals their effect.
    """
    rows: tuple[Outputs, Outputs] = [], []
    others = numbered(after)
    for (path, number), ours in numbered(before).items():
        together = zip(ours, others.get((path, number), []), strict=False)
        pairs = [pair for pair in together if all(_has_rows(tensor, num_samples) for tensor in pair)]
        for side, index in ((rows[0], 0), (rows[1], 1)):
            side.append((path, [pair[index][0] for pair in pairs]))
    return rows


def _has_rows(tensor: Tensor, num_samples: int) -> bool:
    """Return whether a tensor may have a row for each sample. Integers are skipped: often they index a sorted batch."""
    return tensor.shape[:1] == (num_samples,) and (tensor.is_floating_point() or tensor.is_complex())
