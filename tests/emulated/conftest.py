from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.emulated.device import emulated_device


@pytest.fixture
def device() -> Iterator[torch.device]:
    """The emulated accelerator, for one test."""
    with emulated_device() as device:
        yield device
