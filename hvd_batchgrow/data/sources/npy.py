"""Images or rows, and their labels, in .npy files that are mapped as they lie there."""

from __future__ import annotations

import math
import shlex
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from hvd_batchgrow.config import DataSection
from hvd_batchgrow.data.datasets.array_dataset import (
    array_source,
    check_images,
    check_pair,
    int64_labels,
    with_channels,
)
from hvd_batchgrow.data.datasets.cache import Arrays, cached_arrays, file_stamp
from hvd_batchgrow.data.datasets.dataset import DatasetPair, ReportProgress
from hvd_batchgrow.data.datasets.normalization import chunks_of, finite_chunks, image_moments, loses_digits, row_moments
from hvd_batchgrow.data.datasets.plausibility import check_layout, not_cut_to_bits
from hvd_batchgrow.data.datasets.section_values import need_root
from hvd_batchgrow.messages.errors import RunError


def load(data: DataSection, report: ReportProgress) -> DatasetPair:
    """The source `numpy`: for training and for testing a file of images or of rows, and one of labels.

    PREFIX_images.npy is uint8 (N, H, W, C) or (N, H, W); PREFIX_rows.npy is (N, features) of numbers;
    PREFIX_labels.npy is (N,) of any integer type. The prefixes are `data.train` and `data.test`, below
    `data.root`; "train" and "test" where the job does not say. Values are not copied. Labels, mean and
    deviation are taken out once for a state of the files, and cached.

    Raises:
        JobError: no root is given.
        RunError: a file is missing, damaged, or not as it must be.
    """
    root = need_root(data, "the folder of its .npy files")
    train, train_labels = _pair(root, data.train or "train")
    test, test_labels = _pair(root, data.test or "test")
    stamp = file_stamp(train, train_labels, test, test_labels)
    values = {"train_values": open_npy(train), "test_values": open_npy(test)}
    pairs = [(train, train_labels), (test, test_labels)]
    identity = "\n".join(str(path.resolve()) for path in (train, test))
    arrays = cached_arrays("numpy", identity, stamp, lambda: _digest(pairs, report))
    check_layout(with_channels(values["train_values"]).shape[1:], data.shape, str(train))
    label_names = str(train_labels), str(test_labels)
    return array_source({**values, **arrays}, (str(train), str(test)), data.num_classes, label_names)


def _pair(root: Path, prefix: str) -> tuple[Path, Path]:
    """The files of values and of labels."""
    values = [path for what in ("images", "rows") if (path := root / f"{prefix}_{what}.npy").exists()]
    labels = root / f"{prefix}_labels.npy"
    if len(values) == 2:
        raise RunError(f"{root} holds {values[0].name} and {values[1].name}: only one of them can be meant")
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
    return f"; {packed[0].name} is not read, as it cannot be mapped; to unpack it: {command}"


def open_npy(path: Path) -> NDArray[Any]:
    """Map a .npy file, read-only, without ever loading a pickle.

    Raises:
        RunError: it is no such file, holds objects, is cut short or too long, or is not in C order.
    """
    try:
        shape, fortran_order, dtype, body_start = _read_header(path)
        if dtype.hasobject:
            raise RunError(f"{path} holds Python objects, which are pickles and not read: save plain numbers")
        expected, found = body_start + math.prod(shape) * dtype.itemsize, path.stat().st_size
        if found != expected:
            state = "truncated" if found < expected else "damaged"
            raise RunError(f"{path} is {state}: {found} bytes, {expected} expected for {shape} of {dtype}")
        if fortran_order and len(shape) > 1:
            mend = "numpy.save(…, numpy.ascontiguousarray(…))"
            raise RunError(f"{path} is in Fortran order, so that a sample is all over the file: {mend} puts it right")
        if not expected - body_start:
            raise RunError(f"{path} is empty: {shape} of {dtype}")
        return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
    except (OSError, ValueError) as error:  # ValueError: negative numbers in the shape
        raise RunError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None


def _read_header(path: Path) -> tuple[tuple[int, ...], bool, np.dtype[Any], int]:
    with path.open("rb") as file:
        start = file.read(6)
        if start != b"\x93NUMPY":
            raise RunError(f"{path} is no .npy file: it starts with {start.hex(' ') or 'nothing'}")
        file.seek(0)
        try:
            version = npy.read_magic(file)
            # Versions 2 and 3 differ in the encoding of names of fields only, which no file of numbers has.
            read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
            return *read(file), file.tell()
        except Exception as error:  # the header is a piece of Python's syntax, which can be damaged in any way
            raise RunError(f"{path} is damaged in its header: {error}") from None


def _digest(pairs: list[tuple[Path, Path]], report: ReportProgress) -> Arrays:
    """Labels as int64, and the moments of the training values, after all checks."""
    arrays: dict[str, NDArray[Any]] = {}
    for part, (path, labels_path) in zip(("train", "test"), pairs, strict=True):
        values, labels = open_npy(path), open_npy(labels_path)
        _check(values, labels, path)
        arrays[f"{part}_labels"] = int64_labels(labels, str(labels_path))
        chunks = chunks_of(with_channels(values), f"reading {path.name}", report)
        if part == "train":
            is_rows = values.ndim == 2
            moments = row_moments(chunks, str(path)) if is_rows else image_moments(not_cut_to_bits(chunks, str(path)))
            arrays["mean"], arrays["std"] = moments
        elif values.ndim == 2:
            for _ in finite_chunks(chunks, str(path)):
                pass
    return arrays


def _check(values: NDArray[Any], labels: NDArray[Any], path: Path) -> None:
    if path.name.endswith("_images.npy"):
        check_images(values, labels, str(path))
        return
    if values.dtype.kind not in "biuf" or values.dtype.itemsize > 8 or values.ndim != 2:
        raise RunError(
            f"{path} is {values.dtype} {values.shape}; rows must be (N, features) of float64, float32 or integers"
        )
    check_pair(values, labels, str(path), "rows")
    if values.dtype in (np.int64, np.uint64):  # smaller integers are exact in float64
        wrong = [k for k in range(values.shape[1]) if loses_digits(values[:, k].astype(np.longdouble))]
        if wrong:
            fault = f"feature {wrong[0]} has values of more digits than float64 keeps, which differ too little"
            raise RunError(f"{path}: {fault}; subtract a constant from it")
