"""Tables: csv and parquet files, and the forest cover type of scikit-learn."""

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
"""Keys of `[data]` that decide what is kept of a file."""


def load(data: DataSection, seed: int, report: ReportProgress) -> DatasetPair:
    """The sources `csv` and `parquet`: parsed once into the cache, and mapped from there.

    The test samples are, in this order: the files of `data.test`; the share `data.test_fraction` of the training
    rows; test.csv (test.parquet). Labels are whole numbers 0 … C - 1 (or 1 … C), or texts, which are numbered in the
    order of their characters. Numbers are kept as float32 if this loses nothing, else as float64.

    Args:
        data: the section.
        seed: draws the rows that are held out.
        report: told of the parsing.

    Raises:
        JobError: no root, no such column, or the labels do not show which classes there are.
        RunError: a file is missing or damaged, there is nothing to test on, or a cell is not what it must be.
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
    """The source `covtype`: `data.root` is covtype.data[.gz] or its folder; without one, scikit-learn fetches it.

    Cover types 1 … 7 become 0 … 6. The share `data.test_fraction` of the rows is tested on.

    Raises:
        RunError: missing or damaged, or scikit-learn is missing or cannot fetch it.
    """
    path = None if data.root is None else _find_covtype(Path(data.root))
    name = str(path or "scikit-learn's covtype")
    identity, stamp = str(path and path.resolve()), file_stamp(path) if path else []
    arrays = cached_arrays("covtype", identity, stamp, lambda: _covtype(path, report))
    table = Table("covtype", identity, stamp, name, arrays, {"train": lambda row: f"{name}, line {row + 1}"})
    with_classes = data.model_copy(update={"num_classes": data.num_classes or _COVTYPE_CLASSES})
    return table_source(table, with_classes, seed, report)


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
    mend = ", or data.test_fraction = 0.2 keeps a fifth of the training rows for it" if key == "data.test" else ""
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
        form = CsvForm(",", header=False, names=tuple(map(str, range(_COVTYPE_COLUMNS))))
        file, faults = check_file(read_csv(path, form), DataSection(source="csv", text_labels=False), strict=True)
        if faults:
            raise RunError(faults)
        assert not isinstance(file.labels, Texts)  # text_labels = false
        values, types = file.values, file.labels
        report(f"reading {path.name}", path.stat().st_size, path.stat().st_size)
    wrong = np.flatnonzero((types < 1) | (types > _COVTYPE_CLASSES))
    if len(wrong):
        fault = f"{types[wrong[0]]} is not a cover type, which are 1 … {_COVTYPE_CLASSES}"
        raise RunError(f"{name}, line {wrong[0] + 1}, last column: {fault}")
    names = np.array([str(k) for k in range(values.shape[1])])
    return {"names": names, "train_values": narrowed(values), "train_labels": types.astype(np.int64) - 1}


def _fetch_covtype() -> tuple[NDArray[Any], NDArray[Any]]:
    datasets = need("sklearn.datasets", "scikit-learn")
    try:
        values, types = datasets.fetch_covtype(return_X_y=True)
    except OSError as error:
        mend = "data.root names a covtype.data.gz that is there already"
        raise RunError(f"scikit-learn could not fetch covtype: {error}; {mend}") from None
    return np.asarray(values), np.asarray(types)
