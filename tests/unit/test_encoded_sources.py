from __future__ import annotations

import gzip
import multiprocessing
import os
import pickle
import tarfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from numpy.typing import NDArray
from PIL import Image
from tfrecord.writer import TFRecordWriter

from hvd_batchgrow.config import DataSection
from hvd_batchgrow.data import encoded, image_folder, tfrecord
from hvd_batchgrow.data import webdataset as wds
from hvd_batchgrow.data.encoded import EncodedSamples, decode, read_size
from hvd_batchgrow.data.samples import IMAGENET_DEVIATION, IMAGENET_MEAN, BadSample, ReportProgress, Source
from hvd_batchgrow.data.shards import find_shards
from hvd_batchgrow.errors import JobError, RunError

CLASSES = ("cat", "dog", "eel")
NUM_TRAIN, NUM_VAL, NUM_SHARDS = 12, 5, 3


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HVD_BATCHGROW_CACHE", str(tmp_path / "cache"))


@dataclass(frozen=True)
class Picture:
    data: bytes
    label: int
    extension: str

    @property
    def pixels(self) -> NDArray[np.uint8]:
        return np.asarray(Image.open(BytesIO(self.data)).convert("RGB"))


def picture(seed: int) -> Picture:
    """One of every format and mode in turn; no two have one size."""
    generator = np.random.default_rng(seed)
    form, mode = [("JPEG", "RGB"), ("PNG", "RGB"), ("JPEG", "L"), ("PNG", "L")][seed % 4]
    noise = generator.integers(0, 256, (20 + seed, 31 + 2 * seed, 3), dtype=np.uint8)
    file = BytesIO()
    Image.fromarray(noise).convert(mode).save(file, form)
    return Picture(file.getvalue(), seed % len(CLASSES), {"JPEG": "jpg", "PNG": "png"}[form])


def pictures(count: int, first: int = 0) -> list[Picture]:
    return [picture(first + k) for k in range(count)]


def write_folder(root: Path, name: str, images: Sequence[Picture]) -> None:
    for k, image in enumerate(images):
        path = root / name / CLASSES[image.label] / f"{k:03d}.{image.extension}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image.data)


def write_tars(root: Path, name: str, images: Sequence[Picture]) -> None:
    root.mkdir(exist_ok=True)
    per_shard = -(-len(images) // NUM_SHARDS)
    with webdataset.ShardWriter(str(root / f"{name}-%04d.tar"), maxcount=per_shard, verbose=0) as writer:
        for k, image in enumerate(images):
            writer.write({"__key__": f"{name}/{k:03d}", image.extension: image.data, "cls": image.label})


def write_records(root: Path, name: str, images: Sequence[Picture]) -> None:
    root.mkdir(exist_ok=True)
    for shard in range(NUM_SHARDS):
        writer = TFRecordWriter(str(root / f"{name}-{shard:05d}-of-{NUM_SHARDS:05d}"))
        per_shard = -(-len(images) // NUM_SHARDS)
        for image in images[shard * per_shard : (shard + 1) * per_shard]:
            writer.write({"image/encoded": (image.data, "byte"), "image/class/label": (image.label, "int")})
        writer.close()


@dataclass(frozen=True)
class Form:
    """A format, and its own writer."""

    source: str
    load: Callable[[DataSection, ReportProgress], Source]
    write: Callable[[Path, str, Sequence[Picture]], None]

    def expected(self, images: Sequence[Picture]) -> list[Picture]:
        """In the order of the ids."""
        return sorted(images, key=lambda image: image.label) if self.source == "image_folder" else list(images)

    def make(self, root: Path, train: Sequence[Picture], val: Sequence[Picture] | None = None) -> Path:
        self.write(root, "train", train)
        self.write(root, "val", pictures(NUM_VAL, first=20) if val is None else val)
        return root

    def read(self, root: Path, report: ReportProgress | None = None, **job: Any) -> Source:
        return self.load(DataSection(source=self.source, root=str(root), **job), report or (lambda *_: None))


FOLDER = Form("image_folder", image_folder.load, write_folder)
TARS = Form("webdataset", wds.load, write_tars)
RECORDS = Form("tfrecord", tfrecord.load, write_records)
each_form = pytest.mark.parametrize("form", [FOLDER, TARS, RECORDS], ids=lambda form: form.source)


def assert_holds(samples: Any, expected: Sequence[Picture]) -> None:
    assert isinstance(samples, EncodedSamples)
    assert samples.labels.tolist() == [image.label for image in expected]
    assert samples.sizes.tolist() == [list(image.pixels.shape[:2]) for image in expected]
    for k, (data, image) in enumerate(zip(samples.fetch(np.arange(len(samples))), expected, strict=True)):
        assert data.tobytes() == image.data
        assert np.array_equal(decode(samples, k, data), image.pixels)


def overwrite(root: Path, old: bytes, new: bytes) -> Path:
    """Put other bytes where an image's are, in whichever file that is."""
    for path in (path for path in root.rglob("*") if path.is_file()):
        if old in (content := path.read_bytes()):
            path.write_bytes(content.replace(old, new))
            return path
    raise AssertionError("no file has these bytes")


# ---- all formats ----


@each_form
def test_every_image_comes_back_with_its_label(tmp_path: Path, form: Form) -> None:
    train, val = pictures(NUM_TRAIN), pictures(NUM_VAL, first=20)
    source = form.read(form.make(tmp_path / "data", train, val))
    assert_holds(source.train, form.expected(train))
    assert_holds(source.test, form.expected(val))
    assert (source.num_classes, source.mean, source.deviation) == (3, IMAGENET_MEAN, IMAGENET_DEVIATION)
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
    source = form.read(root, num_classes=7, mean=(0.1, 0.2, 0.3), deviation=(0.4, 0.5, 0.6))
    assert (source.num_classes, source.mean, source.deviation) == (7, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    with pytest.raises(JobError, match=r"data.mean: has 1 values; encoded images are turned to RGB: 3"):
        form.read(root, mean=(0.5,))
    with pytest.raises(
        RunError, match=r"num_classes = 2, but .* has 3 classes|labels are not in 0 … 1: sample \d+ has 2"
    ):
        form.read(root, num_classes=2)


@each_form
def test_a_root_is_needed(tmp_path: Path, form: Form) -> None:
    with pytest.raises(JobError, match=rf"data.root: is needed for the source '{form.source}'"):
        form.load(DataSection(source=form.source), lambda *_: None)
    with pytest.raises(RunError, match=r"data.root = .*absent is no folder"):
        form.read(tmp_path / "absent")


@each_form
def test_an_index_is_made_once_and_tells_how_far_it_is(tmp_path: Path, form: Form) -> None:
    root, told = form.make(tmp_path / "data", pictures(NUM_TRAIN)), list[tuple[str, int, int]]()
    first = form.read(root, lambda *progress: told.append(progress))
    assert len({what for what, _, _ in told}) == 2
    assert told[-1][1] == told[-1][2] > 0
    told.clear()
    second = form.read(root, lambda *progress: told.append(progress))
    assert told == []
    assert np.array_equal(first.train.sizes, second.train.sizes)
    assert_holds(second.train, form.expected(pictures(NUM_TRAIN)))


def _rewrite(form: Form, root: Path) -> None:
    form.write(root, "train", pictures(NUM_TRAIN, first=48))


def _touch(form: Form, root: Path) -> None:
    path = overwrite(root, picture(0).data, picture(0).data)
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1_000_000))


@each_form
@pytest.mark.parametrize(("change", "first"), [(_rewrite, 48), (_touch, 0)], ids=["rewritten", "only the time"])
def test_an_index_is_made_anew_when_a_file_changes(
    tmp_path: Path, form: Form, change: Callable[[Form, Path], None], first: int
) -> None:
    root, told = form.make(tmp_path / "data", pictures(NUM_TRAIN)), list[str]()
    form.read(root)
    change(form, root)
    source = form.read(root, lambda what, *_: told.append(what))
    assert len(set(told)) == 1  # the test set's is still good
    assert_holds(source.train, form.expected(pictures(NUM_TRAIN, first=first)))


@each_form
@pytest.mark.parametrize(
    "data",
    [b"no image", b"", picture(8).data[:-500], picture(9).data[:-500], picture(8).data[:40]],
    ids=["text", "empty", "cut jpeg", "cut png", "header"],
)
def test_bad_images_are_found_by_the_index(tmp_path: Path, form: Form, data: bytes) -> None:
    train = form.expected(pictures(NUM_TRAIN))
    train[4] = replace(train[4], data=data)
    root = form.make(tmp_path / "data", train)
    hint = r"cannot be read or decoded; data.on_bad = 'replace' would go on without them:\n  sample 4: .*data/train"
    with pytest.raises(RunError, match=rf"1 of {NUM_TRAIN} images under .*data {hint}"):
        form.read(root)
    samples = form.read(root, on_bad="replace").train
    assert samples.sizes[4].tolist() == [0, 0]
    with pytest.raises(BadSample, match=r"sample 4 \(.*data/train.*\): is no image that can be decoded") as bad:
        samples.fetch(np.array([3, 4]))
    assert bad.value.sample_id == 4
    assert samples.fetch(np.array([5]))[0].tobytes() == train[5].data


@each_form
def test_a_set_of_bad_images_only_is_refused_whatever_the_job_says(tmp_path: Path, form: Form) -> None:
    root = form.make(tmp_path / "data", [replace(image, data=b"no image") for image in pictures(NUM_TRAIN)])
    with pytest.raises(RunError, match=r"12 of 12 images under .* cannot be read or decoded:\n(  .*\n){10}  …"):
        form.read(root, on_bad="replace")


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
        monkeypatch.setattr(encoded, "HEAD_BYTES", 0)
    else:
        message = "has changed since it was indexed"
    train = form.expected(pictures(NUM_TRAIN))
    root = form.make(tmp_path / "data", train)
    samples = form.read(root).train
    assert isinstance(samples, EncodedSamples)
    sample_id = train.index(victim := picture(11))
    path = overwrite(root, victim.data, damage(victim.data))
    with pytest.raises(BadSample, match=rf"sample {sample_id} \({path}.*\): {message}"):
        decode(samples, sample_id, samples.fetch(np.array([sample_id]))[0])


@each_form
def test_what_is_cut_after_indexing_is_noticed(tmp_path: Path, form: Form) -> None:
    train = form.expected(pictures(NUM_TRAIN))
    root = form.make(tmp_path / "data", train)
    samples = form.read(root).train
    sample_id = train.index(victim := picture(11))
    path = overwrite(root, victim.data, victim.data)
    os.truncate(path, path.read_bytes().index(victim.data) + 100)
    fault = rf"is truncated: 100 of {len(victim.data)} bytes are left; data.on_bad = 'replace' would go on"
    with pytest.raises(BadSample, match=rf"sample {sample_id} \({path}.*\): {fault}"):
        samples.fetch(np.array([sample_id]))


@each_form
def test_what_is_removed_after_indexing_is_noticed(tmp_path: Path, form: Form) -> None:
    train = form.expected(pictures(NUM_TRAIN))
    root = form.make(tmp_path / "data", train)
    samples = form.read(root).train
    sample_id = train.index(victim := picture(11))
    path = overwrite(root, victim.data, victim.data)
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


def test_no_more_shards_are_kept_open_than_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoded, "_num_kept_open", lambda: 1)
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
    assert read_size(picture(8).data + b"\0" * 1000) == (28, 47)
    assert read_size(picture(8).data[:-2]) == (0, 0)


# ---- folders ----


def test_a_folder_is_read_in_the_order_of_names_whatever_lies_in_it(tmp_path: Path) -> None:
    images = dict(zip(["b/9.PNG", "b/10.png", "b/sub/deep/1.png", "a/Z.Jpeg", "a/y.jpg"], pictures(5), strict=True))
    for name, image in images.items():
        (tmp_path / "train" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "train" / name).write_bytes(image.data)
    for name in ("a/notes.txt", "a/jpg", "readme.md", "loose.png"):
        (tmp_path / "train" / name).write_bytes(picture(3).data)
    write_folder(tmp_path, "val", [])
    (tmp_path / "val" / "b").mkdir(parents=True)
    (tmp_path / "val" / "b" / "link.png").symlink_to(tmp_path / "train" / "b" / "9.PNG")
    source = FOLDER.read(tmp_path)
    order = ["a/Z.Jpeg", "a/y.jpg", "b/10.png", "b/9.PNG", "b/sub/deep/1.png"]
    assert_holds(source.train, [replace(images[name], label="ab".index(name[0])) for name in order])
    assert_holds(source.test, [replace(images["b/9.PNG"], label=1)])
    assert source.train.where(4) == str(tmp_path / "train/b/sub/deep/1.png")


def test_the_order_is_the_same_however_the_headers_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_folder, "_BLOCK", 1)
    monkeypatch.setattr(image_folder, "_NUM_THREADS", 2)
    train = pictures(NUM_TRAIN)
    assert_holds(FOLDER.read(FOLDER.make(tmp_path, train)).train, FOLDER.expected(train))


def _add(folder: Path) -> None:
    (folder / "cat" / "new.png").write_bytes(picture(1).data)


def _remove(folder: Path) -> None:
    (folder / "cat" / "000.jpg").unlink()


def _rename(folder: Path) -> None:
    (folder / "cat" / "000.jpg").rename(folder / "cat" / "zzz.jpg")


def _move(folder: Path) -> None:
    (folder / "cat" / "000.jpg").rename(folder / "dog" / "000.jpg")


def _new_class(folder: Path) -> None:
    (folder / "ant").mkdir()
    (folder / "ant" / "000.jpg").write_bytes(picture(0).data)


@pytest.mark.parametrize("change", [_add, _remove, _rename, _move, _new_class])
def test_a_folder_is_indexed_anew_when_its_tree_changes(tmp_path: Path, change: Callable[[Path], None]) -> None:
    root = FOLDER.make(tmp_path / "data", pictures(NUM_TRAIN))
    FOLDER.read(root)
    change(root / "train")
    expected = []
    for label, folder in enumerate(sorted((root / "train").iterdir())):
        expected += [Picture(path.read_bytes(), label, "") for path in sorted(folder.iterdir())]
    source = FOLDER.read(root)
    assert_holds(source.train, expected)
    shift = change is _new_class  # of the classes, and so of the test labels too
    assert source.test.labels.tolist() == sorted(image.label + shift for image in pictures(NUM_VAL, first=20))


def test_the_test_folder_is_val_else_test_else_what_the_job_says(tmp_path: Path) -> None:
    root = FOLDER.make(tmp_path, pictures(NUM_TRAIN))
    (root / "val").rename(root / "test")
    assert len(FOLDER.read(root).test) == NUM_VAL
    write_folder(root, "val", pictures(3))
    assert len(FOLDER.read(root).test) == 3
    assert len(FOLDER.read(root, test="test").test) == NUM_VAL
    swapped = FOLDER.read(root, train="val", test="train")
    assert (len(swapped.train), len(swapped.test)) == (3, NUM_TRAIN)


def test_folders_that_make_no_source_are_named(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=rf"{tmp_path}/train is no folder; {tmp_path} is empty"):
        FOLDER.read(tmp_path)
    FOLDER.make(tmp_path, pictures(NUM_TRAIN))
    with pytest.raises(RunError, match=r"/trian is no folder; there is train/, …"):
        FOLDER.read(tmp_path, train="trian")
    (tmp_path / "val" / "dgo").mkdir()
    with pytest.raises(RunError, match=r"1 of 4 class folders in .*val hold no images:\n  dgo"):
        FOLDER.read(tmp_path)
    (tmp_path / "val" / "dgo" / "1.png").write_bytes(picture(1).data)
    head = r"1 folders are none of the 3 classes of .*train:"
    with pytest.raises(RunError, match=rf"{head}\n  .*val/dgo, nearest: dog"):
        FOLDER.read(tmp_path)
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat" / "1.png").write_bytes(picture(1).data)
    with pytest.raises(RunError, match=r"flat has no class folders; the 1 images in it belong into .*flat/<class>"):
        FOLDER.read(tmp_path, test="flat")


def test_a_link_that_leads_nowhere_is_a_bad_image(tmp_path: Path) -> None:
    root = FOLDER.make(tmp_path, pictures(NUM_TRAIN))
    (root / "train" / "cat" / "0.png").symlink_to("gone.png")
    with pytest.raises(RunError, match=r"1 of 13 images .*\n  sample 0: .*cat/0.png"):
        FOLDER.read(root)


@pytest.mark.parametrize("target", [".", "itself"])
def test_links_that_go_round_in_circles_are_refused(tmp_path: Path, target: str) -> None:
    root = FOLDER.make(tmp_path, pictures(NUM_TRAIN))
    (root / "train" / "cat" / "itself").symlink_to(target)
    with pytest.raises(RunError, match=r"train/cat/.*itself cannot be read: Too many levels of symbolic links"):
        FOLDER.read(root)


# ---- WebDataset ----


def write_tar(path: Path, samples: Iterable[dict[str, Any]]) -> None:
    with webdataset.TarWriter(str(path), encoder=True) as writer:
        for sample in samples:
            writer.write(sample)


def _tar_root(tmp_path: Path, **members: Any) -> Path:
    write_tar(tmp_path / "a-val.tar", [{"__key__": "v", "png": picture(1).data, **members}])
    write_tar(tmp_path / "a-train.tar", [{"__key__": "s", "png": picture(1).data, **members}])
    return tmp_path


@pytest.mark.parametrize(
    ("members", "label"),
    [
        ({"cls": 2}, None),
        ({"cls": b" 2\n"}, None),
        ({"json": {"label": 2}}, None),
        ({"json": {"cls": 2, "label": 9}}, None),
        ({"cls": 2, "json": {"label": 9}}, None),
        ({"cls": 9, "json": {"label": 9, "fine": 2}}, "fine"),
        ({"cls": 9, "fine.cls": b"2"}, "fine.cls"),
    ],
)
def test_where_the_label_of_a_tar_sample_is(tmp_path: Path, members: dict[str, Any], label: str | None) -> None:
    source = TARS.read(_tar_root(tmp_path, **members), label=label)
    assert (source.train.labels.tolist(), source.num_classes) == ([2], 3)


@pytest.mark.parametrize(
    ("members", "fault"),
    [
        ({"txt": "a cat"}, r"has no label: neither .cls nor .label, nor such a field of .json"),
        ({"json": {"other": 1}}, r"has no label"),
        ({"cls": b"cat"}, r".cls is b'cat', must be an integer"),
        ({"json": {"label": 1.5}}, r"field label of .json is 1.5, must be an integer"),
        ({"json": {"label": True}}, r"field label of .json is True, must be an integer"),
        ({"json": b"{"}, r".json cannot be read"),
        ({"cls": b"9" * 20}, r"its label is 9{20}: no class has such a number"),
        ({"cls": 1, "jpg": picture(0).data}, r"has 2 images, must have 1: its members are cls, jpg, png"),
    ],
)
def test_tar_samples_that_cannot_be_used_are_named(tmp_path: Path, members: dict[str, Any], fault: str) -> None:
    with pytest.raises(RunError, match=rf"1 samples under .* cannot be used:\n  .*a-train.tar, sample 's': {fault}"):
        TARS.read(_tar_root(tmp_path, **members), on_bad="replace")


def test_all_unusable_tar_samples_are_counted_and_ten_are_shown(tmp_path: Path) -> None:
    write_tar(tmp_path / "val.tar", [{"__key__": "v", "png": picture(1).data, "cls": 0}])
    write_tar(tmp_path / "train.tar", [{"__key__": f"no/{k}", "cls": 0} for k in range(12)])
    with pytest.raises(RunError, match=r"12 samples .*\n(  .*'no/\d': has 0 images.*\n){10}  …"):
        TARS.read(tmp_path)


def test_keys_end_at_the_first_dot_of_the_last_part(tmp_path: Path) -> None:
    write_tar(tmp_path / "val.tar", [{"__key__": "v", "png": picture(1).data, "cls": 0}])
    names = ["v1.0/a.PNG", "v1.0/a.seg.png", "v1.0/a.cls", "__meta__/x.png", "v1.0/readme", "v1.0/b.cls", "v1.0/b.png"]
    with tarfile.open(tmp_path / "train.tar", "w") as tar:
        for name in names:
            info, data = tarfile.TarInfo(name), picture(1).data if name.lower().endswith("png") else b"1"
            info.size = len(data)
            tar.addfile(info, BytesIO(data))
    source = TARS.read(tmp_path)
    assert_holds(source.train, [replace(picture(1), label=1)] * 2)
    assert source.train.where(0) == f"{tmp_path}/train.tar, v1.0/a.PNG"


def test_a_tar_that_is_cut_anywhere_is_refused(tmp_path: Path) -> None:
    root = TARS.make(tmp_path / "data", pictures(6))
    path = root / "train-0001.tar"
    whole = path.read_bytes()
    end = len(whole.rstrip(b"\0")) // 512 * 512 + 512
    for length in [0, 1, 511, 512, *range(700, end, 900), end, end + 511]:
        path.write_bytes(whole[:length])
        with pytest.raises(RunError, match=r"train-0001.tar (is truncated (or damaged )?at byte \d+|holds no samples)"):
            TARS.read(root, on_bad="replace")
    path.write_bytes(whole[: end + 512])
    assert len(TARS.read(root).train) == 6


@pytest.mark.parametrize("place", [b"@PaxHeader", b"train/003", b"end"])
def test_a_damaged_tar_is_refused(tmp_path: Path, place: bytes) -> None:
    root = TARS.make(tmp_path / "data", pictures(6))
    path = root / "train-0001.tar"
    whole = path.read_bytes()
    at = len(whole.rstrip(b"\0")) + 2048 if place == b"end" else whole.rindex(place)
    path.write_bytes(whole[:at] + b"junk" + whole[at + 4 :])
    with pytest.raises(RunError, match=r"train-0001.tar is (truncated or )?damaged at byte \d+"):
        TARS.read(root, on_bad="replace")


@pytest.mark.parametrize("name", ["train.tar.gz", "train.tgz", "train.tar"])
def test_a_compressed_tar_is_refused(tmp_path: Path, name: str) -> None:
    root = _tar_root(tmp_path, cls=0)
    path = root / "a-train.tar"
    data = path.read_bytes()
    path.unlink()
    (root / name).write_bytes(gzip.compress(data))
    with pytest.raises(RunError, match=rf"{name} is compressed: .* unpack it: gunzip .*{name}"):
        TARS.read(root)


# ---- names of shards ----

NAMES = ("train-00.tar", "train-01.tar", "train-02.tar", "train-10.tar", "val.tar", "sub/train-00.tar")


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (None, [0, 1, 2, 3]),
        ("train-0*.tar", [0, 1, 2]),
        ("train-{00..02}.tar", [0, 1, 2]),
        ("train-{01..01}.tar", [1]),
        ("train-{0..1}{0..0}.tar", [0, 3]),
        ("*-{02..00}.tar", [0, 1, 2]),
        ("val.tar", [4]),
        ("sub/*", [5]),
    ],
)
def test_how_shards_are_found(tmp_path: Path, wanted: str | None, expected: list[int]) -> None:
    (tmp_path / "sub").mkdir()
    for name in NAMES:
        (tmp_path / name).touch()
    assert find_shards(tmp_path, "data.train", wanted, ["none*", "train*"]) == [NAMES[k] for k in expected]


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("train-{01..04}.tar", r"no file is named train-03.tar, train-04.tar \(data.train\); there is .*train-0"),
        ("trian*", r"no file is named trian\* \(data.train\); there is .*…"),
        ("sub", r"no file is named sub \(data.train\); there is sub/"),
        (None, r"no file is named x\* or y\* \(data.train\)"),
    ],
)
def test_shards_that_are_missing_are_named(tmp_path: Path, wanted: str | None, message: str) -> None:
    (tmp_path / "sub").mkdir()
    for name in NAMES:
        (tmp_path / name).touch()
    with pytest.raises(RunError, match=message):
        find_shards(tmp_path, "data.train", wanted, ["x*", "y*"])


@pytest.mark.parametrize("form", [TARS, RECORDS], ids=lambda form: form.source)
def test_sets_of_shards_must_be_disjoint_and_whole(tmp_path: Path, form: Form) -> None:
    root = form.make(tmp_path / "data", pictures(6))
    with pytest.raises(RunError, match=r"3 shards are in the training set and in the test set: train-"):
        form.read(root, test="*")
    with pytest.raises(JobError, match=r"data.label: = 3: a .* label has a name, such as 'label'"):
        form.read(root, label=3)
    shard = sorted(root.glob("train*"))[1]
    os.truncate(shard, 0)
    with pytest.raises(
        RunError, match=rf"{shard} (holds no samples: it was cut|is truncated or damaged at byte 0: empty)"
    ):
        form.read(root)


# ---- TFRecord ----


def write_record(path: Path, *examples: dict[str, tuple[Any, str]]) -> None:
    writer = TFRecordWriter(str(path))
    for example in examples:
        writer.write(example)
    writer.close()


def _example(label: Any = 0, kind: str = "int", **more: Any) -> dict[str, Any]:
    return {"image/encoded": (picture(1).data, "byte"), "image/class/label": (label, kind), **more}


def test_the_checksum_of_a_record() -> None:
    # RFC 3720, B.4: the CRC of 32 zero bytes is 8a9136aa.
    assert tfrecord.masked_crc32c(bytes(32)) == ((0x8A9136AA >> 15 | 0x8A9136AA << 17) + 0xA282EAD8) % 2**32


@pytest.mark.parametrize(
    ("labels", "num_classes", "expected"),
    [
        ([0, 1, 2], None, 0),
        ([0, 1, 2], 3, 0),
        ([1, 2, 3], 3, 1),
        ([1, 2, 3], 4, 0),
        ([2, 3], 3, 1),
        ([0, 2, 3], 3, 0),
        ([1, 2], 3, 0),
    ],
)
def test_what_labels_count_from(labels: list[int], num_classes: int | None, expected: int) -> None:
    assert tfrecord.first_label(np.array(labels), num_classes) == expected


def test_labels_that_count_from_one(tmp_path: Path) -> None:
    train = [replace(image, label=image.label + 1) for image in pictures(NUM_TRAIN)]
    root = RECORDS.make(tmp_path / "data", train, [replace(picture(3), label=3)] * 3)
    source = RECORDS.read(root, num_classes=3)
    assert_holds(source.train, pictures(NUM_TRAIN))
    assert_holds(source.test, [replace(picture(3), label=2)] * 3)
    assert RECORDS.read(root, num_classes=4).train.labels.tolist() == [image.label for image in train]
    fault = r"data.num_classes: is needed: training labels are 1 … 3. 3 if they count from 1, 4 if from 0"
    with pytest.raises(JobError, match=fault):
        RECORDS.read(root)


@pytest.mark.parametrize(
    ("example", "job"),
    [
        ({"image": (picture(1).data, "byte"), "label": (0, "int")}, {}),
        ({"image": (picture(1).data, "byte"), "fine": (0, "int"), "label": (5, "int")}, {"label": "fine"}),
        (_example(image=(picture(2).data, "byte"), label_=([1.0], "float"), note=(b"x", "byte")), {}),
        # The start of the image, before the image itself.
        (_example(**{"image/a": (picture(1).data[:200], "byte")}), {}),
    ],
)
def test_which_features_are_read(tmp_path: Path, example: dict[str, Any], job: dict[str, Any]) -> None:
    for name in ("x-train.tfrecord-00000-of-00001", "x-validation.tfrecord-00000-of-00001"):
        write_record(tmp_path / name, example, example)
    assert_holds(RECORDS.read(tmp_path, **job).train, [replace(picture(1), label=0)] * 2)


@pytest.mark.parametrize(
    ("example", "fault"),
    [
        ({"label": (0, "int")}, r"has no feature image/encoded or image: it has label"),
        ({"image": (picture(1).data, "byte")}, r"has no feature image/class/label or label: it has image"),
        (_example(0.5, "float"), r"feature image/class/label has 0 values of type int64, must have 1"),
        (_example([1, 2]), r"feature image/class/label has 2 values of type int64"),
        (_example(-(2**63)), r"its label is -9223372036854775808: no class has such a number"),
    ],
)
def test_records_that_cannot_be_used_are_named(tmp_path: Path, example: dict[str, Any], fault: str) -> None:
    write_record(tmp_path / "val", _example())
    write_record(tmp_path / "train", _example(), example)
    place = rf"train, record 1 at byte {len(TFRecordWriter.serialize_tf_example(_example())) + 16}"
    with pytest.raises(RunError, match=rf"1 samples under .* cannot be used:\n  .*{place}: {fault}"):
        RECORDS.read(tmp_path, on_bad="replace")


def test_a_record_that_is_no_example_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_record(tmp_path / "val", _example())
    monkeypatch.setattr(TFRecordWriter, "serialize_tf_example", lambda _: b"\xff\xff no protocol buffer")
    write_record(tmp_path / "train", {})
    with pytest.raises(RunError, match=r"train, record 0 at byte 0: is no tf.train.Example"):
        RECORDS.read(tmp_path)


def test_a_record_with_a_wrong_checksum_is_a_bad_image(tmp_path: Path) -> None:
    train = [replace(image, label=image.label + 1) for image in pictures(NUM_TRAIN)]
    root = RECORDS.make(tmp_path / "data", train, train)
    middle, changed = len(train[6].data) // 2, bytearray(train[6].data)
    changed[middle] ^= 1  # it could still be decoded
    assert read_size(bytes(changed)) == train[6].pixels.shape[:2]
    overwrite(root, train[6].data, bytes(changed))
    with pytest.raises(RunError, match=r"1 of 12 images .*\n  sample 6: .*train-00001-of-00003, record 2"):
        RECORDS.read(root, num_classes=3)
    source = RECORDS.read(root, num_classes=3, on_bad="replace")
    others = [k for k in range(NUM_TRAIN) if k != 6]
    assert source.train.labels[others].tolist() == [train[k].label - 1 for k in others]
    assert 0 <= source.train.labels[6] < 3
    with pytest.raises(BadSample, match=r"sample 6 \(.*, record 2\): is no image that can be decoded"):
        source.train.fetch(np.array([6]))


def test_a_shard_whose_framing_is_damaged_is_refused(tmp_path: Path) -> None:
    root = RECORDS.make(tmp_path / "data", pictures(6))
    path = root / "train-00001-of-00003"
    whole = path.read_bytes()
    second = int.from_bytes(whole[:8], "little") + 16
    path.write_bytes(whole[:second] + b"\x01" + whole[second + 1 :])
    place = rf"{path}, record 1 at byte {second}"
    with pytest.raises(RunError, match=rf"{place}: the checksum of its length is wrong: damaged, or no TFRecord"):
        RECORDS.read(root, on_bad="replace")
    for length in (second + 1, second + 11, second + 12, second + 500, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(RunError, match=rf"{place} is truncated: .*{length - second} .*bytes are left"):
            RECORDS.read(root, on_bad="replace")
    path.write_bytes(gzip.compress(whole))
    with pytest.raises(RunError, match=rf"{path} is compressed"):
        RECORDS.read(root)
