"""What the observers of MLflow and Weights & Biases have in common: the curves of a run, point by point."""

from __future__ import annotations

from abc import ABC, abstractmethod

from hvd_batchgrow.observers.scalars import evaluation_scalars, prefixes_of, record_scalars
from hvd_batchgrow.train.events import EvaluatedSet, Evaluation, Observer, RunStarted, TrainRecord


class ServiceObserver(Observer, ABC):
    """Logs the numbers of training records and evaluations, with the sample counter as their axis."""

    def __init__(self) -> None:
        self._prefixes: dict[EvaluatedSet, str] = {}

    def on_start(self, event: RunStarted) -> None:
        """Note the sets that are evaluated."""
        self._prefixes = prefixes_of(event)

    def on_record(self, event: TrainRecord) -> None:
        """Log the numbers of a training record."""
        self._log("train", record_scalars(event), event.samples)

    def on_evaluation(self, event: Evaluation) -> None:
        """Log the results of an evaluation."""
        self._log(self._prefixes[event.dataset], evaluation_scalars(event, self._prefixes), event.samples)

    @abstractmethod
    def _log(self, kind: str, scalars: dict[str, float], samples: int) -> None:
        """Log a point, unless the service has it already. `kind` is "train", or the prefix of the set."""
