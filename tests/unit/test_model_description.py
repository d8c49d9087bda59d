"""`model.json`: what users of a run's weights need besides them."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hvd_batchgrow.cli import main
from hvd_batchgrow.config import DataSection
from hvd_batchgrow.data.load_source import load_source
from hvd_batchgrow.messages.errors import JobError, RunError
from hvd_batchgrow.train.run.model_description import class_names, describe_model, read_description
from tests.helpers import small_job, small_source
from tests.pictures import CLASSES, FOLDER, pictures


def described(root: Path, **data: Any) -> dict[str, Any]:
    section = DataSection(root=str(root), **data)
    source = load_source(section, 7, lambda *_: None)
    job = small_job(root).model_copy(update={"data": section})
    return describe_model(job, source).model_dump(mode="json")


def test_a_run_begins_with_a_description_of_its_network(job: str) -> None:
    assert main(["train", job, "--max-updates", "1"]) == 75
    found = json.loads(Path("runs/small/model.json").read_text())
    assert found["classes"] == ["0", "1", "2"]
    assert found["inputs"] == {"kind": "images", "shape": [1, 8, 8], "channels": "gray", "dtype": "float32"}
    pixels = np.asarray(small_source().train.fetch(np.arange(300)), dtype=np.float64) / 255
    assert found["normalization"] == {
        "divisor": 255,
        "mean": [pytest.approx(pixels.mean(), rel=1e-6)],
        "std": [pytest.approx(pixels.std(), rel=1e-6)],
    }
    assert found["preprocessing"] is None
    assert found["table"] is None
    assert found["job"]["optim"]["lr"] == 0.05
    assert found["versions"]["torch"].startswith("2.")


def test_classes_of_an_image_folder_are_its_folders(tmp_path: Path, cache: Path) -> None:
    root = FOLDER.make(tmp_path / "photos", pictures(12))
    keys = {"source": "image_folder", "num_samples": 12, "num_classes": 4, "image_size": 28}
    found = described(root, **keys, apply_orientation=True)
    assert found["classes"] == [*CLASSES, "3"]  # the fourth class has no folder
    assert found["inputs"] == {"kind": "encoded", "shape": [3, 28, 28], "channels": "RGB", "dtype": "float32"}
    assert found["preprocessing"] == {
        "apply_orientation": True,
        "resize": 32,  # 28 · 8/7
        "interpolation": "bilinear",
        "antialias": True,
        "center_crop": [28, 28],
    }
    assert described(root, **keys, eval_resize=30)["preprocessing"]["resize"] == 30


def test_a_table_has_its_columns_in_order(tmp_path: Path, cache: Path) -> None:
    text = "x,color,y,kind\n1,red,,b\n3,blue,4,a\n5,red,8,b\n"
    (tmp_path / "train.csv").write_text(text)
    (tmp_path / "test.csv").write_text(text)
    keys = {"source": "csv", "num_samples": 3, "categorical": ["color"], "missing": "mean"}
    found = described(tmp_path, **keys)
    assert found["classes"] == ["a", "b"]
    assert found["inputs"]["shape"] == [4]
    assert found["normalization"]["divisor"] == 1
    assert found["normalization"]["mean"] == [3.0, 0.0, 0.0, 6.0]
    assert found["table"]["columns"] == [
        {"name": "x", "kind": "number", "categories": [], "fill": 3.0},
        {"name": "color", "kind": "category", "categories": ["blue", "red"], "fill": None},
        {"name": "y", "kind": "number", "categories": [], "fill": 6.0},
    ]


def test_labels_that_count_from_1_name_the_classes(tmp_path: Path, cache: Path) -> None:
    for name in ("train", "test"):
        (tmp_path / f"{name}.csv").write_text("x,kind\n1,1\n2,2\n4,3\n")
    assert described(tmp_path, source="csv", num_samples=3, num_classes=3)["classes"] == ["1", "2", "3"]


@pytest.mark.parametrize("names", ["abc", ["a", 1, "c"], ["a", "b", "c", "d"], 3])
def test_invalid_class_names_of_a_custom_source_are_refused(names: Any) -> None:
    with pytest.raises(JobError, match=r'schema\["classes"\] must be a list of at most 3 texts'):
        class_names(replace(small_source(), schema={"classes": names}))


def test_a_run_without_a_description_is_refused_with_what_to_do(job: str) -> None:
    main(["train", job, "--max-updates", "1"])
    path = Path("runs/small/model.json")
    path.write_text(path.read_text()[:-9])
    with pytest.raises(RunError, match=r"model.json is damaged"):
        read_description(Path("runs/small"))
    path.unlink()
    with pytest.raises(
        RunError, match=r"model.json is missing; resume .*train runs/small/job.toml --resume auto --runs-dir runs"
    ):
        read_description(Path("runs/small"))
    with pytest.raises(RunError, match="nowhere does not hold a run"):
        read_description(Path("nowhere"))
    assert main(["train", "runs/small/job.toml", "--resume", "auto", "--runs-dir", "runs"]) == 0
    assert read_description(Path("runs/small")).classes == ("0", "1", "2")


def test_the_command_that_writes_a_description_can_be_copied(tmp_path: Path) -> None:
    run = tmp_path / "my runs" / "small"
    run.mkdir(parents=True)
    (run / "job.toml").touch()
    with pytest.raises(RunError) as caught:
        read_description(run)
    words = shlex.split(str(caught.value).partition("which writes it: ")[2])
    assert words[2:] == [str(run / "job.toml"), "--resume", "auto", "--runs-dir", str(run.parent)]


def test_a_run_is_not_resumed_with_other_class_folders(photos: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "small.toml", "--resume", "auto", "--update.ema-samples", "40"]) == 0
    for part in ("train", "val"):
        Path(f"photos/{part}/cat").rename(f"photos/{part}/fox")  # becomes the last class, and the others move
    capsys.readouterr()
    assert main(["train", "small.toml", "--resume", "auto", "--update.ema-samples", "40"]) == 1
    error = capsys.readouterr().err
    assert (
        "was trained on data with another meaning:\n  classes: ['cat', 'dog', 'eel'], now ['dog', 'eel', 'fox']"
        in error
    )


def test_a_class_folder_whose_name_is_not_utf_8_has_a_printable_name() -> None:
    source = replace(small_source(), schema={"classes": ["a", "caf\udce9", "b"]})
    assert class_names(source) == ("a", "caf\\xe9", "b")
