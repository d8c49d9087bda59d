"""Values of a custom source that would train on something else than intended, without an error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset as TorchDataset

from hvd_batchgrow.config import DataSection
from hvd_batchgrow.data.datasets.dataset import NO_SIZES, ArrayDataset, Datasets
from hvd_batchgrow.data.load_source import load_source
from hvd_batchgrow.data.own_source import load_own
from hvd_batchgrow.data.samples.find_non_finite import non_finite_sample
from hvd_batchgrow.data.samples.load_samples import load_samples
from hvd_batchgrow.messages.errors import JobError, RunError
from hvd_batchgrow.tasks.multi_label import MultiLabel
from tests.helpers import no_report

HERE = "tests.unit.test_own_data_checks"
SECTION = DataSection(source="mydata:source")


class Points(TorchDataset[tuple[Any, Any]]):
    """Two features and a class."""

    def __init__(self, classes: tuple[str, ...] = ()) -> None:
        if classes:
            self.classes = classes

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        return np.array([index, 1], np.float32), index % 2


def test_classes_of_two_sets_must_be_the_same() -> None:
    """Folders are numbered in each set by themselves, so a set that lacks one would have other classes."""
    train = Points(("cat", "dog", "owl"))
    fault = r"mydata:source: classes of train are cat, dog, owl; those of {} are cat, owl; a class must have the same"
    with pytest.raises(JobError, match=fault.format("test")):
        load_samples((train, Points(("cat", "owl"))), SECTION, 3)
    with pytest.raises(JobError, match=fault.format("validation")):
        load_samples((train, Points(("cat", "owl")), train), SECTION, 3)
    assert load_samples((train, Points()), SECTION, 3).num_classes == 3


class Series(TorchDataset[tuple[Any, Any]]):
    """A feature, and any target."""

    def __init__(self, targets: Any, inputs: Any = None) -> None:
        self.targets, self.inputs = targets, np.zeros((len(targets), 1)) if inputs is None else inputs

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        return self.inputs[index], self.targets[index]


# --- masked, complex and other values ----------------------------------------------------------

MADE: dict[str, Any] = {}
"""Values and targets of `made`."""


def made(data: DataSection) -> Datasets:
    good = ArrayDataset(MADE.get("good", np.ones((8, 2))), np.arange(8) % 2)
    bad = ArrayDataset(MADE["values"], MADE.get("targets", np.arange(8) % 2))
    width = np.shape(MADE["values"])[-1]
    return Datasets(good, bad, 2, (0.0,) * width, (1.0,) * width)


def masked(values: NDArray[Any]) -> Any:
    return np.ma.masked_array(values, np.arange(values.size).reshape(values.shape) == 3)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"values": masked(np.ones((8, 2)))},
         "test: values has 1 of 16 entries masked; numpy.ma.filled(array, …) replaces them"),
        ({"values": np.ones((8, 2)), "targets": masked(np.arange(8) % 2)}, "test: targets has 1 of 8 entries masked"),
        ({"values": np.ones((8, 2)) * 1j},
         "test: values must be real numbers, are complex128: numpy.concatenate([values.real, values.imag], axis=-1)"),
        ({"values": np.array([[1.0, None]] * 8)}, "test: values must be real numbers, are object"),
    ],
)  # fmt: skip
def test_arrays_that_are_not_plain_numbers_are_refused(
    given: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(globals(), "MADE", given)
    with pytest.raises(JobError) as error:
        load_own(DataSection(source=f"{HERE}:made"))
    assert message in str(error.value)


def test_arrays_whose_mask_is_empty_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "MADE", {"values": np.ma.masked_array(np.full((8, 2), 3.0), mask=False)})
    found = load_own(DataSection(source=f"{HERE}:made")).test.fetch(np.arange(2))
    assert torch.from_numpy(np.asarray(found)).tolist() == [[3, 3], [3, 3]]


def test_images_of_bits_are_refused_in_each_set_of_arrays(monkeypatch: pytest.MonkeyPatch) -> None:
    images = np.arange(8 * 4 * 4 * 3, dtype=np.uint8).reshape(8, 4, 4, 3)
    monkeypatch.setitem(globals(), "MADE", {"good": images, "values": images % 2})
    with pytest.raises(RunError, match=r"data.source, test: every pixel is 0 or 1 of 255"):
        load_own(DataSection(source=f"{HERE}:made"))
    monkeypatch.setitem(globals(), "MADE", {"good": images, "values": images})
    assert load_own(DataSection(source=f"{HERE}:made")).test.fetch(np.array([7])).max() == 127  # 383 mod 256


@pytest.mark.parametrize("part", [0, 1])
def test_a_sample_with_masked_entries_is_named(part: int) -> None:
    values = np.ma.masked_array(np.ones((4, 2)), np.arange(8).reshape(4, 2) == 5)  # in sample 2
    plain = np.ones((4, 2))
    train = Series(plain, values) if part == 0 else Series(values, plain)
    fault = r"training set \(Series\), sample 2.*: an array has 1 of 2 entries masked; numpy.ma.filled"
    with pytest.raises(RunError, match=fault):
        load_samples((train, Series(plain, plain)), SECTION, 3, "values").train.fetch(np.array([2]))


# --- targets -----------------------------------------------------------------------------------


def test_targets_of_a_torch_dataset_that_float32_would_round_are_refused() -> None:
    """float32 has a resolution of 128 near 1.7e9, which is 2 s or more of the 3600 s of an hour."""
    hour = 1.7e9 + np.arange(3600.0)
    fault = r"mydata:source', 16 samples of the training set: target 0 has values from 1700000000 to 1700003599"
    with pytest.raises(RunError, match=fault):
        load_samples((Series(hour), Series(hour)), SECTION, 3, "values")
    for fine in (hour - 1.7e9, 1.7e9 + 1000 * np.arange(3600.0)):
        assert load_samples((Series(fine), Series(hour)), SECTION, 3, "values").num_classes == 1


@pytest.mark.parametrize("dtype", ["<i8", ">i8", "<u8", ">u8"])
def test_integers_of_any_byte_order_that_float64_would_round_are_refused(
    cache: Path, tmp_path: Path, dtype: str
) -> None:
    for part in ("train", "test"):
        np.save(tmp_path / f"{part}_rows.npy", (2**60 + np.arange(40)).astype(dtype)[:, None])
        np.save(tmp_path / f"{part}_labels.npy", np.arange(40) % 2)
    with pytest.raises(RunError, match=r"feature 0 has values that differ by less than float64 can represent"):
        load_source(DataSection(source="numpy", root=str(tmp_path)), 3, no_report, any_size=True)


class Computed:
    """More samples than are computed for a check at the start; the targets of the last ones are `last`."""

    kind, shape, sizes = "rows", (3,), NO_SIZES

    def __init__(self, last: int) -> None:
        self.targets, self.last = self, last

    def __getitem__(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.where(ids >= 1_000_010, self.last, ids % 2)

    def __len__(self) -> int:
        return 1_000_020

    def fetch(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        return np.zeros((len(ids), 3), np.float32)

    def locate(self, sample_id: int) -> str:
        return f"entry {sample_id}"


def computed(data: DataSection) -> Datasets:
    train: Any = Computed(int(data.root or 0))
    return Datasets(train, train, 2, (0.0,) * 3, (1.0,) * 3)


@pytest.mark.parametrize("label", [7, -100])
def test_computed_classes_are_checked_when_they_are_read(label: int) -> None:
    train = load_own(DataSection(source=f"{HERE}:computed", root=str(label))).train
    assert train.targets[np.array([4, 5])].tolist() == [0, 1]
    fault = rf"1 of 2 labels is not in 0 … 1: entry 1000015 has {label}"
    with pytest.raises(RunError, match=fault):
        train.targets[np.array([1, 1_000_015])]
    free = load_own(DataSection(source=f"{HERE}:computed", root=str(label)), target=None).train
    assert free.targets[np.array([1_000_015])].tolist() == [label]


def test_a_target_that_the_task_refuses_is_named_after_the_loss_was_not_finite() -> None:
    targets = torch.tensor([[0.0, 1.0]] * 200)
    targets[130, 1] = -1
    samples = load_samples((Series(targets), Series(targets)), SECTION, 3, "values").train
    found = non_finite_sample(samples, np.zeros(200, np.int64), np.arange(200), MultiLabel().check_targets)
    assert found is not None
    assert "(Series), sample 130 is [0.0, -1.0], which is refused: task.name = 'multi_label' needs targets of" in found
    assert non_finite_sample(samples, np.zeros(200, np.int64), np.arange(200)) is None
    targets[170, 0] = torch.nan  # what is not finite comes first
    found = non_finite_sample(samples, np.zeros(200, np.int64), np.arange(200), MultiLabel().check_targets)
    assert found is not None
    assert found.endswith("sample 170 has a NaN")
