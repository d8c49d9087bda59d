"""Detect the form of a csv file: its separator, and whether its first line is a header."""

from __future__ import annotations

import codecs
import csv
import io
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from hvd_batchgrow.data.datasets.compressed import unpacking
from hvd_batchgrow.data.tables.optional_packages import arrow_path, need
from hvd_batchgrow.messages.errors import RunError

NUMBER = r"[+-]?(\d+([.,]\d*)?|[.,]\d+)([eE][+-]?\d+)?"
"""A number with either decimal mark."""
MISSING_TEXTS = (
    *("", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A", "NA"),
    *("NULL", "NaN", "None", "n/a", "nan", "null"),
)
"""Texts that pandas.read_csv treats as missing values."""
_SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars", " ": "spaces"}
_HEAD_BYTES = 1 << 18
_HEAD_ROWS = 100
"""Lines that are examined to detect the form."""
_UNPACKED = {".gz", ".bz2", ".zst", ".lz4"}
"""Suffixes of files that pyarrow unpacks while it reads them."""
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


@dataclass(frozen=True)
class CsvForm:
    """How to read a csv file."""

    separator: str
    header: bool
    names: tuple[str, ...]
    """Names of the columns, without surrounding spaces; "0", "1", … if the file has no header."""
    skip_lines: int = 0
    """Lines before the first row: empty ones, and Excel's `sep=;`."""


def csv_form(path: Path, separator: str | None = None, header: bool | None = None) -> CsvForm:
    """Detect the form of a csv file from its first lines.

    Args:
        path: the file, compressed or not.
        separator: from the job; None: the one that splits all lines into the same number of fields, at least two.
        header: from the job; None: the first line is a header, unless one of its fields could be a value.

    Raises:
        RunError: the file is empty or not UTF-8, or its form is ambiguous; the message names the key that decides.
    """
    text = _head(path)
    declared = re.match(r'"?sep=([\t ,;:|])"?\r?\n', text)
    text = text[declared.end() :] if declared else text
    empty_lines = text[: len(text) - len(text.lstrip("\r\n"))].splitlines()
    text = text.lstrip("\r\n")
    if not text:
        raise RunError(f"{path} is empty")
    separator = separator or (declared[1] if declared else None) or _separator(path, text)
    rows = _rows(path, text, separator)
    if separator == " " and any("" in row for row in rows):
        remedy = "turn each run into one comma: sed -E 's/^ +//; s/ +/,/g'"
        raise RunError(f"{path}: its columns are separated by several spaces, which is not supported; {remedy}")
    if header is None:
        _refuse_unclear_header(path, rows)
        header = True
    if header and len(rows) > 1 and all(len(row) == len(rows[0]) + 1 for row in rows[1:]):
        fault = f"its rows have {len(rows[1])} fields and its header {len(rows[0])}"
        raise RunError(f"{path}: {fault}: name the first column (row names, as R writes them), or remove that column")
    names = tuple(rows[0] if header else map(str, range(len(rows[0]))))
    return CsvForm(separator, header, names, bool(declared) + len(empty_lines))


def _head(path: Path) -> str:
    """Return the first complete lines, as text."""
    arrow = need("pyarrow", "pyarrow")
    try:
        with arrow.input_stream(arrow_path(path), compression="detect") as file:
            data = more = file.read(_HEAD_BYTES)
            while more and data.count(b"\n") < 2:
                data += (more := file.read(_HEAD_BYTES))
    except (OSError, arrow.ArrowException) as error:
        raise RunError(f"{path} cannot be read: {error}") from None
    if data.startswith(_UTF16):
        raise RunError(f"{path} is UTF-16, not UTF-8: iconv -f UTF-16 -t UTF-8 {path.name} > utf8.csv")
    if more:
        data = data[: data.rfind(b"\n") + 1] or data
    try:
        return str(data, "utf-8-sig")
    except UnicodeDecodeError as error:
        raise not_utf8(path, data[: error.start].count(b"\n") + 1) from None


def not_utf8(path: Path, line: int) -> RunError:
    """Return the error for a line that is not UTF-8."""
    if path.suffix not in _UNPACKED and (command := unpacking(path)):
        return RunError(f"{path} is compressed; unpack it: {command}")
    return RunError(f"{path}, line {line}: not UTF-8; iconv -f LATIN1 -t UTF-8 converts a Latin-1 file")


def _rows(path: Path, text: str, separator: str) -> list[list[str]]:
    """Return the fields of the first non-empty lines, at least one, without surrounding spaces."""
    reader, rows = csv.reader(io.StringIO(text, newline=""), delimiter=separator), []
    try:
        for row in reader:
            rows += [[field.strip() for field in row]] if row else []
            if len(rows) == _HEAD_ROWS:
                break
    except csv.Error as error:  # after the first row, the reader of the whole file reports it
        if not rows:
            raise RunError(f"{path}: its first line cannot be split ({error}): is a quotation mark missing?") from None
    return rows


def _separator(path: Path, text: str) -> str:
    found = {mark: _rows(path, text, mark) for mark in _SEPARATORS}
    fitting = [mark for mark, rows in found.items() if _is_regular(rows)]
    fitting = [mark for mark in fitting if mark != " "] or fitting
    if len(fitting) > 1:
        marks = " or ".join(f"{_SEPARATORS[mark]} ({len(found[mark][0])} columns)" for mark in fitting)
        keys = " or ".join(f"data.separator = {_toml(mark)}" for mark in fitting)
        raise RunError(f"{path}: its columns could be separated by {marks}; {keys} settles it")
    if fitting:
        return fitting[0]
    # The reader reports irregular rows with their lines; assume the separator that splits the header.
    widths = {mark: len(rows[0]) for mark, rows in found.items() if mark != " "}
    return max(widths, key=lambda mark: widths[mark])


def _toml(mark: str) -> str:
    return '"\\t"' if mark == "\t" else f'"{mark}"'


def _is_regular(rows: Sequence[Sequence[str]]) -> bool:
    return len(rows[0]) > 1 and all(len(row) == len(rows[0]) for row in rows)


def _refuse_unclear_header(path: Path, rows: Sequence[Sequence[str]]) -> None:
    """Raise RunError if the first line could be a row: pandas and R write files with and without a header."""
    first = rows[0]
    shown = ",".join(first)[:60]
    values = [field for field in first if _is_value(field)]
    below = [[row[k] for row in rows[1:] if len(row) > k] for k in range(len(first))]
    again = [field for field, fields in zip(first, below, strict=True) if field and field in fields]
    over_numbers = any(fields and all(re.fullmatch(NUMBER, field) for field in fields) for fields in below)
    if not values and (over_numbers or not again):
        return
    what = (
        f"{len(values)} of its {len(first)} fields could be values"
        if values
        else f"{again[0]!r} is a value below it too"
    )
    fault = f"{path}: its first line, {shown}, may be a header or a row: {what}"
    raise RunError(f"{fault}; data.header = false if it is a row, true if it holds the names of the columns")


def _is_value(field: str) -> bool:
    """Return whether a field is more likely a value than a column name: a number, a date, or a missing value."""
    is_date = any(mark.isdigit() for mark in field) and not any(mark.isalpha() for mark in field)
    return bool(re.fullmatch(NUMBER, field)) or is_date or field in {*MISSING_TEXTS, "?", "-"} - {""}


def record_lines(path: Path, form: CsvForm, records: Sequence[int]) -> dict[int, int]:
    """Return the line, from 1, on which each record starts.

    Args:
        path: the file.
        form: of the file.
        records: record numbers, from 0, including the header but not empty lines.
    """
    wanted = set(records)
    upto = islice(_starts(path, form), max(wanted, default=-1) + 1)
    return {number: line for number, line in enumerate(upto) if number in wanted}


def _starts(path: Path, form: CsvForm) -> Iterator[int]:
    stream = io.BufferedReader(need("pyarrow", "pyarrow").input_stream(arrow_path(path), compression="detect"))
    with io.TextIOWrapper(stream, "utf-8-sig", errors="replace", newline="") as file:
        for _ in range(form.skip_lines):
            file.readline()
        reader = csv.reader(file, delimiter=form.separator)
        before = 0
        with suppress(csv.Error):  # a field of more than 128 KiB: later records are not found
            for row in reader:
                if row:
                    yield form.skip_lines + before + 1
                before = reader.line_num
