"""Check `[model]` without building the network: keys that it would not use, and samples of a shape it cannot accept."""

from __future__ import annotations

from collections.abc import Sequence

from hvd_batchgrow.config import ModelSection
from hvd_batchgrow.config.model_names import FAMILIES, NORM_KEYS, ModelFamily, read_name
from hvd_batchgrow.messages.errors import Fault


def check_network(model: ModelSection) -> list[Fault]:
    """Return the faults of `[model]` that can be found without building the network.

    A key that the network would ignore is a fault, unless it has its default value. Every network uses `ghost_batch`,
    because the stream is cut into ghost batches.
    """
    try:
        family = FAMILIES[read_name(model.name).family]
    except ValueError as error:
        return [Fault("model.name", f"{error}, got {model.name!r}")]
    given = {key for key, field in type(model).model_fields.items() if getattr(model, key) != field.default}
    unused = sorted(given - _used(family))
    faults = [Fault(f"model.{key}", f"is not used by {model.name!r}, but by {_users(key)}") for key in unused]
    if model.name == "dense7" and model.channels and len(model.channels) != 6:
        widths = f"{len(model.channels)}: {list(model.channels)}"
        faults.append(Fault("model.channels", f"dense7 has six hidden layers, so six widths, not {widths}"))
    return faults


def _users(key: str) -> str:
    return ", ".join(family.shown for family in FAMILIES.values() if key in _used(family))


def _used(family: ModelFamily) -> set[str]:
    """Return the keys that the network is built from or that configure its normalization layers."""
    return {"name", "ghost_batch", *family.keys, *({"precise_bn_samples"} if family.keys >= NORM_KEYS else ())}


def check_shape(model: ModelSection, shape: Sequence[int]) -> list[Fault]:
    """Return why a network cannot accept samples of a shape: (H, W, C) or (features,)."""
    family = FAMILIES[read_name(model.name).family]
    kind = "images" if len(shape) == 3 else "rows"
    if family.accepts not in {kind, "both"}:
        others = [other.shown for other in FAMILIES.values() if other.accepts == kind]
        texts = {"images": "images (H, W, C)", "rows": "rows (features,)"}
        fault = f"{model.name!r} takes {texts[family.accepts]}, the samples are {kind} {tuple(shape)}"
        return [Fault("model.name", f"{fault}; {kind} are for {', '.join(others)}")]
    if kind == "images" and min(shape[:2]) < family.least_pixels:
        pixels = f"{family.least_pixels} × {family.least_pixels}"
        return [Fault("model.name", f"{model.name!r} needs images of at least {pixels}, these are {tuple(shape)}")]
    return []
