"""Networks of every kind that torch accepts, each with the expected result of a run."""

from __future__ import annotations

from tests.fuzz.zoo import gradients, layers, norms, outputs, parameters, reuse, state, types
from tests.fuzz.zoo.entry import ENTRIES, Entry

__all__ = ["ENTRIES", "Entry", "gradients", "layers", "norms", "outputs", "parameters", "reuse", "state", "types"]
