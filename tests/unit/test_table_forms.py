"""Headers, separators and row indices of tables, and messages that list all faulty cells."""

from __future__ import annotations

import gzip
import json
import lzma
import os
import shutil
from pathlib import Path
from typing import Any
from zipfile import ZIP_DEFLATED, ZipFile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hvd_batchgrow.config import DataSection
from hvd_batchgrow.data.datasets.dataset import Datasets
from hvd_batchgrow.data.load_source import load_source
from hvd_batchgrow.messages.errors import JobError, RunError

pytestmark = pytest.mark.usefixtures("cache")
ROWS, LABELS = [[1.5, 2.0], [3.0, 4.25]], [0, 1]


def load(root: Path, num_samples: int = 2, **keys: Any) -> Datasets:
    """Return the rows of train.csv (or .parquet); a copy of the file is the test set unless `keys` has another."""
    kind = "parquet" if (root / "train.parquet").exists() else "csv"
    if "test" not in keys:
        keys = {"test": shutil.copyfile(root / f"train.{kind}", root / f"copy.{kind}").name, **keys}
    data = DataSection(source=kind, root=str(root), num_samples=num_samples, **keys)
    return load_source(data, 3, lambda *_: None)


def read(root: Path, text: str | bytes, **keys: Any) -> tuple[list[list[float]], list[int]]:
    (root / "train.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    source = load(root, **keys)
    return source.train.fetch(np.arange(len(source.train))).tolist(), source.train.targets[np.arange(2)].tolist()


# --- csv -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "x,n,y\n1.5,2,0\n3,4.25,1\n",
        "x;n;y\n1.5;2;0\n3;4.25;1\n",
        "x\tn\ty\n1.5\t2\t0\n3\t4.25\t1\n",
        "x|n|y\n1.5|2|0\n3|4.25|1\n",
        "x n y\n1.5 2 0\n3 4.25 1\n",
        "\ufeffx,n,y\n1.5,2,0\n3,4.25,1\n",
        '"x","n","y"\n"1.5","2","0"\n"3","4.25","1"\n',
        "x, n, y\n1.5, 2, 0\n3, 4.25, 1\n",
        "x,n,y\r\n1.5,2,0\r\n\r\n3,4.25,1\r\n",
        "\nx,n,y\n1.5,2,0\n3,4.25,1",
        "sep=;\nx;n;y\n1.5;2;0\n3;4.25;1\n",
        "x,n,y\n+1.5,2.,0\n3e0,425E-2,1.0\n",
        "a b,c;d,y\n1.5,2,0\n3,4.25,1\n",
    ],
    ids=["comma", "semicolon", "tab", "bar", "space", "BOM", "quotes", "spaces after commas", "CRLF and empty lines",
         "empty first line", "sep=", "numbers in other forms", "other separators in names"],
)  # fmt: skip
def test_the_form_of_a_csv_is_recognized(tmp_path: Path, text: str) -> None:
    assert read(tmp_path, text) == (ROWS, LABELS)


@pytest.mark.parametrize(
    ("text", "keys"),
    [
        ("1.5,2,0\n3,4.25,1\n", {"header": False}),
        ("0,1,2\n1.5,2,0\n3,4.25,1\n", {"header": True}),
        ("0,1,2\n1.5,2,0\n3,4.25,1\n", {"header": True, "label": "2"}),
        ("1.5,2,0\n3,4.25,1\n", {"header": False, "label": 2}),
        ("x;n;y\n1,5;2;0\n3;4,25;1\n", {"decimal": ","}),
        ('x,n,y\n"1,5",2,0\n3,"4,25",1\n', {"decimal": ","}),
        ("x:n:y\n1.5:2:0\n3:4.25:1\n", {"separator": ":"}),
        (",x,n,y\n7,1.5,2,0\n8,3,4.25,1\n", {"ignore_columns": (0,)}),
        ("Unnamed: 0,x,n,y\n7,1.5,2,0\n8,3,4.25,1\n", {"ignore_columns": ("Unnamed: 0",)}),
        ("x,n,y,id\n1.5,2,0,a\n3,4.25,1,b\n", {"ignore_columns": (-1,)}),
        ("y,x,n\n0,1.5,2\n1,3,4.25\n", {"label": "y"}),
    ],
)
def test_keys_settle_what_a_csv_leaves_open(tmp_path: Path, text: str, keys: dict[str, Any]) -> None:
    assert read(tmp_path, text, **keys) == (ROWS, LABELS)


SETTLES = r"may be a header or a row: {}; data.header = false if it is a row, true if it holds the names"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("5.1,3.5,setosa\n4.9,3.0,other\n", SETTLES.format("2 of its 3 fields could be values")),
        ("1,2,0\n3,4,1\n", SETTLES.format("3 of its 3 fields could be values")),
        ("0,1,2\n1.5,2,0\n3,4,1\n", SETTLES.format("3 of its 3 fields could be values")),
        ("name,2019,2020,y\n1,2,3,0\n4,5,6,1\n", SETTLES.format("2 of its 4 fields could be values")),
        ('"1,5";"2";a\n"3,5";"4";b\n', SETTLES.format("2 of its 3 fields could be values")),
        ("2020-01-01,red,a\n2020-01-02,blue,b\n", SETTLES.format("1 of its 3 fields could be values")),
        ("NA,red,a\n3,blue,b\n", SETTLES.format("1 of its 3 fields could be values")),
        ("p,x,s\ne,x,y\np,b,s\n", SETTLES.format("'p' is a value below it too")),
        (",x,y\n0,1,0\n1,3,1\n", r"a column without a name, .*: 0 is called ''; data.ignore_columns = \[0\] skips"),
        ("Unnamed: 0,x,y\n0,1,0\n1,3,1\n", r"0 is called 'Unnamed: 0'; data.ignore_columns = \[0\]"),
        (" ,x,y\n0,1,0\n1,3,1\n", r"0 is called ''; data.ignore_columns = \[0\]"),
        ("x,y,\n1,0,\n2,1,\n", r"2 is called ''; data.ignore_columns = \[2\]"),
        ("x,y\nr1,1,0\nr2,3,1\n", r"its rows have 3 fields and its header 2: name the first column"),
        ("x,n;y\n1,5;0\n3,4;1\n", r"by commas \(2 columns\) or semicolons \(2 columns\); data.separator = \",\" or"),
        ("x  n  y\n1  2  0\n3  4  1\n", r"separated by several spaces, .*: sed -E"),
        ("x;n;y\n1,5;2;0\n3;4,25;1\n", r"column 'x': 1 of 2 cells .* line 2: '1,5'; data.decimal = \",\" if"),
        ("x,n,y\n1.500,2,0\n\"3,000\",4,1\n", r"column 'x': 1 of 2 cells .* line 3: '3,000'; data.decimal"),
        ("x:n:y\n1:2:0\n3:4:1\n", r"holds 2 rows of 0 features: .*; data.separator sets the separator"),
        ("x,n,y\n1,2,0\n3,4,1\n".encode("utf-16"), r"is UTF-16, not UTF-8: iconv -f UTF-16"),
        ("x,n,y\n1,2,a\n3,4,caffè\n".encode("latin1"), r"train.csv, line 3: not UTF-8; iconv -f LATIN1"),
        ('"x,n,y\n' + 40_000 * "1,2,0\n", r"its first line cannot be split \(.*\): is a quotation mark missing"),
        (b"x,n,y\n" + 40_000 * b"1,2,a\n" + b"3,4,caff\xe8\n", r"train.csv, line 40002: not UTF-8; iconv -f LATIN1"),
    ],
)  # fmt: skip
def test_a_csv_that_could_mean_two_things_is_refused_with_the_key(
    tmp_path: Path, text: str | bytes, message: str
) -> None:
    with pytest.raises(RunError, match=message):
        read(tmp_path, text)


@pytest.mark.parametrize(
    ("name", "pack", "tool"),
    [("train.csv.xz", lzma.compress, "unxz"), ("train.csv", gzip.compress, "gunzip"), ("a.zip", None, "unzip")],
)
def test_a_packed_csv_that_is_not_read_is_named(tmp_path: Path, name: str, pack: Any, tool: str) -> None:
    text = "".join(["x,y\n", *(f"{k**3},{k % 2}\n" for k in range(500))])
    if pack:
        (tmp_path / name).write_bytes(pack(text.encode()))
    else:
        with ZipFile(tmp_path / name, "w", ZIP_DEFLATED) as archive:
            archive.writestr("train.csv", text)
    (tmp_path / "test.csv").write_text(text)
    with pytest.raises(RunError, match=rf"{name} is compressed; unpack it: {tool} .*{name}$"):
        load(tmp_path, train=name, test="test.csv")


def test_a_column_may_be_ignored_that_a_test_file_lacks(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text(",x,y\n7,1,0\n8,3,1\n")
    (tmp_path / "test.csv").write_text("x,y\n5,1\n")
    source = load(tmp_path, test="test.csv", ignore_columns=("",))
    assert (source.train.fetch(np.arange(2)).tolist(), source.test.fetch(np.arange(1)).tolist()) == ([[1], [3]], [[5]])


@pytest.mark.parametrize("packed", [False, True])
def test_lines_are_counted_as_an_editor_counts(tmp_path: Path, packed: bool) -> None:
    text = 'x,c,y\n1,"two\nlines",0\n\n2,b\n3,c,1\nbad,d,0\n'
    name = "train.csv.gz" if packed else "train.csv"
    (tmp_path / name).write_bytes(gzip.compress(text.encode()) if packed else text.encode())
    (tmp_path / "test.csv").write_text("x,c,y\n1,b,0\n")
    with pytest.raises(RunError) as caught:
        load(tmp_path, test="test.csv", categorical=("c",))
    lines = str(caught.value).splitlines()[:3]
    assert lines[0] == f"{tmp_path / name}: 2 faults"
    assert lines[1] == "  1 row of another length: line 5 has 2 fields, the first line has 3: 2,b"
    assert lines[2].startswith("  column 'x': 1 of 3 cells is not a finite number: line 7: 'bad'; ")


def test_all_faults_of_all_files_are_reported_at_once(tmp_path: Path) -> None:
    bad = [f"v{k}" if k % 2 else k for k in range(40)]
    rows = [f"{x},1_000,{'' if k == 9 else k},{k % 2 if k else 0.5}" for k, x in enumerate(bad)]
    (tmp_path / "train.csv").write_text("\n".join(["a,b,c,y", *rows]))
    (tmp_path / "test.csv").write_text("a,b,c,y\n1,2,inf,0\n")
    with pytest.raises(RunError) as caught:
        load(tmp_path, test="test.csv")
    lines = str(caught.value).splitlines()
    shown = "; ".join(f"line {k + 2}: 'v{k}'" for k in range(1, 20, 2))
    assert lines[0] == f"{tmp_path}/train.csv: 4 faults"
    assert lines[1].startswith(f"  column 'a': 20 of 40 cells are not finite numbers: {shown}; and 10 more; ")
    assert lines[2].startswith("  column 'b': 40 of 40 cells are not finite numbers: line 2: '1_000'; line 3: '1_000'")
    assert lines[3].startswith("  column 'c': 1 of 40 cells is missing: line 11: ''; ")
    assert lines[4].startswith("  column 'y': 1 of 40 cells is not a whole number: line 2: '0.5'; ")
    assert lines[5].startswith(f"{tmp_path}/test.csv: column 'c': 1 of 1 cell is not a finite number: line 2: 'inf'")
    assert len(lines) == 6


def test_a_table_of_many_faulty_columns_is_cut_short(tmp_path: Path) -> None:
    names = [f"c{k}" for k in range(500)]
    (tmp_path / "train.csv").write_text(",".join([*names, "y"]) + "\n" + "bad," * 500 + "0\n")
    with pytest.raises(RunError) as caught:
        load(tmp_path)
    assert "and 480 more faults in other columns" in str(caught.value)
    assert len(str(caught.value)) < 10_000


# --- the row index of pandas in parquet ------------------------------------------------------


def write_pandas(path: Path, columns: dict[str, Any], index: list[Any]) -> None:
    """Write a file as DataFrame.to_parquet does, from the description of its metadata."""
    meta = json.dumps({"index_columns": index, "columns": [], "pandas_version": "2.2.0"}).encode()
    pq.write_table(pa.table(columns).replace_schema_metadata({b"pandas": meta}), path)


X, Y = [1.5, 3.0], [0, 1]
RANGE = {"kind": "range", "name": None, "start": 0, "stop": 2, "step": 1}


@pytest.mark.parametrize(
    ("columns", "index", "used"),
    [
        ({"x": X, "y": Y, "__index_level_0__": [9, 4]}, ["__index_level_0__"], {"__index_level_0__"}),
        ({"x": X, "y": Y, "row": ["r1", "r2"]}, ["row"], {"row"}),
        ({"x": X, "y": Y, "a": [5, 6], "b": [7, 8]}, ["a", "b"], {"a", "b"}),
        ({"x": X, "y": Y}, [RANGE], set()),
    ],
)
def test_the_row_index_of_pandas_is_neither_a_feature_nor_the_label(
    tmp_path: Path, columns: dict[str, Any], index: list[Any], used: set[str]
) -> None:
    write_pandas(tmp_path / "train.parquet", columns, index)
    source = load(tmp_path)
    assert source.train.fetch(np.arange(2)).tolist() == [[1.5], [3.0]]
    assert source.train.targets[np.arange(2)].tolist() == Y
    noted = {note.partition("'")[2].partition("'")[0] for note in source.notes}
    assert noted == used
    assert load(tmp_path, ignore_columns=tuple(used)).num_classes == 2  # naming them changes nothing
    for name in used:
        with pytest.raises(
            JobError, match=rf"data.label: '{name}' is the row index .*df.reset_index\(\) makes it a colu"
        ):
            load(tmp_path, label=name)


def test_an_index_column_without_metadata_is_asked_about(tmp_path: Path) -> None:
    pq.write_table(pa.table({"x": X, "y": Y, "__index_level_0__": [9, 4]}), tmp_path / "train.parquet")
    with pytest.raises(RunError, match=r"2 is called '__index_level_0__'; data.ignore_columns = \[2\] skips it"):
        load(tmp_path)
    assert load(tmp_path, ignore_columns=("__index_level_0__",)).train.targets[np.arange(2)].tolist() == Y


# --- labels ----------------------------------------------------------------------------------


@pytest.mark.parametrize("label", [None, 2, -1])
def test_the_label_has_the_same_name_in_all_files(tmp_path: Path, label: int | None) -> None:
    (tmp_path / "train.csv").write_text("x,n,fine\n1.5,2,0\n3,4.25,1\n")
    (tmp_path / "test.csv").write_text("x,n,coarse\n1.5,2,0\n3,4.25,1\n")
    fault = r"the label of .*train.csv is 'fine', that of .*test.csv is 'coarse', and they must have the same name"
    with pytest.raises(RunError, match=fault):
        load(tmp_path, test="test.csv", label=label)
    (tmp_path / "test.csv").write_text("x,n,fine\n1.5,2,0\n3,4.25,1\n")
    assert load(tmp_path, test="test.csv", label=label).schema["label_columns"] == ["fine"]


# --- names that are not UTF-8 ----------------------------------------------------------------


def test_a_folder_whose_name_is_not_utf_8_can_hold_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    monkeypatch.chdir(folder)
    assert read(Path(), "x,n,y\n1.5,2,0\n3,4.25,1\n") == (ROWS, LABELS)


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_file_whose_name_is_not_utf_8_is_an_error(tmp_path: Path, kind: str) -> None:
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / os.fsdecode(b"caf\xe9." + kind.encode())).write_text("x,n,y\n1.5,2,0\n")
    (tmp_path / f"test.{kind}").write_text("x,n,y\n1.5,2,0\n")
    data = DataSection(source=kind, root=str(tmp_path), train="parts")
    with pytest.raises(RunError, match=r"caf.* cannot be read: its name is not UTF-8; rename it"):
        load_source(data, 3, lambda *_: None)
