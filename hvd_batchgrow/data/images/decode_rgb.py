"""The pixels of an encoded image as 8-bit RGB, by Pillow: what every pipeline must show the network."""

from __future__ import annotations

import struct
import sys
import zlib
from collections.abc import Callable
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError

Image.init()  # loads the plugins now: threads that decode must not load them at the same time

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
"""What Pillow raises for damaged images."""
FORMATS = (
    *("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "DIB", "PPM"),
    *("JPEG2000", "TGA", "ICO", "ICNS", "PCX", "QOI", "SGI", "DDS", "XBM"),
    *({"AVIF"} & Image.OPEN.keys()),  # an old Pillow has none
)
"""Formats that are read, whatever a file is called. Pillow knows others: some start a program, such as Ghostscript."""
_CONVERT = "convert it to 8 or 16 bits per sample, without sign"
_OTHER_BYTE = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}
"""The byte order that reads the low byte of each 16-bit sample where Pillow keeps the high one."""
_SPLIT_COLOURS = {"RGB;16", "RGBA;16", "RGBX;16", "CMYK;16"}
"""Raw modes that Pillow reads in either byte order."""
_TIFF_BITS, _TIFF_PHOTOMETRIC, _TIFF_PLANES, _TIFF_SIGN = 258, 262, 284, 339


class UnsupportedImageError(ValueError):
    """Why a whole image is refused: its values have no single meaning in [0, 1], or Pillow reads them wrongly."""


def open_image(stream: BinaryIO) -> Image.Image:
    """Open an image of one of `FORMATS`, recognised by its contents.

    Raises:
        UnsupportedImageError: its samples cannot be scaled to [0, 1].
        UNDECODABLE: it cannot be read.
    """
    image = Image.open(stream, formats=FORMATS)
    if fault := _sample_fault(image, stream):
        raise UnsupportedImageError(fault)
    return image


def stored_rgb(image: Image.Image, stream: BinaryIO) -> Pixels:
    """Decode an image to (H, W, 3) as it is stored, whatever its orientation.

    Samples of more than 8 bits are scaled: round(255 v / largest), where `largest` is what the type can hold.
    Grey is repeated, palettes are looked up, alpha is dropped.

    Args:
        image: of `open_image`, not loaded yet.
        stream: its bytes.

    Raises:
        UNDECODABLE: the bytes are damaged.
    """
    if image.format == "TIFF":
        take_orientation(image)  # or Pillow would apply it
    raw_mode = _raw_mode(image)
    if image.mode.startswith("I"):
        return _rgb_of_grey(_grey_values(image), 4095 if raw_mode == "I;12" else 65535)
    if raw_mode == "LA;16B":
        _set_raw_mode(image, "RGBA")  # the same 32 bits: both bytes of grey, both bytes of alpha
        high, low, *_ = np.moveaxis(np.asarray(image), 2, 0).astype(np.uint16)
        return _rgb_of_grey(high << 8 | low, 65535)
    if raw_mode[:-1] in _SPLIT_COLOURS:
        return _rgb_of_16_bits(image, stream, raw_mode)
    image.load()
    image.info.pop("transparency", None)  # dropped like all alpha; Pillow warns of some
    return np.asarray(image.convert("RGB"))


def take_orientation(image: Image.Image) -> int:
    """Return the orientation noted in EXIF or XMP, 1 … 8, and keep Pillow from applying it (as it does to TIFF)."""
    try:
        exif = Image.Image.getexif(image)  # PNG's own method would decode the image first
        value = exif.get(ExifTags.Base.Orientation, 1)
        exif[ExifTags.Base.Orientation] = 1
    except UNDECODABLE:  # damaged EXIF: the pixels may be good
        return 1
    return value if value in _ORIENTED else 1


def oriented(pixels: Pixels, orientation: int) -> Pixels:
    """Turn and mirror pixels (H, W, 3) so that they are upright.

    Args:
        pixels: as stored.
        orientation: EXIF's tag 274: 1 is upright, 3 turned by 180°, 6 to be turned clockwise, 8 counter-clockwise;
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
    """Say why an image cannot be used, given what reading it raised, and its bytes."""
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
"""Offset and first bytes of files that Pillow does not read, and what they are."""


# --- samples of more than 8 bits -------------------------------------------------------------------


def _sample_fault(image: Image.Image, stream: BinaryIO) -> str | None:
    """What keeps an image's samples from being scaled to [0, 1]; None: nothing does."""
    if image.format == "TIFF":
        return _tiff_fault(image)
    if image.mode == "F" or (image.mode == "I" and image.format not in {"PNG", "PPM"}):
        return (
            f"holds {'floating-point' if image.mode == 'F' else '32-bit'} samples, whose range is unknown: {_CONVERT}"
        )
    # Pillow drops the low bits of these and does not say so.
    is_truncated = (
        (image.format == "SGI" and bytes_at(stream, 3, 1) == b"\2")
        or (image.format == "JPEG2000" and image.mode[0] != "I" and _jpeg_2000_bits(stream) > 8)
        or (image.format == "DDS" and "BC6" in str(image.tile))  # type: ignore[attr-defined]
        or (";16" in _raw_mode(image) and not _is_readable(image))
    )
    name = f"{image.format} image of more than 8 bits per sample"
    return f"is a {name}, which Pillow truncates: convert it to 16-bit PNG" if is_truncated else None


def _is_readable(image: Image.Image) -> bool:
    """Whether `stored_rgb` has all bits of an image's samples, of which there are more than 8."""
    raw_mode = _raw_mode(image)
    return image.mode[0] == "I" or raw_mode == "LA;16B" or raw_mode[:-1] in _SPLIT_COLOURS


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
    """Bits of the first sample of a pixel, from the codestream's SIZ segment (ISO 15444-1, A.5.1)."""
    stream.seek(0)
    data = stream.read()
    start = data.find(b"\xff\x4f\xff\x51")
    return (data[start + 42] & 0x7F) + 1 if 0 <= start < len(data) - 42 else 0


def bytes_at(stream: BinaryIO, start: int, count: int) -> bytes:
    """Read some bytes of a file, and leave its position where it was."""
    here = stream.tell()
    stream.seek(start)
    found = stream.read(count)
    stream.seek(here)
    return found


def _grey_values(image: Image.Image) -> NDArray[np.integer]:
    values = np.asarray(image.copy())  # loaded; the copy's size is that of the stored pixels
    tags = getattr(image, "tag_v2", {})
    return 65535 - values if tags.get(_TIFF_PHOTOMETRIC) == 0 else values  # WhiteIsZero, which Pillow ignores here


def _rgb_of_grey(values: NDArray[np.integer], largest: int) -> Pixels:
    return np.repeat(_scaled(values, largest)[..., None], 3, axis=2)


def _rgb_of_16_bits(image: Image.Image, stream: BinaryIO, raw_mode: str) -> Pixels:
    """Decode twice, for the high and for the low bytes, as Pillow's colour images have room for 8 bits only."""
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
    """round(255 v / largest), in whole numbers."""
    return ((values.astype(np.uint32) * 510 + largest) // (2 * largest)).astype(np.uint8)


def _raw_mode(image: Image.Image) -> str:
    """How Pillow will unpack the first tile; "" where its decoder has no such argument."""
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
