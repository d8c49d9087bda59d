"""Forms of image files, with the right pixels or the reason to refuse them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from typing import Any

import imagecodecs
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tests.fuzz.image_bytes import (
    bmp,
    exif,
    icon,
    mac_icon,
    netpbm,
    png,
    raw_profile,
    tga,
    tiff,
    with_exif,
    with_segment,
)

Values = NDArray[np.float64]
_EXACT = 1e-6
_ROUNDED = 0.5 / 255 + 1.1 / 65535
"""Half a step of 8 bits; Pillow scales a PGM to 16 bits first, which may add a little more than half a 16-bit step."""
_ONE_STEP = 1 / 255 + _EXACT


@dataclass(frozen=True)
class ImageForm:
    """A file, and its expected pixels or refusal."""

    name: str
    data: bytes | bytearray
    expected: Values | None = None
    """(H, W, 3) in [0, 1], from the values that were written or from imagecodecs; None: it is refused."""
    tolerance: float = _EXACT
    refused: str = ""
    """Part of the expected reason for the refusal."""
    orientation: int = 1


def forms(seed: int) -> list[ImageForm]:
    """Return all forms, with pixels and a common size that depend on the seed."""
    draw = np.random.default_rng(seed)
    height, width = (int(n) for n in draw.integers(16, 40, 2) * 2)
    coarse = draw.integers(0, 256, (5, 6, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    rgb = np.clip(smooth + draw.integers(-20, 20, smooth.shape), 0, 255).astype(np.uint8)
    makers = (_pngs, _tiffs, _netpbms, _jpegs, _others, _orientations, _refused)
    return [form for make in makers for form in make(rgb, draw)]


def _gray(values: NDArray[Any], largest: int) -> Values:
    return np.repeat(values[..., None], 3, axis=2) / largest


def _pngs(rgb: NDArray[np.uint8], draw: np.random.Generator) -> Iterator[ImageForm]:
    shape = rgb.shape[:2]
    for bits in (1, 2, 4, 8, 16):
        values = draw.integers(0, 2**bits, shape)
        for interlaced in (False, True):
            data = png(values, bits, 0, interlaced=interlaced)
            name = f"png gray {bits}{' interlaced' * interlaced}"
            yield ImageForm(name, data, _gray(values, 2**bits - 1), _ROUNDED if bits == 16 else _EXACT)
        if bits <= 8:
            palette = draw.integers(0, 256, (2**bits, 3), dtype=np.uint8)
            chunks = [(b"PLTE", palette.tobytes()), (b"tRNS", bytes([0, 128]))]
            yield ImageForm(f"png palette {bits}", png(values, bits, 3, before=chunks), palette[values] / 255)
    for bits in (8, 16):
        scale, tolerance = 2**bits - 1, _EXACT if bits == 8 else _ROUNDED
        color = draw.integers(0, 2**bits, (*shape, 4))
        for interlaced in (False, True):
            words = f"{bits}{' interlaced' * interlaced}"
            data = png(color[..., :3], bits, 2, interlaced=interlaced)
            yield ImageForm(f"png rgb {words}", data, color[..., :3] / scale, tolerance)
            data = png(color, bits, 6, interlaced=interlaced)
            yield ImageForm(f"png rgba {words}", data, color[..., :3] / scale, tolerance)
            data = png(color[..., :2], bits, 4, interlaced=interlaced)
            yield ImageForm(f"png gray alpha {words}", data, _gray(color[..., 0], scale), tolerance)
    about = [(b"gAMA", (100000).to_bytes(4, "big")), (b"sRGB", b"\0"), (b"tRNS", bytes([0, 9, 0, 9, 0, 9]))]
    yield ImageForm("png with gamma and a transparent color", png(rgb, before=about), rgb / 255)


def _tiffs(rgb: NDArray[np.uint8], draw: np.random.Generator) -> Iterator[ImageForm]:
    shape = rgb.shape[:2]
    for order in "<>":
        for deflate in (False, True):
            words = f"{'little' if order == '<' else 'big'}-endian{' deflate' * deflate}"
            form = partial(tiff, order=order, deflate=deflate)
            gray, color = draw.integers(0, 65536, shape, np.uint16), draw.integers(0, 65536, (*shape, 4), np.uint16)
            yield ImageForm(f"tiff rgb 8 {words}", form(rgb, 2), rgb / 255)
            yield ImageForm(f"tiff rgb 8 planar {words}", form(rgb, 2, planar=True), rgb / 255)
            yield ImageForm(f"tiff gray 16 {words}", form(gray, 1), _gray(gray, 65535), _ROUNDED)
            opaque, alpha = color[..., :3], {338: ("H", [2])}
            yield ImageForm(f"tiff rgb 16 {words}", form(opaque, 2), opaque / 65535, _ROUNDED)
            yield ImageForm(f"tiff rgba 16 {words}", form(color, 2, tags=alpha), opaque / 65535, _ROUNDED)
    inks = draw.integers(0, 65536, (*shape, 4), np.uint16)
    light = 1 - inks / 65535
    yield ImageForm("tiff cmyk 16", tiff(inks, 5), light[..., :3] * light[..., 3:], 2 * _ONE_STEP)
    light = 1 - (inks >> 8) / 255
    yield ImageForm("tiff cmyk 8", tiff((inks >> 8).astype(np.uint8), 5), light[..., :3] * light[..., 3:], _ONE_STEP)
    for name in ("tiff_lzw", "packbits"):
        yield ImageForm(f"tiff {name}", _saved(Image.fromarray(rgb), "TIFF", compression=name), rgb / 255)
    gray8, gray16 = draw.integers(0, 256, shape, np.uint8), draw.integers(0, 65536, shape, np.uint16)
    yield ImageForm("tiff gray 8, white is zero", tiff(gray8, 0), _gray(255 - gray8, 255))
    yield ImageForm("tiff gray 16, white is zero", tiff(gray16, 0), _gray(65535 - gray16, 65535), _ROUNDED)
    bits1, bits4 = draw.integers(0, 2, shape, np.uint8), draw.integers(0, 16, shape, np.uint8)
    yield ImageForm("tiff 1 bit", tiff(bits1, 1, bits=1), _gray(bits1, 1))
    yield ImageForm("tiff 1 bit, white is zero", tiff(bits1, 0, bits=1), _gray(1 - bits1, 1))
    yield ImageForm("tiff gray 4", tiff(bits4, 1, bits=4), _gray(bits4, 15))
    values = draw.integers(0, 4096, shape, np.uint16)
    yield ImageForm("tiff gray 12", tiff(values, 1, bits=12), _gray(values, 4095), _ROUNDED)
    palette = draw.integers(0, 256, (256, 3))
    colors = {320: ("H", (palette.T.reshape(-1) * 257).tolist())}
    neutral = np.stack((gray8, 0 * gray8, 0 * gray8), axis=2)
    yield ImageForm("tiff lab", tiff(neutral, 8), _gray(_srgb_of_lightness(gray8 / 2.55), 1), 2 * _ONE_STEP)
    yield ImageForm("tiff palette", tiff(gray8, 3, tags=colors), palette[gray8] / 255)


def _srgb_of_lightness(lightness: Values) -> Values:
    """CIE 1976 L* of a neutral color, 0 … 100, to sRGB (IEC 61966-2-1) in [0, 1]."""
    light = np.where(lightness > 8, ((lightness + 16) / 116) ** 3, lightness * 27 / 24389)
    return np.where(light > 0.0031308, 1.055 * light ** (1 / 2.4) - 0.055, 12.92 * light)


def _netpbms(rgb: NDArray[np.uint8], draw: np.random.Generator) -> Iterator[ImageForm]:
    for largest in (15, 100, 255, 1000, 4095, 65535):
        values = draw.integers(0, largest + 1, (*rgb.shape[:2], 3))
        tolerance = _EXACT if largest == 255 else _ROUNDED
        for plain in (False, True):
            words = f"{largest}{' plain' * plain}"
            data = netpbm(values[..., 0], largest, plain=plain)
            yield ImageForm(f"pgm {words}", data, _gray(values[..., 0], largest), tolerance)
            yield ImageForm(f"ppm {words}", netpbm(values, largest, plain=plain), values / largest, tolerance)


def _saved(image: Image.Image, form: str, **options: Any) -> bytes:
    file = BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def _jpegs(rgb: NDArray[np.uint8], draw: np.random.Generator) -> Iterator[ImageForm]:
    image = Image.fromarray(rgb)
    options: dict[str, dict[str, Any]] = {
        f"4:{sampling} quality {quality}{' progressive' * progressive}": {
            "subsampling": f"4:{sampling}", "quality": quality, "progressive": progressive,
        }
        for sampling in ("4:4", "2:2", "2:0") for quality in (20, 95) for progressive in (False, True)
    }  # fmt: skip
    options |= {"restarts": {"restart_marker_blocks": 2}, "rgb": {"keep_rgb": True}, "4:1:1": {"subsampling": "4:1:1"}}
    for name, option in options.items():
        data = _saved(image, "JPEG", **option)
        yield ImageForm(f"jpeg {name}", data, imagecodecs.jpeg8_decode(data, outcolorspace="RGB") / 255)
    data = _saved(image.convert("L"), "JPEG")
    yield ImageForm("jpeg gray", data, _gray(imagecodecs.jpeg8_decode(data), 255))
    yield ImageForm("jpeg with an odd tail", data + bytes(100), _gray(imagecodecs.jpeg8_decode(data), 255))
    lossless = imagecodecs.jpeg8_encode(rgb, lossless=True)
    yield ImageForm("jpeg lossless", lossless, rgb / 255)
    inks = draw.integers(0, 256, (*rgb.shape[:2], 4), dtype=np.uint8)
    data = _saved(Image.fromarray(inks, "CMYK"), "JPEG", quality=95)
    # Adobe's files hold 255 - ink: what is decoded is the light that each ink lets through.
    light = imagecodecs.jpeg8_decode(data, outcolorspace="CMYK").astype(float)
    yield ImageForm("jpeg cmyk", data, light[..., :3] * light[..., 3:] / 255**2, _ONE_STEP)
    pair = _saved(image, "MPO", save_all=True, append_images=[image.rotate(90)])
    yield ImageForm("mpo", pair, imagecodecs.jpeg8_decode(_saved(image, "JPEG"), outcolorspace="RGB") / 255)


def _others(rgb: NDArray[np.uint8], draw: np.random.Generator) -> Iterator[ImageForm]:
    image, exact = Image.fromarray(rgb), rgb / 255
    indices, palette = draw.integers(0, 256, rgb.shape[:2], np.uint8), draw.integers(0, 256, (256, 3), np.uint8)
    indexed = Image.fromarray(indices, "P")
    indexed.putpalette(palette.tobytes())
    yield ImageForm("gif", _saved(indexed, "GIF"), palette[indices] / 255)
    moving = _saved(indexed, "GIF", save_all=True, append_images=[indexed.rotate(180)])
    yield ImageForm("gif of two frames", moving, palette[indices] / 255)
    yield ImageForm("bmp 24", bmp(rgb), exact)
    yield ImageForm("bmp 32", bmp(rgb, bits=32), exact)
    yield ImageForm("bmp top down", bmp(rgb, top_down=True), exact)
    yield ImageForm("bmp palette", _saved(indexed, "BMP"), palette[indices] / 255)
    yield ImageForm("tga", tga(rgb), exact)
    yield ImageForm("tga top down", tga(rgb, top_down=True), exact)
    yield ImageForm("tga runs", tga(rgb, runs=True), exact)
    yield ImageForm("ico", icon(rgb), exact)
    large = draw.integers(0, 256, (128, 128, 3), np.uint8)
    yield ImageForm("icns", mac_icon(large), large / 255)
    black = indices % 2
    yield ImageForm("xbm", _saved(Image.fromarray(255 * black).convert("1"), "XBM"), _gray(black, 1))
    for name in ("png line", "png column"):
        line = draw.integers(0, 256, (1, 4000, 3) if name == "png line" else (4000, 1, 3), np.uint8)
        yield ImageForm(name, png(line), line / 255)
    for name in ("PCX", "SGI", "QOI", "DDS"):
        yield ImageForm(name.lower(), _saved(image, name), exact)
    lossy, lossless = imagecodecs.webp_encode(rgb, level=60), imagecodecs.webp_encode(rgb, lossless=True)
    yield ImageForm("webp", lossy, imagecodecs.webp_decode(lossy) / 255)
    yield ImageForm("webp lossless", lossless, exact)
    moving = _saved(image, "WEBP", save_all=True, append_images=[image.rotate(180)], lossless=True)
    yield ImageForm("webp of two frames", moving, exact)
    clear = np.concatenate((rgb, draw.integers(1, 256, (*rgb.shape[:2], 1), np.uint8)), axis=2)
    yield ImageForm("webp with alpha", imagecodecs.webp_encode(clear, lossless=True), exact)
    for bits in (8, 10, 12):
        values = rgb.astype("u2" if bits > 8 else "u1") << (bits - 8)
        data = imagecodecs.avif_encode(values, bitspersample=bits, level=90)
        decoded = imagecodecs.avif_decode(data).astype(float)
        yield ImageForm(f"avif {bits}", data, decoded / (2**bits - 1), 3 * _ONE_STEP)
    yield ImageForm("jpeg 2000", imagecodecs.jpeg2k_encode(rgb, level=0), exact)
    gray = draw.integers(0, 65536, rgb.shape[:2], np.uint16)
    yield ImageForm("jpeg 2000 gray 16", imagecodecs.jpeg2k_encode(gray, level=0), _gray(gray, 65535), _ROUNDED)


def _turned(values: Values, orientation: int) -> Values:
    """Apply the orientation pixel by pixel, from the definition of row 0 and column 0 in EXIF 2.3."""
    height, width = values.shape[:2]
    result = np.empty((width, height, 3) if orientation > 4 else values.shape)
    for y in range(height):
        for x in range(width):
            row = {1: y, 2: y, 3: height - 1 - y, 4: height - 1 - y, 5: x, 6: x, 7: width - 1 - x, 8: width - 1 - x}
            column = {1: x, 2: width - 1 - x, 3: width - 1 - x, 4: x, 5: y, 6: height - 1 - y, 7: height - 1 - y, 8: y}
            result[row[orientation], column[orientation]] = values[y, x]
    return result


def right_pixels(form: ImageForm, *, apply: bool) -> Values:
    """Return the pixels, (H, W, 3) in [0, 1], that a pipeline must return, with or without orientation."""
    assert form.expected is not None
    return _turned(form.expected, form.orientation) if apply else form.expected


def _orientations(rgb: NDArray[np.uint8], draw: np.random.Generator) -> Iterator[ImageForm]:
    image, exact = Image.fromarray(rgb), rgb / 255
    jpeg = _saved(image, "JPEG")
    decoded = imagecodecs.jpeg8_decode(jpeg, outcolorspace="RGB") / 255
    for k in range(1, 9):
        yield ImageForm(f"jpeg orientation {k}", with_exif(jpeg, k, "<>"[k % 2]), decoded, orientation=k)
        yield ImageForm(f"png orientation {k}", png(rgb, before=[(b"eXIf", exif(k))]), exact, orientation=k)
        yield ImageForm(f"tiff orientation {k}", tiff(rgb, 2, tags={274: ("H", [k])}), exact, orientation=k)
        webp = _saved(image, "WEBP", lossless=True, exif=b"Exif\0\0" + exif(k))
        yield ImageForm(f"webp orientation {k}", webp, exact, orientation=k)
        avif = _saved(image, "AVIF", exif=exif(k), quality=90)
        right = imagecodecs.avif_decode(avif) / 255
        yield ImageForm(f"avif orientation {k}", avif, right, 3 * _ONE_STEP, orientation=k)
    webp = _saved(image, "WEBP", exif=b"Exif\0\0" + exif(3))
    yield ImageForm("webp lossy orientation 3", webp, imagecodecs.webp_decode(webp) / 255, orientation=3)
    xmp = b'http://ns.adobe.com/xap/1.0/\0<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    yield ImageForm("jpeg orientation in xmp", with_segment(jpeg, xmp), decoded, orientation=6)
    damaged = with_segment(jpeg, b"Exif\0\0" + exif(6)[:11])
    yield ImageForm("jpeg with damaged exif", damaged, decoded)
    text = [raw_profile(8)]
    for place, data in {"before": png(rgb, before=text), "after": png(rgb, after=text)}.items():
        yield ImageForm(f"png orientation in a text {place} the pixels", data, exact, orientation=8)
    late = png(rgb, after=[(b"eXIf", exif(6))])
    yield ImageForm("png orientation after the pixels", late, exact, orientation=6)
    gray = draw.integers(0, 65536, rgb.shape[:2], np.uint16)
    data = tiff(gray, 1, deflate=True, tags={274: ("H", [8])})
    yield ImageForm("tiff gray 16 orientation 8", data, _gray(gray, 65535), _ROUNDED, orientation=8)
    yield ImageForm("jpeg orientation 0", with_exif(jpeg, 0), decoded)
    yield ImageForm("jpeg orientation 9", with_exif(jpeg, 9), decoded)


def _refused(rgb: NDArray[np.uint8], draw: np.random.Generator) -> Iterator[ImageForm]:
    gray, wide = rgb[..., 0], rgb.astype(np.uint16) * 257
    yield ImageForm("tiff float32", tiff(gray.astype(np.float32) / 255, 1), refused="floating-point")
    yield ImageForm("tiff float64", tiff(gray / 255, 1), refused="TIFF of a kind that Pillow does not read")
    for kind in (np.int8, np.int16, np.int32):
        yield ImageForm(f"tiff {kind.__name__}", tiff(gray.astype(kind), 1), refused="signed")
    yield ImageForm("tiff uint32", tiff(gray.astype(np.uint32), 1), refused="32-bit")
    yield ImageForm("tiff rgb float32", tiff(rgb.astype(np.float32), 2), refused="TIFF of a kind that")
    yield ImageForm(
        "tiff gray 16, white is zero, big-endian", tiff(wide[..., 0], 0, order=">"), refused="TIFF of a kind"
    )
    yield ImageForm("tiff rgb 16 planar", tiff(wide, 2, planar=True), refused="misreads")
    yield ImageForm("tiff rgb 16 planar deflate", tiff(wide, 2, planar=True, deflate=True), refused="misreads")
    yield ImageForm("pfm", b"Pf\n%d %d\n-1.0\n" % gray.T.shape + gray.astype("<f4").tobytes(), refused="floating-point")
    yield ImageForm("jpeg 2000 rgb 16", imagecodecs.jpeg2k_encode(wide, level=0), refused="more than 8 bits")
    sgi = bytearray(_saved(Image.fromarray(gray), "SGI"))
    sgi[3] = 2
    yield ImageForm("sgi 16", bytes(sgi) + bytes(sgi), refused="more than 8 bits")
    yield ImageForm("jpeg xl", imagecodecs.jpegxl_encode(rgb), refused="JPEG XL")
    yield ImageForm("jpeg 12", imagecodecs.jpeg8_encode(wide >> 4, bitspersample=12), refused="JPEG of a kind that")
    yield ImageForm("heif", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(99), refused="HEIF")
    name = "not an image in a supported format"
    yield ImageForm("jpeg xr", imagecodecs.jpegxr_encode(rgb), refused=name)
    yield ImageForm("postscript", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n", refused="PostScript")
    yield ImageForm("pdf", b"%PDF-1.4\n%%EOF\n", refused="PDF")
    yield ImageForm("svg", b"<svg xmlns='http://www.w3.org/2000/svg'/>", refused=name)
    yield ImageForm("text", b"a line of text\n", refused=name)
    image = Image.fromarray(rgb)
    for form in ("JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP", "PPM", "AVIF", "JPEG2000"):
        data = _saved(image, form)
        yield ImageForm(f"{form.lower()} cut short", data[: len(data) * 2 // 3], refused="")
    yield ImageForm("png too large", png(np.zeros((0, 20_000), int)).replace(
        (20_000).to_bytes(4, "big") + bytes(4), (20_000).to_bytes(4, "big") * 2), refused="")  # fmt: skip
