"""Folders of images, a sub-folder for each class: ImageNet's layout."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from hvd_batchgrow.config import DataSection
from hvd_batchgrow.data.cache import Arrays, cached_arrays
from hvd_batchgrow.data.encoded import (
    NUM_SHOWN,
    EncodedSamples,
    encoded_source,
    listing,
    nearest,
    read_header,
    reading,
    source_root,
)
from hvd_batchgrow.data.image_index import Entry, make_index
from hvd_batchgrow.data.samples import ReportProgress, Source
from hvd_batchgrow.errors import RunError

EXTENSIONS = (b".jpg", b".jpeg", b".png", b".ppm", b".bmp", b".pgm", b".tif", b".tiff", b".webp")
"""As torchvision.datasets.ImageFolder has them, in small or capital letters."""
_NUM_THREADS = 16
"""That read headers: more than cores, as they mostly wait for the disk."""
_BLOCK = 64
"""Files that a thread is given at a time."""


class ImageFile(NamedTuple):
    """An image, as a walk finds it."""

    name: bytes
    """Path below the folder of its class."""
    length: int
    """Bytes."""
    mtime_ns: int


class Labelled(NamedTuple):
    """An image of a set."""

    path: str
    """Relative to the source's root."""
    length: int
    label: int


@dataclass(frozen=True)
class Tree:
    """What a walk over the folder of a set has found."""

    folder: Path
    """Relative to the source's root."""
    classes: tuple[str, ...]
    """Its sub-folders, sorted."""
    num_bytes: int
    """Of all images."""
    digest: str
    """SHA-256 over name, length and time of every image: of ImageNet the list itself would be 100 MB."""


def load(data: DataSection, report: ReportProgress) -> Source:
    """Index root/train/<class>/… and root/val/<class>/…, and check them.

    Classes are the sub-folders of the training folder, numbered in the order of their names; samples go by
    class, and in there by path; both orders are those of the bytes. `data.train` and `data.test` name other
    folders; by habit test images are in `val`, or in `test` where there is no `val`.

    Raises:
        JobError: no `data.root`.
        RunError: a folder that is missing, empty or no class, or bad images.
    """
    root = source_root(data)
    train = _walk_set(root, Path(data.train or "train"))
    test = _walk_set(root, Path(data.test or ("test" if _has_only_test(root) else "val")))
    _check_classes(root, train, test)
    num_classes = data.num_classes or len(train.classes)
    if num_classes < len(train.classes):
        raise RunError(f"data.num_classes = {num_classes}, but {root / train.folder} has {len(train.classes)} classes")
    samples = [_indexed(root, tree, train.classes, report) for tree in (train, test)]
    return encoded_source(data, samples[0], samples[1], num_classes)


def _has_only_test(root: Path) -> bool:
    return (root / "test").is_dir() and not (root / "val").is_dir()


def _check_classes(root: Path, train: Tree, test: Tree) -> None:
    known = set(train.classes)
    unknown = [name for name in test.classes if name not in known]
    if unknown:
        near = [get_close_matches(name, train.classes, n=1, cutoff=0)[0] for name in unknown[:NUM_SHOWN]]
        lines = [f"{root / test.folder / name}, nearest: {n}" for name, n in zip(unknown, near, strict=False)]
        head = f"{len(unknown)} folders are none of the {len(known)} classes of {root / train.folder}"
        raise RunError(listing(head, lines, len(unknown)))


def _walk_set(root: Path, folder: Path) -> Tree:
    digest, num_bytes, empty = hashlib.sha256(), 0, []
    with reading(root / folder):
        classes = _class_folders(root / folder)
        for name in classes:
            images = images_below(root / folder / name)
            digest.update(b"%b\0%d\0" % (os.fsencode(name), len(images)))
            digest.update(b"".join([b"%b\0%d\0%d\0" % image for image in images]))
            num_bytes += sum([image.length for image in images])
            if not images:
                empty.append(name)
    if empty:
        head = f"{len(empty)} of {len(classes)} class folders in {root / folder} hold no images"
        raise RunError(listing(head, empty[:NUM_SHOWN], len(empty)))
    return Tree(folder, tuple(classes), num_bytes, digest.hexdigest())


def _class_folders(path: Path) -> list[str]:
    if not path.is_dir():
        raise RunError(f"{path} is no folder; {nearest(path.parent, path.name)}")
    with os.scandir(path) as entries:
        found = sorted((os.fsencode(entry.name), entry.is_dir()) for entry in entries)
    classes = [os.fsdecode(name) for name, is_folder in found if is_folder]
    if not classes:
        num_images = sum(name.lower().endswith(EXTENSIONS) for name, _ in found)
        raise RunError(f"{path} has no class folders; the {num_images} images in it belong into {path}/<class>")
    return classes


def images_below(folder: Path) -> list[ImageFile]:
    """The images of a folder and of all folders in it, sorted by the bytes of their paths, not as the disk has them."""
    found: list[ImageFile] = []
    _collect(os.fsencode(folder), b"", found)
    return sorted(found)


def _collect(folder: bytes, below: bytes, found: list[ImageFile]) -> None:
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():
                _collect(entry.path, below + entry.name + b"/", found)
            elif entry.name.lower().endswith(EXTENSIONS):
                found.append(ImageFile(below + entry.name, *_length_and_time(entry)))


def _length_and_time(entry: os.DirEntry[bytes]) -> tuple[int, int]:
    try:
        status = entry.stat()
    except FileNotFoundError:  # a link that leads nowhere: a bad image, as it will turn out
        return 0, 0
    # A pipe or device has no length, and reading it might never end.
    return (status.st_size, status.st_mtime_ns) if stat.S_ISREG(status.st_mode) else (0, 0)


def _indexed(root: Path, tree: Tree, classes: Sequence[str], report: ReportProgress) -> EncodedSamples:
    identity = json.dumps([str(root.resolve()), str(tree.folder)])
    names = b"\0".join(map(os.fsencode, classes))

    def build() -> Arrays:
        with reading(root / tree.folder):
            return make_index(_entries(root, tree, classes, report))

    stamp = [tree.digest, hashlib.sha256(names).hexdigest()]
    return EncodedSamples(root, cached_arrays("image_folder", identity, stamp, build))


def _entries(root: Path, tree: Tree, classes: Sequence[str], report: ReportProgress) -> Iterator[Entry]:
    Image.init()  # loads Pillow's formats, which is not for several threads to do at once
    done = 0
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        for entries in _measured(pool, root, _images(root, tree, classes)):
            yield from entries
            done += sum(entry.length for entry in entries)
            report(f"index of {root / tree.folder}", done, tree.num_bytes)


def _images(root: Path, tree: Tree, classes: Sequence[str]) -> Iterator[Labelled]:
    """Walks again: what the first walk found would need hundreds of megabytes in every rank."""
    labels = {name: label for label, name in enumerate(classes)}
    for name in tree.classes:
        for image in images_below(root / tree.folder / name):
            yield Labelled(str(tree.folder / name / os.fsdecode(image.name)), image.length, labels[name])


def _measured(pool: ThreadPoolExecutor, root: Path, images: Iterable[Labelled]) -> Iterator[list[Entry]]:
    """Blocks of entries, in order; no more of them are under way than keep the threads busy."""
    images, waiting = iter(images), deque[Future[list[Entry]]]()
    while block := list(islice(images, _BLOCK)):
        waiting.append(pool.submit(_measure, root, block))
        if len(waiting) >= 2 * _NUM_THREADS:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _measure(root: Path, block: Sequence[Labelled]) -> list[Entry]:
    return [Entry(image.path, 0, image.length, image.label, *_header_of(root, image)) for image in block]


def _header_of(root: Path, image: Labelled) -> tuple[int, int, int]:
    if not image.length:
        return 0, 0, 0
    try:
        with (root / image.path).open("rb") as file:
            return read_header(file)
    except OSError:
        return 0, 0, 0
