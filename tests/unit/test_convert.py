from __future__ import annotations

import copy
import importlib
import importlib.util

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from hvd_batchgrow.nn.ghost.convert import GhostBatchNormAct2d, convert_ghost_batch_norm, fuse_relu
from hvd_batchgrow.nn.ghost.ghost_batch_norm import GhostBatchNorm, GhostBatchNorm1d, GhostBatchNorm2d, ghost_norms
from hvd_batchgrow.nn.ghost.running_statistics import (
    reestimate_running_statistics,
    set_running_statistics,
    sum_statistics,
)
from hvd_batchgrow.torchvision_shim import import_torchvision

GHOST = 4


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Draw the same numbers in each run, whatever other tests have drawn."""
    torch.manual_seed(0)


class BatchNormAct2d(nn.BatchNorm2d):
    """Like timm's, with its name and children."""

    drop: nn.Module
    act: nn.Module

    def __init__(self, num_features: int) -> None:
        super().__init__(num_features)
        self.drop, self.act = nn.Dropout(0.5), nn.PReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))  # type: ignore[no-any-return]


BatchNormAct2d.__module__ = "timm.layers.norm_act"


class Frozen(nn.Module):
    """Like FrozenBatchNorm2d of torchvision and timm, which is not a subclass of `_BatchNorm`."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 2


def make_network() -> nn.Sequential:
    torch.manual_seed(0)
    shared = nn.BatchNorm2d(3, eps=1e-3, momentum=0.2)
    block = nn.Sequential(shared, BatchNormAct2d(3), Frozen(), shared)
    head = nn.Sequential(nn.Flatten(), nn.Linear(108, 5), nn.BatchNorm1d(5, affine=False))
    network = nn.Sequential(nn.Conv2d(3, 3, 3), shared, nn.ReLU(inplace=True), block, head)
    for parameter in network.parameters():
        nn.init.normal_(parameter)
    for _ in range(3):  # so that the running statistics differ from their initial values
        network(torch.randn(8, 3, 8, 8))
    return network


def test_the_converted_network_evaluates_to_the_same_outputs() -> None:
    images = torch.randn(6, 3, 8, 8)
    expected = make_network().eval()(images)
    assert torch.equal(convert_ghost_batch_norm(make_network().eval(), GHOST)(images), expected)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("drop", [nn.Identity(), nn.Dropout(0.5)])
def test_the_relu_of_a_norm_with_activation_may_be_its_own(training: bool, drop: nn.Module) -> None:
    plain = BatchNormAct2d(3)
    plain.drop, plain.act = drop, nn.ReLU()
    ghost = convert_ghost_batch_norm(plain, GHOST).train(training)
    x = torch.randn(8, 3, 5, 5)
    bare = GhostBatchNorm2d(3, GHOST).train(training)
    torch.manual_seed(3)
    y = ghost(x)
    torch.manual_seed(3)
    assert torch.equal(y, drop(bare(x)).relu())
    watched = []
    ghost.get_submodule("act").register_forward_hook(lambda *_: watched.append(1))
    ghost(x)
    assert watched


def make_sequences() -> nn.Sequential:
    torch.manual_seed(0)
    shared, watched = GhostBatchNorm2d(3, GHOST), nn.ReLU()
    watched.register_forward_hook(lambda *_: None)
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 3, 3), GhostBatchNorm2d(3, GHOST), nn.ReLU(inplace=True), nn.Conv2d(3, 3, 1)),
        nn.Sequential(shared, nn.ReLU(), shared),
        nn.Sequential(GhostBatchNorm2d(3, GHOST), watched, nn.Flatten(), nn.LazyLinear(5)),
        nn.Sequential(GhostBatchNorm1d(5, GHOST), nn.ReLU(), nn.ReLU()),
    )


def test_sequences_with_fused_relus_give_the_same_outputs() -> None:
    x, upstream = torch.randn(8, 3, 8, 8), torch.randn(8, 5)
    network, plain = make_sequences(), make_sequences()
    plain(x), network(x)  # the lazy layer
    network.load_state_dict(plain.state_dict())
    assert fuse_relu(network) is network
    assert [name for name, norm in network.named_modules() if getattr(norm, "relu", False)] == ["0.1", "3.0"]
    assert [name for name, module in network.named_modules() if isinstance(module, nn.ReLU)] == ["1.1", "2.1", "3.2"]
    assert network.state_dict().keys() == plain.state_dict().keys()
    of = [torch.autograd.grad(each(x), list(each.parameters()), upstream) for each in (network, plain)]
    assert all(map(torch.equal, *of))
    assert torch.equal(network(x), plain(x))
    assert torch.equal(network.eval()(x), plain.eval()(x))


def test_in_training_each_ghost_batch_is_normalized_alone() -> None:
    network, plain = (make_network().requires_grad_(True) for _ in range(2))
    for each in (network, plain):
        drop = each.get_submodule("3.1.drop")
        assert isinstance(drop, nn.Dropout)
        drop.p = 0.0
    convert_ghost_batch_norm(network, GHOST)
    images = torch.randn(8, 3, 8, 8)
    y, expected = network(images), torch.cat([plain(chunk) for chunk in images.split(GHOST)])
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    upstream = torch.randn(8, 5)
    of_y, of_expected = (
        torch.autograd.grad(o, list(n.parameters()), upstream) for o, n in ((y, network), (expected, plain))
    )
    torch.testing.assert_close(of_y, of_expected, rtol=1e-3, atol=1e-3)


def test_norms_keep_their_tensors_and_stay_shared() -> None:
    network = make_network()
    network[1].weight.requires_grad_(False)
    network.get_submodule("3.1").eval()
    parameters = list(network.parameters())
    state = {name: value for name, value in network.state_dict().items() if "tracked" not in name}
    assert convert_ghost_batch_norm(network, GHOST) is network
    block = network[3]
    assert isinstance(block, nn.Sequential)
    assert network[1] is block[0] is block[3]
    assert isinstance(block[2], Frozen)
    norms = list(ghost_norms(network))
    assert [type(norm) for norm in norms] == [GhostBatchNorm2d, GhostBatchNormAct2d, GhostBatchNorm1d]
    settings = [(norm.ghost_batch, norm.eps, norm.momentum, norm.training, norm.affine) for norm in norms]
    assert settings == [(4, 1e-3, 0.2, True, True), (4, 1e-5, 0.1, False, True), (4, 1e-5, 0.1, True, False)]
    assert [p.requires_grad for p in norms[0].parameters()] == [False, True]
    assert all(a is b for a, b in zip(network.parameters(), parameters, strict=True)), "an optimizer knows them"
    assert network.state_dict().keys() == state.keys()
    assert all(torch.equal(network.state_dict()[name], value) for name, value in state.items())


def test_a_norm_alone_with_a_momentum_given() -> None:
    plain = nn.BatchNorm1d(3, momentum=None, device="meta", dtype=torch.float64)
    converted = convert_ghost_batch_norm(plain, GHOST, momentum=0.3)
    assert isinstance(converted, GhostBatchNorm1d)
    assert converted.momentum == 0.3
    assert {(t.device.type, t.dtype) for t in (converted.weight, converted.running_var)} == {("meta", torch.float64)}  # type: ignore[union-attr]


@pytest.mark.parametrize("shape", [(8, 3), (8, 3, 5), (8, 3, 5, 5)])
def test_a_converted_sync_batch_norm_accepts_the_same_shapes(shape: tuple[int, ...]) -> None:
    converted = convert_ghost_batch_norm(nn.SyncBatchNorm(3), GHOST)
    assert type(converted) is GhostBatchNorm
    kind = nn.BatchNorm2d if len(shape) == 4 else nn.BatchNorm1d
    x, plain = torch.randn(shape), kind(3)
    torch.testing.assert_close(converted(x), torch.cat([plain(chunk) for chunk in x.split(GHOST)]), rtol=0, atol=1e-5)


def test_norms_without_a_bias_are_converted() -> None:
    plain, x = nn.BatchNorm2d(3, bias=False), torch.randn(8, 3, 5, 5)
    nn.init.normal_(plain.weight)
    expected = torch.cat([plain(chunk) for chunk in x.split(GHOST)])
    (of_weight,) = torch.autograd.grad(expected.pow(3).sum(), plain.weight)
    # Σ 3 w² x̂³ has 200 terms of both signs: its rounding is that of Σ |3 w² x̂³|, and may be larger than the sum.
    size = (3 * expected.detach().abs().pow(3)).sum((0, 2, 3)) / plain.weight.detach().abs()
    converted = convert_ghost_batch_norm(plain, GHOST)
    y = converted(x)
    torch.testing.assert_close(y, expected)
    (found,) = torch.autograd.grad(y.pow(3).sum(), [*converted.parameters()])
    assert ((found - of_weight).abs() <= 4 * torch.finfo(torch.float32).eps * size).all()


class NormsInEvaluation(nn.Module):
    """Keeps norms in evaluation mode: the first by its name, others by their class, as mmcv's `norm_eval` does."""

    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.kind = kind
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(144, 5), nn.BatchNorm1d(5))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stem(x))  # type: ignore[no-any-return]

    def train(self, mode: bool = True) -> NormsInEvaluation:
        super().train(mode)
        self.stem[1].eval()
        for module in self.modules():
            if isinstance(module, self.kind):
                module.eval()
        return self


@pytest.mark.parametrize(
    ("kind", "trained"),
    [(_BatchNorm, []), (nn.BatchNorm1d, []), (nn.LayerNorm, ["head.2.running_mean", "head.2.running_var"])],
    ids=str,
)
def test_norms_that_the_network_keeps_in_evaluation_stay_there(kind: type[nn.Module], trained: list[str]) -> None:
    """One ghost batch, so torch's norms are the reference. The defect: ghost norms are of no class that they know."""
    plain, images = NormsInEvaluation(kind), torch.randn(GHOST, 3, 8, 8) + 1
    first = {name: value.clone() for name, value in plain.state_dict().items()}
    ghost = convert_ghost_batch_norm(copy.deepcopy(plain), GHOST)
    torch.testing.assert_close(ghost.train()(images), plain.train()(images))
    found, expected = ghost.state_dict(), plain.state_dict()
    torch.testing.assert_close(found, {name: expected[name] for name in found})
    assert [name for name, value in found.items() if not torch.equal(value, first[name])] == trained
    before = {name: value.clone() for name, value in found.items()}
    sums, counts = sum_statistics(ghost, [images, images], lambda statistics: statistics.sum(0))
    assert counts.tolist() == [0, 2 if trained else 0]
    if trained:
        set_running_statistics(ghost, sums, counts)
        inputs = ghost.head[:2](ghost.stem(images))  # type: ignore[index, operator]
        torch.testing.assert_close(ghost.get_buffer("head.2.running_mean"), inputs.mean(0))
    assert all(torch.equal(value, before[name]) for name, value in ghost.state_dict().items() if name not in trained)
    assert not any(module.training for module in ghost.eval().modules())


def test_a_norm_that_the_network_keeps_in_training_is_refused() -> None:
    class Adapting(nn.Sequential):
        def train(self, mode: bool = True) -> Adapting:
            super().train(mode)
            self[1].train()
            return self

    with pytest.raises(ValueError, match=r"\n  1: is in training mode when the network is evaluated, where a ghost"):
        convert_ghost_batch_norm(Adapting(nn.Linear(3, 3), nn.BatchNorm1d(3)), GHOST)


def test_all_norms_that_cannot_be_converted_are_named() -> None:
    class Odd(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 1

    class Still(nn.BatchNorm2d):
        def train(self, mode: bool = True) -> Still:
            return super().train(False)

    silenced, twins = nn.BatchNorm2d(2).eval(), [nn.BatchNorm2d(2), nn.BatchNorm2d(2)]
    silenced.train = lambda mode=True: silenced  # type: ignore[method-assign]
    twins[1].running_mean = twins[0].running_mean
    hooked = nn.BatchNorm1d(2)
    hooked.register_forward_hook(lambda *_: None)
    network = nn.Sequential(
        nn.BatchNorm3d(2),
        nn.Sequential(nn.BatchNorm2d(2), nn.BatchNorm2d(2, momentum=None)),
        nn.BatchNorm1d(2, track_running_stats=False),
        nn.LazyBatchNorm1d(),
        Odd(2),
        hooked,
        nn.BatchNorm2d(2, momentum=2.0),
        parametrize.register_parametrization(nn.BatchNorm2d(2), "weight", nn.Softplus()),
        Still(2),
        silenced,
        *twins,
    )
    lines = [
        "these norms cannot be converted to ghost norms:",
        "0: is a BatchNorm3d; ghost norms are for inputs of 2 to 4 dimensions",
        "1.1: averages over all batches (momentum=None); give a momentum",
        "2: has no running statistics (track_running_stats=False)",
        "3: is uninitialized; call the model once",
        "4: is a Odd, which overrides forward() and is not timm's BatchNormAct2d",
        "5: has hooks, which would be lost",
        "6: has momentum 2.0; a ghost norm's must be in [0, 1]",
        "7: has parametrized weights, which would be lost",
        "8: overrides train() or forward(), which would be lost; do that in the network around it",
        "9: overrides train() or forward(), which would be lost; do that in the network around it",
        "10: shares the running statistics of another norm; use separate ones",
        "11: shares the running statistics of another norm; use separate ones",
    ]
    with pytest.raises(ValueError, match="cannot be converted") as error:
        convert_ghost_batch_norm(network, GHOST)
    assert str(error.value).split("\n  ") == lines
    with pytest.raises(ValueError, match="ghost_batch = 0 must be"):
        convert_ghost_batch_norm(network, 0)
    assert not list(ghost_norms(network)), "untouched"


class ActFirst(nn.BatchNorm2d):
    """Activation, dropout and norm in another order than timm's, with its children."""

    drop: nn.Module
    act: nn.Module

    def __init__(self, num_features: int) -> None:
        super().__init__(num_features)
        self.drop, self.act = nn.Identity(), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.drop(self.act(x)))


class ActAgain(BatchNormAct2d):
    """A subclass of timm's norm with another forward."""

    def forward(self, x: Tensor) -> Tensor:
        return self.act(super().forward(x))  # type: ignore[no-any-return]


class Named(BatchNormAct2d):
    """A subclass of timm's norm with its forward."""


@pytest.mark.parametrize("kind", [ActFirst, ActAgain])
def test_a_users_norm_with_the_children_of_timms_is_not_taken_for_it(kind: type[nn.Module]) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), kind(4))
    with pytest.raises(ValueError, match=f"1: is a {kind.__name__}, which overrides forward.. and is not timm's"):
        convert_ghost_batch_norm(network, GHOST)


def test_a_subclass_of_timms_norm_with_its_forward_is_converted() -> None:
    assert isinstance(convert_ghost_batch_norm(Named(4), GHOST), GhostBatchNormAct2d)


@pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="needs timm")
def test_timms_own_norm_is_converted() -> None:
    import_torchvision()
    norm_act = importlib.import_module("timm.layers.norm_act")
    torch.manual_seed(0)
    norm, x = norm_act.BatchNormAct2d(3), torch.randn(GHOST, 3, 5, 5)
    expected = norm(x)
    for plain in (norm, norm_act.convert_sync_batchnorm(norm)):
        ghost = convert_ghost_batch_norm(plain, GHOST)
        assert type(ghost) is GhostBatchNormAct2d
        torch.testing.assert_close(ghost(x), expected)


def test_running_statistics_can_be_averages_under_the_current_weights() -> None:
    torch.manual_seed(0)
    norm, later = GhostBatchNorm1d(3, GHOST).double(), GhostBatchNorm1d(3, GHOST).double()
    unused, other = GhostBatchNorm1d(3, GHOST), nn.BatchNorm1d(3).double()
    idle = nn.Identity()
    idle.norm = unused
    model = nn.Sequential(norm, nn.Dropout(0.5), other, idle, later)
    later.eval()
    modes = [module.training for module in model.modules()]
    batches = [torch.randn(n, 3, dtype=torch.float64) * 2 + 1 for n in (8, 4)]
    reestimate_running_statistics(model, iter(batches))
    chunks = torch.stack(torch.cat(batches).split(GHOST))
    torch.testing.assert_close(norm.running_mean, chunks.mean((0, 1)))
    torch.testing.assert_close(norm.running_var, chunks.var(1).mean(0))
    # Its input has ghost batches of mean 0 and variance v/(v + eps), which `other` divides by its running 1 + eps.
    v = chunks.var(1, correction=0)
    torch.testing.assert_close(later.running_mean, torch.zeros(3, dtype=torch.float64))
    torch.testing.assert_close(later.running_var, (v / (v + 1e-5) * 4 / 3 / (1 + 1e-5)).mean(0))
    assert (unused.running_mean.tolist(), other.get_buffer("running_mean").tolist()) == ([0] * 3, [0] * 3)
    assert [module.training for module in model.modules()] == modes
    assert not any(n.deferred or n._pending for n in ghost_norms(model))


def test_no_batches_are_an_error_and_a_failed_batch_leaves_no_statistics() -> None:
    model = nn.Sequential(GhostBatchNorm1d(3, GHOST), GhostBatchNorm1d(3, 3))
    with pytest.raises(ValueError, match="no batch has reached any of 2 ghost norms"):
        reestimate_running_statistics(model, [])
    with pytest.raises(ValueError, match=r"4 samples are 1\.33 ghost batches of 3"):
        reestimate_running_statistics(model, [torch.randn(12, 3), torch.randn(4, 3)])
    assert model.get_buffer("0.running_mean").tolist() == [0] * 3
    assert not any(norm.deferred or norm._pending for norm in ghost_norms(model))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet50", "inception_resnet_v2"])
def test_converted_networks_of_timm_are_bit_identical_in_evaluation_and_train(name: str) -> None:
    try:
        from hvd_batchgrow.torchvision_shim import import_torchvision

        import_torchvision()
    except ImportError:
        pytest.skip("torchvision is not installed")
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    network = timm.create_model(name, num_classes=3).eval()
    for norm in (module for module in network.modules() if isinstance(module, nn.BatchNorm2d)):
        nn.init.normal_(norm.get_buffer("running_mean"), std=0.1)
        nn.init.uniform_(norm.get_buffer("running_var"), 0.5, 2)
    images = torch.randn(4, 3, 96, 96)
    with torch.no_grad():
        expected = network(images)
        assert torch.equal(convert_ghost_batch_norm(network, 2)(images), expected)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in network.modules())
    network.train()(images).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())
