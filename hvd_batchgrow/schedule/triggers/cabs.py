"""`name = "cabs"`."""

from __future__ import annotations

from typing import Literal

from hvd_batchgrow.config.types import PositiveFloat
from hvd_batchgrow.schedule.trigger import TRIGGERS, Measurement, is_positive
from hvd_batchgrow.schedule.triggers.formula import FormulaTrigger


@TRIGGERS.add
class CabsTrigger(FormulaTrigger):
    """Couple the batch to learning rate and loss: B' = c ε tr(Σ) / (loss + δ).

    Source: Balles et al. 2016 (arXiv 1612.05086).
    """

    name: Literal["cabs"]
    scale: PositiveFloat = 1.0
    """c in the formula."""
    loss_offset: float = 0.0
    """δ in the formula: minus the smallest possible loss."""

    def formula(self, now: Measurement) -> tuple[float, str] | None:
        if now.loss is None or not (is_positive(now.trace) and is_positive(now.loss + self.loss_offset)):
            return None
        loss = now.loss + self.loss_offset
        batch = self.scale * now.lr * now.trace / loss
        return batch, f"CABS: c ε tr(Σ)/(loss + δ) = {self.scale:g} · {now.lr:.3g} · {now.trace:.3g}/{loss:.3g}"
