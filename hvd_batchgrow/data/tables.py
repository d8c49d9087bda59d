"""Tables: csv and parquet files, and the forest cover type of scikit-learn."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvd_batchgrow.config import DataSection
from hvd_batchgrow.data.arrays import array_source, checked_source
from hvd_batchgrow.data.cache import Arrays, cached_arrays, file_stamp
from hvd_batchgrow.data.columns import Columns, need, read_csv, read_parquet, split_columns
from hvd_batchgrow.data.known import need_root, num_held_out
from hvd_batchgrow.data.moments import chunks_of, row_moments
from hvd_batchgrow.data.samples import NO_SIZES, Ids, Kind, ReportProgress, Source
from hvd_batchgrow.data.stream import Stream
from hvd_batchgrow.errors import Fault, JobError, RunError

_READERS: dict[str, Callable[[Path], Any]] = {"csv": read_csv, "parquet": read_parquet}
_SUFFIXES = {"csv": (".csv", ".csv.gz", ".csv.bz2"), "parquet": (".parquet",)}
_COVTYPE_CLASSES = 7


def load(data: DataSection, seed: int, report: ReportProgress) -> Source:
    """The sources `csv` and `parquet`: parsed once into the cache, as float32, and mapped from there.

    What is tested on is, in this order: the files of `data.test`; the share `data.held_out` of the training
    rows; test.csv (test.parquet). Labels are whole numbers 0 … C - 1, or texts, which are numbered in the
    order of their characters. Features are standardised by mean and deviation of the training rows.

    Args:
        data: the section.
        seed: draws the rows that are held out.
        report: told of the parsing.

    Raises:
        JobError: no root, or no such column of labels.
        RunError: a file is missing or damaged, there is nothing to test on, or a cell is not what it must be.
    """
    root = need_root(data, f"the folder of its {data.source} files")
    train = find_files(root, data.train, data.source, "data.train")
    test = [] if data.held_out else find_files(root, data.test, data.source, "data.test")
    paths = {"train": train, "test": test}

    def build() -> Arrays:
        return _parse(paths, data, report)

    identity = "\n".join([*(str(path.resolve()) for path in train), "", *(str(path.resolve()) for path in test)])
    identity += f"\n{data.label!r}"
    table = _Table(data.source, identity, file_stamp(*train, *test), ", ".join(map(str, train)))
    arrays = cached_arrays(table.kind, table.identity, table.stamp, build)
    if data.held_out:
        return _hold_out(table, arrays, data, seed, report)
    return array_source(arrays, (table.name, ", ".join(map(str, test))), data.num_classes)


def load_covtype(data: DataSection, seed: int, report: ReportProgress) -> Source:
    """The source `covtype`: `data.root` is covtype.data[.gz] or its folder; without one, scikit-learn fetches it.

    Cover types 1 … 7 become 0 … 6. The share `data.held_out` of the rows is tested on.

    Raises:
        RunError: missing or damaged, or scikit-learn is missing or cannot fetch it.
    """
    path = None if data.root is None else _find_covtype(Path(data.root))
    name = str(path or "scikit-learn's covtype")
    table = _Table("covtype", str(path and path.resolve()), file_stamp(path) if path else [], name)
    arrays = cached_arrays(table.kind, table.identity, table.stamp, lambda: _covtype(path, report))
    return _hold_out(table, arrays, data, seed, report)


@dataclass(frozen=True)
class _Table:
    """What a cached table is known by."""

    kind: str
    identity: str
    stamp: list[Any]
    name: str
    """For messages."""


class Members:
    """Some rows of a table. See `Samples`."""

    kind: Kind = "rows"
    sizes = NO_SIZES

    def __init__(self, values: NDArray[np.float32], rows: Ids, labels: NDArray[np.int64], name: str) -> None:
        self.values, self.rows, self.labels, self.name = values, rows, labels, name
        self.shape = values.shape[1:]

    def __len__(self) -> int:
        return len(self.rows)

    def fetch(self, ids: Ids) -> NDArray[np.float32]:
        """See `Samples`."""
        return self.values[self.rows[ids]]

    def where(self, sample_id: int) -> str:
        """See `Samples`."""
        return f"{self.name}, data row {self.rows[sample_id] + 1}"


# --- one table, two sets ---------------------------------------------------------------------


def held_out_rows(num_rows: int, share: float, seed: int) -> tuple[Ids, Ids]:
    """Rows to train on and rows to test on, each in ascending order.

    The rows are put into the order of a stream's first epoch; the first ⌈share · n⌉ of them are tested on.

    Raises:
        JobError: nothing would be left to train on.
    """
    num_test = num_held_out(num_rows, share)
    if num_test >= num_rows:
        fault = f"{share} of {num_rows} rows, rounded up, are {num_test}: none would be left to train on"
        raise JobError([Fault("data.held_out", fault)])
    order = Stream(num_rows, seed).ids(0, num_rows)
    return np.sort(order[num_test:]), np.sort(order[:num_test])


def _hold_out(table: _Table, arrays: Arrays, data: DataSection, seed: int, report: ReportProgress) -> Source:
    """The rows stay where they are in the cache; which belong where is cached for each seed."""
    values, labels = arrays["train_values"], arrays["train_labels"]

    def build() -> Arrays:
        train, test = held_out_rows(len(values), data.held_out, seed)
        chunks = chunks_of(values, "mean of the training rows", report, train)
        mean, deviation = row_moments(chunks, table.name)
        moments = {"mean": mean, "deviation": deviation}
        return {"train": train, "test": test, "train_labels": labels[train], "test_labels": labels[test], **moments}

    identity = f"{table.kind}\n{table.identity}\n{data.held_out!r} of seed {seed}"
    parts = cached_arrays("held-out", identity, table.stamp, build)
    train, test = (Members(values, parts[part], parts[f"{part}_labels"], table.name) for part in ("train", "test"))
    names = (f"{table.name}, training rows", f"{table.name}, rows held out")
    num_classes = data.num_classes or int(labels.max()) + 1
    return checked_source(train, test, (train.labels, test.labels), parts, names, num_classes)


# --- csv and parquet -------------------------------------------------------------------------


def find_files(root: Path, given: str | None, kind: str, key: str) -> list[Path]:
    """The files of a set: what a key of the job says, or the one that goes by habit.

    Args:
        root: they are below it.
        given: a file, a folder or a pattern; None: train.csv or test.csv, possibly packed, or .parquet.
        kind: csv or parquet.
        key: data.train or data.test.

    Raises:
        RunError: nothing is there, or two go by habit.
    """
    habits = [f"{key.removeprefix('data.')}{suffix}" for suffix in _SUFFIXES[kind]]
    found = _matching(root, given, kind) if given else [root / habit for habit in habits if (root / habit).is_file()]
    if not given and len(found) > 1:
        raise RunError(f"{root} holds {' and '.join(path.name for path in found)}: say which is meant with {key}")
    if found:
        return found
    mend = ", or data.held_out = 0.2 keeps a fifth of the training rows for it" if key == "data.test" else ""
    near = [str(path.relative_to(root)) for path in _matching(root, ".", kind)][:5]
    there = f"there are {', '.join(near)}" if near else f"there is no {kind} file at all"
    raise RunError(f"{root} holds no {given or habits[0]} ({there}); {key} names another{mend}")


def _matching(root: Path, given: str, kind: str) -> list[Path]:
    place = root / given
    if place.is_dir():
        return sorted(path for path in place.iterdir() if path.is_file() and path.name.endswith(_SUFFIXES[kind]))
    if place.is_file() or Path(given).is_absolute():
        return [place] if place.is_file() else []
    return sorted(path for path in root.glob(given) if path.is_file())


def _parse(paths: Mapping[str, Sequence[Path]], data: DataSection, report: ReportProgress) -> Arrays:
    parts = {part: [_read(path, data, report) for path in files] for part, files in paths.items() if files}
    first = parts["train"][0]
    for columns in (columns for part in parts.values() for columns in part):
        _check_alike(first, columns)
    texts = first.labels.dtype.kind == "U"
    classes = np.unique(np.concatenate([columns.labels for columns in parts["train"]])) if texts else None
    arrays: dict[str, NDArray[Any]] = {}
    for part, files in parts.items():
        arrays[f"{part}_values"] = np.concatenate([columns.values for columns in files])
        arrays[f"{part}_labels"] = np.concatenate([_numbered(columns, classes) for columns in files])
    _check_classes(arrays["train_labels"], str(first.path))
    if "test" in parts:  # else the moments are those of the rows that are not held out
        chunks = chunks_of(arrays["train_values"], "mean of the training rows", report)
        arrays["mean"], arrays["deviation"] = row_moments(chunks, str(first.path))
    return arrays


def _read(path: Path, data: DataSection, report: ReportProgress) -> Columns:
    size = path.stat().st_size
    report(f"reading {path.name}", 0, size)
    columns = split_columns(path, _READERS[data.source](path), data.label)
    report(f"reading {path.name}", size, size)
    return columns


def _check_alike(first: Columns, other: Columns) -> None:
    if first.names != other.names:
        pairs = zip(first.names, other.names, strict=False)
        differing = [f"{a!r} and {b!r}" for a, b in pairs if a != b] or ["the number of them"]
        counts = f"{first.path} has {len(first.names)} features and {other.path} {len(other.names)}"
        raise RunError(f"{counts}, and they must be the same in the same order; the first that differs: {differing[0]}")
    if first.labels.dtype.kind != other.labels.dtype.kind:
        kinds = {"U": "text", "i": "numbers"}
        found = f"are {kinds[first.labels.dtype.kind]} in {first.path} and {kinds[other.labels.dtype.kind]} in"
        raise RunError(f"labels {found} {other.path}: they must be the same kind in all files")


def _numbered(columns: Columns, classes: NDArray[np.str_] | None) -> NDArray[np.int64]:
    """Labels as numbers: texts by their place among the sorted texts of the training rows."""
    if classes is None:
        return columns.labels
    places = np.searchsorted(classes, columns.labels).clip(max=len(classes) - 1)
    unknown = np.flatnonzero(classes[places] != columns.labels)
    if len(unknown):
        text = str(columns.labels[unknown[0]])
        fault = f"the label {text!r} is not among the {len(classes)} of the training rows"
        raise RunError(f"{columns.path}: data row {unknown[0] + 1}: {fault}: {', '.join(classes[:10])}")
    return places.astype(np.int64)


def _check_classes(labels: NDArray[np.int64], name: str) -> None:
    if labels.max() >= len(labels):
        fault = f"the largest label is {labels.max()}, and there are {len(labels)} rows: these are no classes 0 … C - 1"
        raise RunError(f"{name}: {fault}; data.label names another column")


# --- forest cover type -----------------------------------------------------------------------


def _find_covtype(root: Path) -> Path:
    names = ("covtype.data", "covtype.data.gz")
    present = [path for path in (root, *(root / name for name in names)) if path.is_file()]
    if not present:
        mend = "leave data.root out to have scikit-learn fetch it"
        raise RunError(f"data.root = {root} is no file, and holds neither {' nor '.join(names)}; {mend}")
    return present[0]


def _covtype(path: Path | None, report: ReportProgress) -> Arrays:
    name = str(path or "scikit-learn's covtype")
    if path is None:
        values, types = _fetch_covtype()
    else:
        report(f"reading {path.name}", 0, path.stat().st_size)
        columns = split_columns(path, read_csv(path, header=False), None)
        values, types = columns.values, columns.labels
        report(f"reading {path.name}", path.stat().st_size, path.stat().st_size)
    wrong = [0] if types.dtype.kind != "i" else np.flatnonzero((types < 1) | (types > _COVTYPE_CLASSES))
    if len(wrong):
        fault = f"{types[wrong[0]]} is no cover type, which are 1 … {_COVTYPE_CLASSES}"
        raise RunError(f"{name}: data row {wrong[0] + 1}, last column: {fault}")
    return {"train_values": values.astype(np.float32), "train_labels": types.astype(np.int64) - 1}


def _fetch_covtype() -> tuple[NDArray[Any], NDArray[Any]]:
    datasets = need("sklearn.datasets", "scikit-learn")
    try:
        values, types = datasets.fetch_covtype(return_X_y=True)
    except OSError as error:
        mend = "data.root names a covtype.data.gz that is there already"
        raise RunError(f"scikit-learn could not fetch covtype: {error}; {mend}") from None
    return np.asarray(values), np.asarray(types)
