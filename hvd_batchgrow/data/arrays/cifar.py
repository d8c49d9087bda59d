"""CIFAR-10 and CIFAR-100 in their binary version."""

from __future__ import annotations

import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hvd_batchgrow.config import DataSection
from hvd_batchgrow.config.source_specs import ReportProgress
from hvd_batchgrow.data.datasets.array_dataset import array_source
from hvd_batchgrow.data.datasets.cache import Arrays, cached_arrays, file_stamp
from hvd_batchgrow.data.datasets.dataset import Datasets
from hvd_batchgrow.data.datasets.normalization import chunks_of, image_moments
from hvd_batchgrow.data.datasets.section_values import need_root
from hvd_batchgrow.messages.errors import RunError, unreadable

_PIXEL_BYTES = 3 * 32 * 32


@dataclass(frozen=True)
class Version:
    """File names and record format of one of the two sets.

    A record is one byte for each level of labels, the last of which is used, followed by 1024 bytes each of red, green
    and blue, row by row.
    """

    folder: str
    train_files: tuple[str, ...]
    test_file: str
    num_classes: tuple[int, ...]
    """For each level of labels."""
    num_records: int
    """Per training file; the test file has 10 000."""
    archive: str
    pickles: tuple[str, str]
    """Folder and archive of the pickled version, which is refused."""

    @property
    def files(self) -> tuple[str, ...]:
        """All files, the test file last."""
        return (*self.train_files, self.test_file)

    @property
    def record_bytes(self) -> int:
        """Bytes of a record: labels and pixels."""
        return len(self.num_classes) + _PIXEL_BYTES

    def records_of(self, file: str) -> int:
        """Return the number of records of a published file."""
        return 10_000 if file == self.test_file else self.num_records


_URL = "https://www.cs.toronto.edu/~kriz"
VERSIONS = {
    "cifar10": Version(
        folder="cifar-10-batches-bin",
        train_files=tuple(f"data_batch_{k}.bin" for k in range(1, 6)),
        test_file="test_batch.bin",
        num_classes=(10,),
        num_records=10_000,
        archive="cifar-10-binary.tar.gz",
        pickles=("cifar-10-batches-py", "cifar-10-python.tar.gz"),
    ),
    "cifar100": Version(
        folder="cifar-100-binary",
        train_files=("train.bin",),
        test_file="test.bin",
        num_classes=(20, 100),
        num_records=50_000,
        archive="cifar-100-binary.tar.gz",
        pickles=("cifar-100-python", "cifar-100-python.tar.gz"),
    ),
}


def load(data: DataSection, seed: int, report: ReportProgress) -> Datasets:
    """Return CIFAR-10 or CIFAR-100, unpacked into the cache once and mapped from there.

    Args:
        data: `root` is the folder of the binary files, a folder that holds it or the published archive, or the archive.
            If `num_samples` is set, files may have any number of records, otherwise that of the published files.
        seed: unused.
        report: called with the progress of unpacking.

    Raises:
        JobError: the job has no root.
        RunError: no readable files are found, or a file is damaged.
    """
    version = VERSIONS[data.source]
    root = need_root(data, f"the folder of {version.folder} or {version.archive}", or_file=True)
    place = _find(root, version)
    paths = [place] if place.is_file() else [place / file for file in version.files]
    published = data.num_samples is None
    arrays = cached_arrays(
        data.source,
        str(place.resolve()),
        [file_stamp(*paths), published],
        lambda: _unpack(place, version, published=published, report=report),
    )
    names = (f"{place}: {', '.join(version.train_files)}", f"{place}: {version.test_file}")
    return array_source(arrays, names, data.num_classes or version.num_classes[-1])


def _find(root: Path, version: Version) -> Path:
    """Return the folder of the files, or their archive."""
    if root.is_file() and root.name not in version.pickles:
        return root
    for folder in (root, root / version.folder):
        if (folder / version.train_files[0]).exists():
            return folder
    if (root / version.archive).exists():
        return root / version.archive
    url = f"{_URL}/{version.archive}"
    pickled = [root / name for name in version.pickles if (root / name).exists()]
    if root.name in version.pickles or (root / version.train_files[0].removesuffix(".bin")).is_file():
        pickled = [root]
    if pickled:
        fault = "contains pickles, which can run any code when opened and are not read"
        raise RunError(f"{pickled[0]} {fault}: download the binary version, {url}, and set data.root to its folder")
    wanted = f"{version.train_files[0]}, {version.folder} or {version.archive}"
    raise RunError(f"{root} does not contain {wanted}: download {url} and set data.root to its folder")


def _unpack(place: Path, version: Version, *, published: bool, report: ReportProgress) -> Arrays:
    found = {}
    for file, content in _contents(place, version, report):
        where = f"{place / file}" if place.is_dir() else f"{place}: {file}"
        found[file] = _records(content, where, version, version.records_of(file) if published else None)
    if missing := [file for file in version.files if file not in found]:
        raise RunError(f"{place} lacks {', '.join(missing)}")
    train_values, train_labels = (
        np.concatenate(part) for part in zip(*map(found.get, version.train_files), strict=True)
    )
    test_values, test_labels = found[version.test_file]
    mean, std = image_moments(chunks_of(train_values, "mean of the training images", report))
    return {
        "train_values": train_values,
        "train_labels": train_labels,
        "test_values": test_values,
        "test_labels": test_labels,
        "mean": mean,
        "std": std,
    }


def _contents(place: Path, version: Version, report: ReportProgress) -> Iterator[tuple[str, bytes]]:
    """Yield name and bytes of each file, in the order of the archive. Raises RunError."""
    try:
        if place.is_dir():
            for k, file in enumerate(version.files):
                yield file, (place / file).read_bytes()
                report(f"reading {place.name}", k + 1, len(version.files), "files")
        else:
            yield from _members(place, version, report)
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        raise unreadable(getattr(error, "filename", None) or place, error) from None


def _members(archive: Path, version: Version, report: ReportProgress) -> Iterator[tuple[str, bytes]]:
    """Read members from the archive without writing files: the names of members may be malicious."""
    size = archive.stat().st_size
    with archive.open("rb") as packed, tarfile.open(fileobj=packed, mode="r|*") as members:
        for member in members:
            path = Path(member.name)
            if member.isfile() and path.name in version.files and path.parent.name == version.folder:
                yield path.name, members.extractfile(member).read()  # type: ignore[union-attr]  # it is a file
            report(f"reading {archive.name}", packed.tell(), size)


def _records(
    content: bytes, where: str, version: Version, num_records: int | None
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Return images (n, 32, 32, 3) and labels (n,) of one file."""
    size, levels = version.record_bytes, len(version.num_classes)
    whole, rest = divmod(len(content), size)
    if rest or not whole or num_records not in (None, whole):
        count = f"{len(content)} bytes are {whole} records of {size} bytes" + (f" and {rest} bytes" if rest else "")
        wanted = f"{num_records} records are {num_records * size}" if num_records else "whole records are needed"
        raise RunError(f"{where} is truncated or damaged: {count}; {wanted}")
    records = np.frombuffer(content, dtype=np.uint8).reshape(whole, size)
    for level, num_classes in enumerate(version.num_classes):
        wrong = np.flatnonzero(records[:, level] >= num_classes)
        if len(wrong):
            label, at = records[wrong[0], level], f"record {wrong[0]}, byte {wrong[0] * size + level}"
            raise RunError(f"{where} is damaged: {at} is label {label}, not one of 0 … {num_classes - 1}")
    images = records[:, levels:].reshape(whole, 3, 32, 32).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(images), records[:, levels - 1].astype(np.int64)
