"""Runs in MLflow and in Weights & Biases, without a network: names, steps, and no point twice after a kill."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hvd_batchgrow.observers.run_tags import run_tags
from hvd_batchgrow.train.events import Observer
from tests.unit.test_watch import PLAN, ended, evaluation, record, started

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("default"),  # warnings of MLflow and wandb
]


@pytest.fixture
def mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A client of MLflow with a database in `tmp_path`."""
    module = pytest.importorskip("mlflow", reason="needs MLflow: pip install 'hvd_batchgrow[mlflow]'")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.chdir(tmp_path)
    return module.MlflowClient()


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The package in its offline mode, which is the observer's default."""
    module = pytest.importorskip("wandb", reason="needs Weights & Biases: pip install 'hvd_batchgrow[wandb]'")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    yield module
    module.teardown()


@pytest.mark.parametrize("text", ['{"attempts":' + "[" * 100_000, '{"attempts": []}'])
def test_a_damaged_record_has_no_tags(tmp_path: Path, text: str) -> None:
    tags = {"policy": "grow", "pair": "small", "twin": "no"}
    (tmp_path / "record.json").write_text('{"attempts": [{}, {"git_commit": "abc", "user_git_commit": null}]}')
    assert run_tags(started(tmp_path)) == tags | {"commit": "abc"}
    (tmp_path / "record.json").write_text(text)
    assert run_tags(started(tmp_path)) == tags


def attempt(observer: Observer, folder: Path, records: list[int], samples: int = 0, *, end: int | None = None) -> None:
    """Train from a checkpoint, evaluating at each record; without `end`, the attempt is killed."""
    observer.on_start(started(folder, samples))
    for counter in records:
        observer.on_record(replace(record(counter), elapsed_s=counter / 10))
        observer.on_evaluation(evaluation(counter))
    if end is not None:
        observer.on_end(replace(ended(folder), updates=end, done=end == 19))


def test_a_resumed_run_continues_its_mlflow_run_without_double_points(mlflow: Any, tmp_path: Path) -> None:
    from hvd_batchgrow.observers.mlflow import MLflow

    folder = tmp_path / "small"
    folder.mkdir()
    attempts = [{"git_commit": "abc", "user_git_commit": None}]
    (folder / "record.json").write_text(json.dumps({"attempts": attempts}))
    attempt(MLflow(), folder, [160, 320, 480])
    attempt(MLflow(), folder, [160, 320], end=10)  # a kill before the first checkpoint, then a stop
    attempt(MLflow(), folder, [400, 480, 688], samples=320, end=19)
    experiment = mlflow.get_experiment_by_name("hvd_batchgrow")
    (run,) = mlflow.search_runs([experiment.experiment_id])
    assert run.info.run_name == "small"
    assert run.info.status == "FINISHED"
    history = {
        name: [(point.step, round(point.value, 6)) for point in mlflow.get_metric_history(run.info.run_id, name)]
        for name in ("train/loss", "progress/updates", "val/top1")
    }
    assert history == {
        "train/loss": [(160, 0.7), (320, 0.7), (480, 0.7), (688, 0.7)],
        "progress/updates": [(160, 10), (320, 20), (480, 30), (688, 43)],
        "val/top1": [(160, 0.75), (320, 0.75), (480, 0.75), (688, 0.75)],
    }
    assert run.data.params["optim.lr"] == "0.05"
    assert run.data.params["schedule.boundaries_epochs"] == "[0.5, 1.0, 1.5]"
    tags = {key: value for key, value in run.data.tags.items() if not key.startswith("mlflow.")}
    assert tags == {"policy": "grow", "pair": "small", "twin": "no", "commit": "abc"}
    assert f"| {PLAN.schedule.phases[0].num_updates:,} |" in run.data.tags["mlflow.note.content"]


def test_a_stopped_mlflow_run_is_not_finished_and_a_copied_folder_without_its_database_is_a_new_run(
    mlflow: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hvd_batchgrow.observers.mlflow import MLflow

    attempt(MLflow(), tmp_path, [160], end=10)
    where = json.loads((tmp_path / "mlflow.json").read_text())
    assert mlflow.get_run(where["run_id"]).info.status == "KILLED"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/other.db")
    attempt(MLflow(), tmp_path, [320], samples=160, end=19)
    assert json.loads((tmp_path / "mlflow.json").read_text())["run_id"] != where["run_id"]


def leveldb_records(content: bytes) -> Iterator[bytes]:
    """Yield the records of a log in LevelDB's format, which W&B's files have after their first 7 bytes.

    A block has 32,768 bytes, of which the first one of W&B lacks these 7. A record is one fragment (type 1), or the
    fragments 2, 3, …, 4; each has a checksum of 4 bytes, a length of 2 bytes and a type. Fewer than 7 bytes at the end
    of a block are padding.
    """
    place, block_end, parts = 0, 32768 - 7, b""
    while place + 7 <= len(content):
        if block_end - place < 7:
            place, block_end = block_end, block_end + 32768
            continue
        length, kind = struct.unpack_from("<HB", content, place + 4)
        parts += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in {1, 4}:
            yield parts
            parts = b""


def logged(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """What `wandb sync` would send: the rows of all attempts, by run id, in the order of the attempts."""
    from wandb.proto.wandb_internal_pb2 import Record

    rows: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns):
        found = rows.setdefault(path.stem.removeprefix("run-"), [])
        for data in leveldb_records(path.read_bytes()[7:]):
            seen = Record.FromString(data)
            if seen.WhichOneof("record_type") == "history":
                items = {item.key or "/".join(item.nested_key): item.value_json for item in seen.history.item}
                found.append({key: json.loads(value) for key, value in items.items() if not key.startswith("_")})
    return rows


def test_a_resumed_run_continues_its_wandb_run_without_double_points(wandb: Any, tmp_path: Path) -> None:
    from hvd_batchgrow.observers.wandb import WeightsAndBiases

    attempt(WeightsAndBiases(), tmp_path, [160, 320, 480], end=10)
    attempt(WeightsAndBiases(), tmp_path, [400, 480, 688], samples=320, end=19)
    known = json.loads((tmp_path / "wandb.json").read_text())
    assert known["last"] == {"train": 688, "val": 688}
    rows = logged(tmp_path)
    assert list(rows) == [known["id"]]
    trained = [row for row in rows[known["id"]] if "train/loss" in row]
    assert [row["progress/samples"] for row in trained] == [160, 320, 480, 688]
    assert [row["progress/updates"] for row in trained] == [10, 20, 30, 43]
    evaluated = [row for row in rows[known["id"]] if "val/top1" in row]
    assert [(row["progress/samples"], row["val/top1"]) for row in evaluated] == [
        *((160, 0.75), (320, 0.75), (480, 0.75), (688, 0.75))
    ]


@pytest.mark.parametrize("text", ['{"id": "x", "last": []}', "[" * 100_000])
def test_a_damaged_wandb_file_begins_a_new_run(wandb: Any, tmp_path: Path, text: str) -> None:
    from hvd_batchgrow.observers.wandb import WeightsAndBiases

    (tmp_path / "wandb.json").write_text(text)
    attempt(WeightsAndBiases(), tmp_path, [160], end=10)
    known = json.loads((tmp_path / "wandb.json").read_text())
    assert known["id"] != "x"
    assert list(logged(tmp_path)) == [known["id"]]
