from __future__ import annotations

import gzip
import hashlib
import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hvd_batchgrow.config import DataSection
from hvd_batchgrow.config.split import num_held_out
from hvd_batchgrow.data.arrays import fashion_mnist
from hvd_batchgrow.data.datasets.dataset import ArrayDataset, Datasets, raise_bad
from hvd_batchgrow.data.load_source import load_source
from hvd_batchgrow.data.pipeline.reader import Reader
from hvd_batchgrow.data.source_checks import check_data, known_num_samples
from hvd_batchgrow.messages.errors import JobError, RunError
from tests.helpers import NUM_TRAIN, no_report, small_job, small_source, write_idx_folder

pytestmark = pytest.mark.usefixtures("cache")


def section(source: str, **keys: Any) -> DataSection:
    return DataSection(source=source, **keys)


# --- loading ---------------------------------------------------------------------------------


def test_a_source_of_another_size_than_the_job_says_is_refused(tmp_path: Path) -> None:
    write_idx_folder(tmp_path, small_source())
    with pytest.raises(
        RunError,
        match=r"data.num_samples = 299, but 300 training samples were found; set data.num_samples = 300",
    ):
        load_source(small_job(tmp_path, data={"num_samples": 299}).data, 0, no_report)


@pytest.mark.parametrize("source", ["idx", "cifar10", "cifar100", "numpy", "csv", "parquet"])
def test_a_source_of_files_needs_a_root(source: str) -> None:
    with pytest.raises(JobError, match=rf"data.root: is needed for the source '{source}': the folder of "):
        load_source(section(source, num_samples=300), 0, no_report)


def test_the_job_overrides_classes_and_normalization(tmp_path: Path) -> None:
    write_idx_folder(tmp_path, small_source())
    keys: dict[str, Any] = {"root": str(tmp_path), "num_samples": NUM_TRAIN}
    source = load_source(section("idx", **keys, num_classes=5, mean=(0.1,)), 0, no_report)
    found = load_source(section("idx", **keys), 0, no_report)
    assert (source.num_classes, source.mean, source.std) == (5, (0.1,), found.std)
    wrong = section("idx", **keys, mean=(0.1, 0.2), std=(1.0, 1.0, 1.0))
    with pytest.raises(JobError) as caught:
        load_source(wrong, 0, no_report)
    assert [str(fault) for fault in caught.value.faults] == [
        "data.mean: has 2 values, and a sample of 'idx' has 1 channels",
        "data.std: has 3 values, and a sample of 'idx' has 1 channels",
    ]
    with pytest.raises(RunError, match=r"labels are not in 0 … 1"):
        load_source(section("idx", **keys, num_classes=2), 0, no_report)


@pytest.mark.parametrize("source", ["image_folder", "imagenet"])
def test_imagenet_is_an_image_folder_of_known_size(monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    made = small_source()
    asked: list[int | None] = []

    def load(data: DataSection, seed: int, report: object) -> Datasets:
        asked.append(data.num_classes)
        return made

    monkeypatch.setattr("hvd_batchgrow.data.images.image_folder.load", load)
    load_source(section(source, image_size=8, num_samples=NUM_TRAIN), 0, no_report)
    assert asked == [1000 if source == "imagenet" else None]
    if source == "imagenet":  # its known size is another
        fault = r"'imagenet' has 1281167 training samples, but 300 .* found; set data.num_samples = 300"
        with pytest.raises(RunError, match=fault):
            load_source(section(source, image_size=8), 0, no_report)


# --- user-defined sources --------------------------------------------------------------------

OWN = """
import numpy as np
from hvd_batchgrow.data.datasets.dataset import ArrayDataset, Datasets
from hvd_batchgrow.messages.errors import RunError

def rows(n, labels=()):
    return ArrayDataset(np.ones((n, 2), np.float32), labels if len(labels) else np.zeros(n, np.int64))

def good(data):
    return Datasets(rows(data.num_samples), rows(4), 2, (0.0, 0.0), (1.0, 1.0))

def wide(data):
    samples = ArrayDataset(1.7e9 + np.arange(8.0)[:, None], np.arange(8) % 2)
    return Datasets(samples, samples, 2, (1.7e9 + 3.0,), (2.0,))

def nothing(data):
    return None

def broken(data):
    return {}["key"]

def describe(data):
    raise RunError("the disk is full")

def bad(data):
    images = ArrayDataset(np.ones((4, 2, 2, 1), np.float64), np.zeros(4, np.int32))
    return Datasets(rows(8), images, 0, (0.0,), (1.0, 0.0))

def stripped(data):
    return Datasets(object(), rows(4), 2, (0.0, 0.0), (1.0, 1.0))

def shorter(data):
    rows = np.ones((400, 2), np.float32)
    return Datasets(ArrayDataset(rows, np.zeros(300, np.int64)), ArrayDataset(rows[:40], np.zeros(60, np.int64)),
                    2, (0.0, 0.0), (1.0, 1.0))

def lists(data):
    samples = ArrayDataset(np.ones((4, 2), np.float32), [0, 1, 0, 1])
    return Datasets(samples, rows(4), 2, (0.0, 0.0), (1.0, 1.0))

def images(data):
    count = {"gray": 1, "channels first": 3}[data.label]
    shape = {"gray": (8, 28, 28), "channels first": (8, 3, 32, 32)}[data.label]
    samples = ArrayDataset(np.ones(shape, np.uint8), np.zeros(8, np.int64))
    return Datasets(samples, samples, 2, (0.5,) * count, (0.5,) * count)

def no_parameter():
    return good(None)

def pair(data):
    return rows(8), rows(4)

def with_nan(data):
    values = np.ones((40, 3), np.float32)
    values[17, 2] = np.nan
    bad, fine = ArrayDataset(values, np.zeros(40, np.int64)), ArrayDataset(values[:9], np.zeros(9, np.int64))
    sets = (fine, bad) if data.label == "test" else (bad, fine)
    return Datasets(*sets, 2, (0.0,) * 3, (1.0,) * 3)

def from_one(data):
    return Datasets(rows(8, 1 + np.arange(8) % 2), rows(4), 2, (0.0, 0.0), (1.0, 1.0))

def beyond(data):
    return Datasets(rows(8, np.arange(8)), rows(4), 2, (0.0, 0.0), (1.0, 1.0))
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "own_source.py").write_text(OWN)
    (tmp_path / "own_faulty.py").write_text("import no_such_module")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    for name in ("own_source", "own_faulty"):
        sys.modules.pop(name, None)


def test_a_function_in_the_working_directory_is_a_source(own: None) -> None:
    source = load_source(section("own_source:good", num_samples=8, label="x"), 0, no_report)
    assert (len(source.train), source.train.kind, source.num_classes) == (8, "rows", 2)
    assert source.notes == ("1 of 2 classes never occurs in training: 1",)


@pytest.mark.parametrize("name", ["tokenize", "time", "test"])
def test_a_module_that_a_module_of_python_hides_is_named(own: None, name: str) -> None:
    file = Path.cwd() / f"{name}.py"
    file.write_text(OWN)
    with pytest.raises(JobError) as error:
        load_source(section(f"{name}:good", num_samples=8), 0, no_report)
    there = getattr(importlib.import_module(name), "__file__", None) or "a built-in module"
    fault = f"{name}:good: {name} does not define it; {file} is hidden by {there}, which has the same name: rename it"
    assert fault in str(error.value)


@pytest.mark.parametrize("convert", [np.asarray, torch.tensor, lambda values: [np.float32(value) for value in values]])
def test_constants_of_a_user_source_become_values_of_python(
    convert: Any, own: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = [[1.5, 2.0], [0.5, 4.0], [2.5, 3.5]]
    samples = ArrayDataset(np.ones((4, 2)), np.arange(4) % 2)
    mean, std, scale = map(convert, values)
    schema = {"classes": np.array(["a", "b"]), "scale": {"of": [scale]}}
    made = Datasets(samples, samples, np.int64(2), mean, std, (), schema)  # type: ignore[arg-type]
    monkeypatch.setattr(f"{__name__}.returned", made)
    source = load_source(section(f"{__name__}:give", num_samples=4), 0, no_report)
    assert (source.num_classes, source.mean, source.std) == (2, (1.5, 2.0), (0.5, 4.0))
    found = json.loads(json.dumps([source.num_classes, source.mean, source.std, source.schema]))
    assert found == [2, *values[:2], {"classes": ["a", "b"], "scale": {"of": [values[2]]}}]


returned: Any = None


def give(_: DataSection) -> Any:
    return returned


def test_a_test_fraction_beside_the_test_set_of_a_user_source_is_an_error(own: None) -> None:
    message = "data.test_fraction: 0.2, but data.source = 'own_source:good' returned its own test set"
    with pytest.raises(JobError, match=message):
        load_source(section("own_source:good", num_samples=8, test_fraction=0.2), 0, no_report)


def test_rows_of_a_user_source_may_be_float64_and_are_standardized_so(own: None) -> None:
    data = section("own_source:wide", num_samples=8)
    reader = Reader(data, load_source(data, 0, no_report), torch.device("cpu"), 1, raise_bad, 8)
    (batch,) = reader.testing([range(8)])
    assert batch.inputs[:, 0].tolist() == [-1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0]


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        ("own_faulty:f", JobError, r"data.source: own_faulty:f cannot be imported: ModuleNotFoundError: .*line 1\)"),
        ("own_source:f", JobError, r"data.source: own_source:f: own_source does not define it"),
        (
            "own_source:nothing",
            JobError,
            r"must return a hvd_batchgrow.data.datasets.dataset.Datasets, returned NoneType",
        ),
        ("own_source:broken", RunError, r"'own_source:broken' failed: KeyError: 'key' \(.*own_source.py, line 20\)"),
        ("own_source:describe", RunError, r"^the disk is full$"),
        ("own_source:stripped", JobError, r"train lacks kind\n.*train lacks shape"),
        ("own_source:beyond", RunError, r"6 of 8 labels are not in 0 … 1: data.source, train, sample 2 has 2"),
    ],
)
def test_faults_of_a_user_source_are_reported(own: None, function: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        load_source(section(function, num_samples=8), 0, no_report)


@pytest.mark.parametrize(
    ("function", "label", "faults"),
    [
        ("shorter", None, ["train: 400 values and 300 targets", "test: 40 values and 60 targets"]),
        ("lists", None, ["train: targets must be an array, are a list: numpy.asarray(targets)"]),
        (
            "images",
            "gray",
            ["shape of rows must have 1 number, is (28, 28); give gray images a channel: images[..., None]"],
        ),
        (
            "images",
            "channels first",
            ["if the channels are axis 1: numpy.save(…, numpy.ascontiguousarray(x.transpose("],
        ),
        ("no_parameter", None, ["receives the [data] section: define it as def no_parameter(data): …"]),
        ("pair", None, ["returned arrays without", "; return Datasets(train, test, num_classes, mean, std)"]),
        ("with_nan", "train", ["data.source, train: row 17, feature 2 is nan, not a finite number"]),
        ("with_nan", "test", ["data.source, test: row 17, feature 2 is nan, not a finite number"]),
        ("from_one", None, ["sample 1 has 2; ", "; if your labels are 1 … 2, return label - 1"]),
    ],
)
def test_faults_of_arrays_are_found_at_the_start(own: None, function: str, label: Any, faults: list[str]) -> None:
    with pytest.raises((JobError, RunError)) as caught:
        load_source(section(f"own_source:{function}", num_samples=8, label=label), 0, no_report)
    assert [fault for fault in faults if fault not in str(caught.value)] == []


def test_all_faults_of_a_user_source_are_reported_at_once(own: None) -> None:
    with pytest.raises(JobError) as caught:
        load_source(section("own_source:bad", num_samples=8), 0, no_report)
    assert [fault.message.removeprefix("own_source:bad: ") for fault in caught.value.faults] == [
        "test: targets must be classes, int64 (n,), are int32 (4,)",
        "test: fetch of one sample must return uint8 (1, 2, 2, 1), returned float64 (1, 2, 2, 1); "
        "values of 1 … 1: (255 * x).round().astype('uint8')",
        "train and test must have the same kind and shape, and are rows (2,) and images (2, 2, 1)",
        "num_classes must be a whole number >= 1, is 0",
        "mean must be 2 finite numbers, is (0.0,)",
        "std must be above 0, is (1.0, 0.0)",
    ]


def test_keys_of_another_kind_are_refused_once_the_kind_is_known(own: None) -> None:
    with pytest.raises(JobError, match=r"data.hflip: is for images of one size and encoded images, and .* has rows"):
        load_source(section("own_source:good", num_samples=8, hflip=True), 0, no_report)


# --- which keys each source uses --------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "faults"),
    [
        ({"source": "idx", "root": "x", "crop_padding": 2, "hflip": True, "channels_last": True}, []),
        ({"source": "imagenet", "image_size": 224, "eval_resize": 224, "hflip": True, "on_bad_sample": "replace"}, []),
        ({"source": "csv", "label": -1, "test_fraction": 0.1, "mean": (0.0,), "num_classes": 3}, []),
        ({"source": "synthetic_rows", "num_samples": 8, "shape": (3,)}, []),
        ({"source": "a:b", "shape": (3,), "label": "x", "image_size": 8, "crop_scale": (0.1, 1.0)}, []),
        # An explicit default has no effect.
        ({"source": "idx", "test_fraction": 0.0, "crop_scale": (0.08, 1.0), "dtype": "float32", "label": None}, []),
        ({"source": "csv", "shape": (3,)}, ["data.shape: is not used by the source 'csv', but by idx, numpy, "]),
        (
            {"source": "cifar10", "test_fraction": 0.1},
            ["data.test_fraction: is not used by the source 'cifar10', but by covty"],
        ),
        ({"source": "numpy", "label": "x"}, ["data.label: is not used by the source 'numpy', but by csv, parquet, tf"]),
        (
            {"source": "synthetic_images", "root": "x", "train": "y"},
            [
                "data.num_samples: is needed: 'synthetic_images' generates this number of samples",
                "data.root: is not used by the source 'synthetic_images', but by cifar10, cifar100",
                "data.train: is not used by the source 'synthetic_images', but by csv, image_folder",
            ],
        ),
        (
            {"source": "csv", "hflip": True, "channels_last": True, "dtype": "float16", "crop_padding": 1},
            [
                "data.channels_last: is for images of one size and encoded images, and 'csv' has rows",
                "data.crop_padding: is for images of one size, and 'csv' has rows",
                "data.dtype: is for images of one size and encoded images, and 'csv' has rows",
                "data.hflip: is for images of one size and encoded images, and 'csv' has rows",
            ],
        ),
        (
            {"source": "idx", "image_size": 8, "on_bad_sample": "replace"},
            [
                "data.image_size: is for encoded images, and 'idx' has images of one size; use data.crop_padding",
                "data.on_bad_sample: is for encoded images, and 'idx' has images of one size",
            ],
        ),
        (
            {"source": "tfrecord", "crop_padding": 4},
            [
                "data.crop_padding: is for images of one size, and 'tfrecord' has encoded images; use data.image_size",
                "data.image_size: is needed: 'tfrecord' has images of any size; 224 is usual",
            ],
        ),
        (
            {"source": "a:b", "eval_resize": 8},
            ["data.eval_resize: requires data.image_size, which is missing"],
        ),
        (
            {
                "source": "webdataset",
                "image_size": 9,
                "eval_resize": 8,
                "crop_scale": (2.0, 1.0),
                "crop_ratio": (1.5, 1.0),
            },
            [
                "data.crop_ratio: must be [min, max], got [1.5, 1]; try [1, 1.5]",
                "data.crop_scale: must be [min, max], got [2, 1]; try [1, 2]",
                "data.crop_scale: 2 exceeds 1, the area of the whole image; use <= 1",
                "data.eval_resize: 8 is below data.image_size = 9: the center crop would not fit; use >= 9",
            ],
        ),
        (
            {"source": "covtype"},
            ["data.test_fraction: is needed: 'covtype' has no separate test set; 0.2 keeps a fifth"],
        ),
        (
            {"source": "csv", "test_fraction": 0.1, "test": "x.csv"},
            ["data.test_fraction: contradicts data.test = 'x.csv': both define the test set; remove one"],
        ),
        (
            {"source": "synthetic_images", "num_samples": 8, "shape": (3,)},
            ["data.shape: must be [height, width, channels] for 'synthetic_images', got [3]"],
        ),
    ],
)
def test_no_key_is_ignored(keys: dict[str, Any], faults: list[str]) -> None:
    found = [str(fault) for fault in check_data(DataSection(**keys))]
    assert [fault[: len(wanted)] for fault, wanted in zip(found, faults, strict=True)] == faults


def test_a_section_that_does_not_fit_is_not_loaded() -> None:
    with pytest.raises(JobError, match=r"2 faults\n  data.label: .*\n  data.shape: "):
        load_source(section("cifar10", root="nowhere", label=0, shape=(2,)), 0, no_report)


@pytest.mark.parametrize(
    ("num_rows", "share", "test_fraction"),
    [(581_012, 0.2, 116_203), (100, 0.07, 7), (10, 0.9, 9), (10, 0.3, 3), (3, 0.1, 1), (10, 0.0, 0)],
)
def test_a_share_is_the_decimal_it_is_written_as_rounded_up(num_rows: int, share: float, test_fraction: int) -> None:
    assert num_held_out(num_rows, share) == test_fraction


def test_the_training_rows_of_covtype_are_known_from_what_is_held_out() -> None:
    # 0.8 · 581 012 = 464 809.6
    assert known_num_samples(section("covtype", test_fraction=0.2)) == 464_809
    assert known_num_samples(section("covtype", test_fraction=0.2, num_samples=7)) == 7


# --- finding and fetching Fashion-MNIST ------------------------------------------------------


@pytest.fixture
def small_fashion(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Four small files in place of Fashion-MNIST; the folders that are searched are empty."""
    folder = tmp_path / "published"
    folder.mkdir()
    digests = {}
    for name in fashion_mnist.SHA256:
        digests[name] = hashlib.sha256(name.encode()).hexdigest()
        (folder / f"{name}.gz").write_bytes(gzip.compress(name.encode()))
    monkeypatch.setattr(fashion_mnist, "SHA256", digests)
    monkeypatch.setattr(fashion_mnist, "_DEBIAN_FOLDER", Path("/nonexistent/fashion-mnist"))
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
    with pytest.raises(RunError, match=r"does not contain Fashion-MNIST: train-images-idx3-ubyte\[.gz\] is missing"):
        fashion_mnist.find(str(tmp_path), no_report)


def test_what_is_not_fashion_mnist_is_refused_when_it_is_unpacked(small_fashion: Path) -> None:
    write_idx_folder(small_fashion, small_source())
    with pytest.raises(RunError, match=r"train-images-idx3-ubyte.gz is not the expected file: SHA-256"):
        load_source(section("fashion_mnist", root=str(small_fashion)), 0, no_report)


def test_debians_folder_comes_next(small_fashion: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fashion_mnist, "_DEBIAN_FOLDER", small_fashion)
    assert fashion_mnist.find(None, no_report) == small_fashion


def test_the_cache_is_filled_once_with_apt(
    small_fashion: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_tools(tmp_path / "bin", small_fashion)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    reports: list[tuple[str, int, int]] = []
    folder = fashion_mnist.find(None, lambda *report: reports.append(report))
    assert folder == cache / "fashion-mnist"
    assert sorted(path.name for path in folder.iterdir()) == sorted(f"{name}.gz" for name in fashion_mnist.SHA256)
    assert reports[-1][1] == reports[-1][2]
    monkeypatch.setenv("PATH", "")  # no tools any more: found, not fetched
    assert fashion_mnist.find(None, no_report) == folder


def test_without_apt_the_authors_address_is_used(
    small_fashion: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_tools(tmp_path / "bin", small_fashion, apt_fails=True)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    monkeypatch.setattr(fashion_mnist, "_URL", small_fashion.as_uri())
    assert fashion_mnist.find(None, no_report) == cache / "fashion-mnist"


def test_nothing_partial_or_wrong_remains_and_every_attempt_is_named(
    small_fashion: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
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
    assert [path.name for path in cache.iterdir()] == ["fashion-mnist.lock"]
