"""The plain lines that `train` and `watch` print: phases, evaluations, and progress."""

from __future__ import annotations

import math

from hvd_batchgrow.messages.wording import metric_texts, time_text
from hvd_batchgrow.results.live_state import LiveView
from hvd_batchgrow.results.record_lines import EvaluationLine, TrainLine


class RecentRecords:
    """Training records in a row."""

    def __init__(self) -> None:
        self._last: TrainLine | None = None
        self._samples = self._loss_samples = 0
        self._loss = self._seconds = 0.0

    def add(self, record: TrainLine, num_samples: int) -> None:
        """Add a record of `num_samples` samples."""
        self._last = record
        self._samples += num_samples
        if math.isfinite(record.loss):  # NaN: all updates of the record were skipped
            self._loss_samples += num_samples
            self._loss += record.loss * num_samples
        self._seconds += num_samples / record.samples_per_s if record.samples_per_s > 0 else 0.0

    def text(self) -> str:
        """Return the last record as text, with the mean loss and speed of all records; empty without records."""
        if self._last is None:
            return ""
        loss = self._loss / self._loss_samples if self._loss_samples else self._last.loss
        speed = self._samples / self._seconds if self._seconds else self._last.samples_per_s
        return _record_text(self._last, loss, speed)


def phase_line(record: TrainLine, most_ranks: int) -> str:
    """Return the line for the start of a phase, with its ranks if it uses only some of them."""
    some = f" on {record.ranks} of {most_ranks} ranks" if record.ranks < most_ranks else ""
    return f"phase {record.phase + 1}: global batch {record.global_batch}{some}, lr {record.lr:.5g}"


def progress_line(view: LiveView) -> str:
    """Return the line for a training record."""
    assert view.record is not None
    record = view.record
    text = _record_text(record, record.loss, record.samples_per_s)
    line = f"{100 * view.run_share:.1f} %: epoch {record.epoch:.2f}, {text}"
    return "; ".join(filter(None, (line, _left(view))))


def _left(view: LiveView) -> str:
    if view.to_go is None:
        return ""
    is_last = view.phase + 1 == len(view.plan.phases)
    phase = "" if is_last else f"{time_text(view.to_go.phase_s)} in this phase, "
    return f"{phase}{time_text(view.to_go.run_s)} left"


def evaluation_line(evaluation: EvaluationLine, recent: RecentRecords) -> str:
    """Return the line for an evaluation, with the training records since the last one."""
    train, dataset = recent.text(), evaluation.dataset
    return (
        f"epoch {evaluation.epoch:.2f}: {train}{', ' if train else ''}{dataset} loss {evaluation.loss:.4f}"
        + "".join(f", {dataset} {text}" for text in metric_texts(evaluation.metrics))
        + "".join(f", {text} of averaged weights" for text in metric_texts(evaluation.average_metrics))
    )


def _record_text(record: TrainLine, loss: float, samples_per_s: float) -> str:
    return (
        f"B {record.global_batch}, lr {record.lr:.4g}, loss {loss:.4f}, "
        f"{samples_per_s:,.0f} samples/s, all-reduce {record.allreduce_pct:.1f} %"
        + (f", {record.progress_epochs:.2f} epochs of progress" if _has_progress(record) else "")
        + (f", {record.skipped} updates skipped" if record.skipped else "")
    )


def _has_progress(record: TrainLine) -> bool:
    """Return whether the schedule advances faster or slower than the epochs (AdaScale)."""
    return record.progress_epochs == record.progress_epochs and record.progress_epochs != record.epoch
