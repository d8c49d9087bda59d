from __future__ import annotations

import gzip
import tarfile
from collections.abc import Iterable
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import webdataset

from hvd_batchgrow.messages.errors import RunError
from tests.helpers import labels_of
from tests.pictures import TARS, assert_holds, picture, pictures

pytestmark = pytest.mark.usefixtures("cache")


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
    source = TARS.read(_tar_root(tmp_path, **members), label=label, num_classes=3)
    assert (labels_of(source.train), source.num_classes) == ([2], 3)


@pytest.mark.parametrize(
    ("members", "fault"),
    [
        ({"txt": "a cat"}, r"has no label: neither .cls nor .label, nor a field of .json with such a name"),
        ({"json": {"other": 1}}, r"has no label"),
        ({"cls": b"cat"}, r".cls is b'cat', must be an integer"),
        ({"json": {"label": 1.5}}, r"field label of .json is 1.5, must be an integer"),
        ({"json": {"label": True}}, r"field label of .json is True, must be an integer"),
        ({"json": b"{"}, r".json cannot be read"),
        ({"json": b"[" * 100_000}, r".json cannot be read: maximum recursion depth"),
        ({"cls": b"9" * 20}, r"its label is 9{20}: no class has such a number"),
        ({"cls": 1, "jpg": picture(0).data}, r"has 2 images, must have 1: its members are cls, jpg, png"),
    ],
)
def test_tar_samples_that_cannot_be_used_are_named(tmp_path: Path, members: dict[str, Any], fault: str) -> None:
    with pytest.raises(RunError, match=rf"1 samples under .* cannot be used:\n  .*a-train.tar, sample 's': {fault}"):
        TARS.read(_tar_root(tmp_path, **members), on_bad_sample="replace")


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
    source = TARS.read(tmp_path, num_classes=2)
    assert_holds(source.train, [replace(picture(1), label=1)] * 2)
    assert source.train.locate(0) == f"{tmp_path}/train.tar, v1.0/a.PNG"


def test_a_tar_that_is_cut_anywhere_is_refused(tmp_path: Path) -> None:
    root = TARS.make(tmp_path / "data", pictures(6))
    path = root / "train-0001.tar"
    whole = path.read_bytes()
    end = len(whole.rstrip(b"\0")) // 512 * 512 + 512
    for length in [0, 1, 511, 512, *range(700, end, 900), end, end + 511]:
        path.write_bytes(whole[:length])
        with pytest.raises(
            RunError, match=r"train-0001.tar (is truncated (or damaged )?at byte \d+|contains no samples)"
        ):
            TARS.read(root, on_bad_sample="replace")
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
        TARS.read(root, on_bad_sample="replace")


@pytest.mark.parametrize("name", ["train.tar.gz", "train.tgz", "train.tar"])
def test_a_compressed_tar_is_refused(tmp_path: Path, name: str) -> None:
    root = _tar_root(tmp_path, cls=0)
    path = root / "a-train.tar"
    data = path.read_bytes()
    path.unlink()
    (root / name).write_bytes(gzip.compress(data))
    with pytest.raises(RunError, match=rf"{name} is compressed: .* unpack it: gunzip .*{name}"):
        TARS.read(root)
