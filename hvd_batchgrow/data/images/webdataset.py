"""WebDataset: uncompressed tar files in which each sample is a few members."""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import BinaryIO, NamedTuple

from hvd_batchgrow.config import DataSection
from hvd_batchgrow.config.source_specs import ReportProgress
from hvd_batchgrow.data.datasets.dataset import Datasets
from hvd_batchgrow.data.images.encoded_dataset import encoded_source, read_header
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

IMAGE_EXTENSIONS = frozenset(("jpg", "jpeg", "png", "ppm", "pgm", "pbm", "pnm", "bmp", "tif", "tiff", "webp"))
_NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)$", re.DOTALL)
_META = re.compile(r"__[^/]*__($|/)")
_END_BYTES = 1 << 20
"""Bytes checked after the last member; writers pad to 10 KiB."""


class Member(NamedTuple):
    """A file in a tar file."""

    name: str
    key: str
    """Key of its sample: the path up to the first dot of its last part."""
    extension: str
    """The text after that dot, in lower case."""
    offset: int
    """Start of its data in the tar file."""
    length: int


def load(data: DataSection, seed: int, report: ReportProgress) -> Datasets:
    """Index the shards of `data.root` and check them.

    Adjacent members with the same key are a sample: one image and a label. The label is a number in a separate
    member, `key.cls`, or a field of `key.json`. `data.label` names the extension or the field; by default cls, then
    label.

    Raises:
        JobError: no `data.root`, or `data.label` is a number.
        RunError: shards or samples are missing or damaged.
    """
    train, test = load_sets(data, _FORMAT, report)
    return encoded_source(data, train, test, data.num_classes, data.first_label)


def _read_shard(root: Path, name: str, faults: Faults, labels: tuple[str, ...]) -> Iterator[Entry]:
    with (root / name).open("rb", buffering=1 << 20) as file:
        for key, members in groupby(_members(root / name, file), key=lambda member: member.key):
            try:
                yield _entry(name, list(members), labels, file)
            except UnusableError as error:
                faults.add(f"{root / name}, sample {key!r}: {error}")


_FORMAT = ShardFormat(
    kind="webdataset",
    # Compressed shards come last, only to report them as an error.
    train=("*train*.tar", "*train*.tar.*", "*train*.tgz"),
    test=("*val*.tar", "*test*.tar", "*val*.tar.*", "*test*.tar.*", "*val*.tgz", "*test*.tgz"),
    labels=("cls", "label"),
    read=_read_shard,
)


def _members(path: Path, file: BinaryIO) -> Iterator[Member]:
    """Yield the members of a tar file that belong to samples. Raise RunError if it is damaged or truncated."""
    end = 0
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while (info := tar.next()) is not None:
                if (member := _member(info)) is not None:
                    yield member
                tar.members.clear()  # type: ignore[attr-defined]  # otherwise the list grows with every member
                end = tar.offset
    except (tarfile.TarError, ValueError) as error:
        refuse_compressed(path)
        raise RunError(f"{path} is truncated or damaged at byte {end}: {error}") from None
    _check_end(path, file, end)


def _check_end(path: Path, file: BinaryIO, end: int) -> None:
    """Raise RunError unless zeros follow the last member: tarfile takes any invalid header for the end."""
    file.seek(end)
    tail = file.read(_END_BYTES)
    if len(tail) < tarfile.BLOCKSIZE:
        raise RunError(f"{path} is truncated at byte {end}: tar's end mark is missing, members may be too")
    if tail.count(0) < len(tail):
        raise RunError(f"{path} is damaged at byte {end}: neither a member nor the end mark, which consists of zeros")


def _member(info: tarfile.TarInfo) -> Member | None:
    """Return a member; None if WebDataset skips it: not a regular file, no extension, or a name such as `__meta__`."""
    match = _NAME.match(info.name)
    if not info.isreg() or match is None or _META.match(info.name):
        return None
    return Member(info.name, match[1], match[2].lower(), info.offset_data, info.size)


def _entry(shard: str, members: list[Member], labels: tuple[str, ...], file: BinaryIO) -> Entry:
    by_extension = {member.extension: member for member in members}
    if len(by_extension) < len(members):
        raise UnusableError("two members have the same extension: " + ", ".join(member.name for member in members))
    images = [member for member in members if member.extension in IMAGE_EXTENSIONS]
    if len(images) != 1:
        names = ", ".join(member.extension for member in members)
        raise UnusableError(f"has {len(images)} images, must have 1: its members are {names}")
    label = _label(
        {name: _bytes(file, by_extension[name]) for name in (*labels, "json") if name in by_extension}, labels
    )
    header = read_header(_bytes(file, images[0]))
    return Entry(shard, images[0].offset, images[0].length, label, *header, images[0].name)


def _bytes(file: BinaryIO, member: Member) -> bytes:
    file.seek(member.offset)
    return file.read(member.length)


def _label(contents: dict[str, bytes], names: tuple[str, ...]) -> int:
    """Return the number in the first member with one of these extensions, else in the first such field of `.json`."""
    for name in names:
        if name in contents:
            if not re.fullmatch(rb"\s*-?[0-9]{1,20}\s*", contents[name]):
                raise UnusableError(f".{name} is {contents[name][:20]!r}, must be an integer")
            return checked_label(int(contents[name]))
    try:
        fields = json.loads(contents.get("json", b"{}"))
    except (ValueError, RecursionError) as error:
        raise UnusableError(f".json cannot be read: {error}") from None
    for name in names:
        if isinstance(fields, dict) and name in fields:
            if type(fields[name]) is not int:  # True is an int, but not a label
                raise UnusableError(f"field {name} of .json is {fields[name]!r}, must be an integer")
            return checked_label(fields[name])
    raise UnusableError(
        "has no label: neither "
        + " nor ".join(f".{name}" for name in names)
        + ", nor a field of .json with such a name"
    )
