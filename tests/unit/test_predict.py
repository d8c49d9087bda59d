"""`hvd-batchgrow predict`: the same inputs as the run's evaluation, and one line for each photo or row."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from hvd_batchgrow.cli import main
from hvd_batchgrow.comm.ranks import SingleRank
from hvd_batchgrow.data.load_source import load_source
from hvd_batchgrow.deployment.predict import encoded_photos, evaluation_inputs
from hvd_batchgrow.deployment.trained_network import load_network
from hvd_batchgrow.job_file import load_job
from hvd_batchgrow.torchvision_shim import import_torchvision
from hvd_batchgrow.train.parts import TrainingParts
from tests.helpers import small_source
from tests.pictures import CLASSES
from tests.reported_runs import change_json
from tests.trained_runs import RUN, write_job


def evaluated(job: str) -> tuple[TrainingParts, torch.Tensor]:
    """The parts of a run, and the inputs of its whole test set as its evaluation reads them."""
    loaded = load_job(Path(job))
    source = load_source(loaded.data, loaded.seed, lambda *_: None)
    parts = TrainingParts(loaded, source, SingleRank(), torch.device("cpu"))
    (batch,) = parts.reader.testing([range(len(source.test))])
    return parts, batch.inputs


def expected(parts: TrainingParts, inputs: torch.Tensor) -> torch.Tensor:
    """Probabilities by the run's last checkpoint, read without the code under test."""
    path = max(RUN.glob("checkpoints/*.pt"))
    parts.model.load_state_dict(torch.load(path, weights_only=True)["model"])
    with torch.no_grad():
        return torch.softmax(parts.model.eval()(inputs), 1)


def test_a_csv_file_may_be_written_in_another_way_than_the_training_rows(
    rows: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("point.csv").write_text("x,color,y\n1,red,0.5\n2,blue,1.5\n")
    Path("comma.csv").write_text("x;color;y\n1;red;0,5\n2;blue;1,5\n")
    assert main(["predict", str(RUN), "point.csv"]) == 0
    wanted = capsys.readouterr().out.replace("point.csv", "comma.csv")
    assert main(["predict", str(RUN), "comma.csv", "--data.decimal", ","]) == 0
    assert capsys.readouterr().out == wanted
    assert main(["predict", str(RUN), "comma.csv", "--data.categorical", '["y"]']) == 2
    fault = (
        "data.categorical: belongs to the training of the network; predict changes only data.decimal, data.separator"
    )
    assert fault in capsys.readouterr().err


@pytest.mark.slow
def test_photos_have_the_pixels_and_probabilities_of_the_evaluation(
    photos: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    parts, inputs = evaluated("small.toml")
    network = load_network(RUN, device="cpu")
    ((ids, found),) = evaluation_inputs(network, encoded_photos(photos, apply_orientation=False), lambda bad: None)
    assert ids == [0, 1, 2, 3, 4]
    assert torch.equal(found, inputs)
    capsys.readouterr()
    assert main(["predict", str(RUN), *map(str, photos), "--format", "json", "--top", "3"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["file"] for line in lines] == [str(path) for path in photos]
    for line, row in zip(lines, expected(parts, inputs), strict=True):
        order = row.argsort(descending=True).tolist()
        assert [entry["class"] for entry in line["predictions"]] == [CLASSES[k] for k in order]
        probabilities = [entry["probability"] for entry in line["predictions"]]
        assert probabilities == pytest.approx(row[order].tolist(), rel=1e-5)


def test_torchvision_computes_the_same_inputs_from_the_description(photos: list[Path]) -> None:
    import_torchvision()
    v2 = pytest.importorskip("torchvision.transforms.v2")
    description = json.loads((RUN / "model.json").read_text())
    p, n = description["preprocessing"], description["normalization"]
    preprocess = v2.Compose(  # as in docs/checkpoints.md
        [
            v2.PILToTensor(),
            v2.Resize(p["resize"], antialias=True),
            v2.CenterCrop(p["center_crop"]),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(n["mean"], n["std"]),
        ]
    )
    network = load_network(RUN, device="cpu")
    ((_, found),) = evaluation_inputs(network, encoded_photos(photos, apply_orientation=False), lambda bad: None)
    expected = torch.stack([preprocess(Image.open(path).convert("RGB")) for path in photos])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_bad_files_are_reported_and_the_others_predicted(
    photos: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("text.jpg").write_text("no photo")
    Path("empty.png").touch()
    whole = next(path for path in photos if path.suffix == ".jpg").read_bytes()
    Path("cut.jpg").write_bytes(whole[: len(whole) // 2])
    png = next(path for path in photos if path.suffix == ".png").read_bytes()
    Path("late.png").write_bytes(png[: len(png) // 2] + png[-12:])  # complete by its end, so only decoding shows it
    names = ["text.jpg", str(photos[0]), "empty.png", "absent.jpg", "cut.jpg", "late.png", ".", str(photos[1])]
    capsys.readouterr()
    assert main(["predict", str(RUN), *names]) == 1
    out, error = capsys.readouterr()
    table = list(csv.DictReader(out.splitlines()))
    assert [line["file"] for line in table] == [str(photos[0]), str(photos[1])]
    assert [line["rank"] for line in table] == ["1", "1"]
    assert {line["class"] for line in table} <= {*CLASSES}
    for name in ("text.jpg: cannot be decoded", "empty.png: is empty", "cut.jpg: ", "late.png: ", ".: cannot be read"):
        assert f"\n{name}" in f"\n{error}"
    assert "absent.jpg: cannot be read: No such file or directory" in error


def test_images_of_one_size_are_read_from_photos(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", job, "--max-updates", "3"]) == 75
    images = small_source().test.fetch(np.arange(4))
    for k, image in enumerate(images):
        Image.fromarray(image[..., 0]).save(f"{k}.png")
    Image.new("L", (9, 8)).save("wide.png")
    parts, inputs = evaluated(job)
    rows = expected(parts, inputs[:4])
    capsys.readouterr()
    names = ["0.png", "1.png", "wide.png", "2.png", "3.png"]
    assert main(["predict", str(RUN), *names, "--format", "json"]) == 1
    out, error = capsys.readouterr()
    assert error == "wide.png: is 8 × 9 pixels; the network was trained on images of 8 × 8: resize it\n"
    found = [json.loads(line)["predictions"][0] for line in out.splitlines()]
    assert [entry["class"] for entry in found] == [str(k) for k in rows.argmax(1).tolist()]
    assert [entry["probability"] for entry in found] == pytest.approx(rows.amax(1).tolist(), rel=1e-5)


def test_rows_are_encoded_as_in_training(rows: str, capsys: pytest.CaptureFixture[str]) -> None:
    parts, inputs = evaluated(rows)
    probabilities = expected(parts, inputs)
    # Other order of columns, one more column, and no label: the names decide.
    with Path("test.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    with Path("new.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["y", "note", "x", "color"], extrasaction="ignore", restval="n")
        writer.writeheader()
        writer.writerows(table)
    capsys.readouterr()
    assert main(["predict", str(RUN), "new.csv", "test.csv", "--format", "json", "--top", "2"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["row"] for line in lines] == 2 * [f"line {k}" for k in range(2, 42)]
    for line, row in zip(lines, [*probabilities, *probabilities], strict=True):
        by_class = {entry["class"]: entry["probability"] for entry in line["predictions"]}
        assert [by_class["a"], by_class["b"]] == pytest.approx(row.tolist(), rel=1e-5)


def test_invalid_cells_and_columns_are_reported(rows: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("green.csv").write_text("x,color,y\n1,green,2\n")
    Path("word.csv").write_text("x,color,y\n1,red,2\none,red,2\n")
    Path("lacks.csv").write_text("x,color\n1,red\n")
    Path("good.csv").write_text("x,color,y\n1,red,2\n")
    capsys.readouterr()
    Path("photo.jpg").write_bytes(b"\xff\xd8\xff\xe0")
    Path("latin.csv").write_bytes(b"x,color,y\n1,r\xe9d,2\n")
    files = ["green.csv", "word.csv", "lacks.csv", "absent.csv", "good.csv", "photo.jpg", "latin.csv"]
    assert main(["predict", str(RUN), *files]) == 1
    out, error = capsys.readouterr()
    assert [line["file"] for line in csv.DictReader(out.splitlines())] == ["good.csv"]
    green = "column 'color': 1 of 1 cell is not a category of the training rows: line 2: 'green'; they are blue, red"
    assert f"green.csv: {green}" in error
    assert "column 'x': 1 of 2 cells is not a finite number: line 3: 'one'" in error
    assert "lacks.csv: column 'y' is missing; there are x, color" in error
    assert "absent.csv: does not exist" in error
    assert "photo.jpg: is an image; this run reads csv and parquet files\n" in error
    assert "latin.csv: line 2: not UTF-8" in error


def test_notes_name_categories_that_are_encoded_as_none_and_files_without_rows(
    rows: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The defect: predictions for categories that no training row has, and no prediction, came without a word."""
    change_json(RUN / "model.json", lambda tree: tree["table"].update(unknown_category="ignore"))
    Path("green.csv").write_text("x,color,y,kind\n1,green,2,a\n1,red,2,b\n1,Red,2,b\n")
    Path("header.csv").write_text("x,color,y\n")
    capsys.readouterr()
    assert main(["predict", str(RUN), "green.csv", "header.csv"]) == 0
    out, error = capsys.readouterr()
    assert len(out.splitlines()) == 4
    note = "green.csv: column 'color': 2 of 3 cells are not categories of the training rows: line 2: 'green'; line 4: "
    assert error == f"{note}'Red'; encoded as no category\nheader.csv: has no rows\n"
    assert main(["evaluate", str(RUN), "--data.test", "green.csv"]) == 0
    assert " ".join(note.split()) in " ".join(capsys.readouterr().err.split())
    Path("labels.csv").write_text("x,color,y,kind\n")
    assert main(["evaluate", str(RUN), "--data.test", "labels.csv"]) == 1
    assert capsys.readouterr().err.endswith("labels.csv: no rows to evaluate\n")


@pytest.fixture
def plain(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> NDArray[np.float64]:
    """A run on csv files without a header: four features, an ignored column and the label; the features of 3 rows."""
    monkeypatch.chdir(tmp_path)
    rows = np.random.default_rng(0).normal(size=(40, 4)).round(3)
    lines = [",".join([*map(str, row), "7", str(int(row[0] > 0))]) for row in rows.tolist()]
    for name in ("train", "test"):
        Path(f"{name}.csv").write_text("\n".join([*lines, ""]))
    data = {"source": "csv", "root": ".", "num_samples": 40, "header": False, "ignore_columns": [4]}
    schedule = {"epochs": 2.0, "boundaries_epochs": [1.0], "max_batch": 32}
    job = write_job(data=data, schedule=schedule, model={"name": "tests.trained_runs:mlp"})
    Path(job).write_text(Path(job).read_text().replace("channels = [\n    4,\n    8,\n]\n", ""))
    assert main(["train", job]) == 0
    return rows[:3]


def test_a_file_without_a_header_has_the_columns_of_the_training_files(
    plain: NDArray[np.float64], capsys: pytest.CaptureFixture[str]
) -> None:
    """The defect: with the row index that pandas writes, each feature was taken from the column before it."""

    def predicted(name: str, columns: Sequence[Any], code: int = 0) -> str:
        np.savetxt(name, np.column_stack(columns), "%g", ",")
        capsys.readouterr()
        assert main(["predict", str(RUN), name]) == code
        out, error = capsys.readouterr()
        return error if code else out.replace(name, "x")

    index, rest = np.arange(3), [np.full(3, 7), np.zeros(3)]
    whole = predicted("whole.csv", [plain, *rest])
    assert main(["predict", str(RUN), "whole.csv"]) == 0
    note = "has no header and 6 columns, as the training files: the network does not use columns 4, 5, counted from 0"
    assert capsys.readouterr().err == f"whole.csv {note}\n"
    assert whole == predicted("features.csv", [plain])
    assert main(["predict", str(RUN), "features.csv"]) == 0
    assert capsys.readouterr().err == ""
    message = "has 5 columns and no header; the network was trained on 4, or 6 with labels and ignored columns\n"
    assert predicted("index.csv", [index, plain], 1) == f"index.csv: {message}"
    assert "has 7 columns" in predicted("more.csv", [index, plain, *rest], 1)
    assert main(["evaluate", str(RUN), "--data.test", "more.csv", "--data.label", "6"]) == 1
    assert "has 7 columns and no header" in capsys.readouterr().err


def test_predict_suggests_only_what_it_accepts(rows: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("inf.csv").write_text("x,color,y\ninf,red,one\n")
    capsys.readouterr()
    assert main(["predict", str(RUN), "inf.csv"]) == 1
    error = capsys.readouterr().err
    assert error.count("the network needs values as in the training rows") == 2
    assert "data." not in error


def test_a_checkpoint_and_the_average_can_be_chosen(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", job, "--update.ema-samples", "100"]) == 0
    Image.fromarray(small_source().test.fetch(np.arange(1))[0, ..., 0]).save("0.png")
    older = min(RUN.glob("checkpoints/*.pt"))
    capsys.readouterr()
    results = []
    for options in ([], ["--average"], ["--checkpoint", str(older)]):
        assert main(["predict", str(RUN), "0.png", "--format", "json", *options]) == 0
        results.append(json.loads(capsys.readouterr().out)["predictions"][0]["probability"])
    assert len({*results}) == 3
    assert main(["predict", str(RUN), "0.png", "--checkpoint", "absent.pt"]) == 1
    assert "checkpoint absent.pt: No such file" in capsys.readouterr().err


def test_a_run_without_an_average_is_reported(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", job, "--max-updates", "1"]) == 75
    assert main(["predict", str(RUN)]) == 2
    assert "files: name at least one photo or table" in capsys.readouterr().err
    assert main(["predict", str(RUN), "0.png", "--average"]) == 1
    assert "runs/small keeps no average of its weights: set update.ema_samples" in capsys.readouterr().err
