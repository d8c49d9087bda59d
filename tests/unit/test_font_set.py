"""The image set of fonts: which faces are used, how they are split, how they are drawn, and what is written."""

from __future__ import annotations

import json
import shutil
import string
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest

from benchmarks.paper import make_fonts
from benchmarks.paper.array_folder import describe, is_complete, sha256_of, write_arrays
from benchmarks.paper.debian_packages import Packages
from benchmarks.paper.font_faces import (
    Face,
    differences,
    fault_of_face,
    fault_of_images,
    find_faces,
    first_of_equals,
    first_word,
    groups_of,
    split_groups,
)
from benchmarks.paper.glyph_images import GlyphPainter, Placement, degraded, placement_of
from benchmarks.paper.make_fonts import PACKAGES, Options, read_packages
from hvd_batchgrow.config import DataSection
from hvd_batchgrow.data.arrays import npy
from hvd_batchgrow.messages.errors import JobError, RunError

FONTS = Path(matplotlib.get_data_path()) / "fonts/ttf"
CHARACTERS = string.ascii_letters + string.digits


def face_of(name: str) -> Face:
    (face,) = (face for face in find_faces(FONTS) if face.path.name == name)
    return face


def quiet(what: str, done: int, total: int, unit: str = "bytes", /) -> None:
    assert 0 <= done <= total


def test_a_face_has_a_family_and_a_name_that_is_the_same_on_each_machine(tmp_path: Path) -> None:
    (tmp_path / "package").mkdir()
    shutil.copy(FONTS / "DejaVuSans-Bold.ttf", tmp_path / "package")
    (tmp_path / "package/link.ttf").symlink_to("DejaVuSans-Bold.ttf")
    (tmp_path / "package/broken.ttf").write_bytes(b"no font")
    (face,) = find_faces(tmp_path)
    assert (face.name, face.family, face.style) == ("package/DejaVuSans-Bold.ttf#0", "DejaVu Sans", "Bold")


def test_only_faces_with_a_glyph_for_each_character_are_used() -> None:
    assert fault_of_face(face_of("DejaVuSans.ttf"), CHARACTERS) is None
    assert fault_of_face(face_of("STIXSizOneSymReg.ttf"), CHARACTERS) in {"lacks characters", "has empty glyphs"}
    assert fault_of_face(face_of("DejaVuSans.ttf"), "A\u4e00") == "lacks characters"
    assert fault_of_face(face_of("DejaVuSans.ttf"), "A ") == "has empty glyphs"


def test_images_must_differ_between_classes_and_be_large_enough() -> None:
    images = np.zeros((3, 12, 12), np.uint8)
    images[:, 2:8] = 255
    images[2, 9] = 255
    assert fault_of_images(images, [0, 1, 2]) == "draws two classes alike"
    assert fault_of_images(images, [0, 0, 1]) is None
    images[:, 4:] = 0
    assert fault_of_images(images, [0, 0, 0]) == "has small glyphs"


def test_of_faces_with_equal_images_the_first_is_used() -> None:
    a, b = np.zeros((2, 3, 3), np.uint8), np.ones((2, 3, 3), np.uint8)
    assert first_of_equals([a, b, a.copy(), b]) == [True, True, False, False]


def test_the_difference_of_faces() -> None:
    images = np.zeros((3, 1, 2, 2), np.uint8)
    images[0, 0, 0, 0] = images[1, 0, 0, 0] = images[1, 0, 1, 1] = images[2, 0, 0, 1] = 255
    # |a|² is 1, 2 and 1; |a - b|² is 1 of 3, 2 of 2, and 3 of 3.
    assert differences(images) == pytest.approx(np.array([[0, 1 / 3, 1], [1 / 3, 0, 1], [1, 1, 0]]), abs=1e-6)


@pytest.mark.parametrize(
    ("family", "word"),
    [
        ("DejaVu Sans Mono", "deja"),
        ("Go Medium", "go"),
        ("GFS Didot", "gfs"),
        ("FreeSans", "free"),
        ("IBM", "ibm"),
        ("", ""),
    ],
)
def test_the_first_word_of_a_family(family: str, word: str) -> None:
    assert first_word(family) == word


def test_the_difference_does_not_depend_on_the_order_of_sums() -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 62, 28, 28), np.uint8)
    a, b = (image.astype(object).ravel() for image in images[:2])  # Python's integers
    exact = 1 - 2 * float((a * b).sum()) / float((a * a).sum() + (b * b).sum())
    assert differences(images)[0, 1] == differences(images[:, ::-1, ::-1])[0, 1] == exact


def test_a_list_of_packages_must_be_one(tmp_path: Path) -> None:
    packages, excluded = read_packages(PACKAGES)
    assert "fonts-agave" in packages
    assert "Skull Capz BRK" in excluded
    path = tmp_path / "list.toml"
    for text, message in (
        ('packages = "fonts-agave"', "packages: must be a list of texts, got 'fonts-agave'"),
        ('packages = ["a"]\nexcluded_families = [3]', "excluded_families: must be a list of texts"),
        ("", "packages: must name at least one package"),
    ):
        path.write_text(text)
        with pytest.raises(JobError, match=message):
            read_packages(path)


def test_families_of_one_name_and_faces_that_look_alike_are_one_group() -> None:
    families = ["Arimo", "Go", "Go Mono", "Free Sans", "Nimbus", "Cabin"]
    assert groups_of(families, [(0, 3), (3, 4)]) == [[0, 3, 4], [1, 2], [5]]
    assert groups_of(families, []) == [[0], [1, 2], [3], [4], [5]]


def test_the_split_keeps_groups_whole_and_does_not_exceed_the_fraction() -> None:
    groups = [[0, 1, 2, 3, 4, 5], *([k] for k in range(6, 30))]
    names = [f"face {k}" for k in range(30)]
    in_test = split_groups(groups, names, 0.2)
    assert sum(in_test) == 6
    assert all(len({in_test[face] for face in group}) == 1 for group in groups)
    assert split_groups(groups, names, 0.1)[:6] == [False] * 6  # 6 faces are more than a tenth
    assert split_groups(groups[::-1], names, 0.2) == in_test


def test_a_placement_depends_on_face_character_and_copy_only() -> None:
    first = placement_of("a", "x", 0)  # by Philox; its key is the start of the SHA-256 of "placement\\na\\nx\\n0"
    assert (first.rotation_degrees, first.scale) == pytest.approx((-12.879894186168004, 0.8650674175689053))
    assert first.shift == pytest.approx((-0.025496760325336307, 0.0643830665708299))
    placements = [placement_of(face, c, copy) for face in "ab" for c in "xy" for copy in range(100)]
    assert len(set(placements)) == 400
    rotations, scales = (np.array([getattr(p, key) for p in placements]) for key in ("rotation_degrees", "scale"))
    shifts = np.array([p.shift for p in placements])
    for values, low, high in ((rotations, -15, 15), (scales, 0.8, 1), (shifts, -0.08, 0.08)):
        margin = 0.05 * (high - low)
        assert low <= values.min() < low + margin
        assert high - margin < values.max() <= high
    assert abs(np.corrcoef(rotations, scales)[0, 1]) < 0.2


def test_contrast_and_noise_depend_on_face_character_and_copy_only() -> None:
    image = np.zeros((64, 64), np.uint8)
    image[:, 32:] = 255
    found = np.array([degraded(image, "a", "x", copy) for copy in range(100)])
    assert (found[3] == degraded(image, "a", "x", 3)).all()
    assert len({one.tobytes() for one in found}) == 100
    middle = found[(found.min(axis=(1, 2)) > 0) & (found.max(axis=(1, 2)) < 255)].astype(float)  # nothing is clipped
    assert len(middle) > 10
    contrasts = (middle[:, :, 32:].mean(axis=(1, 2)) - middle[:, :, :32].mean(axis=(1, 2))) / 255
    assert 0.33 < contrasts.min() < contrasts.max() < 1
    widths = np.ptp(middle[:, :, :32], axis=(1, 2))
    assert widths.max() <= 201
    # Of a triangular distribution on ±s, the standard deviation is s/√6; 2,048 pixels come close to its ends.
    deviations = middle[:, :, :32].std(axis=(1, 2))
    assert (deviations[widths > 40] / widths[widths > 40]).tolist() == pytest.approx(
        [0.5 / 6**0.5] * (widths > 40).sum(), rel=0.1
    )


def center(image: np.ndarray[Any, np.dtype[np.uint8]]) -> tuple[float, float]:
    """Return column and row of the center of gravity."""
    weights = image.astype(float)
    rows, columns = np.indices(image.shape)
    return float((columns * weights).sum() / weights.sum()), float((rows * weights).sum() / weights.sum())


def test_characters_are_drawn_at_one_size_and_moved_as_their_placement_says() -> None:
    face = face_of("DejaVuSans.ttf")
    painter = GlyphPainter(face.path, face.index, CHARACTERS, 28)
    upright = painter.draw("O")
    again = GlyphPainter(face.path, face.index, CHARACTERS, 28).draw("O")
    assert (upright.shape, str(upright.dtype), upright.tobytes()) == ((28, 28), "uint8", again.tobytes())
    inked = (upright > 64).any(axis=1).sum()
    assert 1.2 < inked / (painter.draw("o") > 64).any(axis=1).sum() < 1.6
    x, y = center(upright)
    assert x == pytest.approx(13.5, abs=0.3)
    moved = center(painter.draw("O", Placement(shift=(2 / 28, -1 / 28))))
    assert moved == pytest.approx((x + 2, y - 1), abs=0.02)
    small = painter.draw("O", Placement(scale=0.8))
    assert small.sum() / upright.sum() == pytest.approx(0.64, abs=0.02)


def test_a_positive_rotation_is_clockwise() -> None:
    face = face_of("DejaVuSans.ttf")
    painter = GlyphPainter(face.path, face.index, CHARACTERS, 28)
    turned = painter.draw("L", Placement(rotation_degrees=90)).astype(int)
    errors = [np.abs(np.rot90(painter.draw("L"), k) - turned).mean() for k in range(4)]
    assert np.argmin(errors) == 3
    assert errors[3] < 1


@pytest.fixture
def packages(tmp_path: Path) -> Packages:
    """Faces of two families, a symbol font and a copy of a face."""
    for name in ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSerif", "STIXGeneral", "STIXSizOneSymReg", "cmr10"):
        (tmp_path / "fetched/package").mkdir(parents=True, exist_ok=True)
        shutil.copy(FONTS / f"{name}.ttf", tmp_path / "fetched/package")
    shutil.copy(FONTS / "STIXGeneral.ttf", tmp_path / "fetched/package/TheSame.ttf")
    return Packages(tmp_path / "fetched", {"package": "1.0-1"})


def options_of(**changes: Any) -> Options:
    values: Mapping[str, Any] = {
        **{"classes": 62, "size": 16, "copies": 2, "test_copies": 1, "test_fraction": 0.3},
        **{"packages": ("package",), "excluded_families": ("cmr10",)},
    }
    return Options(**{**values, **changes})


@pytest.mark.parametrize("classes", [62, 26])
def test_a_set_is_written_and_can_be_read_by_the_source_numpy(
    classes: int, packages: Packages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HVD_BATCHGROW_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(make_fonts, "unpacked", lambda names, report: packages)
    monkeypatch.setattr(make_fonts, "_workers", lambda: ThreadPoolExecutor(1))
    options, out = options_of(classes=classes), tmp_path / "sets/fonts"
    make_fonts.make(options, out, quiet)
    about = json.loads((out / "about.json").read_text())
    # DejaVu's three faces are one group, and too many for testing.
    assert about["test"]["faces_of_family"] == {"STIXGeneral": 1}
    assert about["train"]["faces_of_family"] == {"DejaVu Sans": 2, "DejaVu Serif": 1}
    assert about["unused_faces"]["draws what an earlier face draws"] == 1
    characters = len(options.characters)
    assert (about["train"]["images"], about["test"]["images"]) == (3 * 2 * characters, characters)
    pair = npy.load(DataSection(source="numpy", root=str(out)), 0, quiet)
    assert (len(pair.train), len(pair.test), pair.num_classes) == (3 * 2 * characters, characters, classes)
    labels = np.load(out / "train_labels.npy")
    assert set(np.bincount(labels)) == {about["train"]["images_per_class"]}
    # The third face's second copy of g is drawn again.
    face = next(face for face in find_faces(packages.folder) if face.family == "DejaVu Serif")
    k = options.characters.index("g")
    image = GlyphPainter(face.path, 0, options.characters, 16).draw("g", placement_of(face.name, "g", 1))
    image = degraded(image, face.name, "g", 1)
    place = (2 * 2 + 1) * characters + k
    assert (np.load(out / "train_images.npy")[place] == image).all()
    assert about["classes"][labels[place]] == ("g" if classes == 62 else "G")
    assert (out / "contact_sheet.png").stat().st_size > 1000
    assert is_complete(out, options.made_of)
    with pytest.raises(RunError, match=r"made with other values of copies; remove .* or choose another folder"):
        is_complete(out, options_of(classes=classes, copies=3).made_of)


def test_without_faces_or_without_a_split_an_error_says_so(
    packages: Packages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(make_fonts, "unpacked", lambda names, report: packages)
    monkeypatch.setattr(make_fonts, "_workers", lambda: ThreadPoolExecutor(1))
    with pytest.raises(RunError, match=r"4 faces in 2 families cannot be split with --test-fraction 0\.1"):
        make_fonts.make(options_of(test_fraction=0.1), tmp_path / "out", quiet)
    everything = ("cmr10", "DejaVu Sans", "DejaVu Serif", "STIXGeneral")
    with pytest.raises(RunError, match="none of 1 faces can be used"):
        make_fonts.make(options_of(excluded_families=everything), tmp_path / "out", quiet)
    assert not (tmp_path / "out").exists()


def test_a_folder_is_complete_only_if_nothing_has_changed(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert not is_complete(out, {"a": 1})
    out.mkdir()
    assert not is_complete(out, {"a": 1})
    write_arrays(out, {"a": 1, "names": ("x", "y")}, {"more": 2}, {"train_rows": np.arange(6).reshape(3, 2)})
    assert is_complete(out, {"a": 1, "names": ("x", "y")})
    about = json.loads((out / "about.json").read_text())
    assert about["arrays"]["train_rows.npy"]["sha256"] == sha256_of(out / "train_rows.npy")
    assert "train_rows.npy     int64  3 x 2 " in describe(out)
    (out / "train_rows.npy").write_bytes(b"damaged")
    with pytest.raises(RunError, match=r"train_rows\.npy has changed since it was written; remove"):
        is_complete(out, {"a": 1, "names": ("x", "y")})
    (out / "about.json").write_text('{"made_of": 3, "arrays": {}}')
    with pytest.raises(RunError, match="neither empty nor a complete set"):
        is_complete(out, {"a": 1})
    (out / "about.json").unlink()
    with pytest.raises(RunError, match="exists, and is neither empty nor a complete set"):
        is_complete(out, {"a": 1})


def test_a_disk_that_is_full_is_reported_and_nothing_is_left(tmp_path: Path) -> None:
    def full(folder: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(RunError, match="out cannot be written: No space left on device"):
        write_arrays(tmp_path / "out", {}, {}, {"train_rows": np.zeros((2, 2))}, full)
    assert list(tmp_path.iterdir()) == []
