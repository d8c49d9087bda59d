"""Seconds of an update: the step-time model, and its fit to what was measured."""

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

    m is the samples of a pass on a rank, s the passes of an update, n the bytes of the gradient. Only
    the last pass meets the network: c = 1 adds the two, a large c hides the shorter behind the longer.

    Source: Pollux (Qiao et al., OSDI 2021, arXiv 2008.12260), eqs. 8-11, whose s does not count the
    last pass; f is ours.
    """

    ranks: int
    fixed_s: float
    """f: optimiser step, bookkeeping, and what the ranks wait for the slowest of them."""
    pass_s: float
    """a, of a pass; waiting for its data is inside."""
    sample_s: float
    """b, of a sample."""
    sync_s: float
    """α, of a sum over the ranks."""
    sync_s_per_byte: float
    """β."""
    overlap: float
    """c, from 1 to 10."""
    misfit: float
    """How far off the model is at worst from the updates that it was fitted to, relative."""
    micro_batches: tuple[int, int]
    """Smallest and largest m that it was fitted to."""
    data_wait_share: float
    """Of the measured updates' time, what was spent waiting for samples."""
    measured_ranks: int
    """R, or the nearest number of ranks that was measured, from which this is extrapolated."""

    def update_s(self, samples: int, layout: Layout, num_bytes: int) -> float:
        """Seconds of an update.

        Args:
            samples: of the fullest rank, all passes.
            layout: gives passes and micro-batch; the last pass takes what is left.
            num_bytes: of the gradient.
        """
        last = samples - (layout.accumulation - 1) * layout.micro_batch
        before = (layout.accumulation - 1) * self.pass_s + (samples - last) * self.sample_s
        last_s = self.pass_s + last * self.sample_s
        sync_s = self.sync_s + self.sync_s_per_byte * num_bytes
        return self.fixed_s + before + float(_overlap(np.array(last_s), sync_s, self.overlap))


def _overlap(pass_s: Seconds, sync_s: float, overlap: float) -> Seconds:
    """(T_g^c + T_sync^c)^(1/c), without raising seconds to powers at which they would vanish."""
    longer, shorter = np.maximum(pass_s, sync_s), np.minimum(pass_s, sync_s)
    ratio = shorter / np.maximum(longer, 1e-30)
    return np.asarray(longer * (1 + ratio**overlap) ** (1 / overlap))


class StepTimes:
    """The model for every number of ranks: fitted where there are measurements, extrapolated elsewhere.

    a, b, c and f are then those of the nearest number measured, by log2; α and β lie on a line in
    log2(ranks) through all that were measured, or, where that is one, through it and 0 at one rank.
    """

    def __init__(self, probe: Probe) -> None:
        self.gradient_bytes = probe.gradient_bytes
        self.fitted = {part.ranks: fit_step_time(part, probe.gradient_bytes) for part in probe.measured}
        summing = [model for model in self.fitted.values() if model.ranks > 1]
        self._latency = _Log2Line({model.ranks: model.sync_s for model in summing}) if summing else None
        self._per_byte = _Log2Line({model.ranks: model.sync_s_per_byte for model in summing}) if summing else None

    def at(self, ranks: int) -> StepTime:
        """The model for a number of ranks.

        Raises:
            JobError: nothing that was measured tells what summing over so many costs.
        """
        if ranks in self.fitted:
            return self.fitted[ranks]
        near = self.fitted[min(self.fitted, key=lambda r: (abs(math.log2(r / ranks)), r))]
        if ranks == 1:
            return replace(near, ranks=1, sync_s=0.0, sync_s_per_byte=0.0)
        if self._latency is None or self._per_byte is None:
            fault = f"{ranks} were not measured, and one alone does not tell what a sum over ranks costs; add them to "
            raise JobError([Fault("ranks", f"{fault}it: mpirun -np {ranks} hvd-batchgrow probe JOB --out PROBE.json")])
        return replace(near, ranks=ranks, sync_s=self._latency.at(ranks), sync_s_per_byte=self._per_byte.at(ranks))


class _Log2Line:
    """Least squares of a line in log2(ranks); through 0 at one rank where one count alone is known."""

    def __init__(self, known: dict[int, float]) -> None:
        points = known if len(known) > 1 else {1: 0.0, **known}
        slope, start = np.polyfit(np.log2(list(points)), list(points.values()), 1)
        self.start, self.slope = float(start), float(slope)

    def at(self, ranks: int) -> float:
        return max(0.0, self.start + self.slope * math.log2(ranks))


# --- the fit ---------------------------------------------------------------------------------


@lru_cache(maxsize=64)
def fit_step_time(part: RankProbe, num_bytes: int) -> StepTime:
    """The model of one number of ranks.

    α and β by least squares over the sums; then f, a, b and c over the updates, all ≥ 0, c in
    [1, 10]; errors count relative to the time, so that short updates count as much as long ones.
    Passes beyond the limit of the probed job, which it will not do, count a tenth.

    Args:
        part: what was measured.
        num_bytes: of the gradient.
    """
    sizes = np.array([timed.num_bytes for timed in part.sums], dtype=float)
    seconds = np.array([timed.seconds for timed in part.sums])
    latency, per_byte = _nonnegative_fit(np.stack([np.ones_like(sizes), sizes], 1), seconds, seconds)
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
        self.scale = self.seconds * np.where(self.micro > part.micro_batch_limit, 10.0, 1.0)
        self.sync_s = sync_s

    def fit(self, overlap: float) -> Seconds:
        """f, a and b by turns: what the sum sticks out is taken from the times, the rest is linear."""
        columns = np.stack([np.ones_like(self.micro), self.passes, self.passes * self.micro], 1)
        sticks_out = np.full_like(self.seconds, self.sync_s)
        for _ in range(100):
            found = _nonnegative_fit(columns, self.seconds - sticks_out, self.scale)
            before, sticks_out = sticks_out, self._sticks_out(found, overlap)
            if np.abs(sticks_out - before).max() < 1e-9 * self.seconds.min():
                break
        return found

    def _sticks_out(self, found: Seconds, overlap: float) -> Seconds:
        pass_s = found[1] + found[2] * self.micro
        return np.asarray(_overlap(pass_s, self.sync_s, overlap) - pass_s)

    def errors(self, overlap: float) -> Seconds:
        """Model less measurement, as a share of the measurement, each as it counts."""
        found = self.fit(overlap)
        predicted = found[0] + self.passes * (found[1] + found[2] * self.micro) + self._sticks_out(found, overlap)
        return np.asarray((predicted - self.seconds) / self.scale)

    def best_overlap(self) -> float:
        """c in [1, 10] to 0.02 of least squares; the smallest of equals, so 1 where nothing is summed."""
        best = 1.0
        for half_width, points in ((9.0, 37), (0.25, 26)):
            grid = np.linspace(max(1.0, best - half_width), min(10.0, best + half_width), points)
            best = min(map(float, grid), key=lambda c: float((self.errors(c) ** 2).sum()))
        return best


def _nonnegative_fit(columns: Seconds, values: Seconds, scale: Seconds) -> Seconds:
    """Coefficients >= 0 of least squares of (columns @ x - values) / scale.

    There are three at most, so every subset of them that may be positive is tried.
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
