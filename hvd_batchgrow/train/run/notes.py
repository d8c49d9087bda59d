"""What the user should know before training starts: about the records, the data, the network and the ranks."""

from __future__ import annotations

from pathlib import Path

from hvd_batchgrow.data.augment_checks import torch_only_keys
from hvd_batchgrow.data.datasets.dataset import Dataset, Datasets
from hvd_batchgrow.data.datasets.subset import origin
from hvd_batchgrow.data.images.encoded_dataset import EncodedDataset
from hvd_batchgrow.data.pipeline.reader import choose_pipeline
from hvd_batchgrow.data.pipeline.sampler import known_bad
from hvd_batchgrow.messages.wording import counted
from hvd_batchgrow.optim.groups import overlaps
from hvd_batchgrow.schedule.plan import Plan
from hvd_batchgrow.train.checkpoints.checkpoint import Checkpoint
from hvd_batchgrow.train.checkpoints.elastic_state import ElasticState
from hvd_batchgrow.train.parts import TrainingParts
from hvd_batchgrow.train.run.record_gaps import gap_notes

_FASTER = "DALI is faster: pip install 'hvd_batchgrow[dali-cuda130]'"


def notes_on_gaps(folder: Path, plan: Plan, checkpoint: Checkpoint | None, elastic: ElasticState) -> list[str]:
    """Return notes on records that end before the checkpoint.

    Raises:
        RunError: a record cannot be read.
    """
    if checkpoint is None:
        return []
    decided = [decision["new_batch"] for decision in checkpoint.growth.get("decisions", ())]
    largest = max([*decided, *(phase.global_batch for phase in plan.schedule.phases)])
    interval = plan.num_samples / plan.job.logging.logs_per_epoch + largest
    return gap_notes(folder, checkpoint.samples, elastic.last_update, interval)


def notes_on_data(source: Datasets) -> list[str]:
    """Return notes of the source, and notes on samples that were found to be bad when it was opened."""
    notes = list(source.notes)
    sets = ("training", source.train), ("validation", source.validation), ("test", source.test)
    for name, samples in sets:
        if samples is not None and (bad := known_bad(samples)):
            fate = "replaced" if name == "training" else "skipped"
            first = _first_bad(samples, min(bad))
            notes.append(f"{len(bad)} of {len(samples)} {name} samples are bad and will be {fate}: {first}, …")
    return notes


def _first_bad(samples: Dataset, sample_id: int) -> str:
    whole, id_in_whole = origin(samples, sample_id)
    fault = f" {whole.fault(id_in_whole)}" if isinstance(whole, EncodedDataset) else ""
    return samples.locate(sample_id) + fault


def notes_on_network(parts: TrainingParts) -> list[str]:
    """Return notes on initial weights, dependence on the layout, overlapping patterns, and slow decoding."""
    job, train = parts.job, parts.source.train
    notes = parts.weight_notes + [
        f"results of {job.model.name} depend on the layout: {hazard}" for hazard in parts.hazards
    ]
    notes += parts.task_notes
    notes += parts.forward_state.notes(job.model.name, exact=job.layout.exact)
    notes += overlaps(parts.model, job.optim)
    if train.kind == "encoded" and job.data.pipeline == "auto" and choose_pipeline(job.data, train) == "torch":
        keys = torch_only_keys(job.data)
        reason = f", because DALI does not have {' and '.join(keys)}" if keys else f"; {_FASTER}"
        notes.append(f"images are decoded by Pillow{reason}")
    return notes


def notes_on_ranks(plan: Plan, num_ranks: int) -> list[str]:
    """Return a note if some ranks are idle in every phase."""
    never = num_ranks - plan.peak_ranks
    return [f"{never} of {counted(num_ranks, 'rank')} {'is' if never == 1 else 'are'} never used"] if never > 0 else []
