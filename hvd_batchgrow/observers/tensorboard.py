"""TensorBoard curves against the number of samples."""

from __future__ import annotations

import math
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from hvd_batchgrow.observers.console_tables import plan_text
from hvd_batchgrow.train.events import Decided, EvaluatedSet, Evaluation, Observer, RunEnded, RunStarted, TrainRecord
from hvd_batchgrow.train.update.gradient_noise import GradientNoiseScale
from hvd_batchgrow.train.update.gradient_norms import ALL


class TensorBoard(Observer):
    """Writes `tensorboard/`; a resumed run continues the same curves."""

    def __init__(self) -> None:
        self._writer: SummaryWriter | None = None
        self._hyperparameters: dict[str, Any] = {}
        self._prefix: dict[EvaluatedSet, str] = {}

    def on_start(self, event: RunStarted) -> None:
        """Open the folder, and hide points after the checkpoint."""
        numbers = event.job.deciding(event.plan.num_samples)
        self._hyperparameters = {key: v for key, v in numbers.items() if isinstance(v, (int, float, str, bool))}
        # Without a validation set the test set is evaluated during training, under "val" as in earlier versions.
        self._prefix = {"validation": "val", "test": "test" if event.plan.num_validation else "val"}
        purge = event.samples + 1 if event.samples else None
        self._writer = SummaryWriter(str(event.folder / "tensorboard"), purge_step=purge)
        self._writer.add_custom_scalars(_BAND)
        self._writer.add_text("plan", f"```\n{plan_text(event.plan)}\n```", event.samples)

    def on_record(self, event: TrainRecord) -> None:
        """Add points to the training curves."""
        scalars = {
            "train/loss": event.loss,
            **{f"train/{name}": value for name, value in event.metrics.items()},
            "optim/lr": event.lr,
            "optim/momentum": event.momentum,
            "batch/global": event.global_batch,
            "batch/accumulation": event.accumulation,
            "batch/ranks": event.ranks,
            "batch/progress_epochs": event.progress_epochs,
            "noise/scale": event.noise_scale,
            "perf/samples_per_s": event.samples_per_s,
            "perf/data_wait_pct": event.data_wait_pct,
            "perf/backward_pct": event.backward_pct,
            "perf/allreduce_pct": event.allreduce_pct,
            "perf/optimizer_pct": event.optimizer_pct,
            "update/skipped": event.skipped,
        }
        if event.trust_ratio is not None:
            scalars["lars/trust_ratio_p50"] = event.trust_ratio
        for name, noise in event.gradient_noise.items():
            scalars |= _noise_scalars("" if name == ALL else f"/{name}", noise, event.global_batch)
        self._add(scalars, event.samples)

    def on_decision(self, event: Decided) -> None:
        """Add the reason for a decision as text."""
        if self._writer:
            self._writer.add_text("batch/decision", event.decision.describe(), event.decision.samples)

    def on_evaluation(self, event: Evaluation) -> None:
        """Add points to the curves of the evaluated set."""
        self._add(self._results(event), event.samples)

    def on_end(self, event: RunEnded) -> None:
        """Add the job's hyperparameters with its results, and close the files."""
        if not self._writer:
            return
        if event.done and event.evaluation:
            # add_hparams would create a separate run folder.
            for summary in hparams(self._hyperparameters, self._results(event.evaluation)):
                self._writer.file_writer.add_summary(summary)  # type: ignore[attr-defined]
        self._writer.close()

    def _results(self, evaluation: Evaluation) -> dict[str, float]:
        prefix = self._prefix[evaluation.dataset]
        return {f"{prefix}/{name}": value for name, value in evaluation.named().items()}

    def _add(self, scalars: dict[str, float], samples: int) -> None:
        if self._writer:
            for tag, value in scalars.items():
                if math.isfinite(value):  # for other values TensorBoard logs a warning and draws nothing
                    self._writer.add_scalar(tag, value, samples)


_B_SIMPLE = "noise/gradient_b_simple"
_BAND = {"gradient noise": {"B_simple, 95 %": ["Margin", [_B_SIMPLE, f"{_B_SIMPLE}_low", f"{_B_SIMPLE}_high"]]}}
"""Layout of TensorBoard's custom scalars tab."""


def _noise_scalars(suffix: str, noise: GradientNoiseScale, batch: int) -> dict[str, float]:
    """Return the scalars of the whole gradient or of a layer group, without those that are unresolved."""
    scalars = {_B_SIMPLE: noise.b_simple, f"{_B_SIMPLE}_low": noise.low, f"{_B_SIMPLE}_high": noise.high}
    if noise.b_simple is not None:
        scalars["batch/over_b_simple"] = batch / noise.b_simple
    return {tag + suffix: value for tag, value in scalars.items() if value is not None}
