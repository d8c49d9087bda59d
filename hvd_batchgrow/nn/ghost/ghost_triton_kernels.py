"""Ghost batch norm's Triton kernels. Importing this module requires Triton.

The k ghost batches of an input, of M · C values each, are consecutive in memory. The value m of channel c has offset

    m // P · P · C + c · P + m % P

in its ghost batch, with P = H·W for contiguous inputs and P = 1 for channels_last ones. A program processes tiles of
some m and some c of one ghost batch. If one tile has all values (`_whole`), it is read once. Otherwise several
programs, the splits, share the channels: in a first kernel each split writes the sums of its part; in a second one
each split reads all these sums in the same order, and finishes its part. There are no atomic sums, so runs are
bit-identical.

Sums are float32. Variances are computed from differences from the mean of each tile. Tiles and splits are combined by
the formula of Chan, Golub & LeVeque 1979 ("Updating formulae and a pairwise algorithm for computing sample variances").
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _place(num_channels: tl.tensor, CHANNELS: tl.constexpr) -> tl.tensor:
    """Return the ghost batch of this program, its channels, and a mask of the channels that exist."""
    num_parts = tl.cdiv(num_channels, CHANNELS)
    group = (tl.program_id(0) // num_parts).to(tl.int64)
    c = tl.program_id(0) % num_parts * CHANNELS + tl.arange(0, CHANNELS)
    return group, c, c < num_channels


@triton.jit
def _tile(
    first: tl.tensor, c: tl.tensor, is_channel: tl.tensor, num_values: tl.tensor, num_channels: tl.tensor,
    VALUES: tl.constexpr, PIXELS: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Return the offsets of a tile's values in their ghost batch, and a mask of the values that exist."""
    m = first + tl.arange(0, VALUES)
    places = (m // PIXELS * (PIXELS * num_channels) + m % PIXELS)[:, None] + (c * PIXELS)[None, :]
    return places, (m < num_values)[:, None] & is_channel[None, :]


@triton.jit
def _optional(pointer: tl.tensor, c: tl.tensor, is_channel: tl.tensor, DEFAULT: tl.constexpr) -> tl.tensor:
    """Return a weight or bias, or the default for None."""
    if pointer is None:
        return tl.full(c.shape, DEFAULT, tl.float32)
    else:  # Triton compiles only one branch of such a condition
        return tl.load(pointer + c, mask=is_channel, other=0.0).to(tl.float32)


@triton.jit
def _moments(x: tl.tensor, exists: tl.tensor, count: tl.tensor) -> tl.tensor:
    """Return the mean of a tile and the sum of squared differences from it, by channel."""
    mean = tl.sum(x, 0) / count
    centered = tl.where(exists, x - mean[None, :], 0.0)
    return mean, tl.sum(centered * centered, 0)


@triton.jit
def _activate(y: tl.tensor) -> tl.tensor:
    return tl.where(y <= 0, 0.0, y)  # NaN stays NaN


@triton.jit
def _affine(centered: tl.tensor, slope: tl.tensor, bias: tl.tensor) -> tl.tensor:
    # Rounded once, in forward and backward alike, so that both agree on which values are above 0.
    return tl.fma(
        centered, tl.broadcast_to(slope[None, :], centered.shape), tl.broadcast_to(bias[None, :], centered.shape)
    )


@triton.jit
def _normalized(x: tl.tensor, mean: tl.tensor, slope: tl.tensor, bias: tl.tensor, RELU: tl.constexpr) -> tl.tensor:
    y = _affine(x - mean[None, :], slope, bias)
    if RELU:
        y = _activate(y)
    return y


@triton.jit
def _keep(
    statistics: tl.tensor, inverses: tl.tensor, group: tl.tensor, c: tl.tensor, is_channel: tl.tensor,
    num_channels: tl.tensor, mean: tl.tensor, variance: tl.tensor, inverse: tl.tensor,
) -> tl.tensor:  # fmt: skip
    row = statistics + group * 2 * num_channels
    tl.store(row + c, mean, mask=is_channel)
    tl.store(row + num_channels + c, variance, mask=is_channel)
    tl.store(inverses + group * num_channels + c, inverse, mask=is_channel)


@triton.jit
def normalize_whole(
    x: tl.tensor, weight: tl.tensor, bias: tl.tensor, y: tl.tensor, statistics: tl.tensor, inverses: tl.tensor,
    num_values: tl.tensor, num_channels: tl.tensor, eps: tl.tensor,
    RELU: tl.constexpr, PIXELS: tl.constexpr, VALUES: tl.constexpr, CHANNELS: tl.constexpr,
) -> None:  # fmt: skip
    """Compute output and statistics of some channels of a ghost batch."""
    group, c, is_channel = _place(num_channels, CHANNELS)
    places, exists = _tile(0, c, is_channel, num_values, num_channels, VALUES, PIXELS)
    begin = group * num_values * num_channels
    values = tl.load(x + begin + places, mask=exists, other=0.0).to(tl.float32)
    mean, squares = _moments(values, exists, num_values)
    inverse = 1.0 / tl.sqrt_rn(squares / num_values + eps)
    _keep(statistics, inverses, group, c, is_channel, num_channels, mean, squares / (num_values - 1), inverse)
    slope = inverse * _optional(weight, c, is_channel, 1.0)
    out = _normalized(values, mean, slope, _optional(bias, c, is_channel, 0.0), RELU)
    tl.store(y + begin + places, out, mask=exists)


@triton.jit
def moments_of_splits(
    x: tl.tensor, parts: tl.tensor, num_values: tl.tensor, num_channels: tl.tensor,
    PIXELS: tl.constexpr, VALUES: tl.constexpr, CHANNELS: tl.constexpr, TILES: tl.constexpr,
) -> None:  # fmt: skip
    """Fill `parts` (k, 2, splits, C) with the mean of each split and the sum of squared differences from it."""
    group, c, is_channel = _place(num_channels, CHANNELS)
    begin = group * num_values * num_channels
    mean = tl.zeros((CHANNELS,), tl.float32)
    squares = tl.zeros((CHANNELS,), tl.float32)
    before = 0.0
    first = tl.program_id(1) * (VALUES * TILES)
    for tile in range(TILES):
        start = first + tile * VALUES
        places, exists = _tile(start, c, is_channel, num_values, num_channels, VALUES, PIXELS)
        values = tl.load(x + begin + places, mask=exists, other=0.0).to(tl.float32)
        count = tl.maximum(tl.minimum(num_values - start, VALUES), 0).to(tl.float32)
        tile_mean, tile_squares = _moments(values, exists, tl.maximum(count, 1.0))
        share = count / (before + count)  # never 0 / 0: a split's first tile has values
        difference = tile_mean - mean
        squares += tile_squares + difference * difference * before * share
        mean += difference * share
        before += count
    row = parts + (group * 2 * tl.num_programs(1) + tl.program_id(1)) * num_channels
    tl.store(row + c, mean, mask=is_channel)
    tl.store(row + tl.num_programs(1) * num_channels + c, squares, mask=is_channel)


@triton.jit
def _load_parts(
    parts: tl.tensor, group: tl.tensor, c: tl.tensor, is_channel: tl.tensor, num_channels: tl.tensor,
    SPLITS: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Return both quantities of all splits, (SPLITS, channels), with 0 for splits that do not exist."""
    split = tl.arange(0, SPLITS)
    exists = (split < tl.num_programs(1))[:, None] & is_channel[None, :]
    places = group * 2 * tl.num_programs(1) * num_channels + (split * num_channels)[:, None] + c[None, :]
    first = tl.load(parts + places, mask=exists, other=0.0)
    second = tl.load(parts + places + tl.num_programs(1) * num_channels, mask=exists, other=0.0)
    return first, second


@triton.jit
def normalize_splits(
    x: tl.tensor, weight: tl.tensor, bias: tl.tensor, y: tl.tensor, statistics: tl.tensor, inverses: tl.tensor,
    parts: tl.tensor, num_values: tl.tensor, num_channels: tl.tensor, eps: tl.tensor,
    RELU: tl.constexpr, PIXELS: tl.constexpr, VALUES: tl.constexpr, CHANNELS: tl.constexpr, TILES: tl.constexpr,
    SPLITS: tl.constexpr,
) -> None:  # fmt: skip
    """Compute the output of a split; the first split also writes the statistics. `parts`: from `moments_of_splits`."""
    group, c, is_channel = _place(num_channels, CHANNELS)
    means, squares = _load_parts(parts, group, c, is_channel, num_channels, SPLITS)
    rest = num_values - tl.arange(0, SPLITS) * (VALUES * TILES)
    counts = tl.maximum(tl.minimum(rest, VALUES * TILES), 0).to(tl.float32)[:, None]
    mean = tl.sum(means * counts, 0) / num_values
    differences = means - mean[None, :]
    total = tl.sum(squares + counts * differences * differences, 0)
    inverse = 1.0 / tl.sqrt_rn(total / num_values + eps)
    if tl.program_id(1) == 0:
        _keep(statistics, inverses, group, c, is_channel, num_channels, mean, total / (num_values - 1), inverse)
    slope = inverse * _optional(weight, c, is_channel, 1.0)
    offset = _optional(bias, c, is_channel, 0.0)
    begin = group * num_values * num_channels
    first = tl.program_id(1) * (VALUES * TILES)
    for tile in range(TILES):
        places, exists = _tile(first + tile * VALUES, c, is_channel, num_values, num_channels, VALUES, PIXELS)
        values = tl.load(x + begin + places, mask=exists, other=0.0).to(tl.float32)
        tl.store(y + begin + places, _normalized(values, mean, slope, offset, RELU), mask=exists)


@triton.jit
def _kept(
    statistics: tl.tensor, inverses: tl.tensor, weight: tl.tensor, group: tl.tensor, c: tl.tensor,
    is_channel: tl.tensor, num_channels: tl.tensor,
) -> tl.tensor:  # fmt: skip
    mean = tl.load(statistics + group * 2 * num_channels + c, mask=is_channel, other=0.0)
    inverse = tl.load(inverses + group * num_channels + c, mask=is_channel, other=0.0)
    return mean, inverse, inverse * _optional(weight, c, is_channel, 1.0)


@triton.jit
def _load_both(
    x: tl.tensor, dy: tl.tensor, places: tl.tensor, exists: tl.tensor, mean: tl.tensor, slope: tl.tensor,
    bias: tl.tensor,
    RELU: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Return x - mean, and the gradient of the activation's input."""
    centered = tl.load(x + places, mask=exists, other=0.0).to(tl.float32) - mean[None, :]
    upstream = tl.load(dy + places, mask=exists, other=0.0).to(tl.float32)
    if RELU:
        # Compare the stored, rounded output with 0.
        is_off = _affine(centered, slope, bias).to(x.dtype.element_ty).to(tl.float32) <= 0
        upstream = tl.where(is_off, 0.0, upstream)
    return centered, upstream


@triton.jit
def _keep_sums(
    sums: tl.tensor, group: tl.tensor, c: tl.tensor, is_channel: tl.tensor, num_channels: tl.tensor, dot: tl.tensor,
    total: tl.tensor,
) -> tl.tensor:  # fmt: skip
    row = sums + group * 2 * num_channels
    tl.store(row + c, dot, mask=is_channel)
    tl.store(row + num_channels + c, total, mask=is_channel)


@triton.jit
def differentiate_whole(
    x: tl.tensor, dy: tl.tensor, weight: tl.tensor, bias: tl.tensor, statistics: tl.tensor, inverses: tl.tensor,
    dx: tl.tensor, sums: tl.tensor, num_values: tl.tensor, num_channels: tl.tensor,
    RELU: tl.constexpr, PIXELS: tl.constexpr, VALUES: tl.constexpr, CHANNELS: tl.constexpr,
) -> None:  # fmt: skip
    """Compute the gradient of the input, and `sums` (k, 2, C), each ghost batch's part of those of weight and bias."""
    group, c, is_channel = _place(num_channels, CHANNELS)
    places, exists = _tile(0, c, is_channel, num_values, num_channels, VALUES, PIXELS)
    mean, inverse, slope = _kept(statistics, inverses, weight, group, c, is_channel, num_channels)
    offset = _optional(bias, c, is_channel, 0.0)
    begin = group * num_values * num_channels
    centered, upstream = _load_both(x + begin, dy + begin, places, exists, mean, slope, offset, RELU)
    total = tl.sum(upstream, 0)
    dot = tl.sum(upstream * centered, 0) * inverse
    _keep_sums(sums, group, c, is_channel, num_channels, dot, total)
    grad = slope[None, :] * (
        upstream - (total / num_values)[None, :] - centered * (inverse * dot / num_values)[None, :]
    )
    tl.store(dx + begin + places, grad, mask=exists)


@triton.jit
def sums_of_splits(
    x: tl.tensor, dy: tl.tensor, weight: tl.tensor, bias: tl.tensor, statistics: tl.tensor, inverses: tl.tensor,
    parts: tl.tensor, num_values: tl.tensor, num_channels: tl.tensor,
    RELU: tl.constexpr, PIXELS: tl.constexpr, VALUES: tl.constexpr, CHANNELS: tl.constexpr, TILES: tl.constexpr,
) -> None:  # fmt: skip
    """Fill `parts` (k, 2, splits, C) with the part of each split of Σ dy (x - mean) and of Σ dy."""
    group, c, is_channel = _place(num_channels, CHANNELS)
    mean, _, slope = _kept(statistics, inverses, weight, group, c, is_channel, num_channels)
    offset = _optional(bias, c, is_channel, 0.0)
    begin = group * num_values * num_channels
    dot = tl.zeros((CHANNELS,), tl.float32)
    total = tl.zeros((CHANNELS,), tl.float32)
    first = tl.program_id(1) * (VALUES * TILES)
    for tile in range(TILES):
        places, exists = _tile(first + tile * VALUES, c, is_channel, num_values, num_channels, VALUES, PIXELS)
        centered, upstream = _load_both(x + begin, dy + begin, places, exists, mean, slope, offset, RELU)
        dot += tl.sum(upstream * centered, 0)
        total += tl.sum(upstream, 0)
    row = parts + (group * 2 * tl.num_programs(1) + tl.program_id(1)) * num_channels
    tl.store(row + c, dot, mask=is_channel)
    tl.store(row + tl.num_programs(1) * num_channels + c, total, mask=is_channel)


@triton.jit
def differentiate_splits(
    x: tl.tensor, dy: tl.tensor, weight: tl.tensor, bias: tl.tensor, statistics: tl.tensor, inverses: tl.tensor,
    dx: tl.tensor, sums: tl.tensor, parts: tl.tensor, num_values: tl.tensor, num_channels: tl.tensor,
    RELU: tl.constexpr, PIXELS: tl.constexpr, VALUES: tl.constexpr, CHANNELS: tl.constexpr, TILES: tl.constexpr,
    SPLITS: tl.constexpr,
) -> None:  # fmt: skip
    """Compute `differentiate_whole` for a split. `parts`: from `sums_of_splits`."""
    group, c, is_channel = _place(num_channels, CHANNELS)
    mean, inverse, slope = _kept(statistics, inverses, weight, group, c, is_channel, num_channels)
    offset = _optional(bias, c, is_channel, 0.0)
    dots, totals = _load_parts(parts, group, c, is_channel, num_channels, SPLITS)
    dot = tl.sum(dots, 0) * inverse
    total = tl.sum(totals, 0)
    if tl.program_id(1) == 0:
        _keep_sums(sums, group, c, is_channel, num_channels, dot, total)
    from_total = (total / num_values)[None, :]
    from_dot = (inverse * dot / num_values)[None, :]
    begin = group * num_values * num_channels
    first = tl.program_id(1) * (VALUES * TILES)
    for tile in range(TILES):
        places, exists = _tile(first + tile * VALUES, c, is_channel, num_values, num_channels, VALUES, PIXELS)
        centered, upstream = _load_both(x + begin, dy + begin, places, exists, mean, slope, offset, RELU)
        tl.store(dx + begin + places, slope[None, :] * (upstream - from_total - centered * from_dot), mask=exists)
