"""Read csv and parquet files with pyarrow, and find the roles of their columns."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from hvd_batchgrow.config import DataSection
from hvd_batchgrow.data.tables.csv_dialect import CsvForm, csv_form, not_utf8, record_lines
from hvd_batchgrow.data.tables.optional_packages import arrow_path, need
from hvd_batchgrow.messages.errors import Fault, JobError, RunError
from hvd_batchgrow.messages.wording import listed

NUM_SHOWN = 10
"""Most cells, rows or columns of a kind that a message lists."""
_UNNAMED = re.compile(r"|Unnamed: \d+(\.\d+)*(_level_\d+)?|__index_level_\d+__")
"""Names that pandas and R give to a column of row names, on writing or on reading it back."""


@dataclass(frozen=True)
class RawTable:
    """One file as read, before any conversion."""

    path: Path
    names: tuple[str, ...]
    cells: tuple[Any, ...]
    """A chunked array of pyarrow for each column: texts from a csv file, any type from a parquet file."""
    form: CsvForm | None = None
    """None for a parquet file."""
    ragged: tuple[tuple[int, str], ...] = ()
    """Numbers, from 0 and including the header, and descriptions of csv records with too many or too few fields."""
    index: tuple[str, ...] = ()
    """Columns of a parquet file that pandas stored as the row index; `names` and `cells` do not include them."""

    @property
    def num_rows(self) -> int:
        """Number of rows, without ragged ones."""
        return len(self.cells[0]) if self.cells else 0

    def places(self, rows: Sequence[int]) -> list[str]:
        """Return the location of rows, from 0: `line 3` of a csv file as editors count, `row 3` of a parquet file."""
        if self.form is None:
            return [f"row {row + 1}" for row in rows]
        records = [self._record(row) for row in rows]
        return [f"line {line}" for line in self._lines(records)]

    def ragged_places(self) -> list[str]:
        """Return `line 3 has 2 fields` for each of the first ragged rows."""
        shown = self.ragged[:NUM_SHOWN]
        lines = self._lines([record for record, _ in shown])
        return [f"line {line} {what}" for line, (_, what) in zip(lines, shown, strict=True)]

    def _record(self, row: int) -> int:
        """Return the record number of a row, which counts the header and ragged records before it."""
        skipped = [number for number, _ in self.ragged]
        record = start = row + (self.form is not None and self.form.header)
        while (shifted := start + bisect_right(skipped, record)) != record:
            record = shifted
        return record

    def _lines(self, records: Sequence[int]) -> list[int]:
        assert self.form is not None
        lines = record_lines(self.path, self.form, records)
        return [lines.get(record, record + 1) for record in records]


def read_table(path: Path, data: DataSection) -> RawTable:
    """Read a csv or parquet file. Raise RunError if it is missing, damaged, empty or ambiguous."""
    if data.source == "parquet":
        return _read_parquet(path)
    return read_csv(path, csv_form(path, data.separator, data.header))


def read_csv(path: Path, form: CsvForm) -> RawTable:
    """Read all cells of a csv file, compressed or not, as texts without surrounding spaces.

    Raises:
        RunError: missing, or not UTF-8.
    """
    arrow, compute = need("pyarrow", "pyarrow"), need("pyarrow.compute", "pyarrow")
    ragged: list[tuple[int, str]] = []
    try:
        try:
            table = _csv_texts(path, form, ragged, threads=True)
        except arrow.ArrowInvalid:
            ragged.clear()
            table = _csv_texts(path, form, ragged, threads=False)
        if ragged:  # with several threads, their record numbers are unknown
            ragged.clear()
            table = _csv_texts(path, form, ragged, threads=False)
    except (OSError, arrow.ArrowException) as error:
        if "invalid UTF8" in str(error):
            raise not_utf8(path, _first_bad_line(path)) from None
        raise RunError(f"{path} cannot be read: {str(error).removeprefix('CSV parse error: ')}") from None
    cells = tuple(compute.utf8_trim_whitespace(column) for column in table.columns)
    return RawTable(path, form.names, cells, form, tuple(ragged))


def _csv_texts(path: Path, form: CsvForm, ragged: list[tuple[int, str]], *, threads: bool) -> Any:
    csv, arrow = need("pyarrow.csv", "pyarrow"), need("pyarrow", "pyarrow")
    numbered = [str(k) for k in range(len(form.names))]

    def skip(row: Any) -> str:
        count = f"has {row.actual_columns} field{'' if row.actual_columns == 1 else 's'}"
        text = " ".join(row.text.split())[:60]
        ragged.append(((row.number or 1) - 1, f"{count}, the first line has {row.expected_columns}: {text}"))
        return "skip"

    return csv.read_csv(
        arrow_path(path),
        csv.ReadOptions(
            use_threads=threads,
            column_names=numbered,
            skip_rows=form.skip_lines,
            skip_rows_after_names=int(form.header),
        ),
        csv.ParseOptions(delimiter=form.separator, invalid_row_handler=skip, newlines_in_values=not threads),
        # Keep all cells as texts: the job's keys decide which are missing and which are numbers.
        csv.ConvertOptions(column_types=dict.fromkeys(numbered, arrow.string()), strings_can_be_null=False),
    )


def _first_bad_line(path: Path) -> int:
    with need("pyarrow", "pyarrow").input_stream(arrow_path(path), compression="detect") as file:
        for number, line in enumerate(_lines_of(file), 1):
            try:
                line.decode()
            except UnicodeDecodeError:
                return number
    return 1


def _lines_of(file: Any) -> Iterator[bytes]:
    rest = b""
    while block := file.read(1 << 20):
        *lines, rest = (rest + block).split(b"\n")
        yield from lines
    yield rest


def _read_parquet(path: Path) -> RawTable:
    parquet, arrow = need("pyarrow.parquet", "pyarrow"), need("pyarrow", "pyarrow")
    try:
        with parquet.ParquetFile(arrow_path(path)) as file:
            table = file.read()
        table.validate(full=True)  # finds texts that are not UTF-8, and categories outside their list
    except (OSError, arrow.ArrowException) as error:
        raise RunError(f"{path} cannot be read: {error}") from None
    try:
        names = tuple(str(name).strip() for name in table.column_names)
    except UnicodeDecodeError as error:
        raise RunError(f"{path} is damaged: the name of a column is not UTF-8 ({error.reason})") from None
    index = _pandas_index(table.schema)
    kept = [k for k, name in enumerate(table.column_names) if name not in index]
    skipped = tuple(name for name in names if name in index)
    return RawTable(path, tuple(names[k] for k in kept), tuple(table.column(k) for k in kept), index=skipped)


def _pandas_index(schema: Any) -> set[str]:
    """Return the columns that pandas' metadata names as the row index; a RangeIndex has no column."""
    try:
        columns = schema.pandas_metadata["index_columns"]
        return {name for name in columns if isinstance(name, str)}
    except (TypeError, KeyError, ValueError):  # missing or damaged metadata
        return set()


# --- which column is what --------------------------------------------------------------------


@dataclass(frozen=True)
class Roles:
    """The roles of a file's columns, by index."""

    labels: tuple[int, ...]
    """The columns of targets; a single one for classes."""
    features: tuple[int, ...]
    categorical: frozenset[int]
    """The categorical features."""


def find_roles(table: RawTable, data: DataSection, *, strict: bool = True) -> Roles:
    """Find the columns that a job names.

    Args:
        table: of one file.
        data: names the columns.
        strict: whether columns to ignore must exist; a test file, for instance, may lack pandas' index.

    Raises:
        JobError: a column does not exist, or has two roles.
        RunError: a column has no name and the job does not ignore it, or no rows or features are left.
    """
    names = table.names
    _refuse_index(table, data)
    ignored = {
        column_index(table.path, names, column, "ignore_columns")
        for column in data.ignore_columns
        if column not in table.index and (strict or isinstance(column, int) or column in names)
    }
    rest = [k for k in range(len(names)) if k not in ignored]
    labels = rest[-1:]
    if data.label is not None or not rest:
        labels = [column_index(table.path, names, column, "label") for column in label_columns(data)]
    _refuse_unnamed(table, [k for k in rest if k not in labels or data.label is None])
    categorical = {column_index(table.path, names, column, "categorical") for column in data.categorical}
    faults = [
        Fault(f"data.{key}", f"{names[k]!r} of {table.path} is {role} too: a column can have only one role")
        for key, columns, role in (
            ("ignore_columns", ignored & {*labels}, "data.label"),
            ("categorical", categorical & {*labels}, "data.label"),
            ("categorical", categorical & ignored, "in data.ignore_columns"),
        )
        for k in sorted(columns)
    ]
    if len({*labels}) < len(labels):
        twice = next(table.names[k] for k in labels if labels.count(k) > 1)
        faults.append(Fault("data.label", f"names the column {twice!r} of {table.path} twice"))
    if faults:
        raise JobError(faults)
    features = tuple(k for k in rest if k not in labels)
    if not features or not table.num_rows:
        # If there are only ragged rows, the caller reports them.
        if table.ragged:
            return Roles(tuple(labels), features, frozenset(categorical))
        hint = "" if features or data.source != "csv" else "; data.separator sets the separator"
        raise RunError(
            f"{table.path} holds {table.num_rows} rows of {len(features)} features: it cannot be trained on{hint}"
        )
    return Roles(tuple(labels), features, frozenset(categorical))


def label_columns(data: DataSection) -> tuple[str | int, ...]:
    """Return the columns of `data.label`, by default the last one."""
    if isinstance(data.label, tuple):
        return data.label
    return (-1 if data.label is None else data.label,)


def _refuse_index(table: RawTable, data: DataSection) -> None:
    fault = f"is the row index that pandas stored in {table.path}, not a column; df.reset_index() makes it a column"
    named = [
        *(("label", column) for column in label_columns(data)),
        *(("categorical", column) for column in data.categorical),
    ]
    faults = [Fault(f"data.{key}", f"{column!r} {fault}") for key, column in named if column in table.index]
    if faults:
        raise JobError(faults)


def _refuse_unnamed(table: RawTable, columns: Sequence[int]) -> None:
    unnamed = [k for k in columns if _UNNAMED.fullmatch(table.names[k])]
    if unnamed:
        what = ", ".join(f"{k} is called {table.names[k]!r}" for k in unnamed[:NUM_SHOWN])
        remedy = f"data.ignore_columns = {unnamed[:NUM_SHOWN]} skips it, a name in the file makes it a feature"
        raise RunError(f"{table.path}: a column without a name, as pandas and R write row names: {what}; {remedy}")


def column_index(path: Path, names: Sequence[str], column: str | int, key: str) -> int:
    """Return the index of a column.

    Args:
        path: the file, for messages.
        names: of its columns.
        column: name, or index from 0; negative indices count from the last column.
        key: of `[data]`, for messages.

    Raises:
        JobError: the column does not exist, or several columns have this name.
    """
    if isinstance(column, int):
        if -len(names) <= column < len(names):
            return column % len(names)
        raise JobError([Fault(f"data.{key}", f"{path} has columns 0 … {len(names) - 1}, so {column} does not exist")])
    if names.count(column) == 1:
        return names.index(column)
    near = get_close_matches(column, names, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    count = f"{names.count(column)} columns" if column in names else "no column"
    fault = f"{path} has {count} {column!r}; {hint}there are {listed(names, 20)}"
    raise JobError([Fault(f"data.{key}", fault)])
