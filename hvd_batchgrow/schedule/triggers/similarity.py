"""`name = "similarity"`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from hvd_batchgrow.schedule.trigger import TRIGGERS, Measurement
from hvd_batchgrow.schedule.triggers.formula import FormulaTrigger


@TRIGGERS.add
class SimilarityTrigger(FormulaTrigger):
    """Keep the gradients of two updates similar: B' = B_simple s/(1-s) if their expected cosine is below s.

    The expected cosine is ⟨g, g'⟩/|g|² in expectation: |G|² / (|G|² + tr(Σ)/B) = 1/(1 + B_simple/B).
    """

    name: Literal["similarity"]
    similarity: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Smallest expected cosine; the batch grows if it is lower."""

    def formula(self, now: Measurement) -> tuple[float, str] | None:
        if now.b_simple is None:
            return None
        cosine, wanted = 1 / (1 + now.b_simple / now.global_batch), self.similarity
        if cosine >= wanted:
            return None
        return now.b_simple * wanted / (1 - wanted), f"similarity 1/(1 + B_simple/B) = {cosine:.3g} < {wanted:g}"
