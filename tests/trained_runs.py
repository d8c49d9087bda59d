"""Small finished runs on photos and on a table, whose weights are used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch

from hvd_batchgrow.cli import main
from tests.helpers import job_tree
from tests.pictures import FOLDER, pictures

RUN = Path("runs/small")


def write_job(**sections: Any) -> str:
    tree = job_tree(**sections)
    for key in ("crop_padding", "hflip"):
        tree["data"].pop(key)
    Path("small.toml").write_text(tomli_w.dumps(tree))
    return "small.toml"


@pytest.fixture
def photos(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """A run on photos, and its test photos in the order of their ids."""
    monkeypatch.chdir(tmp_path)
    FOLDER.make(Path("photos"), pictures(12))
    data = {"source": "image_folder", "root": "photos", "num_samples": 12, "image_size": 16}
    schedule = {"epochs": 8.0, "boundaries_epochs": [4.0], "global_batch": 8, "max_batch": 8, "noise_factor": 2.0}
    job = write_job(data=data, schedule=schedule)
    assert main(["train", job, "--update.ema-samples", "40"]) == 0
    return sorted(Path("photos/val").rglob("*.*"))


@pytest.fixture
def rows(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A run on a table with categories and missing numbers."""
    monkeypatch.chdir(tmp_path)
    lines = [f"{k % 7},{('red', 'blue', '')[k % 3]},{'' if k % 5 == 0 else k * 0.1},{'ab'[k % 2]}" for k in range(40)]
    for name in ("train", "test"):
        Path(f"{name}.csv").write_text("\n".join(["x,color,y,kind", *lines, ""]))
    data = {"source": "csv", "root": ".", "num_samples": 40, "categorical": ["color"], "missing": "mean"}
    schedule = {"epochs": 2.0, "boundaries_epochs": [1.0], "max_batch": 32}
    tree = write_job(data=data, schedule=schedule, model={"name": "tests.trained_runs:mlp"})
    text = Path(tree).read_text().replace("channels = [\n    4,\n    8,\n]\n", "")
    Path(tree).write_text(text)
    assert main(["train", tree]) == 0
    return tree


def mlp(num_classes: int) -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, num_classes))
