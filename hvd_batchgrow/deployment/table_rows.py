"""Read rows of a table for a trained network: the columns, categories and fill values are those of its training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvd_batchgrow.config import DataSection
from hvd_batchgrow.data.datasets.targets import as_float32
from hvd_batchgrow.data.tables.cells import Bits, CellFault, Texts, as_numbers, as_texts, cell_fault
from hvd_batchgrow.data.tables.checked_files import (
    as_categories,
    listed_faults,
    missing_labels,
    null_cells,
    plain_cells,
    target_numbers,
)
from hvd_batchgrow.data.tables.columns import RawTable, column_index, label_columns, read_csv, read_table
from hvd_batchgrow.data.tables.csv_dialect import csv_form
from hvd_batchgrow.data.tables.optional_packages import need
from hvd_batchgrow.data.tables.rows import Encoding
from hvd_batchgrow.messages.errors import Fault, JobError, RunError
from hvd_batchgrow.messages.wording import listed
from hvd_batchgrow.train.run.model_description import Column, ModelDescription, TableColumns

_MISSING = ("is missing", "are missing")
_UNKNOWN = ("is not a category of the training rows", "are not categories of the training rows")
_NO_CLASS = ("is not a class of the training rows", "are not classes of the training rows")


@dataclass(frozen=True)
class LabeledRows:
    """Rows as features."""

    values: NDArray[np.float64]
    """(n, features), not normalized."""
    targets: NDArray[Any]
    """Classes (n,), or numbers (n, K); 0 if they were not read."""
    places: Sequence[str]
    """Location of each row in the file: `line 3`."""
    notes: tuple[str, ...] = ()
    """Which rows are skipped, which values are encoded as no category, and which columns have no name to check."""


def read_rows(path: Path, description: ModelDescription, data: DataSection, *, with_targets: bool) -> LabeledRows:
    """Read the rows of a csv or parquet file. Columns are found by name, or by position in a file without a header.

    With targets, `data.missing = "drop_row"` skips rows as in training; without, each row needs a prediction. With
    `data.unknown_category = "ignore"`, unknown categories are encoded as no category, with a note.

    Args:
        path: the file; parquet if its name ends with .parquet, else csv.
        description: of the network.
        data: the section of its job: separator, decimal mark, missing values, label.
        with_targets: read the label column, which otherwise may be absent.

    Raises:
        JobError: the label column does not exist, or is a feature.
        RunError: the file cannot be read, a column is missing, or a cell is invalid; with all invalid cells.
    """
    is_table = description.table is not None
    columns = description.table or _by_position(description)
    data = data.model_copy(update={"source": "parquet" if path.name.endswith(".parquet") else "csv"})
    table = _read(path, data, is_table=is_table)
    labels = label_columns(data) if with_targets or not columns.label_columns else columns.label_columns
    others = (*data.ignore_columns, *labels) if with_targets or is_table else ()
    indices = _indices(table, columns, others, is_table=is_table)
    values = np.zeros((table.num_rows, len(indices)))
    faults: list[tuple[str, CellFault]] = []
    ignored: list[tuple[str, CellFault]] = []
    drops_rows = with_targets and data.missing == "drop_row"
    skipped = np.zeros(table.num_rows, dtype=np.bool_)
    for k, (column, index) in enumerate(zip(columns.columns, indices, strict=True)):
        cells = table.cells[index]
        values[:, k], missing, found, unknown = _converted(cells, column, columns, data)
        if drops_rows:
            skipped |= missing
        elif missing.any():
            found.append(
                cell_fault(cells, missing, _MISSING, "the training rows had no replacement for missing values")
            )
        if unknown and columns.unknown_category == "ignore":
            ignored.append((column.name, replace(unknown, remedy="encoded as no category")))
        elif unknown:
            found.append(unknown)
        faults += [(column.name, _without_training_keys(fault)) for fault in found]
    targets: NDArray[Any] = np.zeros(table.num_rows, dtype=np.int64)
    if with_targets:
        targets, missing, target_faults = _targets(table, description, indices, columns.first_label, data)
        skipped |= missing
        faults += target_faults
    if text := listed_faults(table, faults):
        is_first_line = all(fault.rows == [0] for _, fault in faults)
        hint = "\n  if its first line is a header: --data.header true" if not is_table and is_first_line else ""
        raise RunError(text + hint)
    if table.num_rows and skipped.all():
        raise RunError(f"{path}: a value is missing in every row: nothing is left")
    kept = np.flatnonzero(~skipped)
    notes = [listed_faults(table, ignored)] if ignored else []
    if not with_targets and table.form is not None and not table.form.header:
        notes += _notes_on_unused(table, indices)
    if skipped.any():
        notes.append(f"{path}: {skipped.sum():,} of {len(skipped):,} rows are skipped: a value is missing")
    places = table.places(kept.tolist())
    return LabeledRows(_encoding(columns).apply(values[kept]), targets[kept], places, tuple(notes))


def _targets(
    table: RawTable, description: ModelDescription, features: Sequence[int], first_label: int, data: DataSection
) -> tuple[NDArray[Any], Bits, list[tuple[str, CellFault]]]:
    """Return classes (n,) or numbers (n, K), the rows to skip, and the faults of the columns with their names."""
    as_values, columns, faults = description.task.target == "values", [], []
    skipped = np.zeros(table.num_rows, dtype=np.bool_)
    classes: Sequence[str] = description.classes
    if data.class_names:  # names of labels that are whole numbers in the files
        classes = [str(first_label + k) for k in range(len(classes))]
    for label in label_columns(data):
        index = column_index(table.path, table.names, label, "label")
        if index in features:
            fault = f"{table.names[index]!r} of {table.path} is a feature of the network, so it cannot be the label"
            raise JobError([Fault("data.label", f"{fault}; name another one of {listed(table.names, 20)}")])
        if as_values:
            targets, missing, found = target_numbers(plain_cells(table.cells[index]), table.names[index], data)
        else:
            targets, missing, found = _classes(table.cells[index], classes, data)
        if data.missing == "drop_row":
            skipped |= missing
        columns.append(targets)
        faults += [(table.names[index], fault) for fault in found]
    return as_float32(np.stack(columns, axis=1)) if as_values else columns[0], skipped, faults


def _by_position(description: ModelDescription) -> TableColumns:
    """Return the columns of rows that were no table with names: all are numbers."""
    columns = tuple(Column(name=str(k), kind="number") for k in range(description.inputs.shape[0]))
    return TableColumns(
        columns=columns, categorical_encoding="one_hot", missing="error", unknown_category="error", first_label=0
    )


def _read(path: Path, data: DataSection, *, is_table: bool) -> RawTable:
    if not path.is_file():
        raise RunError(f"{path} {'is not a file' if path.exists() else 'does not exist'}")
    if data.source == "parquet":
        return read_table(path, data)
    return read_csv(path, csv_form(path, data.separator, _has_header(path, data, is_table=is_table)))


def _has_header(path: Path, data: DataSection, *, is_table: bool) -> bool | None:
    """Return whether a csv file has a header; None if it is unclear, which `csv_form` reports as it does in training.

    Files for a network without names of columns usually have no header. A first line 0, 1, 2, … may be one that pandas
    has written.
    """
    if data.header is not None or is_table:
        return data.header if data.header is not None else True
    first = csv_form(path, data.separator, header=True).names
    return None if len(first) > 1 and first == tuple(map(str, range(len(first)))) else False


def _indices(table: RawTable, columns: TableColumns, others: Sequence[str | int], *, is_table: bool) -> list[int]:
    """Return the index of each column in a file.

    A file without a header has the features alone, or all columns of the training files: a further column, such as the
    row index that pandas writes, would shift the features.

    Args:
        table: the file.
        columns: of the network.
        others: the other columns of the training files: labels and ignored ones.
        is_table: whether the training files were tables rather than arrays.
    """
    names = [column.name for column in columns.columns]
    if table.form is not None and not table.form.header:
        if len(table.names) == len(names):
            return list(range(len(names)))
        indices, num_columns = [int(name) for name in names], len(table.names)
        places = [k % num_columns for k in map(int, others) if -num_columns <= k < num_columns]
        if len(places) == len(others) and sorted([*indices, *places]) == [*range(num_columns)]:
            return indices
        more = f", or {len(names) + len(others)} with labels and ignored columns" if others else ""
        fault = f"has {num_columns} columns and no header; the network was trained on {len(names)}{more}"
        raise RunError(f"{table.path} {fault}")
    if not is_table and len(table.names) == len(names) and not {*names} & {*table.names}:
        return list(range(len(names)))  # the network was trained on arrays, which name no columns
    if missing := [name for name in names if table.names.count(name) != 1]:
        is_twice = "appears twice" if missing[0] in table.names else "is missing"
        more = f", and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise RunError(f"{table.path}: column {missing[0]!r} {is_twice}{more}; there are {', '.join(table.names[:20])}")
    return [table.names.index(name) for name in names]


def _notes_on_unused(table: RawTable, indices: Sequence[int]) -> list[str]:
    """Return a note on the columns of a file without a header that are not features.

    A file of the features alone with one more column, such as a row index, may have as many columns.
    """
    unused = [k for k in range(len(table.names)) if k not in indices]
    if not unused:
        return []
    columns = f"{'column' if len(unused) == 1 else 'columns'} {listed(unused)}, counted from 0"
    fault = f"has no header and {len(table.names)} columns, as the training files: the network does not use {columns}"
    return [f"{table.path} {fault}"]


def _converted(
    cells: Any, column: Column, columns: TableColumns, data: DataSection
) -> tuple[NDArray[np.float64], Bits, list[CellFault], CellFault | None]:
    """Return a column as numbers, NaN if missing, or as numbers of categories, -1 if missing or unknown.

    Also return which cells are missing, if nothing replaces them, the faults, and the cells of unknown categories.
    """
    unknown_cells = None
    if column.kind == "number":
        numbers = as_numbers(cells, column.name, data)
        missing, found, values = numbers.missing, [*numbers.faults], numbers.values
        is_replaced = column.fill is not None
    else:
        texts, found = as_categories(plain_cells(cells), column.name, data)
        codes = _codes(texts, column.categories)
        missing, values, is_replaced = texts.codes < 0, codes.astype(np.float64), columns.missing in {"mean", "zero"}
        unknown = (codes < 0) & ~missing
        if unknown.any():
            known = ", ".join(column.categories[:10]) + (", …" if len(column.categories) > 10 else "")
            unknown_cells = cell_fault(cells, unknown, _UNKNOWN, f"they are {known}")
    return values, missing & (not is_replaced), found, unknown_cells


def _without_training_keys(fault: CellFault) -> CellFault:
    """Return a fault without a remedy that only a training could apply."""
    if not any(f"data.{key}" in fault.remedy for key in ("categorical", "ignore_columns", "missing_values")):
        return fault
    return replace(fault, remedy="the network needs values as in the training rows, numbers such as 1000 or 1e3")


def _codes(texts: Texts, words: Sequence[str]) -> NDArray[np.int64]:
    """Return each cell's index into words, -1 if it is missing or not among them."""
    index = {word: k for k, word in enumerate(words)}
    return np.array([*(index.get(word, -1) for word in texts.words), -1], dtype=np.int64)[texts.codes]


def _classes(cells: Any, classes: Sequence[str], data: DataSection) -> tuple[NDArray[np.int64], Bits, list[CellFault]]:
    """Return the class of each label, which labels are missing, and the faults. A 3 may be written as 3 or 3.0."""
    cells = plain_cells(cells)
    if need("pyarrow.types", "pyarrow").is_boolean(cells.type) and not data.text_labels:
        cells = cells.cast("int8")  # as in training, false is class 0 and true is class 1
    missing = null_cells(cells) if data.source == "parquet" else missing_labels(cells, data)
    texts = as_texts(cells, null_cells(cells))
    words = [word if word in classes else _whole(word) for word in texts.words]
    labels = _codes(Texts(tuple(words), texts.codes), classes)
    wrong: Bits = (labels < 0) & ~(missing & (data.missing == "drop_row"))
    if not wrong.any():
        return labels, missing, []
    known = ", ".join(classes[:10]) + (", …" if len(classes) > 10 else "")
    return labels, missing, [cell_fault(cells, wrong, _NO_CLASS, f"they are {known}")]


def _whole(word: str) -> str:
    try:
        return str(int(float(word))) if float(word).is_integer() else word
    except (ValueError, OverflowError):
        return word


def _encoding(columns: TableColumns) -> Encoding:
    counts = {k: len(column.categories) for k, column in enumerate(columns.columns) if column.kind == "category"}
    fill = np.array([column.fill or 0.0 for column in columns.columns])
    lookups = {k: np.arange(count) for k, count in counts.items()}
    return Encoding(fill, lookups, counts, one_hot=columns.categorical_encoding == "one_hot")
