"""Check the augmentation keys of `[data]`: values, keys that need others, and what the samples allow."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from hvd_batchgrow.config import DataSection
from hvd_batchgrow.messages.errors import Fault

IMAGE_KEYS = frozenset(
    {
        *("auto_augment", "randaugment_num_ops", "randaugment_magnitude", "color_jitter"),
        *("random_erasing", "random_erasing_scale", "random_erasing_ratio"),
        *("mixup_alpha", "cutmix_alpha", "mixup_prob", "mixup_switch_prob"),
    }
)
"""Keys for training images of any kind."""
_TORCH_ONLY = ("auto_augment", "color_jitter")
"""Keys of operations that only the pipeline `torch` has: DALI's operations of these names give other pixels."""
_MOST_HUE = 0.5
"""Half a turn of the color circle reaches every hue."""
_CHANNELS = {1: "gray", 3: "RGB"}
"""Channels of the images that Pillow's operations accept."""


def torch_only_keys(data: DataSection) -> list[str]:
    """Return the keys of the section, such as data.color_jitter, that need the pipeline `torch`."""
    return [f"data.{key}" for key in _TORCH_ONLY if getattr(data, key) is not None]


def dali_fault(keys: Sequence[str]) -> Fault:
    """Return the fault of DALI's pipeline with keys that it does not have."""
    return Fault("data.pipeline", f"'dali' does not have {' and '.join(keys)}; use 'auto' or 'torch'")


def augment_faults(data: DataSection, given: set[str]) -> list[Fault]:
    """Return the faults of the augmentation keys that can be found without the data.

    Args:
        data: the section.
        given: its keys with another value than the default.
    """
    faults = [dali_fault(keys)] if data.pipeline == "dali" and (keys := torch_only_keys(data)) else []
    return [*faults, *_unused(data, given), *_color_faults(data), *_erasing_faults(data)]


def channel_faults(data: DataSection, channels: int) -> list[Fault]:
    """Return the faults of the augmentation keys for images with this number of channels."""
    if channels not in _CHANNELS:
        accepted = " or ".join(f"{number} ({name})" for number, name in _CHANNELS.items())
        fault = f"is for images with {accepted} channels, and these have {channels}; remove it"
        return [Fault(key, fault) for key in torch_only_keys(data)]
    if data.color_jitter and channels == 1 and any(data.color_jitter[2:]):
        kept = ", ".join(f"{value:g}" for value in data.color_jitter[:2])
        fault = f"changes saturation and hue, which gray images do not have; use [{kept}, 0, 0]"
        return [Fault("data.color_jitter", fault)]
    return []


def _unused(data: DataSection, given: set[str]) -> Iterator[Fault]:
    """Yield the faults of keys that would be ignored, because the key that they belong to is not set."""
    if data.auto_augment != "randaugment":
        for key in sorted(given & {"randaugment_num_ops", "randaugment_magnitude"}):
            found = "is missing" if data.auto_augment is None else f"is {data.auto_augment!r}"
            yield Fault(f"data.{key}", f"requires data.auto_augment = 'randaugment', which {found}")
    if not data.random_erasing:
        for key in sorted(given & {"random_erasing_scale", "random_erasing_ratio"}):
            yield Fault(f"data.{key}", "requires data.random_erasing, the probability, which is missing")
    if not data.mixes_samples and "mixup_prob" in given:
        yield Fault("data.mixup_prob", "requires data.mixup_alpha or data.cutmix_alpha, which are missing")
    if not (data.mixup_alpha and data.cutmix_alpha) and "mixup_switch_prob" in given:
        fault = "chooses between Mixup and CutMix: requires both data.mixup_alpha and data.cutmix_alpha"
        yield Fault("data.mixup_switch_prob", fault)


def _color_faults(data: DataSection) -> Iterator[Fault]:
    if data.color_jitter is None:
        return
    if not any(data.color_jitter):
        yield Fault("data.color_jitter", "[0, 0, 0, 0] changes nothing; remove it, or use [0.4, 0.4, 0.4, 0.1]")
    if (hue := data.color_jitter[3]) > _MOST_HUE:
        fault = f"hue = {hue:g} exceeds {_MOST_HUE:g}, half a turn of the color circle; use <= {_MOST_HUE:g}"
        yield Fault("data.color_jitter", fault)


def _erasing_faults(data: DataSection) -> Iterator[Fault]:
    for key in ("random_erasing_scale", "random_erasing_ratio"):
        low, high = getattr(data, key)
        if low > high:
            yield Fault(f"data.{key}", f"must be [min, max], got [{low:g}, {high:g}]; try [{high:g}, {low:g}]")
    if (most := max(data.random_erasing_scale)) > 1:
        yield Fault("data.random_erasing_scale", f"{most:g} exceeds 1, the area of the whole image; use <= 1")
