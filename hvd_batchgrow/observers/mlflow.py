"""Curves, parameters and tags of a run in MLflow."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException

from hvd_batchgrow.observers.console_tables import plan_table
from hvd_batchgrow.observers.markdown import markdown_table
from hvd_batchgrow.observers.run_tags import run_tags
from hvd_batchgrow.observers.scalars import UPDATES, hyperparameters
from hvd_batchgrow.observers.service_observer import ServiceObserver
from hvd_batchgrow.storage.atomic import write_atomically
from hvd_batchgrow.storage.regular_files import read_regular
from hvd_batchgrow.storage.strict_json import dump_json
from hvd_batchgrow.train.events import RunEnded, RunStarted

_EXPERIMENT = "hvd_batchgrow"
_MOST_CHARACTERS = 500
"""Longest value of a parameter; the limit of older servers."""
_AT_ONCE = 100
"""Most parameters in one request; MLflow's limit."""


class MLflow(ServiceObserver):
    """Logs to the server or database of MLFLOW_TRACKING_URI, or to MLflow's default in the working directory.

    The run's id is in `runs/NAME/mlflow.json`, so a resumed run continues the same MLflow run. MLflow cannot delete
    points, so a resumed run does not log the points that MLflow already has.
    """

    def __init__(self) -> None:
        super().__init__()
        # MLflow's defaults, 7 retries of 120 s each, would stop training for minutes.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        self._client = MlflowClient()
        self._run_id = ""
        self._last: dict[str, int] = {}
        """Samples at the last point that MLflow has of the training records and of each set."""

    def on_start(self, event: RunStarted) -> None:
        """Continue the MLflow run of this folder, or create one."""
        super().on_start(event)
        known = self._known_run(event.folder / "mlflow.json")
        if known is None:
            self._create(event)
        else:
            self._run_id = known
            self._client.update_run(known, status="RUNNING")
        curves = {"train": UPDATES} | {prefix: f"{prefix}/loss" for prefix in self._prefixes.values()}
        self._last = {kind: self._last_step(name) for kind, name in curves.items()} if known else {}

    def on_end(self, event: RunEnded) -> None:
        """Set the status: FINISHED at the end of the plan; KILLED after a stop, until the run is resumed."""
        is_finished = event.done and event.updates >= event.num_updates
        self._client.set_terminated(self._run_id, "FINISHED" if is_finished else "KILLED")

    def _known_run(self, path: Path) -> str | None:
        """Return the id of this folder's MLflow run; None if this server or database does not have one."""
        try:
            known = json.loads(read_regular(path))
            if known["tracking_uri"] != self._client.tracking_uri:
                return None
            run_id: str = self._client.get_run(known["run_id"]).info.run_id
        except (OSError, ValueError, KeyError, TypeError, RecursionError):  # a new run, or a damaged file
            return None
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None
        return run_id

    def _create(self, event: RunStarted) -> None:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", _EXPERIMENT)
        experiment = self._client.get_experiment_by_name(name)
        experiment_id = experiment.experiment_id if experiment else self._client.create_experiment(name)
        self._run_id = self._client.create_run(experiment_id, run_name=event.job.name).info.run_id
        where = {"tracking_uri": self._client.tracking_uri, "run_id": self._run_id}
        write_atomically(event.folder / "mlflow.json", dump_json(where).encode())
        numbers = hyperparameters(event.job, event.plan.num_samples)
        params = [Param(key, str(value)[:_MOST_CHARACTERS]) for key, value in numbers.items()]
        tags = run_tags(event) | {"mlflow.note.content": markdown_table(plan_table(event.plan))}
        self._client.log_batch(self._run_id, tags=[RunTag(key, value) for key, value in tags.items()])
        for start in range(0, len(params), _AT_ONCE):
            self._client.log_batch(self._run_id, params=params[start : start + _AT_ONCE])

    def _last_step(self, name: str) -> int:
        return max((point.step for point in self._client.get_metric_history(self._run_id, name)), default=0)

    def _log(self, kind: str, scalars: dict[str, float], samples: int) -> None:
        if samples > self._last.get(kind, 0):
            now = int(1000 * time.time())
            self._client.log_batch(self._run_id, [Metric(name, v, now, samples) for name, v in scalars.items()])
