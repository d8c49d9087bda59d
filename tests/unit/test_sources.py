from __future__ import annotations

import gzip
import hashlib
from pathlib import Path

import numpy as np
import pytest

from hvd_batchgrow.data import fashion_mnist
from hvd_batchgrow.data.idx import read_idx
from hvd_batchgrow.data.sources import load_source
from hvd_batchgrow.errors import JobError, RunError
from tests.helpers import NUM_TEST, NUM_TRAIN, idx_bytes, small_job, small_source, write_idx_folder

ARRAY = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)


def no_report(what: str, done: int, total: int) -> None:
    """Nobody watches."""


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_an_idx_file_is_read_back(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(gzip.compress(idx_bytes(ARRAY)) if suffix else idx_bytes(ARRAY))
    digest = hashlib.sha256(idx_bytes(ARRAY)).hexdigest()
    assert (read_idx(path, digest) == ARRAY).all()
    with pytest.raises(RunError, match=r"is not the file expected: SHA-256"):
        read_idx(path, "0" * 64)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a", idx_bytes(ARRAY)[:-1], r"is truncated or damaged: 23 bytes of values, 24 expected for \(2, 3, 4\)"),
        ("a", idx_bytes(ARRAY) + b"x", r"is truncated or damaged: 25 bytes"),
        ("a", b"\x00\x00\x08\x03\x00\x00", r"is truncated: its header alone would be 16 bytes, it has 6"),
        ("a", b"PK\x03\x04", r"is no IDX file: it starts with 50 4b 03 04"),
        ("a", b"", r"is no IDX file: it starts with nothing"),
        ("a.gz", gzip.compress(idx_bytes(ARRAY))[:-9], r"cannot be read: Compressed file ended"),
        ("a.gz", b"not gzip", r"cannot be read: Not a gzipped file"),
    ],
    ids=["short", "long", "no dimensions", "zip", "empty", "short gzip", "no gzip"],
)
def test_a_damaged_file_is_named(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(RunError, match=f"{name} {message}"):
        read_idx(tmp_path / name)


def test_an_idx_folder_is_a_source(tmp_path: Path) -> None:
    expected = small_source()
    source = load_source(small_job(write_idx_folder(tmp_path, expected)).data, no_report)
    assert (source.train.images == expected.train.images).all()
    assert (source.test.labels == expected.test.labels).all()
    assert (len(source.train), len(source.test), source.num_classes) == (NUM_TRAIN, NUM_TEST, 3)
    scaled = expected.train.images / 255
    assert source.mean == pytest.approx([scaled.mean()])
    assert source.deviation == pytest.approx([scaled.std()])


def test_a_source_of_another_size_than_the_job_says_is_refused(tmp_path: Path) -> None:
    write_idx_folder(tmp_path, small_source())
    with pytest.raises(RunError, match=r"data.num_samples = 299, but 300 training samples were found"):
        load_source(small_job(tmp_path, data={"num_samples": 299}).data, no_report)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    write_idx_folder(tmp_path, small_source())
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(RunError, match=r"holds neither t10k-labels-idx1-ubyte nor t10k-labels-idx1-ubyte.gz"):
        load_source(small_job(tmp_path).data, no_report)


def test_images_and_labels_must_belong_together(tmp_path: Path) -> None:
    write_idx_folder(tmp_path, small_source())
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx_bytes(np.zeros(7, dtype=np.uint8)))
    with pytest.raises(RunError, match=r"images \(300, 8, 8\) and labels \(7,\) do not belong together"):
        load_source(small_job(tmp_path).data, no_report)


def test_an_idx_source_needs_a_root() -> None:
    data = small_job().data.model_copy(update={"root": None})
    with pytest.raises(JobError, match=r"data.root: is needed"):
        load_source(data, no_report)


# --- finding and fetching Fashion-MNIST ------------------------------------------------------


@pytest.fixture
def small_fashion(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Four small files stand for Fashion-MNIST; the places it is looked for are empty."""
    folder = tmp_path / "published"
    folder.mkdir()
    digests = {}
    for name in fashion_mnist.SHA256:
        digests[name] = hashlib.sha256(name.encode()).hexdigest()
        (folder / f"{name}.gz").write_bytes(gzip.compress(name.encode()))
    monkeypatch.setattr(fashion_mnist, "SHA256", digests)
    monkeypatch.setattr(fashion_mnist, "_DEBIAN_FOLDER", Path("/nonexistent/fashion-mnist"))
    monkeypatch.setenv("HVD_BATCHGROW_CACHE", str(tmp_path / "cache"))
    return folder


def fake_tools(folder: Path, published: Path, *, apt_fails: bool = False, damage: bool = False) -> None:
    """An apt-get that leaves a .deb, and a dpkg that unpacks the published files."""
    folder.mkdir()
    target = '"$3/nonexistent/fashion-mnist"'
    dpkg = f"mkdir -p {target} && cp {published}/* {target}"
    if damage:
        dpkg += f" && echo x > {target}/train-labels-idx1-ubyte.gz"
    scripts = {"apt-get": "echo 'E: no such package' >&2; exit 100" if apt_fails else "touch a.deb", "dpkg": dpkg}
    for name, body in scripts.items():
        (folder / name).write_text(f"#!/bin/sh\n{body}\n")
        (folder / name).chmod(0o755)


def test_root_comes_first_and_alone(small_fashion: Path, tmp_path: Path) -> None:
    assert fashion_mnist.find(str(small_fashion), no_report) == small_fashion
    with pytest.raises(RunError, match=r"does not hold Fashion-MNIST: train-images-idx3-ubyte\[.gz\] is missing"):
        fashion_mnist.find(str(tmp_path), no_report)


def test_debians_folder_comes_next(small_fashion: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fashion_mnist, "_DEBIAN_FOLDER", small_fashion)
    assert fashion_mnist.find(None, no_report) == small_fashion


def test_the_cache_is_filled_once_with_apt(
    small_fashion: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_tools(tmp_path / "bin", small_fashion)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    reports: list[tuple[str, int, int]] = []
    folder = fashion_mnist.find(None, lambda *report: reports.append(report))
    assert folder == tmp_path / "cache" / "fashion-mnist"
    assert sorted(path.name for path in folder.iterdir()) == sorted(f"{name}.gz" for name in fashion_mnist.SHA256)
    assert reports[-1][1] == reports[-1][2]
    monkeypatch.setenv("PATH", "")  # no tools any more: found, not fetched
    assert fashion_mnist.find(None, no_report) == folder


def test_without_apt_the_authors_address_is_used(
    small_fashion: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_tools(tmp_path / "bin", small_fashion, apt_fails=True)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    monkeypatch.setattr(fashion_mnist, "_URL", small_fashion.as_uri())
    assert fashion_mnist.find(None, no_report) == tmp_path / "cache" / "fashion-mnist"


def test_nothing_partial_or_wrong_stays_and_every_way_tried_is_told(
    small_fashion: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_tools(tmp_path / "bin", small_fashion, damage=True)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    monkeypatch.setattr(fashion_mnist, "_URL", (tmp_path / "empty").as_uri())
    with pytest.raises(RunError) as caught:
        fashion_mnist.find(None, no_report)
    message = str(caught.value)
    assert "with apt: Not a gzipped file" in message
    assert "from authors: <urlopen error" in message
    assert "--data.root FOLDER" in message
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["fashion-mnist.lock"]
