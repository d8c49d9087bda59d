"""Image files written by hand, byte for byte, so that their pixels are known without any decoder."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
_ADAM7 = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))


# --- PNG (ISO 15948) -------------------------------------------------------------------------------


def png(
    values: Array,
    bits: int = 8,
    color: int = 2,
    *,
    interlaced: bool = False,
    before: Sequence[tuple[bytes, bytes]] = (),
    after: Sequence[tuple[bytes, bytes]] = (),
) -> bytes:
    """A PNG whose rows use all five filters in turn.

    Args:
        values: (H, W) or (H, W, C), samples as they are stored.
        bits: of a sample.
        color: 0 gray, 2 RGB, 3 palette, 4 gray and alpha, 6 RGBA.
        interlaced: by Adam7.
        before: chunks before the pixels, such as PLTE or eXIf.
        after: chunks after them.
    """
    height, width = values.shape[:2]
    parts = [values[y::dy, x::dx] for y, x, dy, dx in _ADAM7] if interlaced else [values]
    raw = b"".join(_filtered(part, bits) for part in parts if part.size)
    header = struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, interlaced)
    chunks = [(b"IHDR", header), *before, (b"IDAT", zlib.compress(raw)), *after, (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(name, data) for name, data in chunks)


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def _filtered(values: Array, bits: int) -> bytes:
    rows = [np.frombuffer(_packed(row.reshape(-1), bits), np.uint8).astype(int) for row in values]
    step = max(1, bits * (values.shape[2] if values.ndim == 3 else 1) // 8)
    above, out = np.zeros_like(rows[0]), b""
    for y, row in enumerate(rows):
        left = np.concatenate((np.zeros(step, int), row[:-step]))[: len(row)]
        corner = np.concatenate((np.zeros(step, int), above[:-step]))[: len(row)]
        kinds = [0 * row, left, above, (left + above) // 2, _paeth(left, above, corner)]
        out += bytes([y % 5]) + ((row - kinds[y % 5]) % 256).astype(np.uint8).tobytes()
        above = row
    return out


def _paeth(left: Array, above: Array, corner: Array) -> Array:
    estimate = left + above - corner
    a, b, c = abs(estimate - left), abs(estimate - above), abs(estimate - corner)
    return np.where((a <= b) & (a <= c), left, np.where(b <= c, above, corner))


def _packed(samples: Array, bits: int, order: str = ">") -> bytes:
    """Samples of a row, the first in the high bits of a byte."""
    if bits >= 8:
        return samples.astype(f"{order}u{bits // 8}" if bits % 8 == 0 else np.uint8).tobytes()
    text = "".join(f"{int(value):0{bits}b}" for value in samples)
    return int(text.ljust(-(-len(text) // 8) * 8, "0"), 2).to_bytes(-(-len(text) // 8), "big")


def exif(orientation: int, order: str = ">") -> bytes:
    """Return EXIF with only an orientation."""
    mark = b"MM" if order == ">" else b"II"
    return mark + struct.pack(f"{order}HIHHHIHHI", 42, 8, 1, 274, 3, 1, orientation, 0, 0)


def with_exif(jpeg: bytes, orientation: int, order: str = ">") -> bytes:
    """Return a JPEG with EXIF."""
    return with_segment(jpeg, b"Exif\0\0" + exif(orientation, order))


def with_segment(jpeg: bytes, segment: bytes) -> bytes:
    """Return a JPEG with an APP1 segment after its first marker."""
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment + jpeg[2:]


# --- TIFF 6 ----------------------------------------------------------------------------------------


def tiff(
    values: Array,
    photometric: int,
    *,
    bits: int | None = None,
    order: str = "<",
    deflate: bool = False,
    planar: bool = False,
    rows_per_strip: int = 7,
    tags: Mapping[int, tuple[str, Sequence[int]]] | None = None,
) -> bytes:
    """A TIFF of one page, in strips.

    Args:
        values: (H, W) or (H, W, C); their dtype is that of the samples, unless `bits` is smaller.
        photometric: 0 white is zero, 1 black is zero, 2 RGB, 3 palette, 5 CMYK, 6 YCbCr.
        bits: of a sample; None: those of the type.
        order: of the bytes.
        deflate: compress the strips.
        planar: store channel after channel.
        rows_per_strip: of the rows.
        tags: more of them: number to type ("H" or "I") and values.
    """
    values = values if values.ndim == 3 else values[..., None]
    height, width, channels = values.shape
    planes = np.moveaxis(values, 2, 0)[..., None] if planar else values[None]
    strips = []
    for plane in planes:
        for top in range(0, height, rows_per_strip):
            rows = [_row(row.reshape(-1), bits, order) for row in plane[top : top + rows_per_strip]]
            strips.append(zlib.compress(b"".join(rows)) if deflate else b"".join(rows))
    kind = {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    entries: dict[int, tuple[str, Sequence[int]]] = {
        256: ("I", [width]), 257: ("I", [height]), 258: ("H", [bits or values.dtype.itemsize * 8] * channels),
        259: ("H", [8 if deflate else 1]), 262: ("H", [photometric]), 273: ("I", [0] * len(strips)),
        277: ("H", [channels]), 278: ("I", [rows_per_strip]), 279: ("I", [len(strip) for strip in strips]),
        284: ("H", [2 if planar else 1]), 339: ("H", [kind] * channels), **(tags or {}),
    }  # fmt: skip
    return _tiff_bytes(entries, strips, order)


def _row(samples: Array, bits: int | None, order: str) -> bytes:
    if bits == 12:
        return _packed_12(samples)
    return _packed(samples, bits) if bits and bits < 8 else samples.astype(f"{order}{samples.dtype.str[1:]}").tobytes()


def _packed_12(samples: Array) -> bytes:
    text = "".join(f"{int(value):012b}" for value in samples)
    return int(text, 2).to_bytes(len(text) // 8, "big")


def _tiff_bytes(entries: dict[int, tuple[str, Sequence[int]]], strips: Sequence[bytes], order: str) -> bytes:
    start = 8 + 2 + 12 * len(entries) + 4
    extra_length = sum(len(_tag(kind, value, order)) for kind, value in entries.values() if not _is_short(kind, value))
    place, offsets = start + extra_length, []
    for strip in strips:
        offsets.append(place)
        place += len(strip)
    entries[273] = ("I", offsets)
    directory, extra = b"", b""
    for number in sorted(entries):
        kind, value = entries[number]
        data = _tag(kind, value, order)
        if _is_short(kind, value):
            field = data.ljust(4, b"\0")
        else:
            field = struct.pack(f"{order}I", start + len(extra))
            extra += data
        directory += struct.pack(f"{order}HHI", number, {"H": 3, "I": 4}[kind], len(value)) + field
    head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HIH", 42, 8, len(entries))
    return head + directory + bytes(4) + extra + b"".join(strips)


def _tag(kind: str, value: Sequence[int], order: str) -> bytes:
    return struct.pack(f"{order}{len(value)}{kind}", *value)


def _is_short(kind: str, value: Sequence[int]) -> bool:
    return len(value) * {"H": 2, "I": 4}[kind] <= 4


# --- Netpbm, BMP, TGA, ICO -------------------------------------------------------------------------


def netpbm(values: Array, largest: int, *, plain: bool = False) -> bytes:
    """A PGM or PPM, binary or plain text."""
    number = (2 if plain else 5) + (values.ndim == 3)
    head = f"P{number}\n# by hand\n{values.shape[1]} {values.shape[0]}\n{largest}\n".encode()
    if plain:
        return head + b"\n".join(b" ".join(b"%d" % v for v in row.reshape(-1)) for row in values) + b"\n"
    return head + values.astype(">u2" if largest > 255 else np.uint8).tobytes()


def bmp(values: Array, *, bits: int = 24, top_down: bool = False) -> bytes:
    """A BMP of 24 or 32 bits per pixel, bottom up as usual or top down."""
    height, width = values.shape[:2]
    pixels = values[..., ::-1] if top_down else values[::-1, :, ::-1]
    if bits == 32:
        pixels = np.concatenate((pixels, np.zeros((height, width, 1), np.uint8)), axis=2)
    rows = b"".join(row.tobytes().ljust(-(-row.size // 4) * 4, b"\0") for row in pixels)
    info = struct.pack("<IiiHHIIiiII", 40, width, -height if top_down else height, 1, bits, 0, len(rows), 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54 + len(rows), 0, 0, 54) + info + rows


def tga(values: Array, *, top_down: bool = False, runs: bool = False) -> bytes:
    """A TGA of 24 bits per pixel; with `runs`, run-length encoded as runs of a single pixel."""
    height, width = values.shape[:2]
    pixels = values[..., ::-1] if top_down else values[::-1, :, ::-1]
    head = struct.pack("<BBBHHBHHHHBB", 0, 0, 10 if runs else 2, 0, 0, 0, 0, 0, width, height, 24, 0x20 * top_down)
    if runs:
        return head + b"".join(b"\x80" + pixel.tobytes() for pixel in pixels.reshape(-1, 3))
    return head + pixels.tobytes()


def mac_icon(values: Array) -> bytes:
    """An ICNS that holds one PNG of 128 × 128 pixels."""
    data = png(values)
    return b"icns" + struct.pack(">I", 16 + len(data)) + b"ic07" + struct.pack(">I", 8 + len(data)) + data


def raw_profile(orientation: int) -> tuple[bytes, bytes]:
    """A PNG chunk in which ImageMagick keeps EXIF: as hexadecimal digits in a compressed text."""
    data = exif(orientation)
    text = f"\nexif\n{len(data):8d}\n{data.hex()}\n"
    return b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(text.encode())


def icon(values: Array) -> bytes:
    """An ICO that holds one PNG."""
    data = png(values)
    return struct.pack("<HHHBBBBHHII", 0, 1, 1, values.shape[1], values.shape[0], 0, 0, 1, 24, len(data), 22) + data
