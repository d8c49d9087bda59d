"""Files of columns: what pyarrow reads, turned into features and labels, every cell checked."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvd_batchgrow.errors import Fault, JobError, RunError


@dataclass(frozen=True)
class Columns:
    """One file, read."""

    path: Path
    names: tuple[str, ...]
    """Of the features."""
    values: NDArray[np.float32]
    """(n, features)."""
    labels: NDArray[Any]
    """(n,) int64, or text as it stands in the file."""


def need(module: str, package: str) -> Any:
    """Import a module of the extra `tables`. Raises RunError naming the extra where it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        mend = "pip install 'hvd_batchgrow[tables]'"
        raise RunError(f"{package} is needed for this source and cannot be imported ({error}): {mend}") from None


def read_csv(path: Path, *, header: bool = True) -> Any:
    """A file of comma-separated values as a pyarrow table, packed or not.

    Args:
        path: a name ending in .gz, .bz2 or .zst is unpacked.
        header: the first line holds the names; else the columns are called "1", "2", …

    Raises:
        RunError: missing, empty, not text, or a row is longer or shorter than the first.
    """
    csv, arrow = need("pyarrow.csv", "pyarrow"), need("pyarrow", "pyarrow")

    def read(*, threads: bool) -> Any:
        options = csv.ReadOptions(use_threads=threads, autogenerate_column_names=not header)
        # Else an empty cell between texts would be an empty text, not a missing one.
        return csv.read_csv(str(path), options, convert_options=csv.ConvertOptions(strings_can_be_null=True))

    try:
        try:
            table = read(threads=True)
        except arrow.ArrowInvalid:
            table = read(threads=False)  # fails again, and says in which row
    except (OSError, arrow.ArrowException) as error:
        raise RunError(f"{path} cannot be read: {str(error).removeprefix('CSV parse error: ')}") from None
    if not header:
        return table.rename_columns([str(k + 1) for k in range(table.num_columns)])
    if all(_is_number(name) for name in _names(path, table)):
        raise RunError(f"{path} has no header: its first line, {','.join(table.column_names)[:60]}, holds no names")
    return table


def _names(path: Path, table: Any) -> list[str]:
    """Of the columns. Raises RunError where one is no text: pyarrow decodes them only when they are asked for."""
    try:
        return list(table.column_names)
    except UnicodeDecodeError as error:
        raise RunError(f"{path} is damaged: the name of a column is not UTF-8 ({error.reason})") from None


def read_parquet(path: Path) -> Any:
    """A parquet file as a pyarrow table. Raises RunError: missing, damaged, or none."""
    parquet, arrow = need("pyarrow.parquet", "pyarrow"), need("pyarrow", "pyarrow")
    try:
        with parquet.ParquetFile(str(path)) as file:
            return file.read()
    except (OSError, arrow.ArrowException) as error:
        raise RunError(f"{path} cannot be read: {error}") from None


def split_columns(path: Path, table: Any, label: str | int | None) -> Columns:
    """Features and labels of a table.

    Args:
        path: its file, for messages.
        table: of pyarrow.
        label: name or index of the column of labels; None: the last.

    Raises:
        JobError: there is no such column.
        RunError: a cell is missing, or is not a finite number (features) or whole number or text (labels).
    """
    at = _label_index(path, _names(path, table), label)
    others = [k for k in range(table.num_columns) if k != at]
    if not others or not table.num_rows:
        raise RunError(f"{path} holds {table.num_rows} rows of {len(others)} features: nothing to learn from")
    values = np.empty((table.num_rows, len(others)), dtype=np.float32)
    for k, column in enumerate(others):
        values[:, k] = _feature(_Column(path, table.column_names[column], table.column(column)))
    labels = _labels(_Column(path, table.column_names[at], table.column(at)))
    return Columns(path, tuple(table.column_names[k] for k in others), values, labels)


def _label_index(path: Path, names: Sequence[str], label: str | int | None) -> int:
    if label is None:
        return len(names) - 1
    if isinstance(label, int):
        if -len(names) <= label < len(names):
            return label % len(names)
        raise JobError([Fault("data.label", f"{path} has columns 0 … {len(names) - 1}, there is no {label}")])
    if names.count(label) == 1:
        return names.index(label)
    near = get_close_matches(label, names, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    more = f" and {len(names) - 20} more" if len(names) > 20 else ""
    count = f"{names.count(label)} columns" if label in names else "no column"
    fault = f"{path} has {count} {label!r}; {hint}there are {', '.join(names[:20])}{more}"
    raise JobError([Fault("data.label", fault)])


@dataclass(frozen=True)
class _Column:
    path: Path
    name: str
    cells: Any
    """A chunked array of pyarrow."""

    def fault(self, row: int, what: str) -> RunError:
        """Data rows are counted from 1, the header not among them."""
        return RunError(f"{self.path}: column {self.name!r}, data row {row + 1}: {what}")

    def check_complete(self) -> None:
        """Raise RunError if a cell is missing."""
        if self.cells.null_count:
            compute = need("pyarrow.compute", "pyarrow")
            row = compute.index(self.cells.is_null(), True).as_py()
            count = f"of {len(self.cells)} cells {self.cells.null_count} are"
            raise self.fault(row, f"the value is missing ({count}); fill it in, or leave the row or column out")

    def is_number(self) -> bool:
        """Whole, floating or decimal numbers, or true and false."""
        types = need("pyarrow.types", "pyarrow")
        tests = (types.is_integer, types.is_floating, types.is_decimal, types.is_boolean)
        return any(test(self.cells.type) for test in tests)


def _feature(column: _Column) -> NDArray[np.float32]:
    column.check_complete()
    if not column.is_number():
        texts = map(str, column.cells.to_pylist())
        row, text = next(((k, text) for k, text in enumerate(texts) if not _is_number(text)), (0, ""))
        what = f"{text!r} is not a number" if text else f"holds {column.cells.type}, not numbers"
        raise column.fault(row, f"{what}; turn it into numbers, such as one column for each value")
    numbers: NDArray[np.float32] = column.cells.cast("float32", safe=False).to_numpy()
    wrong = np.flatnonzero(~np.isfinite(numbers))
    if len(wrong):
        value = column.cells[int(wrong[0])].as_py()
        raise column.fault(int(wrong[0]), f"{value} is not a finite number of 32 bits")
    return numbers


def _labels(column: _Column) -> NDArray[Any]:
    column.check_complete()
    if not column.is_number():
        return _texts(column)
    numbers = column.cells.cast("float64", safe=False).to_numpy()
    wrong = np.flatnonzero((numbers != np.floor(numbers)) | (np.abs(numbers) > 2**53))
    if len(wrong):
        value = column.cells[int(wrong[0])].as_py()
        raise column.fault(int(wrong[0]), f"the label {value} is not a whole number; data.label names another column")
    return numbers.astype(np.int64)  # type: ignore[no-any-return]


def _texts(column: _Column) -> NDArray[np.str_]:
    arrow = need("pyarrow", "pyarrow")
    try:
        return np.array(column.cells.cast("string").to_pylist(), dtype=np.str_)
    except arrow.ArrowException as error:
        raise RunError(f"{column.path}: column {column.name!r} of labels cannot be read as text: {error}") from None


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
