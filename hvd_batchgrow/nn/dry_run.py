"""Forwards that leave no trace: neither in the model nor in the generators of random numbers."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from hvd_batchgrow.nn.dropout import keyed_dropouts, set_sample_keys
from hvd_batchgrow.nn.ghost_batch_norm import ghost_norms


@contextmanager
def kept_generators() -> Iterator[None]:
    """Put the global generators of NumPy and Python back to where they were."""
    of_python, of_numpy = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)


@contextmanager
def dry_run(model: nn.Module, num_samples: int, *, training: bool) -> Iterator[None]:
    """In here, forwards of a few samples are without gradients and without consequence.

    Modes, buffers, ghost batches and generators are put back at the end. In training the ghost norms
    take all samples as one ghost batch: so few need not be whole ones. Keyed dropout is given keys.
    """
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    norms = [(norm, norm.ghost_batch, norm.deferred) for norm in ghost_norms(model)]
    device = next(model.parameters()).device
    devices = [device] if device.type == "cuda" else []
    model.train(training)
    dropouts = keyed_dropouts(model)
    set_sample_keys(dropouts, torch.arange(num_samples))
    for norm, _, _ in norms:
        norm.ghost_batch, norm.deferred = num_samples, False
    try:
        with torch.no_grad(), torch.random.fork_rng(devices), kept_generators():
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        for buffer, before in buffers:
            buffer.copy_(before)
        set_sample_keys(dropouts, None)
        for norm, ghost_batch, deferred in norms:
            norm.ghost_batch, norm.deferred = ghost_batch, deferred
