"""TensorBoard curves against the number of samples."""

from __future__ import annotations

import textwrap
from typing import Any

import tomli_w
from torch.utils.tensorboard import SummaryWriter

from hvd_batchgrow.config import Job
from hvd_batchgrow.messages.errors import RunError
from hvd_batchgrow.observers.console_tables import plan_table
from hvd_batchgrow.observers.event_files import event_files, points_up_to
from hvd_batchgrow.observers.markdown import markdown_table
from hvd_batchgrow.observers.scalars import (
    BAND,
    HOURS,
    UPDATES,
    evaluation_scalars,
    hyperparameters,
    measures_noise,
    prefixes_of,
    record_scalars,
)
from hvd_batchgrow.observers.tensorboard_hparams import HPARAMS_TAGS, hparams_summaries
from hvd_batchgrow.schedule.plan import Plan
from hvd_batchgrow.train.events import Decided, EvaluatedSet, Evaluation, Observer, RunEnded, RunStarted, TrainRecord

_REPLACED = frozenset({"plan/text_summary", "job/text_summary", "custom_scalars__config__", *HPARAMS_TAGS})
"""Tags that each attempt writes again."""


class TensorBoard(Observer):
    """Writes one event file into the run folder, so that `tensorboard --logdir runs` shows the run under its name.

    A resumed run continues the same curves: the points up to the checkpoint are copied into a new event file, which
    replaces the old one, also in an open TensorBoard. (`SummaryWriter`'s `purge_step` only marks the points after the
    checkpoint, and TensorBoard 2.21 still draws some or all of them.)
    """

    def __init__(self) -> None:
        self._writer: SummaryWriter | None = None
        self._hyperparameters: dict[str, Any] = {}
        self._prefixes: dict[EvaluatedSet, str] = {}

    def on_start(self, event: RunStarted) -> None:
        """Open a new event file: the points up to the checkpoint, the plan, the job, the layout of the charts."""
        self._hyperparameters = dict(hyperparameters(event.job, event.plan.num_samples))
        self._prefixes = prefixes_of(event)
        old = event_files(event.folder)
        repeated = tuple(f"{prefix}/" for prefix in self._prefixes.values()) if event.repeats_evaluation else ()
        kept = points_up_to(old, event.samples, _REPLACED, repeated)
        try:
            self._writer = SummaryWriter(str(event.folder))
        except UnicodeEncodeError:
            remedy = "choose another --runs-dir, or --logging.tensorboard false"
            raise RunError(f"{str(event.folder)!r}: TensorBoard needs a path in UTF-8; {remedy}") from None
        self._writer.add_custom_scalars(chart_layout(event.job))
        for point in kept:
            self._writer.file_writer.add_event(point, point.step, point.wall_time)  # type: ignore[attr-defined]
        self._writer.add_text("plan", plan_markdown(event.plan), event.samples)
        self._writer.add_text("job", job_markdown(event.job), event.samples)
        self._writer.flush()
        for path in old:
            path.unlink()

    def on_record(self, event: TrainRecord) -> None:
        """Add points to the training curves."""
        self._add(record_scalars(event), event.samples)

    def on_decision(self, event: Decided) -> None:
        """Add the reason for a decision, and the plan after it, as text."""
        if self._writer:
            self._writer.add_text("batch/decision", event.decision.describe(), event.decision.samples)
            self._writer.add_text("plan", plan_markdown(event.plan), event.decision.samples)

    def on_evaluation(self, event: Evaluation) -> None:
        """Add points to the curves of the evaluated set."""
        self._add(evaluation_scalars(event, self._prefixes), event.samples)

    def on_end(self, event: RunEnded) -> None:
        """At the end of the plan, add the job's hyperparameters with its results; close the file."""
        if not self._writer:
            return
        if event.evaluation and event.done and event.updates >= event.num_updates:
            for summary in hparams_summaries(event.job_name, self._hyperparameters, self._results(event.evaluation)):
                self._writer.file_writer.add_summary(summary)  # type: ignore[attr-defined]
        self._writer.close()

    def _results(self, evaluation: Evaluation) -> list[str]:
        """Return the names of the curves whose last points are the results, the main result first."""
        names = list(evaluation_scalars(evaluation, self._prefixes))
        return [*names[1:], *names[:1], UPDATES, HOURS]  # the loss comes first

    def _add(self, scalars: dict[str, float], samples: int) -> None:
        if self._writer:
            for tag, value in scalars.items():
                self._writer.add_scalar(tag, value, samples)
            self._writer.flush()  # so that a kill loses no point before a checkpoint


def chart_layout(job: Job) -> dict[str, dict[str, list[Any]]]:
    """Return the layout of the custom scalars tab. TensorBoard merges the charts of several runs if they are equal.

    Args:
        job: shows whether the gradient noise is measured.
    """

    def curves(*patterns: str) -> list[Any]:
        return ["Multiline", [f"^{pattern}$" for pattern in patterns]]

    noise = {"B_simple with its 95 % band": ["Margin", [*BAND]]}
    shares = ("data_wait", "backward", "allreduce", "optimizer")
    return {
        "loss and results": {
            "loss": curves("(train|val|test)/(average_)?loss"),
            "accuracy and other results": curves("(train|val|test)/(?!loss$|average_loss$).*"),
        },
        "batch and learning rate": {
            "global batch": curves("batch/global"),
            "learning rate": curves("optim/lr"),
            "updates": curves(UPDATES),
        },
        "noise": {
            "noise scale of the schedule": curves("noise/scale"),
            **(noise if measures_noise(job) else {}),
        },
        "performance": {
            "samples per second": curves("perf/samples_per_s"),
            "share of an update's time, %": curves(*(f"perf/{share}_pct" for share in shares)),
            "ranks and accumulation": curves("batch/ranks", "batch/accumulation"),
        },
    }


def plan_markdown(plan: Plan) -> str:
    """Return a plan as a table in Markdown."""
    return markdown_table(plan_table(plan))


def job_markdown(job: Job) -> str:
    """Return the keys of a job that differ from their defaults, as an indented block, which no value can end."""
    tree = job.model_dump(mode="json", exclude_none=True, exclude_defaults=True)
    text = tomli_w.dumps({key: value for key, value in tree.items() if value != {}})
    return textwrap.indent(text, "    ", lambda _: True)
