"""Run trial passes that change neither the model nor the random generators."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from hvd_batchgrow.nn.dropout import keyed_dropouts, set_sample_keys
from hvd_batchgrow.nn.ghost.ghost_batch_norm import ghost_norms
from hvd_batchgrow.nn.modes import kept_modes
from hvd_batchgrow.nn.parameters import input_type
from hvd_batchgrow.nn.state.saved_state import SavedState, kept_state


def trial_samples(model: nn.Module, num_samples: int, sample_shape: Sequence[int]) -> Tensor:
    """Return random samples, the same in each call, of the model's input type and on its device.

    Args:
        model: has initialised parameters.
        num_samples: number of samples.
        sample_shape: shape of one input sample, (C, H, W) or (features,).
    """
    generator = torch.Generator().manual_seed(0)
    samples = torch.randn(num_samples, *sample_shape, generator=generator)
    return samples.to(next(model.parameters()).device, input_type(model))


def alike(ours: Tensor, theirs: Tensor) -> bool:
    """Return whether two tensors are equal up to rounding: some GPU kernels add in varying order."""
    if ours.shape != theirs.shape:
        return False
    ours, theirs = ours.double(), theirs.double()
    scale = float(ours.nan_to_num().abs().max()) if ours.numel() else 0.0
    return torch.allclose(ours, theirs, rtol=1e-3, atol=1e-3 * scale, equal_nan=True)


@contextmanager
def kept_generators() -> Iterator[None]:
    """Restore the global generators of NumPy and Python at the end."""
    of_python, of_numpy = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)


@contextmanager
def dry_run(
    model: nn.Module, num_samples: int, *, training: bool, gradients: bool = False, num_groups: int = 1
) -> Iterator[SavedState]:
    """Restore modes, parameters, buffers, attributes, gradients, ghost batches and generators at the end.

    Meanwhile the ghost norms divide the samples into `num_groups` ghost batches, so that a few samples are
    enough, and keyed dropout has keys.

    Args:
        model: must have no uninitialised lazy modules.
        num_samples: samples of each forward.
        training: mode of the model.
        gradients: whether autograd records the forwards.
        num_groups: ghost batches of each forward. If more than one, the norms keep their statistics until
            `take_statistics`, as in an update.
    """
    gradients_before = [(parameter, parameter.grad) for parameter in model.parameters()]
    device = next(model.parameters()).device
    devices = [device] if device.type == "cuda" else []
    try:
        with (
            kept_modes(model),
            kept_state(model) as state,
            torch.set_grad_enabled(gradients),
            torch.random.fork_rng(devices),
            kept_generators(),
        ):
            model.train(training)
            set_sample_keys(keyed_dropouts(model), torch.arange(num_samples))
            for norm in ghost_norms(model):
                norm.ghost_batch, norm.deferred = num_samples // num_groups, num_groups > 1
                norm.forget()
            yield state
    finally:
        for parameter, gradient in gradients_before:
            parameter.grad = gradient
