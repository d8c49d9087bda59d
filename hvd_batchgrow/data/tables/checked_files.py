"""Check every cell of a table's file, and convert it to numbers, categories and labels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvd_batchgrow.config import DataSection
from hvd_batchgrow.data.tables.cells import (
    Bits,
    CellFault,
    Numbers,
    Texts,
    as_numbers,
    as_texts,
    cell_fault,
    is_text,
    missing_texts,
    type_fault,
)
from hvd_batchgrow.data.tables.columns import NUM_SHOWN, RawTable, find_roles
from hvd_batchgrow.data.tables.csv_dialect import MISSING_TEXTS, NUMBER
from hvd_batchgrow.data.tables.optional_packages import need
from hvd_batchgrow.messages.wording import counted

_MISSING = ("is missing", "are missing")
_WHOLE = ("is not a whole number", "are not whole numbers")
_LARGEST_LABEL = 2.0**53


@dataclass(frozen=True)
class TableFile:
    """One checked file."""

    table: RawTable
    names: tuple[str, ...]
    """Names of the features, in the order of the file."""
    values: NDArray[np.float64]
    """(n, features) NaN if a number is missing; columns of categories are 0."""
    categories: Mapping[int, Texts]
    """By index of the feature."""
    labels: NDArray[Any] | Texts
    """Classes (n,), or numbers (n, K)."""
    label_names: tuple[str, ...]
    """Names of the columns of the labels: one column of classes, or K of numbers."""
    missing: Bits
    """(n,) whether a row lacks its label, a number or a category."""
    notes: tuple[str, ...]


def check_file(table: RawTable, data: DataSection, *, strict: bool, as_values: bool = False) -> tuple[TableFile, str]:
    """Convert all columns of a file.

    Args:
        table: the file.
        data: defines the roles of columns and the treatment of missing cells.
        strict: as `find_roles`.
        as_values: whether the labels are numbers, (n, K), instead of classes.

    Returns:
        the file, and its faults, one per line; empty if it has no faults.

    Raises:
        JobError, RunError: as `find_roles`.
    """
    roles = find_roles(table, data, strict=strict)
    missing = np.zeros(table.num_rows, dtype=np.bool_)
    values = np.zeros((table.num_rows, len(roles.features)))
    categories: dict[int, Texts] = {}
    faults: list[tuple[str, CellFault]] = []
    notes = [f"{table.path}: the row index of pandas, {name!r}, is not used" for name in table.index]
    for k, column in enumerate(roles.features):
        name, cells = table.names[column], table.cells[column]
        if column in roles.categorical:
            categories[k], found = as_categories(plain_cells(cells), name, data)
            absent = categories[k].codes < 0
            notes += _notes_on_words(table, name, categories[k], data)
        else:
            numbers = as_numbers(cells, name, data)
            values[:, k], absent, found = numbers.values, numbers.missing, [*numbers.faults]
        if absent.any() and data.missing == "error":
            found.append(cell_fault(cells, absent, _MISSING, _missing_remedy(name)))
        missing |= absent
        faults += [(name, fault) for fault in found]
    columns: list[Any] = []
    for name, cells in ((table.names[k], table.cells[k]) for k in roles.labels):
        convert = target_numbers if as_values else _labels
        labels, absent, found = convert(plain_cells(cells), name, data)
        columns.append(labels)
        missing |= absent
        faults += [(name, fault) for fault in found]
    names = tuple(table.names[k] for k in roles.features)
    targets = np.stack(columns, axis=1) if as_values else columns[0]
    label_names = tuple(table.names[k] for k in roles.labels)
    file = TableFile(table, names, values, categories, targets, label_names, missing, tuple(notes))
    return file, listed_faults(table, faults)


def _missing_remedy(name: str) -> str:
    return f"set data.missing = 'mean' or 'drop_row', or skip the column with data.ignore_columns = [{name!r}]"


# --- categories ------------------------------------------------------------------------------


def as_categories(cells: Any, name: str, data: DataSection) -> tuple[Texts, list[CellFault]]:
    """Convert categories; in a csv file, empty cells and those in `data.missing_values` are missing."""
    if data.source == "parquet":
        missing = null_cells(cells)
        if not _has_words(cells.type):
            fault = type_fault(cells, ("a category", "categories"), f"data.ignore_columns = [{name!r}] skips it")
            return Texts((), np.zeros(len(cells), dtype=np.int64)), [fault]
    else:
        missing = missing_texts(cells, data.missing_values or ())
    return as_texts(cells, missing), []


def plain_cells(cells: Any) -> Any:
    """Return a column with categories replaced by their values, and all types of text as one type."""
    types = need("pyarrow.types", "pyarrow")
    cells = cells.cast(cells.type.value_type) if types.is_dictionary(cells.type) else cells
    return cells.cast("string") if is_text(cells.type) else cells


def _has_words(kind: Any) -> bool:
    types = need("pyarrow.types", "pyarrow")
    return is_text(kind) or types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind)


def null_cells(cells: Any) -> Bits:
    """Return which cells are null or NaN."""
    types = need("pyarrow.types", "pyarrow")
    nan_too = {"nan_is_null": True} if types.is_floating(cells.type) else {}
    return cells.is_null(**nan_too).to_numpy()  # type: ignore[no-any-return]


def _notes_on_words(table: RawTable, name: str, texts: Texts, data: DataSection) -> list[str]:
    """Name the categories of a csv file that pandas would take for missing values."""
    if data.source == "parquet" or data.missing_values is not None:
        return []
    found = ", ".join(repr(word) for word in texts.words if word in MISSING_TEXTS)
    return [f"{table.path}: column {name!r}: kept as a category, not as a missing value: {found}"] if found else []


# --- labels ----------------------------------------------------------------------------------


def _labels(cells: Any, name: str, data: DataSection) -> tuple[NDArray[np.int64] | Texts, Bits, list[CellFault]]:
    """Return labels as whole numbers or texts, which of them are missing, and the faults."""
    if data.source == "csv":
        return _csv_labels(cells, name, data)
    types, missing = need("pyarrow.types", "pyarrow"), null_cells(cells)
    if not (_has_words(cells.type) or types.is_decimal(cells.type)):
        fault = type_fault(cells, ("a label", "labels"), "data.label names another column")
        return np.zeros(len(cells), dtype=np.int64), missing, [fault]
    if data.text_labels or (data.text_labels is None and is_text(cells.type)):
        return as_texts(cells, missing), missing, _missing_labels(cells, missing, data)
    return _whole(cells, as_numbers(cells, name, data), data)


def _csv_labels(cells: Any, name: str, data: DataSection) -> tuple[NDArray[np.int64] | Texts, Bits, list[CellFault]]:
    """Convert labels to numbers if all are numbers, else to texts. Ambiguous labels are faults that name the key."""
    compute = need("pyarrow.compute", "pyarrow")
    missing = missing_labels(cells, data)
    faults = _missing_labels(cells, missing, data)
    if data.text_labels:
        return as_texts(cells, missing), missing, faults
    digits = compute.match_substring_regex(cells, f"^{NUMBER}$").to_numpy() & ~missing
    unclear = missing_texts(cells, data.missing_values) & ~missing
    words = ~(digits | missing | unclear)
    if data.text_labels is False or (digits.any() and not words.any()):
        return _whole(cells, as_numbers(cells, name, data), data)
    if digits.any():
        few, noun = (words, "text") if words.sum() <= digits.sum() else (digits, "number")
        remedy = "correct them, or data.text_labels = true makes a class of each distinct text"
        faults.append(cell_fault(cells, few, (f"is a {noun}, others are not", f"are {noun}s, others are not"), remedy))
    if unclear.any():
        what = "may be a class or a missing label", "may be classes or missing labels"
        remedy = 'data.text_labels = true makes classes of them, data.missing_values = ["NA", …] says they are missing'
        faults.append(cell_fault(cells, unclear, what, remedy))
    return as_texts(cells, missing), missing, faults


def missing_labels(cells: Any, data: DataSection) -> Bits:
    """Return which labels of a csv file are missing."""
    return missing_texts(cells, () if data.text_labels else data.missing_values or ())


def target_numbers(cells: Any, name: str, data: DataSection) -> tuple[NDArray[Any], Bits, list[CellFault]]:
    """Return a column of targets as numbers, which of them are missing, and the faults."""
    numbers = as_numbers(cells, name, data)
    return numbers.values, numbers.missing, [*numbers.faults, *_missing_labels(cells, numbers.missing, data)]


def _missing_labels(cells: Any, missing: Bits, data: DataSection) -> list[CellFault]:
    if not missing.any() or data.missing == "drop_row":
        return []
    return [cell_fault(cells, missing, _MISSING, "data.missing = 'drop_row' skips rows without a label")]


def _whole(cells: Any, numbers: Numbers, data: DataSection) -> tuple[NDArray[np.int64], Bits, list[CellFault]]:
    """Convert numbers to labels."""
    values, missing = numbers.values, numbers.missing
    known = np.where(np.isfinite(values), values, 0.5)  # 0.5 marks unreadable labels as wrong: it is not a whole number
    wrong = ((known != np.floor(known)) | (np.abs(known) > _LARGEST_LABEL)) & ~missing
    faults = _missing_labels(cells, missing, data)
    if is_text(cells.type) and data.source == "parquet":
        return np.zeros(len(cells), dtype=np.int64), missing, [*faults, *numbers.faults]
    if wrong.any():
        remedy = "data.label names another column, data.text_labels = true makes a class of each distinct text"
        numbers_too = "for numbers, set task.name = 'regression' or give your own task the attribute target = 'values'"
        faults.append(cell_fault(cells, wrong, _WHOLE, f"{remedy}; {numbers_too}"))
    negative = (known < 0) & ~missing & ~wrong
    if negative.any():
        remedy = "correct them, or data.text_labels = true makes a class of each distinct text"
        faults.append(cell_fault(cells, negative, ("is negative", "are negative"), remedy))
    return np.where(wrong | missing, 0, known).astype(np.int64), missing, faults


# --- messages --------------------------------------------------------------------------------


def listed_faults(table: RawTable, faults: Sequence[tuple[str, CellFault]]) -> str:
    """Return the message with all faults of a file; empty if it has no faults."""
    lines = [*_ragged(table), *_columns(table, faults)]
    if len(lines) <= 1:
        return f"{table.path}: {lines[0]}" if lines else ""
    return "\n  ".join([f"{table.path}: {counted(len(lines), 'fault')}", *lines])


def _ragged(table: RawTable) -> Iterator[str]:
    if table.ragged:
        places = table.ragged_places()
        more = f"; and {len(table.ragged) - len(places):,} more" if len(table.ragged) > len(places) else ""
        yield f"{counted(len(table.ragged), 'row')} of another length: {'; '.join(places)}{more}"


def _columns(table: RawTable, faults: Sequence[tuple[str, CellFault]]) -> Iterator[str]:
    shown = faults[: 2 * NUM_SHOWN]
    rows = sorted({row for _, fault in shown for row in fault.rows})
    places = dict(zip(rows, table.places(rows), strict=True))
    for name, fault in shown:
        cells = "; ".join(f"{places[row]}: {value}" for row, value in zip(fault.rows, fault.values, strict=True))
        more = f"; and {fault.count - len(fault.rows):,} more" if fault.count > len(fault.rows) else ""
        amount = f"{fault.count:,} of {counted(table.num_rows, 'cell')} {fault.what[fault.count > 1]}"
        yield f"column {name!r}: {amount}: {cells}{more}; {fault.remedy}"
    if len(faults) > len(shown):
        yield f"and {counted(len(faults) - len(shown), 'more fault')} in other columns"
