"""Classes of every kind of source: the first label, classes that never occur, and the file at fault."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hvd_batchgrow.config import DataSection
from hvd_batchgrow.data.datasets.dataset import Datasets
from hvd_batchgrow.data.load_source import load_source
from hvd_batchgrow.messages.errors import JobError, RunError
from tests.helpers import idx_bytes, labels_of
from tests.pictures import picture
from tests.unit.test_webdataset import write_tar

pytestmark = pytest.mark.usefixtures("cache")
KINDS = ["csv", "parquet", "numpy rows", "numpy images", "idx", "webdataset"]


def write(root: Path, kind: str, part: str, labels: Any) -> None:
    """Write a training or test set with these labels."""
    labels = np.asarray(labels)
    pixels = np.arange(len(labels) * 4, dtype=np.uint8).reshape(-1, 2, 2)
    if kind == "csv":
        lines = ["x,y", *(f"{k},{label}" for k, label in enumerate(labels))]
        (root / f"{part}.csv").write_text("\n".join(lines))
    elif kind == "parquet":
        pq.write_table(pa.table({"x": np.arange(len(labels)), "y": labels}), root / f"{part}.parquet")
    elif kind.startswith("numpy"):
        np.save(root / f"{part}_{kind.split()[1]}.npy", pixels[:, 0] * 1.0 if kind == "numpy rows" else pixels)
        np.save(root / f"{part}_labels.npy", labels)
    elif kind == "idx":
        prefix = {"train": "train", "test": "t10k"}[part]
        (root / f"{prefix}-images-idx3-ubyte").write_bytes(idx_bytes(pixels))
        (root / f"{prefix}-labels-idx1-ubyte").write_bytes(idx_bytes(labels.astype(np.uint8)))
    else:
        samples = [{"__key__": f"{k}", "png": picture(1).data, "cls": int(x)} for k, x in enumerate(labels)]
        write_tar(root / f"{part}.tar", samples)


def load(root: Path, kind: str, train: Any, test: Any = (0, 1), **keys: Any) -> Datasets:
    write(root, kind, "train", train)
    write(root, kind, "test", test)
    if kind == "webdataset":
        keys |= {"image_size": 8}
    data = DataSection(source=kind.partition(" ")[0], root=str(root), num_samples=len(train), **keys)
    return load_source(data, 3, lambda *_: None)


def place(kind: str, part: str, sample: int) -> str:
    """Return how a message locates a label: by file and position in the file."""
    return {
        "csv": rf"{part}.csv, line {sample + 2} has",
        "parquet": rf"{part}.parquet, row {sample + 1} has",
        "idx": rf"{'train' if part == 'train' else 't10k'}-labels-idx1-ubyte, entry {sample} has",
        "webdataset": rf"{part}.tar, {sample}.png has",
    }.get(kind, rf"{part}_labels.npy, entry {sample} has")


@pytest.mark.parametrize("kind", KINDS)
def test_classes_that_all_occur_need_no_key(tmp_path: Path, kind: str) -> None:
    source = load(tmp_path, kind, [2, 0, 1, 1])
    assert (source.num_classes, source.notes) == (3, ())


@pytest.mark.parametrize("kind", KINDS)
def test_a_stray_label_does_not_make_a_larger_network(tmp_path: Path, kind: str) -> None:
    labels = [0, 1, 2, 255, 1, 0]
    with pytest.raises(JobError) as caught:
        load(tmp_path, kind, labels)
    (fault,) = caught.value.faults
    assert fault.path == "data.num_classes"
    assert fault.message.startswith(
        "is needed: labels are 0 … 255, but 252 of 256 classes never occur in training: 3, 4"
    )
    assert "the largest label, 255, occurs in 1 of 6 samples" in fault.message
    assert re.search(place(kind, "train", 3) + " 255", fault.message)
    source = load(tmp_path, kind, labels, num_classes=256)
    assert source.num_classes == 256
    assert "classes never occur in training: 3, 4, 5, 6, 7, …" in source.notes[0]
    with pytest.raises(RunError, match=r"1 of 6 training labels is not in 0 … 2: .*" + place(kind, "train", 3)):
        load(tmp_path, kind, labels, num_classes=3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_class_that_never_occurs_is_named(tmp_path: Path, kind: str) -> None:
    with pytest.raises(
        JobError, match=r"labels are 0 … 3, but 1 of 4 classes never occurs in training: 2; the largest"
    ):
        load(tmp_path, kind, [0, 1, 3])
    source = load(tmp_path, kind, [0, 1, 3], test=[2, 2, 1], num_classes=5)
    assert source.notes == ("2 of 5 classes never occur in training: 2, 4; test samples have 2",)


@pytest.mark.parametrize("kind", KINDS)
def test_labels_may_count_from_1_if_the_job_says_how_many_there_are(tmp_path: Path, kind: str) -> None:
    fault = r"data.num_classes: is needed: training labels are 1 … 3 \(.*{}\). 3 if they count from 1, 4 if from 0"
    with pytest.raises(JobError, match=fault.format(place(kind, "train", 1) + " 1")):
        load(tmp_path, kind, [3, 1, 2], test=[1, 2])
    source = load(tmp_path, kind, [3, 1, 2], test=[1, 2], num_classes=3)
    assert source.train.targets[np.arange(3)].tolist() == [2, 0, 1]
    assert source.test.targets[np.arange(2)].tolist() == [0, 1]
    from_0 = load(tmp_path, kind, [3, 1, 2], test=[1, 2], num_classes=4)
    assert from_0.train.targets[np.arange(3)].tolist() == [3, 1, 2]
    assert from_0.notes == ("1 of 4 classes never occurs in training: 0",)
    with pytest.raises(RunError, match=r"1 of 2 test labels is not in 1 … 3: .*" + place(kind, "test", 1) + " 0"):
        load(tmp_path, kind, [3, 1, 2], test=[1, 0], num_classes=3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_label_of_the_test_set_alone_is_that_files_fault(tmp_path: Path, kind: str) -> None:
    with pytest.raises(RunError, match=r"2 of 3 test labels are not in 0 … 1: .*" + place(kind, "test", 1) + " 5"):
        load(tmp_path, kind, [0, 1, 1], test=[0, 5, 7])


@pytest.mark.parametrize("kind", ["numpy rows", "numpy images", "webdataset"])
def test_negative_labels_are_named(tmp_path: Path, kind: str) -> None:
    with pytest.raises(RunError, match=r"1 of 3 labels is negative: .*" + place(kind, "train", 2) + " -1"):
        load(tmp_path, kind, [0, 1, -1])


def test_a_label_that_int64_does_not_hold_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"train_labels.npy, entry 1 has the label 18446744073709551615, which is not a"):
        load(tmp_path, "numpy rows", np.array([0, 2**64 - 1], dtype=np.uint64))


# --- labels of tables ------------------------------------------------------------------------


def test_the_faulty_file_of_several_is_named(tmp_path: Path) -> None:
    for name, labels in (("a", [0, 1]), ("b", [1, 9])):
        write(tmp_path, "csv", name, labels)
    write(tmp_path, "csv", "test", [0])
    data = DataSection(source="csv", root=str(tmp_path), num_samples=4, train="[ab].csv", num_classes=2)
    with pytest.raises(RunError, match=r"1 of 4 training labels is not in 0 … 1: \S*/b.csv, line 3 has 9$"):
        load_source(data, 3, lambda *_: None)


def test_whole_numbers_written_as_floats_are_labels(tmp_path: Path) -> None:
    assert labels_of(load(tmp_path, "csv", ["1.0", "0.0", "1"]).train) == [1, 0, 1]
    assert labels_of(load(tmp_path, "parquet", np.array([1.0, 0.0])).train) == [1, 0]


def test_a_text_among_numbers_is_not_a_class_unless_the_job_says_so(tmp_path: Path) -> None:
    labels = ["0", "10", "2", "1O"]
    with pytest.raises(
        RunError, match=r"column 'y': 1 of 4 cells is a text, others are not: line 5: '1O'; .*text_labels"
    ):
        load(tmp_path, "csv", labels)
    source = load(tmp_path, "csv", labels, test=["2"], text_labels=True)
    assert source.schema["classes"] == ["0", "10", "1O", "2"]
    with pytest.raises(RunError, match=r"column 'y': 1 of 4 cells is not a whole number: line 5: '1O'"):
        load(tmp_path, "csv", labels, text_labels=False)


@pytest.mark.parametrize("text", ["NA", "None", "null", "nan", "N/A"])
def test_a_label_such_as_na_is_a_class_or_missing_as_the_job_says(tmp_path: Path, text: str) -> None:
    labels = ["cat", text, "dog", text]
    fault = rf"column 'y': 2 of 4 cells may be classes or missing labels: line 3: '{text}'; line 5: '{text}'; "
    with pytest.raises(RunError, match=fault + r"data.text_labels = true makes classes of them"):
        load(tmp_path, "csv", labels)
    source = load(tmp_path, "csv", labels, test=[text], text_labels=True)
    classes = sorted(["cat", "dog", text])
    assert source.schema["classes"] == classes
    assert labels_of(source.train) == [classes.index(label) for label in labels]
    keys: dict[str, Any] = {"test": ["cat"], "missing_values": (text,)}
    with pytest.raises(RunError, match=rf"2 of 4 cells are missing: line 3: '{text}'; .*data.missing = 'drop_row'"):
        load(tmp_path, "csv", labels, **keys)
    write(tmp_path, "csv", "train", labels)
    data = DataSection(source="csv", root=str(tmp_path), num_samples=2, missing="drop_row", missing_values=(text,))
    assert load_source(data, 3, lambda *_: None).schema["classes"] == ["cat", "dog"]


def test_texts_of_a_parquet_file_are_classes_whatever_they_are(tmp_path: Path) -> None:
    source = load(tmp_path, "parquet", ["NA", "b", "NA"], test=["b"])
    assert (source.schema["classes"], labels_of(source.train)) == (["NA", "b"], [0, 1, 0])


def test_texts_that_are_numbers_are_ordered_by_their_characters(tmp_path: Path) -> None:
    source = load(tmp_path, "parquet", ["10", "9", "10"], test=["9"])
    assert source.schema["classes"] == ["10", "9"]
    assert labels_of(source.train) == [0, 1, 0]


def test_minus_and_plus_one_become_classes_on_request(tmp_path: Path) -> None:
    with pytest.raises(
        RunError, match=r"1 of 2 cells is negative: line 2: '-1'; .*data.text_labels = true makes a class"
    ):
        load(tmp_path, "csv", [-1, 1], test=[1])
    source = load(tmp_path, "csv", [-1, 1], test=[1], text_labels=True)
    assert (source.schema["classes"], labels_of(source.test)) == (["-1", "1"], [1])


def test_fewer_classes_than_texts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r"data.num_classes: 2 is below the 3 distinct labels of .*train.csv: a, b, c"):
        load(tmp_path, "csv", ["a", "b", "c"], test=["a"], num_classes=2)


def test_texts_that_name_rows_are_not_taken_for_classes(tmp_path: Path) -> None:
    names = [f"row {k}" for k in range(40)]
    fault = r"data.num_classes: is needed: 40 rows have 40 distinct labels of \S*train.csv: row 0, row 1, .*If not, 40"
    with pytest.raises(JobError, match=fault):
        load(tmp_path, "csv", names, test=["row 3"])
    assert load(tmp_path, "csv", names, test=["row 3"], num_classes=40).num_classes == 40


def test_a_text_that_only_held_out_rows_have_is_named(tmp_path: Path) -> None:
    labels = ["a", "b"] * 10
    write(tmp_path, "csv", "train", labels)
    first = load_source(
        DataSection(source="csv", root=str(tmp_path), num_samples=18, test_fraction=0.1), 3, lambda *_: None
    ).test.locate(0)
    labels[int(first.rpartition(" ")[2]) - 2] = "rare"
    write(tmp_path, "csv", "train", labels)
    data = DataSection(source="csv", root=str(tmp_path), num_samples=18, test_fraction=0.1)
    source = load_source(data, 3, lambda *_: None)
    assert source.num_classes == 3
    assert source.notes == ("1 of 3 classes never occurs in training: 'rare'; test samples have 'rare'",)


def test_a_class_that_is_held_out_for_validation_is_named(tmp_path: Path) -> None:
    keys = {"validation_fraction": 0.25, "num_classes": 3}
    first = load(tmp_path, "csv", [0, 1] * 10, **keys)
    held_out = int(first.validation.locate(0).rpartition(" ")[2]) - 2  # type: ignore[union-attr]
    labels = [2 if k == held_out else k % 2 for k in range(20)]
    source = load(tmp_path, "csv", labels, test=[0, 2], **keys)
    also = "validation samples have 2; test samples have 2"
    assert source.notes == (f"1 of 3 classes never occurs in training: 2; {also}",)


def test_a_class_without_training_images_is_named(tmp_path: Path) -> None:
    for part in ("train", "val"):
        for name in "ab":
            (tmp_path / part / name).mkdir(parents=True)
            (tmp_path / part / name / f"of_{part}.png").write_bytes(picture(1).data)
    data = DataSection(source="image_folder", root=str(tmp_path), num_classes=3, image_size=8)
    source = load_source(data, 0, lambda *_: None, any_size=True)
    assert source.notes == ("1 of 3 classes never occurs in training: 2",)
