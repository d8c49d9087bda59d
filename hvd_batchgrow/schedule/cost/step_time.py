"""The step-time model: seconds of an update, fitted to measurements."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from hvd_batchgrow.messages.errors import Fault, JobError
from hvd_batchgrow.schedule.cost.probe_file import Probe, RankProbe
from hvd_batchgrow.schedule.layout import Layout

Seconds = NDArray[np.float64]


@dataclass(frozen=True)
class StepTime:
    """Seconds of one update on R ranks.

        T = f + (s-1) T_g + (T_g^c + T_sync^c)^(1/c),   T_g = a + b m,   T_sync = α + β n

    m is the samples of a micro-batch on a rank, s the micro-batches of an update, n the bytes of the gradient. Only the
    last micro-batch communicates: c = 1 adds computation and communication, a large c overlaps them fully.

    Source: Pollux (Qiao et al., OSDI 2021, arXiv 2008.12260), eqs. 8-11, whose s does not count the
    last micro-batch; f is our addition.
    """

    ranks: int
    fixed_s: float
    """f: optimizer step, bookkeeping, and waiting for the slowest rank."""
    pass_s: float
    """a: per micro-batch, including the wait for its data."""
    sample_s: float
    """b: per sample."""
    sync_s: float
    """α: per all-reduce."""
    sync_s_per_byte: float
    """β: per byte of an all-reduce."""
    overlap: float
    """c: overlap, from 1 to 10."""
    misfit: float
    """Largest relative error of the model on the measured updates."""
    micro_batches: tuple[int, int]
    """Smallest and largest m of the fit."""
    data_wait_share: float | None
    """Fraction of the measured time spent waiting for samples; None: not measured."""
    measured_ranks: int
    """R, or the nearest measured number of ranks, from which this is extrapolated."""

    def update_s(self, samples: int, layout: Layout, num_bytes: int) -> float:
        """Return the seconds of an update.

        Args:
            samples: samples of the fullest rank.
            layout: accumulation and micro-batch; the last micro-batch gets the remaining samples.
            num_bytes: bytes of the gradient.
        """
        last = samples - (layout.accumulation - 1) * layout.micro_batch
        before = (layout.accumulation - 1) * self.pass_s + (samples - last) * self.sample_s
        last_s = self.pass_s + last * self.sample_s
        sync_s = self.sync_s + self.sync_s_per_byte * num_bytes
        return self.fixed_s + before + float(_overlap(np.array(last_s), sync_s, self.overlap))

    def repeat_s(self, samples: int, layout: Layout) -> float:
        """Return the seconds in which a rank repeats another rank's share of an update; args as `update_s`."""
        return layout.accumulation * self.pass_s + samples * self.sample_s


def _overlap(pass_s: Seconds, sync_s: float, overlap: float) -> Seconds:
    """Return (T_g^c + T_sync^c)^(1/c) without underflow of the powers."""
    longer, shorter = np.maximum(pass_s, sync_s), np.minimum(pass_s, sync_s)
    ratio = shorter / np.maximum(longer, 1e-30)
    return np.asarray(longer * (1 + ratio**overlap) ** (1 / overlap))


class StepTimes:
    """The model for every number of ranks: fitted to measurements, extrapolated to other numbers.

    Extrapolation takes a, b, c and f from the nearest measured number, by log2. α and β follow a line in log2(ranks)
    through all measured numbers. If only one was measured, the line goes through it and through 0 at one rank.
    """

    origin: str | None = None

    def __init__(self, probe: Probe) -> None:
        self.gradient_bytes = probe.gradient_bytes
        self.fitted = {part.ranks: fit_step_time(part, probe.gradient_bytes) for part in probe.measured}
        summing = [model for model in self.fitted.values() if model.ranks > 1]
        self._latency = _Log2Line({model.ranks: model.sync_s for model in summing}) if summing else None
        self._per_byte = _Log2Line({model.ranks: model.sync_s_per_byte for model in summing}) if summing else None

    @property
    def summing_ranks(self) -> tuple[int, ...]:
        """The measured numbers of ranks above 1."""
        return tuple(count for count in self.fitted if count > 1)

    def at(self, ranks: int) -> StepTime:
        """Return the model for a number of ranks.

        Raises:
            JobError: the probe has no measurement of an all-reduce.
        """
        if ranks in self.fitted:
            return self.fitted[ranks]
        near = self.fitted[min(self.fitted, key=lambda r: (abs(math.log2(r / ranks)), r))]
        if ranks == 1:
            return replace(near, ranks=1, sync_s=0.0, sync_s_per_byte=0.0)
        if self._latency is None or self._per_byte is None:
            fault = f"{ranks} were not measured, and the probe of one rank has no all-reduce; add them to "
            raise JobError([Fault("ranks", f"{fault}it: mpirun -np {ranks} hvd-batchgrow probe JOB --out PROBE.json")])
        return replace(near, ranks=ranks, sync_s=self._latency.at(ranks), sync_s_per_byte=self._per_byte.at(ranks))


class _Log2Line:
    """Least-squares line in log2(ranks); through 0 at one rank if only one count is known."""

    def __init__(self, known: dict[int, float]) -> None:
        points = known if len(known) > 1 else {1: 0.0, **known}
        slope, start = np.polyfit(np.log2(list(points)), list(points.values()), 1)
        self.start, self.slope = float(start), float(slope)

    def at(self, ranks: int) -> float:
        return max(0.0, self.start + self.slope * math.log2(ranks))


# --- the fit ---------------------------------------------------------------------------------


@lru_cache(maxsize=64)
def fit_step_time(part: RankProbe, num_bytes: int) -> StepTime:
    """Fit the model for one number of ranks.

    Least squares over the all-reduces give α and β, then over the updates f, a, b and c, all ≥ 0 and c in [1, 10].
    Errors are relative, so that short updates count as much as long ones. The squared errors of
    micro-batches above the limit of the probed job, which it will not use, get a hundredth of the weight.

    Args:
        part: the measurements.
        num_bytes: bytes of the gradient.
    """
    sizes = np.array([timed.num_bytes for timed in part.sums], dtype=float)
    seconds = np.array([timed.seconds for timed in part.sums])
    latency, per_byte = nonnegative_fit(np.stack([np.ones_like(sizes), sizes], 1), seconds, seconds)
    times = _Times(part, float(latency + per_byte * num_bytes))
    overlap = times.best_overlap()
    fixed_s, pass_s, sample_s = times.fit(overlap)
    return StepTime(
        ranks=part.ranks,
        fixed_s=float(fixed_s),
        pass_s=float(pass_s),
        sample_s=float(sample_s),
        sync_s=float(latency),
        sync_s_per_byte=float(per_byte),
        overlap=overlap,
        misfit=float(np.abs(times.errors(overlap)).max()),
        micro_batches=(int(times.micro.min()), int(times.micro.max())),
        data_wait_share=sum(timed.data_wait_s for timed in part.updates) / float(times.seconds.sum()),
        measured_ranks=part.ranks,
    )


class _Times:
    """Measured updates as arrays, and the fit of f, a and b for a given c."""

    def __init__(self, part: RankProbe, sync_s: float) -> None:
        self.micro = np.array([timed.micro_batch for timed in part.updates], dtype=float)
        self.passes = np.array([timed.accumulation for timed in part.updates], dtype=float)
        self.seconds = np.array([timed.seconds for timed in part.updates])
        self.weights = np.where(self.micro > part.micro_batch_limit, 0.1, 1.0)
        self.sync_s = sync_s

    def fit(self, overlap: float) -> Seconds:
        """Fit f, a and b alternately with the all-reduce's visible time: without that time, the model is linear."""
        columns = np.stack([np.ones_like(self.micro), self.passes, self.passes * self.micro], 1)
        visible_s = np.full_like(self.seconds, self.sync_s)
        for _ in range(100):
            found = nonnegative_fit(columns, self.seconds - visible_s, self.seconds / self.weights)
            before, visible_s = visible_s, self._visible_s(found, overlap)
            if np.abs(visible_s - before).max() < 1e-9 * self.seconds.min():
                break
        return found

    def _visible_s(self, found: Seconds, overlap: float) -> Seconds:
        pass_s = found[1] + found[2] * self.micro
        return np.asarray(_overlap(pass_s, self.sync_s, overlap) - pass_s)

    def errors(self, overlap: float) -> Seconds:
        """Return the relative errors: (model - measurement) / measurement."""
        found = self.fit(overlap)
        predicted = found[0] + self.passes * (found[1] + found[2] * self.micro) + self._visible_s(found, overlap)
        return np.asarray((predicted - self.seconds) / self.seconds)

    def best_overlap(self) -> float:
        """Return the least-squares c in [1, 10] to 0.02; the smallest of equals, so 1 without all-reduces."""
        best = 1.0
        for half_width, points in ((9.0, 37), (0.25, 26)):
            grid = np.linspace(max(1.0, best - half_width), min(10.0, best + half_width), points)
            best = min(map(float, grid), key=lambda c: float(((self.weights * self.errors(c)) ** 2).sum()))
        return best


def nonnegative_fit(columns: Seconds, values: Seconds, scale: Seconds) -> Seconds:
    """Return the coefficients >= 0 of least squares of (columns @ x - values) / scale.

    With at most three coefficients, every subset of positive ones is tried.
    """
    weighted, target = columns / scale[:, None], values / scale
    best = np.zeros(columns.shape[1])
    best_error = float(target @ target)
    for size in range(len(best), 0, -1):
        for chosen in map(list, itertools.combinations(range(len(best)), size)):
            found = np.zeros_like(best)
            found[chosen] = np.linalg.lstsq(weighted[:, chosen], target, rcond=None)[0]
            error = float(((weighted @ found - target) ** 2).sum())
            if found.min() >= 0 and error < best_error:
                best, best_error = found, error
    return best
