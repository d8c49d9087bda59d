"""Faces of fonts: find them, drop the unfit ones, and split them by family."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import ImageFont

from benchmarks.paper.glyph_images import open_font

ENDINGS = (".otf", ".ttc", ".ttf")
Images = NDArray[np.uint8]


@dataclass(frozen=True)
class Face:
    """One face of a font file."""

    path: Path
    index: int
    """Its place in a collection; 0 in other files."""
    name: str
    """The path below the packages, with the index: the same on each machine."""
    family: str
    style: str


def find_faces(folder: Path) -> Iterator[Face]:
    """Yield the faces of all font files below a folder, in the order of their paths. Unreadable files are skipped."""
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in ENDINGS and path.is_file() and not path.is_symlink():
            yield from _faces_of(path, path.relative_to(folder).as_posix())


def _faces_of(path: Path, name: str) -> Iterator[Face]:
    for index in range(64 if path.suffix.lower() == ".ttc" else 1):
        try:
            family, style = ImageFont.truetype(path, 10, index).getname()
        except OSError:  # no font, or past the last face of a collection
            return
        yield Face(path, index, f"{name}#{index}", family or path.stem, style or "")


def fault_of_face(face: Face, characters: str) -> str | None:
    """Return why a face does not have a real glyph for each character; None if it does.

    A character without a glyph is drawn as .notdef, which is what an unassigned code point is drawn as.
    """
    try:
        font = open_font(face.path, face.index, 64)
        missing = {_mask(font, character) for character in ("\uffff", "\U0010ffff")}
        masks = [_mask(font, character) for character in characters]
    except (OSError, ValueError) as error:
        return f"cannot be drawn: {error}"
    if any(not any(mask[1]) for mask in masks):
        return "has empty glyphs"
    if missing.intersection(masks):
        return "lacks characters"
    return None


def _mask(font: ImageFont.FreeTypeFont, character: str) -> tuple[tuple[int, int], bytes]:
    mask = font.getmask(character)
    return mask.size, bytes(mask)


def fault_of_images(images: Images, labels: Sequence[int]) -> str | None:
    """Return why images of a face do not determine their labels; None if they do.

    Args:
        images: (characters, side, side), one for each character.
        labels: the classes of the characters. Equal images with one label are allowed.
    """
    side = images.shape[1]
    heights = (images.max(axis=2) > 64).sum(axis=1)
    if np.median(heights) < side / 4:
        return "has small glyphs"
    found: dict[bytes, int] = {}
    for image, label in zip(images, labels, strict=True):
        if found.setdefault(image.tobytes(), label) != label:
            return "draws two classes alike"
    return None


def first_of_equals(images: Sequence[Images]) -> list[bool]:
    """Return for each face whether no earlier face has the same images."""
    seen: set[bytes] = set()
    first = []
    for image in images:
        digest = hashlib.sha256(image.tobytes()).digest()
        first.append(digest not in seen)
        seen.add(digest)
    return first


def differences(images: Images) -> NDArray[np.float64]:
    """Return the difference of each pair of faces, (faces, faces): 0 for equal images, 1 for those without overlap.

    It is |a - b|² / (|a|² + |b|²), where a and b are all pixels of a face.
    """
    flat = images.reshape(len(images), -1).astype(np.float32) / 255
    products = (flat @ flat.T).astype(np.float64)
    squares = np.diag(products)
    totals = squares[:, None] + squares[None, :]
    return np.asarray(np.clip(1 - 2 * products / totals, 0, 1))


def groups_of(families: Sequence[str], alike: Iterable[tuple[int, int]]) -> list[list[int]]:
    """Return the groups of faces that must stay on one side of the split, each in ascending order.

    Faces are in one group if the names of their families begin with the same word, as those of DejaVu Sans and DejaVu
    Serif do, or if they look alike; also through other faces.

    Args:
        families: the family of each face.
        alike: pairs of faces that look alike.
    """
    parents = list(range(len(families)))

    def root(face: int) -> int:
        while parents[face] != face:
            parents[face] = parents[parents[face]]
            face = parents[face]
        return face

    first: dict[str, int] = {}
    same_word = [(face, first.setdefault(first_word(family), face)) for face, family in enumerate(families)]
    for a, b in (*same_word, *alike):
        high, low = sorted((root(a), root(b)), reverse=True)
        parents[high] = low
    groups: dict[int, list[int]] = {}
    for face in range(len(families)):
        groups.setdefault(root(face), []).append(face)
    return list(groups.values())


def first_word(family: str) -> str:
    """Return the first word of a family's name in small letters: FreeSans and Free Sans give the same one."""
    word = family.split(maxsplit=1)[0] if family.split() else ""
    end = next((k for k in range(1, len(word)) if word[k].isupper() and word[k - 1].islower()), len(word))
    return word[:end].lower()


def split_groups(groups: Sequence[Sequence[int]], names: Sequence[str], test_fraction: float) -> list[bool]:
    """Return for each face whether it is for testing.

    Groups are drawn by the SHA-256 of the name of their first face. A group that would exceed the fraction is skipped.

    Args:
        groups: faces that stay together.
        names: the name of each face.
        test_fraction: the most faces for testing, as a fraction of all.
    """
    in_test = [False] * len(names)
    most = int(test_fraction * len(names))
    for group in sorted(groups, key=lambda group: hashlib.sha256(names[group[0]].encode()).digest()):
        if sum(in_test) + len(group) <= most:
            for face in group:
                in_test[face] = True
    return in_test
