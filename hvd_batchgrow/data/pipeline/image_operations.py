"""Operations on 8-bit images, bit-identical to Pillow's, which torchvision uses for PIL images.

An operation that maps each value independently is a lookup table of 256 bytes. The table is computed by Pillow from a
ramp of all values and cached, or from the image's histogram. On images of 32 × 32, Pillow's own operations spend most
of their time on this table.

All operations accept and return uint8 arrays (H, W, C) of 1 or 3 channels, gray or RGB. A result may be read-only.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageOps

Image8 = NDArray[np.uint8]
_VALUES = np.arange(256)
_RAMP = Image.fromarray(_VALUES.astype(np.uint8)[None])


def shear_x(pixels: Image8, slope: float) -> Image8:
    """Shift each row by `slope` times its position to the left; zeros come in from beyond the edge."""
    return _affine(pixels, (1, slope, 0, 0, 1, 0))


def shear_y(pixels: Image8, slope: float) -> Image8:
    """Shift each column by `slope` times its position upwards; zeros come in from beyond the edge."""
    return _affine(pixels, (1, 0, 0, slope, 1, 0))


def translate_x(pixels: Image8, distance: float) -> Image8:
    """Shift the image to the right by `distance` pixels, truncated to a whole number."""
    return _affine(pixels, (1, 0, -int(distance), 0, 1, 0))


def translate_y(pixels: Image8, distance: float) -> Image8:
    """Shift the image downwards by `distance` pixels, truncated to a whole number."""
    return _affine(pixels, (1, 0, 0, 0, 1, -int(distance)))


def rotate(pixels: Image8, degrees: float) -> Image8:
    """Rotate the image around its center, counterclockwise."""
    return _array(_image(pixels).rotate(degrees, Image.Resampling.NEAREST), pixels)


def brightness(pixels: Image8, factor: float) -> Image8:
    """Multiply each value by a factor; 0: black."""
    return _looked_up(pixels, _blend_table(0, factor))


def contrast(pixels: Image8, factor: float) -> Image8:
    """Multiply each value's distance from the mean gray of the image by a factor; 0: a uniform image of that gray."""
    counts = _image(pixels).convert("L").histogram()
    mean = int(float(np.dot(counts, _VALUES)) / (pixels.shape[0] * pixels.shape[1]) + 0.5)
    return _looked_up(pixels, _blend_table(mean, factor))


def saturation(pixels: Image8, factor: float) -> Image8:
    """Multiply each pixel's distance from its gray by a factor; 0: a gray image. Gray images do not change."""
    if pixels.shape[2] == 1:
        return pixels
    image = _image(pixels)
    return _array(Image.blend(image.convert("L").convert("RGB"), image, factor), pixels)


def sharpness(pixels: Image8, factor: float) -> Image8:
    """Multiply the image's difference from a smoothed one by a factor; 0: smoothed."""
    return _array(ImageEnhance.Sharpness(_image(pixels)).enhance(factor), pixels)


def hue(pixels: Image8, turns: float) -> Image8:
    """Change the hue by this fraction of the color circle, -0.5 … 0.5, in whole steps of Pillow's 256.

    Gray images do not change.
    """
    if pixels.shape[2] == 1:
        return pixels
    hues, saturations, values = _image(pixels).convert("HSV").split()
    turned = np.asarray(hues) + np.int64(turns * 255).astype(np.uint8)  # modulo 256
    return _array(Image.merge("HSV", (Image.fromarray(turned), saturations, values)).convert("RGB"), pixels)


def posterize(pixels: Image8, bits: float) -> Image8:
    """Keep this number of the highest bits of each value, and set the others to 0."""
    return _looked_up(pixels, _posterize_table(int(bits)))


def solarize(pixels: Image8, threshold: float) -> Image8:
    """Invert all values of at least a threshold."""
    return _looked_up(pixels, _solarize_table(math.ceil(threshold)))  # the same for whole values


def autocontrast(pixels: Image8) -> Image8:
    """Scale each channel linearly, so that its least value becomes 0 and its largest 255."""
    result = np.empty_like(pixels)
    for channel in range(pixels.shape[2]):
        values = pixels[..., channel]
        low, high = int(values.min()), int(values.max())
        scale = 255.0 / (high - low) if high > low else 1.0
        table = _VALUES * scale - (low * scale if high > low else 0)
        result[..., channel] = _looked_up(values, _bytes(table))
    return result


def equalize(pixels: Image8) -> Image8:
    """Map the values of each channel so that its histogram becomes nearly uniform."""
    result = np.empty_like(pixels)
    for channel in range(pixels.shape[2]):
        values = pixels[..., channel]
        counts = np.bincount(values.reshape(-1), minlength=256)
        step = (values.size - int(counts[values.max()])) // 255
        table = (step // 2 + np.cumsum(counts) - counts) // step if step else _VALUES
        result[..., channel] = _looked_up(values, _bytes(table))
    return result


def _image(pixels: Image8) -> Image.Image:
    return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)


def _array(image: Image.Image, like: Image8) -> Image8:
    return np.frombuffer(image.tobytes(), np.uint8).reshape(like.shape)


def _affine(pixels: Image8, matrix: tuple[float, ...]) -> Image8:
    """Return the image whose pixel (x, y) is the nearest to (a x + b y + c, d x + e y + f) in the given one."""
    image = _image(pixels)
    return _array(image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.NEAREST), pixels)


def _looked_up(pixels: Image8, table: bytes) -> Image8:
    return np.frombuffer(pixels.tobytes().translate(table), np.uint8).reshape(pixels.shape)


def _bytes(table: NDArray[np.number]) -> bytes:
    """Return a table of 256 numbers, truncated to whole numbers and clipped to 0 … 255."""
    return bytes(np.clip(np.trunc(table), 0, 255).astype(np.uint8))


@lru_cache(maxsize=1024)
def _blend_table(base: int, factor: float) -> bytes:
    """Return base + factor (v - base) for each value v, as Pillow rounds it."""
    return Image.blend(Image.new("L", _RAMP.size, base), _RAMP, factor).tobytes()


@lru_cache(maxsize=16)
def _posterize_table(bits: int) -> bytes:
    return ImageOps.posterize(_RAMP, bits).tobytes()


@lru_cache(maxsize=512)
def _solarize_table(threshold: int) -> bytes:
    return ImageOps.solarize(_RAMP, threshold).tobytes()
