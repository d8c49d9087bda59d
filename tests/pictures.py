"""Small encoded images, and the formats that hold them, each with its writer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
from hvd_batchgrow.config.source_specs import ReportProgress
from hvd_batchgrow.data.datasets.dataset import Datasets
from hvd_batchgrow.data.images import image_folder, tfrecord
from hvd_batchgrow.data.images import webdataset as wds
from hvd_batchgrow.data.images.encoded_dataset import EncodedDataset, decode

CLASSES = ("cat", "dog", "eel")
NUM_TRAIN, NUM_VAL, NUM_SHARDS = 12, 5, 3


@dataclass(frozen=True)
class Picture:
    data: bytes
    label: int
    extension: str

    @property
    def pixels(self) -> NDArray[np.uint8]:
        return np.asarray(Image.open(BytesIO(self.data)).convert("RGB"))


def picture(seed: int) -> Picture:
    """Return an image; formats and modes alternate, and all sizes differ."""
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
    """A format and its writer."""

    source: str
    load: Callable[[DataSection, int, ReportProgress], Datasets]
    write: Callable[[Path, str, Sequence[Picture]], None]

    def expected(self, images: Sequence[Picture]) -> list[Picture]:
        """Return the images in the order of the ids."""
        return sorted(images, key=lambda image: image.label) if self.source == "image_folder" else list(images)

    def make(self, root: Path, train: Sequence[Picture], val: Sequence[Picture] | None = None) -> Path:
        self.write(root, "train", train)
        self.write(root, "val", pictures(NUM_VAL, first=20) if val is None else val)
        return root

    def read(self, root: Path, report: ReportProgress | None = None, **job: Any) -> Datasets:
        return self.load(DataSection(source=self.source, root=str(root), **job), 0, report or (lambda *_: None))


FOLDER = Form("image_folder", image_folder.load, write_folder)
TARS = Form("webdataset", wds.load, write_tars)
RECORDS = Form("tfrecord", tfrecord.load, write_records)
each_form = pytest.mark.parametrize("form", [FOLDER, TARS, RECORDS], ids=lambda form: form.source)


def assert_holds(samples: Any, expected: Sequence[Picture]) -> None:
    assert isinstance(samples, EncodedDataset)
    assert samples.targets.tolist() == [image.label for image in expected]
    assert samples.sizes.tolist() == [list(image.pixels.shape[:2]) for image in expected]
    for k, (data, image) in enumerate(zip(samples.fetch(np.arange(len(samples))), expected, strict=True)):
        assert data.tobytes() == image.data
        assert np.array_equal(decode(samples, k, data), image.pixels)


def overwrite(root: Path, old: bytes, new: bytes) -> Path:
    """Replace the bytes of an image, in whichever file they are; return the file."""
    for path in (path for path in root.rglob("*") if path.is_file()):
        if old in (content := path.read_bytes()):
            path.write_bytes(content.replace(old, new))
            return path
    raise AssertionError("no file has these bytes")
