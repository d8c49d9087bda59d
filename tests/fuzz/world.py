"""The undamaged files of the fuzz cases: jobs on small data of every source, a run, a chain and a probe."""

from __future__ import annotations

import json
import shutil
import struct
import tarfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tomli_w
from PIL import Image
from tfrecord.writer import TFRecordWriter

from tests.helpers import NUM_TRAIN, job_tree, small_source, write_idx_folder

JOBS = sorted((Path(__file__).parents[2] / "jobs").glob("*.toml"))
_CLASSES = 3
_FEW = 24
"""Images in the sources of image files."""

Write = Callable[[Path, np.random.Generator], None]


def _labels(count: int) -> list[int]:
    return [k % _CLASSES for k in range(count)]


def _picture(draw: np.random.Generator) -> bytes:
    file = BytesIO()
    Image.fromarray(draw.integers(0, 256, (12, 14, 3), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


def _idx(root: Path, _: np.random.Generator) -> None:
    write_idx_folder(root, small_source())


def _cifar10(root: Path, draw: np.random.Generator) -> None:
    root.mkdir()
    for name in [*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]:
        records = [bytes([label]) + draw.bytes(3072) for label in _labels(NUM_TRAIN // 5)]
        (root / f"{name}.bin").write_bytes(b"".join(records))


def _numpy(root: Path, draw: np.random.Generator) -> None:
    root.mkdir()
    for name, count in (("train", NUM_TRAIN), ("test", 30)):
        np.save(root / f"{name}_images.npy", draw.integers(0, 256, (count, 8, 8, 1), dtype=np.uint8))
        np.save(root / f"{name}_labels.npy", np.array(_labels(count)))


def _columns(draw: np.random.Generator, count: int) -> dict[str, Any]:
    """Numbers, some of them missing, a time stamp, categories and labels."""
    return {
        "a": [None if k % 7 == 3 else x for k, x in enumerate(draw.normal(size=count).tolist())],
        "b": draw.integers(0, 9, count),
        "time": 1_700_000_000 + draw.integers(0, 99, count),
        "color": [("red", "blue", "NA")[k] for k in draw.integers(0, 3, count)],
        "label": _labels(count),
    }


def _csv(root: Path, draw: np.random.Generator) -> None:
    root.mkdir()
    for name, count in (("train", NUM_TRAIN), ("test", 30)):
        columns = _columns(draw, count)
        rows = zip(*columns.values(), strict=True)
        lines = [",".join(columns), *(",".join("" if x is None else str(x) for x in row) for row in rows)]
        (root / f"{name}.csv").write_text("\n".join(lines) + "\n")


def _parquet(root: Path, draw: np.random.Generator) -> None:
    root.mkdir()
    for name, count in (("train", NUM_TRAIN), ("test", 30)):
        pq.write_table(pa.table(_columns(draw, count)), root / f"{name}.parquet")


def _image_folder(root: Path, draw: np.random.Generator) -> None:
    for name, count in (("train", _FEW), ("val", 6)):
        for k, label in enumerate(_labels(count)):
            path = root / name / f"class{label}" / f"{k:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(_picture(draw))


def _webdataset(root: Path, draw: np.random.Generator) -> None:
    root.mkdir()
    for name, count in (("train", _FEW), ("val", 6)):
        with tarfile.open(root / f"{name}-0000.tar", "w") as tar:
            for k, label in enumerate(_labels(count)):
                for extension, content in (("png", _picture(draw)), ("cls", str(label).encode())):
                    member = tarfile.TarInfo(f"{k:03d}.{extension}")
                    member.size = len(content)
                    tar.addfile(member, BytesIO(content))


def _tfrecord(root: Path, draw: np.random.Generator) -> None:
    root.mkdir()
    for name, count in (("train", _FEW), ("val", 6)):
        writer = TFRecordWriter(str(root / f"{name}-00000-of-00001"))
        for label in _labels(count):
            writer.write({"image/encoded": (_picture(draw), "byte"), "image/class/label": (label, "int")})
        writer.close()


SOURCES: dict[str, Write] = {
    "idx": _idx,
    "cifar10": _cifar10,
    "numpy": _numpy,
    "csv": _csv,
    "parquet": _parquet,
    "image_folder": _image_folder,
    "webdataset": _webdataset,
    "tfrecord": _tfrecord,
}
ENCODED = {"image_folder", "webdataset", "tfrecord"}


def tree_for(source: str) -> dict[str, Any]:
    """Return a job on a source's root `data`, with a minimal network."""
    tree = job_tree("data")
    tree["data"] = {"source": source, "root": "data", "num_samples": NUM_TRAIN}
    if source in ENCODED:
        tree["data"] |= {"num_samples": _FEW, "image_size": 8, "pipeline": "torch"}
        tree["schedule"] |= {"max_batch": 16}
    if source in {"csv", "parquet"}:
        tree["model"] = {"name": "dense7", "ghost_batch": 8, "channels": [4] * 6}
        tree["data"] |= {"categorical": ["color"], "missing": "mean"}
    tree["evaluation"] = {"batch_size": 8}
    return tree


class World:
    """A folder with all files, undamaged; cases copy what they damage.

    Args:
        folder: empty.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name, write in SOURCES.items():
            root = folder / name
            root.mkdir()
            write(root / "data", np.random.default_rng(1))
            (root / "small.toml").write_text(tomli_w.dumps(tree_for(name)))

    def add_run(self, main: Callable[[list[str]], int]) -> None:
        """Make, in the working directory, a stopped run, a probe of its job and a chain's ledger."""
        self.lay_out("idx", Path.cwd())
        assert main(["train", "small.toml", "--max-updates", "2"]) == 75
        assert main(["train", "small.toml", "--resume", "auto", "--max-updates", "2"]) == 75
        assert main(["probe", "small.toml", "--budget-s", "0.1"]) == 0
        link = {"first_phase": 1, "last_phase": 4, "ranks": 1, "nodes": 1, "start_samples": 0, "end_samples": 688}
        entry = {"link": link | {"num_updates": 17}, "job_id": None, "state": "NOT SUBMITTED"}
        ledger = {"format": 1, "name": "small", "links": [entry]}
        Path("runs/small/slurm").mkdir()
        Path("runs/small/slurm/ledger.json").write_text(json.dumps(ledger))
        for name in ("runs", "PROBE.json"):
            shutil.move(name, self.folder / "idx" / name)

    def lay_out(self, source: str, folder: Path) -> None:
        """Copy job, data and runs, if any, into a folder."""
        shutil.copytree(self.folder / source, folder, dirs_exist_ok=True)


def idx_header(*shape: int, code: int = 8) -> bytes:
    """Return the header of an IDX file with any shape and type."""
    return struct.pack(f">HBB{len(shape)}i", 0, code, len(shape) & 0xFF, *shape)
