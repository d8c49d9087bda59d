"""Convert the cells of a column to float64 numbers or texts, and collect the faults."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvd_batchgrow.config import DataSection
from hvd_batchgrow.data.datasets.normalization import loses_digits
from hvd_batchgrow.data.tables.columns import NUM_SHOWN
from hvd_batchgrow.data.tables.csv_dialect import MISSING_TEXTS, NUMBER
from hvd_batchgrow.data.tables.optional_packages import need

_TRUTH = {"true": 1.0, "True": 1.0, "TRUE": 1.0, "false": 0.0, "False": 0.0, "FALSE": 0.0}
_SECONDS = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
_LARGEST_EXACT = 2.0**53
Bits = NDArray[np.bool_]


@dataclass(frozen=True)
class CellFault:
    """Cells of a column that cannot be used for the same reason."""

    rows: Sequence[int]
    """Rows of the first ten, from 0."""
    values: Sequence[str]
    """Contents of the first ten."""
    count: int
    what: tuple[str, str]
    """The fault in singular and plural: `is missing`, `are missing`."""
    remedy: str


@dataclass(frozen=True)
class Numbers:
    """A column as numbers."""

    values: NDArray[np.float64]
    """(n,) NaN if a cell is missing or invalid."""
    missing: Bits
    faults: tuple[CellFault, ...] = ()


@dataclass(frozen=True)
class Texts:
    """A column as texts, each stored once."""

    words: tuple[str, ...]
    codes: NDArray[np.int64]
    """(n,) index into the words; -1 if a cell is missing."""


def cell_fault(cells: Any, wrong: Bits, what: tuple[str, str], remedy: str) -> CellFault:
    """Return the fault of the marked cells of a column."""
    rows = np.flatnonzero(wrong)
    first = rows[:NUM_SHOWN].tolist()
    return CellFault(first, [_shown(cells[row].as_py()) for row in first], len(rows), what, remedy)


def type_fault(cells: Any, nouns: tuple[str, str], remedy: str) -> CellFault:
    """Return the fault of a column of a wrong type.

    Args:
        cells: the column.
        nouns: what one cell, and several cells, must be.
        remedy: what to do.
    """
    types, kind = need("pyarrow.types", "pyarrow"), cells.type
    found = f"categories of {kind.value_type}" if types.is_dictionary(kind) else "text" if is_text(kind) else str(kind)
    what = f"is {found}, not {nouns[0]}", f"are {found}, not {nouns[1]}"
    return cell_fault(cells, np.ones(len(cells), dtype=np.bool_), what, remedy)


def _shown(value: Any) -> str:
    text = repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= 40 else f"{text[:39]}…"


# --- numbers ---------------------------------------------------------------------------------


def as_numbers(cells: Any, name: str, data: DataSection) -> Numbers:
    """Convert a column of features to float64.

    Numbers in csv texts, integers, floating-point and decimal numbers keep their value. True and false become 1 and 0.
    Dates and time stamps become seconds since 1970-01-01 UTC; without a time zone, they are taken as UTC. Times of day
    become seconds since midnight, and durations become seconds.

    Args:
        cells: a chunked array of pyarrow.
        name: of the column.
        data: defines missing values and the decimal mark.
    """
    types = need("pyarrow.types", "pyarrow")
    kind = cells.type
    if types.is_decimal(kind):
        cells, data = cells.cast("string"), data.model_copy(update={"missing_values": (), "decimal": "."})
    if data.source != "parquet" or types.is_decimal(kind):
        return _of_texts(cells, name, data)
    if types.is_floating(kind):
        values = cells.cast("float64").to_numpy()
        return _checked(cells, values, np.isnan(values))
    missing = cells.is_null().to_numpy()
    if types.is_null(kind):
        return Numbers(np.full(len(cells), np.nan), missing)
    if types.is_boolean(kind):
        return Numbers(cells.cast("uint8").cast("float64").to_numpy(), missing)
    unit = _unit(types, kind)
    return _of_integers(cells, missing, unit) if unit else _refused(cells, name)


def _refused(cells: Any, name: str) -> Numbers:
    """Return the fault of a column whose type is not numeric."""
    types, kind = need("pyarrow.types", "pyarrow"), cells.type
    remedy = f"data.ignore_columns = [{name!r}] skips it"
    if is_text(kind) or types.is_dictionary(kind):
        remedy = f"data.categorical = [{name!r}] treats it as categories, {remedy}"
    fault = type_fault(cells, ("a number", "numbers"), remedy)
    return Numbers(np.zeros(len(cells)), np.zeros(len(cells), dtype=np.bool_), (fault,))


def is_text(kind: Any) -> bool:
    """Return whether a type of pyarrow is text, or categories of text."""
    types = need("pyarrow.types", "pyarrow")
    kind = kind.value_type if types.is_dictionary(kind) else kind
    return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind))


def _unit(types: Any, kind: Any) -> int | None:
    """Return how many units of an integer type are 1, or one second; None if the type is not based on integers."""
    if types.is_integer(kind) or types.is_date32(kind):
        return 1
    if types.is_date64(kind):
        return _SECONDS["ms"]
    if types.is_timestamp(kind) or types.is_duration(kind) or types.is_time(kind):
        return _SECONDS[kind.unit]
    return None


def _of_integers(cells: Any, missing: Bits, unit: int) -> Numbers:
    arrow, types = need("pyarrow", "pyarrow"), need("pyarrow.types", "pyarrow")
    wide = "uint64" if cells.type == arrow.uint64() else "int64"
    narrow = "int32" if types.is_date32(cells.type) or types.is_time32(cells.type) else None
    integers = (cells.cast(narrow) if narrow else cells).cast(wide).fill_null(0).to_numpy()
    if types.is_date32(cells.type):
        integers = integers * 86_400
    exact = integers.astype(np.longdouble) / unit
    values = np.where(missing, np.nan, exact.astype(np.float64))
    present = exact[~missing]
    if len(present) and np.abs(integers).max() > _LARGEST_EXACT and loses_digits(present):
        return Numbers(values, missing, (_lost_digits(cells, missing),))
    return Numbers(values, missing)


def _lost_digits(cells: Any, missing: Bits) -> CellFault:
    what = "needs more digits than float64 has", "need more digits than float64 has, and differ too little"
    return cell_fault(cells, ~missing, what, "subtract a constant, such as the smallest of them")


def _of_texts(cells: Any, name: str, data: DataSection) -> Numbers:
    compute, arrow = need("pyarrow.compute", "pyarrow"), need("pyarrow", "pyarrow")
    missing = missing_texts(cells, data.missing_values)
    present = compute.if_else(arrow.array(~missing), cells, None)
    number = f"^{NUMBER.replace('.,', re.escape(data.decimal))}$"
    plain = present if data.decimal == "." else compute.replace_substring(present, data.decimal, ".")
    try:
        if data.decimal != "." and compute.any(compute.match_substring(present, ".")).as_py():
            raise arrow.ArrowInvalid("a point where the mark of decimals is another")
        values = plain.cast("float64").to_numpy()
    except arrow.ArrowInvalid:
        if (truth := _truth(present)) is not None:
            return Numbers(truth, missing)
        right = compute.match_substring_regex(present, number).fill_null(False)
        values = compute.if_else(right, plain, None).cast("float64").to_numpy()
    found = _checked(cells, values, missing, _remedy(cells, np.isfinite(values) | missing, name, data))
    if not found.faults and _is_suspicious(values[~missing]) and _texts_lose_digits(plain.drop_null()):
        return Numbers(values, missing, (_lost_digits(cells, missing),))
    return found


def missing_texts(cells: Any, texts: Sequence[str] | None) -> Bits:
    """Return which texts are missing: empty, null or one of the given texts; None: one of `MISSING_TEXTS`."""
    compute, arrow = need("pyarrow.compute", "pyarrow"), need("pyarrow", "pyarrow")
    listed = arrow.array(["", *(MISSING_TEXTS if texts is None else texts)])
    return compute.or_(compute.is_in(cells, value_set=listed), cells.is_null()).to_numpy()  # type: ignore[no-any-return]


def _truth(present: Any) -> NDArray[np.float64] | None:
    """Return 1 for true and 0 for false; None if the column has other texts."""
    if not {text for text in present.unique().to_pylist() if text is not None} <= set(_TRUTH):
        return None
    return np.array([_TRUTH.get(text, np.nan) for text in present.to_pylist()])


def _checked(cells: Any, values: NDArray[np.float64], missing: Bits, remedy: str = "correct them") -> Numbers:
    """Return the finite numbers, with all other cells that are not missing as faults."""
    wrong = ~np.isfinite(values) & ~missing
    if not wrong.any():
        return Numbers(values, missing)
    what = "is not a finite number", "are not finite numbers"
    return Numbers(np.where(wrong, np.nan, values), missing, (cell_fault(cells, wrong, what, remedy),))


def _remedy(cells: Any, right: Bits, name: str, data: DataSection) -> str:
    """Return the remedy for texts among numbers, judged by the first text."""
    if right.all():
        return ""
    first = cells[int(np.argmin(right))].as_py()
    if re.fullmatch(r"[+-]?\d*,\d+([eE][+-]?\d+)?", first) and data.decimal == ".":
        return 'data.decimal = "," if the comma marks decimals'
    if re.match(r"\d{4}-\d\d-\d\d", first):
        return "write dates as numbers, such as seconds since 1970, or convert the file to parquet"
    if right.sum() > len(right) / 2:
        return 'write a number as 1000 or 1e3; data.missing_values = ["", …] lists texts that mean a missing value'
    return f"data.categorical = [{name!r}] treats it as categories, data.ignore_columns = [{name!r}] skips it"


def _is_suspicious(values: NDArray[np.float64]) -> bool:
    """Return whether values are so close that their texts may differ by less than the resolution of float64."""
    if not len(values):
        return False
    low, high = values.min(), values.max()
    return bool(high - low < np.spacing(max(abs(low), abs(high))) * 2**14)


def _texts_lose_digits(texts: Any) -> bool:
    """Return `loses_digits` for texts with any number of digits."""
    distinct = texts.unique().to_pylist()
    if len(distinct) == 1:
        return False
    exact = [Decimal(text) for text in distinct]
    error = max(abs(number - Decimal(float(number))) for number in exact)
    return error * 2**14 > max(exact) - min(exact)


# --- texts -----------------------------------------------------------------------------------


def as_texts(cells: Any, missing: Bits) -> Texts:
    """Convert a column of labels or categories to texts.

    Args:
        cells: texts, numbers or booleans; whole numbers are written without a decimal point.
        missing: (n,) which cells are missing.
    """
    compute, arrow = need("pyarrow.compute", "pyarrow"), need("pyarrow", "pyarrow")
    types = need("pyarrow.types", "pyarrow")
    if types.is_floating(cells.type):
        texts = [str(int(x)) if x is not None and x.is_integer() else x and str(x) for x in cells.to_pylist()]
        cells = arrow.chunked_array([arrow.array(texts, arrow.string())])
    cells = compute.if_else(arrow.array(~missing), cells.cast("string"), None)
    chunks = cells.dictionary_encode().unify_dictionaries().chunks
    codes = [chunk.indices.fill_null(-1).to_numpy().astype(np.int64) for chunk in chunks]
    words = chunks[0].dictionary.to_pylist() if chunks else []
    return Texts(tuple(words), np.concatenate(codes) if codes else np.zeros(0, dtype=np.int64))


def sorted_words(words: set[str]) -> tuple[str, ...]:
    """Return texts in the order of their characters, or by value if all of them are numbers."""
    if all(re.fullmatch(NUMBER, word) for word in words):
        return tuple(sorted(words, key=lambda word: (float(word.replace(",", ".")), word)))
    return tuple(sorted(words))


def recoded(texts: Texts, words: Sequence[str]) -> NDArray[np.int64]:
    """Return each cell's index into other words, which contain all its words; -1 if the cell is missing."""
    index = {word: k for k, word in enumerate(words)}
    return np.array([*(index[word] for word in texts.words), -1], dtype=np.int64)[texts.codes]
