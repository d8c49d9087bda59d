"""A run is neither resumed nor evaluated on training data that have changed since its start."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w

from hvd_batchgrow.cli import main
from hvd_batchgrow.data.changed_data import data_changes
from hvd_batchgrow.data.data_record import fingerprint
from hvd_batchgrow.data.datasets.dataset import ArrayDataset, Datasets
from hvd_batchgrow.data.held_out import with_validation
from hvd_batchgrow.data.tokens.token_windows import TokenWindows
from tests.helpers import job_tree
from tests.pictures import FOLDER, pictures

ROWS = np.random.default_rng(1).normal(size=(160, 4)).astype(np.float32)
LABELS = np.arange(160) % 3


def save(rows: Any, labels: Any) -> None:
    np.save("train_rows.npy", rows)
    np.save("train_labels.npy", labels)


@pytest.fixture
def job(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    save(ROWS, LABELS)
    np.save("test_rows.npy", ROWS[:40])
    np.save("test_labels.npy", LABELS[:40])
    data = {"source": "numpy", "root": ".", "num_samples": 160, "crop_padding": 0, "hflip": False}
    tree = {**job_tree(".", data=data), "model": {"name": "dense7", "channels": [8] * 6, "ghost_batch": 8}}
    Path("small.toml").write_text(tomli_w.dumps(tree))
    return "small.toml"


def test_a_resume_on_changed_values_or_labels_is_refused(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", job, "--max-updates", "5"]) == 75
    model = Path("runs/small/model.json").read_bytes()
    resume = ["train", job, "--resume", "auto", "--max-updates", "1"]
    scaled = ROWS * np.array([100, 1, 1, 1], np.float32)
    save(scaled, LABELS)
    capsys.readouterr()
    assert main(resume) == 1
    mean = ROWS[:, 0].mean(dtype=np.float64)
    error = capsys.readouterr().err
    assert f"runs/small was trained on other data:\n  mean[0]: {mean:.6g}, now {100 * mean:.6g}\n  std[0]: " in error
    assert "mean[1]" not in error
    save(ROWS, (LABELS + 1) % 3)  # the same numbers of each class, nearly
    assert main(resume) == 1
    assert "was trained on other data:\n  the targets (SHA-256): " in capsys.readouterr().err
    assert main(["evaluate", "runs/small"]) == 1
    assert "the data has changed since runs/small was trained on it: the targets" in capsys.readouterr().err
    assert Path("runs/small/model.json").read_bytes() == model
    assert main(["train", job, "--fork", "other", "--max-updates", "1"]) == 75
    words = " ".join(capsys.readouterr().err.split())
    assert "the training data differ from those of runs/small: the targets (SHA-256): " in words
    save(ROWS, LABELS)
    assert main(resume) == 75
    assert json.loads(Path("runs/small/model.json").read_text())["normalization"]["mean"][0] == pytest.approx(mean)


def test_a_resume_and_evaluate_report_a_changed_test_set(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The defect: half of a run's evaluations were those of another test set, without a word."""
    assert main(["train", job, "--max-updates", "5"]) == 75
    resume = ["train", job, "--resume", "auto", "--max-updates", "1"]
    assert main(resume) == 75
    assert main(["evaluate", "runs/small"]) == 0
    assert "differ from the last attempt" not in " ".join(capsys.readouterr().err.split())
    np.save("test_rows.npy", ROWS[:40] + np.float32(1))
    for command in (["evaluate", "runs/small"], resume):
        assert main(command) in {0, 75}
        words = " ".join(capsys.readouterr().err.split())
        assert "these differ from the last attempt of runs/small: the test samples" in words
    assert main(resume) == 75
    assert "differ from the last attempt" not in " ".join(capsys.readouterr().err.split())


def source_of(targets: Any, **keys: Any) -> Datasets:
    samples = ArrayDataset(ROWS, targets)
    return replace(Datasets(samples, samples, 3, (0.0,) * 4, (1.0,) * 4), **keys)


def changes(first: Datasets, second: Datasets) -> list[str]:
    return [what for what, _, _ in data_changes(fingerprint(first), fingerprint(second))]


def test_the_fingerprint_covers_targets_of_each_kind() -> None:
    assert changes(source_of(LABELS), source_of(LABELS.copy())) == []
    assert changes(source_of(LABELS), source_of(LABELS[::-1])) == ["the targets (SHA-256)"]
    numbers = ROWS[:, :2]
    assert changes(source_of(numbers), source_of(numbers * np.float32(1 + 1e-6))) == []  # rounding
    assert changes(source_of(numbers), source_of(numbers + np.array([0, 1], np.float32))) == ["target_mean[1]"]
    held_out = [with_validation(source_of(labels), 0.1, 3) for labels in (LABELS, LABELS[::-1])]
    assert changes(*held_out) == ["the targets (SHA-256)"]
    texts = [TokenWindows(np.arange(100) % m, 8) for m in (7, 9)]
    assert changes(*(source_of(LABELS, train=text, mean=(), std=()) for text in texts)) == ["the targets (SHA-256)"]


def test_photos_of_the_same_names_and_classes_that_differ_are_noticed(tmp_path: Path, cache: Path) -> None:
    first, again, other = (
        FOLDER.read(FOLDER.make(tmp_path / name, images))
        for name, images in (("a", pictures(4)), ("b", pictures(4)), ("c", pictures(4, first=4)))
    )
    assert changes(first, again) == []
    assert "the image files (SHA-256)" in changes(first, other)
