"""Parse the files of a table, and join them into arrays for the cache."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvd_batchgrow.config import DataSection
from hvd_batchgrow.config.source_specs import ReportProgress
from hvd_batchgrow.data.datasets.cache import Arrays
from hvd_batchgrow.data.datasets.targets import as_float32, check_digits
from hvd_batchgrow.data.tables.cells import Texts, recoded, sorted_words
from hvd_batchgrow.data.tables.checked_files import TableFile, check_file
from hvd_batchgrow.data.tables.columns import NUM_SHOWN, RawTable, read_table
from hvd_batchgrow.data.tables.csv_dialect import csv_form
from hvd_batchgrow.messages.errors import RunError
from hvd_batchgrow.messages.wording import listed

Parts = Mapping[str, Sequence[TableFile]]
"""The files of `train` and `test`."""


def parse(
    paths: Mapping[str, Sequence[Path]], data: DataSection, report: ReportProgress, *, as_values: bool = False
) -> Arrays:
    """Read and check all files of a table.

    Args:
        paths: for `train` and, unless rows are held out, `test`.
        data: the section.
        report: called with the progress of each file.
        as_values: whether the labels are numbers instead of classes.

    Returns:
        names: of the feature columns; label_names: of the label columns; categories_K: the categories of column K in
        all files; classes: if labels are texts; PART_values (n, columns), float32 or float64: numbers, NaN if missing,
        and codes of categories, -1 if missing; PART_labels (n,), or (n, K) of float32; PART_ends: the cumulative number
        of rows of the files; PART_kept: the rows that are kept, if some are not; notes.

    Raises:
        JobError: a column does not exist.
        RunError: with all faults of all files.
    """
    parts: dict[str, list[TableFile]] = {}
    faults = []
    for part, files in paths.items():
        parts[part] = []
        for path in files:
            size = path.stat().st_size
            report(f"reading {path.name}", 0, size)
            file, fault = check_file(
                read_table(path, data), data, strict=path == paths["train"][0], as_values=as_values
            )
            report(f"reading {path.name}", size, size)
            parts[part].append(file)
            faults += [fault] if fault else []
    if faults:
        raise RunError("\n".join(faults))
    first = parts["train"][0]
    for file in (file for files in parts.values() for file in files):
        _check_alike(first, file)
    return _joined(parts, data)


def _check_alike(first: TableFile, other: TableFile) -> None:
    paths = first.table.path, other.table.path
    if first.names != other.names:
        pairs = zip(first.names, other.names, strict=False)
        differing = [f"{a!r} and {b!r}" for a, b in pairs if a != b] or ["the number of them"]
        counts = f"{paths[0]} has {len(first.names)} features and {paths[1]} {len(other.names)}"
        raise RunError(f"{counts}, and they must be the same in the same order; the first that differs: {differing[0]}")
    if first.label_names != other.label_names:
        ours, theirs = (", ".join(map(repr, file.label_names)) for file in (first, other))
        fault = f"the label of {paths[0]} is {ours}, that of {paths[1]} is {theirs}, and they must have the same name"
        raise RunError(f"{fault}; data.label names the column, which by default is the last one")
    kinds = ["text" if isinstance(file.labels, Texts) else "numbers" for file in (first, other)]
    if kinds[0] != kinds[1]:
        found = f"are {kinds[0]} in {paths[0]} and {kinds[1]} in {paths[1]}"
        raise RunError(
            f"labels {found}: they must be the same kind in all files; data.text_labels = true reads all as text"
        )


def _joined(parts: Parts, data: DataSection) -> Arrays:
    first = parts["train"][0]
    arrays: dict[str, NDArray[Any]] = {"names": np.array(first.names), "label_names": np.array(first.label_names)}
    kept = {part: [_kept(file, data) for file in files] for part, files in parts.items()}
    notes = [note for files in parts.values() for file in files for note in file.notes]
    for part, files in parts.items():
        total = sum(len(rows) for rows in kept[part])
        arrays[f"{part}_ends"] = np.cumsum([file.table.num_rows for file in files])
        if not total:
            raise RunError(f"{files[0].table.path}: a value is missing in every row: nothing is left")
        notes += _notes_on_rows(files, kept[part])
        if total < arrays[f"{part}_ends"][-1]:
            starts = [0, *arrays[f"{part}_ends"].tolist()]
            arrays[f"{part}_kept"] = np.concatenate([s + rows for s, rows in zip(starts, kept[part], strict=False)])
    values = {
        part: np.concatenate([file.values[rows] for file, rows in zip(files, kept[part], strict=True)])
        for part, files in parts.items()
    }
    for column in first.categories:
        words = _words(parts, column)
        arrays[f"categories_{column}"] = np.array(words)
        for part, files in parts.items():
            codes = [recoded(f.categories[column], words)[rows] for f, rows in zip(files, kept[part], strict=True)]
            values[part][:, column] = np.concatenate(codes)
    narrow = all(_fits(part) for part in values.values())
    arrays |= {f"{part}_values": found.astype(np.float32) if narrow else found for part, found in values.items()}
    arrays |= _labels(parts, kept)
    if arrays["train_labels"].ndim == 2:  # numbers
        check_digits(arrays["train_labels"], f"{first.table.path}, training rows", first.label_names)
        arrays |= {key: as_float32(arrays[key]) for key in (f"{part}_labels" for part in parts)}
    return arrays | ({"notes": np.array(list(dict.fromkeys(notes)))} if notes else {})


def _kept(file: TableFile, data: DataSection) -> NDArray[np.int64]:
    """Return the rows of a file that are kept."""
    skipped = file.missing if data.missing == "drop_row" else np.zeros_like(file.missing)
    return np.flatnonzero(~skipped)


def _notes_on_rows(files: Sequence[TableFile], kept: Sequence[NDArray[np.int64]]) -> Iterator[str]:
    for file, rows in zip(files, kept, strict=True):
        if dropped := file.table.num_rows - len(rows):
            yield f"{file.table.path}: {dropped:,} of {file.table.num_rows:,} rows are skipped: a value is missing"


def _words(parts: Parts, column: int) -> tuple[str, ...]:
    """Return the categories of a column in all files."""
    words = sorted_words({word for files in parts.values() for file in files for word in file.categories[column].words})
    if not words:
        first = parts["train"][0]
        raise RunError(f"{first.table.path}: column {first.names[column]!r} has no category: all its cells are missing")
    return words


def _fits(values: NDArray[np.float64]) -> bool:
    """Return whether float32 represents all numbers exactly."""
    with np.errstate(over="ignore", under="ignore"):
        narrow = values.astype(np.float32)
    return bool(((narrow == values) | np.isnan(values)).all())


def narrowed(values: NDArray[np.float64]) -> NDArray[Any]:
    """Return numbers as float32 if that is exact, else unchanged."""
    return values.astype(np.float32) if _fits(values) else values


def _labels(parts: Parts, kept: Mapping[str, Sequence[NDArray[np.int64]]]) -> dict[str, NDArray[Any]]:
    """Return the labels of each part; texts become indices into the sorted texts of the training files."""
    found: dict[str, list[Any]] = {
        part: [_some(file.labels, rows) for file, rows in zip(files, kept[part], strict=True)]
        for part, files in parts.items()
    }
    if not isinstance(found["train"][0], Texts):
        return {f"{part}_labels": np.concatenate(labels) for part, labels in found.items()}
    classes = sorted({word for texts in found["train"] for word in texts.words})
    for file, rows, texts in zip(parts.get("test", ()), kept.get("test", ()), found.get("test", ()), strict=True):
        _check_known(file, rows, texts, classes)
    return {"classes": np.array(classes)} | {
        f"{part}_labels": np.concatenate([recoded(texts, classes) for texts in labels])
        for part, labels in found.items()
    }


def _some(labels: NDArray[Any] | Texts, rows: NDArray[np.int64]) -> NDArray[Any] | Texts:
    """Return the labels of some rows; texts keep only the words that occur in them."""
    if not isinstance(labels, Texts):
        return labels[rows]
    used, codes = np.unique(labels.codes[rows], return_inverse=True)
    return Texts(tuple(labels.words[k] for k in used.tolist()), codes)


def _check_known(file: TableFile, rows: NDArray[np.int64], texts: Texts, classes: Sequence[str]) -> None:
    unknown = [k for k, word in enumerate(texts.words) if word not in set(classes)]
    wrong = np.flatnonzero(np.isin(texts.codes, unknown))
    if len(wrong):
        first = wrong[:NUM_SHOWN].tolist()
        places = file.table.places(rows[first].tolist())
        labels = [f"{p}: {texts.words[texts.codes[k]]!r}" for p, k in zip(places, first, strict=True)]
        shown = listed([*labels, *wrong[NUM_SHOWN:]], NUM_SHOWN, separator="; ")
        known = ", ".join(classes[:NUM_SHOWN]) + (", …" if len(classes) > NUM_SHOWN else "")
        are = "label is" if len(wrong) == 1 else "labels are"
        fault = f"{len(wrong):,} {are} not among the {len(classes)} of the training rows ({known})"
        raise RunError(f"{file.table.path}: {fault}: {shown}")


class Places:
    """The locations of a part's rows, for messages: `data/train.csv, line 3`.

    Args:
        files: of the part, in order.
        arrays: of `parse`.
        part: `train` or `test`.
        data: how to read the files, in which locations are looked up.
    """

    def __init__(self, files: Sequence[Path], arrays: Arrays, part: str, data: DataSection) -> None:
        self._files, self._data = files, data
        self._ends, self._kept = arrays[f"{part}_ends"], arrays.get(f"{part}_kept")

    def __call__(self, row: int) -> str:
        """Return the location of a row."""
        row = row if self._kept is None else int(self._kept[row])
        number = int(np.searchsorted(self._ends, row, side="right"))
        path, row = self._files[number], row - (int(self._ends[number - 1]) if number else 0)
        try:
            form = csv_form(path, self._data.separator, self._data.header) if self._data.source == "csv" else None
            (place,) = RawTable(path, (), (), form).places([row])
        except RunError:  # the file has changed since
            place = f"data row {row + 1}"
        return f"{path}, {place}"
