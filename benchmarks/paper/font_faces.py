"""Faces of fonts: find them, say which cannot be used, and split them by family."""

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
    """Position in a collection (.ttc); 0 in other files."""
    name: str
    """Path below the packages and index, for example `fonts-agave/usr/…/agave.ttf#0`: the same on each machine."""
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
        except OSError:  # not a font, or no more faces in the collection
            return
        yield Face(path, index, f"{name}#{index}", family or path.stem, style or "")


def fault_of_face(face: Face, characters: str) -> str | None:
    """Return why a face does not have a real glyph for each character; None if it does.

    Fonts draw .notdef for a character without a glyph, as for a code point that is not a character.
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
    """Return why the images of a face cannot be used: they are too small, or equal for two classes. None if they can.

    Args:
        images: (characters, side, side), one for each character. The median height must be a quarter of the side.
        labels: the class of each character. Equal images are allowed within a class.
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
    """Return for each face whether all earlier faces have other images."""
    seen: set[bytes] = set()
    first = []
    for image in images:
        digest = hashlib.sha256(image.tobytes()).digest()
        first.append(digest not in seen)
        seen.add(digest)
    return first


def differences(images: Images) -> NDArray[np.float64]:
    """Return the difference of each pair of faces, (faces, faces): 0 for equal images, 1 for images without overlap.

    It is |a - b|² / (|a|² + |b|²), where a and b are all pixels of a face. The products are sums of integers below 2⁵³,
    so float64 has them exactly, and the split is the same on every processor.

    Args:
        images: (faces, characters, side, side).
    """
    products = np.zeros((len(images), len(images)))
    for character in range(images.shape[1]):  # one by one, for less memory
        pixels = images[:, character].reshape(len(images), -1).astype(np.float64)
        products += pixels @ pixels.T
    squares = np.diag(products)
    return np.asarray(1 - 2 * products / (squares[:, None] + squares[None, :]))


def groups_of(families: Sequence[str], alike: Iterable[tuple[int, int]]) -> list[list[int]]:
    """Return the groups of faces that must stay on one side of the split, each in ascending order.

    Two faces are in one group if the names of their families begin with the same word, as DejaVu Sans and DejaVu Serif
    do, if they look alike, or if a chain of such pairs connects them.

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
    """Return the first word of a family's name in lower case: `free` for FreeSans and for Free Sans."""
    word = family.split(maxsplit=1)[0] if family.split() else ""
    end = next((k for k in range(1, len(word)) if word[k].isupper() and word[k - 1].islower()), len(word))
    return word[:end].lower()


def split_groups(groups: Sequence[Sequence[int]], names: Sequence[str], test_fraction: float) -> list[bool]:
    """Return for each face whether it is for testing.

    Groups are taken in the order of the SHA-256 of their first face's name. A group is skipped if it would exceed the
    fraction.

    Args:
        groups: faces that stay together.
        names: the name of each face.
        test_fraction: largest number of faces for testing, as a fraction of all faces.
    """
    in_test = [False] * len(names)
    most = int(test_fraction * len(names))
    for group in sorted(groups, key=lambda group: hashlib.sha256(names[group[0]].encode()).digest()):
        if sum(in_test) + len(group) <= most:
            for face in group:
                in_test[face] = True
    return in_test
