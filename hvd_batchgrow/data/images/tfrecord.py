"""TFRecord files of tf.train.Example, read without TensorFlow."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from crc32c import crc32c
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format  # type: ignore[import-untyped]
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from hvd_batchgrow.config import DataSection
from hvd_batchgrow.config.source_specs import ReportProgress
from hvd_batchgrow.data.datasets.dataset import Datasets
from hvd_batchgrow.data.images.encoded_dataset import EncodedDataset, encoded_source, read_header, report_bad
from hvd_batchgrow.data.images.image_header import bad_header
from hvd_batchgrow.data.images.image_index import Entry
from hvd_batchgrow.data.images.shards import (
    Faults,
    ShardFormat,
    UnusableError,
    checked_label,
    load_sets,
    refuse_compressed,
)
from hvd_batchgrow.messages.errors import RunError

_IMAGE_FEATURES = ("image/encoded", "image")
_UNKNOWN_LABEL = np.iinfo(np.int64).min
"""Stands for the label of a record with a wrong checksum."""
_HEADER, _CHECKSUM = struct.Struct("<QI"), struct.Struct("<I")

# TensorFlow's example.proto, without floats. TensorBoard does not include it. Packages that do register it in the
# global pool of messages, which aborts the process if TensorFlow is imported too.
_SCHEMA = """
name: "hvd_batchgrow/example.proto" package: "tensorflow" syntax: "proto3"
message_type { name: "BytesList" field { name: "value" number: 1 type: TYPE_BYTES label: LABEL_REPEATED } }
message_type {
  name: "Int64List"
  field { name: "value" number: 1 type: TYPE_INT64 label: LABEL_REPEATED options { packed: true } }
}
message_type {
  name: "Feature"
  field { name: "bytes_list" number: 1 type: TYPE_MESSAGE label: LABEL_OPTIONAL type_name: ".tensorflow.BytesList" }
  field { name: "int64_list" number: 3 type: TYPE_MESSAGE label: LABEL_OPTIONAL type_name: ".tensorflow.Int64List" }
}
message_type {
  name: "Features"
  field { name: "feature" number: 1 type: TYPE_MESSAGE label: LABEL_REPEATED type_name: ".tensorflow.Features.Entry" }
  nested_type {
    name: "Entry" options { map_entry: true }
    field { name: "key" number: 1 type: TYPE_STRING label: LABEL_OPTIONAL }
    field { name: "value" number: 2 type: TYPE_MESSAGE label: LABEL_OPTIONAL type_name: ".tensorflow.Feature" }
  }
}
message_type {
  name: "Example"
  field { name: "features" number: 1 type: TYPE_MESSAGE label: LABEL_OPTIONAL type_name: ".tensorflow.Features" }
}
"""


class Record(NamedTuple):
    """A record of a shard."""

    number: int
    """Index in the shard, from 0."""
    offset: int
    """Start of its data, after the header."""
    data: bytes
    is_whole: bool
    """Whether the checksum of the data is right."""


def load(data: DataSection, seed: int, report: ReportProgress) -> Datasets:
    """Index the shards of `data.root`, and check all checksums.

    The image is feature `image/encoded` or `image`; the label is feature `data.label`, by default
    `image/class/label` or `label`. See `first_label` for labels that count from 1.

    Raises:
        JobError: no `data.root`, `data.label` is a number, or labels may count from 0 or from 1.
        RunError: shards or samples are missing or damaged.
    """
    train, test = load_sets(data, _FORMAT, report)
    report_bad(train, data.on_bad_sample)
    some_label = int(train.targets[train.targets != _UNKNOWN_LABEL][0])
    train, test = (_with_known_labels(samples, some_label) for samples in (train, test))
    return encoded_source(data, train, test, data.num_classes, data.first_label)


def _with_known_labels(samples: EncodedDataset, label: int) -> EncodedDataset:
    unknown = samples.targets == _UNKNOWN_LABEL
    # Bad samples are never used, so any label will do.
    return samples.labeled(np.where(unknown, label, samples.targets)) if unknown.any() else samples


def _read_shard(root: Path, name: str, faults: Faults, labels: tuple[str, ...]) -> Iterator[Entry]:
    with (root / name).open("rb", buffering=1 << 20) as file:
        for record in _records(root / name, file):
            try:
                yield _entry(name, record, labels)
            except UnusableError as error:
                faults.add(f"{root / name}, record {record.number} at byte {record.offset - _HEADER.size}: {error}")


_FORMAT = ShardFormat(
    kind="tfrecord",
    # The names used by tensorflow/models, then those of tensorflow_datasets.
    train=("train*", "*-train.tfrecord*"),
    test=("validation*", "val*", "test*", "*-validation.tfrecord*", "*-test.tfrecord*"),
    labels=("image/class/label", "label"),
    read=_read_shard,
)


def _records(path: Path, file: BinaryIO) -> Iterator[Record]:
    """Yield the records: uint64 length, its checksum, the data, its checksum; all little-endian.

    Raises:
        RunError: the shard ends within a record, or a length is damaged, so that later records cannot be found.
    """
    size, start = path.stat().st_size, 0
    for number in count():
        if not (header := file.read(_HEADER.size)):
            return
        place, left = f"{path}, record {number} at byte {start}", size - start
        if len(header) < _HEADER.size:
            raise RunError(f"{place} is truncated: {len(header)} bytes are left, its header alone has {_HEADER.size}")
        length, checksum = _HEADER.unpack(header)
        if masked_crc32c(header[:8]) != checksum:
            if number == 0:
                refuse_compressed(path)
            raise RunError(f"{place}: the checksum of its length is wrong: damaged, or not a TFRecord")
        if (whole := _HEADER.size + length + _CHECKSUM.size) > left:
            raise RunError(f"{place} is truncated: {left} of {whole} bytes are left")
        data = file.read(length)
        yield Record(number, start + _HEADER.size, data, file.read(4) == _CHECKSUM.pack(masked_crc32c(data)))
        start += whole


def masked_crc32c(data: bytes) -> int:
    """Return TFRecord's checksum: the CRC rotated right by 15 bits, plus a constant, so that CRCs of CRCs work."""
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def _entry(shard: str, record: Record, labels: tuple[str, ...]) -> Entry:
    member = f"record {record.number}"
    if not record.is_whole:
        bad = bad_header("has a wrong checksum: the record is damaged")
        return Entry(shard, record.offset, len(record.data), _UNKNOWN_LABEL, *bad, 0, member)
    features = _features(record.data)
    image = _only_value(features, _IMAGE_FEATURES, "bytes")
    label = checked_label(_only_value(features, labels, "int64"))
    header = read_header(image)
    return Entry(shard, record.offset + _position(record.data, image), len(image), label, *header, member)


def _position(record: bytes, image: bytes) -> int:
    """Return the position of an image in its record; searching for its first bytes is faster than for all."""
    start = record.index(image[:64])
    while not record.startswith(image, start):
        start = record.index(image[:64], start + 1)
    return start


def _only_value(features: Any, names: tuple[str, ...], kind: str) -> Any:
    name = next((name for name in names if name in features), None)
    if name is None:
        raise UnusableError(f"has no feature {' or '.join(names)}: it has {', '.join(sorted(features)) or 'none'}")
    values = getattr(features[name], f"{kind}_list").value
    if len(values) != 1:
        raise UnusableError(f"feature {name} has {len(values)} values of type {kind}, must have 1")
    return values[0]


def _features(data: bytes) -> Any:
    try:
        return _example_class().FromString(data).features.feature
    except DecodeError:
        raise UnusableError("is not a tf.train.Example") from None


@cache
def _example_class() -> Any:
    pool = descriptor_pool.DescriptorPool()
    pool.Add(text_format.Parse(_SCHEMA, descriptor_pb2.FileDescriptorProto()))
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("tensorflow.Example"))
