"""Implausible values and arrays are refused before training, with a likely fix."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from hvd_batchgrow.cli import main
from hvd_batchgrow.config import DataSection
from hvd_batchgrow.data.datasets.dataset import Datasets
from hvd_batchgrow.data.load_source import load_source
from hvd_batchgrow.data.source_checks import check_data
from hvd_batchgrow.messages.errors import JobError, RunError
from tests.helpers import idx_bytes, no_report

GENERATOR = np.random.default_rng(3)


# --- mean and deviation -----------------------------------------------------------------------------

IMAGENET = {"source": "image_folder", "root": "x", "num_samples": 8, "image_size": 8}
KINDS: dict[str, dict[str, Any]] = {
    "idx": {"source": "idx", "root": "x"},
    "cifar10": {"source": "cifar10"},
    "image_folder": IMAGENET,
    "imagenet": IMAGENET | {"source": "imagenet"},
    "webdataset": IMAGENET | {"source": "webdataset"},
    "tfrecord": IMAGENET | {"source": "tfrecord", "label": "y"},
    "synthetic_images": {"source": "synthetic_images", "num_samples": 8},
}


def faults(source: str, **keys: Any) -> list[str]:
    return [str(fault) for fault in check_data(DataSection(**KINDS[source], **keys))]


@pytest.mark.parametrize("source", KINDS)
def test_constants_of_0_to_255_are_refused_for_every_source_of_images(source: str) -> None:
    # torchvision's constants × 255, as Caffe and the first Keras models have them
    mean, std = faults(source, mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375))
    assert "data.mean: [123.7, 116.3, 103.5]: images are scaled to [0, 1] first" in mean
    assert mean.endswith("nearest: [0.485, 0.456, 0.406], divided by 255")
    assert std.endswith("nearest: [0.229, 0.224, 0.225], divided by 255")


@pytest.mark.parametrize(
    ("mean", "nearest"),
    [
        ((127.5,), "nearest: [0.5], divided by 255"),
        ((0.485, 116.28), "nearest: [0.485, 0.456], divided by 255"),
        ((-0.5,), "nearest: [0]"),
        ((1000.0,), "nearest: [1]"),
    ],
)
def test_a_mean_outside_0_to_1_is_refused(mean: tuple[float, ...], nearest: str) -> None:
    (fault,) = faults("idx", mean=mean)
    assert fault.endswith(nearest)


@pytest.mark.parametrize(
    ("std", "nearest"),
    [
        ((255.0,), "nearest: [1], divided by 255"),
        ((1000.0,), "nearest: [1]"),
        ((0.229 / 255, 0.224 / 255), "nearest: [0.229, 0.224], × 255"),  # divided by 255 once too often
        ((1e-9,), "would become as large as 1,000,000,000; nearest: [2.55e-07], × 255"),
    ],
)
def test_a_deviation_that_no_image_has_is_refused(std: tuple[float, ...], nearest: str) -> None:
    (fault,) = faults("cifar10", std=std)
    assert fault.endswith(nearest)


@pytest.mark.parametrize(
    ("mean", "std"),
    [
        ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ((0.5,), (0.5,)),  # [-1, 1]
        ((0.0,), (1.0,)),  # [0, 1]
        ((0.0, 1.0), (1 / 255, 0.0039)),  # 0 … 255, as Caffe's networks want it
        (None, None),
    ],
)
def test_constants_that_people_use_on_purpose_are_accepted(mean: Any, std: Any) -> None:
    assert faults("idx", mean=mean, std=std) == []


def test_features_of_rows_may_have_any_constants() -> None:
    section = DataSection(source="csv", mean=(123.7, -5e9), std=(1e-9, 1e9), num_samples=8)
    assert check_data(section) == []


def numpy_files(root: Path, what: str, values: NDArray[Any]) -> DataSection:
    """Return the section of a source `numpy` of 8 samples."""
    for part in ("train", "test"):
        np.save(root / f"{part}_{what}.npy", values)
        np.save(root / f"{part}_labels.npy", np.arange(8) % 2)
    return DataSection(source="numpy", root=str(root), num_samples=8)


def test_constants_of_numpy_files_are_checked_when_their_kind_is_known(cache: Path, tmp_path: Path) -> None:
    """An earlier defect: before its files were read, `numpy` counted as images, and rows could not have a mean of 5."""
    rows = numpy_files(tmp_path, "rows", GENERATOR.normal(5, 3, (8, 2)))
    given = rows.model_copy(update={"mean": (5.0, -2.0), "std": (3.0, 1e-4)})
    assert check_data(given) == []
    source = load_source(given, 0, no_report)
    assert (source.mean, source.std) == ((5.0, -2.0), (3.0, 1e-4))
    (tmp_path / "images").mkdir()
    images = numpy_files(tmp_path / "images", "images", GENERATOR.integers(0, 256, (8, 6, 6, 1), dtype=np.uint8))
    given = images.model_copy(update={"mean": (127.5,), "std": (127.5,)})
    assert check_data(given) == []
    with pytest.raises(JobError) as caught:
        load_source(given, 0, no_report)
    assert "data.mean: [127.5]: images are scaled to [0, 1] first" in str(caught.value)
    assert "data.std: [127.5]: images are scaled to [0, 1] first" in str(caught.value)


def test_keys_of_images_are_refused_for_numpy_files_of_rows(cache: Path, tmp_path: Path) -> None:
    rows = numpy_files(tmp_path, "rows", GENERATOR.normal(5, 3, (8, 2)))
    given = rows.model_copy(update={"hflip": True, "channels_last": True})
    assert check_data(given) == []  # the files might hold images
    with pytest.raises(JobError) as caught:
        load_source(given, 0, no_report)
    for key in ("hflip", "channels_last"):
        assert f"data.{key}: is for images of one size and encoded images, and 'numpy' has rows" in str(caught.value)
    (fault,) = check_data(rows.model_copy(update={"image_size": 8}))
    assert str(fault) == (
        "data.image_size: is for encoded images, and 'numpy' has images of one size or rows; use data.crop_padding"
    )


@pytest.mark.parametrize("command", [["plan"], ["train"]])
def test_such_constants_end_train_before_there_is_a_run_folder(
    job: str, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, job, "--data.mean", "[127.5]", "--data.std", "[127.5]"]) == 2
    message = capsys.readouterr().err
    assert "data.mean: [127.5]" in message
    assert "data.std: [127.5]" in message
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("keys", "fault"),
    [
        ({"crop_scale": (8.0, 100.0)}, "data.crop_scale: 100 exceeds 1, the area .*, or [0.08, 1] for percent"),
        ({"crop_scale": (800.0, 1000.0)}, "data.crop_scale: 1000 exceeds 1, the area of the whole image; use <= 1"),
        ({"crop_ratio": (75.0, 133.0)}, "for percent use [0.75, 1.33]"),
        ({"crop_ratio": (0.001, 0.01)}, "data.crop_ratio: [0.001, 0.01]: every window would have one side 10 times"),
    ],
)
def test_windows_that_cannot_be_meant_are_refused(keys: dict[str, Any], fault: str) -> None:
    (found,) = faults("image_folder", **keys)
    assert all(part in found for part in fault.split(".*"))


def test_windows_of_long_images_are_accepted() -> None:
    assert faults("image_folder", crop_scale=(0.01, 1.0), crop_ratio=(5.0, 20.0)) == []


# --- arrays -----------------------------------------------------------------------------------------


def write(folder: Path, train: NDArray[Any], labels: NDArray[Any] | None = None, what: str = "images") -> None:
    for part in ("train", "test"):
        np.save(folder / f"{part}_{what}.npy", train)
        np.save(folder / f"{part}_labels.npy", np.arange(len(train)) % 3 if labels is None else labels)


def load(folder: Path, num_samples: int, **keys: Any) -> Datasets:
    return load_source(DataSection(source="numpy", root=str(folder), num_samples=num_samples, **keys), 0, no_report)


def pixels(*shape: int) -> NDArray[np.uint8]:
    return GENERATOR.integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize(
    ("shape", "remedy"),
    [
        (
            (20, 3, 32, 32),
            "if the channels are axis 1: numpy.save(…, numpy.ascontiguousarray(x.transpose(0, 2, 3, 1)))",
        ),
        ((20, 1, 28, 28), "x.transpose(0, 2, 3, 1)"),
        ((20, 4, 16, 12), "x.transpose(0, 2, 3, 1)"),
        (
            (20, 32, 3, 32),
            "if the channels are axis 2: numpy.save(…, numpy.ascontiguousarray(x.transpose(0, 1, 3, 2)))",
        ),
        ((20, 13, 64, 64), "if the channels are axis 1: "),  # 13 bands of a satellite
        ((20, 100, 64, 64), "x.transpose(0, 2, 3, 1)"),
        ((20, 1, 784), "if they are flattened images: reshape them to (N, C, H, W) and then .transpose(0, 2, 3, 1)"),
        ((20, 3, 1024), "if they are flattened images: reshape them to (N, C, H, W) and then .transpose(0, 2, 3, 1)"),
        ((20, 1024, 3), "if they are flattened images: reshape them to (N, H, W, C)"),
    ],
)
def test_axes_in_another_order_are_refused_unless_the_job_says_so(
    cache: Path, tmp_path: Path, shape: tuple[int, ...], remedy: str
) -> None:
    write(tmp_path, pixels(*shape))
    read = [*shape[1:], 1][:3]
    with pytest.raises(RunError) as error:
        load(tmp_path, 20)
    message = str(error.value)
    assert f"these have {read[0]} × {read[1]} pixels of {read[2]} channel" in message
    assert remedy in message
    assert f"data.shape = {read}" in message
    # Both ways out work, and the second one too where the arrays are cached already.
    assert load(tmp_path, 20, shape=tuple(read)).train.shape == tuple(read)


def test_the_transposition_that_is_named_gives_the_same_pixels(cache: Path, tmp_path: Path) -> None:
    right = pixels(20, 8, 6, 3)
    write(tmp_path, np.ascontiguousarray(np.moveaxis(right, 3, 1)))
    with pytest.raises(RunError, match="transpose") as error:
        load(tmp_path, 20)
    x = np.load(tmp_path / "train_images.npy")
    code = str(error.value).partition("numpy.ascontiguousarray(")[2].partition("); if")[0].removesuffix(")")
    assert code == "x.transpose(0, 2, 3, 1)"
    write(tmp_path, np.ascontiguousarray(x.transpose(0, 2, 3, 1)))
    assert np.array_equal(load(tmp_path, 20).train.fetch(np.arange(20)), right)


@pytest.mark.parametrize(
    "shape",
    [(20, 32, 32, 3), (20, 28, 28), (20, 2, 2, 1), (20, 3, 3, 200), (20, 8, 8, 32), (20, 3, 100, 3), (20, 5, 4)],
)
def test_shapes_that_may_be_meant_are_read(cache: Path, tmp_path: Path, shape: tuple[int, ...]) -> None:
    write(tmp_path, pixels(*shape))
    assert load(tmp_path, 20).train.shape == tuple([*shape[1:], 1][:3])


def test_a_stated_shape_must_be_that_of_the_data(cache: Path, tmp_path: Path) -> None:
    write(tmp_path, pixels(20, 3, 8, 6))
    with pytest.raises(
        RunError, match=r"a sample is \(3, 8, 6\), and data.shape is \[8, 6, 3\]: .*transpose\(0, 2, 3, 1"
    ):
        load(tmp_path, 20, shape=(8, 6, 3))
    with pytest.raises(RunError, match=r"a sample is \(3, 8, 6\), and data.shape is \[8, 6, 1\]$"):
        load(tmp_path, 20, shape=(8, 6, 1))


def test_samples_on_another_axis_are_found_by_their_labels(cache: Path, tmp_path: Path) -> None:
    # as MATLAB's files of SVHN have them
    write(tmp_path, pixels(32, 32, 3, 20), np.arange(20) % 3)
    with pytest.raises(RunError, match=r"axis 3 has as many entries as there are labels.*numpy.moveaxis\(x, 3, 0\)"):
        load(tmp_path, 20)


@pytest.mark.parametrize(
    ("labels", "code"),
    [(np.eye(4, dtype=np.int64)[np.arange(20) % 4], "argmax(1)"), (np.ones((20, 1), int), "ravel()")],
)
def test_labels_of_two_axes_are_refused_with_the_remedy(
    cache: Path, tmp_path: Path, labels: NDArray[Any], code: str
) -> None:
    write(tmp_path, pixels(20, 8, 8, 1), labels)
    with pytest.raises(RunError) as error:
        load(tmp_path, 20)
    assert f"numpy.save(…, labels.{code})" in str(error.value)


BYTES = pixels(20, 8, 8, 1)
TYPES: dict[str, tuple[NDArray[Any], NDArray[Any] | None]] = {
    "floats of 0 … 255": (BYTES.astype(np.float32), BYTES),
    "doubles of [0, 1]": (BYTES / 255, BYTES),
    "half floats of [0, 1]": ((BYTES / 255).astype(np.float16), BYTES),
    "floats of [-1, 1]": (BYTES / 127.5 - 1, BYTES),
    "whole numbers": (BYTES.astype(np.int64), BYTES),
    "16 bits": (BYTES.astype(np.uint16) * 257, BYTES),
    "masks": (BYTES > 127, np.where(BYTES > 127, 255, 0)),
    "masks of 0 and 1": ((BYTES > 127).astype(np.int32), np.where(BYTES > 127, 255, 0)),
    "normalized": ((BYTES / 255 - 0.3) / 0.1, None),
}


@pytest.mark.parametrize("kind", TYPES)
def test_pixels_of_another_type_are_refused_with_code_that_makes_bytes_of_them(
    cache: Path, tmp_path: Path, kind: str
) -> None:
    x, expected = TYPES[kind]
    write(tmp_path, x)
    with pytest.raises(RunError, match="they must be uint8") as error:
        load(tmp_path, 20)
    message = str(error.value)
    if expected is None:
        assert "are not pixels: undo their normalization" in message
        return
    code = message.rpartition(": ")[2]
    made = eval(code, {"x": x})  # noqa: S307  # the code in our message, as a user would run it
    assert made.dtype == np.uint8
    assert np.array_equal(made, expected)


def test_bytes_made_of_floats_in_0_to_1_without_scaling_are_refused(cache: Path, tmp_path: Path) -> None:
    write(tmp_path, (BYTES / 255).astype(np.uint8))
    with pytest.raises(RunError, match=r"every pixel is 0 or 1 of 255.*\(255 \* x\).round\(\)"):
        load(tmp_path, 20)
    write(tmp_path, BYTES)
    np.save(tmp_path / "test_images.npy", (BYTES / 255).astype(np.uint8))
    with pytest.raises(RunError, match=r"test_images.npy: every pixel is 0 or 1 of 255"):
        load(tmp_path, 20)


def test_idx_files_are_checked_alike(cache: Path, tmp_path: Path) -> None:
    for prefix in ("train", "t10k"):
        (tmp_path / f"{prefix}-images-idx3-ubyte").write_bytes(idx_bytes(pixels(20, 3, 16, 16)))
        (tmp_path / f"{prefix}-labels-idx1-ubyte").write_bytes(idx_bytes((np.arange(20) % 3).astype(np.uint8)))
    keys: dict[str, Any] = {"source": "idx", "root": str(tmp_path), "num_samples": 20}
    for _ in range(2):  # the second time from the cache
        with pytest.raises(RunError, match=r"3 × 16 pixels of 16 channels; if the channels are axis 1"):
            load_source(DataSection(**keys), 0, no_report)
    assert load_source(DataSection(**keys, shape=(3, 16, 16)), 0, no_report).train.shape == (3, 16, 16)


OWN = """
import numpy as np
from hvd_batchgrow.data.datasets.dataset import ArrayDataset, Datasets

def source(data):
    shape, mean, std = {shape}, {mean}, {std}
    images = np.random.default_rng(0).integers(0, 256, (20, *shape), dtype=np.uint8)
    samples = ArrayDataset(images.astype(np.{dtype}), np.arange(20) % 3)
    return Datasets(samples, samples, 3, mean, std)
"""


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"shape": "(3, 16, 16)"}, "if the channels are axis 1"),
        ({"mean": "(127.5,)"}, "nearest: [0.5], divided by 255"),
        ({"std": "(64.0,)"}, "nearest: [0.251], divided by 255"),
        ({"dtype": "float32"}, "x.round().astype('uint8')"),
    ],
)
def test_a_user_source_is_checked_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: dict[str, str], message: str
) -> None:
    right = {"shape": "(16, 16, 1)", "mean": "(0.5,)", "std": "(0.25,)", "dtype": "uint8"}
    if values.get("shape"):
        right |= {"mean": "(0.5,) * 16", "std": "(0.25,) * 16"}
    name = f"own_{'_'.join(values)}"
    (tmp_path / f"{name}.py").write_text(OWN.format(**(right | values)))
    monkeypatch.syspath_prepend(str(tmp_path))
    section = DataSection(source=f"{name}:source", num_samples=20)
    with pytest.raises((RunError, JobError)) as error:
        load_source(section, 0, no_report)
    assert message in str(error.value)


def test_padding_that_could_hide_all_of_an_image_is_refused(cache: Path, tmp_path: Path) -> None:
    write(tmp_path, pixels(20, 8, 6, 1))
    with pytest.raises(
        JobError, match=r"data.crop_padding: 6: .* a 8 × 6 image could consist of padding only; use < 6"
    ):
        load(tmp_path, 20, crop_padding=6)
    load(tmp_path, 20, crop_padding=5)


def test_one_class_is_nothing_to_learn(cache: Path, tmp_path: Path) -> None:
    write(tmp_path, pixels(20, 8, 8, 1), np.zeros(20, int))
    with pytest.raises(JobError, match=r"data.num_classes: 1: every label is 0, so the loss is 0"):
        load(tmp_path, 20)
    assert load(tmp_path, 20, num_classes=2).num_classes == 2
