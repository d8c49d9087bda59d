from __future__ import annotations

import pytest
import torch
from torch import nn

from hvd_batchgrow.nn.convert import convert_ghost_batch_norm
from hvd_batchgrow.nn.ghost_batch_norm import GhostBatchNorm1d, GhostBatchNorm2d, ghost_norms

GHOST = 4


def make_network() -> nn.Sequential:
    torch.manual_seed(0)
    shared = nn.BatchNorm2d(3, eps=1e-3, momentum=0.2)
    network = nn.Sequential(
        nn.Conv2d(3, 3, 3), shared, nn.ReLU(), shared, nn.Flatten(), nn.Linear(108, 5), nn.BatchNorm1d(5)
    )
    for _ in range(3):  # so that the running statistics are not those of the start
        network(torch.randn(8, 3, 8, 8))
    return network


def test_the_converted_network_gives_the_same_when_it_evaluates() -> None:
    images = torch.randn(6, 3, 8, 8)
    expected = make_network().eval()(images)
    converted = convert_ghost_batch_norm(make_network().eval(), GHOST)
    assert torch.equal(converted(images), expected)


def test_norms_keep_what_they_hold_and_stay_shared() -> None:
    network = make_network()
    network[6].weight.requires_grad_(False)
    plain = {name: value.clone() for name, value in network.state_dict().items() if "tracked" not in name}
    assert convert_ghost_batch_norm(network, GHOST) is network
    assert network[1] is network[3]
    norms = list(ghost_norms(network))
    assert [type(norm) for norm in norms] == [GhostBatchNorm2d, GhostBatchNorm1d]
    settings = [(norm.ghost_batch, norm.eps, norm.momentum, norm.training) for norm in norms]
    assert settings == [(GHOST, 1e-3, 0.2, True), (GHOST, 1e-5, 0.1, True)]
    assert not norms[1].weight.requires_grad
    assert network.state_dict().keys() == plain.keys()
    assert all(torch.equal(network.state_dict()[name], value) for name, value in plain.items())


def test_in_training_each_ghost_batch_is_normalised_alone() -> None:
    network, plain = convert_ghost_batch_norm(make_network(), GHOST), make_network()
    images = torch.randn(8, 3, 8, 8)
    expected = torch.cat([plain(chunk) for chunk in images.split(GHOST)])
    torch.testing.assert_close(network(images), expected)


def test_a_norm_alone_and_a_momentum_of_its_own() -> None:
    converted = convert_ghost_batch_norm(nn.BatchNorm1d(3, momentum=None).double(), GHOST, momentum=0.3)
    assert isinstance(converted, GhostBatchNorm1d)
    assert (converted.momentum, converted.weight.dtype) == (0.3, torch.float64)


class NormAndActivation(nn.BatchNorm2d):
    """As timm's BatchNormAct2d."""

    def __init__(self, num_features: int) -> None:
        super().__init__(num_features)
        self.drop, self.act = nn.Identity(), nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.act(self.drop(super().forward(x)))
        return result


def test_what_a_norm_does_beside_is_kept() -> None:
    network, images = nn.Sequential(NormAndActivation(3)).eval(), torch.randn(8, 3, 5, 5)
    expected = network(images)
    assert torch.equal(convert_ghost_batch_norm(network, GHOST)(images), expected)
    assert (expected == 0).any()


def test_norms_without_a_ghost_form_are_all_named() -> None:
    network = nn.Sequential(
        nn.BatchNorm3d(2), nn.Sequential(nn.BatchNorm2d(2, momentum=None)), nn.BatchNorm1d(2, affine=False)
    )
    with pytest.raises(ValueError, match="have no ghost form") as error:
        convert_ghost_batch_norm(network, GHOST)
    lines = [
        "0: BatchNorm3d is none of BatchNorm1d, BatchNorm2d",
        "1.0: has a cumulative average: give a momentum",
        "2: must have affine parameters and running statistics",
    ]
    assert all(line in str(error.value) for line in lines)
    assert isinstance(network[0], nn.BatchNorm3d)  # untouched


def test_other_dimensions_are_refused() -> None:
    with pytest.raises(ValueError, match=r"GhostBatchNorm1d takes 2 or 3 dimensions, got 4: \(4, 3, 2, 2\)"):
        GhostBatchNorm1d(3, GHOST)(torch.zeros(4, 3, 2, 2))
