"""Images or rows, and their labels, in memory-mapped .npy files."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvd_batchgrow.config import DataSection
from hvd_batchgrow.config.source_specs import ReportProgress
from hvd_batchgrow.data.datasets.array_dataset import (
    array_source,
    check_images,
    check_pair,
    int64_labels,
    with_channels,
)
from hvd_batchgrow.data.datasets.cache import Arrays, cached_arrays, file_stamp
from hvd_batchgrow.data.datasets.dataset import ArrayDataset, Datasets
from hvd_batchgrow.data.datasets.normalization import chunks_of, finite_chunks, image_moments, loses_digits, row_moments
from hvd_batchgrow.data.datasets.npy_file import open_npy
from hvd_batchgrow.data.datasets.plausibility import check_layout, refuse_bits
from hvd_batchgrow.data.datasets.section_values import need_root, refuse_shared
from hvd_batchgrow.data.datasets.targets import as_float32, check_digits, check_numbers, value_schema
from hvd_batchgrow.messages.errors import RunError


def load(data: DataSection, seed: int, report: ReportProgress) -> Datasets:
    """Load the source `numpy`: a file of images or rows, and a file of labels, for training and for testing.

    PREFIX_images.npy is uint8 (N, H, W, C) or (N, H, W); PREFIX_rows.npy is (N, features) of numbers;
    PREFIX_labels.npy is (N,) of any integer type. The prefixes are `data.train` and `data.test`, relative to
    `data.root`, by default "train" and "test". Values are not copied. Labels, mean and std are cached until a file
    changes.

    Raises:
        JobError: the job has no root.
        RunError: a file is missing, damaged, in both sets, or of a wrong type or shape.
    """
    root = need_root(data, "the folder of its .npy files")
    train, train_labels = _pair(root, data.train or "train", "labels")
    test, test_labels = _pair(root, data.test or "test", "labels")
    refuse_shared([train], [test])
    stamp = file_stamp(train, train_labels, test, test_labels)
    values = {"train_values": open_npy(train), "test_values": open_npy(test)}
    pairs = [(train, train_labels), (test, test_labels)]
    identity = "\n".join(str(path.resolve()) for path in (train, test))
    arrays = cached_arrays("numpy", identity, stamp, lambda: _digest(pairs, report))
    check_layout(with_channels(values["train_values"]).shape[1:], data.shape, str(train))
    label_names = str(train_labels), str(test_labels)
    return array_source({**values, **arrays}, (str(train), str(test)), data.num_classes, label_names, data.first_label)


def load_values(data: DataSection, seed: int, report: ReportProgress) -> Datasets:
    """Load the source `numpy` with numbers as targets: PREFIX_targets.npy, (N, K) or (N,), instead of labels.

    Otherwise like `load`.
    """
    root = need_root(data, "the folder of its .npy files")
    pairs = [_pair(root, getattr(data, part) or part, "targets") for part in ("train", "test")]
    paths = [path for path, _ in pairs]
    refuse_shared(paths[:1], paths[1:])
    stamp = file_stamp(*(path for pair in pairs for path in pair))
    identity = "\n".join(["targets", *(str(path.resolve()) for path in paths)])
    arrays = cached_arrays("numpy", identity, stamp, lambda: _digest(pairs, report, as_values=True))
    values = [with_channels(open_npy(path)) for path in paths]
    check_layout(values[0].shape[1:], data.shape, str(paths[0]))
    train, test = (
        ArrayDataset(found, arrays[f"{part}_labels"], str(path))
        for found, part, path in zip(values, ("train", "test"), paths, strict=True)
    )
    count = train.targets.shape[1]
    if train.shape != test.shape:
        raise RunError(f"{paths[1]}: a test sample is {test.shape}, one of {paths[0]} {train.shape}")
    if test.targets.shape[1] != count:
        raise RunError(f"{pairs[1][1]}: a sample has {test.targets.shape[1]} targets, one of {pairs[0][1]} {count}")
    mean, std = (tuple(map(float, arrays[key])) for key in ("mean", "std"))
    schema = value_schema(train.targets)
    return Datasets(train, test, count, mean, std, (), schema)


def _pair(root: Path, prefix: str, what: str) -> tuple[Path, Path]:
    """Return the files of values and of labels or targets."""
    values = [path for what in ("images", "rows") if (path := root / f"{prefix}_{what}.npy").exists()]
    labels = root / f"{prefix}_{what}.npy"
    if len(values) == 2:
        raise RunError(f"{root} contains both {values[0].name} and {values[1].name}: remove one of them")
    if values and labels.exists():
        return values[0], labels
    fault = f"lacks {labels.name}" if values else f"holds neither {prefix}_images.npy nor {prefix}_rows.npy"
    raise RunError(f"{root} {fault}{_how_to_unpack(root)}")


def _how_to_unpack(root: Path) -> str:
    packed = [root] if root.suffix == ".npz" else sorted(root.glob("*.npz"))
    if not packed:
        return ""
    code = f"z = numpy.load({str(packed[0])!r}); [numpy.save(f'{{k}}.npy', z[k]) for k in z]"
    command = shlex.join(["python", "-c", f"import numpy; {code}"])
    return f"; {packed[0].name} is not read, since it cannot be mapped; to unpack it: {command}"


def _digest(pairs: list[tuple[Path, Path]], report: ReportProgress, *, as_values: bool = False) -> Arrays:
    """Check all files; return labels, or targets (N, K) of float32, and mean and std of the training values."""
    arrays: dict[str, NDArray[Any]] = {}
    for part, (path, labels_path) in zip(("train", "test"), pairs, strict=True):
        values, labels = open_npy(path), open_npy(labels_path)
        if as_values:
            exact, labels = labels, _targets(labels, labels_path)
            if part == "train":
                check_digits(exact.reshape(labels.shape), str(labels_path))
        _check(values, labels[:, 0] if as_values else labels, path)
        arrays[f"{part}_labels"] = labels if as_values else int64_labels(labels, str(labels_path))
        is_rows = values.ndim == 2
        if not is_rows:
            refuse_bits(values, str(path))
        chunks = chunks_of(with_channels(values), f"reading {path.name}", report)
        if part == "train":
            arrays["mean"], arrays["std"] = row_moments(chunks, str(path)) if is_rows else image_moments(chunks)
        elif is_rows:
            for _ in finite_chunks(chunks, str(path)):
                pass
    return arrays


def _targets(targets: NDArray[Any], path: Path) -> NDArray[np.float32]:
    """Return targets as float32 (N, K). Raise RunError unless they are finite numbers, (N, K) or (N,)."""
    if targets.dtype.kind not in "biuf" or targets.ndim not in {1, 2}:
        raise RunError(f"{path} is {targets.dtype} {targets.shape}; targets must be numbers, (N, K) or (N,)")
    found = as_float32(targets.reshape(len(targets), -1))
    check_numbers(found, str(path))
    return found


def _check(values: NDArray[Any], labels: NDArray[Any], path: Path) -> None:
    if path.name.endswith("_images.npy"):
        check_images(values, labels, str(path))
        return
    if values.dtype.kind not in "biuf" or values.dtype.itemsize > 8 or values.ndim != 2:
        raise RunError(
            f"{path} is {values.dtype} {values.shape}; rows must be (N, features) of float64, float32 or integers"
        )
    check_pair(values, labels, str(path), "rows")
    if values.dtype.kind in "iu" and values.dtype.itemsize == 8:  # smaller integers are exact in float64
        wrong = [k for k in range(values.shape[1]) if loses_digits(values[:, k].astype(np.longdouble))]
        if wrong:
            fault = f"feature {wrong[0]} has values that differ by less than float64 can represent"
            raise RunError(f"{path}: {fault}; subtract a constant from it")
