"""Folders of images with a sub-folder for each class, as in ImageNet."""

from __future__ import annotations

import hashlib
import json
import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from hvd_batchgrow.config import DataSection
from hvd_batchgrow.config.source_specs import ReportProgress
from hvd_batchgrow.data.datasets.cache import Arrays, cached_arrays
from hvd_batchgrow.data.datasets.dataset import Datasets
from hvd_batchgrow.data.datasets.section_values import need_root, notes_on_unused
from hvd_batchgrow.data.held_out import with_test
from hvd_batchgrow.data.images.class_folders import EXTENSIONS, Skipped, images_below, is_class_name, is_image_name
from hvd_batchgrow.data.images.encoded_dataset import (
    NUM_SHOWN,
    EncodedDataset,
    encoded_source,
    listing,
    nearest,
    read_header,
    reading,
    report_bad,
)
from hvd_batchgrow.data.images.image_header import bad_header
from hvd_batchgrow.data.images.image_index import Entry, make_index
from hvd_batchgrow.messages.errors import RunError, reason_of
from hvd_batchgrow.messages.wording import counted

_NUM_THREADS = 16
"""Threads that read headers: more than cores, since they mostly wait for the disk."""
_BLOCK = 64
"""Files per task of a thread."""
_EXTENSIONS_TEXT = ", ".join(map(os.fsdecode, EXTENSIONS))


class Labeled(NamedTuple):
    """An image of a set."""

    path: str
    """Relative to the source's root."""
    length: int
    label: int


@dataclass(frozen=True)
class Tree:
    """The result of a walk over the folder of a set."""

    folder: Path
    """Relative to the source's root."""
    classes: tuple[str, ...]
    """Its sub-folders that hold images, sorted."""
    num_bytes: int
    """Of all images."""
    names: str
    """SHA-256 over class, name and length of every image."""
    digest: str
    """SHA-256 over name, length and modification time of every image; the list itself would be 100 MB for ImageNet."""
    notes: tuple[str, ...]
    """Messages that name the skipped files and folders."""


def load(data: DataSection, seed: int, report: ReportProgress) -> Datasets:
    """Index root/train/<class>/… and root/val/<class>/…, and check them.

    Classes are the sub-folders of the training folder that hold images, numbered in the order of their names;
    samples are ordered by class and then by path, both compared as bytes. `data.train` and `data.test`
    name other folders. By default test images are in `val`, or in `test` if `val` does not exist. With
    `data.test_fraction` they are a part of the training images, which are then in `train`, or in the root itself if
    `train` does not exist. The source's notes list what was skipped.

    Raises:
        JobError: no `data.root`.
        RunError: a folder is missing or empty, a test folder is not a class, or images are bad.
    """
    root = need_root(data, "the folder of its files")
    one_folder = bool(data.test_fraction)
    usual = "." if one_folder and not (root / "train").is_dir() else "train"
    hint = _fraction_hint(data, root)
    train = _walk_set(root, Path(data.train or usual), hint)
    test_folder = Path(data.test or ("test" if _has_only_test(root) else "val"))
    test = train if one_folder else _walk_set(root, test_folder, hint)
    _check_classes(root, test, train.classes, str(root / train.folder))
    num_classes = data.num_classes or len(train.classes)
    if num_classes < len(train.classes):
        raise RunError(f"data.num_classes = {num_classes}, but {root / train.folder} has {len(train.classes)} classes")
    trees = (train,) if one_folder else (train, test)
    samples = [_indexed(root, tree, train.classes, report, apply_orientation=data.apply_orientation) for tree in trees]
    source = replace(encoded_source(data, samples[0], samples[-1], num_classes), schema={"classes": [*train.classes]})
    if one_folder:
        # If the root itself is the training folder, these folders are classes.
        usual_tests = [] if root.samefile(root / train.folder) else [root / "val", root / "test"]
        notes = (*train.notes, *notes_on_unused(usual_tests, data))
        return with_test(replace(source, notes=notes), data.test_fraction, seed)
    return replace(source, notes=(*train.notes, *test.notes, *_untested(root, train, test), *_same(root, train, test)))


def load_test(data: DataSection, classes: Sequence[str], report: ReportProgress) -> EncodedDataset:
    """Index the test set alone, for classes that are known.

    Args:
        data: the section. Without `data.test`, the folder is `val`, `test`, or `data.root` itself, in this order.
        classes: names of the class folders, in the order of their numbers; some may have no images.
        report: called with the progress of indexing.

    Raises:
        JobError: no `data.root`.
        RunError: the folder is missing or empty, a folder is not a class, or images are bad.
    """
    root = need_root(data, "the folder of its files")
    usual = next((name for name in ("val", "test") if (root / name).is_dir()), ".")
    tree = _walk_set(root, Path(data.test or usual))
    _check_classes(root, tree, classes, "the run")
    samples = _indexed(root, tree, classes, report, apply_orientation=data.apply_orientation)
    report_bad(samples, data.on_bad_sample)
    return samples


def _untested(root: Path, train: Tree, test: Tree) -> list[str]:
    missing = sorted(set(train.classes) - set(test.classes))
    names = ", ".join(missing[:NUM_SHOWN]) + (", …" if len(missing) > NUM_SHOWN else "")
    head = f"{root / test.folder} has no images of {len(missing)} of the {len(train.classes)} classes"
    return [f"{head}: {names}"] if missing else []


def _same(root: Path, train: Tree, test: Tree) -> list[str]:
    if train.names != test.names:
        return []
    head = f"{root / test.folder} has the same files as {root / train.folder}, by name and size"
    return [f"{head}: the test images are those of the training"]


def _has_only_test(root: Path) -> bool:
    return (root / "test").is_dir() and not (root / "val").is_dir()


def _check_classes(root: Path, test: Tree, classes: Sequence[str], place: str) -> None:
    known = set(classes)
    unknown = [name for name in test.classes if name not in known]
    if unknown:
        near = [get_close_matches(name, classes, n=1, cutoff=0)[0] for name in unknown[:NUM_SHOWN]]
        lines = [f"{root / test.folder / name}, nearest: {n}" for name, n in zip(unknown, near, strict=False)]
        verb = "is" if len(unknown) == 1 else "are"
        head = f"{counted(len(unknown), 'folder')} {verb} not among the {len(known)} classes of {place}"
        raise RunError(listing(head, lines, len(unknown)))


def _fraction_hint(data: DataSection, root: Path) -> str:
    """Return how to use one folder of images for training and testing; empty if the job or the root has others."""
    if data.source != "image_folder" or data.train or data.test or (root / "val").is_dir() or (root / "test").is_dir():
        return ""
    if (root / "train").is_dir():
        return "; data.test_fraction = 0.1 holds out a tenth of the training images for testing"
    if any(entry.is_dir() and is_class_name(entry.name) for entry in root.iterdir()):
        return "; if these are the classes, data.test_fraction = 0.1 holds out a tenth of the images for testing"
    return ""


def _walk_set(root: Path, folder: Path, hint: str = "") -> Tree:
    digest, names_digest, num_bytes, path = hashlib.sha256(), hashlib.sha256(), 0, root / folder
    classes, empty = list[str](), dict[str, Skipped]()
    with reading(path):
        names, skipped = _sub_folders(path, hint)
        for name in names:
            images, others = images_below(path / name)
            skipped.update(others)
            if not images:
                empty[name] = others
                continue
            classes.append(name)
            head = b"%b\0%d\0" % (os.fsencode(name), len(images))
            digest.update(head)
            names_digest.update(head + b"".join([b"%b\0%d\0" % image[:2] for image in images]))
            digest.update(b"".join([b"%b\0%d\0%d\0" % image for image in images]))
            num_bytes += sum([image.length for image in images])
    _check_empty(path, classes, empty)
    notes = (*_files_note(path, skipped), *_folders_note(path, skipped.folders, list(empty)))
    return Tree(folder, tuple(classes), num_bytes, names_digest.hexdigest(), digest.hexdigest(), notes)


def _sub_folders(path: Path, hint: str) -> tuple[list[str], Skipped]:
    """Return the names of possible class folders, sorted by their bytes, and everything else in the folder."""
    if not path.is_dir():
        raise RunError(f"{path} is not a folder; {nearest(path.parent, path.name)}{hint}")
    with os.scandir(os.fsencode(path)) as entries:
        found = sorted((entry.name, entry.is_dir()) for entry in entries)
    loose = [name for name, is_folder in found if not is_folder]
    folders = [os.fsdecode(name) for name, is_folder in found if is_folder]
    if not any(map(is_class_name, folders)):
        num_images = sum(map(is_image_name, loose))
        raise RunError(f"{path} has no class folders; move the {num_images} images in it to {path}/<class>")
    skipped = Skipped([str(path / name) for name in folders if not is_class_name(name)])
    for name in loose:
        skipped.add(name, os.path.join(os.fsencode(path), name))
    return list(filter(is_class_name, folders)), skipped


def _check_empty(path: Path, classes: Sequence[str], empty: Mapping[str, Skipped]) -> None:
    """Raise RunError if no folder is a class, or if a folder has only images with unsupported extensions."""
    lost = [f"{name}: {others}" for name, others in empty.items() if others.other_images()]
    if lost:
        folders = counted(len(lost), "folder")
        head = f"{path}: the images of {folders} are not named {_EXTENSIONS_TEXT}; rename or convert them"
        raise RunError(listing(head, lost[:NUM_SHOWN], len(lost)))
    if not classes:
        raise RunError(f"{path} has no class folder that contains images ({_EXTENSIONS_TEXT})")


def _files_note(path: Path, skipped: Skipped) -> list[str]:
    if not (count := skipped.by_extension.total()):
        return []
    head = f"skipped {counted(count, 'file')} in {path} that are not images of a class"
    hint = f"; of images, only {_EXTENSIONS_TEXT} are read" if skipped.other_images() else ""
    return [f"{head}: {skipped} (such as {skipped.example}){hint}"]


def _folders_note(path: Path, ignored: Sequence[str], empty: Sequence[str]) -> list[str]:
    names = [*(os.path.relpath(name, path) for name in sorted(ignored)), *(f"{n} (no images)" for n in empty)]
    if not names:
        return []
    shown = ", ".join(names[:NUM_SHOWN]) + (", …" if len(names) > NUM_SHOWN else "")
    return [f"ignored {counted(len(names), 'folder')} in {path} that are not classes: {shown}"]


def _indexed(
    root: Path, tree: Tree, classes: Sequence[str], report: ReportProgress, *, apply_orientation: bool
) -> EncodedDataset:
    identity = json.dumps([str(root.resolve()), str(tree.folder)])
    names = b"\0".join(map(os.fsencode, classes))

    def build() -> Arrays:
        with reading(root / tree.folder):
            return make_index(_entries(root, tree, classes, report))

    stamp = [tree.digest, hashlib.sha256(names).hexdigest()]
    index = cached_arrays("image_folder", identity, stamp, build)
    return EncodedDataset(root, index, apply_orientation=apply_orientation)


def _entries(root: Path, tree: Tree, classes: Sequence[str], report: ReportProgress) -> Iterator[Entry]:
    done = 0
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        for entries in _measured(pool, root, _images(root, tree, classes)):
            yield from entries
            done += sum(entry.length for entry in entries)
            report(f"index of {root / tree.folder}", done, tree.num_bytes)


def _images(root: Path, tree: Tree, classes: Sequence[str]) -> Iterator[Labeled]:
    """Walk again: keeping the result of the first walk would take hundreds of megabytes in every rank."""
    labels = {name: label for label, name in enumerate(classes)}
    for name in tree.classes:
        for image in images_below(root / tree.folder / name)[0]:
            yield Labeled(str(tree.folder / name / os.fsdecode(image.name)), image.length, labels[name])


def _measured(pool: ThreadPoolExecutor, root: Path, images: Iterable[Labeled]) -> Iterator[list[Entry]]:
    """Yield blocks of entries in order, with only as many tasks in flight as keep the threads busy."""
    images, waiting = iter(images), deque[Future[list[Entry]]]()
    while block := list(islice(images, _BLOCK)):
        waiting.append(pool.submit(_measure, root, block))
        if len(waiting) >= 2 * _NUM_THREADS:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _measure(root: Path, block: Sequence[Labeled]) -> list[Entry]:
    return [Entry(image.path, 0, image.length, image.label, *_header_of(root, image)) for image in block]


def _header_of(root: Path, image: Labeled) -> tuple[int, int, int, bool, str, int]:
    if not image.length:
        return *bad_header("is empty, a dangling link, or not a regular file"), 0
    try:
        with (root / image.path).open("rb") as file:
            return read_header(file)
    except OSError as error:
        return *bad_header(f"cannot be read: {reason_of(error)}"), 0
