"""`[trigger]`: what all triggers share. A file of `schedule/triggers/` has a trigger's own keys."""

from __future__ import annotations

from typing import ClassVar

from hvd_batchgrow.config.types import Section


class TriggerBase(Section):
    """`[trigger]`: the key that all triggers share, and properties for code that treats all triggers alike."""

    name: str

    decides: ClassVar[bool] = True
    """Whether it can change the schedule."""
    measures_gradients: ClassVar[bool] = False
    """Whether it needs at least two gradients per update."""
    scales_progress: ClassVar[bool] = False
    """Whether its decisions scale learning rate and progress, and end no phase."""
    trains_branches: ClassVar[bool] = False
    """Whether it pauses the run to train branches."""

    @property
    def test_metric(self) -> str | None:
        """Name of the result of an evaluation that it needs."""
        return None

    @property
    def restores_best(self) -> bool:
        """Whether a decision restores the weights of the best evaluation."""
        return False
