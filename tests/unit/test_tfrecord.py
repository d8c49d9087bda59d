from __future__ import annotations

import gzip
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tfrecord.writer import TFRecordWriter

from hvd_batchgrow.data.datasets.class_labels import first_label
from hvd_batchgrow.data.datasets.dataset import BadSample
from hvd_batchgrow.data.images import tfrecord
from hvd_batchgrow.data.images.encoded_dataset import read_header
from hvd_batchgrow.messages.errors import JobError, RunError
from hvd_batchgrow.train.run.model_description import class_names
from tests.helpers import labels_of
from tests.pictures import NUM_TRAIN, RECORDS, assert_holds, overwrite, picture, pictures

pytestmark = pytest.mark.usefixtures("cache")


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
    assert first_label(np.array(labels), num_classes) == expected


def test_labels_that_count_from_one(tmp_path: Path) -> None:
    train = [replace(image, label=image.label + 1) for image in pictures(NUM_TRAIN)]
    root = RECORDS.make(tmp_path / "data", train, [replace(picture(3), label=3)] * 3)
    source = RECORDS.read(root, num_classes=3)
    assert_holds(source.train, pictures(NUM_TRAIN))
    assert_holds(source.test, [replace(picture(3), label=2)] * 3)
    assert class_names(source) == ("1", "2", "3")
    assert labels_of(RECORDS.read(root, num_classes=4).train) == [image.label for image in train]
    fault = (
        r"data.num_classes: is needed: training labels are 1 … 3 \(.*, record 0 has 1\). 3 if they count from 1, 4 if"
    )
    with pytest.raises(JobError, match=fault):
        RECORDS.read(root)


@pytest.mark.parametrize(
    ("example", "job"),
    [
        ({"image": (picture(1).data, "byte"), "label": (0, "int")}, {}),
        ({"image": (picture(1).data, "byte"), "fine": (0, "int"), "label": (5, "int")}, {"label": "fine"}),
        (_example(image=(picture(2).data, "byte"), label_=([1.0], "float"), note=(b"x", "byte")), {}),
        # The start of the image, before the image itself.
        (_example() | {"image/a": (picture(1).data[:200], "byte")}, {}),
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
        RECORDS.read(tmp_path, on_bad_sample="replace")


def test_a_record_that_is_not_an_example_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_record(tmp_path / "val", _example())
    monkeypatch.setattr(TFRecordWriter, "serialize_tf_example", lambda _: b"\xff\xff no protocol buffer")
    write_record(tmp_path / "train", {})
    with pytest.raises(RunError, match=r"train, record 0 at byte 0: is not a tf.train.Example"):
        RECORDS.read(tmp_path)


def test_a_record_with_a_wrong_checksum_is_a_bad_image(tmp_path: Path) -> None:
    train = [replace(image, label=image.label + 1) for image in pictures(NUM_TRAIN)]
    root = RECORDS.make(tmp_path / "data", train, train[:6])
    middle, changed = len(train[6].data) // 2, bytearray(train[6].data)
    changed[middle] ^= 1  # it could still be decoded
    assert read_header(bytes(changed))[:2] == train[6].pixels.shape[:2]
    overwrite(root, train[6].data, bytes(changed))
    with pytest.raises(RunError, match=r"1 of 12 images .*\n  sample 6: .*train-00001-of-00003, record 2"):
        RECORDS.read(root, num_classes=3)
    source = RECORDS.read(root, num_classes=3, on_bad_sample="replace")
    others = [k for k in range(NUM_TRAIN) if k != 6]
    labels = labels_of(source.train)
    assert [labels[k] for k in others] == [train[k].label - 1 for k in others]
    assert 0 <= labels[6] < 3
    with pytest.raises(BadSample, match=r"sample 6 \(.*, record 2\): has a wrong checksum"):
        source.train.fetch(np.array([6]))


def test_a_shard_whose_framing_is_damaged_is_refused(tmp_path: Path) -> None:
    root = RECORDS.make(tmp_path / "data", pictures(6))
    path = root / "train-00001-of-00003"
    whole = path.read_bytes()
    second = int.from_bytes(whole[:8], "little") + 16
    path.write_bytes(whole[:second] + b"\x01" + whole[second + 1 :])
    place = rf"{path}, record 1 at byte {second}"
    with pytest.raises(RunError, match=rf"{place}: the checksum of its length is wrong: damaged, or not a TFRecord"):
        RECORDS.read(root, on_bad_sample="replace")
    for length in (second + 1, second + 11, second + 12, second + 500, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(RunError, match=rf"{place} is truncated: .*{length - second} .*bytes are left"):
            RECORDS.read(root, on_bad_sample="replace")
    path.write_bytes(gzip.compress(whole))
    with pytest.raises(RunError, match=rf"{path} is compressed"):
        RECORDS.read(root)
