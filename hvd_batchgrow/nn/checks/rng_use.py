"""Which modules of a model draw random numbers: what makes its results depend on the layout."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hvd_batchgrow.nn.checks.forward_trace import first_difference, witness
from hvd_batchgrow.nn.dropout import KeyedDropout, keyed_dropouts, set_sample_keys
from hvd_batchgrow.nn.state.side_effect_free import dry_run

_RANDOM_TYPES = ("Dropout", "DropPath", "StochasticDepth", "DropBlock")
"""Parts of the names of types that draw where their probability is above 0: torch's, torchvision's and timm's."""
_PROBABILITIES = ("p", "drop_prob", "prob")

WHOLE = "the network's own forward"
"""Named where no module within the network is to blame."""


def own_randomness(model: nn.Module, example: Tensor) -> list[str]:
    """Paths of the modules that make two forwards of the same input differ in training.

    Dropout and its like draw from a generator that each rank has for itself, in the order of its own
    passes: what they draw for a sample depends on how the batch was cut. Three ways to find them:

    - by type and probability, also those that this forward did not come by;
    - whoever is running, innermost, when a global generator of torch, NumPy or Python moves;
    - where none of these is found, and the outputs of two forwards differ all the same by more than
      rounding (a generator of its own, a counter): the innermost module whose output does.

    Args:
        model: stays as it is.
        example: two samples or more, on the model's device; not all alike, or a draw may not show.

    Returns:
        in the order of the model's modules; empty: none draws.
    """
    found = {path for path, module in model.named_modules() if _is_random(module)}
    with dry_run(model, len(example), training=True) as before:
        first = witness(model, example)
        found |= first.drew
        if not found:
            before.restore(attributes=False)  # generators and counters among the attributes run on
            set_sample_keys(keyed_dropouts(model), torch.arange(len(example)))
            second = witness(model, example)
            found = set(first_difference(first.outputs, second.outputs))
    paths = [path for path, _ in model.named_modules() if path in found]
    return [path or WHOLE for path in paths]


def _is_random(module: nn.Module) -> bool:
    if isinstance(module, KeyedDropout):
        return False
    of_type = any(part in type(module).__name__ for part in _RANDOM_TYPES)
    given = (getattr(module, name, None) for name in _PROBABILITIES)
    return of_type and any(isinstance(p, (int, float)) and p > 0 for p in given)
