"""Run trial passes that change neither the model nor the random generators."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hvd_batchgrow.data.datasets.example import Example, InputForm
from hvd_batchgrow.data.tensor_tree import Tree, map_tensors, num_rows, take_rows
from hvd_batchgrow.nn.ghost.ghost_batch_norm import ghost_norms
from hvd_batchgrow.nn.keyed_random import keyed_modules, set_sample_keys
from hvd_batchgrow.nn.modes import kept_modes
from hvd_batchgrow.nn.parameters import network_inputs
from hvd_batchgrow.nn.state.saved_state import SavedState, kept_state


def trial_samples(model: nn.Module, num_samples: int, form: InputForm) -> Tree:
    """Return samples of the model's input type and on its device, the same in each call.

    Args:
        model: has initialized parameters.
        num_samples: number of samples.
        form: shape of one input sample, (C, H, W) or (features,), for random numbers; or real samples.
    """
    if isinstance(form, Example):
        return network_inputs(form.take(num_samples).inputs, model)
    generator = torch.Generator().manual_seed(0)
    return network_inputs(torch.randn(num_samples, *form, generator=generator), model)


def blank_samples(num_samples: int, form: InputForm) -> Tree:
    """Return samples on the CPU whose values do not matter: zeros of a shape, or real samples."""
    if isinstance(form, Example):
        return map_tensors(lambda t: t.float() if t.is_floating_point() else t, form.take(num_samples).inputs)
    return torch.zeros(num_samples, *form)


def other_samples(inputs: Tree) -> Tree:
    """Return samples of the same form whose values differ.

    A tensor of floating-point numbers is reversed, halved, negated and shifted. Other inputs, such as token ids, have
    no other valid values: samples take each other's places, and some are skipped, so that sums over them differ.
    """
    if isinstance(inputs, Tensor) and inputs.is_floating_point():
        return inputs.flip(0) * -0.5 + 0.25
    count = num_rows(inputs)
    return take_rows(inputs, [min(count - 1, 1 + k // 2) for k in range(count)])


def shape_text(form: InputForm) -> str:
    """Describe one sample, for messages."""
    return f"of the data ({form})" if isinstance(form, Example) else f"of shape {tuple(form)}"


def cloned(inputs: Tree) -> Tree:
    """Return a copy of inputs for one forward pass: a network may change them in place."""
    return map_tensors(Tensor.clone, inputs)


def tensors_of(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in an input or output of a module."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from tensors_of(part)


ALIKE = 1e-3
"""Relative difference that rounding may cause between two passes over the same samples."""


def alike(ours: Tensor, theirs: Tensor, tolerance: float = ALIKE) -> bool:
    """Return whether two tensors are equal up to rounding: some GPU kernels add in varying order."""
    if ours.shape != theirs.shape:
        return False
    ours, theirs = ours.detach().double(), theirs.detach().double()
    scale = float(ours.nan_to_num().abs().max()) if ours.numel() else 0.0
    return torch.allclose(ours, theirs, rtol=tolerance, atol=tolerance * scale, equal_nan=True)


def generator_states(device: torch.device) -> tuple[Any, ...]:
    """Return the states of the global generators of torch, NumPy and Python, and that of a GPU, to compare them."""
    of_device = torch.cuda.get_rng_state(device).numpy().tobytes() if device.type == "cuda" else b""
    legacy = np.random.get_state(legacy=True)
    of_numpy = (legacy[1].tobytes(), *legacy[2:])  # type: ignore[index]
    return torch.get_rng_state().numpy().tobytes(), of_device, of_numpy, random.getstate()


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
    model: nn.Module, num_samples: int, *, training: bool, gradients: bool = False, num_ghost_batches: int = 1
) -> Iterator[SavedState]:
    """Restore modes, parameters, buffers, attributes, gradients, ghost batches and generators at the end.

    Meanwhile the ghost norms divide the samples into `num_ghost_batches` ghost batches, so that a few samples are
    enough, and keyed dropout has keys.

    Args:
        model: must have no uninitialized lazy modules.
        num_samples: samples of each forward.
        training: mode of the model.
        gradients: whether autograd records the forwards.
        num_ghost_batches: ghost batches of each forward. If more than one, the norms keep their statistics until
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
            set_sample_keys(keyed_modules(model), torch.arange(num_samples))
            for norm in ghost_norms(model):
                norm.ghost_batch, norm.deferred = num_samples // num_ghost_batches, num_ghost_batches > 1
                norm.forget()
            yield state
    finally:
        for parameter, gradient in gradients_before:
            parameter.grad = gradient
