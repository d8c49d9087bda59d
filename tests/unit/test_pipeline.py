from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from itertools import islice

import pytest
import torch
from torch import Tensor

from hvd_batchgrow.data.augment import CropFlip
from hvd_batchgrow.data.pipeline import (
    Batch,
    GroupFeed,
    Normalisation,
    choose_pipeline,
    crop_and_mirror,
    dali_batches,
    evaluation_batches,
    torch_batches,
)
from hvd_batchgrow.data.stream import Stream
from hvd_batchgrow.errors import RunError
from tests.helpers import NUM_TRAIN, SIDE, small_source

NORMALISE = Normalisation((0.5,), (0.25,))
PIPELINES = {"dali": dali_batches, "torch": torch_batches}


def feed(group: int = 8, pad_pixels: int = 2) -> GroupFeed:
    return GroupFeed(small_source().train, Stream(NUM_TRAIN, 5), CropFlip(pad_pixels, flip=True), group)


def read(name: str, first_group: int, stride: int, count: int, group: int = 8) -> list[Batch]:
    batches: Iterator[Batch] = PIPELINES[name](feed(group), NORMALISE, first_group, stride)
    return list(islice(batches, count))


def test_a_corner_and_a_mirror_do_what_they_say() -> None:
    raw = feed().raw_group(0)
    pixels = crop_and_mirror(raw, 2)
    for image, (row, column), mirror, result in zip(raw.images, raw.corners, raw.mirrors, pixels, strict=True):
        for y in range(SIDE):
            for x in range(SIDE):
                from_x = SIDE - 1 - x if mirror else x
                inside = 0 <= y + row < SIDE and 0 <= from_x + column < SIDE
                assert result[y, x, 0] == (image[y + row, from_x + column, 0] if inside else 0)


def test_all_corners_and_both_mirrors_occur() -> None:
    raws = [feed(pad_pixels=1).raw_group(k) for k in range(30)]
    corners = {tuple(corner) for raw in raws for corner in raw.corners.tolist()}
    assert corners == {(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1)}
    assert {int(m) for raw in raws for m in raw.mirrors} == {0, 1}


def test_dali_gives_the_pixels_of_the_reference() -> None:
    for (images, labels), (expected, expected_labels) in zip(
        read("dali", 3, 2, 40), read("torch", 3, 2, 40), strict=True
    ):
        assert torch.equal(images, expected)
        assert torch.equal(labels, expected_labels)


@pytest.mark.parametrize("name", list(PIPELINES))
@pytest.mark.parametrize(("ranks", "group"), [(2, 8), (3, 8), (4, 2), (1, 16)])
def test_a_sample_has_the_same_pixels_in_every_layout(name: str, ranks: int, group: int) -> None:
    entries = 96
    expected = torch.cat([images for images, _ in read(name, 0, 1, entries // 8)])
    found = torch.empty_like(expected)
    num_groups = entries // group
    for rank in range(ranks):
        mine = range(rank, num_groups, ranks)
        for k, (images, _) in zip(mine, read(name, rank, ranks, len(mine), group), strict=True):
            found[k * group : (k + 1) * group] = images
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", list(PIPELINES))
def test_a_resume_at_any_group_gives_what_would_have_come(name: str) -> None:
    whole = read(name, 0, 1, 60)  # an epoch is 37.5 groups
    for first in (1, 20, 37, 38, 55):
        assert all(
            torch.equal(a, b)
            for got, wanted in zip(read(name, first, 1, 3), whole[first : first + 3], strict=False)
            for a, b in zip(got, wanted, strict=True)
        )


def test_batches_are_not_overwritten_by_those_that_follow() -> None:
    batches = dali_batches(feed(), NORMALISE, 0, 1)
    kept = [next(batches) for _ in range(6)]
    copies: list[Tensor] = [images.clone() for images, _ in kept]
    for _ in range(6):
        next(batches)
    assert all(torch.equal(images, copy) for (images, _), copy in zip(kept, copies, strict=True))


def test_normalisation_is_per_channel() -> None:
    image = torch.tensor([[[[0, 255]]]], dtype=torch.uint8)
    result = Normalisation((0.5, 0.0), (0.25, 2.0))(image)
    assert result.tolist() == [[[[-2.0]], [[0.5]]]]


def test_evaluation_takes_the_images_as_they_are() -> None:
    test = small_source().test
    batches = list(evaluation_batches(test, NORMALISE, [slice(40, 50), slice(0, 3)]))
    assert [len(labels) for _, labels in batches] == [10, 3]
    assert torch.equal(batches[1][0], NORMALISE(torch.from_numpy(test.images[:3])))


def test_auto_falls_back_to_torch_and_dali_asked_for_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_pipeline("auto") == "dali"
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if "nvidia" in name else find_spec(name))
    assert choose_pipeline("auto") == "torch"
    with pytest.raises(RunError, match=r"pip install 'hvd_batchgrow\[dali-cuda130\]', or --data.pipeline torch"):
        choose_pipeline("dali")
