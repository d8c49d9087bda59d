"""Numbers as targets, from .npy files and the columns of tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hvd_batchgrow.config import DataSection
from hvd_batchgrow.data.datasets.dataset import ArrayDataset, Datasets
from hvd_batchgrow.data.load_source import load_source
from hvd_batchgrow.messages.errors import JobError, RunError

HERE = "tests.unit.test_value_targets"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HVD_BATCHGROW_CACHE", str(tmp_path / "cache"))


def load(root: Path, source: str, **keys: Any) -> Datasets:
    data = DataSection(source=source, root=str(root), **keys)
    return load_source(data, 0, lambda *_: None, "values", any_size=True)


def write_npy(root: Path, targets: Any, test: Any = ((1.0, 2.0),)) -> None:
    root.mkdir(exist_ok=True)
    for part, found in (("train", np.array(targets)), ("test", np.array(test))):
        np.save(root / f"{part}_rows.npy", np.arange(2.0 * len(found)).reshape(-1, 2) ** 2)
        np.save(root / f"{part}_targets.npy", found)


def test_names_of_targets_that_the_source_does_not_name(tmp_path: Path) -> None:
    write_npy(tmp_path, [[1.5, 10], [2.5, 30]])
    assert load(tmp_path, "numpy", class_names=("x", "y")).schema["classes"] == ["x", "y"]
    with pytest.raises(
        JobError, match=r"data.class_names: has 1 different names, and the data has 2 classes, labels or"
    ):
        load(tmp_path, "numpy", class_names=("x",))
    write_csv(tmp_path)
    with pytest.raises(JobError, match=r"data.class_names: the source has names already: price; remove it"):
        load(tmp_path, "csv", label="price", categorical=("kind",), class_names=("x",))


def test_targets_of_npy_files(tmp_path: Path) -> None:
    write_npy(tmp_path / "two", [[1.5, 10], [2.5, 30], [3.5, 20]])
    source = load(tmp_path / "two", "numpy")
    assert source.num_classes == 2
    assert source.train.targets[np.array([2, 0])].tolist() == [[3.5, 20], [1.5, 10]]
    assert source.train.targets[np.arange(3)].dtype == np.float32
    assert source.schema["target_mean"] == pytest.approx([2.5, 20])
    assert source.schema["target_std"] == pytest.approx([np.sqrt(2 / 3), np.sqrt(200 / 3)])
    write_npy(tmp_path / "one", [1, 2, 4], [7])
    source = load(tmp_path / "one", "numpy")
    assert (source.num_classes, source.train.targets[np.arange(3)].tolist()) == (1, [[1], [2], [4]])


@pytest.mark.parametrize(
    ("targets", "test", "fault"),
    [
        (
            [[1.0, np.nan], [1, 1]],
            [[1, 1]],
            "train_targets.npy: targets of 1 of 2 samples are not finite: sample 0 has",
        ),
        ([["a", "b"], ["c", "d"]], [[1, 1]], "train_targets.npy is <U1 .*; targets must be numbers"),
        ([[1, 2], [3, 4]], [[1.0]], "test_targets.npy: a sample has 1 targets, one of .*train_targets.npy 2"),
    ],
)
def test_targets_of_npy_files_that_cannot_be_learned(tmp_path: Path, targets: Any, test: Any, fault: str) -> None:
    write_npy(tmp_path, targets, test)
    with pytest.raises(RunError, match=fault):
        load(tmp_path, "numpy")


ROWS = "size,kind,price,weight\n1.5,a,10.5,1\n2.5,b,-3,2\n4,a,0.25,4\n"


def write_csv(root: Path, rows: str = ROWS) -> None:
    for part in ("train", "test"):
        (root / f"{part}.csv").write_text(rows)


def test_targets_of_one_column_of_a_table(tmp_path: Path) -> None:
    write_csv(tmp_path)
    source = load(tmp_path, "csv", label="price", categorical=("kind",))
    assert source.train.targets[np.arange(3)].tolist() == [[10.5], [-3], [0.25]]
    assert source.schema["classes"] == ["price"]
    assert source.schema["features"] == ["size", "kind=a", "kind=b", "weight"]
    last = load(tmp_path, "csv", categorical=("kind",))
    assert last.train.targets[np.arange(3)].tolist() == [[1], [2], [4]]


def test_targets_of_several_columns_of_a_table(tmp_path: Path) -> None:
    write_csv(tmp_path)
    source = load(tmp_path, "csv", label=("weight", "price"), ignore_columns=("kind",))
    assert source.train.targets[np.array([1])].tolist() == [[2, -3]]
    assert (source.num_classes, source.schema["classes"]) == (2, ["weight", "price"])
    assert source.train.fetch(np.array([1])).tolist() == [[2.5]]


def test_the_same_table_has_classes_too(tmp_path: Path) -> None:
    # Both kinds of targets have separate caches.
    write_csv(tmp_path, "x,y\n1,0\n2,1\n3,0\n")
    assert load(tmp_path, "csv").train.targets[np.arange(3)].tolist() == [[0], [1], [0]]
    data = DataSection(source="csv", root=str(tmp_path))
    (tmp_path / "numbers").mkdir()
    write_csv(tmp_path / "numbers", "x,y\n1,0.5\n2,1\n")
    numbers = DataSection(source="csv", root=str(tmp_path / "numbers"))
    with pytest.raises(RunError, match=r"; for numbers, set task.name = 'regression' or give .* target = 'values'"):
        load_source(numbers, 0, lambda *_: None, None, any_size=True)
    classes = load_source(data, 0, lambda *_: None, any_size=True)
    assert classes.train.targets[np.arange(3)].tolist() == [0, 1, 0]


def test_a_missing_or_invalid_target_of_a_table_is_named(tmp_path: Path) -> None:
    write_csv(tmp_path, "x,y\n1,2.5\n2,\n3,much\n")
    with pytest.raises(RunError, match=r"column 'y': 1 of 3 cells is missing: line 3(?s:.*)line 4: 'much'"):
        load(tmp_path, "csv")
    write_csv(tmp_path, "x,y\n1,2.5\n2,\n3,4\n")
    assert load(tmp_path, "csv", missing="drop_row").train.targets[np.arange(2)].tolist() == [[2.5], [4]]
    write_csv(tmp_path, "x,y\n1,2.5\n2,1e300\n3,4\n")
    with pytest.raises(RunError, match="training rows, as float32: targets of 1 of 3 samples are not finite"):
        load(tmp_path, "csv")
    (tmp_path / "train.csv").write_text("x,y\n1,2.5\n2,3\n3,4\n")
    (tmp_path / "test.csv").write_text("x,y\n1,2.5\n2,1e39\n")
    with pytest.raises(RunError, match=r"test rows, as float32: targets of 1 of 2 .* finite: sample 1 has \[inf\]"):
        load(tmp_path, "csv")


SECONDS = [1_700_000_000 + 20 * k for k in range(8)]
"""float32 has 24 bits: near 2**31 its numbers differ by 128."""


def test_targets_that_float32_cannot_represent_are_refused(tmp_path: Path) -> None:
    message = r"target {} has values from 1700000000 to 1700000140: float32 changes them by up to 60; subtract"
    write_npy(tmp_path, np.stack([np.arange(8), SECONDS], axis=1))
    with pytest.raises(RunError, match=r"train_targets.npy: " + message.format(1)):
        load(tmp_path, "numpy")
    write_csv(tmp_path, "x,y\n" + "".join(f"{k},{second}\n" for k, second in enumerate(SECONDS)))
    with pytest.raises(RunError, match=r"train.csv, training rows: " + message.format("'y'")):
        load(tmp_path, "csv")
    with pytest.raises(RunError, match=r"data.source, train: " + message.format(0)):
        load_source(DataSection(source=f"{HERE}:of_seconds"), 0, lambda *_: None, "values", any_size=True)


def of_seconds(_: DataSection) -> Datasets:
    samples = ArrayDataset(np.zeros((8, 1)), np.array(SECONDS, dtype=np.float64)[:, None])
    return Datasets(samples, samples, 1, (0.0,), (1.0,))


@pytest.mark.parametrize(
    "targets",
    [[0.1] * 3, [1900, 1950, 2020], [100.1, 100.2, 101.3], [293.15, 293.16, 293.25], [1.7e9, 1.7e9 + 1e7, 1.8e9]],
)
def test_targets_whose_differences_float32_represents_are_accepted(tmp_path: Path, targets: list[float]) -> None:
    write_npy(tmp_path, targets, [7])
    assert load(tmp_path, "numpy").train.targets[np.arange(len(targets))].tolist() == [[np.float32(x)] for x in targets]


def test_several_label_columns_are_for_numbers(tmp_path: Path) -> None:
    write_csv(tmp_path)
    data = DataSection(source="csv", root=str(tmp_path), label=("price", "weight"))
    with pytest.raises(JobError, match=r"data.label: .*several columns are for the tasks multi_label and regression"):
        load_source(data, 0, lambda *_: None, any_size=True)
    with pytest.raises(JobError, match=r"data.categorical: 'kind' of .* is data.label too"):
        load(tmp_path, "csv", label=("price", "kind"), categorical=("kind",))


# --- a custom source ---------------------------------------------------------------------------------


def own(data: DataSection) -> Datasets:
    targets = np.array([[0.5, 1.0], [2.0, 3.0]], dtype=np.float32)
    part = ArrayDataset(np.ones((2, 3), np.float32), targets)
    return Datasets(part, part, 2, (0.0,) * 3, (1.0,) * 3)


def flat(data: DataSection) -> Datasets:
    part = ArrayDataset(np.ones((2, 3), np.float32), np.zeros(2, np.float32))
    return Datasets(part, part, 1, (0.0,) * 3, (1.0,) * 3)


def three(data: DataSection) -> Datasets:
    part = ArrayDataset(np.ones((2, 3), np.float32), np.zeros((2, 3), np.float32))
    return Datasets(part, part, 2, (0.0,) * 3, (1.0,) * 3)


def test_targets_of_a_custom_source(tmp_path: Path) -> None:
    source = load(tmp_path, f"{HERE}:own")
    assert source.train.targets[np.array([1])].tolist() == [[2, 3]]
    with pytest.raises(JobError, match=r"targets must be numbers, float32 \(n, K\), are float32 \(2,\): .*reshape"):
        load(tmp_path, f"{HERE}:flat")
    with pytest.raises(RunError, match="a sample has 3 targets, and num_classes is 2"):
        load(tmp_path, f"{HERE}:three")


def test_a_column_of_targets_is_named_once(tmp_path: Path) -> None:
    write_csv(tmp_path)
    with pytest.raises(JobError, match=r"names the column 'price' of .* twice"):
        load(tmp_path, "csv", label=("price", "weight", "price"), ignore_columns=("kind",))
