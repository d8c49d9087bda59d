"""Forms of image files: a short version of `make fuzz`."""

from __future__ import annotations

from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hvd_batchgrow.config import DataSection
from hvd_batchgrow.data.datasets.dataset import BadSample
from hvd_batchgrow.data.images import image_folder
from hvd_batchgrow.data.images.encoded_dataset import EncodedDataset
from hvd_batchgrow.data.pipeline.crops import CenterCrop, ResizedCrop
from hvd_batchgrow.data.pipeline.dali_pipeline import DaliPipeline
from hvd_batchgrow.data.pipeline.sampler import EvalSampler
from hvd_batchgrow.data.pipeline.torch_pipeline import Normalize, torch_inputs
from hvd_batchgrow.job_file import parse_job
from hvd_batchgrow.results.changed_settings import changes
from tests.fuzz.image_bytes import netpbm, png, tiff
from tests.fuzz.image_forms import ImageForm, forms
from tests.fuzz.images import check_forms
from tests.helpers import job_tree
from tests.pictures import Form, Picture, each_form, pictures

pytestmark = [pytest.mark.usefixtures("cache"), pytest.mark.filterwarnings("ignore:Corrupt EXIF data")]
PLAIN = Normalize((0.0,) * 3, (1.0,) * 3)


@pytest.mark.slow
def test_every_form_has_the_right_pixels_in_both_pipelines_or_is_refused_by_name(tmp_path: Path) -> None:
    made = forms(5)
    assert len({form.name for form in made}) == len(made) >= 60
    assert check_forms(made, tmp_path / "data") == []


def test_the_check_of_forms_sees_what_is_wrong(tmp_path: Path) -> None:
    pixels = np.full((20, 24, 3), 80, np.uint8)
    right = ImageForm("in order", png(pixels), pixels / 255)
    wrong = [
        replace(right, name="brighter", expected=pixels / 254),
        replace(right, name="accepted", expected=None),
        replace(right, name="text", data=b"text"),
        ImageForm("another reason", b"text", refused="float"),
        replace(right, name="turned", orientation=6),
    ]
    faults = "\n".join(check_forms([right, *wrong], tmp_path / "data"))
    for form in wrong:
        assert form.name in faults
    assert right.name not in faults


def _gray_16(values: np.ndarray[tuple[int, int], np.dtype[np.int64]]) -> dict[str, bytes]:
    return {
        "png": png(values, 16, 0),
        "tiff": tiff(values.astype(np.uint16), 1),
        "pgm": netpbm(values, 65535),
    }


@each_form
@pytest.mark.parametrize("kind", ["png", "tiff", "pgm"])
@pytest.mark.parametrize("name", ["torch", "dali"])
def test_16_bit_samples_are_scaled_to_the_unit_interval(tmp_path: Path, form: Form, kind: str, name: str) -> None:
    """The defect: torch's pipeline clipped all of 256 … 65535 to white."""
    values = np.linspace(0, 65535, 24 * 30).round().astype(np.int64).reshape(24, 30)
    images = [Picture(_gray_16(values)[kind], k % 3, kind) for k in range(6)]
    samples = form.read(form.make(tmp_path / "data", images)).train
    sampler = EvalSampler(samples, CenterCrop((24, 24), 24), [range(3)])
    inputs = torch_inputs(sampler, PLAIN, 0, 1) if name == "torch" else DaliPipeline(PLAIN, 10, 1).inputs(sampler, 0, 1)
    found = next(inputs)[1]
    expected = torch.from_numpy(values[:, 3:27] / 65535).float()
    assert (found - expected).abs().max() <= 0.5 / 255 + 1e-4


@each_form
def test_samples_without_a_range_are_refused_with_cause_and_remedy(tmp_path: Path, form: Form) -> None:
    images = pictures(6)
    images[2] = replace(images[2], data=tiff(np.ones((9, 9), np.float32), 1))
    root = form.make(tmp_path / "data", images)
    with pytest.raises(RuntimeError, match=r"floating-point samples, whose range is unknown: convert it to 8 or 16"):
        form.read(root)


# --- what DALI does not decode ---------------------------------------------------------------------


def _gifs(root: Path, **keys: object) -> EncodedDataset:
    for k in range(12):
        path = root / ("val" if k > 9 else "train") / "cat" / f"{k}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((20, 30), 20 * k, np.uint8)).save(path, "GIF")
    data = DataSection(source="image_folder", root=str(root), **keys)  # type: ignore[arg-type]
    samples = image_folder.load(data, 0, lambda *_: None).train
    assert isinstance(samples, EncodedDataset)
    return samples


def test_what_dali_fails_on_is_decoded_by_pillow(tmp_path: Path) -> None:
    """The index wrongly marks GIFs as decodable by DALI."""
    samples = _gifs(tmp_path)
    samples._index["for_dali"] = np.ones(10, np.bool_)  # type: ignore[index]
    sampler = EvalSampler(samples, CenterCrop((20, 20), 20), [range(4), range(4, 8), range(8, 10)])
    found = [(raw.ids.tolist(), values) for raw, values in DaliPipeline(PLAIN, 10, 1).inputs(sampler, 0, 1)]
    assert [ids for ids, _ in found] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    shades = torch.cat([values for _, values in found])[:, 0, 10, 10] * 255
    assert shades.round().tolist() == [20 * k for k in range(10)]


@pytest.mark.parametrize("name", ["torch", "dali"])
def test_a_file_that_fails_in_mid_training_is_named_whatever_decodes_it(tmp_path: Path, name: str) -> None:
    samples = _gifs(tmp_path)
    path = tmp_path / "train" / "cat" / "6.jpg"
    path.write_bytes(path.read_bytes()[:-20].ljust(path.stat().st_size, b"\0"))
    samples._index["heads"] = np.zeros(10, np.int64)  # type: ignore[index]  # so that the decoder finds it
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hvd_batchgrow.data.images.encoded_dataset.HEAD_BYTES", 0)
        sampler = EvalSampler(samples, CenterCrop((20, 20), 20), [range(10)])
        with pytest.raises(BadSample, match=rf"sample 6 \({path}\): cannot be decoded") as bad:
            next(
                torch_inputs(sampler, PLAIN, 0, 1)
                if name == "torch"
                else DaliPipeline(PLAIN, 10, 1).inputs(sampler, 0, 1)
            )
    assert bad.value.sample_id == 6


def test_orientation_is_among_what_decides_the_weights() -> None:
    data = {"source": "image_folder", "image_size": 8, "crop_padding": 0}
    jobs = [parse_job(job_tree(data={**data, **key})) for key in ({}, {"apply_orientation": True})]
    assert changes(*(job.deciding(300) for job in jobs)) == {"data.apply_orientation": (False, True)}


# --- images of odd shapes --------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(1, 60_000), (60_000, 1), (3, 20_000), (1, 1), (2, 1)])
def test_an_image_of_a_line_needs_little_memory(size: tuple[int, int]) -> None:
    """The defect: a line of 60,000 pixels was resized to 256 × 15,360,000 pixels, or 11.8 GB."""
    sizes = np.array([size], np.int32)
    draws = np.random.default_rng(0).random((1, 23))
    wide = ResizedCrop((224, 224), (0.08, 1.0), (0.01, 100.0), hflip=True)
    for rule in (CenterCrop((224, 224), 256), ResizedCrop((224, 224), (0.08, 1.0), (3 / 4, 4 / 3), hflip=True), wide):
        place = rule.sample_crops(draws, sizes)
        top, left, height, width = place.windows[0].tolist()
        assert 0 <= top <= top + height <= size[0]
        assert 0 <= left <= left + width <= size[1]
        assert min(height, width) >= 1
        assert place.resized[0].prod() <= 256 * 256 * 10
        assert (place.corners[0] >= 0).all()
        assert (place.corners[0] + 224 <= place.resized[0]).all()


@pytest.mark.parametrize("shape", [(10, 400), (400, 10), (1, 333), (12, 251)])
def test_the_center_of_a_long_image_is_that_of_all_of_it(tmp_path: Path, shape: tuple[int, int]) -> None:
    """Compare with PIL, which resizes the whole image."""
    coarse = np.random.default_rng(1).integers(0, 256, (-(-shape[0] // 4), -(-shape[1] // 4), 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize(shape[::-1], Image.Resampling.BICUBIC)
    file = BytesIO()
    image.save(file, "PNG")
    for name in ("train", "val"):
        (tmp_path / name / "cat").mkdir(parents=True)
        (tmp_path / name / "cat" / "long.png").write_bytes(file.getvalue())
    samples = image_folder.load(DataSection(source="image_folder", root=str(tmp_path)), 0, lambda *_: None).test
    sampler = EvalSampler(samples, CenterCrop((16, 16), 20), [range(1)])
    short, long = sorted(shape)
    long = 20 * long // short
    size = (20, long) if image.width <= image.height else (long, 20)
    left, top = (round((side - 16) / 2) for side in size)
    right = image.resize(size, Image.Resampling.BILINEAR).crop((left, top, left + 16, top + 16))
    found = next(torch_inputs(sampler, PLAIN, 0, 1))[1][0].permute(1, 2, 0) * 255
    # PIL rounds twice; where 20 · long / short is not whole, its scale along the image is a little smaller.
    assert (found - torch.from_numpy(np.array(right)).float()).abs().max() < (
        1.1 if 20 * max(shape) % short == 0 else 8
    )


def test_images_of_ordinary_aspect_are_placed_as_before() -> None:
    """Resize the whole image, as torchvision's Resize and CenterCrop do."""
    sizes = np.array([[375, 500], [500, 375], [224, 224], [100, 800]], np.int32)
    place = CenterCrop((224, 224), 256).sample_crops(np.empty((4, 0)), sizes)
    assert place.windows.tolist() == [[0, 0, *size] for size in sizes.tolist()]
    assert place.resized.tolist() == [[256, 341], [341, 256], [256, 256], [256, 2048]]


def test_a_window_is_never_empty() -> None:
    """The defect: aspects above 2 yielded a window without rows for an image one pixel wide."""
    rule = ResizedCrop((8, 8), (0.5, 1.0), (4.0, 5.0), hflip=False)
    windows = rule.sample_crops(np.random.default_rng(0).random((1, 23)), np.array([[5, 1]], np.int32)).windows
    assert windows[0, 2:].tolist() == [1, 1]
