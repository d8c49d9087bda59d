"""`data.dtype`: in which type normalized images travel to the device, and in which the network receives them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hvd_batchgrow.data.pipeline import torch_pipeline
from hvd_batchgrow.data.pipeline.crops import CropParams
from hvd_batchgrow.data.pipeline.torch_pipeline import Normalize, normalize_windows
from hvd_batchgrow.nn.parameters import network_inputs

PIXELS = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8))
WHOLE = CropParams(
    windows=np.array([[0, 0, 8, 8]] * 2),
    resized=np.array([[8, 8]] * 2),
    corners=np.zeros((2, 2), dtype=np.int64),
    mirrors=np.zeros(2, dtype=np.int32),
    out_size=(8, 8),
)
CONSTANTS = ((0.4, 0.5, 0.6), (0.2, 0.25, 0.3))


@pytest.fixture
def copied(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """The types of the tensors that are copied to the device."""
    found: list[torch.dtype] = []

    def copy(host: Tensor, device: torch.device) -> Tensor:
        found.append(host.dtype)
        return host

    monkeypatch.setattr(torch_pipeline, "to_device", copy)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_encoded_images_are_copied_in_the_type_of_the_job(copied: list[torch.dtype], dtype: torch.dtype) -> None:
    found = normalize_windows(PIXELS, WHOLE, Normalize(*CONSTANTS, dtype))
    assert copied == [dtype]
    expected = normalize_windows(PIXELS, WHOLE, Normalize(*CONSTANTS)).to(dtype)  # rounded once
    assert torch.equal(found, expected)
    # The weights have 32 bits, so the network's input has too: the conversion is exact, and done on the device.
    received = network_inputs(found, nn.Conv2d(3, 1, 1))
    assert received.dtype == torch.float32
    assert torch.equal(received, expected.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_images_of_one_size_are_copied_as_bytes(copied: list[torch.dtype], dtype: torch.dtype) -> None:
    assert Normalize(*CONSTANTS, dtype).images(PIXELS).dtype == dtype
    assert copied == [torch.uint8]
