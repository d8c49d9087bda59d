"""Tables: csv and parquet files, and the forest cover types of scikit-learn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvd_batchgrow.config import DataSection
from hvd_batchgrow.data.datasets.cache import Arrays, cached_arrays, file_stamp
from hvd_batchgrow.data.datasets.dataset import DatasetPair, ReportProgress
from hvd_batchgrow.data.datasets.section_values import need_root
from hvd_batchgrow.data.tables.cells import Texts
from hvd_batchgrow.data.tables.checked_files import check_file
from hvd_batchgrow.data.tables.columns import read_csv
from hvd_batchgrow.data.tables.csv_dialect import CsvForm
from hvd_batchgrow.data.tables.optional_packages import need
from hvd_batchgrow.data.tables.parse import Places, narrowed, parse
from hvd_batchgrow.data.tables.table_dataset import Table, table_source
from hvd_batchgrow.messages.errors import RunError

_SUFFIXES = {"csv": (".csv", ".csv.gz", ".csv.bz2"), "parquet": (".parquet",)}
_COVTYPE_COLUMNS, _COVTYPE_CLASSES = 55, 7
_PARSING = (
    *("label", "text_labels", "header", "separator", "decimal", "ignore_columns"),
    *("missing", "missing_values", "categorical"),
)
"""Keys of `[data]` that affect the parsed table."""


def load(data: DataSection, seed: int, report: ReportProgress) -> DatasetPair:
    """Load the sources `csv` and `parquet`: parsed once into the cache, and mapped from there.

    The test samples are the first of these that the job or the folder has: the files of `data.test`; the fraction
    `data.test_fraction` of the training rows; test.csv (test.parquet). Labels are whole numbers 0 … C - 1 (or 1 … C),
    or texts, which are numbered in the order of their characters. Numbers are stored as float32 if that is exact, else
    as float64.

    Args:
        data: the section.
        seed: draws the held-out rows.
        report: called with the progress of parsing.

    Raises:
        JobError: no root, no such column, or the labels do not show which classes there are.
        RunError: a file is missing or damaged, the test set is missing, or a cell is invalid.
    """
    root = need_root(data, f"the folder of its {data.source} files")
    train = find_files(root, data.train, data.source, "data.train")
    test = [] if data.test_fraction else find_files(root, data.test, data.source, "data.test")
    paths = {"train": train, "test": test} if test else {"train": train}
    identity = "\n".join([*(str(path.resolve()) for path in train), "", *(str(path.resolve()) for path in test)])
    identity += "".join(f"\n{key} = {getattr(data, key)!r}" for key in _PARSING)
    stamp = file_stamp(*train, *test)
    arrays = cached_arrays(data.source, identity, stamp, lambda: parse(paths, data, report))
    places = {part: Places(files, arrays, part, data) for part, files in paths.items()}
    table = Table(data.source, identity, stamp, ", ".join(map(str, train)), arrays, places)
    return table_source(table, data, seed, report)


def load_covtype(data: DataSection, seed: int, report: ReportProgress) -> DatasetPair:
    """Load the source `covtype`: `data.root` is covtype.data[.gz] or its folder; without it, scikit-learn downloads it.

    Cover types 1 … 7 become 0 … 6. The fraction `data.test_fraction` of the rows is the test set.

    Raises:
        RunError: missing or damaged, or scikit-learn is missing or cannot download it.
    """
    path = None if data.root is None else _find_covtype(Path(data.root))
    name = str(path or "scikit-learn's covtype")
    identity, stamp = str(path and path.resolve()), file_stamp(path) if path else []
    arrays = cached_arrays("covtype", identity, stamp, lambda: _covtype(path, report))
    table = Table("covtype", identity, stamp, name, arrays, {"train": lambda row: f"{name}, line {row + 1}"})
    with_classes = data.model_copy(update={"num_classes": data.num_classes or _COVTYPE_CLASSES})
    return table_source(table, with_classes, seed, report)


def find_files(root: Path, given: str | None, kind: str, key: str) -> list[Path]:
    """Return the files of a set: those that the job names, or the one with the conventional name.

    Args:
        root: the folder to which names are relative.
        given: a file, a folder or a pattern; None: train.csv or test.csv, possibly compressed, or .parquet.
        kind: csv or parquet.
        key: data.train or data.test.

    Raises:
        RunError: no file matches, or two files have a conventional name.
    """
    conventional = [f"{key.removeprefix('data.')}{suffix}" for suffix in _SUFFIXES[kind]]
    found = _matching(root, given, kind) if given else [root / name for name in conventional if (root / name).is_file()]
    if not given and len(found) > 1:
        raise RunError(f"{root} contains {' and '.join(path.name for path in found)}: choose one with {key}")
    if found:
        return found
    remedy = (
        ", or data.test_fraction = 0.2 keeps a fifth of the training rows for testing" if key == "data.test" else ""
    )
    near = [str(path.relative_to(root)) for path in _matching(root, ".", kind)][:5]
    there = f"there are {', '.join(near)}" if near else f"there are no {kind} files"
    raise RunError(f"{root} does not contain {given or conventional[0]} ({there}); set {key}{remedy}")


def _matching(root: Path, given: str, kind: str) -> list[Path]:
    place = root / given
    if place.is_dir():
        return sorted(path for path in place.iterdir() if path.is_file() and path.name.endswith(_SUFFIXES[kind]))
    if place.is_file() or Path(given).is_absolute():
        return [place] if place.is_file() else []
    return sorted(path for path in root.glob(given) if path.is_file())


# --- forest cover type -----------------------------------------------------------------------


def _find_covtype(root: Path) -> Path:
    names = ("covtype.data", "covtype.data.gz")
    present = [path for path in (root, *(root / name for name in names)) if path.is_file()]
    if not present:
        remedy = "without data.root, scikit-learn downloads it"
        raise RunError(f"data.root = {root} is not a file, and does not contain {' or '.join(names)}; {remedy}")
    return present[0]


def _covtype(path: Path | None, report: ReportProgress) -> Arrays:
    name = str(path or "scikit-learn's covtype")
    if path is None:
        values, types = _fetch_covtype()
    else:
        report(f"reading {path.name}", 0, path.stat().st_size)
        form = CsvForm(",", header=False, names=tuple(map(str, range(_COVTYPE_COLUMNS))))
        file, faults = check_file(read_csv(path, form), DataSection(source="csv", text_labels=False), strict=True)
        if faults:
            raise RunError(faults)
        assert not isinstance(file.labels, Texts)  # text_labels = false
        values, types = file.values, file.labels
        report(f"reading {path.name}", path.stat().st_size, path.stat().st_size)
    wrong = np.flatnonzero((types < 1) | (types > _COVTYPE_CLASSES))
    if len(wrong):
        fault = f"{types[wrong[0]]} is not a cover type, 1 … {_COVTYPE_CLASSES}"
        raise RunError(f"{name}, line {wrong[0] + 1}, last column: {fault}")
    names = np.array([str(k) for k in range(values.shape[1])])
    return {"names": names, "train_values": narrowed(values), "train_labels": types.astype(np.int64) - 1}


def _fetch_covtype() -> tuple[NDArray[Any], NDArray[Any]]:
    datasets = need("sklearn.datasets", "scikit-learn")
    try:
        values, types = datasets.fetch_covtype(return_X_y=True)
    except OSError as error:
        remedy = "set data.root to an existing covtype.data.gz"
        raise RunError(f"scikit-learn could not download covtype: {error}; {remedy}") from None
    return np.asarray(values), np.asarray(types)
