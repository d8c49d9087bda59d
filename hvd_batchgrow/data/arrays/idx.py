"""IDX, the file format of the MNIST family, and the source of four IDX files."""

from __future__ import annotations

import gzip
import hashlib
import math
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvd_batchgrow.config import DataSection
from hvd_batchgrow.config.source_specs import ReportProgress
from hvd_batchgrow.data.datasets.array_dataset import array_source, check_images, int64_labels, with_channels
from hvd_batchgrow.data.datasets.cache import Arrays, cached_arrays, file_stamp
from hvd_batchgrow.data.datasets.dataset import Datasets
from hvd_batchgrow.data.datasets.normalization import chunks_of, image_moments
from hvd_batchgrow.data.datasets.plausibility import check_layout, refuse_bits
from hvd_batchgrow.data.datasets.section_values import need_root
from hvd_batchgrow.messages.errors import RunError, unreadable

NAMES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
"""The files of the MNIST family, each possibly gzipped."""

_DTYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


def load(data: DataSection, seed: int, report: ReportProgress) -> Datasets:
    """Load the source `idx`: a folder of the four files. Raises RunError as `load_folder`, JobError without a root."""
    return load_folder(need_root(data, "the folder of its four files"), {}, data, report)


def load_folder(folder: Path, sha256: Mapping[str, str], data: DataSection, report: ReportProgress) -> Datasets:
    """Return the source of four files, unpacked into the cache once and mapped from there.

    Args:
        folder: contains the files of `NAMES`.
        sha256: of the unpacked files, by name; checked when they are unpacked.
        data: the section.
        report: called with the progress of unpacking.

    Raises:
        RunError: a file is missing or damaged, or the files do not match each other.
    """
    paths = [_present(folder, name) for name in NAMES]
    stamp = [file_stamp(*paths), sorted(sha256.values())]
    arrays = cached_arrays(data.source, str(folder.resolve()), stamp, lambda: _unpack(paths, sha256, report))
    check_layout(with_channels(arrays["train_values"]).shape[1:], data.shape, str(paths[0]))
    names = [str(path) for path in paths]
    return array_source(arrays, (names[0], names[2]), data.num_classes, (names[1], names[3]), data.first_label)


def _present(folder: Path, name: str) -> Path:
    present = [path for path in (folder / name, folder / f"{name}.gz") if path.exists()]
    if not present:
        raise RunError(f"{folder} holds neither {name} nor {name}.gz")
    return present[0]


def _unpack(paths: list[Path], sha256: Mapping[str, str], report: ReportProgress) -> Arrays:
    arrays = []
    for path in paths:
        report(f"unpacking {path.name}", 0, path.stat().st_size)
        arrays.append(read_idx(path, sha256.get(path.name.removesuffix(".gz"))))
        report(f"unpacking {path.name}", path.stat().st_size, path.stat().st_size)
    train, train_labels, test, test_labels = arrays
    check_images(train, train_labels, str(paths[0].parent))
    check_images(test, test_labels, str(paths[0].parent))
    refuse_bits(train, str(paths[0]))
    refuse_bits(test, str(paths[2]))
    mean, std = image_moments(chunks_of(with_channels(train), "mean of the training images", report))
    return {
        "train_values": train,
        "train_labels": int64_labels(train_labels, str(paths[1])),
        "test_values": test,
        "test_labels": int64_labels(test_labels, str(paths[3])),
        "mean": mean,
        "std": std,
    }


def read_idx(path: Path, sha256: str | None = None) -> NDArray[Any]:
    """Read an IDX file, gzipped or not.

    The header is two zero bytes, a type code, the number of dimensions, and each dimension as a
    big-endian int32; the values follow in C order.

    Args:
        path: the file; a name ending in .gz is unpacked.
        sha256: of the unpacked bytes; None: unchecked.

    Raises:
        RunError: missing, damaged, truncated, or of another digest.
    """
    raw = _read_bytes(path)
    if sha256 and (found := hashlib.sha256(raw).hexdigest()) != sha256:
        remedy = "remove its folder to download it again"
        raise RunError(f"{path} is not the expected file: SHA-256 {found[:16]}…, should be {sha256[:16]}…; {remedy}")
    if len(raw) < 4 or raw[:2] != b"\0\0" or raw[2] not in _DTYPES:
        raise RunError(f"{path} is not an IDX file: it starts with {raw[:4].hex(' ') or 'nothing'}")
    dtype, body_start = np.dtype(_DTYPES[raw[2]]), 4 + 4 * raw[3]
    if len(raw) < body_start:
        raise RunError(f"{path} is truncated: its header alone would be {body_start} bytes, it has {len(raw)}")
    shape = tuple(int(n) for n in np.frombuffer(raw[4:body_start], ">i4"))
    body, expected = memoryview(raw)[body_start:], math.prod(shape) * dtype.itemsize
    if len(body) != expected:
        raise RunError(f"{path} is truncated or damaged: {len(body)} bytes of values, {expected} expected for {shape}")
    return np.frombuffer(body, dtype).reshape(shape)


def _read_bytes(path: Path) -> bytes:
    try:
        data = path.read_bytes()
        return gzip.decompress(data) if path.suffix == ".gz" else data
    except (OSError, EOFError, zlib.error) as error:
        raise unreadable(path, error) from None
