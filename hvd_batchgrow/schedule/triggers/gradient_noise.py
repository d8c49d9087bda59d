"""`name = "gradient_noise"`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from hvd_batchgrow.config.types import PositiveFloat
from hvd_batchgrow.schedule.trigger import TRIGGERS, Measurement
from hvd_batchgrow.schedule.triggers.formula import FormulaTrigger


@TRIGGERS.add
class GradientNoiseTrigger(FormulaTrigger):
    """Let the batch follow B_simple: B' = B_simple/h. Source: McCandlish et al. 2018 (arXiv 1812.06162)."""

    name: Literal["gradient_noise"]
    ratio: PositiveFloat = 1.0
    """h: grow the batch to B_simple/h when B_simple exceeds h B."""
    hold_epochs: Annotated[float, Field(ge=0)] = 0.25
    """Epochs for which B_simple must have exceeded h B."""

    @property
    def hold(self) -> float:
        """Epochs for which the formula must exceed the current batch before it is requested."""
        return self.hold_epochs

    def formula(self, now: Measurement) -> tuple[float, str] | None:
        if now.b_simple is None:
            return None
        wanted = now.b_simple / self.ratio
        return wanted, f"B_simple = {now.b_simple:.0f}, h B = {self.ratio:g} · {now.global_batch}"
