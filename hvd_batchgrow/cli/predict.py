"""`hvd-batchgrow predict`."""

from __future__ import annotations

import csv
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from hvd_batchgrow.cli.common import refuse_overrides
from hvd_batchgrow.config.types import PositiveInt
from hvd_batchgrow.messages.errors import ExitCode, Fault, JobError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from hvd_batchgrow.deployment.predict import Prediction


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
    """Print the classes of photos, or of the rows of csv and parquet files, with their probabilities."""

    files: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="FILE ...")] = ()
    """Photos, preprocessed as in the run's evaluation; or tables with the columns of the training rows."""
    format: Literal["csv", "json"] = "csv"
    """csv: one line per class. json: one object per photo or row, on one line."""
    top: PositiveInt = 1
    """Number of most probable classes to print."""
    average: bool = False
    """Use the moving average of the weights (update.ema_samples)."""

    def run(self, overrides: dict[str, Any]) -> ExitCode:
        """Print to stdout; report files that cannot be used on stderr, and then return 1."""
        from hvd_batchgrow.deployment.predict import predict
        from hvd_batchgrow.deployment.trained_network import load_network

        refuse_overrides(overrides)
        if not self.files:
            raise JobError([Fault("files", "name at least one photo or table after the run folder")], "command line")
        network = load_network(self.folder, self.checkpoint, self.device, average=self.average)
        for note in network.notes:
            print(note, file=sys.stderr)
        bad: list[Path] = []

        def report(path: Path, fault: str) -> None:
            bad.append(path)
            print(f"{path}: {fault}", file=sys.stderr)

        found = predict(network, self.files, report)
        if self.format == "csv":
            self._print_csv(found, network.description.classes)
        else:
            for line in self._json_lines(found, network.description.classes):
                print(line)
        return ExitCode.FAILURE if bad else ExitCode.DONE

    def _print_csv(self, predictions: Iterable[Prediction], classes: Sequence[str]) -> None:
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow(["file", "row", "rank", "class", "probability"])
        for found in predictions:
            for rank, (k, probability) in enumerate(found.top(self.top), 1):
                writer.writerow([found.file, found.place, rank, classes[k], f"{probability:.6g}"])

    def _json_lines(self, predictions: Iterable[Prediction], classes: Sequence[str]) -> Iterator[str]:
        from hvd_batchgrow.storage.strict_json import dump_json

        for found in predictions:
            top = [{"class": classes[k], "probability": probability} for k, probability in found.top(self.top)]
            place = {"row": found.place} if found.place else {}
            yield dump_json({"file": str(found.file), **place, "predictions": top})
