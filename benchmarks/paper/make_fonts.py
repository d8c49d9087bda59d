"""Make a set of images of characters from the fonts of Debian packages, for the source `numpy`.

python -m benchmarks.paper.make_fonts                    62 classes: A-Z, a-z, 0-9
python -m benchmarks.paper.make_fonts --classes 26       the letters without their case

Each face of each font draws each character. The packages are listed in font_packages.toml. `apt-get download` fetches
them without installing them, and they are unpacked into the user's cache. A face is used if it has a glyph for each
character, no two classes look the same, and no earlier face draws the same images.

Some families are for testing, all others for training. The faces of a family stay on one side, as do families whose
names begin with the same word and families with faces that look alike (`font_faces.groups_of`). So a bold face of a
training family, or a copy of it under another name, is never tested.

Each copy of an image has its own rotation, scale, shift, contrast and noise, which depend only on face, character and
copy (`placement_of` and `degraded` in glyph_images). Test images are drawn in the same way. o and O differ only in
size, and in many faces I, l and 1 or O and 0 differ little, so some errors cannot be avoided.

The folder also has contact_sheet.png, a picture of some images, and about.json, with the packages and their versions,
the families of both sides, counts, and the SHA-256 of each file. The same packages and the same versions of Pillow and
FreeType give the same bytes. The download is 142 MB, the unpacked packages take 400 MB in the cache, and the set takes
125 MB. On two busy cores it is made in five minutes. A second call with the same options only checks the files.
"""

from __future__ import annotations

import argparse
import os
import string
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image, features
from PIL import __version__ as pillow_version

from benchmarks.paper.array_folder import describe, is_complete, write_arrays
from benchmarks.paper.debian_packages import Packages, unpacked
from benchmarks.paper.font_faces import (
    Face,
    Images,
    differences,
    fault_of_face,
    fault_of_images,
    find_faces,
    first_of_equals,
    groups_of,
    split_groups,
)
from benchmarks.paper.glyph_images import GlyphPainter, degraded, placement_of
from benchmarks.paper.training import ROOT
from hvd_batchgrow.config.source_specs import ReportProgress
from hvd_batchgrow.messages.errors import ExitCode, Fault, JobError, RunError
from hvd_batchgrow.observers.console import PlainConsole
from hvd_batchgrow.observers.progress import work_progress
from hvd_batchgrow.storage.toml_file import read_toml

PACKAGES = Path(__file__).with_name("font_packages.toml")
_ALIKE = 0.03
"""Faces with a smaller difference look alike: Arimo and Liberation Sans do, imitations of Helvetica do not."""
_FORMAT = 1
"""Incremented whenever the same options give other images."""
_SHEET_ROWS = 24

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Options:
    """All that determines the images, except the versions of packages and programs."""

    classes: int
    size: int
    copies: int
    test_copies: int
    test_fraction: float
    packages: tuple[str, ...]
    excluded_families: tuple[str, ...]

    @property
    def characters(self) -> str:
        """The characters, in the order of the images."""
        letters = string.ascii_uppercase + string.ascii_lowercase
        return letters if self.classes == 26 else letters + string.digits

    @property
    def labels(self) -> list[int]:
        """The class of each character."""
        return [k % self.classes for k in range(len(self.characters))]

    @property
    def made_of(self) -> dict[str, Any]:
        """The options as plain data."""
        return {"maker": "fonts", "format": _FORMAT, **vars(self)}


def main() -> int:
    """Make the set that the command line describes; return the exit code."""
    options, out = parse()
    try:
        if is_complete(out, options.made_of):
            print("already complete:")
        else:
            with work_progress(PlainConsole(sys.stderr)) as report:
                make(options, out, report)
    except (RunError, JobError) as error:
        print(f"make_fonts: {error}", file=sys.stderr)
        return ExitCode.FAILURE
    print(describe(out))
    return ExitCode.DONE


def make(options: Options, out: Path, report: ReportProgress) -> None:
    """Fetch the packages, choose and split the faces, draw the images, and write them.

    Raises:
        RunError: the packages cannot be fetched, no face can be used, or the folder cannot be written.
    """
    packages = unpacked(options.packages, report)
    found = [face for face in find_faces(packages.folder) if face.family not in options.excluded_families]
    with _workers() as pool:
        check = partial(_checked, characters=options.characters, labels=options.labels, size=options.size)
        checked = list(_with_progress(report, "checking faces", pool.map(check, found, chunksize=8), len(found)))
        faces, upright, reasons = _usable(found, checked)
        in_test = _split(faces, upright, options.test_fraction)
        draw = partial(_copies, characters=options.characters, size=options.size)
        copies = [options.test_copies if test else options.copies for test in in_test]
        drawn = pool.map(draw, faces, copies, chunksize=4)
        images = list(_with_progress(report, "drawing faces", drawn, len(faces)))
    arrays = {**_side("train", images, in_test, False, options), **_side("test", images, in_test, True, options)}
    about = _about(options, packages, faces, in_test, reasons)
    sheet = contact_sheet(images, in_test, len(options.characters))
    write_arrays(out, options.made_of, about, arrays, lambda folder: sheet.save(folder / "contact_sheet.png"))


def _workers() -> ProcessPoolExecutor:
    """Return one or two processes of low priority."""
    count = min(2, len(os.sched_getaffinity(0)))
    return ProcessPoolExecutor(count, get_context("spawn"), initializer=os.nice, initargs=(10,))


def _with_progress(report: ReportProgress, what: str, results: Iterable[_Result], total: int) -> Iterator[_Result]:
    try:
        for done, result in enumerate(results, 1):
            yield result
            report(what, done, total, "faces")
    except BrokenProcessPool:
        raise RunError(f"{what}: a worker process was killed, perhaps for lack of memory") from None


def _checked(face: Face, characters: str, labels: Sequence[int], size: int) -> Images | str:
    """Return the upright images of a face, or why it cannot be used."""
    if fault := fault_of_face(face, characters):
        return fault
    try:
        painter = GlyphPainter(face.path, face.index, characters, size)
        images = np.stack([painter.draw(character) for character in characters])
    except (OSError, ValueError) as error:  # at another size than in `fault_of_face`
        return f"cannot be drawn: {error}"
    return fault_of_images(images, labels) or images


def _usable(faces: Sequence[Face], checked: Sequence[Images | str]) -> tuple[list[Face], Images, Mapping[str, int]]:
    """Return the faces that can be used, their upright images, and the number of other faces by reason."""
    good = [(face, found) for face, found in zip(faces, checked, strict=True) if not isinstance(found, str)]
    is_first = first_of_equals([images for _, images in good])
    kept = [pair for pair, first in zip(good, is_first, strict=True) if first]
    if not kept:
        raise RunError(f"none of {len(faces)} faces can be used")
    reasons = Counter(found.partition(":")[0] for found in checked if isinstance(found, str))
    reasons["draws what an earlier face draws"] = len(good) - len(kept)
    return [face for face, _ in kept], np.stack([images for _, images in kept]), dict(reasons.most_common())


def _split(faces: Sequence[Face], upright: Images, test_fraction: float) -> list[bool]:
    """Return for each face whether it is for testing. Raises RunError if one side has no face."""
    alike = np.argwhere(np.triu(differences(upright) < _ALIKE, 1))
    groups = groups_of([face.family for face in faces], [(int(a), int(b)) for a, b in alike])
    in_test = split_groups(groups, [face.name for face in faces], test_fraction)
    if not any(in_test) or all(in_test):
        raise RunError(
            f"{len(faces)} faces in {len(groups)} families cannot be split with --test-fraction {test_fraction}"
        )
    return in_test


def _copies(face: Face, copies: int, characters: str, size: int) -> Images:
    """Return the images of a face, (copies · characters, size, size), copy by copy."""
    painter = GlyphPainter(face.path, face.index, characters, size)
    images = []
    for copy in range(copies):
        for character in characters:
            image = painter.draw(character, placement_of(face.name, character, copy))
            images.append(degraded(image, face.name, character, copy))
    return np.stack(images)


def _side(name: str, images: Sequence[Images], in_test: Sequence[bool], test: bool, options: Options) -> dict[str, Any]:
    """Return the images and labels for training or testing."""
    chosen = [found for found, is_test in zip(images, in_test, strict=True) if is_test == test]
    pixels = np.concatenate(chosen)
    labels = np.resize(np.array(options.labels, np.uint8), len(pixels))
    return {f"{name}_images": pixels, f"{name}_labels": labels}


def _about(
    options: Options, packages: Packages, faces: Sequence[Face], in_test: Sequence[bool], reasons: Mapping[str, int]
) -> dict[str, Any]:
    """Return the entries of about.json besides the options and the files."""
    characters = options.characters
    sides: dict[str, Any] = {}
    for name, test in (("train", False), ("test", True)):
        side = [face for face, is_test in zip(faces, in_test, strict=True) if is_test == test]
        copies = options.test_copies if test else options.copies
        sides[name] = {
            "faces": len(side),
            "families": len({face.family for face in side}),
            "images": len(side) * len(characters) * copies,
            "images_per_class": len(side) * copies * len(characters) // options.classes,
            "faces_of_family": dict(sorted(Counter(face.family for face in side).items())),
        }
    return {
        "classes": list(characters[: options.classes]),
        "drawn_by": {"pillow": pillow_version, "freetype": features.version("freetype2")},
        **sides,
        "unused_faces": dict(reasons),
        "versions": dict(packages.versions),
    }


def contact_sheet(images: Sequence[Images], in_test: Sequence[bool], characters: int) -> Image.Image:
    """Return a picture of the first copy of some faces, a row for each: training above a white line, testing below."""
    parts = []
    for test in (False, True):
        side = [found for found, is_test in zip(images, in_test, strict=True) if is_test == test]
        rows = [np.hstack(list(found[:characters])) for found in side[:: max(1, len(side) // _SHEET_ROWS)]]
        parts += [*rows[:_SHEET_ROWS], np.full((2, rows[0].shape[1]), 255, np.uint8)]
    return Image.fromarray(np.vstack(parts[:-1]))


def parse() -> tuple[Options, Path]:
    """Return the options of the command line, and the folder to write."""
    first, *rest = (__doc__ or "").split("\n\n", 1)
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.paper.make_fonts",
        description=first,
        epilog="".join(rest),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, help="folder to write; default: build/data/fonts62 or fonts26")
    parser.add_argument(
        "--classes",
        type=int,
        choices=(62, 26),
        default=62,
        help="26: letters, whose two cases are one class; default: 62",
    )
    parser.add_argument("--size", type=_at_least(12), default=28, help="side of the images, >= 12 pixels; default: 28")
    parser.add_argument(
        "--copies", type=_at_least(1), default=2, help="training images per face, character; default: 2"
    )
    parser.add_argument("--test-copies", type=_at_least(1), default=1, help="test images, likewise; default: 1")
    parser.add_argument(
        "--test-fraction", type=float, default=0.15, help="largest fraction of the faces for testing; default: 0.15"
    )
    parser.add_argument("--packages", type=Path, default=PACKAGES, help="file like font_packages.toml, the default")
    values = parser.parse_args()
    if not 0 < values.test_fraction < 1:
        parser.error(f"--test-fraction must be between 0 and 1, not {values.test_fraction}")
    try:
        packages, excluded = read_packages(values.packages)
    except JobError as error:
        parser.error(str(error))
    options = Options(
        values.classes, values.size, values.copies, values.test_copies, values.test_fraction, packages, excluded
    )
    return options, values.out or ROOT / f"build/data/fonts{values.classes}"


def read_packages(path: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the packages and the excluded families of a file like font_packages.toml.

    Raises:
        JobError: it cannot be read, has no packages, or has an entry that is not a list of texts.
    """
    tree = read_toml(path)
    lists = [tree.get(key, []) for key in ("packages", "excluded_families")]
    for key, found in zip(("packages", "excluded_families"), lists, strict=True):
        if not (isinstance(found, list) and all(isinstance(item, str) for item in found)):
            raise JobError([Fault(key, f"must be a list of texts, got {found!r}")], str(path))
    if not lists[0]:
        raise JobError([Fault("packages", "must name at least one package")], str(path))
    return tuple(lists[0]), tuple(lists[1])


def _at_least(least: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if (value := int(text)) < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, not {value}")
        return value

    return number


if __name__ == "__main__":
    sys.exit(main())
