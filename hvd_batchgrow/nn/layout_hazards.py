"""What in a network would make its results depend on how a batch is cut."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from hvd_batchgrow.nn.dry_run import dry_run
from hvd_batchgrow.nn.forward_state import listed
from hvd_batchgrow.nn.ghost_batch_norm import ghost_norms
from hvd_batchgrow.nn.randomness import WHOLE, own_randomness
from hvd_batchgrow.nn.witness import Outputs, first_difference, witness

_NUM_SAMPLES = 4


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
    alone, beside = (_first_rows(model, batch) for batch in (example, others))
    return [path or WHOLE for path in first_difference(alone, beside)]


def _first_rows(model: nn.Module, batch: Tensor) -> Outputs:
    """Of each module, what it gives for the first sample."""
    with dry_run(model, len(batch), training=True), _ghost_norms_evaluating(model):
        outputs = witness(model, batch).outputs
    # A tensor that has no row for each sample is none of the samples': what comes of it shows further on.
    return [
        (path, [tensor[0] for tensor in tensors if tensor.shape[:1] == batch.shape[:1]]) for path, tensors in outputs
    ]


@contextmanager
def _ghost_norms_evaluating(model: nn.Module) -> Iterator[None]:
    """Within a dry run, which puts the modes back."""
    for norm in ghost_norms(model):
        norm.training = False
    yield


def _example(model: nn.Module, sample_shape: Sequence[int]) -> Tensor:
    like = next(model.parameters())
    generator = torch.Generator().manual_seed(0)
    return torch.randn(_NUM_SAMPLES, *sample_shape, generator=generator).to(like.device, like.dtype)
