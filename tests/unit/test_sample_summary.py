"""What ranks compare to notice that one of them has other samples."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

from hvd_batchgrow.config import DataSection
from hvd_batchgrow.data.changed_data import Summary, differences
from hvd_batchgrow.data.datasets.dataset import ArrayDataset, Datasets
from hvd_batchgrow.data.load_source import load_source
from hvd_batchgrow.data.sample_summary import sample_summary
from hvd_batchgrow.storage.strict_json import dump_json

INPUTS = np.random.default_rng(0).random((100, 4), dtype=np.float32)
CLASSES = np.arange(100) % 3
OTHERS = (CLASSES + 1) % 3


@pytest.fixture
def summary(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Summary]:
    """Return the summary of a source that returns these sets, as rank 0 broadcasts it."""

    def found(train: Any, test: Any, **keys: Any) -> Summary:
        sets = Datasets(train, test, 3, (0.0,) * 4, (1.0,) * 4) if isinstance(train, ArrayDataset) else (train, test)
        monkeypatch.setitem(sys.modules, "summarized", SimpleNamespace(sets=lambda _: sets))
        data = DataSection(source="summarized:sets", num_samples=len(train), num_classes=3, **keys)
        source = load_source(data, 0, lambda *_: None, "class")
        broadcast: Summary = json.loads(dump_json(sample_summary(source)))
        return broadcast

    return found


def torch_set(inputs: torch.Tensor, classes: Any = CLASSES) -> TensorDataset:
    return TensorDataset(inputs, torch.as_tensor(classes))


@pytest.mark.parametrize("fraction", [0.0, 0.1])
def test_other_targets_of_an_array_are_noticed(summary: Callable[..., Summary], fraction: float) -> None:
    test = ArrayDataset(INPUTS[:50], CLASSES[:50], "test")
    ours, theirs = (
        summary(ArrayDataset(INPUTS, classes, "training"), test, validation_fraction=fraction)
        for classes in (CLASSES, np.where(np.arange(100) < 90, CLASSES, OTHERS))
    )
    assert "the training targets" in differences(ours, theirs)
    assert "the training samples" not in differences(ours, theirs)
    assert ("the validation targets" in ours) == (fraction > 0)


def test_other_targets_of_a_torch_dataset_are_noticed(summary: Callable[..., Summary]) -> None:
    inputs = torch.from_numpy(INPUTS)
    ours = summary(torch_set(inputs), torch_set(inputs))
    assert differences(ours, summary(torch_set(inputs), torch_set(inputs))) == []
    assert differences(ours, summary(torch_set(inputs, OTHERS), torch_set(inputs))) == ["the training samples"]


def test_samples_of_types_that_numpy_lacks_are_compared(summary: Callable[..., Summary]) -> None:
    inputs = torch.from_numpy(INPUTS).bfloat16()
    test = torch_set(inputs)
    assert differences(summary(torch_set(inputs), test), summary(torch_set(inputs), test)) == []
    assert differences(summary(torch_set(inputs), test), summary(torch_set(inputs + 1), test)) != []


def test_samples_with_infinities_are_compared(summary: Callable[..., Summary]) -> None:
    """An additive mask: where it is 0 or -inf, and the other numbers."""
    mask = torch.from_numpy(np.where(INPUTS > 0.5, -np.inf, 0).astype(np.float32))
    test = torch_set(mask)
    ours = summary(torch_set(mask), test)
    assert differences(ours, summary(torch_set(mask), test)) == []
    for other in (mask.flip(0), torch.zeros_like(mask), torch.where(mask == 0, 1.0, mask)):
        assert differences(ours, summary(torch_set(other), test)) == ["the training samples"]


def test_rounding_does_not_count(summary: Callable[..., Summary]) -> None:
    inputs = torch.from_numpy(INPUTS)
    test = torch_set(inputs)
    assert differences(summary(torch_set(inputs), test), summary(torch_set(inputs * (1 + 1e-6)), test)) == []


def test_many_targets_are_compared_in_parts(summary: Callable[..., Summary], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hvd_batchgrow.data.sample_summary._PART_BYTES", 8 * 30)
    test = ArrayDataset(INPUTS[:50], CLASSES[:50], "test")
    ours, theirs = (summary(ArrayDataset(INPUTS, each, "train"), test) for each in (CLASSES, np.roll(CLASSES, 1)))
    assert [len(found["the training targets"]) for found in (ours, theirs)] == [4, 4]
    assert "the training targets" in differences(ours, theirs)
