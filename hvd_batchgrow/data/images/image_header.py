"""The header of an encoded image for the index: size, orientation, whether DALI can decode it, or its fault."""

from __future__ import annotations

import os
import struct
from typing import BinaryIO, NamedTuple

from PIL import Image

from hvd_batchgrow.data.images.decode_rgb import (
    UNDECODABLE,
    bytes_at,
    fault_text,
    open_image,
    stored_rgb,
    take_orientation,
)

_END_MARKS = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"IEND"}
"""Found in the last bytes of a complete file."""


class ImageHeader(NamedTuple):
    """Header of one image."""

    height: int
    """Pixels as stored, before the orientation is applied; 0: the image is bad."""
    width: int
    orientation: int = 1
    """1 … 8, as in EXIF."""
    for_dali: bool = False
    """Whether DALI decodes it to the same pixels as `stored_rgb`."""
    fault: str = ""
    """Why the image is bad, as the end of a sentence that names it."""


def bad_header(fault: str) -> ImageHeader:
    """Return the header of an image that cannot be used."""
    return ImageHeader(0, 0, fault=fault)


def inspect_image(stream: BinaryIO) -> ImageHeader:
    """Inspect an encoded image.

    Sets of JPEG, PNG and WebP have millions of files, so only header and end of these are read, unless the end is
    missing. Other formats are decoded, so that damaged and unsupported images are found before training.
    """
    try:
        with open_image(stream) as image:
            for_dali = _is_for_dali(image, stream)
            if image.format == "PNG" and _has_late_orientation(stream):
                image.load()
            orientation = take_orientation(image)
            width, height = image.size
            if not _is_whole(image, stream):
                height, width = stored_rgb(image, stream).shape[:2]
    except UNDECODABLE as error:
        return bad_header(fault_text(error, stream))
    return ImageHeader(height, width, orientation, for_dali)


def _is_for_dali(image: Image.Image, stream: BinaryIO) -> bool:
    """Return whether DALI decodes to the same pixels, bit-identical on a CPU (tests/fuzz/image_forms.py)."""
    if image.format in {"JPEG", "MPO"}:
        return image.mode in {"L", "RGB"}
    if image.format == "WEBP":
        return bytes_at(stream, 12, 4) != b"VP8X"  # extended WebP, with EXIF, alpha or frames: DALI 2.4 fails on some
    return image.format == "PNG" and _is_8_bit(image)


def _is_8_bit(image: Image.Image) -> bool:
    tiles = image.tile  # type: ignore[attr-defined]
    return all(";16" not in str(tile[3]) for tile in tiles)


def _is_whole(image: Image.Image, stream: BinaryIO) -> bool:
    """Return whether the file is complete, as far as its end shows without decoding."""
    here, size = stream.tell(), stream.seek(0, os.SEEK_END)
    stream.seek(here)
    if image.format == "WEBP":
        return 8 + int.from_bytes(bytes_at(stream, 4, 4), "little") <= size
    return image.format in _END_MARKS and _END_MARKS[image.format] in bytes_at(stream, max(0, size - 64), 64)


def _has_late_orientation(stream: BinaryIO) -> bool:
    """Return whether a PNG has EXIF or XMP after its pixels, which Pillow finds only after decoding."""
    here, after_pixels, found = stream.tell(), False, False
    stream.seek(8)
    while not found and len(header := stream.read(8)) == 8:
        length, name = struct.unpack(">I4s", header)
        after_pixels = after_pixels or name == b"IDAT"
        found = after_pixels and name in {b"eXIf", b"iTXt", b"zTXt"}
        stream.seek(length + 4, os.SEEK_CUR)
    stream.seek(here)
    return found
