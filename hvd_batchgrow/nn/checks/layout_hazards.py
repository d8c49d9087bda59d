"""What in a network would make its results depend on how a batch is cut."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from hvd_batchgrow.nn.checks.forward_trace import Outputs, first_difference, numbered, witness
from hvd_batchgrow.nn.checks.rng_use import WHOLE, own_randomness
from hvd_batchgrow.nn.ghost.ghost_batch_norm import ghost_norms
from hvd_batchgrow.nn.parameters import input_type
from hvd_batchgrow.nn.state.forward_state import listed
from hvd_batchgrow.nn.state.side_effect_free import dry_run

NUM_SAMPLES = 7
"""Unlike the leading dimension of most tensors that have no row for each sample."""


def layout_hazards(model: nn.Module, sample_shape: Sequence[int]) -> list[str]:
    """Lines that tell which modules draw for themselves, or let the samples of a batch meet; empty: none is known.

    Args:
        model: stays as it is.
        sample_shape: of one sample as the network gets it, (C, H, W) or (features,).
    """
    example = _example(model, sample_shape)
    if drawing := own_randomness(model, example):
        return [f"{listed(drawing)}: random numbers that belong to no sample"]
    if coupling := coupled_samples(model, example):
        return [f"{listed(coupling)}: samples of a batch meet, other than in a ghost norm"]
    return []


def coupled_samples(model: nn.Module, example: Tensor) -> list[str]:
    """Path of the innermost module whose output for a sample changes with the samples beside it, in training.

    Ghost norms are held in evaluation meanwhile: what they couple is the stream's, not the layout's.

    Args:
        model: stays as it is; draws no numbers of its own.
        example: two samples or more, the first of which is watched while the others change.
    """
    others = torch.cat([example[:1], example[1:].flip(0) * -0.5 + 0.25])
    alone, beside = (_outputs(model, batch) for batch in (example, others))
    return [path or WHOLE for path in first_difference(*_first_rows(alone, beside, len(example)))]


def _outputs(model: nn.Module, batch: Tensor) -> Outputs:
    with dry_run(model, len(batch), training=True), _ghost_norms_evaluating(model):
        return witness(model, batch).outputs


def _first_rows(alone: Outputs, beside: Outputs, num_samples: int) -> tuple[Outputs, Outputs]:
    """Return what each module gives for the first sample.

    What has no row for each sample in both forwards is passed over, such as an expert that gets some of the samples.
    Its effect shows further on.
    """
    rows: tuple[Outputs, Outputs] = [], []
    others = numbered(beside)
    for (path, number), ours in numbered(alone).items():
        together = zip(ours, others.get((path, number), []), strict=False)
        pairs = [pair for pair in together if all(_has_rows(tensor, num_samples) for tensor in pair)]
        for side, index in ((rows[0], 0), (rows[1], 1)):
            side.append((path, [pair[index][0] for pair in pairs]))
    return rows


def _has_rows(tensor: Tensor, num_samples: int) -> bool:
    """Whether it may hold a value for each sample; whole numbers are often indices of a sorted batch."""
    return tensor.shape[:1] == (num_samples,) and (tensor.is_floating_point() or tensor.is_complex())


@contextmanager
def _ghost_norms_evaluating(model: nn.Module) -> Iterator[None]:
    """Within a dry run, which puts the modes back."""
    for norm in ghost_norms(model):
        norm.training = False
    yield


def _example(model: nn.Module, sample_shape: Sequence[int]) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    samples = torch.randn(NUM_SAMPLES, *sample_shape, generator=generator)
    return samples.to(next(model.parameters()).device, input_type(model))
