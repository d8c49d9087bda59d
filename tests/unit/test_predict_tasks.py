"""`predict` for other tasks than classification: labels, numbers in the units of the targets, and custom tasks."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hvd_batchgrow.cli import main
from hvd_batchgrow.deployment.trained_network import load_network
from hvd_batchgrow.train.run.model_description import read_description
from tests.helpers import job_tree

HERE = "tests.unit.test_tasks"
FEATURES = np.array([[0.2, 1.0], [1.5, -1.0]])


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HVD_BATCHGROW_CACHE", str(tmp_path / "cache"))


def write_csv(path: str, columns: dict[str, Any]) -> None:
    rows = zip(*columns.values(), strict=True)
    Path(path).write_text("\n".join([",".join(columns), *(",".join(map(str, row)) for row in rows)]) + "\n")


def train(targets: dict[str, Any], task: dict[str, Any], **data: Any) -> None:
    generator = np.random.default_rng(0)
    x, z = generator.normal(size=(2, 96))
    Path("data").mkdir()
    for part in ("train", "test"):
        write_csv(f"data/{part}.csv", {"x": x, "z": z} | {name: make(x, z) for name, make in targets.items()})
    write_csv("new.csv", {"x": FEATURES[:, 0], "z": FEATURES[:, 1]})
    tree = job_tree(task=task, model={"name": "dense7", "channels": [8] * 6})
    tree["data"] = {"source": "csv", "root": "data", "num_samples": 96, "label": [*targets], **data}
    tree["schedule"] |= {"max_batch": 32}
    import tomli_w

    Path("job.toml").write_text(tomli_w.dumps(tree))
    assert main(["train", "job.toml", "--max-updates", "3"]) == 75


def outputs() -> torch.Tensor:
    network = load_network(Path("runs/small"), device="cpu")
    normalization = network.description.normalization
    inputs = (FEATURES - np.array(normalization.mean)) / np.array(normalization.std)
    found: torch.Tensor = network.outputs(torch.from_numpy(inputs).float())
    return found


def predicted(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    capsys.readouterr()
    assert main(["predict", "runs/small", "new.csv", *words]) == 0
    return capsys.readouterr().out


def test_labels_have_the_sigmoid_of_their_logits(capsys: pytest.CaptureFixture[str]) -> None:
    targets = {"hot": lambda x, z: (x > 0).astype(int), "dry": lambda x, z: (z > 0).astype(int)}
    train(targets, {"name": "multi_label"})
    rows = list(csv.DictReader(io.StringIO(predicted(capsys))))
    assert list(rows[0]) == ["file", "row", "rank", "label", "probability"]
    found = {(row["row"], row["label"]): float(row["probability"]) for row in rows}
    expected = torch.sigmoid(outputs())
    assert found == {
        (f"line {k + 2}", name): pytest.approx(expected[k, j].item(), rel=1e-4)
        for k in range(2)
        for j, name in enumerate(targets)
    }
    lines = [json.loads(line) for line in predicted(capsys, "--format", "json", "--top", "1").splitlines()]
    assert lines[0]["predictions"] == [
        {"label": ["hot", "dry"][int(expected[0].argmax())], "probability": pytest.approx(expected[0].max().item())}
    ]


@pytest.mark.parametrize("standardize", [False, True])
def test_numbers_have_the_units_of_the_targets(standardize: bool, capsys: pytest.CaptureFixture[str]) -> None:
    train({"price": lambda x, z: 5 + 2 * x}, {"name": "regression", "standardize": standardize})
    rows = list(csv.DictReader(io.StringIO(predicted(capsys))))
    task, expected = read_description(Path("runs/small")).task, outputs()[:, 0]
    assert (task.mean is not None) == standardize
    if task.mean is not None and task.std is not None:
        assert 4.5 < task.mean[0] < 5.5
        expected = expected * task.std[0] + task.mean[0]
    assert [float(row["price"]) for row in rows] == pytest.approx(expected.tolist(), rel=1e-4)
    line = json.loads(predicted(capsys, "--format", "json").splitlines()[0])
    assert line["predictions"] == {"price": pytest.approx(expected[0].item(), rel=1e-4)}
    assert main(["predict", "runs/small", "new.csv", "--top", "2"]) == 2
    assert "--top: is for classes and labels" in capsys.readouterr().err


def test_other_data_with_numbers_is_evaluated_in_the_units_of_the_training(capsys: pytest.CaptureFixture[str]) -> None:
    train({"price": lambda x, z: 1000 + 50 * x}, {"name": "regression", "standardize": True})
    Path("other").mkdir()
    write_csv("other/test.csv", {"x": FEATURES[:, 0], "z": FEATURES[:, 1], "price": [1010.0, 1070.0]})
    assert main(["evaluate", "runs/small", "--data.root", "other", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    task = read_description(Path("runs/small")).task
    assert task.mean is not None
    assert task.std is not None
    answers = outputs()[:, 0] * task.std[0] + task.mean[0]
    errors = (answers - torch.tensor([1010.0, 1070.0])).double()
    assert found["mae"] == pytest.approx(errors.abs().mean().item(), rel=1e-4)
    assert found["loss"] == pytest.approx((errors / task.std[0]).square().mean().item(), rel=1e-4)


def test_a_custom_task_without_an_answer_is_refused_before_anything_is_printed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    train({"state": lambda x, z: (x > 0).astype(int)}, {"name": f"{HERE}:Own"}, label="state")
    capsys.readouterr()
    assert main(["predict", "runs/small", "new.csv"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "predict does not know the meaning of the outputs of the task 'tests.unit.test_tasks:Own'; " in captured.err
