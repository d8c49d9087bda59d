"""The gradient noise scale of a run: averages over updates, and the calibration of the norm layers' noise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hvd_batchgrow.config import GradientNoiseSection
from hvd_batchgrow.schedule.adaptive.noise_record import WIDE
from hvd_batchgrow.train.moving_average import MovingAverage
from hvd_batchgrow.train.update.engine import UpdateResult
from hvd_batchgrow.train.update.gradient_noise import GradientNoiseScale, NoiseAverage, NormLayers
from hvd_batchgrow.train.update.gradient_norms import ALL, NORM_LAYERS

_PAIRED = f"{NORM_LAYERS}, paired"
"""The average of the norm layers over the updates that have an estimate from micro-batches too."""
_CALIBRATION = f"{NORM_LAYERS}, calibration"
_SQUARES = "square_sum", "square_weight", "layers_square_sum", "layers_square_weight"
"""Keys of a checkpoint for the averages of |g|² of the whole gradient and of its part in the norm layers."""


class MeasuredNoise:
    """Averages the estimates of updates, and gives the noise scale from the estimator of the job.

    With the estimator "norm_layers", B_simple is f times that of the norm layers. f is the ratio of B_simple from
    micro-batches to that of the norm layers, both averaged over the same updates, which have two micro-batches or more.
    f is updated whenever the 95 % interval of B_simple from micro-batches is at most ×4 wide. Until the first such
    update it is `norm_layers_factor`.

    Args:
        section: names the estimator.
        num_samples: N.
    """

    def __init__(self, section: GradientNoiseSection, num_samples: int) -> None:
        self._section, self._memory_samples = section, section.ema_epochs * num_samples
        self._averages: dict[str, NoiseAverage] = {}
        self._squares = tuple(MovingAverage(self._memory_samples) for _ in range(2))
        """|g|² of the whole gradient, and of its part in the norm layers."""
        self._factor: float | None = None
        self._num_units = 0
        """Of the last update."""

    def add(self, result: UpdateResult, samples: int) -> None:
        """Add the estimates of an update of `samples` samples."""
        found = dict(result.noise)
        if layers := found.get(NORM_LAYERS):
            self._num_units = layers.num_gradients
            squares = result.gradient_norm**2, layers.squared_norm + layers.trace / samples
            for average, square in zip(self._squares, squares, strict=True):
                average.add(square, samples)
            if ALL in found:
                found[_PAIRED] = layers
        for name, seen in found.items():
            self._averages.setdefault(name, NoiseAverage(self._memory_samples)).add(seen, samples)
        self._factor = self._measured_factor() or self._factor

    @property
    def scales(self) -> dict[str, GradientNoiseScale]:
        """Known noise scales of the whole gradient and of layer groups, by name."""
        values = {name: value for name, average in self._averages.items() if (value := average.value)}
        if self._section.estimator == "micro_batches":
            return values
        return {ALL: self._whole(values[NORM_LAYERS])} if NORM_LAYERS in values else {}

    @property
    def norm_layers(self) -> NormLayers | None:
        """The calibration; None: the norm layers are not measured."""
        layers = self._value(NORM_LAYERS)
        if not layers:
            return None
        whole = self._value(ALL)
        return NormLayers(
            b_simple=layers.b_simple,
            micro_batches=whole.b_simple if whole else None,
            factor=self._used_factor,
            is_measured=self._factor is not None,
            num_units=self._num_units,
        )

    @property
    def _used_factor(self) -> float:
        return self._section.norm_layers_factor if self._factor is None else self._factor

    def _value(self, name: str) -> GradientNoiseScale | None:
        return self._averages[name].value if name in self._averages else None

    def _measured_factor(self) -> float | None:
        """Return the current ratio of both estimates of B_simple; None: unknown, or its interval is too wide."""
        whole, layers = self._value(ALL), self._value(_PAIRED)
        if not (whole and whole.b_simple and layers and layers.b_simple):
            return None
        is_narrow = whole.low is not None and whole.high is not None and whole.high <= WIDE * whole.low
        return whole.b_simple / layers.b_simple if is_narrow else None

    def _whole(self, layers: GradientNoiseScale) -> GradientNoiseScale:
        """Return the noise scale of the whole gradient: B_simple is f times that of the norm layers.

        tr(Σ) and |G|² follow from it and from the average of |g|² = |G|² + tr(Σ)/B of the whole gradient. The average
        of 1/B follows from the norm layers, of which |g|², |G|² and tr(Σ) are known.
        """
        factor = self._used_factor
        whole, part = (average.value or 0.0 for average in self._squares)
        noise, signal = max(0.0, layers.trace), max(0.0, layers.squared_norm)
        inverse_batch = max(0.0, part - layers.squared_norm) / noise if noise else 0.0
        total = signal + factor * noise * inverse_batch
        trace = whole * factor * noise / total if total else 0.0
        low, high = (None if end is None else factor * end for end in (layers.low, layers.high))
        b_simple = None if layers.b_simple is None else factor * layers.b_simple
        return GradientNoiseScale(trace, whole - trace * inverse_batch, b_simple, low, high)

    def state(self) -> dict[str, dict[str, float]]:
        """Return plain values for a checkpoint."""
        state = {name: average.state() for name, average in self._averages.items()}
        if NORM_LAYERS in state:
            factor = {} if self._factor is None else {"factor": self._factor}
            squares = dict(zip(_SQUARES, (x for average in self._squares for x in average.state()), strict=True))
            state[_CALIBRATION] = {
                "num_units": float(self._num_units),
                **squares,
                **factor,
            }
        return state

    def load(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Restore the result of `state`."""
        is_of_layers = self._section.estimator == "norm_layers"
        for name, sums in state.items():
            if name.startswith(NORM_LAYERS):
                if not is_of_layers:
                    continue
            elif is_of_layers and _PAIRED not in state:
                continue  # averaged over other updates than the norm layers will be, so no factor follows
            if name == _CALIBRATION:
                self._num_units = int(sums["num_units"])
                self._factor = sums.get("factor")
                squares = [sums[key] for key in _SQUARES]
                self._squares[0].load(squares[:2])
                self._squares[1].load(squares[2:])
            else:
                self._averages[name] = NoiseAverage(self._memory_samples)
                self._averages[name].load(sums)
