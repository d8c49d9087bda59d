"""`hvd-batchgrow predict`."""

from __future__ import annotations

import csv
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from hvd_batchgrow.config.types import PositiveInt
from hvd_batchgrow.messages.errors import ExitCode, Fault, JobError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from hvd_batchgrow.deployment.predict import Prediction

_READING = ("data.decimal", "data.separator", "data.header")
"""Keys that say how a csv file is written."""


@dataclass(frozen=True)
class WeightsCommand:
    """Options of all commands that use the weights of a run."""

    folder: Annotated[Path, tyro.conf.Positional]
    """A run folder."""
    checkpoint: Path | None = None
    """A checkpoint of the run; by default its newest good one."""


@dataclass(frozen=True)
class InferenceCommand(WeightsCommand):
    """Options of commands that compute with the weights of a run."""

    device: Literal["auto", "cuda", "cpu"] = "auto"
    """auto: a GPU if one is visible."""


@dataclass(frozen=True)
class PredictCommand(InferenceCommand):
    """Print the classes, labels or numbers that a network predicts for photos or for rows of csv and parquet files."""

    files: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="FILE ...")] = ()
    """Photos, preprocessed as in the run's evaluation; or tables with the columns of the training rows."""
    format: Literal["csv", "json"] = "csv"
    """csv: one line per class. json: one object per photo or row, on one line."""
    top: PositiveInt | None = None
    """Number of most probable classes or labels to print. None: one class, all labels."""
    average: bool = False
    """Use the moving average of the weights (update.ema_samples)."""

    def run(self, overrides: dict[str, Any]) -> ExitCode:
        """Print to stdout; report files that cannot be used on stderr, and then return 1."""
        from hvd_batchgrow.deployment.predict import predict
        from hvd_batchgrow.deployment.trained_network import load_network

        if others := [key for key in overrides if key not in _READING]:
            fault = f"belongs to the training of the network; predict changes only {', '.join(_READING)}"
            raise JobError([Fault(key, fault) for key in others], "command line")
        if not self.files:
            raise JobError([Fault("files", "name at least one photo or table after the run folder")], "command line")
        data = {key.partition(".")[2]: value for key, value in overrides.items()}
        network = load_network(self.folder, self.checkpoint, self.device, average=self.average, data=data)
        print_note = partial(print, file=sys.stderr)
        for note in network.notes:
            print_note(note)
        bad: list[Path] = []

        def report(path: Path, fault: str) -> None:
            bad.append(path)
            print(f"{path}: {fault}", file=sys.stderr)

        found = predict(network, self.files, report, print_note)
        task, names = network.description.task, network.description.classes
        if task.answer == "values" and self.top is not None:
            fault = "is for classes and labels; all numbers of a regression are printed"
            raise JobError([Fault("--top", fault)], "command line")
        count = self.top or (1 if task.answer == "class" else len(names))
        if self.format == "csv":
            self._print_csv(found, task.answer, names, count)
        else:
            for line in self._json_lines(found, task.answer, names, count):
                print(line)
        return ExitCode.FAILURE if bad else ExitCode.DONE

    def _print_csv(
        self, predictions: Iterable[Prediction], answer: str | None, names: Sequence[str], count: int
    ) -> None:
        writer = csv.writer(sys.stdout, lineterminator="\n")
        if answer == "values":
            writer.writerow(["file", "row", *names])
            for found in predictions:
                writer.writerow([found.file, found.place, *(f"{value:.6g}" for value in found.values)])
            return
        writer.writerow(["file", "row", "rank", "class" if answer == "class" else "label", "probability"])
        for found in predictions:
            for rank, (k, probability) in enumerate(found.top(count), 1):
                writer.writerow([found.file, found.place, rank, names[k], f"{probability:.6g}"])

    def _json_lines(
        self, predictions: Iterable[Prediction], answer: str | None, names: Sequence[str], count: int
    ) -> Iterator[str]:
        from hvd_batchgrow.storage.strict_json import dump_json

        for found in predictions:
            place = {"row": found.place} if found.place else {}
            if answer == "values":
                content: Any = dict(zip(names, map(float, found.values), strict=True))
            else:
                kind = "class" if answer == "class" else "label"
                content = [{kind: names[k], "probability": probability} for k, probability in found.top(count)]
            yield dump_json({"file": str(found.file), **place, "predictions": content})
