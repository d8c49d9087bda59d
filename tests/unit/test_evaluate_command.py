"""`hvd-batchgrow evaluate`: the numbers of the run's last evaluation, and those of other data."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn

from hvd_batchgrow.cli import main
from hvd_batchgrow.data.datasets.dataset import ArrayDataset, Datasets
from hvd_batchgrow.deployment.trained_network import load_network
from tests.helpers import labels_of, small_source, write_idx_folder
from tests.pictures import CLASSES
from tests.trained_runs import RUN, write_job


def evaluated(capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["evaluate", str(RUN), "--json", *options]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def recorded() -> dict[str, Any]:
    """The last evaluation in the run's metrics."""
    lines = [json.loads(line) for line in (RUN / "metrics.jsonl").read_text().splitlines()]
    line: dict[str, Any] = [line for line in lines if line["kind"] == "eval"][-1]
    return line


@pytest.mark.parametrize("run", ["photos", "rows"])
def test_the_numbers_are_those_of_the_last_evaluation(
    run: str, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    request.getfixturevalue(run)
    found, last = evaluated(capsys), recorded()
    assert [found["samples"], found["loss"], found["top1"]] == [last["samples"], last["loss"], last["top1"]]
    if run == "photos":
        assert [found["average_loss"], found["average_top1"]] == [last["average_loss"], last["average_top1"]]
        assert found["average_loss"] != found["loss"]
    assert main(["digest", str(RUN)]) == 0
    assert capsys.readouterr().out.strip() == found["weights_sha256"]
    assert main(["evaluate", str(RUN)]) == 0
    assert f"test loss {last['loss']:.4f}, test accuracy {100 * last['top1']:.2f} %" in capsys.readouterr().out


def test_photos_of_another_folder_keep_the_classes_of_the_run(
    photos: list[Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in CLASSES[1:]:  # alone, these folders would be classes 0 and 1
        shutil.copytree(f"photos/val/{name}", f"others/{name}")
    lines = []
    kept = [path for path in photos if path.parent.name in CLASSES[1:]]
    capsys.readouterr()
    assert main(["predict", str(RUN), *map(str, kept), "--top", "3", "--format", "json"]) == 0
    for line in map(json.loads, capsys.readouterr().out.splitlines()):
        name = Path(line["file"]).parent.name
        lines += [np.log(entry["probability"]) for entry in line["predictions"] if entry["class"] == name]
    shutil.rmtree("photos")
    found = evaluated(capsys, "--data.root", "others")
    assert found["num_test"] == len(kept) == len(lines)
    assert found["loss"] == pytest.approx(-np.mean(lines), rel=1e-5)
    shutil.move("others/dog", "others/dgo")
    assert main(["evaluate", str(RUN), "--data.root", "others"]) == 1
    assert "others/dgo, nearest: dog" in capsys.readouterr().err


def test_keys_that_do_not_lead_to_other_data_keep_the_test_set(
    photos: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """The defect: any key of `[data]` dropped `test_fraction`, so images of the training set counted as test images."""
    shutil.rmtree("photos/val")
    words = ["--data.test-fraction", "0.25", "--data.num-samples", "9", "--overwrite"]
    assert main(["train", "small.toml", *words]) == 0
    whole = evaluated(capsys)
    assert whole["num_test"] == 3  # of 12 images
    for words in (["--data.pipeline", "torch"], ["--data.on-bad-sample", "replace"]):
        assert evaluated(capsys, *words) == whole
    assert evaluated(capsys, "--data.test", "train")["num_test"] == 12


def test_rows_of_another_file_keep_the_encoding_of_the_run(
    rows: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole = evaluated(capsys)
    Path("train.csv").unlink()
    Path("other").mkdir()
    lines = Path("test.csv").read_text().splitlines()
    moved = [",".join([*line.split(",")[2:], *line.split(",")[:2]]) for line in lines]  # y, kind, x, color
    Path("other/test.csv").write_text("\n".join([*moved, ""]))
    for label in (["--data.label", "kind"], []):  # the last column is not the label here
        found = evaluated(capsys, "--data.root", "other", *label)
        assert found["loss"] == pytest.approx(whole["loss"], rel=1e-6)
        assert [found["top1"], found["num_test"]] == [whole["top1"], 40]
    assert main(["evaluate", str(RUN), "--data.root", "other", "--data.label", "color"]) == 2
    fault = "data.label: 'color' of other/test.csv is a feature of the network, so it cannot be the label; name another"
    assert fault in capsys.readouterr().err
    Path("other/test.csv").write_text("x,color,y,kind\n1,red,2,c\n")
    assert main(["evaluate", str(RUN), "--data.root", "other"]) == 1
    assert "line 2: 'c'; they are a, b" in capsys.readouterr().err


def test_a_description_without_the_name_of_the_label_can_be_used(
    rows: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole = evaluated(capsys)
    description = json.loads((RUN / "model.json").read_text())
    assert description["table"].pop("label_columns") == ["kind"]
    (RUN / "model.json").write_text(json.dumps(description))
    assert evaluated(capsys) == evaluated(capsys, "--data.test", "test.csv") == whole
    lines = [line.split(",") for line in Path("test.csv").read_text().splitlines()]
    Path("moved.csv").write_text("".join(",".join([*line[3:], *line[:3]]) + "\n" for line in lines))
    assert main(["evaluate", str(RUN), "--data.test", "moved.csv"]) == 2
    assert "data.label: 'y' of moved.csv is a feature of the network" in capsys.readouterr().err


def test_true_and_false_are_classes_of_other_parquet_files(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    features = {name: np.random.default_rng(k).normal(size=40) for k, name in enumerate("abcd")}
    for name in ("train", "test", "other"):
        pq.write_table(pa.table(features | {"label": np.arange(40) % 3 > 0}), f"{name}.parquet")
    data = {"source": "parquet", "root": ".", "num_samples": 40}
    schedule = {"epochs": 2.0, "boundaries_epochs": [1.0], "max_batch": 32}
    job = write_job(data=data, schedule=schedule, model={"name": "tests.trained_runs:mlp"})
    Path(job).write_text(Path(job).read_text().replace("channels = [\n    4,\n    8,\n]\n", ""))
    assert main(["train", job]) == 0
    assert evaluated(capsys, "--data.test", "other.parquet") == evaluated(capsys)


def test_labels_of_other_arrays_count_from_1_as_in_training(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    rows, labels = np.random.default_rng(0).normal(size=(40, 4)), np.arange(40) % 3 + 1
    for folder, kept in ((".", labels > 0), ("other", labels < 3)):  # the other data lacks class 3
        Path(folder).mkdir(exist_ok=True)
        for part in ("train", "test"):
            np.save(f"{folder}/{part}_rows.npy", rows[kept])
            np.save(f"{folder}/{part}_labels.npy", labels[kept])
    data = {"source": "numpy", "root": ".", "num_samples": 40, "num_classes": 3}
    schedule = {"epochs": 2.0, "boundaries_epochs": [1.0], "max_batch": 32}
    job = write_job(data=data, schedule=schedule, model={"name": "tests.trained_runs:mlp"})
    Path(job).write_text(Path(job).read_text().replace("channels = [\n    4,\n    8,\n]\n", ""))
    assert main(["train", job]) == 0
    inputs = torch.from_numpy((rows - rows.mean(0)) / rows.std(0))[labels < 3].float()
    expected = nn.functional.cross_entropy(
        load_network(RUN, device="cpu").outputs(inputs), torch.from_numpy(labels[labels < 3] - 1)
    )
    found = evaluated(capsys, "--data.root", "other")
    assert found["num_test"] == 27
    assert found["loss"] == pytest.approx(expected.item(), rel=1e-5)
    for name, head in (("pandas.csv", "0,1,2,3\n"), ("plain.csv", "")):
        Path(name).write_text(head + "0.5,1,-1,2\n1,0,0,0\n")
    assert main(["predict", str(RUN), "pandas.csv"]) == 1
    assert "its first line, 0,1,2,3, may be a header or a row: 4 of its 4 fields could" in capsys.readouterr().err
    assert main(["predict", str(RUN), "plain.csv"]) == 0
    wanted = capsys.readouterr().out.replace("plain", "pandas").replace("line 2", "line 3").replace("line 1", "line 2")
    assert main(["predict", str(RUN), "pandas.csv", "--data.header", "true"]) == 0
    assert capsys.readouterr().out == wanted
    assert main(["evaluate", str(RUN), "--data.source", "csv", "--data.root", "other"]) == 1
    assert capsys.readouterr().err.endswith("(there are no csv files); set data.test\n")
    Path("named.csv").write_text("a,b,c,d\n0.5,1,-1,2\n1,0,0,0\n")
    assert main(["predict", str(RUN), "named.csv"]) == 1
    assert "\n  if its first line is a header: --data.header true" in capsys.readouterr().err
    assert main(["predict", str(RUN), "named.csv", "--data.header", "true"]) == 0
    assert capsys.readouterr().out == wanted.replace("pandas", "named")
    np.save("other/train_labels.npy", labels[labels < 3] - 1)
    assert main(["evaluate", str(RUN), "--data.root", "other"]) == 1
    assert "14 of 27 training labels are not in 1 … 3" in capsys.readouterr().err


def test_arrays_of_another_folder_are_normalized_as_in_training(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", job]) == 0
    source = small_source()
    darker = [
        ArrayDataset(part.fetch(np.arange(len(part))) // 2, np.array(labels_of(part)))
        for part in (source.train, source.test)
    ]
    write_idx_folder(Path("darker"), Datasets(darker[1], darker[0], 3, (0.5,), (0.25,)))
    found = evaluated(capsys, "--data.root", "darker")
    assert found["num_test"] == 300
    description = json.loads((RUN / "model.json").read_text())
    mean, std = description["normalization"]["mean"][0], description["normalization"]["std"][0]
    pixels = torch.from_numpy(darker[0].values).permute(0, 3, 1, 2).double() / 255
    logits = load_network(RUN, device="cpu").outputs(((pixels - mean) / std).float())
    labels = torch.from_numpy(darker[0].targets)
    assert found["loss"] == pytest.approx(nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)


def test_data_that_has_changed_and_keys_of_the_network_are_refused(
    rows: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["evaluate", str(RUN), "--data.image-size", "8", "--optim.lr", "1"]) == 2
    error = capsys.readouterr().err
    assert "data.image_size: belongs to the training of the network; evaluate changes only data.decimal" in error
    assert "optim.lr: belongs to the training" in error
    assert main(["evaluate", str(RUN), "--data.train", "test.csv"]) == 2
    assert "data.train: is not read: evaluate reads only the test set of this source" in capsys.readouterr().err
    text = Path("train.csv").read_text()
    Path("train.csv").write_text(text.replace("6,red", "60,red"))
    assert main(["evaluate", str(RUN)]) == 1
    fault = "the data has changed since runs/small was trained on it: table of runs/small/model.json; mean of 'x': "
    assert fault in capsys.readouterr().err


def test_names_of_classes_do_not_change_what_labels_of_another_file_mean(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    lines = [f"{k % 7},{k % 5},{k % 3},{k % 4},{int(k % 7 > 3) + 1}" for k in range(40)]
    for name in ("train", "test"):
        Path(f"{name}.csv").write_text("\n".join(["a,b,c,d,label", *lines, ""]))
    data = {"source": "csv", "root": ".", "num_samples": 40, "num_classes": 2, "class_names": ["2", "1"]}
    schedule = {"epochs": 2.0, "boundaries_epochs": [1.0], "max_batch": 32}
    job = write_job(data=data, schedule=schedule, model={"name": "tests.trained_runs:mlp"})
    Path(job).write_text(Path(job).read_text().replace("channels = [\n    4,\n    8,\n]\n", ""))
    assert main(["train", job]) == 0
    assert evaluated(capsys, "--data.test", "test.csv") == evaluated(capsys)


@pytest.mark.parametrize("task", ["classification", "regression"])
def test_rows_with_missing_values_are_skipped_as_in_training(
    task: str, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    lines = [f"{k % 7},{('red', 'blue')[k % 2]},{k * 0.1},{k % 3 % 2}" for k in range(40)]
    broken = [*lines[:3], "1,red,0.5,", *lines[3:20], ",red,0.5,1", "1,,0.5,1", *lines[20:]]
    for name, rows in (("train", broken), ("test", lines), ("broken", broken), ("empty", [",red,0.5,1"])):
        Path(f"{name}.csv").write_text("\n".join(["x,color,y,kind", *rows, ""]))
    data = {"source": "csv", "root": ".", "num_samples": 40, "categorical": ["color"], "missing": "drop_row"}
    schedule = {"epochs": 2.0, "boundaries_epochs": [1.0], "max_batch": 32}
    job = write_job(data=data, schedule=schedule, model={"name": "tests.trained_runs:mlp"}, task={"name": task})
    Path(job).write_text(Path(job).read_text().replace("channels = [\n    4,\n    8,\n]\n", ""))
    assert main(["train", job]) == 0
    whole = evaluated(capsys)
    assert (evaluated(capsys, "--data.test", "broken.csv"), whole["num_test"]) == (whole, 40)
    assert main(["evaluate", str(RUN), "--data.test", "broken.csv"]) == 0
    assert "broken.csv: 3 of 43 rows are skipped: a value is missing" in capsys.readouterr().err
    assert main(["evaluate", str(RUN), "--data.test", "empty.csv"]) == 1
    assert "empty.csv: a value is missing in every row: nothing is left" in capsys.readouterr().err
    assert main(["predict", str(RUN), "broken.csv"]) == 1  # each row needs a prediction
    assert "column 'x': 1 of 43 cells is missing: line 23" in capsys.readouterr().err
