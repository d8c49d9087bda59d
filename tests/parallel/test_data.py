"""All layouts read the same stream and the same replacements of bad samples."""

from __future__ import annotations

from pathlib import Path

import pytest

from hvd_batchgrow.comm.ranks import Ranks, SingleRank
from hvd_batchgrow.data.datasets.dataset import BadSample, Datasets
from hvd_batchgrow.observers.metrics import ConsumedFile
from hvd_batchgrow.storage.atomic import write_atomically
from hvd_batchgrow.train.liveness.stop import StopRequest
from hvd_batchgrow.train.run.run_folder import plan_bytes
from hvd_batchgrow.train.trainer import Trainer
from hvd_batchgrow.verification.audit import audit, compare_orders, read_consumed
from hvd_batchgrow.verification.tree_digest import tree_digest
from tests.helpers import encoded_samples, small_job
from tests.training import make_trainer

N = 90


def train(source: Datasets, ranks: Ranks, folder: Path, on_bad_sample: str) -> Trainer:
    """Train on encoded images with a batch that grows from 16 to 80; rank 0 writes the record."""
    job = small_job(
        data={
            "source": "image_folder",
            "num_samples": N,
            "crop_padding": 0,
            "image_size": 12,
            "on_bad_sample": on_bad_sample,
        },
        schedule={"max_batch": 80},
        layout={"exact": True},
    )
    trainer = make_trainer(job, ranks, folder, *([ConsumedFile()] if ranks.rank == 0 else []), source=source)
    write_atomically(folder / "plan.json", plan_bytes(trainer.plan))
    trainer.run(StopRequest())
    return trainer


def make_source(folder: Path) -> Datasets:
    samples = encoded_samples(folder, N)
    return Datasets(samples, samples, 7, (0.5,) * 3, (0.25,) * 3)


def test_replacements_are_the_same_on_any_ranks_and_in_the_record(
    ranks: Ranks, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source = make_source(tmp_path)
    (tmp_path / "6.jpg").unlink()
    (tmp_path / "40.jpg").write_bytes(bytes((tmp_path / "40.jpg").stat().st_size))
    together = train(source, ranks, tmp_path / "together", "replace")
    alone = train(source, SingleRank(), tmp_path / "alone", "replace")
    assert tree_digest(together.parts.model.state_dict()) == tree_digest(alone.parts.model.state_dict())
    assert "sample 6 (" in capfd.readouterr().err
    if ranks.rank == 0:
        runs = [read_consumed(tmp_path / name) for name in ("together", "alone")]
        for run in runs:
            result = audit(run, lambda *_: None)
            assert result.passed
            assert [(e.missing, e.repeated) for e in result.epochs[:2]] == [(2, 2), (2, 2)]
        assert runs[0].replaced == runs[1].replaced
        assert "the same samples in the same order" in compare_orders(*runs)[1]


def test_a_bad_sample_ends_the_run_unless_the_job_replaces_it(tmp_path: Path) -> None:
    source = make_source(tmp_path)
    (tmp_path / "6.jpg").unlink()
    with pytest.raises(BadSample, match=r"sample 6 \(.*6.jpg\): cannot be read: No such file"):
        train(source, SingleRank(), tmp_path / "alone", "error")
