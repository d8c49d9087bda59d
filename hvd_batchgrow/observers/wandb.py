"""Curves, configuration and tags of a run in Weights & Biases."""

from __future__ import annotations

import json
import os
import uuid
from pathlib import Path
from typing import Any

import wandb

from hvd_batchgrow.observers.run_tags import run_tags
from hvd_batchgrow.observers.scalars import hyperparameters
from hvd_batchgrow.observers.service_observer import ServiceObserver
from hvd_batchgrow.storage.atomic import write_atomically
from hvd_batchgrow.storage.regular_files import read_regular
from hvd_batchgrow.storage.strict_json import dump_json
from hvd_batchgrow.train.events import RunEnded, RunStarted

_SAMPLES = "progress/samples"


class WeightsAndBiases(ServiceObserver):
    """Logs to `runs/NAME/wandb`, for `wandb sync`; with WANDB_MODE=online, to the service too.

    The run's id is in `runs/NAME/wandb.json`, so a resumed run continues the same W&B run. W&B cannot delete points, so
    the file also has the sample counters of the last points, and a resumed run does not log them again. A run that is
    killed between logging a point and writing the file logs this point twice.
    """

    def __init__(self) -> None:
        super().__init__()
        self._run: Any = None
        self._path = Path()
        self._known: dict[str, Any] = {}
        """The content of wandb.json: `id`, and in `last` the samples at the last point of the training records and of
        each set."""

    def on_start(self, event: RunStarted) -> None:
        """Continue the W&B run of this folder, or create one."""
        super().on_start(event)
        self._path = event.folder / "wandb.json"
        self._known = _read(self._path) or {"id": uuid.uuid4().hex[:12], "last": {}}
        self._write()
        tags = run_tags(event)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "hvd_batchgrow"),
            id=self._known["id"],
            resume="allow",
            name=event.job.name,
            group=tags["pair"],
            tags=[tags["policy"], *(["twin"] if tags["twin"] == "yes" else [])],
            config={**hyperparameters(event.job, event.plan.num_samples), "tags": tags},
            dir=str(event.folder),
            mode=os.environ.get("WANDB_MODE", "offline"),
            settings=wandb.Settings(silent=True, console="off"),
        )
        self._run.define_metric("*", step_metric=_SAMPLES)

    def on_end(self, event: RunEnded) -> None:
        """Close the W&B run; the next attempt continues it."""
        self._run.finish()

    def _log(self, kind: str, scalars: dict[str, float], samples: int) -> None:
        if samples > self._known["last"].get(kind, 0):
            self._run.log({**scalars, _SAMPLES: samples})
            self._known["last"][kind] = samples
            self._write()

    def _write(self) -> None:
        write_atomically(self._path, dump_json(self._known).encode())


def _read(path: Path) -> dict[str, Any] | None:
    """Return the content of wandb.json; None if there is no such file, or it is damaged."""
    try:
        known = json.loads(read_regular(path))
        last = {str(kind): int(samples) for kind, samples in known["last"].items()}
        return {"id": str(known["id"]), "last": last}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
