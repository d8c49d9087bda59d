"""Walk folders of images: decide which files are images, which folders are classes, and what is skipped."""

from __future__ import annotations

import os
import stat
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

EXTENSIONS = (b".jpg", b".jpeg", b".png", b".ppm", b".bmp", b".pgm", b".tif", b".tiff", b".webp")
"""The extensions of torchvision.datasets.ImageFolder, in lower or upper case."""
_OTHER_IMAGES = {".gif", ".jfif", ".jpe", ".jp2", ".avif", ".heic", ".heif", ".jxl", ".tga", ".ico", ".pbm", ".pnm"}
"""Other image extensions, which are skipped here as in torchvision."""
_NOT_CLASSES = {
    *("__macosx", "__pycache__", "lost+found", "$recycle.bin", "system volume information"),
    *("@eadir", "@tmp", "#recycle", "#snapshot", "@recycle", "@recently-snapshot", "@__thumb"),  # network storage
}
"""Folders made by operating systems, editors and file servers, in lower case."""
_NUM_SHOWN = 5


class ImageFile(NamedTuple):
    """An image found by a walk."""

    name: bytes
    """Path below the folder of its class."""
    length: int
    """Bytes; 0: not a regular file, or a dangling link."""
    mtime_ns: int


@dataclass
class Skipped:
    """Files and folders that a walk skipped."""

    folders: list[str] = field(default_factory=list)
    """Paths of folders that cannot be classes."""
    by_extension: Counter[str] = field(default_factory=Counter)
    """Number of files; those whose names begin with a dot count as "hidden"."""
    example: str = ""

    def add(self, name: bytes, place: bytes) -> None:
        """Count a skipped file."""
        text = os.fsdecode(name)
        extension = os.path.splitext(text)[1].lower() or "no extension"
        self.by_extension["hidden" if text.startswith(".") else extension] += 1
        self._show(os.fsdecode(place))

    def update(self, other: Skipped) -> None:
        """Add everything that another walk skipped."""
        self.folders += other.folders
        self.by_extension.update(other.by_extension)
        if other.example:
            self._show(other.example)

    def _show(self, example: str) -> None:
        self.example = min(self.example or example, example)  # not the first: file systems list in any order

    def other_images(self) -> list[str]:
        """Return the image extensions among the skipped files."""
        return sorted(_OTHER_IMAGES & self.by_extension.keys())

    def __str__(self) -> str:
        most = sorted(self.by_extension.items(), key=lambda item: (-item[1], item[0]))
        shown = [f"{extension} {count:,}" for extension, count in most[:_NUM_SHOWN]]
        return ", ".join(shown) + (", …" if len(most) > _NUM_SHOWN else "")


def is_class_name(name: str) -> bool:
    """Return whether a folder can be a class: it is neither hidden nor made by an operating system."""
    return not name.startswith(".") and name.lower() not in _NOT_CLASSES


def images_below(folder: Path) -> tuple[list[ImageFile], Skipped]:
    """Return the images below a folder, sorted by the bytes of their paths, and everything that was skipped.

    Folders that cannot be classes are not entered at any depth: `.ipynb_checkpoints` and `@eaDir` hold copies.
    """
    found: list[ImageFile] = []
    skipped = Skipped()
    _collect(os.fsencode(folder), b"", found, skipped)
    return sorted(found), skipped


def _collect(folder: bytes, below: bytes, found: list[ImageFile], skipped: Skipped) -> None:
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():
                if is_class_name(os.fsdecode(entry.name)):
                    _collect(entry.path, below + entry.name + b"/", found, skipped)
                else:
                    skipped.folders.append(os.fsdecode(entry.path))
            elif is_image_name(entry.name):
                found.append(ImageFile(below + entry.name, *_length_and_time(entry)))
            else:
                skipped.add(entry.name, entry.path)


def is_image_name(name: bytes) -> bool:
    """Return whether a file is read as an image; hidden files, such as macOS's `._photo.jpg`, are not."""
    return not name.startswith(b".") and name.lower().endswith(EXTENSIONS)


def _length_and_time(entry: os.DirEntry[bytes]) -> tuple[int, int]:
    try:
        status = entry.stat()
    except FileNotFoundError:  # a dangling link: reported later as a bad image
        return 0, 0
    # A pipe or device has no length, and reading it might never end.
    return (status.st_size, status.st_mtime_ns) if stat.S_ISREG(status.st_mode) else (0, 0)
