"""Tables in csv and parquet files."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from hvd_batchgrow.config import DataSection
from hvd_batchgrow.config.source_specs import ReportProgress
from hvd_batchgrow.data.datasets.cache import cached_arrays, file_stamp
from hvd_batchgrow.data.datasets.dataset import Datasets
from hvd_batchgrow.data.datasets.section_values import need_root, notes_on_unused, refuse_shared
from hvd_batchgrow.data.tables.parse import Places, parse
from hvd_batchgrow.data.tables.table_dataset import Table, table_source
from hvd_batchgrow.messages.errors import RunError

_SUFFIXES = {"csv": (".csv", ".csv.gz", ".csv.bz2"), "parquet": (".parquet",)}
_PARSING = (
    *("label", "text_labels", "header", "separator", "decimal", "ignore_columns"),
    *("missing", "missing_values", "categorical"),
)
"""Keys of `[data]` that affect the parsed table."""


def load_values(data: DataSection, seed: int, report: ReportProgress) -> Datasets:
    """Load a table whose targets are numbers, in the columns of `data.label`; otherwise like `load`."""
    return load(data, seed, report, as_values=True)


def load(data: DataSection, seed: int, report: ReportProgress, *, as_values: bool = False) -> Datasets:
    """Load the sources `csv` and `parquet`: parsed once into the cache, and mapped from there.

    The test samples are the first of these that the job or the folder has: the files of `data.test`; the fraction
    `data.test_fraction` of the training rows; test.csv (test.parquet). Labels are whole numbers 0 … C - 1 (or 1 … C),
    or texts, which are numbered in the order of their characters. Numbers are stored as float32 if that is exact, else
    as float64.

    Args:
        data: the section.
        seed: draws the held-out rows.
        report: called with the progress of parsing.
        as_values: whether the targets are numbers, in the columns of `data.label`, instead of classes.

    Raises:
        JobError: no root, no such column, or the labels do not show which classes there are.
        RunError: a file is missing, damaged or in both sets, the test set is missing, or a cell is invalid.
    """
    root = need_root(data, f"the folder of its {data.source} files")
    train = find_files(root, data.train, data.source, "data.train")
    without = ", or data.test_fraction = 0.2 keeps a fifth of the training rows for testing"
    test = [] if data.test_fraction else find_files(root, data.test, data.source, "data.test", without)
    refuse_shared(train, test)
    paths = {"train": train, "test": test} if test else {"train": train}
    identity = "\n".join([*(str(path.resolve()) for path in train), "", *(str(path.resolve()) for path in test)])
    identity += "".join(f"\n{key} = {getattr(data, key)!r}" for key in _PARSING)
    identity += "\ntargets are numbers" * as_values
    stamp = file_stamp(*train, *test)
    arrays = cached_arrays(data.source, identity, stamp, lambda: parse(paths, data, report, as_values=as_values))
    places = {part: Places(files, arrays, part, data) for part, files in paths.items()}
    table = Table(data.source, identity, stamp, ", ".join(map(str, train)), arrays, places)
    source = table_source(table, data, seed, report)
    usual = _conventional(root, "data.test", data.source) if data.test_fraction else []
    unused = notes_on_unused([path for path in usual if path not in train], data)
    return replace(source, notes=(*source.notes, *unused))


def find_test_files(data: DataSection) -> list[Path]:
    """Return the files of `data.test`, or the one with the conventional name. Raises as `find_files`."""
    root = need_root(data, f"the folder of its {data.source} files")
    return find_files(root, data.test, data.source, "data.test")


def find_files(root: Path, given: str | None, kind: str, key: str, without: str = "") -> list[Path]:
    """Return the files of a set: those that the job names, or the one with the conventional name.

    Args:
        root: the folder to which names are relative.
        given: a file, a folder or a pattern; None: train.csv or test.csv, possibly compressed, or .parquet.
        kind: csv or parquet.
        key: data.train or data.test.
        without: what to do without such files, as the end of the message if the job names none.

    Raises:
        RunError: no file matches, two files have a conventional name, or a file is there compressed and uncompressed.
    """
    conventional = _conventional(root, key, kind)
    found = _matching(root, given, kind) if given else [path for path in conventional if path.is_file()]
    if not given and len(found) > 1:
        raise RunError(f"{root} contains {' and '.join(path.name for path in found)}: choose one with {key}")
    plain = {path: path.with_name(re.sub(r"\.(gz|bz2)$", "", path.name)) for path in found}
    if twice := [path for path in found if plain[path] != path and plain[path] in found]:
        fault = f"{root}: {key} = {given} has both {plain[twice[0]].name} and {twice[0].name}"
        raise RunError(f"{fault}, whose rows would count twice; remove one of them")
    if found:
        return found
    remedy = f"{key} is relative to {root}" if given else f"set {key}{without}"
    near = [str(path.relative_to(root)) for path in _matching(root, ".", kind)][:5]
    there = f"there are {', '.join(near)}" if near else f"there are no {kind} files"
    raise RunError(f"{root} does not contain {given or conventional[0].name} ({there}); {remedy}")


def _conventional(root: Path, key: str, kind: str) -> list[Path]:
    return [root / f"{key.removeprefix('data.')}{suffix}" for suffix in _SUFFIXES[kind]]


def _matching(root: Path, given: str, kind: str) -> list[Path]:
    place = root / given
    if place.is_dir():
        return sorted(path for path in place.iterdir() if path.is_file() and path.name.endswith(_SUFFIXES[kind]))
    if place.is_file() or Path(given).is_absolute():
        return [place] if place.is_file() else []
    return sorted(path for path in root.glob(given) if path.is_file())
