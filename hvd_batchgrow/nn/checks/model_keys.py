"""Check `[model]` without building the network: keys that it would not use, and samples of a shape it cannot accept."""

from __future__ import annotations

from collections.abc import Sequence

from hvd_batchgrow.config import Job, ModelSection
from hvd_batchgrow.config.model_specs import NORM_KEYS, ModelSpec, all_models, read_name
from hvd_batchgrow.config.source_specs import SOURCES
from hvd_batchgrow.config.task_specs import TASKS
from hvd_batchgrow.messages.errors import Fault

_CLASSES = frozenset({"class", "labels"})
"""`TaskSpec.answer` of the tasks that a Hadamard classifier is for."""


def check_network(model: ModelSection) -> list[Fault]:
    """Return the faults of `[model]` that can be found without building the network.

    A key that the network would ignore is a fault, unless it has its default value. Every network uses `ghost_batch`,
    because the stream is cut into ghost batches. Any network can be frozen or start from pretrained weights.
    """
    try:
        spec, _ = read_name(model.name)
    except ValueError as error:
        return [Fault("model.name", f"{error}, got {model.name!r}")]
    given = {key for key, field in type(model).model_fields.items() if getattr(model, key) != field.default}
    unused = sorted(given - _used(spec))
    faults = [Fault(f"model.{key}", f"is not used by {model.name!r}, but by {_users(key)}") for key in unused]
    if model.allow_new_head and model.pretrained is None:
        faults.append(Fault("model.allow_new_head", "is not used without model.pretrained"))
    if model.ghost_batch == 1:
        if spec.build is not None and spec.keys >= NORM_KEYS:
            faults.append(Fault("model.ghost_batch", single_sample_fault(model.name)))
        why = "has no effect with model.ghost_batch = 1, which allows no batch norm; remove it"
        faults += [Fault(f"model.{key}", why) for key in ("bn_momentum", "precise_bn_samples") if key in given]
    return [*faults, *spec.faults(model)]


def single_sample_fault(network: str) -> str:
    """Return why a network with batch norm cannot have ghost batches of one sample."""
    return f"1: {network} has batch norm, and one sample has no batch statistics; use >= 2, 32 is usual"


def _users(key: str) -> str:
    return ", ".join(str(spec) for spec in all_models() if key in _used(spec))


def _used(spec: ModelSpec) -> set[str]:
    """Return the keys that the network is built from or that configure its normalization layers."""
    return {
        "name",
        "ghost_batch",
        "pretrained",
        "allow_new_head",
        "freeze",
        *spec.keys,
        *({"classifier"} if spec.build is not None else ()),
        *({"precise_bn_samples"} if spec.keys >= NORM_KEYS else ()),
    }


def check_reads(job: Job) -> list[Fault]:
    """Return a fault if the samples of a source are always tokens, and a network of this package cannot read them."""
    source = SOURCES.get(job.data.source)
    if source is None or source.kinds != ("tokens",) or read_name(job.model.name)[0].build is None:
        return []
    fault = f"{job.model.name!r} accepts images or rows, but {job.data.source!r} has windows of tokens"
    return [Fault("model.name", f"{fault}; use your own network, module:name")]


def check_classifier(job: Job) -> list[Fault]:
    """Return a fault if a Hadamard classifier, whose input has length 1, would have to predict numbers."""
    task = TASKS.get(job.task.name)
    if job.model.classifier == "linear" or task is None or task.answer != "values":
        return []
    tasks = ", ".join(repr(name) for name in TASKS.names() if (spec := TASKS.get(name)) and spec.answer in _CLASSES)
    fault = f"{job.model.classifier!r} is for classes or labels, and task.name = {task.name!r} has numbers"
    return [Fault("model.classifier", f"{fault}; use 'linear', or one of the tasks {tasks}")]


def check_shape(model: ModelSection, shape: Sequence[int]) -> list[Fault]:
    """Return why a network cannot accept samples of a shape: (H, W, C) or (features,)."""
    spec, _ = read_name(model.name)
    kind = "images" if len(shape) == 3 else "rows"
    if spec.accepts not in {kind, "both"}:
        others = [str(other) for other in all_models() if other.accepts == kind]
        texts = {"images": "images (H, W, C)", "rows": "rows (features,)"}
        fault = f"{model.name!r} takes {texts[spec.accepts]}, the samples are {kind} {tuple(shape)}"
        return [Fault("model.name", f"{fault}; {kind} are for {', '.join(others)}")]
    if kind == "images" and min(shape[:2]) < spec.least_pixels:
        pixels = f"{spec.least_pixels} × {spec.least_pixels}"
        return [Fault("model.name", f"{model.name!r} needs images of at least {pixels}, these are {tuple(shape)}")]
    return []
