"""PROBE.json: measured times of a model, its data and a kind of machine."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, ValidationError

from hvd_batchgrow.config import DataSection, Job, ModelSection
from hvd_batchgrow.config.types import PositiveFloat, Section
from hvd_batchgrow.messages.errors import Fault, JobError, RunError, first_fault, reason_of
from hvd_batchgrow.storage.atomic import is_stream, write_file
from hvd_batchgrow.storage.regular_files import read_regular

Count = Annotated[int, Field(gt=0, lt=1 << 53)]
"""The limit is the largest range of exact integers in floating point."""
_SUBJECT = (
    "data.source",
    "data.pipeline",
    "data.workers",
    "data.shape",
    "data.num_classes",
    "data.context",
    "data.crop_padding",
    "data.hflip",
    "data.image_size",
    "data.crop_scale",
    "data.crop_ratio",
    "data.auto_augment",
    "data.randaugment_num_ops",
    "data.color_jitter",
    "data.random_erasing",
    "data.mixup_alpha",
    "data.cutmix_alpha",
    "data.channels_last",
    "data.dtype",
    "model.name",
    "model.kwargs",
    "model.channels",
    "model.ghost_batch",
    "model.dropout",
    "model.shakedrop",
    "model.classifier",
    "model.freeze",
    "optim.name",
    "update.precision",
    "update.allreduce_dtype",
    "layout.exact",
    "layout.compile",
    "layout.threads_per_rank",
)


class TimedSum(Section):
    """An all-reduce on otherwise idle ranks."""

    num_bytes: Count
    seconds: PositiveFloat


class TimedUpdate(Section):
    """Whole updates of one layout, as in training."""

    micro_batch: Count
    """m: samples of a micro-batch on each rank."""
    accumulation: Count
    """s: micro-batches of an update on each rank."""
    seconds: PositiveFloat
    """Time of one update."""
    data_wait_s: float
    """Part of it spent waiting for samples."""


class RankProbe(Section):
    """Measurements with one number of ranks."""

    ranks: Count
    ranks_per_host: Count
    threads_per_rank: Count
    host: str
    """Host of rank 0."""
    device: str
    backend: str
    measured_at: str
    micro_batch_limit: Count
    """Limit of the probed job. If it allows only one size, larger micro-batches were measured to fit the model."""
    sums: tuple[TimedSum, ...]
    """Empty for one rank."""
    updates: tuple[TimedUpdate, ...]


class Probe(Section):
    """The content of PROBE.json: measurements by number of ranks."""

    format: Literal[1] = 1
    job: str
    """Name of the probed job; other jobs with the same `subject` may use the measurements."""
    subject: dict[str, Any]
    """`subject_of` the job, with the pipeline that `auto` had chosen."""
    image_shape: tuple[NonNegativeInt, ...]
    """(H, W, C); H and W are 0 if they differ from image to image."""
    gradient_bytes: Count
    """Bytes that an update all-reduces."""
    measured: tuple[RankProbe, ...]
    """In rising order of ranks."""


def subject_of(job: Job) -> dict[str, Any]:
    """Return the keys of a job that affect the cost of an update; all others may change without a new probe.

    Learning rate, schedule, batch, layout and seed are not among them: the model predicts their cost.

    Returns:
        dotted key to plain JSON value.
    """
    tree = job.model_dump(mode="json")
    return {key: tree[section][name] for key in _SUBJECT for section, name in [key.split(".")]}


# --- the file -----------------------------------------------------------------------------------


def load_probe(path: Path) -> Probe:
    """Read a PROBE.json.

    Raises:
        RunError: it is missing, damaged, or not a probe; the message says where.
    """
    again = f"measure (again): hvd-batchgrow probe JOB --out {shlex.quote(str(path))}"
    try:
        probe = Probe.model_validate_json(read_regular(path))
    except OSError as error:
        raise RunError(f"{path} cannot be read: {reason_of(error)}; {again}") from None
    except ValidationError as error:
        raise RunError(f"{path} is damaged, or not a probe: {first_fault(error, 'whole file')}; {again}") from None
    if fault := _incomplete(probe):
        raise RunError(f"{path} is damaged: {fault}; {again}")
    return probe


def _incomplete(probe: Probe) -> str | None:
    counts = [rank_probe.ranks for rank_probe in probe.measured]
    if not counts or counts != sorted(set(counts)):
        return f"measured: rank counts must rise without repeats, got {counts}"
    for k, part in enumerate(probe.measured):
        if not part.updates:
            return f"measured.{k}.updates: empty"
        if part.ranks > 1 and not part.sums:
            return f"measured.{k}.sums: empty, for {part.ranks} ranks"
    return None


def check_out(path: Path) -> None:
    """Check, before a measurement, that `save_probe` can write there. Raises RunError."""
    if path.is_dir():
        raise RunError(f"--out {path} is a folder; nearest: {path / 'PROBE.json'}")
    folder = Path(os.path.realpath(path)).parent
    if not is_stream(path) and not os.access(folder, os.W_OK):
        state = "cannot be written" if folder.is_dir() else "does not exist"
        raise RunError(f"--out {path}: the folder {folder} {state}")


def save_probe(path: Path, probe: Probe) -> None:
    """Write a PROBE.json atomically.

    Raises:
        RunError: it cannot be written.
    """
    write_file(path, f"{probe.model_dump_json(indent=1)}\n".encode())


def merge_probes(old: Probe | None, new: Probe) -> Probe:
    """Return both probes by number of ranks; the new one wins if both have a number.

    Raises:
        RunError: they differ in the subject or the kind of device.
    """
    if old is None:
        return new
    was_subject, now_subject = _completed(old.subject), _completed(new.subject)
    pairs = {
        **{key: (was_subject.get(key), now_subject.get(key)) for key in sorted(was_subject | now_subject)},
        "image shape": (old.image_shape, new.image_shape),
        "gradient bytes": (old.gradient_bytes, new.gradient_bytes),
        "device": (old.measured[0].device, new.measured[0].device),
    }
    differing = [f"{key}: was {was!r}, is {now!r}" for key, (was, now) in pairs.items() if not _agree(key, was, now)]
    if differing:
        text = "\n  ".join(differing)
        raise RunError(f"this probe and that of {old.job!r} cannot share one file:\n  {text}\n  use another --out")
    by_ranks = {part.ranks: part for part in (*old.measured, *new.measured)}
    return new.model_copy(update={"measured": tuple(by_ranks[ranks] for ranks in sorted(by_ranks))})


def _agree(key: str, was: object, now: object) -> bool:
    """Return whether two values of a key agree; a job need not state the number of classes."""
    return was == now or (key == "data.num_classes" and None in (was, now))


def _completed(subject: dict[str, Any]) -> dict[str, Any]:
    """Add the defaults of the keys that did not exist yet when a probe was measured."""
    defaults = {
        f"{section}.{key}": field.default
        for section, model in (("data", DataSection), ("model", ModelSection))
        for key, field in model.model_fields.items()
        if not field.is_required()
    }
    return {key: defaults[key] for key in _SUBJECT if key in defaults} | subject


def check_probe(job: Job, probe: Probe) -> None:
    """Raise JobError if a probe does not match a job, with every key that differs."""
    own = subject_of(job)
    measured = _completed(probe.subject)
    differing = [key for key, value in own.items() if not _agree(key, measured.get(key), value)]
    if own["data.pipeline"] == "auto":
        differing = [key for key in differing if key != "data.pipeline"]
    remedy = "probe this job into a separate file"
    faults = [
        Fault(key, f"is {own[key]!r}, but the probe was measured with {measured.get(key)!r}; {remedy}")
        for key in differing
    ]
    if faults:
        raise JobError(faults, job.name)
