"""Triggers turn a run's measurements into requests for another batch. The sample counter is their only clock.

Only rank 0 evaluates them, with numbers that the ranks have all-reduced. It broadcasts and records its decisions: see
`train.growth_controller`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any, TypeGuard

from hvd_batchgrow.config import Job
from hvd_batchgrow.config.schedules import AdaptiveSchedule
from hvd_batchgrow.config.triggers import (
    AdaScaleTrigger,
    CabsTrigger,
    GradientNoiseTrigger,
    MeasuringTrigger,
    NormTestTrigger,
    NoTrigger,
    PlateauTrigger,
    SimilarityTrigger,
)
from hvd_batchgrow.schedule.adaptive.batch_requests import BatchRequest
from hvd_batchgrow.schedule.adaptive.decisions import Decision
from hvd_batchgrow.schedule.rounding import decimal, periods_done

_ROUNDING = 1e-9
"""Tolerance, in epochs, for rounding in sums of fractions of epochs."""


@dataclass(frozen=True)
class Measurement:
    """Measurements at an update boundary."""

    samples: int
    global_batch: int
    """B of the next update, if nothing changes."""
    lr: float
    """ε of the next update, if nothing changes, after warm-up and `lr_rule`."""
    trace: float | None = None
    """tr(Σ), averaged; None: not measured yet."""
    squared_norm: float | None = None
    """|G|², averaged, without the noise's contribution; not resolved if it is not above 0."""
    loss: float | None = None
    """Mean training loss, averaged."""
    metric: float | None = None
    """Metric of an evaluation at this counter; None: no evaluation, or its loss was not finite."""
    was_unusable: bool = False
    """Whether an evaluation at this counter had an infinite or NaN loss."""

    @property
    def b_simple(self) -> float | None:
        """B_simple = tr(Σ)/|G|² in samples; None: not resolved, so the batch does not grow."""
        if not (_is_positive(self.trace) and _is_positive(self.squared_norm)):
            return None
        return self.trace / self.squared_norm

    @property
    def batch_squared_norm(self) -> float | None:
        """Expected |g|² of a gradient over B samples: |G|² + tr(Σ)/B."""
        if self.trace is None or self.squared_norm is None:
            return None
        return self.squared_norm + self.trace / self.global_batch

    def numbers(self) -> dict[str, float]:
        """Return the known values, for the record."""
        values = {name: value for name, value in asdict(self).items() if name not in {"samples", "was_unusable"}}
        known = {name: value for name, value in values.items() if value is not None}
        return known | ({} if self.b_simple is None else {"b_simple": self.b_simple})


class Plateau:
    """The rule of torch's ReduceLROnPlateau with an absolute threshold, in epochs instead of calls.

    An evaluation counts at the epoch at which it was due, although it happens at the first update after it. An
    evaluation whose loss is not finite does not count: the epochs since the previous evaluation extend neither
    patience nor cooldown, as if torch's rule had not been called.

    Args:
        section: the job's section.
        num_samples: N.
        every_epochs: how often the test set is evaluated.
    """

    def __init__(self, section: PlateauTrigger, num_samples: int, every_epochs: float) -> None:
        self._section = section
        self._num_samples = num_samples
        self._every_epochs = every_epochs
        self._sign = 1 if section.metric == "loss" else -1
        self.best = self._sign * math.inf
        self.best_samples = 0
        """Sample counter of the best evaluation."""
        self._bad_since = 0.0
        self._cool_until = -math.inf
        self._last = 0.0
        """Epoch of the last evaluation."""

    def look(self, now: Measurement) -> BatchRequest | None:
        """Return a request if an evaluation shows a plateau."""
        if now.metric is None and not now.was_unusable:
            return None
        epoch = self._due_epoch(now.samples)
        since_last, self._last = epoch - self._last, epoch
        if now.metric is None:
            self._bad_since += since_last
            self._cool_until += since_last
            return None
        if self._sign * now.metric < self._sign * self.best - self._section.min_delta:
            self.best, self.best_samples, self._bad_since = now.metric, now.samples, epoch
        if epoch <= self._cool_until + _ROUNDING:
            self._bad_since = epoch
        bad_epochs = epoch - self._bad_since
        if bad_epochs <= self._section.patience_epochs + _ROUNDING:
            return None
        why = (
            f"test {self._section.metric} no better than {self.best:.4g} for {bad_epochs:.3g} epochs, "
            f"more than patience {self._section.patience_epochs:g}"
        )
        return BatchRequest(why, noise_factor=self._section.noise_factor)

    def decided(self, decision: Decision) -> None:
        """Reset patience and cooldown after a decision, made now or before the run resumed."""
        self._bad_since = self._due_epoch(decision.samples)
        self._cool_until = self._bad_since + self._section.cooldown_epochs

    def _due_epoch(self, samples: int) -> float:
        """Return the epoch at which the last evaluation up to a sample counter was due."""
        return float(periods_done(samples, self._every_epochs, self._num_samples) * decimal(self._every_epochs))

    def state(self) -> dict[str, Any]:
        """Return plain values for a checkpoint."""
        return {
            "best": self.best,
            "best_samples": self.best_samples,
            "bad": self._bad_since,
            "cool": self._cool_until,
            "last": self._last,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore the values of `state`."""
        self.best, self.best_samples = state["best"], state["best_samples"]
        self._bad_since, self._cool_until = state["bad"], state["cool"]
        self._last = state.get("last", state["bad"])  # checkpoints of version 0.1.0 lack it


class FormulaTrigger:
    """A formula that gives a batch from the gradient's statistics, optionally only after it has held for some time.

    Args:
        section: the job's section.
        formula: returns the batch in samples and the arithmetic in words; None if it cannot be calculated.
        hold_samples: samples for which the formula must exceed the current batch before it is requested.
    """

    def __init__(
        self,
        section: MeasuringTrigger,
        formula: Callable[[Measurement], tuple[float, str] | None],
        hold_samples: Fraction = Fraction(0),
    ) -> None:
        self._section, self._formula, self._hold_samples = section, formula, hold_samples
        self._above_since: int | None = None

    def look(self, now: Measurement) -> BatchRequest | None:
        """Return a request between `min_factor` and `max_batch_factor` times the current batch."""
        result = self._formula(now)
        if result is None or not result[0] > now.global_batch:  # also where it is NaN
            self._above_since = None
            return None
        if self._above_since is None:
            self._above_since = now.samples
        if now.samples - self._above_since < self._hold_samples:
            return None
        most = self._section.max_batch_factor * now.global_batch
        batch, why = min(result[0], most), result[1]
        if batch < self._section.min_factor * now.global_batch:
            return None
        return BatchRequest(why, batch=batch, most=most)

    def decided(self, decision: Decision) -> None:
        """Start the holding time again."""
        self._above_since = None

    def state(self) -> dict[str, Any]:
        """Return plain values for a checkpoint."""
        return {"asks_since": self._above_since}

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore the values of `state`."""
        self._above_since = state["asks_since"]


def norm_test(section: NormTestTrigger, now: Measurement) -> tuple[float, str] | None:
    """Return B' = ⌈tr(Σ) / (θ² |g|²)⌉ if tr(Σ)/B > θ² |g|².

    |g|² is its expectation at the current batch, from the averaged |G|² and tr(Σ): one update's value would be mostly
    noise. Source: Byrd et al. 2012; De et al. 2017.
    """
    norm = now.batch_squared_norm
    if now.b_simple is None or now.trace is None or norm is None:
        return None
    error, allowed = now.trace / now.global_batch, section.theta**2 * norm
    if not 0 < allowed < error < math.inf:
        return None
    return math.ceil(now.trace / allowed), f"norm test: tr(Σ)/B = {error:.3g} > θ² |g|² = {allowed:.3g}"


def cabs(section: CabsTrigger, now: Measurement) -> tuple[float, str] | None:
    """Return B' = c ε tr(Σ) / (loss + δ). Source: Balles et al. 2016 (arXiv 1612.05086)."""
    if now.loss is None or not (_is_positive(now.trace) and _is_positive(now.loss + section.loss_offset)):
        return None
    batch = section.scale * now.lr * now.trace / (now.loss + section.loss_offset)
    return batch, f"CABS: c ε tr(Σ)/loss = {section.scale:g} · {now.lr:.3g} · {now.trace:.3g}/{now.loss:.3g}"


def similarity(section: SimilarityTrigger, now: Measurement) -> tuple[float, str] | None:
    """Return B' = B_simple s/(1-s) if the expected cosine of two updates' gradients is below s.

    The expected cosine is ⟨g, g'⟩/|g|² in expectation: |G|² / (|G|² + tr(Σ)/B) = 1/(1 + B_simple/B).
    """
    if now.b_simple is None:
        return None
    cosine, wanted = 1 / (1 + now.b_simple / now.global_batch), section.similarity
    if cosine >= wanted:
        return None
    return now.b_simple * wanted / (1 - wanted), f"similarity 1/(1 + B_simple/B) = {cosine:.3g} < {wanted:g}"


def gradient_noise(section: GradientNoiseTrigger, now: Measurement) -> tuple[float, str] | None:
    """Return B' = B_simple/h. Source: McCandlish et al. 2018 (arXiv 1812.06162)."""
    if now.b_simple is None:
        return None
    wanted = now.b_simple / section.ratio
    return wanted, f"B_simple = {now.b_simple:.0f}, h B = {section.ratio:g} · {now.global_batch}"


class AdaScale:
    """The gain of a batch κ times the base batch: r = κ (φ + B₀)/(φ + κ B₀), φ = B_simple.

    It lies between 1, for a gradient without noise, and κ, for pure noise. It is 1 until B_simple is resolved.

    Source: Johnson et al. 2020 (arXiv 2007.05105), §3.

    Args:
        section: the job's section.
        base_batch: B₀, samples.
    """

    def __init__(self, section: AdaScaleTrigger, base_batch: int) -> None:
        self._section, self._base_batch, self._gain = section, base_batch, 1.0

    def look(self, now: Measurement) -> BatchRequest | None:
        """Return a request for a new gain if the gain has changed enough."""
        if now.b_simple is None:
            return None
        gain = adascale_gain(now.b_simple, self._base_batch, now.global_batch)
        if abs(gain / self._gain - 1) < self._section.min_change:
            return None
        kappa = now.global_batch / self._base_batch
        return BatchRequest(
            f"gain {self._gain:.3g} → {gain:.3g} of κ = {kappa:g}, B_simple = {now.b_simple:.0f}", gain=gain
        )

    def decided(self, decision: Decision) -> None:
        """Adopt the decided gain."""
        self._gain *= decision.new_lr / decision.old_lr

    def state(self) -> dict[str, Any]:
        """Return plain values for a checkpoint."""
        return {"gain": self._gain}

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore the values of `state`."""
        self._gain = state["gain"]


def adascale_gain(b_simple: float, base_batch: int, global_batch: int) -> float:
    """Return r; see `AdaScale`. All arguments are in samples."""
    return global_batch / base_batch * (b_simple + base_batch) / (b_simple + global_batch)


def _is_positive(value: float | None) -> TypeGuard[float]:
    """Return whether a number is known, above 0 and finite."""
    return value is not None and 0 < value < math.inf


Trigger = Plateau | FormulaTrigger | AdaScale


def make_trigger(job: Job, num_samples: int) -> Trigger:
    """Return the trigger of a job with an adaptive schedule."""
    section = job.trigger
    if isinstance(section, PlateauTrigger):
        return Plateau(section, num_samples, job.evaluation.every_epochs)
    if isinstance(section, NormTestTrigger):
        return FormulaTrigger(section, lambda now: norm_test(section, now))
    if isinstance(section, CabsTrigger):
        return FormulaTrigger(section, lambda now: cabs(section, now))
    if isinstance(section, SimilarityTrigger):
        return FormulaTrigger(section, lambda now: similarity(section, now))
    if isinstance(section, AdaScaleTrigger):
        assert isinstance(job.schedule, AdaptiveSchedule)
        return AdaScale(section, job.schedule.global_batch)
    assert isinstance(section, GradientNoiseTrigger)
    return FormulaTrigger(section, lambda now: gradient_noise(section, now), decimal(section.hold_epochs) * num_samples)


def bounded(
    request: BatchRequest | None, job: Job, num_samples: int, num_decisions: int, now: Measurement
) -> BatchRequest | None:
    """Apply `windows_epochs`: drop requests before a window or after the last one, and add one at the end of a window.

    Args:
        request: the trigger's request.
        job: the job with the windows.
        num_samples: N.
        num_decisions: number of decisions so far.
        now: the current batch and sample counter.
    """
    section = job.trigger
    if isinstance(section, (NoTrigger, AdaScaleTrigger)) or section.windows_epochs is None:
        return request
    if num_decisions >= len(section.windows_epochs):
        return None
    (earliest, latest), epoch = section.windows_epochs[num_decisions], now.samples / num_samples
    if epoch < earliest:
        return None
    if request is None and epoch >= latest:
        why = f"the window of {earliest:g} … {latest:g} epochs ends"
        if isinstance(section, PlateauTrigger):
            return BatchRequest(why, noise_factor=section.noise_factor)
        most = section.max_batch_factor * now.global_batch
        return BatchRequest(why, batch=most, most=most)
    return request
