"""Shards: a few large files of many samples each, which are read once from start to end to index them."""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hvd_batchgrow.config import DataSection
from hvd_batchgrow.config.source_specs import ReportProgress
from hvd_batchgrow.data.datasets.cache import Arrays, cached_arrays, file_stamp
from hvd_batchgrow.data.datasets.compressed import unpacking
from hvd_batchgrow.data.datasets.section_values import need_root, refuse_shared
from hvd_batchgrow.data.images.encoded_dataset import NUM_SHOWN, EncodedDataset, listing, nearest, reading
from hvd_batchgrow.data.images.image_index import Entry, make_index
from hvd_batchgrow.messages.errors import Fault, JobError, RunError
from hvd_batchgrow.messages.wording import listed

_REPORT_BYTES = 1 << 24
"""Bytes between progress reports."""


class UnusableError(ValueError):
    """A sample cannot be used, regardless of `data.on_bad_sample`."""


def checked_label(label: int) -> int:
    """Return a label. Raise UnusableError if it is too large to be stored; its range is checked later."""
    if abs(label) >= 1 << 62:
        raise UnusableError(f"its label is {label}: no class has such a number")
    return label


@dataclass
class Faults:
    """Samples that cannot be used: their number, and messages for the first ones."""

    count: int = 0
    lines: list[str] = field(default_factory=list)

    def add(self, line: str) -> None:
        """Add a sample."""
        self.count += 1
        if len(self.lines) < NUM_SHOWN:
            self.lines.append(line)

    def check(self, root: Path) -> None:
        """Raise RunError if a sample cannot be used."""
        if self.count:
            raise RunError(listing(f"{self.count} samples under {root} cannot be used", self.lines, self.count))


ReadShard = Callable[[Path, str, Faults], Iterator[Entry]]
"""Yields the samples of root/name in their order, and adds those that cannot be used to the faults."""


@dataclass(frozen=True)
class ShardFormat:
    """The differences between formats."""

    kind: str
    """Name of the source."""
    train: tuple[str, ...]
    """Conventional name patterns of training shards: the first pattern that matches a file is used."""
    test: tuple[str, ...]
    labels: tuple[str, ...]
    """Conventional names of labels, in the order in which they are tried."""
    read: Callable[[Path, str, Faults, tuple[str, ...]], Iterator[Entry]]
    """As `ReadShard`, with the names of the label as a fourth argument."""


def load_sets(data: DataSection, form: ShardFormat, report: ReportProgress) -> tuple[EncodedDataset, EncodedDataset]:
    """Return training and test samples, whose index is built or taken from the cache.

    Raises:
        JobError: no `data.root`, or `data.label` is a number.
        RunError: shards that are missing, damaged or in both sets, or samples that cannot be used.
    """
    if isinstance(data.label, int | tuple):
        raise JobError([Fault("data.label", f"= {data.label}: a {form.kind} label has a name, such as 'label'")])
    root, labels = need_root(data, "the folder of its files"), form.labels if data.label is None else (data.label,)
    sets = {
        "data.train": find_shards(root, "data.train", data.train, form.train),
        "data.test": find_shards(root, "data.test", data.test, form.test),
    }
    train, test = ([root / name for name in names] for names in sets.values())
    refuse_shared(train, test, "shard")
    indexed = []

    def read(root: Path, name: str, faults: Faults) -> Iterator[Entry]:
        return form.read(root, name, faults, labels)

    for key, names in sets.items():
        identity = [form.kind, str(root.resolve()), key, data.train, data.test, *labels]
        samples = _indexed(
            root, form.kind, json.dumps(identity), names, read, report, apply_orientation=data.apply_orientation
        )
        indexed.append(samples)
    return indexed[0], indexed[1]


def find_shards(root: Path, key: str, wanted: str | None, conventional: Sequence[str]) -> list[str]:
    """Return the names of shards, sorted.

    Args:
        root: folder that names are relative to.
        key: of the job, for messages.
        wanted: a name or a pattern, which may have ranges in braces, `train-{0000..0009}.tar`: each file of
            a range must exist. None: the first of `conventional` that matches a file.

    Raises:
        RunError: no file matches, a file of a range is missing, or without `wanted` a file of `NAME-00000-of-00012`.
    """
    if wanted is not None:
        parts = {part: _files(root, part) for part in _expanded(wanted)}
        missing = [part for part, names in parts.items() if not names]
        found = [name for names in parts.values() for name in names]
        tried = ", ".join(missing[:NUM_SHOWN]) + (", …" if len(missing) > NUM_SHOWN else "")
    else:
        found = next((names for pattern in conventional if (names := _files(root, pattern))), [])
        missing, tried = [] if found else list(conventional), " or ".join(conventional)
        _refuse_gaps(root, key, found)
    if missing:
        raise RunError(f"{root}: no file is named {tried} ({key}); {nearest(root, missing[0])}")
    return sorted(set(found))


def _refuse_gaps(root: Path, key: str, names: Sequence[str]) -> None:
    """Raise RunError if shards are missing whose number and total are in the names, counted from 0 or from 1."""
    sets: dict[tuple[str, ...], set[int]] = {}
    for name in names:
        if match := re.fullmatch(r"(.*-)(\d+)(-of-(\d{1,6})(?!\d).*)", name):
            sets.setdefault((match[1], match[3], match[4]), set()).add(int(match[2]))
    for (head, tail, total), found in sets.items():
        first = int(0 not in found and int(total) in found)
        missing = [k for k in range(first, first + int(total)) if k not in found]
        if missing:
            shown = listed([f"{head}{k:0{len(total)}}{tail}" for k in missing], NUM_SHOWN)
            remedy = f"{key} = {glob.escape(head) + '*' + glob.escape(tail)!r} reads only those that are there"
            raise RunError(f"{root}: {len(missing):,} of {int(total):,} shards are missing: {shown}; {remedy}")


def _expanded(pattern: str) -> Iterator[str]:
    """Yield each name of a pattern with ranges; numbers are padded like the start of the range, as in a shell."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if match is None:
        yield pattern
        return
    first, last = sorted(map(int, match.groups()))
    for number in range(first, last + 1):
        name = f"{pattern[: match.start()]}{number:0{len(match[1])}}{pattern[match.end() :]}"
        yield from _expanded(name)


def _files(root: Path, pattern: str) -> list[str]:
    return [name for name in glob.glob(pattern, root_dir=root) if (root / name).is_file()]


def _indexed(
    root: Path,
    kind: str,
    identity: str,
    names: Sequence[str],
    read: ReadShard,
    report: ReportProgress,
    *,
    apply_orientation: bool,
) -> EncodedDataset:
    stamp = file_stamp(*(root / name for name in names))

    def build() -> Arrays:
        faults = Faults()
        with reading(root):
            index = make_index(_entries(root, names, [size for _, size, _ in stamp], read, faults, report))
        faults.check(root)
        return index

    index = cached_arrays(kind, identity, stamp, build)
    return EncodedDataset(root, index, apply_orientation=apply_orientation)


def _entries(
    root: Path, names: Sequence[str], sizes: Sequence[int], read: ReadShard, faults: Faults, report: ReportProgress
) -> Iterator[Entry]:
    what, total = f"index of {root / names[0]}" + (", …" if len(names) > 1 else ""), sum(sizes)
    before = reported = 0
    for name, size in zip(names, sizes, strict=True):
        num_read = 0
        for entry in read(root, name, faults):
            yield entry
            num_read += 1
            if (done := before + entry.offset + entry.length) >= reported + _REPORT_BYTES:
                report(what, done, total)
                reported = done
        if not num_read and not faults.count:
            raise RunError(f"{root / name} contains no samples: it is truncated, or not one of the shards")
        before += size
    report(what, total, total)


def refuse_compressed(path: Path) -> None:
    """Raise RunError for a compressed file, which allows no random access.

    Call it only for files that could not be read: a valid file may start with the same bytes.
    """
    if command := unpacking(path):
        raise RunError(f"{path} is compressed: its samples cannot be read in random order; unpack it: {command}")
