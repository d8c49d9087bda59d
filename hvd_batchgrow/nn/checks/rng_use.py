"""Find the modules of a network that draw random numbers, which makes results depend on the layout."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hvd_batchgrow.nn.checks.forward_trace import first_difference, trace_forward
from hvd_batchgrow.nn.dropout import KeyedDropout, keyed_dropouts, set_sample_keys
from hvd_batchgrow.nn.state.side_effect_free import dry_run

_RANDOM_TYPES = ("Dropout", "DropPath", "StochasticDepth", "DropBlock")
"""Parts of the class names, in torch, torchvision and timm, of modules that draw if their probability is above 0."""
_PROBABILITIES = ("p", "drop_prob", "prob")

WHOLE = "the network's own forward"
"""Reported if no submodule is the cause."""


def own_randomness(model: nn.Module, example: Tensor) -> list[str]:
    """Return the paths of the modules that make two forwards of the same input differ in training.

    Modules such as dropout draw from the generator of their rank, in the order of its micro-batches. What
    they draw for a sample depends on how the batch was divided. They are found in three ways:

    - by type and probability, including modules that this forward does not reach;
    - by a global generator of torch, NumPy or Python that advances while they are the innermost running module;
    - if neither finds a module, by outputs of two forwards that differ by more than rounding, as from a
      private generator or a counter: the innermost module whose output differs.

    Args:
        model: is not changed.
        example: two samples or more, on the model's device; if all are equal, a draw may go unnoticed.

    Returns:
        Paths in the order of the model's modules.
    """
    found = {path for path, module in model.named_modules() if _is_random(module)}
    with dry_run(model, len(example), training=True) as before:
        first = trace_forward(model, example)
        found |= first.drew
        if not found:
            before.restore(attributes=False)  # generators and counters among the attributes keep their new state
            set_sample_keys(keyed_dropouts(model), torch.arange(len(example)))
            second = trace_forward(model, example)
            found = set(first_difference(first.outputs, second.outputs))
    paths = [path for path, _ in model.named_modules() if path in found]
    return [path or WHOLE for path in paths]


def _is_random(module: nn.Module) -> bool:
    if isinstance(module, KeyedDropout):
        return False
    of_type = any(part in type(module).__name__ for part in _RANDOM_TYPES)
    given = (getattr(module, name, None) for name in _PROBABILITIES)
    return of_type and any(isinstance(p, (int, float)) and p > 0 for p in given)
