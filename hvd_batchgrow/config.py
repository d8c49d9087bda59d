"""The job file: one frozen model per section, read from TOML, every fault reported with its path."""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from hvd_batchgrow.errors import Fault, JobError

PositiveInt = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
EpochList = Annotated[
    tuple[PositiveFloat, ...],
    # TOML has lists only; strict mode would refuse to take one for a tuple.
    BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value),
]


def _check_max_batch(value: Any) -> Any:
    whole = isinstance(value, int) and not isinstance(value, bool) and value > 0
    if value is None or whole or (isinstance(value, str) and re.fullmatch(r"N/[1-9][0-9]*", value)):
        return value
    raise ValueError('must be a number of samples > 0, or a share of the training set such as "N/10"')


class Section(BaseModel):
    """What all sections share: frozen, no unknown key, no silent conversion, no NaN."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class DataSection(Section):
    """`[data]`: which samples, and how a training sample is drawn from its image."""

    source: Literal["fashion_mnist", "idx"]
    root: str | None = None
    """Folder of the files; None: where the source is known to live (fashion_mnist only)."""
    num_samples: PositiveInt | None = None
    """Training-set size, so that `plan` needs no data; None: known of the source."""
    pipeline: Literal["auto", "dali", "torch"] = "auto"
    """Who makes the pixels. All give the same ones; auto takes DALI where it is installed."""
    pad_pixels: Annotated[int, Field(ge=0, le=64)] = 0
    """Zeros put around an image before a crop of its own size is drawn; 0: no crop."""
    flip: bool = False
    """Mirror left to right with probability 1/2."""


class ModelSection(Section):
    """`[model]`: the network and its ghost batch."""

    name: Literal["small_conv_net"]
    channels: Annotated[
        tuple[PositiveInt, ...],
        BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value),
    ] = (16, 32, 32, 64, 64)
    """Output channels of the 3x3 convolutions, in order."""
    ghost_batch: Annotated[int, Field(ge=2)]
    """Samples over which batch statistics are taken (γ); also the unit that the stream is cut into."""
    ghost_momentum: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Weight of one ghost batch in the running statistics."""


class OptimSection(Section):
    """`[optim]`: the update rule, and the values the schedule starts from."""

    name: Literal["sgd"] = "sgd"
    lr: PositiveFloat
    momentum: Fraction = 0.9
    nesterov: bool = False
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decay of weights; normalisation parameters and biases have none."""


class ScheduleSection(Section):
    """`[schedule]`: when the noise scale falls, and what makes it fall."""

    policy: Literal["grow", "decay"]
    epochs: PositiveFloat
    boundaries_epochs: EpochList = ()
    """Epochs at which the noise scale is divided by `factor`."""
    factor: Annotated[float, Field(gt=1)] = 5.0
    global_batch: PositiveInt
    """Samples per update at the start, over all ranks and passes."""
    max_batch: Annotated[int | str | None, BeforeValidator(_check_max_batch)] = None
    """Where growth stops and the learning rate decays instead: samples, or "N/10"; None: no limit."""


class LayoutSection(Section):
    """`[layout]`: how a global batch is cut over ranks and passes. Decides the speed, never the result."""

    max_micro_batch: PositiveInt = 128
    """Most samples of one forward and backward on one rank."""
    ragged: bool = False
    """Allow ranks to hold unequal numbers of ghost batches."""
    threads_per_rank: PositiveInt | None = None
    """Torch threads of a rank; None: the cores of the host divided by its ranks."""


class EvaluationSection(Section):
    """`[evaluation]`: the whole test set, once, over all ranks."""

    every_epochs: PositiveFloat = 1.0
    batch: PositiveInt = 500
    """Samples of one forward pass."""


class CheckpointSection(Section):
    """`[checkpoint]`: also written at every phase boundary, at a stop and at the end."""

    every_epochs: PositiveFloat = 1.0
    keep: PositiveInt = 3


class WatchSection(Section):
    """`[watch]`: what is recorded of a run."""

    records_per_epoch: PositiveInt = 20
    """Training metrics are averaged over stretches of N / records_per_epoch samples."""
    tensorboard: bool = True


class Job(Section):
    """A whole job file."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    data: DataSection
    model: ModelSection
    optim: OptimSection
    schedule: ScheduleSection
    layout: LayoutSection = LayoutSection()
    evaluation: EvaluationSection = EvaluationSection()
    checkpoint: CheckpointSection = CheckpointSection()
    watch: WatchSection = WatchSection()

    def deciding(self) -> dict[str, Any]:
        """The keys that decide the weights a run ends with; all others may change at a resume.

        Returns:
            dotted key to plain value.
        """
        tree = self.model_dump(mode="json")
        flat = {
            f"{section}.{key}": value
            for section in ("data", "model", "optim", "schedule")
            for key, value in tree[section].items()
        }
        free = {"data.root", "data.num_samples", "data.pipeline"}
        return {"seed": self.seed} | {key: value for key, value in flat.items() if key not in free}


def load_job(path: Path, overrides: Mapping[str, Any] | None = None) -> Job:
    """Read a job file.

    Args:
        path: a TOML file.
        overrides: dotted key to value, put over what the file says.

    Raises:
        JobError: the file is missing, is no TOML, or has faults; all of them are in the message.
    """
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise JobError([Fault("", _cannot_read(path, error))], str(path)) from None
    except tomllib.TOMLDecodeError as error:
        raise JobError([Fault("", f"is not valid TOML: {error}")], str(path)) from None
    for key, value in (overrides or {}).items():
        _put(tree, key, value, str(path))
    return parse_job(tree, str(path))


def parse_job(tree: Mapping[str, Any], source: str = "job") -> Job:
    """Check a tree of plain values and freeze it; raises JobError with all faults."""
    try:
        return Job.model_validate(tree)
    except ValidationError as error:
        raise JobError([_fault(detail) for detail in error.errors()], source) from None


def split_overrides(arguments: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """Take `--optim.lr 0.2` and `--optim.lr=0.2` out of a command line: options with a dot in their name.

    Returns:
        the other words; dotted key to value, read as TOML, else as text.

    Raises:
        JobError: a key has no value.
    """
    others: list[str] = []
    overrides: dict[str, Any] = {}
    words = iter(arguments)
    for word in words:
        key, equals, text = word.partition("=")
        if not key.startswith("--") or "." not in key:
            others.append(word)
            continue
        value = text if equals else next(words, None)
        if value is None:
            raise JobError([Fault(key[2:], "has no value on the command line")], "command line")
        overrides[key[2:].replace("-", "_")] = _toml_value(value)
    return others, overrides


def _toml_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (tomllib.TOMLDecodeError, KeyError):
        return text


def _put(tree: dict[str, Any], key: str, value: Any, source: str) -> None:
    *sections, name = key.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise JobError([Fault(key, f"{section} is a value, not a section")], source)
    tree[name] = value


def _cannot_read(path: Path, error: Exception) -> str:
    near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.toml")], n=1, cutoff=0.5)
    hint = f"; did you mean {path.parent / near[0]}?" if near else ""
    return f"cannot be read: {getattr(error, 'strerror', None) or error}{hint}"


def _fault(detail: Mapping[str, Any]) -> Fault:
    place = detail["loc"]
    path = ".".join(map(str, place))
    if detail["type"] == "extra_forbidden":
        return Fault(path, f"unknown key{_suggestion(place)}")
    if detail["type"] == "missing":
        return Fault(path, "is required")
    message = str(detail["msg"]).removeprefix("Value error, ")
    return Fault(path, f"{message[0].lower()}{message[1:]}, got {detail['input']!r}")


def _suggestion(place: Sequence[Any]) -> str:
    known = _keys_beside(place[:-1])
    near = difflib.get_close_matches(str(place[-1]), known, n=1, cutoff=0.5)
    if near:
        return f"; did you mean {'.'.join([*map(str, place[:-1]), near[0]])}?"
    return f"; known here: {', '.join(known)}"


def _keys_beside(sections: Sequence[Any]) -> list[str]:
    model: type[BaseModel] = Job
    for section in sections:
        annotation = model.model_fields[str(section)].annotation
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        model = annotation
    return list(model.model_fields)
