"""Settings of a run that a resume, and a fork, must not change; without torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hvd_batchgrow.messages.errors import RunError

FIXED = frozenset(
    {
        # they decide the order of samples, which the run continues, and which samples it must not have trained on
        *("seed", "data.num_samples", "data.validation_fraction", "data.num_validation"),
        # they decide which tensors the checkpoint has
        *("model.name", "model.kwargs", "model.channels", "model.classifier", "optim.name", "update.ema_samples"),
        *("model.freeze", "optim.groups", "optim.layer_decay"),  # they order the optimizer's saved state
        *("model.pretrained", "model.allow_new_head"),  # the checkpoint has the weights
    }
)
"""Keys that a fork must not change."""


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the keys whose values differ, with both values."""
    return {key: (before.get(key), now.get(key)) for key in sorted({*before, *now}) if before.get(key) != now.get(key)}


def refuse_changes(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise RunError if settings that affect the weights differ from those of a run.

    Args:
        folder: of the run.
        before: `Job.deciding` of the run.
        now: that of the job that would continue it.
    """
    if changed := changes(before, now):
        fork = "" if FIXED & changed.keys() else " or from this checkpoint (--fork NAME)"
        raise RunError(
            f"{folder} cannot be resumed: these settings affect the weights and have changed:\n  "
            + "\n  ".join(f"{key}: was {was!r}, is {now!r}" for key, (was, now) in changed.items())
            + f"\n  train it as a new run from the beginning (--name NAME){fork}"
        )
