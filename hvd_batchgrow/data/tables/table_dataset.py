"""The source of a parsed table: training and test rows, and statistics of the training rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hvd_batchgrow.config import DataSection
from hvd_batchgrow.config.source_specs import ReportProgress
from hvd_batchgrow.config.split import num_held_out
from hvd_batchgrow.data.datasets.cache import Arrays, cached_arrays
from hvd_batchgrow.data.datasets.class_labels import check_range, count_classes
from hvd_batchgrow.data.datasets.dataset import Datasets, Ids
from hvd_batchgrow.data.datasets.normalization import present_means, row_moments
from hvd_batchgrow.data.datasets.targets import check_numbers, value_schema
from hvd_batchgrow.data.order.stream import Stream
from hvd_batchgrow.data.tables.columns import NUM_SHOWN
from hvd_batchgrow.data.tables.rows import Encoding, Rows, known
from hvd_batchgrow.messages.errors import Fault, JobError, RunError
from hvd_batchgrow.messages.wording import counted, listed

_FEW_CLASSES = 32
"""Up to this number, text classes need no key, even if there are few rows."""


@dataclass(frozen=True)
class Table:
    """A parsed table, and the identity of its cache."""

    kind: str
    identity: str
    stamp: list[Any]
    name: str
    """Used in messages."""
    arrays: Arrays
    """From `parse`."""
    places: Mapping[str, Callable[[int], str]]
    """For each part, returns the location of a row."""

    def categories(self) -> dict[int, tuple[str, ...]]:
        """Return the categories of each categorical column, in all files."""
        keys = {k: f"categories_{k}" for k in range(len(self.arrays["names"]))}
        return {k: tuple(map(str, self.arrays[key])) for k, key in keys.items() if key in self.arrays}


def table_source(table: Table, data: DataSection, seed: int, report: ReportProgress) -> Datasets:
    """Return the source of a table; its rows stay mapped from the cache.

    Args:
        table: parsed.
        data: the section.
        seed: draws the held-out rows.
        report: called with the progress over the training rows.

    Raises:
        JobError: the labels do not determine the classes, or exceed the job's number of classes.
        RunError: a label is not among the classes, a category is unknown, or a number cannot be standardized.
    """
    labels = tuple(map(str, table.arrays.get("label_names", ())))
    names = labels if table.arrays["train_labels"].ndim == 2 else ()  # of numbers
    classes, first, num_classes = (names, 0, len(names)) if names else _classes(table, data)
    fit = _fit(table, data, seed, report)
    train, test = (_rows(table, fit, part, first, data) for part in ("train", "test"))
    mean, std = train.encoding.spread(fit["mean"], 0.0), train.encoding.spread(fit["std"], 1.0)
    notes = tuple(str(note) for arrays in (table.arrays, fit) for note in arrays.get("notes", ()))
    schema = _schema(table, fit, train.encoding, classes, first) | {"label_columns": list(labels)}
    if names:
        for part, targets in (("training", train.targets), ("test", test.targets)):
            check_numbers(targets, f"{table.name}, {part} rows, as float32")
        schema |= value_schema(train.targets, names)
    return Datasets(train, test, num_classes, tuple(mean.tolist()), tuple(std.tolist()), notes, schema)


def _classes(table: Table, data: DataSection) -> tuple[tuple[str, ...], int, int]:
    """Return the names of the classes, if labels are texts; the smallest label; and the number of classes."""
    classes = tuple(map(str, table.arrays.get("classes", ())))
    _check_texts(table, classes, data.num_classes)
    given = data.num_classes or len(classes) or None
    first, num_classes = count_classes(table.arrays["train_labels"], given, table.places["train"])
    if "test" in table.places:
        check_range(table.arrays["test_labels"], first, num_classes, table.places["test"], "test")
    return classes, first, num_classes


def _check_texts(table: Table, classes: Sequence[str], num_classes: int | None) -> None:
    """Raise JobError if there are more text labels than the job's classes, or if they look like row names."""
    distinct = f"{len(classes):,} distinct labels of {table.name}: {_few(classes)}"
    if num_classes is not None and num_classes < len(classes):
        raise JobError([Fault("data.num_classes", f"{num_classes} is below the {distinct}")])
    num_rows = len(table.arrays["train_labels"])
    if num_classes is None and len(classes) > max(_FEW_CLASSES, num_rows // 2):
        fault = f"is needed: {num_rows:,} rows have {distinct}: is data.label another column? If not, {len(classes)}"
        raise JobError([Fault("data.num_classes", fault)])


def _few(words: Sequence[str]) -> str:
    return ", ".join(words[:NUM_SHOWN]) + (", …" if len(words) > NUM_SHOWN else "")


def held_out_rows(num_rows: int, share: float, seed: int) -> tuple[Ids, Ids]:
    """Return training rows and test rows, each in ascending order.

    The first ⌈share · n⌉ rows in the order of a stream's first epoch are the test rows.

    Raises:
        JobError: no training row would be left.
    """
    num_test = num_held_out(num_rows, share)
    if num_test >= num_rows:
        fault = f"{share} of {num_rows} rows, rounded up, are {num_test}: no row would be left to train on"
        raise JobError([Fault("data.test_fraction", fault)])
    order = Stream(num_rows, seed).ids(0, num_rows)
    return np.sort(order[num_test:]), np.sort(order[:num_test])


def _fit(table: Table, data: DataSection, seed: int, report: ReportProgress) -> Arrays:
    """Return what the training rows determine, cached: their indices, fill values, moments and categories."""

    def build() -> Arrays:
        train, test = _members(table, data, seed)
        parts: dict[str, Any] = {} if train is None else {"train": train, "test": test}
        parts |= {f"lookup_{k}": _lookup(table, k, train) for k in table.categories()}
        unknown = _unknown(table, parts, test)
        if unknown and data.unknown_category == "error":
            remedy = "data.unknown_category = 'ignore' encodes them as no category"
            raise RunError(f"test rows have categories that no training row has: {'; '.join(unknown)}; {remedy}")
        if unknown:
            parts["notes"] = np.array([f"test rows, encoded as no category, {fault}" for fault in unknown])
        rows = Rows(table.arrays["train_values"], train, _labels(table, "train", train), _AS_STORED, str)
        names = [str(name) for name in table.arrays["names"]]
        fill = None
        if data.missing == "mean":
            parts["fill"] = fill = _means(rows, table, names, report)
        elif data.missing == "zero":
            parts["fill"] = fill = np.zeros(len(names))
        filled = Encoding(fill, {}, {}, one_hot=False)
        chunks = (filled.apply(chunk) for chunk in rows.chunks("mean of the training rows", report))
        parts["mean"], parts["std"] = row_moments(chunks, table.name, names)
        return parts

    test_fraction = f"{data.test_fraction!r} of seed {seed}" if data.test_fraction else ""
    identity = f"{table.kind}\n{table.identity}\n{test_fraction}\n{data.missing}\n{data.unknown_category}"
    return cached_arrays("fitted", identity, table.stamp, build)


_AS_STORED = Encoding(None, {}, {}, one_hot=False)


def _members(table: Table, data: DataSection, seed: int) -> tuple[Ids | None, Ids | None]:
    """Return the stored rows for training and for testing; None: all rows of the part."""
    if not data.test_fraction:
        return None, None
    return held_out_rows(len(table.arrays["train_values"]), data.test_fraction, seed)


def _labels(table: Table, part: str, members: Ids | None) -> Any:
    labels = table.arrays[f"{part}_labels"]
    return labels if members is None else labels[members]


def _means(rows: Rows, table: Table, names: Sequence[str], report: ReportProgress) -> Any:
    means = present_means(rows.chunks("mean of the training rows", report))
    empty = [names[k] for k in np.flatnonzero(np.isnan(means)).tolist()]
    if empty:
        fault = f"no training row has a value in column {', '.join(map(repr, empty[:NUM_SHOWN]))}"
        raise RunError(f"{table.name}: {fault}, so it has no mean; data.ignore_columns = {empty[:NUM_SHOWN]}")
    return means


def _lookup(table: Table, column: int, train: Ids | None) -> Any:
    """Map categories of the files to those of the training rows; -1: no training row has it."""
    codes = table.arrays["train_values"][:, column].astype(np.int64)
    present = np.unique(codes if train is None else codes[train])
    present = present[present >= 0]
    if not len(present):
        raise RunError(f"{table.name}: column {str(table.arrays['names'][column])!r} is empty in all training rows")
    lookup = np.full(len(table.categories()[column]), -1)
    lookup[present] = np.arange(len(present))
    return lookup


def _unknown(table: Table, parts: Mapping[str, Any], test: Ids | None) -> list[str]:
    """Return the test rows with a category that no training row has: for each column, their number and the first."""
    part = "train" if test is not None else "test"
    faults = []
    for column, words in table.categories().items():
        codes = table.arrays[f"{part}_values"][:, column].astype(np.int64)
        rows = np.arange(len(codes)) if test is None else test
        wrong = rows[(codes[rows] >= 0) & (known(parts[f"lookup_{column}"], codes[rows]) < 0)]
        if len(wrong):
            places = [f"{table.places[part](k)}: {words[codes[k]]!r}" for k in wrong[:NUM_SHOWN].tolist()]
            shown = listed([*places, *wrong[NUM_SHOWN:]], NUM_SHOWN, separator="; ")
            name = str(table.arrays["names"][column])
            faults.append(f"column {name!r}, {len(wrong):,} of {counted(len(rows), 'row')}: {shown}")
    return faults


def _rows(table: Table, fit: Arrays, part: str, first: int, data: DataSection) -> Rows:
    lookups = {k: fit[f"lookup_{k}"] for k in table.categories()}
    counts = {k: int(lookup.max()) + 1 for k, lookup in lookups.items()}
    encoding = Encoding(fit.get("fill"), lookups, counts, one_hot=data.categorical_encoding == "one_hot")
    stored = part if "test" in table.places else "train"
    labels = _labels(table, stored, fit.get(part))
    labels = labels - first if first else labels
    return Rows(table.arrays[f"{stored}_values"], fit.get(part), labels, encoding, table.places[stored])


def _schema(table: Table, fit: Arrays, encoding: Encoding, classes: Sequence[str], first: int) -> dict[str, Any]:
    """Return the meaning of features and classes, as JSON."""
    names = [str(name) for name in table.arrays["names"]]
    categories = {
        k: [word for word, code in zip(words, fit[f"lookup_{k}"].tolist(), strict=True) if code >= 0]
        for k, words in table.categories().items()
    }
    features = [
        f"{name}={word}" if word is not None else name
        for k, name in enumerate(names)
        for word in (categories[k] if k in categories and encoding.one_hot else [None])
    ]
    filled = {
        name: float(x)
        for k, (name, x) in enumerate(zip(names, fit.get("fill", ()), strict=False))
        if k not in categories
    }
    columns = [
        {"name": name, "kind": "category", "categories": categories[k]}
        if k in categories
        else {"name": name, "kind": "number", "fill": float(fit["fill"][k]) if "fill" in fit else None}
        for k, name in enumerate(names)
    ]
    return {
        "columns": columns,
        "features": features,
        "categories": {names[k]: words for k, words in categories.items()},
        "classes": list(classes) or None,
        "first_label": first,
        "fill": filled or None,
    }
