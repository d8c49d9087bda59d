"""Datasets of encoded images: single files, or byte ranges of a few large files, found through an index."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache, partial
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import numpy as np
from crc32c import crc32c
from numpy.typing import NDArray

from hvd_batchgrow.config import DataSection
from hvd_batchgrow.config.source_specs import Kind
from hvd_batchgrow.data.datasets.cache import Arrays
from hvd_batchgrow.data.datasets.class_labels import check_range, count_classes
from hvd_batchgrow.data.datasets.dataset import (
    IMAGENET_DEVIATION,
    IMAGENET_MEAN,
    BadSample,
    Dataset,
    Datasets,
    Ids,
)
from hvd_batchgrow.data.datasets.subset import origin
from hvd_batchgrow.data.images.decode_rgb import UNDECODABLE, fault_text, open_image, oriented, stored_rgb
from hvd_batchgrow.data.images.image_header import inspect_image
from hvd_batchgrow.data.images.image_index import text_at
from hvd_batchgrow.messages.errors import RunError, reason_of, unreadable

Bytes = NDArray[np.uint8]
HEAD_BYTES = 1 << 14
"""First bytes of an image, whose checksum is compared on every read, at a microsecond each. A decoder may do worse than
fail on a header that has changed since the index was built: DALI 2.4 uses memory after freeing it."""
NUM_SHOWN = 10
"""Most faults of a kind that a message lists."""


class EncodedDataset:
    """JPEG, PNG … images of any size, each a byte range of a file.

    Threads may fetch concurrently, and a forked process may use its copy: files are read by position, and a file is
    not closed during a read. A pickle holds no open files.

    Args:
        root: folder to which the paths of the index are relative.
        index: arrays of `make_index`, possibly memory-mapped.
        apply_orientation: rotate images by their EXIF orientation; `sizes` then describe the rotated images.
    """

    kind: Kind = "encoded"
    shape = (0, 0, 3)

    def __init__(self, root: Path, index: Arrays, *, apply_orientation: bool = False) -> None:
        self.root, self.apply_orientation = root, apply_orientation
        self.targets: NDArray[np.int64] = index["labels"]
        self.sizes: NDArray[np.int32] = index["sizes"]
        if apply_orientation:
            lies_on_side = index["orientations"][:, None] >= 5
            self.sizes = np.where(lies_on_side, self.sizes[:, ::-1], self.sizes)
        self._index = index
        num_files = len(index["file_ends"]) - 1
        # If each image has its own file, that file is not read again before the next epoch.
        self._open = lru_cache(0 if num_files >= len(self) else _num_kept_open())(_open_file)

    @property
    def heads(self) -> NDArray[np.uint32]:
        """CRC-32C of the first `HEAD_BYTES` of each image, (N,)."""
        heads: NDArray[np.uint32] = self._index["heads"]
        return heads

    def __reduce__(self) -> tuple[Callable[..., EncodedDataset], tuple[Path, Arrays]]:
        return partial(EncodedDataset, apply_orientation=self.apply_orientation), (self.root, self._index)

    def __len__(self) -> int:
        return len(self.targets)

    def labeled(self, labels: NDArray[np.int64]) -> EncodedDataset:
        """Return the same images with other labels."""
        index = {**self._index, "labels": labels}
        return EncodedDataset(self.root, index, apply_orientation=self.apply_orientation)

    def fetch(self, ids: Ids) -> list[Bytes]:
        """See `Dataset`."""
        return [self._read(int(k)) for k in ids]

    def fault(self, sample_id: int) -> str:
        """Return why the index marks an image as bad; empty if it does not."""
        return text_at(self._index["faults"], self._index["fault_ends"], sample_id)

    def orientation(self, sample_id: int) -> int:
        """Return the EXIF orientation that is applied after decoding; 1: unchanged."""
        return int(self._index["orientations"][sample_id]) if self.apply_orientation else 1

    def is_for_dali(self, sample_id: int) -> bool:
        """Return whether DALI decodes an image to the same pixels as `decode`."""
        return bool(self._index["for_dali"][sample_id]) and self.orientation(sample_id) == 1

    def locate(self, sample_id: int) -> str:
        """See `Dataset`."""
        member = text_at(self._index["members"], self._index["member_ends"], sample_id)
        return self._path(sample_id) + (f", {member}" if member else "")

    def _path(self, sample_id: int) -> str:
        name = text_at(self._index["files"], self._index["file_ends"], int(self._index["file"][sample_id]))
        return os.path.join(self.root, name)

    def _read(self, sample_id: int) -> Bytes:
        if not self.sizes[sample_id].all():
            raise BadSample(sample_id, self.locate(sample_id), self.fault(sample_id))
        length, offset = int(self._index["lengths"][sample_id]), int(self._index["offsets"][sample_id])
        try:
            file = self._open(self._path(sample_id))
            data = os.pread(file.descriptor, length, offset)
        except OSError as error:
            raise BadSample(sample_id, self.locate(sample_id), f"cannot be read: {reason_of(error)}") from None
        if len(data) != length:
            raise BadSample(sample_id, self.locate(sample_id), f"is truncated: {len(data)} of {length} bytes are left")
        if crc32c(data[:HEAD_BYTES]) != self._index["heads"][sample_id]:
            raise BadSample(sample_id, self.locate(sample_id), "has changed since it was indexed")
        return np.frombuffer(data, dtype=np.uint8)


@dataclass(frozen=True)
class _OpenFile:
    """A file that closes with its last reference: another thread may still read a file that the cache drops."""

    descriptor: int

    def __del__(self) -> None:
        os.close(self.descriptor)


def _open_file(path: str) -> _OpenFile:
    return _OpenFile(os.open(path, os.O_RDONLY | os.O_CLOEXEC))


def _num_kept_open() -> int:
    """Return a quarter of the limit on open files: two sets use half of it, and half is left for everything else."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 4096 if soft == resource.RLIM_INFINITY else min(4096, soft // 4)


def decode(samples: Dataset, sample_id: int, data: Bytes) -> NDArray[np.uint8]:
    """Return the pixels of an image, (H, W, 3), as 8-bit RGB, rotated by `EncodedDataset.orientation`.

    Raises:
        BadSample: the bytes cannot be decoded, or the size differs from the index.
    """
    whole, id_in_whole = origin(samples, sample_id)
    orientation = whole.orientation(id_in_whole) if isinstance(whole, EncodedDataset) else 1
    stream = BytesIO(data.tobytes())
    try:
        with open_image(stream) as image:
            pixels = oriented(stored_rgb(image, stream), orientation)
    except UNDECODABLE as error:
        raise BadSample(sample_id, samples.locate(sample_id), fault_text(error, stream)) from None
    if pixels.shape[:2] != tuple(samples.sizes[sample_id]):
        height, width = samples.sizes[sample_id]
        fault = f"is {pixels.shape[0]} × {pixels.shape[1]} pixels, {height} × {width} when it was indexed"
        raise BadSample(sample_id, samples.locate(sample_id), fault)
    return pixels


def read_header(data: bytes | BinaryIO) -> tuple[int, int, int, bool, str, int]:
    """Return the fields of `Entry` from `height` to `head`: `inspect_image`, and the CRC-32C of the first `HEAD_BYTES`.

    Args:
        data: the bytes, or a file.
    """
    stream = BytesIO(data) if isinstance(data, bytes) else data
    head = crc32c(stream.read(HEAD_BYTES))
    stream.seek(0)
    return *inspect_image(stream), head


def encoded_source(
    data: DataSection,
    train: EncodedDataset,
    test: EncodedDataset,
    num_classes: int | None,
    first: int | None = None,
) -> Datasets:
    """Check samples and labels of two sets, and return their source.

    Args:
        data: the section.
        train: the training set, with the labels of the files.
        test: the test set, likewise.
        num_classes: as `count_classes`.
        first: `DataSection.first_label`; None: as `first_label` decides.

    Raises:
        RunError: bad images that the job does not replace, or labels beyond the classes.
    """
    for samples in (train, test):
        report_bad(samples, data.on_bad_sample)
    first, num_classes = count_classes(train.targets, num_classes, train.locate, first)
    check_range(test.targets, first, num_classes, test.locate, "test")
    if first:
        train, test = (samples.labeled(samples.targets - first) for samples in (train, test))
    schema = {"first_label": first}
    return Datasets(train, test, num_classes, IMAGENET_MEAN, IMAGENET_DEVIATION, schema=schema)


def report_bad(samples: EncodedDataset, on_bad_sample: str) -> None:
    """Raise RunError if samples are known to be bad and the job does not replace bad samples, or if all are bad."""
    bad = np.flatnonzero(samples.sizes.min(axis=1) == 0)
    if not len(bad) or (on_bad_sample == "replace" and len(bad) < len(samples)):
        return
    lines = [f"sample {k}: {samples.locate(int(k))} {samples.fault(int(k))}" for k in bad[:NUM_SHOWN]]
    hint = "; data.on_bad_sample = 'replace' would continue without them" if len(bad) < len(samples) else ""
    head = f"{len(bad)} of {len(samples)} images under {samples.root} cannot be read or decoded{hint}"
    raise RunError(listing(head, lines, len(bad)))


def listing(head: str, lines: Sequence[str], count: int) -> str:
    """Join a heading and the shown lines of a message; `…` marks further ones."""
    return "\n  ".join([f"{head}:", *lines, *(["…"] if count > len(lines) else [])])


def nearest(folder: Path, name: str) -> str:
    """Return the names in a folder that are closest to a missing name, for messages."""
    entries = list(folder.iterdir()) if folder.is_dir() else []
    names = sorted(f"{entry.name}/" if entry.is_dir() else entry.name for entry in entries)
    if not names:
        return f"{folder} is {'empty' if folder.is_dir() else 'not a folder either'}"
    near = get_close_matches(name, names, n=3, cutoff=0.4) or names[:3]
    return "there is " + ", ".join(near) + (", …" if len(names) > len(near) else "")


@contextmanager
def reading(place: Path) -> Iterator[None]:
    """Turn an OSError during reading into a RunError that names the file, or else the given place."""
    try:
        yield
    except OSError as error:
        raise unreadable(os.fsdecode(error.filename or place), error) from None
