"""Comparing the weights of two runs in one line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from hvd_batchgrow.verification.digest import Weights, compare_weights
from hvd_batchgrow.verification.tree_digest import tree_digest

NAN = float("nan")


def weights(**tensors: list[float]) -> Weights:
    found: dict[str, Tensor] = {name: torch.tensor(values) for name, values in tensors.items()}
    return Weights(Path("run"), 16, is_final=True, tensors=found, digest=tree_digest(found))


@pytest.mark.parametrize(
    ("second", "line"),
    [
        (weights(v=[3.0, 4.0], w=[1.0], z=[0.0]), "bit-identical"),
        (weights(v=[3.0, 4.5], w=[1.0], z=[0.0]), "differs by 1.0e-01 of the norm of v"),
        (weights(v=[3.0, 4.5], w=[NAN], z=[0.0]), "differs by nan of the norm of w"),
        (weights(v=[NAN, 4.0], w=[1.5], z=[0.0]), "differs by nan of the norm of v"),
        (weights(v=[3.0, 4.0], w=[1.0], z=[0.25]), "differs by 2.5e-01 of the norm of z"),
        (weights(v=[3.0, 4.0], w=[1.0]), "has other tensors: another model"),
    ],
)
def test_the_largest_difference_is_named(second: Weights, line: str) -> None:
    assert compare_weights(weights(v=[3.0, 4.0], w=[1.0], z=[0.0]), second) == line
