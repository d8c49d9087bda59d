"""Checks for readable but implausible data: transposed axes, pixels of another type.

Each would train on wrong inputs without an error. Every message suggests what was probably intended.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvd_batchgrow.data.datasets.normalization import chunks_of
from hvd_batchgrow.messages.errors import RunError

_MOST_CHANNELS = 4
"""Common images are gray, gray with alpha, RGB or RGBA."""
_NARROW = 8
"""Ratio of long to short side above which a narrow gray image is probably a list of pixels."""
_LOOKED_AT = 1000
"""Images whose range of values is examined."""


def check_layout(shape: Sequence[int], stated: Sequence[int] | None, place: str) -> None:
    """Check that the axes of images are (N, H, W, C).

    Args:
        shape: (H, W, C) of an image as read; (features,) of a row.
        stated: `data.shape`, which confirms an unusual shape; None: not stated.
        place: for the message.

    Raises:
        RunError: the shape is not the stated one, or is implausible for this order of axes.
    """
    if stated is not None and tuple(stated) != tuple(shape):
        raise RunError(f"{place}: a sample is {tuple(shape)}, and data.shape is {list(stated)}{_order(shape, stated)}")
    if stated is not None or len(shape) != 3:
        return
    height, width, channels = shape
    fault = None
    is_planes = channels == width != height  # as square images in the order (N, C, H, W)
    if channels > _MOST_CHANNELS and (is_planes or (min(height, width) <= _MOST_CHANNELS and height != width)):
        axes = (0, 2, 3, 1) if is_planes or height <= width else (0, 1, 3, 2)
        fault = f"if the channels are axis {axes[-1]}: {_transposed(axes)}"
    elif channels == 1 and max(height, width) >= _NARROW * min(height, width) and min(height, width) <= _MOST_CHANNELS:
        order = "(N, C, H, W) and then .transpose(0, 2, 3, 1)" if height < width else "(N, H, W, C)"
        fault = f"if they are flattened images: reshape them to {order}"
    if fault:
        read = f"{height} × {width} pixels of {channels} channel{'s' * (channels > 1)}"
        meant = f"if {read} are correct: data.shape = {list(shape)}"
        raise RunError(f"{place}: images are read as (N, H, W, C), so these have {read}; {fault}; {meant}")


def _transposed(axes: Sequence[int]) -> str:
    return f"numpy.save(…, numpy.ascontiguousarray(x.transpose{tuple(axes)}))"


def _order(shape: Sequence[int], stated: Sequence[int]) -> str:
    """Return the transposition that yields the stated shape, or an empty text."""
    if sorted(shape) != sorted(stated):
        return ""
    left = list(enumerate(shape, start=1))
    axes = [left.pop(next(k for k, (_, length) in enumerate(left) if length == wanted))[0] for wanted in stated]
    return f": {_transposed((0, *axes))}"


def axis_hint(values: NDArray[Any], labels: NDArray[Any]) -> str:
    """Return a likely fix for values and labels whose shapes do not match; empty if no fix is likely."""
    if labels.ndim == 2 and len(labels) == len(values):
        one_hot = labels.shape[1] > 1
        return f"; numpy.save(…, labels.{'argmax(1)' if one_hot else 'ravel()'}) makes labels (N,)"
    if labels.ndim == 1 and len(labels) in values.shape[1:]:
        axis = values.shape.index(len(labels), 1)
        moved = f"numpy.save(…, numpy.ascontiguousarray(numpy.moveaxis(x, {axis}, 0)))"
        return f"; axis {axis} has as many entries as there are labels, and the samples must be axis 0: {moved}"
    return ""


def byte_hint(images: NDArray[Any]) -> str:
    """Return code that converts images of another type to uint8, judged by their range; empty if unknown."""
    first = np.asarray(images[:_LOOKED_AT])
    if not first.size or not (np.issubdtype(first.dtype, np.number) or first.dtype == bool):
        return ""
    low, high = first.min(), first.max()
    is_whole = not np.issubdtype(first.dtype, np.inexact)
    if first.dtype == bool or (is_whole and low >= 0 and high <= 1):
        code = "255 * x.astype('uint8')"
    elif low >= 0 and high <= 1:
        code = "(255 * x).round().astype('uint8')"
    elif low >= 0 and high <= 255:
        code = "x.astype('uint8')" if is_whole else "x.round().astype('uint8')"
    elif is_whole and low >= 0 and high <= 65535:
        code = "(x // 257).astype('uint8')"
    elif low >= -1 and high <= 1:
        code = "(127.5 * (x + 1)).round().astype('uint8')"
    else:
        remedy = "undo their normalization, which data.mean and data.std apply"
        return f"; values of {low:.4g} … {high:.4g} are not pixels: {remedy}"
    return f"; values of {low:.4g} … {high:.4g}: {code}"


def refuse_bits(images: NDArray[np.uint8], place: str) -> None:
    """Raise RunError if no pixel of images (N, H, W, C) exceeds 1; reading ends at the first one that does."""
    if any(chunk.max(initial=0) > 1 for chunk in chunks_of(images, "", lambda *_: None)):
        return
    raise RunError(
        f"{place}: every pixel is 0 or 1 of 255. Images in [0, 1] must be scaled before they become bytes: "
        "(255 * x).round().astype('uint8'); binary images likewise: 255 * x"
    )
