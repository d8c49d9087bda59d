from __future__ import annotations

import os
from pathlib import Path

import pytest

from hvd_batchgrow.data.images.shards import find_shards
from hvd_batchgrow.messages.errors import JobError, RunError
from tests.pictures import RECORDS, TARS, Form, pictures

pytestmark = pytest.mark.usefixtures("cache")
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


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["train-00000-of-00004", "train-00002-of-00004"],
         r"2 of 4 shards are missing: train-00001-of-00004, train-00003-of-00004; data.train = 'train-\*-of-00004'"),
        (["x-train.tfrecord-00001-of-00003", "x-train.tfrecord-00002-of-00003"],
         r"1 of 3 shards are missing: x-train.tfrecord-00000-of-00003; data.train = 'x-train.tfrecord-\*-of-00003'"),
        (["train-00000-of-00002.tar", "train-00001-of-00002.tar", "train-00000-of-00003.tar"],
         r"2 of 3 shards are missing: train-00001-of-00003.tar, train-00002-of-00003.tar"),
    ],
)  # fmt: skip
def test_shards_that_are_missing_by_their_total_are_named(tmp_path: Path, names: list[str], message: str) -> None:
    for name in names:
        (tmp_path / name).touch()
    with pytest.raises(RunError, match=message) as error:
        find_shards(tmp_path, "data.train", None, ["*train*"])
    given = str(error.value).split("'")[1]
    assert {*find_shards(tmp_path, "data.train", given, ["*train*"])} <= {*names}


def test_shards_are_whole_if_their_numbers_start_at_1(tmp_path: Path) -> None:
    names = ["train-1-of-2", "train-2-of-2", "train-one-of-9"]
    for name in names:
        (tmp_path / name).touch()
    assert find_shards(tmp_path, "data.train", None, ["train*"]) == names


@pytest.mark.parametrize("form", [TARS, RECORDS], ids=lambda form: form.source)
def test_sets_of_shards_must_be_disjoint_and_whole(tmp_path: Path, form: Form) -> None:
    root = form.make(tmp_path / "data", pictures(6))
    with pytest.raises(RunError, match=r"3 shards in the training set and in the test set: .*/train-"):
        form.read(root, test="*")
    with pytest.raises(JobError, match=r"data.label: = 3: a .* label has a name, such as 'label'"):
        form.read(root, label=3)
    shard = sorted(root.glob("train*"))[1]
    os.truncate(shard, 0)
    with pytest.raises(
        RunError, match=rf"{shard} (contains no samples: it is truncated|is truncated or damaged at byte 0: empty)"
    ):
        form.read(root)
