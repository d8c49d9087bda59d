"""`model.json`: what users of a run's weights need besides them, such as class names and preprocessing."""

from __future__ import annotations

import platform
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, PositiveInt, ValidationError

from hvd_batchgrow.config import Job
from hvd_batchgrow.config.source_specs import Kind
from hvd_batchgrow.config.task_specs import TASKS, Answer, Direction, TargetKind
from hvd_batchgrow.data.datasets.dataset import Datasets
from hvd_batchgrow.data.pipeline.crops import CenterCrop
from hvd_batchgrow.data.pipeline.reader import testing_augment
from hvd_batchgrow.messages.errors import Fault, JobError, RunError, first_fault, unreadable
from hvd_batchgrow.messages.suggest import near_run
from hvd_batchgrow.storage.regular_files import read_regular
from hvd_batchgrow.tasks.load_task import load_own_task, target_of
from hvd_batchgrow.train.run.versions import installed_versions

FILE = "model.json"


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Inputs(_Part):
    """The network's inputs."""

    kind: Kind
    """Samples before preprocessing: `images` of one size, `rows` of numbers, `encoded` images of any size, `samples`
    that a torch Dataset of the job preprocesses itself, or `tokens`."""
    shape: tuple[PositiveInt, ...]
    """Of one sample as the network receives it: (channels, height, width), (features,) or (tokens,). `samples`: of the
    tensor; () if the network receives several tensors."""
    channels: str | None
    """Order of the channels: "RGB" or "gray"; None without images, and for other numbers of channels."""
    dtype: Literal["float32", "float16"] | None
    """Of the normalized values, which the network receives in the type of its weights. None: `samples` have any,
    `tokens` are int64."""


class Normalization(_Part):
    """(value / divisor - mean) / std, per channel or feature."""

    divisor: float
    """255 for images, whose pixels are 0 … 255; otherwise 1."""
    mean: tuple[float, ...]
    std: tuple[float, ...]


class Preprocessing(_Part):
    """How the testing pipeline makes an input of an encoded image, in this order."""

    apply_orientation: bool
    """Whether the image is rotated by its EXIF orientation; otherwise its pixels are used as stored."""
    resize: PositiveInt
    """Length of the shorter side after resizing. The longer one is ⌊resize · longer / shorter⌋ pixels."""
    interpolation: Literal["bilinear"] = "bilinear"
    antialias: Literal[True] = True
    """The filter widens when an image shrinks, and its result is rounded to 8 bits, as torchvision does for tensors."""
    center_crop: tuple[PositiveInt, PositiveInt]
    """Height and width."""


class Column(_Part):
    """A column of a table from which features are made."""

    name: str
    kind: Literal["number", "category"]
    categories: tuple[str, ...] = ()
    """Those of the training rows, in the order of their numbers."""
    fill: float | None = None
    """Replaces a missing number; None: a missing number is an error."""


class TableColumns(_Part):
    """How the features of a row are made of the columns of a table, in this order."""

    columns: tuple[Column, ...]
    categorical_encoding: Literal["one_hot", "codes"]
    missing: str
    """`data.missing` of the job."""
    unknown_category: Literal["error", "ignore"]
    first_label: int
    """Label of class 0 in a label column of numbers."""
    label_columns: tuple[str, ...] = ()
    """Their names; empty: not recorded."""


class LearnedTask(_Part):
    """What the network has learned."""

    name: str
    """`task.name` of the job."""
    target: TargetKind | None
    """Targets of a sample: `class`, `values` or `tokens`; None: those of a custom task."""
    answer: Answer | None
    """What the outputs mean: their softmax is the probability of each `class`, their sigmoid that of each label
    (`labels`), or they are the predicted numbers (`values`). None: another meaning."""
    mean: tuple[float, ...] | None = None
    """The predicted numbers are output · std + mean; None: the outputs themselves."""
    std: tuple[float, ...] | None = None
    metrics: dict[str, Direction]
    """Whether each metric besides the loss improves when it rises ("up") or falls ("down"), the main result first."""


class ModelDescription(_Part):
    """The content of `model.json`."""

    format: Literal[1] = 1
    task: LearnedTask
    num_outputs: PositiveInt
    """Number of classes, labels, numbers or tokens."""
    classes: tuple[str, ...]
    """Name of each class, label or number, in the order of the network's outputs; empty for tokens."""
    inputs: Inputs
    normalization: Normalization
    preprocessing: Preprocessing | None
    """None for images of one size, which are only normalized, and for rows."""
    table: TableColumns | None
    """None unless the samples are rows of a table with columns."""
    job: dict[str, Any]
    """The job, as in `job.toml`."""
    versions: dict[str, str]


def describe_model(job: Job, source: Datasets) -> ModelDescription:
    """Return the description of the network that a job trains.

    Raises:
        JobError: the schema of a custom source has invalid class names, or a custom task has an invalid `answer`.
    """
    samples, data = source.test, job.data
    augment = testing_augment(data, samples)
    is_image = augment is not None
    size = augment.out_size if augment is not None else ()
    num_channels = samples.shape[-1] if samples.shape else 0
    cropped = None
    if samples.kind == "encoded":
        assert isinstance(augment, CenterCrop)
        cropped = Preprocessing(
            apply_orientation=data.apply_orientation, resize=augment.eval_resize, center_crop=augment.out_size
        )
    task, keeps_inputs = _learned_task(job, source), samples.kind in {"samples", "tokens"}
    return ModelDescription(
        task=task,
        num_outputs=source.num_classes,
        classes=() if task.target == "tokens" else class_names(source),
        inputs=Inputs(
            kind=samples.kind,
            shape=samples.shape if keeps_inputs else (num_channels, *size),
            channels={1: "gray", 3: "RGB"}.get(num_channels) if is_image else None,
            dtype=None if keeps_inputs else data.dtype,
        ),
        normalization=Normalization(divisor=255 if is_image else 1, mean=source.mean, std=source.std),
        preprocessing=cropped,
        table=_table(job, source),
        job=job.model_dump(mode="json", exclude_none=True),
        versions={"python": platform.python_version(), **installed_versions()},
    )


def _learned_task(job: Job, source: Datasets) -> LearnedTask:
    spec = TASKS.get(job.task.name)
    task = spec or load_own_task(job.task)
    answer = getattr(task, "answer", None)
    if answer not in {None, *get_args(Answer)}:
        fault = f"{job.task.name}: answer must be one of {', '.join(map(repr, get_args(Answer)))}, is {answer!r}"
        raise JobError([Fault("task.name", fault)])
    scale = {}
    if job.task.standardize:
        scale = {"mean": tuple(source.schema["target_mean"]), "std": tuple(source.schema["target_std"])}
    metrics = dict(task.metrics)
    return LearnedTask(name=job.task.name, target=target_of(job.task), answer=answer, metrics=metrics, **scale)


def class_names(source: Datasets) -> tuple[str, ...]:
    """Return the names in the source's schema; classes without a name are named by their labels.

    Raises:
        JobError: the schema of a custom source has invalid class names.
    """
    names, first = source.schema.get("classes") or (), source.schema.get("first_label", 0)
    is_list = isinstance(names, Sequence) and not isinstance(names, str)
    if not is_list or len(names) > source.num_classes or not all(isinstance(name, str) for name in names):
        fault = f'schema["classes"] must be a list of at most {source.num_classes} texts, the names of the classes'
        raise JobError([Fault("data.source", fault)])
    # A folder's name need not be valid UTF-8.
    names = [name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace") for name in names]
    return (*names, *(str(k + first) for k in range(len(names), source.num_classes)))


def _table(job: Job, source: Datasets) -> TableColumns | None:
    if "columns" not in source.schema or source.test.kind != "rows":
        return None
    return TableColumns(
        columns=tuple(Column(**column) for column in source.schema["columns"]),
        categorical_encoding=job.data.categorical_encoding,
        missing=job.data.missing,
        unknown_category=job.data.unknown_category,
        first_label=source.schema["first_label"],
        label_columns=source.schema.get("label_columns") or (),
    )


def read_description(run: Path) -> ModelDescription:
    """Return the description in a run folder.

    Raises:
        RunError: it is missing, cannot be read, or is damaged.
    """
    path = run / FILE
    try:
        return ModelDescription.model_validate_json(read_regular(path))
    except ValidationError as error:
        raise RunError(f"{path} is damaged, or of another version: {first_fault(error)}") from None
    except (FileNotFoundError, NotADirectoryError):
        if not (run / "job.toml").exists():
            raise RunError(f"{run} does not hold a run{near_run(run)}") from None
        words = ["hvd-batchgrow", "train", str(run / "job.toml"), "--resume", "auto", "--runs-dir", str(run.parent)]
        remedy = f"resume the run once, which writes it: {shlex.join(words)}"
        raise RunError(f"{path} is missing; {remedy}") from None
    except OSError as error:
        raise unreadable(path, error) from None
