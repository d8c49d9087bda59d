"""Inputs of a network from a table; expected values are computed by hand or by NumPy in float64."""

from __future__ import annotations

import datetime
import shutil
from decimal import Decimal
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from numpy.typing import NDArray

from hvd_batchgrow.config import DataSection
from hvd_batchgrow.data.datasets.dataset import Datasets, raise_bad
from hvd_batchgrow.data.load_source import load_source
from hvd_batchgrow.data.order.stream import Stream
from hvd_batchgrow.data.pipeline.reader import Reader
from hvd_batchgrow.messages.errors import JobError, RunError
from tests.helpers import labels_of

pytestmark = pytest.mark.usefixtures("cache")
START = 1_700_000_000
"""A time stamp of 2023, where float32 has a resolution of 128 s."""


def section(root: Path, source: str = "csv", **keys: Any) -> DataSection:
    return DataSection(source=source, root=str(root), **keys)


def copied(file: Path) -> str:
    """Copy a file, and return the name of the copy: a file cannot be in the training set and in the test set."""
    return shutil.copyfile(file, file.with_name(f"copy_of_{file.name}")).name


def load(data: DataSection, seed: int = 3) -> Datasets:
    return load_source(data, seed, lambda *_: None)


def inputs(data: DataSection, source: Datasets, part: str = "train") -> NDArray[np.float32]:
    """Return the network's inputs for all samples, in order."""
    swapped = Datasets(source.test, source.train if part == "train" else source.test, 9, source.mean, source.std)
    reader = Reader(data, swapped, torch.device("cpu"), 1, raise_bad, 64)
    (batch,) = reader.testing([range(len(swapped.test))])
    return np.asarray(batch.inputs)


def standardized(values: Any, reference: Any = None) -> NDArray[np.float64]:
    """Return (x - mean) / std in float64, from the definition."""
    reference = np.asarray(values if reference is None else reference, dtype=np.float64)
    mean = reference.mean(axis=0)
    std = np.sqrt(((reference - mean) ** 2).mean(axis=0))
    return np.asarray((np.asarray(values, dtype=np.float64) - mean) / std)


def write_csv(path: Path, names: str, rows: Any) -> None:
    path.write_text("\n".join([names, *(",".join(map(str, row)) for row in rows)]) + "\n")


# --- standardized in float64 -----------------------------------------------------------------


def test_seconds_of_a_time_stamp_are_kept(tmp_path: Path) -> None:
    times, tested = START + 7 * np.arange(117), START + np.array([3, 500])
    write_csv(tmp_path / "train.csv", "unix_time,y", [(t, k % 2) for k, t in enumerate(times)])
    write_csv(tmp_path / "test.csv", "unix_time,y", [(t, 0) for t in tested])
    data = section(tmp_path, num_samples=117)
    source = load(data)
    found = inputs(data, source)[:, 0]
    assert len(np.unique(found)) == 117
    # The integers 0 … 116 have mean 58 and variance (117² - 1) / 12.
    expected = (np.arange(117) - 58) / ((117**2 - 1) / 12) ** 0.5
    assert found == pytest.approx(expected, rel=1e-6, abs=1e-7)
    assert inputs(data, source, "test")[:, 0] == pytest.approx(standardized(tested, times), rel=1e-6)


@pytest.mark.parametrize("dtype", ["float64", "int64", "uint32", ">f8"])
def test_rows_of_an_npy_file_keep_what_float32_would_round(tmp_path: Path, dtype: str) -> None:
    rows = np.stack([START + np.arange(20), np.arange(20) ** 2], axis=1)
    for part in ("train", "test"):
        np.save(tmp_path / f"{part}_rows.npy", rows.astype(dtype))
        np.save(tmp_path / f"{part}_labels.npy", np.arange(20) % 2)
    data = section(tmp_path, "numpy", num_samples=20)
    assert inputs(data, load(data)) == pytest.approx(standardized(rows), rel=1e-6, abs=1e-7)


def test_mean_and_deviation_of_the_job_are_subtracted_in_float64(tmp_path: Path) -> None:
    times = START + np.array([0.25, 1.5, 3.0])
    write_csv(tmp_path / "train.csv", "t,y", zip(times, [0, 1, 0], strict=True))
    data = section(tmp_path, num_samples=3, test=copied(tmp_path / "train.csv"), mean=(START + 1.0,), std=(0.5,))
    assert inputs(data, load(data)).tolist() == [[-1.5], [1.0], [4.0]]


def test_rows_held_out_are_standardized_by_the_others(tmp_path: Path) -> None:
    times = START + np.arange(50) ** 2
    write_csv(tmp_path / "train.csv", "t,y", [(t, k % 2) for k, t in enumerate(times)])
    data = section(tmp_path, num_samples=40, test_fraction=0.2)
    order = Stream(50, 3).ids(0, 50)
    train, test = np.sort(order[10:]), np.sort(order[:10])
    source = load(data)
    assert inputs(data, source)[:, 0] == pytest.approx(standardized(times[train]), rel=1e-6, abs=1e-6)
    assert inputs(data, source, "test")[:, 0] == pytest.approx(standardized(times[test], times[train]), rel=1e-6)


def test_a_ghost_batch_is_bit_identical_on_any_number_of_ranks(tmp_path: Path) -> None:
    times = START + np.arange(32) ** 2
    write_csv(tmp_path / "train.csv", "t,c,x,y", [(t, "ab"[k % 2], k * 0.1, k % 2) for k, t in enumerate(times)])
    data = section(tmp_path, num_samples=32, test=copied(tmp_path / "train.csv"), categorical=("c",))
    reader = Reader(data, load(data), torch.device("cpu"), 1, raise_bad, 64)
    alone = list(islice(reader.training(Stream(32, 3), 8, 0, 1), 8))
    for rank in range(2):
        for k, batch in enumerate(islice(reader.training(Stream(32, 3), 8, rank, 2), 4)):
            assert torch.equal(batch.inputs, alone[2 * k + rank].inputs)
            assert (batch.ids == alone[2 * k + rank].ids).all()
    assert alone[0].inputs[:, 0].numpy() == pytest.approx(standardized(times[alone[0].ids], times), rel=1e-6)


def test_values_beyond_float32_are_standardized_and_tiny_ones_are_refused(tmp_path: Path) -> None:
    write_csv(tmp_path / "train.csv", "a,b,y", [(1e99, 1e-60, 0), (3e99, 5e-60, 1)])
    data = section(tmp_path, num_samples=2, test=copied(tmp_path / "train.csv"))
    assert inputs(data, load(data)) == pytest.approx(np.array([[-1.0, -1.0], [1.0, 1.0]]))
    write_csv(tmp_path / "train.csv", "a,b,y", [(1, 1e-200, 0), (2, 5e-200, 1)])
    with pytest.raises(RunError, match=r"feature 'b' cannot be standardized: the squares of its values are too small"):
        load(data)
    write_csv(tmp_path / "train.csv", "a,b,y", [(1e200, 1, 0), (3e200, 2, 1)])
    with pytest.raises(RunError, match=r"feature 'a' cannot be standardized: .* too large for float64"):
        load(data)


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_integers_that_float64_cannot_tell_apart_are_refused_by_name(tmp_path: Path, kind: str) -> None:
    nanoseconds = 10**9 * START + np.array([1, 5, 9])

    def write(values: NDArray[np.int64]) -> None:
        for part in ("train", "test"):
            if kind == "csv":
                write_csv(tmp_path / f"{part}.csv", "t,y", zip(values, [0, 1, 0], strict=True))
            else:
                pq.write_table(pa.table({"t": values, "y": [0, 1, 0]}), tmp_path / f"{part}.parquet")

    data = section(tmp_path, kind, num_samples=3)
    write(nanoseconds)
    with pytest.raises(RunError, match=r"column 't': 3 of 3 cells need more digits than float64 has.*subtract a const"):
        load(data)
    write(nanoseconds * 1_000_000_007 % 10**18)  # as many digits, far apart
    assert inputs(data, load(data))[:, 0] == pytest.approx(
        standardized(np.array([float(x) for x in nanoseconds * 1_000_000_007 % 10**18])), rel=1e-6
    )


def test_every_type_of_a_parquet_column_has_a_stated_value(tmp_path: Path) -> None:
    days = [datetime.date(1970, 1, 2), datetime.date(1971, 1, 1)]
    moments = [datetime.datetime(1970, 1, 1, 1), datetime.datetime(1970, 1, 2, 0, 0, 0, 500_000)]
    columns = {
        "flag": pa.array([True, False]),
        "small": pa.array([-3, 250], pa.int16()),
        "half": pa.array(np.array([0.5, -2.0], np.float16)),
        "price": pa.array([Decimal("12345678901.25"), Decimal("-0.5")], pa.decimal128(20, 2)),
        "day": pa.array(days, pa.date32()),
        "day64": pa.array(days, pa.date64()),
        "ns": pa.array(moments, pa.timestamp("ns")),
        "zoned": pa.array([m.replace(tzinfo=datetime.UTC) for m in moments], pa.timestamp("ms", "Europe/Rome")),
        "clock": pa.array([datetime.time(1), datetime.time(0, 0, 2)], pa.time32("s")),
        "long": pa.array([datetime.timedelta(seconds=90), datetime.timedelta(days=-1)], pa.duration("us")),
        "y": pa.array([0, 1], pa.uint8()),
    }
    pq.write_table(pa.table(columns), tmp_path / "train.parquet")
    source = load(section(tmp_path, "parquet", num_samples=2, test=copied(tmp_path / "train.parquet")))
    expected = [
        [1, -3, 0.5, 12345678901.25, 86_400, 86_400, 3600, 3600, 3600, 90],
        [0, 250, -2.0, -0.5, 365 * 86_400, 365 * 86_400, 86_400.5, 86_400.5, 2, -86_400],
    ]
    assert source.train.fetch(np.arange(2)).tolist() == expected


# --- missing values --------------------------------------------------------------------------


def with_gaps(root: Path) -> None:
    write_csv(root / "train.csv", "a,b,y", [(1, 10, 0), ("", 20, 1), (4, "NA", 0), (7, 60, 1)])
    write_csv(root / "test.csv", "a,b,y", [("nan", 30, 1), (100, "", 0)])


@pytest.mark.parametrize(("missing", "a", "b"), [("mean", 4.0, 30.0), ("zero", 0.0, 0.0)])
def test_missing_numbers_become_the_training_mean_or_zero(tmp_path: Path, missing: str, a: float, b: float) -> None:
    with_gaps(tmp_path)
    data = section(tmp_path, num_samples=4, missing=missing)
    source = load(data)
    train = np.array([[1, 10], [a, 20], [4, b], [7, 60]])
    test = np.array([[a, 30], [100, b]])
    assert inputs(data, source) == pytest.approx(standardized(train), rel=1e-6, abs=1e-6)
    assert inputs(data, source, "test") == pytest.approx(standardized(test, train), rel=1e-6, abs=1e-6)
    assert source.schema["fill"] == {"a": a, "b": b}


def test_the_mean_is_that_of_the_training_rows_when_rows_are_held_out(tmp_path: Path) -> None:
    values = [float(k**2) if k % 3 else None for k in range(30)]
    pq.write_table(pa.table({"a": values, "y": [k % 2 for k in range(30)]}), tmp_path / "train.parquet")
    data = section(tmp_path, "parquet", num_samples=24, test_fraction=0.2, missing="mean")
    order = Stream(30, 3).ids(0, 30)
    train, test = np.sort(order[6:]), np.sort(order[:6])
    mean = np.mean([values[k] for k in train if values[k] is not None])
    filled = np.array([mean if value is None else value for value in values])
    source = load(data)
    assert inputs(data, source)[:, 0] == pytest.approx(standardized(filled[train]), rel=1e-6, abs=1e-6)
    assert inputs(data, source, "test")[:, 0] == pytest.approx(
        standardized(filled[test], filled[train]), rel=1e-6, abs=1e-6
    )


def test_rows_with_missing_values_can_be_skipped_and_are_counted(tmp_path: Path) -> None:
    write_csv(tmp_path / "train.csv", "a,c,y", [(1, "u", 0), ("", "u", 1), (4, "", 0), (7, "v", ""), (8, "v", 1)])
    write_csv(tmp_path / "test.csv", "a,c,y", [("nan", "u", 1), (5, "u", 1)])
    data = section(tmp_path, num_samples=2, missing="drop_row", categorical=("c",))
    source = load(data)
    assert source.train.fetch(np.arange(2)).tolist() == [[1, 1, 0], [8, 0, 1]]
    assert labels_of(source.train) == [0, 1]
    assert source.train.locate(1) == f"{tmp_path}/train.csv, line 6"
    assert source.test.fetch(np.arange(1)).tolist() == [[5, 1, 0]]
    assert source.notes == (
        f"{tmp_path}/train.csv: 3 of 5 rows are skipped: a value is missing",
        f"{tmp_path}/test.csv: 1 of 2 rows are skipped: a value is missing",
    )
    with pytest.raises(RunError, match=r"data.num_samples = 5, but 2 training samples were found"):
        load(section(tmp_path, num_samples=5, missing="drop_row", categorical=("c",)))


def test_a_constant_with_missing_cells_is_standardized_to_0(tmp_path: Path) -> None:
    # 3 of 5 cells of 0.1 are missing: a rounded mean 0.1 + 1e-17 would make a std of 1e-17.
    for constant in (0.1, 1e-9, 123456.7, -0.3):
        cells = [constant if k % 5 < 2 else "" for k in range(95)]
        (tmp_path / "train.csv").write_text("a,y\n" + "".join(f"{cell},{k % 2}\n" for k, cell in enumerate(cells)))
        (tmp_path / "test.csv").write_text(f"a,y\n{constant + 1},0\n")
        data = section(tmp_path, num_samples=95, missing="mean", label="y")
        source = load(data)
        assert source.std == (1.0,)
        assert not inputs(data, source).any()
        assert inputs(data, source, "test").tolist() == [[np.float32(1)]]


def test_a_column_without_any_value_has_no_mean(tmp_path: Path) -> None:
    write_csv(tmp_path / "train.csv", "a,b,y", [(1, "", 0), (2, "", 1)])
    with pytest.raises(RunError, match=r"no training row has a value in column 'b', .*; data.ignore_columns = \['b'\]"):
        load(section(tmp_path, num_samples=2, test=copied(tmp_path / "train.csv"), missing="mean"))


def test_the_job_may_list_what_means_a_missing_value(tmp_path: Path) -> None:
    write_csv(tmp_path / "train.csv", "a,c,y", [("?", "x", 0), (-999, "?", 1), (6, "x", 1)])
    data = section(tmp_path, num_samples=3, test=copied(tmp_path / "train.csv"), missing="zero", categorical=("c",))
    source = load(data.model_copy(update={"missing_values": ("?", "-999")}))
    assert source.train.fetch(np.arange(3)).tolist() == [[0, 1], [0, 0], [6, 1]]
    with pytest.raises(RunError, match=r"column 'a': 1 of 3 cells is not a finite number: line 2: '\?'; .*missing_val"):
        load(data)


# --- categories ------------------------------------------------------------------------------


def with_categories(root: Path) -> None:
    write_csv(root / "train.csv", "color,x,month,y", [("red", 1, 10, 0), ("blue", 3, 9, 1), ("red", 8, 9, 0)])
    write_csv(root / "test.csv", "color,x,month,y", [("blue", 5, 10, 1), ("red", 4, 10, 0)])


def test_categories_become_features_of_0_and_1_that_are_not_standardized(tmp_path: Path) -> None:
    with_categories(tmp_path)
    data = section(tmp_path, num_samples=3, categorical=("color", 2))
    source = load(data)
    x, test_x = standardized([1, 3, 8]), standardized([5, 4], [1, 3, 8])
    expected = [[0, 1, x[0], 0, 1], [1, 0, x[1], 1, 0], [0, 1, x[2], 1, 0]]
    assert inputs(data, source) == pytest.approx(np.array(expected), rel=1e-6)
    tested = [[1, 0, test_x[0], 0, 1], [0, 1, test_x[1], 0, 1]]
    assert inputs(data, source, "test") == pytest.approx(np.array(tested), rel=1e-6)
    assert source.schema["features"] == ["color=blue", "color=red", "x", "month=9", "month=10"]
    assert source.schema["categories"] == {"color": ["blue", "red"], "month": ["9", "10"]}


def test_categories_become_codes_on_request(tmp_path: Path) -> None:
    with_categories(tmp_path)
    data = section(tmp_path, num_samples=3, categorical=("color", "month"), categorical_encoding="codes")
    source = load(data)
    assert inputs(data, source)[:, [0, 2]].tolist() == [[1, 1], [0, 0], [1, 0]]
    assert source.schema["features"] == ["color", "x", "month"]


def test_a_category_that_no_training_row_has_is_refused_or_encoded_as_none(tmp_path: Path) -> None:
    with_categories(tmp_path)
    write_csv(tmp_path / "test.csv", "color,x,month,y", [("blue", 5, 10, 1), ("green", 4, 11, 0)])
    data = section(tmp_path, num_samples=3, categorical=("color", "month"))
    fault = (
        r"column 'color', 1 of 2 rows: .*test.csv, line 3: 'green'; column 'month', 1 of .*line 3: '11'; data.unknown"
    )
    with pytest.raises(RunError, match=fault):
        load(data)
    ignoring = data.model_copy(update={"unknown_category": "ignore"})
    assert load(ignoring).test.fetch(np.array([1])).tolist() == [[0, 0, 4, 0, 0]]
    notes = load(ignoring).notes  # from the cache
    assert len(notes) == 2
    assert notes[1].startswith("test rows, encoded as no category, column 'month', 1 of 2 rows: ")
    assert notes[1].endswith("test.csv, line 3: '11'")
    codes = ignoring.model_copy(update={"categorical_encoding": "codes"})
    assert load(codes).test.fetch(np.array([1])).tolist() == [[-1, 4, -1]]


def test_categories_of_held_out_rows_are_those_of_the_training_rows(tmp_path: Path) -> None:
    order = Stream(10, 3).ids(0, 10)
    colors = ["b" if k == order[0] else "ac"[k % 2] for k in range(10)]  # only a row that is held out is b
    write_csv(tmp_path / "train.csv", "color,y", [(color, k % 2) for k, color in enumerate(colors)])
    data = section(tmp_path, num_samples=9, test_fraction=0.1, categorical=("color",))
    with pytest.raises(RunError, match=rf"column 'color', 1 of 1 row: .*train.csv, line {order[0] + 2}: 'b'"):
        load(data)
    source = load(data.model_copy(update={"unknown_category": "ignore"}))
    assert source.schema["categories"] == {"color": ["a", "c"]}
    assert source.test.fetch(np.arange(1)).tolist() == [[0, 0]]


def test_parquet_columns_of_several_types_can_be_categories(tmp_path: Path) -> None:
    columns = {
        "grade": pa.array(["low", None, "high"]).dictionary_encode(),
        "flag": [True, False, True],
        "zip": pa.array([10.0, None, 9.0]),
        "y": [0, 1, 1],
    }
    pq.write_table(pa.table(columns), tmp_path / "train.parquet")
    keys: dict[str, Any] = {"num_samples": 3, "test": copied(tmp_path / "train.parquet")}
    with pytest.raises(
        RunError, match=r"column 'grade': 3 of 3 cells are categories of string, not numbers: .*categor"
    ):
        load(section(tmp_path, "parquet", **keys))
    source = load(section(tmp_path, "parquet", categorical=("grade", "flag", "zip"), missing="zero", **keys))
    assert source.schema["features"] == ["grade=high", "grade=low", "flag=false", "flag=true", "zip=9", "zip=10"]
    expected = [[0, 1, 0, 1, 0, 1], [0, 0, 1, 0, 0, 0], [1, 0, 0, 1, 1, 0]]
    assert source.train.fetch(np.arange(3)).tolist() == expected


def test_a_text_such_as_na_is_a_category_and_said_to_be(tmp_path: Path) -> None:
    write_csv(tmp_path / "train.csv", "basement,y", [("NA", 0), ("good", 1)])
    keys: dict[str, Any] = {"num_samples": 2, "test": copied(tmp_path / "train.csv"), "categorical": ("basement",)}
    source = load(section(tmp_path, **keys))
    assert source.schema["categories"] == {"basement": ["NA", "good"]}
    note = "train.csv: column 'basement': kept as a category, not as a missing value: 'NA'"
    assert source.notes[0] == f"{tmp_path}/{note}"
    with pytest.raises(RunError, match=r"column 'basement': 1 of 2 cells is missing: line 2: 'NA'"):
        load(section(tmp_path, missing_values=("NA",), **keys))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"categorical": ("colors",)}, r"data.categorical: .*train.csv has no column 'colors'; did you mean 'color'\?"),
        ({"categorical": ("y",)}, r"data.categorical: 'y' of .*train.csv is data.label too"),
        ({"categorical": ("x",), "ignore_columns": (1,)}, r"data.categorical: 'x' of .* is in data.ignore_columns too"),
        ({"ignore_columns": ("z",)}, r"data.ignore_columns: .*train.csv has no column 'z'"),
        ({"ignore_columns": ("y",), "label": "y"}, r"data.ignore_columns: 'y' of .*train.csv is data.label too"),
        ({"unknown_category": "ignore"}, r"data.unknown_category: requires data.categorical"),
        ({"categorical_encoding": "codes"}, r"data.categorical_encoding: requires data.categorical"),
    ],
)
def test_columns_that_a_job_names_must_be_there_once(tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    with_categories(tmp_path)
    with pytest.raises(JobError, match=message):
        load(section(tmp_path, num_samples=3, **keys))
