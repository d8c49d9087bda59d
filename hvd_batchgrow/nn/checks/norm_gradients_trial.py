"""Check by a trial pass that the gradients of norm layers are recorded for separate ghost batches or samples."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hvd_batchgrow.data.tensor_tree import Tree, num_rows, tensors_in
from hvd_batchgrow.messages.wording import listed
from hvd_batchgrow.nn.ghost.ghost_batch_norm import ghost_norms
from hvd_batchgrow.nn.keyed_random import keyed_modules, set_sample_keys
from hvd_batchgrow.nn.norm_gradients import NormGradients
from hvd_batchgrow.nn.state.saved_state import SavedState
from hvd_batchgrow.nn.state.side_effect_free import cloned, dry_run, kept_generators

NUM_SAMPLES = 6
_NUM_GHOST_BATCHES = 2


def try_norm_gradients(model: nn.Module, example: Tree, *, mixes_samples: bool) -> NormGradients:
    """Compare the recorded gradients of each unit with those of a backward pass from that unit's loss alone.

    They differ if the network uses a norm's weight elsewhere too, moves its samples to another axis, or lets them
    affect each other outside of ghost norms.

    Args:
        model: maps samples to logits; is not changed.
        example: `NUM_SAMPLES` samples, not all equal.
        mixes_samples: as `NormGradients` takes it.

    Returns:
        The recorder of the trial, without hooks.

    Raises:
        ValueError: the noise of the norm layers cannot be measured.
    """
    recorder, count = NormGradients(model, mixes_samples=mixes_samples), num_rows(example)
    try:
        with dry_run(model, count, training=True, gradients=True, num_ghost_batches=_NUM_GHOST_BATCHES) as before:
            recorder.begin(count, _NUM_GHOST_BATCHES)
            _backward(model, example, before, slice(None))
            recorded = recorder.end()
            size = 1 if recorder.unit == "sample" else count // _NUM_GHOST_BATCHES
            for unit in range(count // size):
                _backward(model, example, before, slice(unit * size, (unit + 1) * size))
                if names := _differing(recorder, recorded, unit):
                    units = "samples" if recorder.unit == "sample" else "ghost batches"
                    raise ValueError(
                        f"the gradient of {listed(names)} is not a sum over separate {units}: the network uses the "
                        "parameter in other places too, or samples affect each other outside of ghost norms"
                    )
    finally:
        recorder.close()
    return recorder


def _backward(model: nn.Module, example: Tree, before: SavedState, rows: slice) -> None:
    """Set the gradients to those of a loss of some of the samples, with equal random numbers in each call.

    Raises:
        ValueError: the outputs do not have a row for each sample.
    """
    for parameter in model.parameters():
        parameter.grad = None
    before.restore(attributes=False)
    count = num_rows(example)
    with kept_generators():
        torch.manual_seed(0)
        set_sample_keys(keyed_modules(model), torch.arange(count))
        outputs = [part for part in tensors_in(model(cloned(example))) if part.is_floating_point()]
        if wrong := [tuple(part.shape) for part in outputs if part.shape[:1] != (count,)]:
            raise ValueError(f"the network returns an output of shape {wrong[0]} for {count} samples; each needs a row")
        losses = torch.stack([nn.functional.softplus(part.float()).flatten(1).sum(1) for part in outputs]).sum(0)
        weights = torch.arange(1, count + 1, device=losses.device)  # equal ones may hide what a mean over samples does
        (losses * weights)[rows].sum().backward()
    for norm in ghost_norms(model):
        norm.forget()


def _differing(recorder: NormGradients, recorded: dict[nn.Parameter, Tensor], unit: int) -> list[str]:
    """Return the names of the parameters whose recorded gradients of a unit are not those of autograd.

    Differences are compared with the largest gradient of all norms: some gradients are 0 up to rounding.
    """
    zeros = {p: torch.zeros_like(p) for p in recorder.parameters}
    found = {p: zero if p.grad is None else p.grad for p, zero in zeros.items()}
    scale = max(float(gradient.abs().max()) for gradient in found.values())
    errors = {p: found[p].flatten() - (recorded[p][unit] if p in recorded else 0) for p in found}
    return [recorder.names[p] for p, error in errors.items() if not float(error.abs().max()) <= 1e-3 * scale]
