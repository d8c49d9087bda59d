from __future__ import annotations

import multiprocessing
import os
import pickle
import struct
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hvd_batchgrow.config import DataSection
from hvd_batchgrow.data.datasets.dataset import IMAGENET_DEVIATION, IMAGENET_MEAN, BadSample
from hvd_batchgrow.data.images import encoded_dataset
from hvd_batchgrow.data.images.encoded_dataset import EncodedDataset, decode, read_header
from hvd_batchgrow.data.load_source import load_source
from hvd_batchgrow.messages.errors import JobError, RunError
from tests.fuzz.image_bytes import with_exif
from tests.pictures import (
    NUM_TRAIN,
    NUM_VAL,
    TARS,
    Form,
    Picture,
    assert_holds,
    each_form,
    overwrite,
    picture,
    pictures,
)

pytestmark = pytest.mark.usefixtures("cache")


def _huge_png(side: int) -> bytes:
    """Return a PNG with a header and no pixels."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)), (b"IDAT", b""), (b"IEND", b"")]
    framed = [struct.pack(">I", len(d)) + name + d + struct.pack(">I", zlib.crc32(name + d)) for name, d in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


@each_form
def test_every_image_comes_back_with_its_label(tmp_path: Path, form: Form) -> None:
    train, val = pictures(NUM_TRAIN), pictures(NUM_VAL, first=20)
    source = form.read(form.make(tmp_path / "data", train, val))
    assert_holds(source.train, form.expected(train))
    assert_holds(source.test, form.expected(val))
    assert (source.num_classes, source.mean, source.std) == (3, IMAGENET_MEAN, IMAGENET_DEVIATION)
    assert (source.train.kind, source.train.shape) == ("encoded", (0, 0, 3))


@each_form
def test_ids_may_come_in_any_order_and_twice(tmp_path: Path, form: Form) -> None:
    train = form.expected(pictures(NUM_TRAIN))
    samples = form.read(form.make(tmp_path / "data", train)).train
    ids = np.array([11, 0, 5, 0])
    assert [data.tobytes() for data in samples.fetch(ids)] == [train[k].data for k in ids]


@each_form
def test_the_job_may_give_classes_and_constants(tmp_path: Path, form: Form) -> None:
    root = form.make(tmp_path / "data", pictures(NUM_TRAIN))
    constants: dict[str, Any] = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
    data = DataSection(source=form.source, root=str(root), image_size=8, num_classes=7, **constants)
    source = load_source(data, 0, lambda *_: None, any_size=True)
    assert (source.num_classes, source.mean, source.std) == (7, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    with pytest.raises(JobError, match=rf"data.mean: has 1 values, and a sample of '{form.source}' has 3 channels"):
        load_source(data.model_copy(update={"mean": (0.5,)}), 0, lambda *_: None, any_size=True)
    with pytest.raises(
        RunError, match=r"num_classes = 2, but .* has 3 classes|labels are not in 0 … 1: .*train.* has 2"
    ):
        form.read(root, num_classes=2)


@each_form
def test_a_root_is_needed(tmp_path: Path, form: Form) -> None:
    with pytest.raises(JobError, match=rf"data.root: is needed for the source '{form.source}'"):
        form.load(DataSection(source=form.source), 0, lambda *_: None)
    with pytest.raises(RunError, match=r"data.root = .*absent is not a folder"):
        form.read(tmp_path / "absent")


@each_form
def test_an_index_is_built_once_and_reports_progress(tmp_path: Path, form: Form) -> None:
    root, reports = form.make(tmp_path / "data", pictures(NUM_TRAIN)), list[tuple[str, int, int]]()
    first = form.read(root, lambda *progress: reports.append(progress))
    assert len({what for what, _, _ in reports}) == 2
    assert reports[-1][1] == reports[-1][2] > 0
    reports.clear()
    second = form.read(root, lambda *progress: reports.append(progress))
    assert reports == []
    assert np.array_equal(first.train.sizes, second.train.sizes)
    assert_holds(second.train, form.expected(pictures(NUM_TRAIN)))


def _rewrite(form: Form, root: Path) -> None:
    form.write(root, "train", pictures(NUM_TRAIN, first=48))


def _touch(form: Form, root: Path) -> None:
    path = overwrite(root, picture(0).data, picture(0).data)
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1_000_000))


@each_form
@pytest.mark.parametrize(("change", "first"), [(_rewrite, 48), (_touch, 0)], ids=["rewritten", "only the time"])
def test_an_index_is_rebuilt_when_a_file_changes(
    tmp_path: Path, form: Form, change: Callable[[Form, Path], None], first: int
) -> None:
    root, reports = form.make(tmp_path / "data", pictures(NUM_TRAIN)), list[str]()
    form.read(root)
    change(form, root)
    source = form.read(root, lambda what, *_: reports.append(what))
    assert len(set(reports)) == 1  # the test set's is still good
    assert_holds(source.train, form.expected(pictures(NUM_TRAIN, first=first)))


@each_form
@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"no image", r"cannot be decoded: not an image in a supported format \(JPEG, PNG"),
        (b"", r"is empty|cannot be decoded: not an image"),
        (picture(8).data[:-500], r"cannot be decoded: .*truncated \(\d+ bytes not processed\)"),
        (picture(9).data[:-500], r"cannot be decoded: .*truncated"),
        (picture(8).data[:40], r"cannot be decoded: .*"),
        (_huge_png(20_000), r"is too large: it exceeds the limit of 178,956,970 pixels \(.*400000000"),
    ],
    ids=["text", "empty", "cut jpeg", "cut png", "header", "too large"],
)
def test_the_index_finds_bad_images_and_keeps_the_reason(tmp_path: Path, form: Form, data: bytes, reason: str) -> None:
    train = form.expected(pictures(NUM_TRAIN))
    train[4] = replace(train[4], data=data)
    root = form.make(tmp_path / "data", train)
    hint = r"cannot be read or decoded; data.on_bad_sample = 'replace' would continue .*:\n  sample 4: .*data/train.* "
    with pytest.raises(RunError, match=rf"1 of {NUM_TRAIN} images under .*data {hint}({reason})"):
        form.read(root)
    samples = form.read(root, on_bad_sample="replace").train  # from the cached index
    assert samples.sizes[4].tolist() == [0, 0]
    with pytest.raises(BadSample, match=rf"sample 4 \(.*data/train.*\): ({reason})") as bad:
        samples.fetch(np.array([3, 4]))
    assert bad.value.sample_id == 4
    assert samples.fetch(np.array([5]))[0].tobytes() == train[5].data


@each_form
def test_a_set_of_bad_images_only_is_refused_whatever_the_job_says(tmp_path: Path, form: Form) -> None:
    root = form.make(tmp_path / "data", [replace(image, data=b"no image") for image in pictures(NUM_TRAIN)])
    with pytest.raises(RunError, match=r"12 of 12 images under .* cannot be read or decoded:\n(  .*\n){10}  …"):
        form.read(root, on_bad_sample="replace")


def indexed(form: Form, root: Path) -> tuple[EncodedDataset, Picture, int]:
    """Return samples, and one of their images with its id."""
    train = form.expected(pictures(NUM_TRAIN))
    samples = form.read(form.make(root / "data", train)).train
    assert isinstance(samples, EncodedDataset)
    return samples, (victim := picture(11)), train.index(victim)


def _other_image(data: bytes) -> bytes:
    return picture(3).data.ljust(len(data), b"\0")


@each_form
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: b"\0" * len(data), r"cannot be decoded"),
        (lambda data: data[: len(data) // 2] + b"\xff\xd9" * 500, r"cannot be decoded|is truncated"),
        (_other_image, r"is 23 × 37 pixels, 31 × 53 when it was indexed"),
    ],
    ids=["zeros", "cut within", "another image"],
)
@pytest.mark.parametrize("where", ["head", "beyond"])
def test_what_is_changed_after_indexing_is_noticed(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    form: Form,
    damage: Callable[[bytes], bytes],
    message: str,
    where: str,
) -> None:
    if where == "beyond":  # what is read at the start of an image does not show it
        monkeypatch.setattr(encoded_dataset, "HEAD_BYTES", 0)
    else:
        message = "has changed since it was indexed"
    samples, victim, sample_id = indexed(form, tmp_path)
    path = overwrite(tmp_path, victim.data, damage(victim.data))
    with pytest.raises(BadSample, match=rf"sample {sample_id} \({path}.*\): {message}"):
        decode(samples, sample_id, samples.fetch(np.array([sample_id]))[0])


@each_form
def test_what_is_cut_after_indexing_is_noticed(tmp_path: Path, form: Form) -> None:
    samples, victim, sample_id = indexed(form, tmp_path)
    path = overwrite(tmp_path, victim.data, victim.data)
    os.truncate(path, path.read_bytes().index(victim.data) + 100)
    fault = rf"is truncated: 100 of {len(victim.data)} bytes are left; data.on_bad_sample = 'replace' would continue"
    with pytest.raises(BadSample, match=rf"sample {sample_id} \({path}.*\): {fault}"):
        samples.fetch(np.array([sample_id]))


@each_form
def test_what_is_removed_after_indexing_is_noticed(tmp_path: Path, form: Form) -> None:
    samples, victim, sample_id = indexed(form, tmp_path)
    path = overwrite(tmp_path, victim.data, victim.data)
    path.unlink()
    with pytest.raises(BadSample, match=rf"sample {sample_id} \({path}.*\): cannot be read: No such file or directory"):
        samples.fetch(np.array([sample_id]))


@each_form
def test_samples_may_be_pickled_and_forked(tmp_path: Path, form: Form) -> None:
    train = form.expected(pictures(NUM_TRAIN))
    samples = form.read(form.make(tmp_path / "data", train)).train
    samples.fetch(np.arange(NUM_TRAIN))  # so that there are open files
    assert_holds(pickle.loads(pickle.dumps(samples)), train)  # noqa: S301
    with multiprocessing.get_context("fork").Pool(2) as pool:
        results = pool.map(samples.fetch, [np.array([k]) for k in range(NUM_TRAIN)])
    assert [data.tobytes() for (data,) in results] == [image.data for image in train]


@each_form
@pytest.mark.parametrize("apply", [False, True])
def test_orientation_is_applied_where_the_job_says_so(tmp_path: Path, form: Form, apply: bool) -> None:
    """Orientation 6: the picture is upright after a clockwise rotation by 90°."""
    train = form.expected(pictures(NUM_TRAIN))
    jpegs = [k for k, image in enumerate(train) if image.extension == "jpg"]
    tagged = [replace(image, data=with_exif(image.data, 6)) if k in jpegs else image for k, image in enumerate(train)]
    root = form.make(tmp_path / "data", tagged)
    read = form.read(root, apply_orientation=apply).train
    assert isinstance(read, EncodedDataset)
    for samples in (read, pickle.loads(pickle.dumps(read)), read.labeled(read.targets)):  # noqa: S301
        for k, data in enumerate(samples.fetch(np.arange(NUM_TRAIN))):
            right = np.rot90(train[k].pixels, -1) if apply and k in jpegs else train[k].pixels
            assert samples.sizes[k].tolist() == list(right.shape[:2])
            assert np.array_equal(decode(samples, k, data), right)


def test_no_more_shards_are_kept_open_than_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoded_dataset, "_num_kept_open", lambda: 1)
    train = pictures(NUM_TRAIN)
    samples = TARS.read(TARS.make(tmp_path / "data", train)).train
    with ThreadPoolExecutor(4) as pool:
        results = pool.map(samples.fetch, [np.array([5 * k % NUM_TRAIN]) for k in range(40 * NUM_TRAIN)])
        assert [data.tobytes() for (data,) in results] == [train[5 * k % NUM_TRAIN].data for k in range(40 * NUM_TRAIN)]
    assert len(_open_tars()) == 1
    del samples
    assert _open_tars() == []


def _open_tars() -> list[str]:
    return [name for name in map(os.path.realpath, Path("/proc/self/fd").iterdir()) if name.endswith(".tar")]


def test_a_jpeg_with_an_odd_tail_is_whole() -> None:
    assert read_header(picture(8).data + b"\0" * 1000)[:2] == (28, 47)
    assert read_header(picture(8).data[:-2])[:2] == (0, 0)
