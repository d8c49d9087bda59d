"""Decode images to 8-bit RGB with Pillow: the reference for every pipeline."""

from __future__ import annotations

import struct
import sys
import zlib
from collections.abc import Callable
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError

Image.init()  # load the plugins now: decoding threads must not load them concurrently

Pixels = NDArray[np.uint8]
UNDECODABLE = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    EOFError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)
"""Exceptions that Pillow raises for damaged images."""
FORMATS = (
    *("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "DIB", "PPM"),
    *("JPEG2000", "TGA", "ICO", "ICNS", "PCX", "QOI", "SGI", "DDS", "XBM"),
    *({"AVIF"} & Image.OPEN.keys()),  # missing in old versions of Pillow
)
"""Accepted formats, whatever the file name. Some other formats make Pillow start a program, such as Ghostscript."""
_CONVERT = "convert it to 8 or 16 bits per sample, without sign"
_OTHER_BYTE = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}
"""The byte order with which Pillow keeps the low byte of each 16-bit sample instead of the high byte."""
_SPLIT_COLORS = {"RGB;16", "RGBA;16", "RGBX;16", "CMYK;16"}
"""Raw modes that Pillow can read in both byte orders."""
_TIFF_BITS, _TIFF_PHOTOMETRIC, _TIFF_PLANES, _TIFF_SIGN = 258, 262, 284, 339


class UnsupportedImageError(ValueError):
    """An undamaged image is refused: its values have no defined range, or Pillow misreads them."""


def open_image(stream: BinaryIO) -> Image.Image:
    """Open an image of one of `FORMATS`, recognized by its contents.

    Raises:
        UnsupportedImageError: its samples cannot be scaled to [0, 1].
        UNDECODABLE: it cannot be read.
    """
    image = Image.open(stream, formats=FORMATS)
    if fault := _sample_fault(image, stream):
        raise UnsupportedImageError(fault)
    return image


def stored_rgb(image: Image.Image, stream: BinaryIO) -> Pixels:
    """Decode an image to (H, W, 3) as stored, ignoring its orientation.

    Samples of more than 8 bits are scaled: round(255 v / largest), where `largest` is the type's maximum.
    Gray is repeated, palettes are looked up, alpha is dropped.

    Args:
        image: from `open_image`, not loaded yet.
        stream: its bytes.

    Raises:
        UNDECODABLE: the bytes are damaged.
    """
    if image.format == "TIFF":
        take_orientation(image)  # otherwise Pillow would apply it
    raw_mode = _raw_mode(image)
    if image.mode.startswith("I"):
        return _rgb_of_gray(_gray_values(image), 4095 if raw_mode == "I;12" else 65535)
    if raw_mode == "LA;16B":
        _set_raw_mode(image, "RGBA")  # the same 32 bits: both bytes of gray, both bytes of alpha
        high, low, *_ = np.moveaxis(np.asarray(image), 2, 0).astype(np.uint16)
        return _rgb_of_gray(high << 8 | low, 65535)
    if raw_mode[:-1] in _SPLIT_COLORS:
        return _rgb_of_16_bits(image, stream, raw_mode)
    image.load()
    image.info.pop("transparency", None)  # dropped like all alpha; Pillow warns about some
    return np.asarray(image.convert("RGB"))


def take_orientation(image: Image.Image) -> int:
    """Return the orientation from EXIF or XMP, 1 … 8, and prevent Pillow from applying it, as it does for TIFF."""
    try:
        exif = Image.Image.getexif(image)  # the method of PNG images would decode the image first
        value = exif.get(ExifTags.Base.Orientation, 1)
        exif[ExifTags.Base.Orientation] = 1
    except UNDECODABLE:  # damaged EXIF: the pixels may be good
        return 1
    return value if value in _ORIENTED else 1


def oriented(pixels: Pixels, orientation: int) -> Pixels:
    """Rotate and mirror pixels (H, W, 3) so that they are upright.

    Args:
        pixels: as stored.
        orientation: EXIF's tag 274: 1 is upright, 3 needs 180°, 6 a quarter turn clockwise, 8 counter-clockwise;
            2, 4, 5 and 7 are mirrored too.
    """
    return np.ascontiguousarray(_ORIENTED[orientation](pixels))


_ORIENTED: dict[int, Callable[[Pixels], Pixels]] = {
    1: lambda pixels: pixels,
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: np.rot90(pixels, -1),
    7: lambda pixels: pixels[::-1, ::-1].swapaxes(0, 1),
    8: np.rot90,
}


def fault_text(error: Exception, stream: BinaryIO) -> str:
    """Return why an image cannot be used, given the exception and its bytes."""
    if isinstance(error, UnsupportedImageError):
        return str(error)
    if isinstance(error, UnidentifiedImageError):
        stream.seek(0)
        start = stream.read(12)
        kind = next((kind for offset, mark, kind in _FOREIGN if start.startswith(mark, offset)), None)
        fault = f"{kind}: convert it to PNG" if kind else "not an image in a supported format"
        return f"cannot be decoded: {fault} ({', '.join(FORMATS)} are read)"
    if isinstance(error, Image.DecompressionBombError) and Image.MAX_IMAGE_PIXELS:
        return f"is too large: it exceeds the limit of {2 * Image.MAX_IMAGE_PIXELS:,} pixels ({error}); make it smaller"
    return f"cannot be decoded: {error}"


_FOREIGN = (
    (0, b"II*\0", "a TIFF of a kind that Pillow does not read"),
    (0, b"MM\0*", "a TIFF of a kind that Pillow does not read"),
    (0, b"II+\0", "a TIFF of a kind that Pillow does not read"),
    (0, b"MM\0+", "a TIFF of a kind that Pillow does not read"),
    (0, b"\xff\xd8\xff", "a JPEG of a kind that Pillow does not read, or a damaged one"),
    (0, b"\xff\n", "JPEG XL"),
    (0, b"\0\0\0\x0cJXL ", "JPEG XL"),
    (4, b"ftyphei", "HEIF"),
    (4, b"ftypmif1", "HEIF"),
    (0, b"%!PS", "PostScript"),
    (0, b"%PDF", "PDF"),
)
"""Offset, first bytes and name of formats that Pillow does not read."""


# --- samples of more than 8 bits -------------------------------------------------------------------


def _sample_fault(image: Image.Image, stream: BinaryIO) -> str | None:
    """Return why samples cannot be scaled to [0, 1]; None if they can."""
    if image.format == "TIFF":
        return _tiff_fault(image)
    if image.mode == "F" or (image.mode == "I" and image.format not in {"PNG", "PPM"}):
        return (
            f"holds {'floating-point' if image.mode == 'F' else '32-bit'} samples, whose range is unknown: {_CONVERT}"
        )
    # Pillow silently drops the low bits of these.
    is_truncated = (
        (image.format == "SGI" and bytes_at(stream, 3, 1) == b"\2")
        or (image.format == "JPEG2000" and image.mode[0] != "I" and _jpeg_2000_bits(stream) > 8)
        or (image.format == "DDS" and "BC6" in str(image.tile))  # type: ignore[attr-defined]
        or (";16" in _raw_mode(image) and not _is_readable(image))
    )
    name = f"{image.format} image of more than 8 bits per sample"
    return f"is a {name}, which Pillow truncates: convert it to 16-bit PNG" if is_truncated else None


def _is_readable(image: Image.Image) -> bool:
    """Return whether `stored_rgb` reads all bits of samples of more than 8 bits."""
    raw_mode = _raw_mode(image)
    return image.mode[0] == "I" or raw_mode == "LA;16B" or raw_mode[:-1] in _SPLIT_COLORS


def _tiff_fault(image: Image.Image) -> str | None:
    tags = image.tag_v2  # type: ignore[attr-defined]
    signs, all_bits = (np.atleast_1d(tags.get(tag, 1)) for tag in (_TIFF_SIGN, _TIFF_BITS))
    kinds, bits = {2: "signed", 3: "floating-point", 5: "complex", 6: "complex"}, all_bits.max()
    if kind := next((kinds[sign] for sign in signs if sign in kinds), None):
        return f"holds {kind} samples, whose range is unknown: {_CONVERT}"
    if bits > 16:
        return f"holds {bits}-bit samples: {_CONVERT}"
    if bits > 8 and (tags.get(_TIFF_PLANES, 1) == 2 or not _is_readable(image)):
        return f"holds {bits}-bit samples in a form that Pillow misreads: convert it to 16-bit PNG"
    return None


def _jpeg_2000_bits(stream: BinaryIO) -> int:
    """Return the bits of a pixel's first sample, from the codestream's SIZ segment (ISO 15444-1, A.5.1)."""
    stream.seek(0)
    data = stream.read()
    start = data.find(b"\xff\x4f\xff\x51")
    return (data[start + 42] & 0x7F) + 1 if 0 <= start < len(data) - 42 else 0


def bytes_at(stream: BinaryIO, start: int, count: int) -> bytes:
    """Read bytes of a file and restore its position."""
    here = stream.tell()
    stream.seek(start)
    found = stream.read(count)
    stream.seek(here)
    return found


def _gray_values(image: Image.Image) -> NDArray[np.integer]:
    values = np.asarray(image.copy())  # loads; the copy has the size of the stored pixels
    tags = getattr(image, "tag_v2", {})
    return 65535 - values if tags.get(_TIFF_PHOTOMETRIC) == 0 else values  # WhiteIsZero, which Pillow ignores here


def _rgb_of_gray(values: NDArray[np.integer], largest: int) -> Pixels:
    return np.repeat(_scaled(values, largest)[..., None], 3, axis=2)


def _rgb_of_16_bits(image: Image.Image, stream: BinaryIO, raw_mode: str) -> Pixels:
    """Decode twice, for the high and the low bytes: Pillow's color images hold only 8 bits per sample."""
    high = image.copy()
    stream.seek(0)
    with Image.open(stream, formats=FORMATS) as again:
        take_orientation(again)
        _set_raw_mode(again, raw_mode[:-1] + _OTHER_BYTE[raw_mode[-1]])
        low = again.copy()
    values = np.asarray(high).astype(np.uint16) << 8 | np.asarray(low)
    rounded = Image.frombytes(high.mode, high.size, _scaled(values, 65535).tobytes())
    return np.asarray(rounded.convert("RGB"))


def _scaled(values: NDArray[np.integer], largest: int) -> Pixels:
    """Return round(255 v / largest), in integer arithmetic."""
    return ((values.astype(np.uint32) * 510 + largest) // (2 * largest)).astype(np.uint8)


def _raw_mode(image: Image.Image) -> str:
    """Return the raw mode with which Pillow will unpack the first tile; "" if its decoder has no raw mode."""
    if not image.tile:  # type: ignore[attr-defined]
        return ""
    arguments = image.tile[0][3]  # type: ignore[attr-defined]
    first = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return first if isinstance(first, str) else ""


def _set_raw_mode(image: Image.Image, raw_mode: str) -> None:
    image.tile = [  # type: ignore[attr-defined]
        tile._replace(args=raw_mode if isinstance(tile.args, str) else (raw_mode, *tile.args[1:]))
        for tile in image.tile  # type: ignore[attr-defined]
    ]
