"""The scalars of a run, by the names used in TensorBoard, MLflow and Weights & Biases."""

from __future__ import annotations

import math
from collections.abc import Mapping

from hvd_batchgrow.config import Job
from hvd_batchgrow.train.events import EvaluatedSet, Evaluation, RunStarted, TrainRecord
from hvd_batchgrow.train.update.gradient_noise import GradientNoiseScale
from hvd_batchgrow.train.update.gradient_norms import ALL

_B_SIMPLE = "noise/gradient_b_simple"
BAND = (f"{_B_SIMPLE}_mid", f"{_B_SIMPLE}_low", f"{_B_SIMPLE}_high")
"""B_simple and its 95 % band. TensorBoard draws a band only if all three have points at the same steps."""
UPDATES, HOURS = "progress/updates", "progress/hours"


def record_scalars(record: TrainRecord) -> dict[str, float]:
    """Return the finite scalars of a training record; a record with only skipped updates has NaN."""
    scalars = {
        "train/loss": record.loss,
        **{f"train/{name}": value for name, value in record.metrics.items()},
        UPDATES: record.updates,
        "progress/epoch": record.epoch,
        "optim/lr": record.lr,
        "optim/momentum": record.momentum,
        "batch/global": record.global_batch,
        "batch/accumulation": record.accumulation,
        "batch/ranks": record.ranks,
        "noise/scale": record.noise_scale,
        "perf/samples_per_s": record.samples_per_s,
        "perf/data_wait_pct": record.data_wait_pct,
        "perf/backward_pct": record.backward_pct,
        "perf/allreduce_pct": record.allreduce_pct,
        "perf/optimizer_pct": record.optimizer_pct,
        "update/skipped": record.skipped,
    }
    if record.progress_epochs != record.epoch:
        scalars["batch/progress_epochs"] = record.progress_epochs
    if record.elapsed_s is not None:
        scalars[HOURS] = record.elapsed_s / 3600
    if record.trust_ratio is not None:
        scalars["lars/trust_ratio_p50"] = record.trust_ratio
    for name, noise in record.gradient_noise.items():
        scalars |= _noise_scalars("" if name == ALL else f"/{name}", noise, record.global_batch)
    if (layers := record.norm_layers) is not None:
        scalars["noise/norm_layers_factor"] = layers.factor
        if layers.b_simple is not None:
            scalars["noise/norm_layers_b_simple"] = layers.b_simple
    return _finite(scalars)


def evaluation_scalars(evaluation: Evaluation, prefixes: Mapping[EvaluatedSet, str]) -> dict[str, float]:
    """Return the finite results of an evaluation.

    Args:
        evaluation: of the validation or the test set.
        prefixes: from `prefixes_of`.
    """
    prefix = prefixes[evaluation.dataset]
    return _finite({f"{prefix}/{name}": value for name, value in evaluation.named().items()})


def prefixes_of(start: RunStarted) -> dict[EvaluatedSet, str]:
    """Return the first part of the names of a set's results.

    Without a validation set the test set is evaluated during training, and its results have the prefix "val" too, so
    that the curves of runs with and without a validation set share a chart.
    """
    return {"validation": "val", "test": "test" if start.plan.num_validation else "val"}


def hyperparameters(job: Job, num_samples: int) -> dict[str, bool | int | float | str]:
    """Return the keys that affect the weights and are not None or empty; lists and tables become text."""
    deciding = {key: v for key, v in job.deciding(num_samples).items() if v is not None and v not in ([], {})}
    return {key: v if isinstance(v, (bool, int, float, str)) else str(v) for key, v in deciding.items()}


def measures_noise(job: Job) -> bool:
    """Return whether the records of a job may have the gradient noise scale."""
    return job.gradient_noise.measure or job.is_adaptive


def _finite(scalars: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in scalars.items() if math.isfinite(value)}


def _noise_scalars(suffix: str, noise: GradientNoiseScale, batch: int) -> dict[str, float]:
    """Return the scalars of the whole gradient or of a layer group; none if it is unresolved."""
    if noise.b_simple is None:
        return {}
    scalars = {_B_SIMPLE: noise.b_simple, "batch/over_b_simple": batch / noise.b_simple}
    if noise.low is not None and noise.high is not None:
        scalars |= dict(zip(BAND, (noise.b_simple, noise.low, noise.high), strict=True))
    return {tag + suffix: value for tag, value in scalars.items()}
