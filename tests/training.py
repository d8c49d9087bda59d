"""Runs of small jobs on small data."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

from hvd_batchgrow.comm.devices import take_device
from hvd_batchgrow.comm.ranks import Ranks
from hvd_batchgrow.config import Job
from hvd_batchgrow.data.datasets.dataset import Datasets
from hvd_batchgrow.schedule.adaptive.decisions import Decision
from hvd_batchgrow.schedule.plan import compile_plan
from hvd_batchgrow.train.checkpoints.checkpoint import Checkpoint, broadcast_checkpoint, newest_good
from hvd_batchgrow.train.events import Decided, Evaluation, Observer, RunEnded, RunStarted, TrainRecord
from hvd_batchgrow.train.liveness.stop import Stop, StopRequest
from hvd_batchgrow.train.parts import TrainingParts
from hvd_batchgrow.train.trainer import Trainer
from hvd_batchgrow.verification.tree_digest import tree_digest
from tests.helpers import small_source


class Recorder(Observer):
    """Keep all events of a run."""

    def __init__(self) -> None:
        self.notes: tuple[str, ...] = ()
        self.records: list[TrainRecord] = []
        self.evaluations: list[Evaluation] = []
        self.decided: list[Decision] = []

    def on_start(self, event: RunStarted) -> None:
        self.notes = event.notes

    def on_record(self, event: TrainRecord) -> None:
        self.records.append(event)

    def on_evaluation(self, event: Evaluation) -> None:
        self.evaluations.append(event)

    def on_decision(self, event: Decided) -> None:
        self.decided.append(event.decision)


def bytes_of(checkpoint: Checkpoint) -> bytes:
    """Return the content of the file of a checkpoint."""
    buffer = BytesIO()
    checkpoint.write_to(buffer)
    return buffer.getvalue()


def weights(run: Path) -> str:
    """Return a digest of the weights in the newest checkpoint of a run."""
    checkpoint, _ = newest_good(run / "checkpoints")
    assert checkpoint is not None
    return tree_digest(checkpoint.model)


class StopAfter:
    """Stands in for signals: this rank, if it is the one, wants to stop after some updates."""

    def __init__(self, updates: int, *, here: bool) -> None:
        self.updates, self.here, self.looks = updates, here, 0

    @property
    def stop_requested(self) -> bool:
        self.looks += 1
        return self.here and self.looks >= self.updates


def make_trainer(job: Job, ranks: Ranks, folder: Path, *observers: Observer, source: Datasets | None = None) -> Trainer:
    """Of a job on `small_source`, or on another, in a folder that is there."""
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    source = source or small_source()
    plan = compile_plan(job, ranks.size, len(source.train))
    device = take_device(ranks, job.layout.device, job.layout.ranks_per_gpu).device
    return Trainer(TrainingParts(job, source, ranks, device), plan, ranks, folder, observers)


def train(
    job: Job,
    ranks: Ranks,
    folder: Path,
    *observers: Observer,
    source: Datasets | None = None,
    checkpoint: Checkpoint | None = None,
    stop: Stop | None = None,
    replay: Path | None = None,
) -> tuple[Trainer, RunEnded]:
    """Train to the end or to a stop; every rank notifies its observers."""
    trainer = make_trainer(job, ranks, folder, *observers, source=source)
    return trainer, trainer.run(stop or StopRequest(), checkpoint, replay=replay)


def newest(ranks: Ranks, folder: Path) -> Checkpoint | None:
    """On all ranks, the newest good checkpoint of rank 0's folder."""
    return broadcast_checkpoint(ranks, ranks.run_on_rank0(lambda: newest_good(folder / "checkpoints")[0]))


def digest(trainer: Trainer) -> str:
    """Of all that an update changes."""
    return tree_digest({"model": trainer.parts.model.state_dict(), "optimizer": trainer.parts.optimizer.state_dict()})
