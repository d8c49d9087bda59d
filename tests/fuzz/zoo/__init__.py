"""Networks of every kind that torch accepts, each with what a run of it must do."""

from __future__ import annotations

from tests.fuzz.zoo import gradients, layers, norms, outputs, parameters, reuse, state, types
from tests.fuzz.zoo.entry import ENTRIES, Entry

__all__ = ["ENTRIES", "Entry", "gradients", "layers", "norms", "outputs", "parameters", "reuse", "state", "types"]
