"""Sources of arrays, from intact and damaged files written from the descriptions of their formats."""

from __future__ import annotations

import gzip
import hashlib
import io
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from hvd_batchgrow.config import DataSection
from hvd_batchgrow.data.arrays import idx
from hvd_batchgrow.data.arrays.cifar import VERSIONS
from hvd_batchgrow.data.arrays.idx import read_idx
from hvd_batchgrow.data.datasets.dataset import Datasets
from hvd_batchgrow.data.datasets.normalization import chunks_of, image_moments, row_moments
from hvd_batchgrow.data.load_source import load_source
from hvd_batchgrow.messages.errors import RunError
from tests.helpers import NUM_TEST, NUM_TRAIN, everything, idx_bytes, no_report, small_source, write_idx_folder

ARRAY = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
GENERATOR = np.random.default_rng(3)

pytestmark = pytest.mark.usefixtures("cache")


def load(source: str, root: Path | None = None, **keys: Any) -> Datasets:
    return load_source(DataSection(source=source, root=str(root) if root else None, **keys), 7, no_report)


def images(count: int, *shape: int) -> NDArray[np.uint8]:
    return GENERATOR.integers(0, 256, (count, *shape), dtype=np.uint8)


# --- moments ---------------------------------------------------------------------------------


def test_moments_of_images_are_those_of_all_pixels_of_a_channel() -> None:
    pixels = images(50, 4, 5, 3)
    mean, std = image_moments(np.array_split(pixels, 7))
    assert mean == pytest.approx((pixels / 255).mean(axis=(0, 1, 2)), rel=1e-12)
    assert std == pytest.approx((pixels / 255).std(axis=(0, 1, 2)), rel=1e-12)
    assert image_moments([np.zeros((1, 2, 2, 1), np.uint8)])[1] == 1 / 255  # a blank channel can be divided by it


def test_moments_of_rows_are_those_of_all_rows_however_they_are_cut() -> None:
    rows = (GENERATOR.standard_normal((1000, 4)) * [1e-3, 1, 1, 50] + [0, 1e4, 3, -7]).astype(np.float32)
    rows[:, 2] = np.float32(0.1)  # never changes: its mean rounded must not make a deviation
    for pieces in (1, 3, 1000):
        mean, std = row_moments(np.array_split(rows, pieces), "rows")
        assert mean == pytest.approx(rows.mean(axis=0, dtype=np.float64), rel=1e-9)
        expected = rows.std(axis=0, dtype=np.float64)
        assert std[[0, 1, 3]] == pytest.approx(expected[[0, 1, 3]], rel=1e-6)
        assert std[2] == 1
        assert mean[2] == np.float32(0.1)


def test_values_are_read_in_chunks_with_progress_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hvd_batchgrow.data.datasets.normalization._CHUNK_BYTES", 100)
    reports: list[tuple[str, int, int]] = []
    values = np.arange(30, dtype=np.float32).reshape(6, 5)  # 20 bytes each: five a chunk
    chunks = list(chunks_of(values, "rows", lambda *report: reports.append(report)))
    assert [chunk[:, 0].tolist() for chunk in chunks] == [[0, 5, 10, 15, 20], [25]]
    assert reports == [("rows", 100, 120), ("rows", 120, 120)]


# --- idx -------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_an_idx_file_is_read_back(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(gzip.compress(idx_bytes(ARRAY)) if suffix else idx_bytes(ARRAY))
    digest = hashlib.sha256(idx_bytes(ARRAY)).hexdigest()
    assert (read_idx(path, digest) == ARRAY).all()
    with pytest.raises(RunError, match=r"is not the expected file: SHA-256"):
        read_idx(path, "0" * 64)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a", idx_bytes(ARRAY)[:-1], r"is truncated or damaged: 23 bytes of values, 24 expected for \(2, 3, 4\)"),
        ("a", idx_bytes(ARRAY) + b"x", r"is truncated or damaged: 25 bytes"),
        ("a", b"\x00\x00\x08\x03\x00\x00", r"is truncated: its header alone would be 16 bytes, it has 6"),
        ("a", b"PK\x03\x04", r"is not an IDX file: it starts with 50 4b 03 04"),
        ("a", b"", r"is not an IDX file: it starts with nothing"),
        ("a.gz", gzip.compress(idx_bytes(ARRAY))[:-9], r"cannot be read: Compressed file ended"),
        ("a.gz", b"not gzip", r"cannot be read: Not a gzipped file"),
    ],
    ids=["short", "long", "no dimensions", "zip", "empty", "short gzip", "no gzip"],
)
def test_a_damaged_file_is_named(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(RunError, match=f"{name} {message}"):
        read_idx(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "reason"), [("none", "No such file or directory"), ("folder", "Is a directory")], ids=["missing", "folder"]
)
def test_the_message_for_an_unreadable_file_has_its_path_once(tmp_path: Path, name: str, reason: str) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(RunError) as caught:
        read_idx(tmp_path / name)
    assert str(caught.value) == f"{tmp_path / name} cannot be read: {reason}"


def test_an_idx_folder_is_a_source(tmp_path: Path) -> None:
    expected = small_source()
    source = load("idx", write_idx_folder(tmp_path, expected), num_samples=NUM_TRAIN)
    for part, wanted in ((source.train, expected.train), (source.test, expected.test)):
        for found, right in zip(everything(part), everything(wanted), strict=True):
            assert (found == right).all()
    assert (len(source.train), len(source.test), source.num_classes) == (NUM_TRAIN, NUM_TEST, 3)
    scaled = everything(expected.train)[0] / 255
    assert source.mean == pytest.approx([scaled.mean()])
    assert source.std == pytest.approx([scaled.std()])
    assert source.test.locate(7) == f"{tmp_path / 't10k-images-idx3-ubyte.gz'}, entry 7"


def test_files_are_unpacked_once_until_they_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_idx_folder(tmp_path, small_source())
    first = load("idx", tmp_path, num_samples=NUM_TRAIN)
    monkeypatch.setattr(idx, "read_idx", None)
    again = load("idx", tmp_path, num_samples=NUM_TRAIN)
    assert (again.mean, again.std) == (first.mean, first.std)
    assert (everything(again.train)[0] == everything(first.train)[0]).all()
    monkeypatch.undo()
    with (tmp_path / "t10k-labels-idx1-ubyte").open("ab") as file:
        file.write(b"x")
    with pytest.raises(RunError, match=r"t10k-labels-idx1-ubyte is truncated or damaged: 51 bytes of values, 50"):
        load("idx", tmp_path, num_samples=NUM_TRAIN)


def test_samples_are_copies_of_mapped_files(tmp_path: Path) -> None:
    source = load("idx", write_idx_folder(tmp_path, small_source()), num_samples=NUM_TRAIN)
    values = source.train.fetch(np.arange(3))
    assert type(values) is np.ndarray
    values[:] = 0  # the mapping itself is read-only
    assert source.train.fetch(np.arange(3)).any()


def test_a_missing_idx_file_is_named(tmp_path: Path) -> None:
    write_idx_folder(tmp_path, small_source())
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(RunError, match=r"holds neither t10k-labels-idx1-ubyte nor t10k-labels-idx1-ubyte.gz"):
        load("idx", tmp_path, num_samples=NUM_TRAIN)


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("train-labels-idx1-ubyte", np.zeros(7), r"images \(300, 8, 8\) and labels \(7,\) do not match"),
        (
            "t10k-labels-idx1-ubyte",
            np.full(50, 3),
            r"50 of 50 test labels are not in 0 … 2: .*t10k-labels-idx1-ubyte, entry 0 has 3",
        ),
        ("t10k-images-idx3-ubyte", np.full((50, 8, 9), 9), r"a test sample is \(8, 9, 1\), one of .* \(8, 8, 1\)"),
        ("t10k-images-idx3-ubyte", np.ones((50, 8, 8)), r"t10k-images-idx3-ubyte: every pixel is 0 or 1 of 255"),
        ("t10k-images-idx3-ubyte", np.zeros((50, 8)), r"images are \(50, 8\); they must be \(N, H, W\)"),
    ],
)
def test_idx_files_must_belong_together(tmp_path: Path, name: str, array: NDArray[Any], message: str) -> None:
    write_idx_folder(tmp_path, small_source())
    (tmp_path / f"{name}.gz").unlink(missing_ok=True)
    (tmp_path / name).write_bytes(idx_bytes(array.astype(np.uint8)))
    with pytest.raises(RunError, match=message):
        load("idx", tmp_path, num_samples=NUM_TRAIN)


# --- CIFAR -----------------------------------------------------------------------------------


def cifar_bytes(pixels: NDArray[np.uint8], *labels: NDArray[np.uint8]) -> bytes:
    """Return records as CIFAR's page describes them: label bytes, then 1024 bytes each of red, green and blue."""
    records = zip(pixels, *labels, strict=True)
    return b"".join(bytes(label) + b"".join(p[..., c].tobytes() for c in range(3)) for p, *label in records)


def write_cifar(folder: Path, source: str) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Write the files of a set, four records each; return all training images and their labels."""
    version = VERSIONS[source]
    folder.mkdir(parents=True)
    kept: list[tuple[NDArray[np.uint8], NDArray[np.uint8]]] = []
    for file in version.files:
        pixels = images(4, 32, 32, 3)
        labels = [GENERATOR.integers(0, count, 4, dtype=np.uint8) for count in version.num_classes]
        (folder / file).write_bytes(cifar_bytes(pixels, *labels))
        kept.append((pixels, labels[-1]))
    return np.concatenate([k[0] for k in kept[:-1]]), np.concatenate([k[1] for k in kept[:-1]])


def pack(folder: Path, archive: Path) -> None:
    with tarfile.open(archive, "w:gz") as packed:
        packed.add(folder, folder.name)


@pytest.mark.parametrize("source", ["cifar10", "cifar100"])
@pytest.mark.parametrize("place", ["folder", "parent", "parent of archive", "archive"])
def test_cifar_is_read_from_its_folder_or_archive(tmp_path: Path, source: str, place: str) -> None:
    version = VERSIONS[source]
    folder = tmp_path / version.folder
    pixels, labels = write_cifar(folder, source)
    if "archive" in place:
        pack(folder, tmp_path / version.archive)
        for path in folder.iterdir():
            path.unlink()
    root = {"folder": folder, "archive": tmp_path / version.archive}.get(place, tmp_path)
    found = load(source, root, num_samples=len(labels))
    assert (everything(found.train)[0] == pixels).all()
    assert (everything(found.train)[1] == labels).all()
    assert (len(found.test), found.num_classes) == (4, version.num_classes[-1])
    assert found.mean == pytest.approx((pixels / 255).mean(axis=(0, 1, 2)))


@pytest.mark.parametrize(
    ("source", "file", "damage", "message"),
    [
        ("cifar10", "data_batch_3.bin", lambda b: b[:-1], r"12291 bytes are 3 records of 3073 bytes and 3072 bytes; w"),
        ("cifar10", "test_batch.bin", lambda b: b + b"xy", r"12294 bytes are 4 records of 3073 bytes and 2 bytes;"),
        (
            "cifar10",
            "data_batch_1.bin",
            lambda b: b"",
            r"0 bytes are 0 records of 3073 bytes; whole records are needed",
        ),
        ("cifar10", "data_batch_1.bin", lambda b: b"\x0a" + b[1:], r"record 0, byte 0 is label 10, not one of 0 … 9"),
        ("cifar100", "test.bin", lambda b: b[:3074] + b"\x14" + b[3075:], r"record 1, byte 3074 is label 20, .* … 19"),
        ("cifar100", "train.bin", lambda b: b[:1] + b"d" + b[2:], r"record 0, byte 1 is label 100, not one of 0 … 99"),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_a_damaged_cifar_file_is_named(
    tmp_path: Path, source: str, file: str, damage: Callable[[bytes], bytes], message: str, packed: bool
) -> None:
    folder = tmp_path / VERSIONS[source].folder
    write_cifar(folder, source)
    (folder / file).write_bytes(damage((folder / file).read_bytes()))
    if packed:
        pack(folder, tmp_path / "it.tar.gz")
    with pytest.raises(RunError, match=f"{file} is .*damaged: {message}"):
        load(source, tmp_path / "it.tar.gz" if packed else folder, num_samples=20)


def test_published_files_have_a_known_number_of_records(tmp_path: Path) -> None:
    write_cifar(tmp_path / "x", "cifar10")
    with pytest.raises(RunError, match=r"12292 bytes are 4 records of 3073 bytes; 10000 records are 30730000$"):
        load("cifar10", tmp_path / "x")


def test_a_cut_archive_and_one_that_lacks_a_file_are_named(tmp_path: Path) -> None:
    folder = tmp_path / VERSIONS["cifar10"].folder
    write_cifar(folder, "cifar10")
    (folder / "data_batch_4.bin").unlink()
    pack(folder, tmp_path / "it.tar.gz")
    with pytest.raises(RunError, match=r"it.tar.gz lacks data_batch_4.bin"):
        load("cifar10", tmp_path / "it.tar.gz", num_samples=20)
    with pytest.raises(RunError, match=r"data_batch_4.bin cannot be read: No such file"):
        load("cifar10", folder, num_samples=20)
    whole = (tmp_path / "it.tar.gz").read_bytes()
    (tmp_path / "it.tar.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(RunError, match=r"it.tar.gz cannot be read: unexpected end of data"):
        load("cifar10", tmp_path / "it.tar.gz", num_samples=20)


@pytest.mark.parametrize("name", ["cifar-10-batches-py/data_batch_1", "cifar-10-python.tar.gz", "data_batch_1"])
@pytest.mark.parametrize("inside", [False, True])
def test_pickles_are_never_opened(tmp_path: Path, name: str, inside: bool) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"cos\nsystem\n(S'touch opened'\ntR.")
    root = path.parent if inside and path.suffix == "" else path if inside else tmp_path
    with pytest.raises(
        RunError, match=r"contains pickles, .* not read: download the binary version, https.*-binary.tar.gz"
    ):
        load("cifar10", root)
    with pytest.raises(RunError, match=r"does not contain train.bin, cifar-100-binary or .*: download https://"):
        load("cifar100", path.parent)


def test_only_a_file_train_is_a_pickle_of_cifar100(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    with pytest.raises(RunError, match=r"does not contain train.bin, cifar-100-binary or .*: download https://"):
        load("cifar100", tmp_path)
    (tmp_path / "train").rmdir()
    (tmp_path / "train").write_bytes(b"pickle")
    with pytest.raises(RunError, match=r"contains pickles"):
        load("cifar100", tmp_path)


# --- numpy -----------------------------------------------------------------------------------


def write_npy(folder: Path, what: str = "images", shape: tuple[int, ...] = (5, 4, 3), prefix: str = "") -> None:
    folder.mkdir(exist_ok=True)
    for part, count in (("train", 20), ("test", 7)):
        values = images(count, *shape) if what == "images" else GENERATOR.random((count, *shape), dtype=np.float32)
        np.save(folder / f"{prefix}{part}_{what}.npy", values)
        np.save(folder / f"{prefix}{part}_labels.npy", np.arange(count, dtype=np.uint16) % 4)


@pytest.mark.parametrize("shape", [(5, 4, 3), (5, 4)])
def test_npy_images_are_a_source(tmp_path: Path, shape: tuple[int, ...]) -> None:
    write_npy(tmp_path, shape=shape)
    source = load("numpy", tmp_path, num_samples=20)
    expected = np.load(tmp_path / "train_images.npy").reshape(20, 5, 4, -1)
    values, labels = everything(source.train)
    assert (values == expected).all()
    assert labels.dtype == np.int64
    assert labels.tolist() == [k % 4 for k in range(20)]
    assert (source.train.kind, source.num_classes, len(source.test)) == ("images", 4, 7)
    assert source.mean == pytest.approx((expected / 255).mean(axis=(0, 1, 2)))


def test_npy_rows_under_custom_names_are_a_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_npy(tmp_path, "rows", (6,), prefix="my_")
    source = load("numpy", tmp_path, num_samples=20, train="my_train", test="my_test")
    expected = np.load(tmp_path / "my_train_rows.npy")
    assert (everything(source.train)[0] == expected).all()
    assert source.train.kind == "rows"
    assert source.std == pytest.approx(expected.std(axis=0, dtype=np.float64))
    monkeypatch.setattr("hvd_batchgrow.data.arrays.npy.row_moments", None)  # kept from the first time
    again = load("numpy", tmp_path, num_samples=20, train="my_train", test="my_test")
    assert again.std == source.std


def test_npy_files_are_not_for_training_and_testing(tmp_path: Path) -> None:
    write_npy(tmp_path)
    message = r"1 file in the training set and in the test set: .*train_images.npy; choose different ones"
    with pytest.raises(RunError, match=message):
        load("numpy", tmp_path, test="train")


def header_of_objects() -> bytes:
    file = io.BytesIO()
    np.save(file, np.array([{}], dtype=object), allow_pickle=True)
    return file.getvalue()


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("train_images", lambda b: b[:-1], r"is truncated: 1327 bytes, 1328 expected for \(20, 5, 4, 3\) of uint8"),
        ("test_labels", lambda b: b + b"x", r"is damaged: 143 bytes, 142 expected for \(7,\) of uint16"),
        ("train_labels", lambda b: b"", r"is not a .npy file: it starts with nothing"),
        ("train_labels", lambda b: b"\x80\x04K\x01.", r"is not a .npy file: it starts with 80 04 4b 01 2e"),
        ("train_images", lambda b: b[:40], r"is damaged in its header"),
        ("train_images", lambda b: header_of_objects(), r"contains Python objects, which are pickles and not read"),
    ],
)
def test_a_damaged_npy_file_is_named(
    tmp_path: Path, file: str, content: Callable[[bytes], bytes], message: str
) -> None:
    write_npy(tmp_path)
    path = tmp_path / f"{file}.npy"
    path.write_bytes(content(path.read_bytes()))
    with pytest.raises(RunError, match=rf"{file}.npy {message}"):
        load("numpy", tmp_path, num_samples=20)


NAN_ROWS = np.where(np.arange(40).reshape(20, 2) == 17, np.nan, 1).astype(np.float32)


@pytest.mark.parametrize(
    ("file", "array", "message"),
    [
        ("train_images", np.zeros((20, 5, 4, 3)), r"train_images.npy: images are float64; they must be uint8"),
        ("train_images", np.zeros((20, 5), np.uint8), r"images are \(20, 5\); they must be"),
        ("train_images", np.zeros((9, 5, 4, 3), np.uint8), r"\(9, 5, 4, 3\) and labels \(20,\) do not match"),
        ("train_images", np.asfortranarray(images(20, 5, 4, 3)), r"is in Fortran order.*ascontiguousarray"),
        ("test_images", np.zeros((0, 5, 4, 3), np.uint8), r"test_images.npy is empty: \(0, 5, 4, 3\) of uint8"),
        ("test_images", images(7, 5, 4, 1), r"a test sample is \(5, 4, 1\), one of .* \(5, 4, 3\)"),
        (
            "train_labels",
            np.zeros(20),
            r"train_labels.npy: labels are float64; they must be integers: .*astype\('int64'\)",
        ),
        (
            "train_labels",
            np.array([*"ab"] * 10),
            r"labels are <U1; they must be integers: .*searchsorted\(numpy.unique\(train_labels\), labels\)",
        ),
        ("train_labels", np.array([0, np.nan] * 10), r"float64; they must be integers, and entry 1 is nan$"),
        ("train_labels", np.array([0, 1, 0.5, np.inf] * 5), r"float64; they must be integers, and entry 2 is 0.5$"),
        ("test_labels", np.full(7, -1), r"7 of 7 test labels are not in 0 … 3: .*test_labels.npy, entry 0 has -1"),
        ("train_rows", np.zeros((20, 2), np.float32), r"contains both train_images.npy and train_rows.npy: remove one"),
    ],
)
def test_npy_files_that_do_not_fit_are_refused(tmp_path: Path, file: str, array: NDArray[Any], message: str) -> None:
    write_npy(tmp_path)
    np.save(tmp_path / f"{file}.npy", array)
    with pytest.raises(RunError, match=message):
        load("numpy", tmp_path, num_samples=20)


@pytest.mark.parametrize(
    ("file", "array", "message"),
    [
        ("train_rows", np.zeros((20, 2), complex), r"is complex128 \(20, 2\); rows must be \(N, features\) of float64"),
        ("train_rows", np.zeros((20, 2, 2)), r"is float64 \(20, 2, 2\); rows must be \(N, features\)"),
        (
            "train_rows",
            10**18 + np.arange(40).reshape(20, 2),
            r"feature 0 has values that differ by less than float64 can represent",
        ),
        ("train_rows", NAN_ROWS, r"train_rows.npy: row 8, feature 1 is nan, not a finite number"),
        ("test_rows", NAN_ROWS[:9][-7:], r"test_rows.npy: row 6, feature 1 is nan"),
        ("train_labels", np.zeros(20), r"train_labels.npy: labels are float64; they must be integers"),
    ],
)
def test_npy_rows_that_do_not_fit_are_refused(tmp_path: Path, file: str, array: NDArray[Any], message: str) -> None:
    write_npy(tmp_path, "rows", (2,))
    np.save(tmp_path / f"{file}.npy", array)
    with pytest.raises(RunError, match=message):
        load("numpy", tmp_path, num_samples=20)


def test_missing_npy_files_are_named_and_how_to_unpack_an_npz(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"holds neither train_images.npy nor train_rows.npy$"):
        load("numpy", tmp_path, num_samples=20)
    np.savez(tmp_path / "all.npz", train_images=images(3, 2, 2))
    with pytest.raises(RunError, match=r"all.npz is not read, .*: python -c 'import numpy; z = numpy.load\(.*all.npz"):
        load("numpy", tmp_path, num_samples=20)
    write_npy(tmp_path)
    (tmp_path / "test_labels.npy").unlink()
    with pytest.raises(RunError, match=r"lacks test_labels.npy"):
        load("numpy", tmp_path, num_samples=20)
