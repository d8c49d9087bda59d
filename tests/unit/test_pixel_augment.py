"""RandAugment, TrivialAugment, color jitter and random erasing: torchvision's operations, and their draws."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageOps

from hvd_batchgrow.data.pipeline import image_operations as on
from hvd_batchgrow.data.pipeline.auto_augment import NUM_BINS, AutoAugment, DrawnOperations, auto_augment
from hvd_batchgrow.data.pipeline.color_jitter import ColorJitter, DrawnColors
from hvd_batchgrow.data.pipeline.erasing import RandomErasing, erase
from hvd_batchgrow.torchvision_shim import import_torchvision

SIZE = (24, 31)
RULES = ["randaugment", "trivialaugment_wide"]


@pytest.fixture(scope="module")
def torchvision() -> Callable[[str], Any]:
    """Return a function that imports a module of torchvision."""
    try:
        import_torchvision()
    except ImportError:
        pytest.skip("needs torchvision")
    return lambda name: importlib.import_module(f"torchvision.{name}")


def rule_of(name: Any, size: tuple[int, int] = SIZE) -> AutoAugment:
    return auto_augment(name, size, 2, 9)


def image_of(mode: str) -> Image.Image:
    """Return an image with smooth parts, noise, and less than the whole range of values."""
    generator = np.random.default_rng(3)
    rows, columns = np.mgrid[: SIZE[0], : SIZE[1]]
    channels = [(5 * rows + k * columns) % 180 + generator.integers(20, 60, SIZE) for k in (1, 3, 4)]
    pixels = np.stack(channels, axis=2).astype(np.uint8)
    return Image.fromarray(pixels if mode == "RGB" else np.ascontiguousarray(pixels[..., 0]))


def pixels_of(image: Image.Image) -> NDArray[np.uint8]:
    """Return (H, W, C)."""
    return np.asarray(image).reshape(image.height, image.width, -1)


# --- operations ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RULES)
def test_operations_and_magnitudes_are_those_of_torchvision(torchvision: Callable[[str], Any], name: str) -> None:
    transforms = torchvision("transforms")
    for size in (SIZE, (32, 32), (224, 224), (7, 300)):
        rule = rule_of(name, size)
        if name == "randaugment":
            space = transforms.RandAugment()._augmentation_space(NUM_BINS, size)
        else:
            space = transforms.TrivialAugmentWide()._augmentation_space(NUM_BINS)
        assert [operation.name for operation in rule.operations] == list(space)
        for operation, (magnitudes, is_signed) in zip(rule.operations, space.values(), strict=True):
            assert operation.is_signed == is_signed
            theirs = magnitudes.double().expand(NUM_BINS).numpy()
            assert operation.magnitudes == pytest.approx(theirs, abs=1e-5)
            if operation.name.startswith(("Translate", "Posterize")):  # whole pixels and bits
                # torchvision's float32 puts the whole number 16 at 15.999999, and moves by 15
                assert (operation.magnitudes.astype(int) == (theirs + 1e-5).astype(int)).all()


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("name", RULES)
def test_each_operation_gives_the_pixels_of_torchvision(
    torchvision: Callable[[str], Any], name: str, mode: str
) -> None:
    """At every magnitude, with both signs; in torchvision's default form, for PIL images."""
    module = torchvision("transforms.autoaugment")
    image = image_of(mode)
    for operation in rule_of(name).operations:
        results = set()
        for magnitude in {sign * value for value in operation.magnitudes.tolist() for sign in (1, -1)}:
            if magnitude < 0 and not operation.is_signed:
                continue
            expected = module._apply_op(image, operation.name, magnitude, module.InterpolationMode.NEAREST, None)
            found = operation.apply(pixels_of(image), magnitude)
            assert (found == pixels_of(expected)).all(), (operation.name, magnitude)
            results.add(found.tobytes())
        is_constant = operation.name in {"Identity", "AutoContrast", "Equalize"} or (operation.name, mode) == (
            "Color",
            "L",
        )
        assert (len(results) == 1) == is_constant, operation.name


@pytest.mark.parametrize("kind", ["noise", "flat", "two values", "few values", "one pixel", "full range"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_each_operation_gives_the_pixels_of_pillow_on_unusual_images(mode: str, kind: str) -> None:
    """Histograms with one value, or with so few pixels that the steps of an equalized one are 0 or 1."""
    generator, (height, width) = np.random.default_rng(5), (40, 17)
    makers: dict[str, Callable[[], Any]] = {
        "noise": lambda: generator.integers(0, 256, (height, width, 3)),
        "flat": lambda: np.full((height, width, 3), 77),
        "two values": lambda: np.where(generator.random((height, width, 3)) < 0.1, 250, 249),
        "few values": lambda: generator.choice([0, 3, 90, 255], (height, width, 3), p=[0.7, 0.1, 0.1, 0.1]),
        "one pixel": lambda: generator.integers(0, 256, (1, 1, 3)),
        "full range": lambda: np.arange(256 * 3).reshape(16, 16, 3) % 256,
    }
    pixels = makers[kind]().astype(np.uint8)
    pixels = pixels if mode == "RGB" else pixels[..., :1]
    image = Image.fromarray(pixels if mode == "RGB" else pixels[..., 0])
    for found, expected in (
        (on.autocontrast(pixels), ImageOps.autocontrast(image)),
        (on.equalize(pixels), ImageOps.equalize(image)),
        (on.posterize(pixels, 3), ImageOps.posterize(image, 3)),
        (on.solarize(pixels, 101), ImageOps.solarize(image, 101)),
        *((on.brightness(pixels, f), ImageEnhance.Brightness(image).enhance(f)) for f in (0.0, 0.37, 1.0, 1.9, 4.0)),
        *((on.contrast(pixels, f), ImageEnhance.Contrast(image).enhance(f)) for f in (0.0, 0.37, 1.0, 1.9, 4.0)),
        *((on.saturation(pixels, f), ImageEnhance.Color(image).enhance(f)) for f in (0.0, 0.37, 1.0, 1.9, 4.0)),
        *((on.sharpness(pixels, f), ImageEnhance.Sharpness(image).enhance(f)) for f in (0.0, 0.37, 1.0, 1.9)),
        (on.rotate(pixels, 33.0), image.rotate(33.0)),
    ):
        assert (found == pixels_of(expected)).all()
    view = np.asfortranarray(pixels)  # as images whose memory is channels first
    assert (on.equalize(view) == on.equalize(pixels)).all()
    assert (on.brightness(view, 1.3) == on.brightness(pixels, 1.3)).all()


def test_operations_by_their_definition() -> None:
    image = pixels_of(image_of("RGB"))
    before = image.astype(int)
    apply = {operation.name: operation.apply for operation in rule_of("randaugment").operations}
    moved = apply["TranslateX"](image, 3.9)
    assert (moved[:, 3:] == before[:, :-3]).all()
    assert not moved[:, :3].any()
    moved = apply["TranslateY"](image, -5.0)
    assert (moved[:-5] == before[5:]).all()
    assert not moved[-5:].any()
    assert (apply["Posterize"](image, 5) == before // 8 * 8).all()
    assert (apply["Solarize"](image, 128.5) == np.where(before < 128.5, before, 255 - before)).all()
    assert np.abs(apply["Brightness"](image, -0.5) - before * 0.5).max() <= 1
    stretched = apply["AutoContrast"](image, 0)
    assert stretched.min(axis=(0, 1)).tolist() == [0, 0, 0]
    assert stretched.max(axis=(0, 1)).tolist() == [255, 255, 255]
    for row in range(SIZE[0]):  # (x, y) comes from (x + y / 2, y), at the centers of pixels
        columns = np.floor(np.arange(SIZE[1]) + 0.5 + (row + 0.5) / 2).astype(int)
        inside = columns < SIZE[1]
        sheared = apply["ShearX"](image, 0.5)[row]
        assert (sheared[inside] == before[row, columns[inside]]).all()
        assert not sheared[~inside].any()


def test_operations_are_applied_in_the_order_in_which_they_are_drawn() -> None:
    rule, image = rule_of("randaugment"), pixels_of(image_of("RGB"))
    index = {operation.name: k for k, operation in enumerate(rule.operations)}
    drawn = DrawnOperations(
        np.array([[index["TranslateX"], index["Brightness"]], [index["Brightness"], index["Rotate"]]]),
        np.array([[3.0, -0.5], [0.5, 20.0]]),
    )
    assert (rule.apply(image, drawn, 0) == on.brightness(on.translate_x(image, 3.0), 0.5)).all()
    assert (rule.apply(image, drawn, 1) == on.rotate(on.brightness(image, 1.5), 20.0)).all()
    assert (rule.apply(image, drawn[1:], 0) == rule.apply(image, drawn, 1)).all()


def chi_squared(counts: NDArray[np.int64]) -> float:
    expected = counts.sum() / counts.size
    return float(((counts - expected) ** 2 / expected).sum())


def test_every_operation_magnitude_and_sign_is_equally_probable() -> None:
    draws = np.random.default_rng(0).random((40_000, 6))
    twice = rule_of("randaugment").sample(draws)
    counts = np.zeros((14, 14), dtype=int)
    np.add.at(counts, (twice.indices[:, 0], twice.indices[:, 1]), 1)
    assert chi_squared(counts) < 260.0  # 195 degrees of freedom: exceeded once in a thousand; the seed is fixed
    shear = twice.magnitudes[twice.indices == 1]
    assert set(shear) == {-0.09, 0.09}  # bin 9 of 0 … 0.3
    assert abs((shear > 0).mean() - 0.5) < 4 * 0.5 / math.sqrt(len(shear))

    wide = rule_of("trivialaugment_wide").sample(draws[:, :3])
    assert wide.indices.shape == (40_000, 1)
    rotations = wide.magnitudes[wide.indices == 5]
    counts = np.bincount(np.rint(np.abs(rotations) / 4.5).astype(int), minlength=NUM_BINS)
    assert chi_squared(counts) < 59.7  # 30 degrees of freedom
    assert set(np.sign(rotations)) == {-1, 0, 1}
    bits = wide.magnitudes[wide.indices == 10]
    assert set(bits) == {2, 3, 4, 5, 6, 7, 8}


# --- color jitter ------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_color_changes_give_the_pixels_of_torchvision(torchvision: Callable[[str], Any], mode: str) -> None:
    functional, image = torchvision("transforms.functional"), image_of(mode)
    changes = (
        functional.adjust_brightness,
        functional.adjust_contrast,
        functional.adjust_saturation,
        functional.adjust_hue,
    )
    rule = ColorJitter((0.4, 0.3, 1.5, 0.5))
    drawn = rule.sample(np.random.default_rng(1).random((60, rule.num_draws)))
    for k in range(60):
        expected = image
        for which in drawn.order[k].tolist():
            expected = changes[which](expected, float(drawn.values[k, which]))
        assert (rule.apply(pixels_of(image), drawn, k) == pixels_of(expected)).all()


def test_only_the_named_color_changes_are_made() -> None:
    picture = image_of("RGB")
    image = pixels_of(picture)
    drawn = DrawnColors(np.array([[0.5, 1.4, 0.2, 0.3]]), np.array([[3, 1, 0, 2]]))
    only_brightness = ColorJitter((0.5, 0.0, 0.0, 0.0)).apply(image, drawn, 0)
    assert np.abs(only_brightness - 0.5 * image).max() <= 1
    gray = ColorJitter((0.0, 0.0, 1.0, 0.0)).apply(image, DrawnColors(np.zeros((1, 4)), drawn.order), 0)
    assert (gray == pixels_of(picture.convert("L"))).all()
    only_hue = Image.fromarray(ColorJitter((0.0, 0.0, 0.0, 0.5)).apply(image, drawn, 0)).convert("HSV")
    turned = (pixels_of(only_hue)[..., 0].astype(int) - pixels_of(picture.convert("HSV"))[..., 0]) % 256
    assert np.median(turned) == pytest.approx(0.3 * 256, abs=2)


def test_color_changes_are_uniform_and_in_any_order() -> None:
    rule = ColorJitter((0.4, 1.5, 0.2, 0.1))
    drawn = rule.sample(np.random.default_rng(0).random((24_000, rule.num_draws)))
    low, high = np.array([0.6, 0.0, 0.8, -0.1]), np.array([1.4, 2.5, 1.2, 0.1])
    assert (drawn.values >= low).all()
    assert (drawn.values <= high).all()
    for values, start, end in zip(drawn.values.T, low, high, strict=True):
        counts = np.histogram(values, 20, (start, end))[0]
        assert chi_squared(counts) < 43.8  # 19 degrees of freedom
    orders, counts = np.unique(drawn.order, axis=0, return_counts=True)
    assert len(orders) == 24
    assert chi_squared(counts) < 49.7  # 23 degrees of freedom


# --- random erasing -----------------------------------------------------------------------------------


def by_definition(rule: RandomErasing, draws: list[float]) -> list[int]:
    """Zhong et al.'s algorithm with torchvision's bounds, one image and one attempt at a time."""
    height, width = rule.size
    if draws[0] >= rule.probability:
        return [0, 0, 0, 0]
    for attempt in range(10):
        area = height * width * (rule.scale[0] + (rule.scale[1] - rule.scale[0]) * draws[1 + 2 * attempt])
        low, high = math.log(rule.ratio[0]), math.log(rule.ratio[1])
        aspect = math.exp(low + (high - low) * draws[2 + 2 * attempt])
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if h < height and w < width:
            return [int(draws[21] * (height - h + 1)), int(draws[22] * (width - w + 1)), h, w]
    return [0, 0, 0, 0]


@pytest.mark.parametrize(
    ("size", "scale", "ratio"),
    [((32, 32), (0.02, 0.33), (0.3, 3.3)), ((10, 40), (0.4, 0.9), (0.3, 3.3)), ((8, 8), (1.0, 1.0), (1.0, 1.0))],
)
def test_rectangles_are_those_of_the_algorithm(
    size: tuple[int, int], scale: tuple[float, float], ratio: tuple[float, float]
) -> None:
    rule = RandomErasing(size, 0.7, scale, ratio)
    draws = np.random.default_rng(2).random((2000, rule.num_draws))
    found = rule.sample(draws)
    assert found.tolist() == [by_definition(rule, row) for row in draws.tolist()]
    erased = found[:, 2] > 0
    assert (found[:, :2] + found[:, 2:] <= size).all()
    if scale == (1.0, 1.0):
        assert not erased.any()  # no rectangle is smaller than the image
    if scale == (0.02, 0.33):
        assert abs(erased.mean() - 0.7) < 4 * math.sqrt(0.21 / 2000)
        share = found[erased, 2:].prod(axis=1) / 1024
        assert share.mean() == pytest.approx(0.175, abs=0.01)  # uniform between 0.02 and 0.33


def test_erasing_sets_the_rectangle_to_0_and_nothing_else() -> None:
    images = torch.full((3, 2, 6, 7), 5.0).contiguous(memory_format=torch.channels_last)
    erase(images, np.array([[1, 2, 3, 4], [0, 0, 0, 0], [5, 0, 1, 7]], np.int32))
    expected = np.full((3, 2, 6, 7), 5.0)
    expected[0, :, 1:4, 2:6] = 0
    expected[2, :, 5, :] = 0
    assert (images.numpy() == expected).all()
