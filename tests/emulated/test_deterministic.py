"""Exact mode on an emulated accelerator, on which one operation has no deterministic kernel, as on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from hvd_batchgrow.comm.ranks import CollectiveError, SingleRank
from hvd_batchgrow.train.parts import TrainingParts
from tests.emulated import device as emulated
from tests.helpers import small_job, small_source

NETWORK = """
import torch
from torch import nn
class Average(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()
    @staticmethod
    def backward(ctx, gradient):
        if gradient.device.type != "cpu" and torch.are_deterministic_algorithms_enabled():
            raise RuntimeError(
                "adaptive_avg_pool2d_backward_cuda does not have a deterministic implementation, but you set "
                "'torch.use_deterministic_algorithms(True)'. You can turn off determinism just for this operation"
            )
        return gradient
class Pool(nn.AvgPool2d):
    def forward(self, x):
        return Average.apply(super().forward(x))
def pooled(num_classes, pool=Pool):
    features = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), pool(3))
    return nn.Sequential(features, nn.Flatten(), nn.Linear(16, num_classes))
def plain(num_classes):
    return pooled(num_classes, nn.AvgPool2d)
"""
"""Its pool raises in the backward pass on a device what torch raises for `AdaptiveAvgPool2d` on a GPU."""


@pytest.fixture
def device() -> Iterator[torch.device]:
    with emulated.emulated_device() as device:
        torch.use_deterministic_algorithms(True)  # as `prepare_rank` does for an exact job on a GPU
        yield device
        torch.use_deterministic_algorithms(False)


def build(network: str, device: torch.device, *, exact: bool) -> nn.Module:
    layout = {"exact": True, "max_micro_batch": 8} if exact else {}
    job = small_job(model={"name": f"pools:{network}", "channels": None}, layout=layout)
    return TrainingParts(job, small_source(), SingleRank(), device).model


def test_an_exact_job_names_the_layer_and_the_operation(
    device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pools.py").write_text(NETWORK)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(CollectiveError) as caught:
        build("pooled", device, exact=True)
    assert str(caught.value).endswith(
        "layout.exact: pools:pooled has no deterministic kernel on emulated at 0.3 (Pool): "
        "adaptive_avg_pool2d_backward_cuda, in the backward pass; use another layer, layout.exact = false, or "
        'layout.device = "cpu"'
    )
    build("plain", device, exact=True)
    build("pooled", torch.device("cpu"), exact=True)
    torch.use_deterministic_algorithms(False)  # as without exact mode
    build("pooled", device, exact=False)
