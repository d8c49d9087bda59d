"""The sources csv, parquet and covtype, from intact and damaged files that pyarrow writes."""

from __future__ import annotations

import gzip
import importlib
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from hvd_batchgrow.config import DataSection
from hvd_batchgrow.data.datasets.dataset import Datasets
from hvd_batchgrow.data.load_source import load_source
from hvd_batchgrow.data.order.stream import Stream
from hvd_batchgrow.data.tables import table_files
from hvd_batchgrow.data.tables.table_dataset import held_out_rows
from hvd_batchgrow.messages.errors import JobError, RunError
from tests.helpers import everything

GENERATOR = np.random.default_rng(3)
KINDS = pytest.mark.parametrize("kind", ["csv", "parquet"])


pytestmark = pytest.mark.usefixtures("cache")


def no_report(what: str, done: int, total: int, unit: str = "bytes") -> None:
    """Ignore the progress."""


def load(kind: str, root: Path | None, num_samples: int, seed: int = 7, **keys: Any) -> Datasets:
    data = DataSection(source=kind, root=str(root) if root else None, num_samples=num_samples, **keys)
    return load_source(data, seed, no_report)


def columns(count: int, **others: Any) -> dict[str, Any]:
    """Return two features of different types, and three classes."""
    made = {"x": GENERATOR.standard_normal(count), "n": np.arange(count), "y": np.arange(count) % 3}
    return {key: value for key, value in {**made, **others}.items() if value is not None}


def write(folder: Path, kind: str, name: str, values: dict[str, Any]) -> NDArray[np.float64]:
    """Write a file of a kind; return the features x and n."""
    table = pa.table(values)
    if kind == "csv":
        pa_csv.write_csv(table, folder / f"{name}.csv")
    else:
        pq.write_table(table, folder / f"{name}.parquet", row_group_size=7)
    return np.stack([np.asarray(values[key], dtype=np.float64) for key in ("x", "n") if key in values], axis=1)


@KINDS
def test_a_table_is_a_source(tmp_path: Path, kind: str) -> None:
    train, test = (write(tmp_path, kind, name, columns(n)) for name, n in (("train", 20), ("test", 8)))
    source = load(kind, tmp_path, 20)
    assert (everything(source.train)[0] == train).all()
    assert (everything(source.test)[0] == test).all()
    assert everything(source.train)[1].tolist() == [k % 3 for k in range(20)]
    assert (source.train.kind, source.num_classes) == ("rows", 3)
    assert source.mean == pytest.approx(train.mean(axis=0, dtype=np.float64))
    assert source.std == pytest.approx(train.std(axis=0, dtype=np.float64))


@KINDS
@pytest.mark.parametrize("label", ["y", 0, -3])
def test_the_label_may_be_any_column(tmp_path: Path, kind: str, label: str | int) -> None:
    values = columns(20)
    expected = write(tmp_path, kind, "all", {"y": values["y"], "x": values["x"], "n": values["n"]})
    write(tmp_path, kind, "some", {"y": [2], "x": [0.5], "n": [4]})
    source = load(kind, tmp_path, 20, label=label, train=f"all.{kind}", test=f"some.{kind}")
    assert (everything(source.train)[0] == expected).all()
    assert everything(source.train)[1].tolist() == values["y"].tolist()


@KINDS
def test_texts_are_classes_in_the_order_of_their_characters(tmp_path: Path, kind: str) -> None:
    write(tmp_path, kind, "train", columns(4, y=["wolf", "Ant", "fox", "ant"]))
    write(tmp_path, kind, "test", columns(2, y=["fox", "wolf"]))
    source = load(kind, tmp_path, 4)
    assert everything(source.train)[1].tolist() == [3, 0, 2, 1]
    assert everything(source.test)[1].tolist() == [2, 3]
    write(tmp_path, kind, "test", columns(2, y=["fox", "wulf"]))
    place = {"csv": "line 3", "parquet": "row 2"}[kind]
    fault = rf"test.{kind}: 1 label is not among the 4 of the training rows \(Ant, ant, fox, wolf\): {place}: 'wulf'"
    with pytest.raises(RunError, match=fault):
        load(kind, tmp_path, 4)
    write(tmp_path, kind, "test", columns(2))
    with pytest.raises(RunError, match=rf"labels are text in .*train.{kind} and numbers in .*test.{kind}"):
        load(kind, tmp_path, 4)


def test_parquet_categories_and_other_numbers_are_read(tmp_path: Path) -> None:
    kinds = pa.array(["b", "a", "b"]).dictionary_encode()
    values = {"x": pa.array([1, 2, 3], pa.decimal128(5, 2)), "n": pa.array([True, False, True]), "y": kinds}
    pq.write_table(pa.table(values), tmp_path / "train.parquet")
    pq.write_table(pa.table(values), tmp_path / "test.parquet")
    values_found, labels = everything(load("parquet", tmp_path, 3).train)
    assert values_found.tolist() == [[1, 1], [2, 0], [3, 1]]
    assert labels.tolist() == [1, 0, 1]


@KINDS
@pytest.mark.parametrize("given", ["parts", "parts/train-*"])
def test_several_files_are_read_in_the_order_of_their_names(tmp_path: Path, kind: str, given: str) -> None:
    (tmp_path / "parts").mkdir()
    parts = [write(tmp_path / "parts", kind, f"train-{k}", columns(5)) for k in (2, 0, 1)]
    write(tmp_path, kind, "test", columns(3))
    found = everything(load(kind, tmp_path, 15, train=given).train)[0]
    assert (found == np.concatenate([parts[1], parts[2], parts[0]])).all()
    write(tmp_path / "parts", kind, "train-1", columns(5, z=np.zeros(5)) | {"y": np.arange(5)})
    with pytest.raises(RunError, match=rf"train-0.{kind} has 2 features and .*train-1.{kind} 3, .* the same"):
        load(kind, tmp_path, 15, train=given)


@pytest.mark.parametrize(
    ("keys", "shared"),
    [
        ({"train": "*.csv"}, "test.csv"),
        ({"train": "."}, "test.csv"),
        ({"train": "train.csv", "test": "./train.csv"}, "train.csv"),
        ({"test": "link.csv"}, "train.csv"),
    ],
)
def test_a_file_cannot_be_in_both_sets(tmp_path: Path, keys: dict[str, Any], shared: str) -> None:
    for part in ("train", "test"):
        write(tmp_path, "csv", part, columns(9))
    if "train" not in keys:
        (tmp_path / "link.csv").symlink_to("train.csv")
    with pytest.raises(RunError) as error:
        load("csv", tmp_path, 9, **keys)
    message = f"1 file in the training set and in the test set: {tmp_path}/{shared}; choose different ones with "
    assert str(error.value) == f"{message}data.train and data.test"


def test_a_csv_and_its_packed_copy_are_not_both_read(tmp_path: Path) -> None:
    write(tmp_path, "csv", "test", columns(9))
    (tmp_path / "parts").mkdir()
    write(tmp_path / "parts", "csv", "a", columns(9))
    (tmp_path / "parts" / "a.csv.gz").write_bytes(gzip.compress((tmp_path / "parts" / "a.csv").read_bytes()))
    with pytest.raises(RunError, match=r"data.train = parts has both a.csv and a.csv.gz, whose rows would count twice"):
        load("csv", tmp_path, 18, train="parts")


def test_a_packed_csv_is_read(tmp_path: Path) -> None:
    expected = write(tmp_path, "csv", "train", columns(9))
    write(tmp_path, "csv", "test", columns(2))
    (tmp_path / "train.csv.gz").write_bytes(gzip.compress((tmp_path / "train.csv").read_bytes()))
    with pytest.raises(RunError, match=r"contains train.csv and train.csv.gz: choose one with data.train"):
        load("csv", tmp_path, 9)
    (tmp_path / "train.csv").unlink()
    assert (everything(load("csv", tmp_path, 9).train)[0] == expected).all()


# --- rows held out ---------------------------------------------------------------------------


def test_rows_are_held_out_by_the_order_of_a_stream() -> None:
    train, test = held_out_rows(101, 0.2, 5)
    assert len(test) == 21  # 20.2, rounded up
    assert test.tolist() == sorted(Stream(101, 5).ids(0, 21))
    assert sorted([*train, *test]) == list(range(101))
    assert train.tolist() == sorted(train)
    assert held_out_rows(101, 0.2, 6)[1].tolist() != test.tolist()
    with pytest.raises(JobError, match=r"data.test_fraction: 0.9 of 3 rows, rounded up, are 3: no row would be left"):
        held_out_rows(3, 0.9, 0)


@KINDS
def test_a_share_of_the_rows_is_tested_on(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = write(tmp_path, kind, "train", columns(50))
    write(tmp_path, kind, "test", columns(2))  # the fraction takes precedence over test.csv
    source = load(kind, tmp_path, 40, test_fraction=0.2)
    train, test = held_out_rows(50, 0.2, 7)
    for part, members in ((source.train, train), (source.test, test)):
        assert (everything(part)[0] == rows[members]).all()
        assert everything(part)[1].tolist() == (members % 3).tolist()
    assert source.mean == pytest.approx(rows[train].mean(axis=0, dtype=np.float64))
    place = {"csv": f"line {test[0] + 2}", "parquet": f"row {test[0] + 1}"}[kind]
    assert source.test.locate(0) == f"{tmp_path / f'train.{kind}'}, {place}"
    monkeypatch.setattr(table_files, "parse", None)  # another seed needs no parsing
    other = load(kind, tmp_path, 40, seed=8, test_fraction=0.2)
    assert (everything(other.test)[0] == rows[held_out_rows(50, 0.2, 8)[1]]).all()


@KINDS
def test_a_test_file_beside_a_test_fraction_is_noted(tmp_path: Path, kind: str) -> None:
    for part in ("train", "test"):
        write(tmp_path, kind, part, columns(20))
    source = load(kind, tmp_path, 15, test_fraction=0.25)
    assert len(source.test) == 5
    note = f"{tmp_path}/test.{kind} is not used: data.test_fraction = 0.25 holds out a part of the training set"
    assert source.notes == (note,)
    assert load(kind, tmp_path, 30, test_fraction=0.25, train=".").notes == ()


@KINDS
def test_something_must_be_tested_on(tmp_path: Path, kind: str) -> None:
    write(tmp_path, kind, "train", columns(9))
    fault = (
        rf"does not contain test.{kind} \(there are train.{kind}\); set data.test, or data.test_fraction = 0.2 keeps"
    )
    with pytest.raises(RunError, match=fault):
        load(kind, tmp_path, 9)
    with pytest.raises(RunError, match=rf"does not contain tset.{kind} .*; data.test is relative to "):
        load(kind, tmp_path, 9, test=f"tset.{kind}")
    (tmp_path / f"train.{kind}").unlink()
    with pytest.raises(RunError, match=rf"does not contain train.{kind} \(there are no {kind} files\)"):
        load(kind, tmp_path, 9)


# --- damage ----------------------------------------------------------------------------------


MISSING = r"is missing: line 3: {}; set data.missing = 'mean' or 'drop_row'"
NUMBER = r"is not a finite number: line 3: {}; "


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x,n,y\n1,2,0\n3,,1\n", r"column 'n': 1 of 2 cells " + MISSING.format("''")),
        ("x,n,y\n1,2,0\n3,NaN,1\n", r"column 'n': 1 of 2 cells " + MISSING.format("'NaN'")),
        ("x,n,y\n1,2,0\n3,5,\n", r"column 'y': 1 of 2 cells is missing: line 3: ''; data.missing = 'drop_row'"),
        ("x,n,y\n1,2,a\n3,5,\n", r"column 'y': 1 of 2 cells is missing: line 3: ''; data.missing = 'drop_row'"),
        ("x,n,y\n1,2,0\nthree,5,1\n", r"column 'x': 1 of 2 cells " + NUMBER.format("'three'")),
        (
            "x,n,y\n1,2,0\n2020-01-02,5,1\n",
            r"column 'x': 1 of 2 cells " + NUMBER.format("'2020-01-02'") + "write dates",
        ),
        ("x,n,y\n1,2,0\n1e999,5,1\n", r"column 'x': 1 of 2 cells " + NUMBER.format("'1e999'")),
        ("x,n,y\n1,2,0\n1_000,5,1\n", r"column 'x': 1 of 2 cells " + NUMBER.format("'1_000'")),
        ("x,n,y\n1,2,0\n3,4,1.5\n", r"column 'y': 1 of 2 cells is not a whole number: line 3: '1.5'; data.label"),
        ("x,n,y\n1,2,0\n3,4,-1\n", r"column 'y': 1 of 2 cells is negative: line 3: '-1'; correct"),
        ("x,n,y\n1,2,0\n3,4\n", r"1 row of another length: line 3 has 2 fields, the first line has 3: 3,4"),
        ("x,n,y\n1,2,0\n1,2,0,9\n", r"1 row of another length: line 3 has 4 fields, the first line has 3: 1,2,0,9"),
        ("", r" is empty"),
        ("x,n,y\n", r" holds 0 rows of 2 features: it cannot be trained on"),
        ("y\n1\n", r" holds 1 rows of 0 features: it cannot be trained on; data.separator sets the separator"),
    ],
)
def test_what_is_wrong_with_a_csv_is_reported_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    write(tmp_path, "csv", "test", columns(1))
    (tmp_path / "train.csv").write_text(text)
    with pytest.raises(RunError, match=f"train.csv:? ?{message}"):
        load("csv", tmp_path, 2)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"x": [1.0, None], "y": [0, 1]}, r"column 'x': 1 of 2 cells is missing: row 2: None"),
        ({"x": [1.0, float("nan")], "y": [0, 1]}, r"column 'x': 1 of 2 cells is missing: row 2: nan"),
        ({"x": [1.0, float("inf")], "y": [0, 1]}, r"column 'x': 1 of 2 cells is not a finite number: row 2: inf"),
        (
            {"x": ["1", "two"], "y": [0, 1]},
            r"column 'x': 2 of 2 cells are text, not numbers: row 1: '1'; row 2: 'two'",
        ),
        ({"x": [[1], [2]], "y": [0, 1]}, r"column 'x': 2 of 2 cells are list<.*>, not numbers: row 1: \[1\]"),
        ({"x": [1, 2], "y": [[0], [1]]}, r"column 'y': 2 of 2 cells are list<.*>, not labels: row 1: \[0\]"),
        ({"x": [1, 2], "y": [0.0, 0.5]}, r"column 'y': 1 of 2 cells is not a whole number: row 2: 0.5"),
        ({"x": [1, 2], "y": [0.0, None]}, r"column 'y': 1 of 2 cells is missing: row 2: None"),
    ],
)
def test_what_is_wrong_with_a_parquet_file_is_reported_with_its_row(
    tmp_path: Path, values: dict[str, Any], message: str
) -> None:
    pq.write_table(pa.table(values), tmp_path / "train.parquet")
    write(tmp_path, "parquet", "test", {key: [0, 0] if key == "y" else [1, 1] for key in values})
    with pytest.raises(RunError, match=f"train.parquet: {message}"):
        load("parquet", tmp_path, 2)


@pytest.mark.parametrize("damage", [lambda b: b[:-9], lambda b: b"", lambda b: b"x,y\n1,2\n" * 9])
def test_a_damaged_parquet_file_is_named(tmp_path: Path, damage: Any) -> None:
    write(tmp_path, "parquet", "train", columns(9))
    write(tmp_path, "parquet", "test", columns(9))
    path = tmp_path / "train.parquet"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(RunError, match=r"train.parquet cannot be read: "):
        load("parquet", tmp_path, 9)


def test_a_parquet_file_of_texts_that_are_not_utf_8_is_named(tmp_path: Path) -> None:
    offsets = pa.py_buffer(np.array([0, 1, 2], dtype=np.int32).tobytes())
    texts = pa.Array.from_buffers(pa.string(), 2, [None, offsets, pa.py_buffer(b"a\xff")])
    pq.write_table(pa.table({"x": [1, 2], "y": texts}), tmp_path / "train.parquet")
    with pytest.raises(RunError, match=r"train.parquet cannot be read: .*UTF8"):
        load("parquet", tmp_path, 1, test_fraction=0.5)


@KINDS
@pytest.mark.parametrize(
    ("label", "message"),
    [
        ("klass", r"has no column 'klass'; did you mean 'class'\? there are x, n, class$"),
        (3, r"has columns 0 … 2, so 3 does not exist"),
        (-4, r"has columns 0 … 2, so -4 does not exist"),
    ],
)
def test_an_unknown_column_of_labels_is_refused(tmp_path: Path, kind: str, label: str | int, message: str) -> None:
    for name in ("train", "test"):
        write(tmp_path, kind, name, columns(9, y=None, **{"class": np.zeros(9, dtype=int)}))
    with pytest.raises(JobError, match=rf"data.label: .*train.{kind} {message}"):
        load(kind, tmp_path, 9, label=label)


def test_a_missing_package_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "csv", "train", columns(9))
    import_module = importlib.import_module

    def without(name: str, package: str | None = None) -> types.ModuleType:
        if name.startswith(("pyarrow", "sklearn")):
            raise ImportError(f"No module named {name!r}")
        return import_module(name, package)

    monkeypatch.setattr(importlib, "import_module", without)
    with pytest.raises(RunError, match=r"pyarrow is needed .*: pip install 'hvd_batchgrow\[tables\]'"):
        load("csv", tmp_path, 7, test_fraction=0.2)
    with pytest.raises(RunError, match=r"scikit-learn is needed .*: pip install 'hvd_batchgrow\[tables\]'"):
        load("covtype", None, 7, test_fraction=0.2)


# --- forest cover type -----------------------------------------------------------------------


def covtype_text(count: int) -> tuple[str, NDArray[np.int64]]:
    """Return lines in the format of the UC Irvine repository: 54 whole numbers and the type, 1 … 7, no header."""
    table = np.concatenate([GENERATOR.integers(0, 4000, (count, 54)), 1 + np.arange(count)[:, None] % 7], axis=1)
    return "".join(",".join(map(str, row)) + "\n" for row in table), table


@pytest.mark.parametrize("place", ["covtype.data", "covtype.data.gz", "folder"])
def test_covtype_is_read_from_its_file(tmp_path: Path, place: str) -> None:
    text, table = covtype_text(35)
    if place.endswith("gz"):
        (tmp_path / place).write_bytes(gzip.compress(text.encode()))
    else:
        (tmp_path / "covtype.data").write_text(text)
    source = load("covtype", tmp_path if place == "folder" else tmp_path / place, 28, test_fraction=0.2)
    train, test = held_out_rows(35, 0.2, 7)
    for part, members in ((source.train, train), (source.test, test)):
        assert (everything(part)[0] == table[members, :-1]).all()
        assert (everything(part)[1] == table[members, -1] - 1).all()
    assert source.num_classes == 7


def test_covtype_of_scikit_learn_has_the_rows_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, table = covtype_text(35)
    (tmp_path / "covtype.data").write_text(text)
    asked = {}

    def fetch_covtype(**keys: Any) -> tuple[NDArray[np.float64], NDArray[np.int32]]:
        asked.update(keys)
        return table[:, :-1].astype(np.float64), table[:, -1].astype(np.int32)

    datasets = types.ModuleType("sklearn.datasets")
    datasets.fetch_covtype = fetch_covtype  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sklearn.datasets", datasets)
    fetched, read = load("covtype", None, 28, test_fraction=0.2), load("covtype", tmp_path, 28, test_fraction=0.2)
    assert asked == {"return_X_y": True}  # and no shuffling, which is its default
    assert (everything(fetched.train)[0] == everything(read.train)[0]).all()
    assert (everything(fetched.test)[1] == everything(read.test)[1]).all()


def test_an_unavailable_covtype_names_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch_covtype(**keys: Any) -> None:
        raise OSError("no route to host")

    monkeypatch.setitem(sys.modules, "sklearn.datasets", types.SimpleNamespace(fetch_covtype=fetch_covtype))
    with pytest.raises(
        RunError, match=r"could not download covtype: no route to host; set data.root to an existing covtype.data.gz"
    ):
        load("covtype", None, 28, test_fraction=0.2)
    with pytest.raises(RunError, match=r"is not a file, and does not contain covtype.data or covtype.data.gz; without"):
        load("covtype", tmp_path, 28, test_fraction=0.2)
    text, _ = covtype_text(8)
    (tmp_path / "covtype.data").write_text(text.replace(",3\n", ",9\n"))
    with pytest.raises(RunError, match=r"covtype.data, line 3, last column: 9 is not a cover type, 1 … 7"):
        load("covtype", tmp_path, 28, test_fraction=0.2)
