"""`name = "norm_test"`."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field

from hvd_batchgrow.schedule.trigger import TRIGGERS, Measurement
from hvd_batchgrow.schedule.triggers.formula import FormulaTrigger


@TRIGGERS.add
class NormTestTrigger(FormulaTrigger):
    """Keep the standard error of the gradient below a fraction of its norm.

    B' = ⌈tr(Σ) / (θ² |g|²)⌉ if tr(Σ)/B > θ² |g|². |g|² is its expectation at the current batch, from the averaged |G|²
    and tr(Σ): one update's value would be mostly noise.

    Source: Byrd et al. 2012; De et al. 2017.
    """

    name: Literal["norm_test"]
    theta: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """θ in tr(Σ)/B ≤ θ² |g|²: the standard error as a fraction of the norm."""

    def formula(self, now: Measurement) -> tuple[float, str] | None:
        norm = now.batch_squared_norm
        if now.b_simple is None or now.trace is None or norm is None:
            return None
        error, allowed = now.trace / now.global_batch, self.theta**2 * norm
        if not 0 < allowed < error < math.inf:
            return None
        return math.ceil(now.trace / allowed), f"norm test: tr(Σ)/B = {error:.3g} > θ² |g|² = {allowed:.3g}"
