"""Check that both pipelines read each form of image file to the right pixels, or refuse it by name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hvd_batchgrow.config import DataSection
from hvd_batchgrow.data.images import image_folder
from hvd_batchgrow.data.images.encoded_dataset import EncodedDataset
from hvd_batchgrow.data.order.stream import Stream
from hvd_batchgrow.data.pipeline.crops import CropParams, Draws, Pixels, ResizedCrop
from hvd_batchgrow.data.pipeline.dali_pipeline import DaliPipeline
from hvd_batchgrow.data.pipeline.sampler import EvalSampler, TrainSampler
from hvd_batchgrow.data.pipeline.torch_pipeline import Normalize, torch_inputs
from tests.fuzz.image_bytes import png
from tests.fuzz.image_forms import ImageForm, right_pixels

_UNCHANGED = Normalize((0.0,) * 3, (1.0,) * 3)


@dataclass(frozen=True)
class _Whole:
    """The whole image, at its own size."""

    out_size: tuple[int, int]
    num_draws = 0

    def sample_crops(self, draws: Draws, sizes: Pixels) -> CropParams:
        n = len(sizes)
        windows = np.concatenate((np.zeros_like(sizes), sizes), axis=1).astype(np.int32)
        return CropParams(windows, sizes, np.zeros((n, 2), np.int32), np.zeros(n, np.int32), self.out_size)


def folder_of(forms: Sequence[ImageForm], root: Path) -> None:
    """Write a class with the forms, all named .jpg, and a class and a test set of one good image each."""
    whole = png(np.zeros((9, 9, 3), np.uint8))
    for name in ("train/good", "val/good", "train/forms"):
        (root / name).mkdir(parents=True)
        (root / name / "whole.png").write_bytes(whole)
    for k, form in enumerate(forms):
        (root / "train" / "forms" / f"{k:04d}.jpg").write_bytes(form.data)


def check_forms(forms: Sequence[ImageForm], root: Path) -> list[str]:
    """Return what is wrong with the way forms are read; the folder must be empty."""
    folder_of(forms, root)
    return [fault for apply in (False, True) for fault in _faults(forms, root, apply=apply)]


def _faults(forms: Sequence[ImageForm], root: Path, *, apply: bool) -> Iterator[str]:
    data = DataSection(source="image_folder", root=str(root), on_bad_sample="replace", apply_orientation=apply)
    samples = image_folder.load(data, 0, lambda *_: None).train
    assert isinstance(samples, EncodedDataset)
    good = []
    for k, form in enumerate(forms):
        if form.expected is None:
            yield from _refusal_faults(form, samples, k)
        elif not samples.sizes[k].all():
            yield f"{form.name} is refused: {samples.fault(k)}"
        else:
            good.append(k)
    for size in sorted({tuple(samples.sizes[k].tolist()) for k in good}):
        alike = [k for k in good if tuple(samples.sizes[k]) == size]
        yield from _pixel_faults(forms, samples, alike, size, apply=apply)
    yield from _crop_faults(samples)


def _refusal_faults(form: ImageForm, samples: EncodedDataset, k: int) -> Iterator[str]:
    if samples.sizes[k].all():
        yield f"{form.name} is accepted"
    elif not samples.fault(k) or form.refused not in samples.fault(k):
        yield f"{form.name} is refused because it {samples.fault(k)!r}, not {form.refused!r}"


def _pixel_faults(
    forms: Sequence[ImageForm], samples: EncodedDataset, ids: Sequence[int], size: tuple[int, int], *, apply: bool
) -> Iterator[str]:
    """Yield the faults of whole images of one size."""
    sampler = EvalSampler(samples, _Whole(size), [ids])  # type: ignore[list-item]
    by_torch = next(torch_inputs(sampler, _UNCHANGED, 0, 1))[1]
    by_dali = next(DaliPipeline(_UNCHANGED, len(ids), 1).inputs(sampler, 0, 1))[1]
    if sampler.not_for_dali:
        yield f"DALI cannot decode one of {', '.join(forms[k].name for k in ids if samples.is_for_dali(k))}"
    for k, ours, theirs in zip(ids, by_torch, by_dali, strict=True):
        where, expected = f"{forms[k].name}, apply_orientation = {apply}:", right_pixels(forms[k], apply=apply)
        if ours.shape[1:] != expected.shape[:2]:
            yield f"{where} is {ours.shape[1:]} pixels, not {expected.shape[:2]}"
        elif not torch.equal(ours, theirs):
            yield f"{where} pipelines differ by {_largest(ours - theirs):g}"
        elif (error := _largest(ours.permute(1, 2, 0) - torch.from_numpy(expected))) > forms[k].tolerance:
            yield f"{where} pixels differ by {error:g} from what they are"


def _crop_faults(samples: EncodedDataset) -> Iterator[str]:
    """Yield the faults of random resized windows, of which DALI decodes only the window."""
    rule = ResizedCrop((12, 12), (0.08, 1.0), (3 / 4, 4 / 3), hflip=True)
    samplers = [TrainSampler(samples, Stream(len(samples), 3), rule, 16) for _ in range(2)]
    by_pipeline = torch_inputs(samplers[0], _UNCHANGED, 0, 1), DaliPipeline(_UNCHANGED, 16, 1).inputs(samplers[1], 0, 1)
    pairs = zip(*by_pipeline, strict=True)
    for (raw, by_torch), (_, by_dali) in pairs:
        differing: NDArray[np.bool_] = (by_torch != by_dali).flatten(1).any(1).numpy()
        yield from (f"crops of {samples.locate(k)} differ" for k in raw.ids[differing].tolist())
        if raw.stream_index[-1] >= 2 * len(samples):
            break
    if samplers[1].not_for_dali:
        yield "DALI cannot decode the window of an image"


def _largest(values: Tensor) -> float:
    return float(values.abs().max())
