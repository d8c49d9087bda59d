"""Run trial passes that change neither the model nor the random generators."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from hvd_batchgrow.nn.dropout import keyed_dropouts, set_sample_keys
from hvd_batchgrow.nn.ghost.ghost_batch_norm import ghost_norms
from hvd_batchgrow.nn.state.saved_state import SavedState, kept_state


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
    modes = [(module, module.training) for module in model.modules()]
    gradients_before = [(parameter, parameter.grad) for parameter in model.parameters()]
    device = next(model.parameters()).device
    devices = [device] if device.type == "cuda" else []
    try:
        with (
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
        for module, mode in modes:
            module.training = mode
        for parameter, gradient in gradients_before:
            parameter.grad = gradient
