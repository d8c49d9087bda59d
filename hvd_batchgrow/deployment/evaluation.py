"""Evaluate the weights of a run on its test set, or on other data of the same classes."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from hvd_batchgrow.comm.devices import DeviceKey
from hvd_batchgrow.comm.ranks import SingleRank
from hvd_batchgrow.config import Job
from hvd_batchgrow.config.source_specs import ReportProgress
from hvd_batchgrow.data.changed_data import changed_sets, data_changes
from hvd_batchgrow.data.data_record import data_record
from hvd_batchgrow.data.datasets.dataset import ArrayDataset, Dataset, Datasets
from hvd_batchgrow.data.images.image_folder import load_test
from hvd_batchgrow.data.load_source import load_source
from hvd_batchgrow.data.tables.table_files import find_test_files
from hvd_batchgrow.deployment.table_rows import read_rows
from hvd_batchgrow.deployment.trained_network import inference_device, job_for_inference, read_checkpoint
from hvd_batchgrow.job_file import parse_job
from hvd_batchgrow.messages.errors import Fault, JobError, RunError
from hvd_batchgrow.messages.wording import listed, shown
from hvd_batchgrow.tasks.load_task import target_of
from hvd_batchgrow.train.checkpoints.compatibility import average_notes, check_model_fits
from hvd_batchgrow.train.evaluate import evaluate
from hvd_batchgrow.train.events import Evaluation
from hvd_batchgrow.train.parts import TrainingParts
from hvd_batchgrow.train.run.model_description import FILE, ModelDescription, describe_model, read_description
from hvd_batchgrow.train.run.run_folder import recorded_data
from hvd_batchgrow.train.train_state import TrainState
from hvd_batchgrow.verification.tree_digest import tree_digest

_LOCATING = ("source", "root", "train", "test")
"""Keys of `[data]` that lead to other data."""
_READING = ("token_dtype", "label", "header", "separator", "decimal", "on_bad_sample", "pipeline")
"""Keys of `[data]` that change how data is read. All other keys belong to the network."""
_TEST_ALONE = frozenset({"csv", "parquet", "image_folder"})
"""Sources of which other data needs only a test set."""
_MEANING = ("task", "classes", "inputs", "preprocessing", "table")


@dataclass(frozen=True)
class RunEvaluation:
    """Loss and metrics of a run's weights."""

    run: Path
    found: Evaluation
    """With the sample counter of the checkpoint."""
    num_test: int
    """Number of test samples."""
    digest: str
    """SHA-256 of parameters and buffers, as `hvd-batchgrow digest` prints it."""
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        found = self.found
        return {
            "run": str(self.run),
            "samples": found.samples,
            "weights_sha256": self.digest,
            "num_test": self.num_test,
            **found.named(),
        }


def evaluate_run(
    run: Path, checkpoint: Path | None, device: DeviceKey, overrides: Mapping[str, Any], report: ReportProgress
) -> RunEvaluation:
    """Evaluate the weights of a run by the function that evaluates during training.

    Args:
        run: a run folder.
        checkpoint: one of its checkpoints; None: its newest good one.
        device: auto: a GPU if one is visible.
        overrides: dotted keys of `[data]`. Unless one of them leads to other data, the run's test set is used.
        report: called with the progress of indexing and parsing.

    Raises:
        JobError: an override belongs to the network, or is invalid.
        RunError: the data is missing, damaged or has other classes, or the checkpoint cannot be used.
    """
    description = read_description(run)
    state, notes = read_checkpoint(run, checkpoint)
    job = job_for_inference(_with_data(description, overrides, run), device)
    place = inference_device(job)
    is_other = _leads_to_other_data(overrides)
    source = _other_data(job, description, run, report) if is_other else _own_data(job, description, run, report)
    notes += source.notes
    parts = TrainingParts(job, source, SingleRank(), place, pretrained=False)
    check_model_fits(state, parts.model, run)
    trained = TrainState(parts)
    parts.model.load_state_dict(state.model)
    trained.samples = state.samples
    if trained.average:
        trained.average.load_state_dict(state.average)
        notes += tuple(average_notes(state, parts.model))
    with closing(source):
        found = evaluate(parts, trained, SingleRank())
    return RunEvaluation(run, found, len(source.test), tree_digest(state.model), notes)


def _leads_to_other_data(overrides: Mapping[str, Any]) -> bool:
    return any(f"data.{key}" in overrides for key in _LOCATING)


def _with_data(description: ModelDescription, overrides: Mapping[str, Any], run: Path) -> Job:
    tree = description.job
    allowed = {f"data.{key}" for key in (*_LOCATING, *_READING)}
    if others := [key for key in overrides if key not in allowed]:
        fault = f"belongs to the training of the network; evaluate changes only {', '.join(sorted(allowed))}"
        raise JobError([Fault(key, fault) for key in others], "command line")
    reads_test_alone = overrides.get("data.source", tree["data"]["source"]) in _TEST_ALONE
    if reads_test_alone and "data.train" in overrides:
        fault = "is not read: evaluate reads only the test set of this source; name the other data with data.test"
        raise JobError([Fault("data.train", fault)], "command line")
    changed = {key.partition(".")[2]: value for key, value in overrides.items()}
    data = {**tree["data"], **changed}
    if _leads_to_other_data(overrides) and reads_test_alone:
        data["test_fraction"] = 0.0  # other files are not split
        labels = description.table.label_columns if description.table and data["source"] != "image_folder" else ()
        if labels and "data.label" not in overrides:  # found by name, like the features
            data["label"] = labels if description.task.target == "values" else labels[0]
    return parse_job({**tree, "data": data}, str(run / FILE))


def _own_data(job: Job, description: ModelDescription, run: Path, report: ReportProgress) -> Datasets:
    """Return the run's data, normalized as in training. Raises RunError if it is no longer that of the training."""
    source = load_source(job.data, job.seed, report, target_of(job.task))
    now, normalization = _as_recorded(describe_model(job, source), description), description.normalization
    constants = {"mean": normalization.mean, "std": normalization.std}
    changed = [f"{part} of {run / FILE}" for part in _MEANING if getattr(now, part) != getattr(description, part)]
    before, record = recorded_data(run), data_record(source)
    others, sets = [], []
    with suppress(ValueError, TypeError):  # a damaged record
        others = data_changes({**before, **constants}, record)
        sets = changed_sets(before.get("evaluation_sets", {}), record["evaluation_sets"])
    if changed := [*changed, *(f"{what}: {was}, now {found}" for what, was, found in others)]:
        fault = f"the data has changed since {run} was trained on it: {listed(changed, separator='; ')}"
        raise RunError(f"{fault}\n  evaluate other data with --data.root or --data.test")
    notes = (f"these differ from the last attempt of {run}: {listed(sets)}",) if sets else ()
    return replace(source, mean=normalization.mean, std=normalization.std, notes=notes)


def _as_recorded(now: ModelDescription, description: ModelDescription) -> ModelDescription:
    """Return a description without the names of label columns if the run's was written without them."""
    if now.table is None or description.table is None or description.table.label_columns:
        return now
    return now.model_copy(update={"table": now.table.model_copy(update={"label_columns": ()})})


def _other_data(job: Job, description: ModelDescription, run: Path, report: ReportProgress) -> Datasets:
    """Return other data, preprocessed as the run's. Only its test set is needed, if its format allows that."""
    data, num_classes = job.data, description.num_outputs
    mean, std = description.normalization.mean, description.normalization.std
    test: Dataset
    notes: tuple[str, ...] = ()
    if data.source == "image_folder":
        test = load_test(data, description.classes, report)
    elif data.source in {"csv", "parquet"}:
        test, notes = _table_rows(job, description)
    else:
        section = data.model_copy(update={"num_classes": num_classes, "mean": mean or None, "std": std or None})
        section = section.counted_from(_first_label(run))
        source = load_source(section, job.seed, report, target_of(job.task), any_size=True)
        return _same_meaning(job, replace(source, notes=()), description)  # the notes are for training
    return _same_meaning(job, Datasets(test, test, num_classes, mean, std, notes), description)


def _first_label(run: Path) -> int | None:
    """Return the label of class 0 in the run's data; None: its record does not say."""
    data = recorded_data(run)
    first = data.get("first_label") if isinstance(data, Mapping) else None
    return first if isinstance(first, int) and 0 <= first <= 1 else None


def _table_rows(job: Job, description: ModelDescription) -> tuple[ArrayDataset, tuple[str, ...]]:
    """Return the rows of all test files, and notes on rows that are skipped or have an unknown category."""
    files = find_test_files(job.data)
    rows = [read_rows(path, description, job.data, with_targets=True) for path in files]
    values, targets = np.concatenate([part.values for part in rows]), np.concatenate([part.targets for part in rows])
    place = ", ".join(map(str, files))
    if not len(values):
        raise RunError(f"{place}: no rows to evaluate")
    return ArrayDataset(values, targets, place), tuple(note for part in rows for note in part.notes)


def _same_meaning(job: Job, source: Datasets, description: ModelDescription) -> Datasets:
    """Raise RunError unless the network accepts the samples, and the names of their classes, if any, are the same."""
    if description.task.mean is not None:  # the scale of the training's targets, not of these
        scale = {"target_mean": description.task.mean, "target_std": description.task.std}
        source = replace(source, schema={**source.schema, **scale})
    now = describe_model(job, source)
    pairs = [("inputs", now.inputs, description.inputs)]
    if "classes" in source.schema:
        pairs.append(("classes", now.classes, description.classes))  # type: ignore[arg-type]
    for name, found, wanted in pairs:
        if found != wanted:
            raise RunError(
                f"{job.data.root or job.data.source}: {name} are {shown(found)}; the run has {shown(wanted)}"
            )
    return replace(source, num_classes=description.num_outputs)
