"""Read the forest cover types from a file, or through scikit-learn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvd_batchgrow.config import DataSection
from hvd_batchgrow.config.source_specs import ReportProgress
from hvd_batchgrow.data.datasets.cache import Arrays, cached_arrays, file_stamp
from hvd_batchgrow.data.datasets.dataset import Datasets
from hvd_batchgrow.data.tables.cells import Texts
from hvd_batchgrow.data.tables.checked_files import check_file
from hvd_batchgrow.data.tables.columns import read_csv
from hvd_batchgrow.data.tables.csv_dialect import CsvForm
from hvd_batchgrow.data.tables.optional_packages import need
from hvd_batchgrow.data.tables.parse import narrowed
from hvd_batchgrow.data.tables.table_dataset import Table, table_source
from hvd_batchgrow.messages.errors import RunError

_NUM_COLUMNS, _NUM_CLASSES = 55, 7


def load(data: DataSection, seed: int, report: ReportProgress) -> Datasets:
    """Load the source `covtype`: `data.root` is covtype.data[.gz] or its folder; without it, scikit-learn downloads it.

    Cover types 1 … 7 become 0 … 6. The fraction `data.test_fraction` of the rows is the test set.

    Raises:
        RunError: missing or damaged, or scikit-learn is missing or cannot download it.
    """
    path = None if data.root is None else _find(Path(data.root))
    name = str(path or "scikit-learn's covtype")
    identity, stamp = str(path and path.resolve()), file_stamp(path) if path else []
    arrays = cached_arrays("covtype", identity, stamp, lambda: _read(path, report))
    table = Table("covtype", identity, stamp, name, arrays, {"train": lambda row: f"{name}, line {row + 1}"})
    with_classes = data.model_copy(update={"num_classes": data.num_classes or _NUM_CLASSES})
    return table_source(table, with_classes, seed, report)


def _find(root: Path) -> Path:
    names = ("covtype.data", "covtype.data.gz")
    present = [path for path in (root, *(root / name for name in names)) if path.is_file()]
    if not present:
        remedy = "without data.root, scikit-learn downloads it"
        raise RunError(f"data.root = {root} is not a file, and does not contain {' or '.join(names)}; {remedy}")
    return present[0]


def _read(path: Path | None, report: ReportProgress) -> Arrays:
    name = str(path or "scikit-learn's covtype")
    if path is None:
        values, types = _fetch()
    else:
        report(f"reading {path.name}", 0, path.stat().st_size)
        form = CsvForm(",", header=False, names=tuple(map(str, range(_NUM_COLUMNS))))
        file, faults = check_file(read_csv(path, form), DataSection(source="csv", text_labels=False), strict=True)
        if faults:
            raise RunError(faults)
        assert not isinstance(file.labels, Texts)  # text_labels = false
        values, types = file.values, file.labels
        report(f"reading {path.name}", path.stat().st_size, path.stat().st_size)
    wrong = np.flatnonzero((types < 1) | (types > _NUM_CLASSES))
    if len(wrong):
        fault = f"{types[wrong[0]]} is not a cover type, 1 … {_NUM_CLASSES}"
        raise RunError(f"{name}, line {wrong[0] + 1}, last column: {fault}")
    names = np.array([str(k) for k in range(values.shape[1])])
    return {"names": names, "train_values": narrowed(values), "train_labels": types.astype(np.int64) - 1}


def _fetch() -> tuple[NDArray[Any], NDArray[Any]]:
    datasets = need("sklearn.datasets", "scikit-learn")
    try:
        values, types = datasets.fetch_covtype(return_X_y=True)
    except OSError as error:
        remedy = "set data.root to an existing covtype.data.gz"
        raise RunError(f"scikit-learn could not download covtype: {error}; {remedy}") from None
    return np.asarray(values), np.asarray(types)
