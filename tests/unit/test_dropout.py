"""Keyed dropout: what it drops depends only on the sample's key."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hvd_batchgrow.data.order.splitmix import mix
from hvd_batchgrow.nn import keyed_random
from hvd_batchgrow.nn.checks.layout_hazards import layout_hazards
from hvd_batchgrow.nn.dropout import KeyedDropout, Unit, convert_dropout
from hvd_batchgrow.nn.keyed_random import keyed_modules, sample_keys, set_sample_keys


def keys(n: int, seed: int = 3, epoch: int = 0) -> Tensor:
    return sample_keys(seed, np.full(n, epoch), np.arange(n))


def dropped(x: Tensor, of: Tensor, module: KeyedDropout | None = None) -> Tensor:
    module = module or KeyedDropout(0.4)
    set_sample_keys([module], of)
    out: Tensor = module(x)
    return out


def test_the_generator_gives_the_published_numbers() -> None:
    # reference output of SplitMix64 from state 1234567
    states = [1234567 + (k + 1) * 0x9E3779B97F4A7C15 for k in range(3)]
    found = keyed_random._mix(torch.tensor([keyed_random._signed(state) for state in states]))
    assert [int(value) % 2**64 for value in found] == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_the_generator_is_the_one_of_the_order_digest() -> None:
    states = np.random.default_rng(0).integers(0, 2**64, 1000, dtype=np.uint64)
    stepped = torch.from_numpy((states + np.uint64(0x9E3779B97F4A7C15)).view(np.int64))
    np.testing.assert_array_equal(keyed_random._mix(stepped).numpy().view(np.uint64), mix(states))


@pytest.mark.parametrize("p", [1e-9, 2**-24, 0.1, 1 / 3, 0.5, 0.7, 1 - 1e-9])
def test_what_stays_is_that_of_the_formula(p: float) -> None:
    """Calls 0 and 1 of the second dropout: the top 24 bits of hashes of hashed keys, as float32 numbers in [0, 1)."""
    of, modules = keys(50), [KeyedDropout(p) for _ in range(2)]
    set_sample_keys(modules, of)
    step = 0x9E3779B97F4A7C15
    for call in range(2):
        found = modules[1](torch.ones(50, 400)).numpy() > 0
        # mix adds a step itself
        hashed = mix(of.numpy().view(np.uint64) + np.uint64(step * ((1 << 32) + call - 1) % 2**64))
        bits = mix(hashed[:, None] + np.uint64(step) * np.arange(400, dtype=np.uint64)) >> np.uint64(40)
        np.testing.assert_array_equal(found, bits.astype(np.float32) / np.float32(2**24) >= np.float32(p))


@pytest.mark.parametrize("p", [*np.random.default_rng(0).random(200).tolist(), 1e-7, 3e-8, 0.5, 0.25, 1 - 2**-24])
def test_the_least_number_that_stays_is_the_first_that_is_not_below_p(
    p: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    fewest = keyed_random.fewest_bits(p)
    around = np.array([fewest - 1, fewest])
    stays = (np.float32(2**-24) * around.astype(np.float32) >= np.float32(p)).tolist()
    hashes = torch.from_numpy(around.astype(np.uint64) << np.uint64(40)).view(torch.int64)
    monkeypatch.setattr(keyed_random, "_scramble", lambda states: hashes.expand_as(states).clone())
    module = KeyedDropout(p)
    module._keys = module._keys_of_place = torch.zeros(1, dtype=torch.int64)
    assert (module(torch.ones(1, 2))[0] > 0).tolist() == stays == [False, True]


@pytest.mark.parametrize("unit", ["value", "channel", "sample"])
def test_any_division_and_order_of_the_samples_drops_the_same(unit: Unit) -> None:
    x, of = torch.randn(12, 5, 4, 3), keys(12)
    module = KeyedDropout(0.4, unit)
    whole = dropped(x, of, module)
    parts = torch.cat([dropped(x[k : k + 4], of[k : k + 4], module) for k in (0, 4, 8)])
    assert torch.equal(parts, whole)
    order = torch.randperm(12)
    assert torch.equal(dropped(x[order], of[order], module), whole[order])


def test_seed_epoch_place_and_call_each_change_what_is_dropped() -> None:
    x = torch.ones(8, 100)
    first, second = KeyedDropout(0.5), KeyedDropout(0.5)
    set_sample_keys([first, second], keys(8))
    masks = [first(x), first(x), second(x), dropped(x, keys(8, seed=4)), dropped(x, keys(8, epoch=1))]
    assert len({mask.numpy().tobytes() for mask in masks}) == len(masks)
    set_sample_keys([first, second], keys(8))
    assert torch.equal(first(x), masks[0])


def test_the_dropped_fraction_is_p_and_the_rest_is_scaled() -> None:
    y = dropped(torch.ones(400, 500), keys(400), KeyedDropout(0.3))
    assert y.unique().tolist() == [0.0, pytest.approx(1 / 0.7)]
    share = (y == 0).double()
    std = (0.3 * 0.7) ** 0.5
    assert abs(share.mean() - 0.3) < 4 * std / (400 * 500) ** 0.5
    # no sample and no position is dropped more often than another
    assert abs(share.mean(1).std() / (std / 500**0.5) - 1) < 0.15
    assert abs(share.mean(0).std() / (std / 400**0.5) - 1) < 0.15


def test_a_unit_is_dropped_as_a_whole() -> None:
    x = torch.ones(64, 6, 5, 5)
    by_channel = dropped(x, keys(64), KeyedDropout(0.5, "channel")).flatten(2)
    assert torch.equal(by_channel.amin(2), by_channel.amax(2))
    by_sample = dropped(x, keys(64), KeyedDropout(0.5, "sample", rescale=False)).flatten(1)
    assert torch.equal(by_sample.amin(1), by_sample.amax(1))
    assert set(by_sample.unique().tolist()) == {0.0, 1.0}


def test_the_gradient_is_that_of_what_was_kept() -> None:
    x = torch.randn(4, 50, requires_grad=True)
    y = dropped(x, keys(4))
    y.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, torch.where(y == 0, 0.0, 1 / 0.6))


def test_a_converted_module_changes_its_input_as_before() -> None:
    module = convert_dropout(nn.Dropout(0.5, inplace=True))
    for kind in (nn.Dropout1d, nn.Dropout2d, nn.Dropout3d):
        assert convert_dropout(kind(0.5, inplace=True)).inplace
    x = torch.ones(50, 400)
    result = dropped(x, keys(50), module)  # type: ignore[arg-type]
    assert result is x
    assert torch.equal(x, dropped(torch.ones(50, 400), keys(50), KeyedDropout(0.5)))
    assert set(x.unique().tolist()) == {0.0, 2.0}
    leaf = torch.ones(3, 4, requires_grad=True)
    hidden = leaf * 1
    dropped(hidden, keys(3), module)  # type: ignore[arg-type]
    hidden.sum().backward()
    assert torch.equal(leaf.grad, hidden)  # type: ignore[arg-type]


def test_without_keys_it_draws_from_torchs_generator_and_in_evaluation_not_at_all() -> None:
    x, module = torch.ones(4, 50), KeyedDropout(0.4)
    torch.manual_seed(1)
    first = module(x)
    torch.manual_seed(1)
    assert torch.equal(module(x), first)
    assert not torch.equal(module(x), first)
    assert module.eval()(x) is x


def test_keys_of_other_samples_are_refused() -> None:
    with pytest.raises(
        ValueError,
        match=r"^dropout got an input whose first dimension is 6, for 4 samples: the first dimension must be the "
        r"sample, so use batch_first=True, transpose after the dropout, or reshape to",
    ):
        dropped(torch.ones(6, 2), keys(4))
    with pytest.raises(ValueError, match="p = 1"):
        KeyedDropout(1)


# --- dropout of other libraries --------------------------------------------------------------------------------


class DropPath(nn.Module):
    """Like timm's, with its name and attributes."""

    def __init__(self, drop_prob: float, scale_by_keep: bool = True) -> None:
        super().__init__()
        self.drop_prob, self.scale_by_keep = drop_prob, scale_by_keep


class StochasticDepth(nn.Module):
    """Like torchvision's."""

    def __init__(self, p: float, mode: str) -> None:
        super().__init__()
        self.p, self.mode = p, mode


DropPath.__module__, StochasticDepth.__module__ = "timm.layers.drop", "torchvision.ops.stochastic_depth"


class OwnDropout(nn.Dropout):
    """A subclass, which may behave differently."""


def test_known_dropouts_are_converted_and_others_are_not() -> None:
    shared = nn.Dropout(0.1)
    left = [nn.AlphaDropout(0.1), OwnDropout(0.1), StochasticDepth(0.1, "batch"), nn.Dropout(1.0)]
    known = [shared, nn.Dropout2d(0.2), DropPath(0.3, False), DropPath(0.35), StochasticDepth(0.4, "row"), shared]
    model = nn.Sequential(*known, *left).eval()
    assert convert_dropout(model) is model
    made = [(m.p, m.unit, m.rescale) for m in list(model)[:6] if isinstance(m, KeyedDropout) and not m.training]
    assert made == [
        (0.1, "value", True),
        (0.2, "channel", True),
        (0.3, "sample", False),
        (0.35, "sample", True),
        (0.4, "sample", True),
        (0.1, "value", True),
    ]
    assert list(model)[6:] == left
    assert model[0] is model[5]
    assert len(keyed_modules(model)) == 5
    assert isinstance(convert_dropout(nn.Dropout(0.5)), KeyedDropout)


def test_your_own_class_of_the_same_name_is_not_replaced() -> None:
    """The defect: in evaluation this one, of Huang et al. 2016, multiplies by 1 - p, and its replacement did not."""

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        return x * (torch.rand(len(x), 1) >= self.drop_prob) if self.training else x * (1 - self.drop_prob)  # type: ignore[operator]

    for like in (DropPath(0.5), StochasticDepth(0.5, "row")):
        kind = type(type(like).__name__, (nn.Module,), {"forward": forward, "drop_prob": 0.5, "p": 0.5, "mode": "row"})
        model = convert_dropout(nn.Sequential(kind())).eval()
        assert model(torch.ones(2, 1)).tolist() == [[0.5], [0.5]]


def test_dropout_with_hooks_or_its_own_methods_is_not_replaced() -> None:
    """The defect: the keyed dropout had no hooks. Now the random numbers are reported, as those of other modules."""
    hooked, own, pre = nn.Dropout(0.5), nn.Dropout(0.5), nn.Dropout2d(0.5)
    hooked.register_forward_hook(lambda module, inputs, output: output * 10)
    pre.register_forward_pre_hook(lambda module, inputs: None)
    own.forward = lambda input: input + 1  # type: ignore[method-assign]
    model = nn.Sequential(nn.Dropout(0.1), hooked, own, pre)
    convert_dropout(model)
    assert [type(module) for module in model] == [KeyedDropout, nn.Dropout, nn.Dropout, nn.Dropout2d]
    assert model[1:3].eval()(torch.ones(1)).tolist() == [11]
    assert layout_hazards(nn.Sequential(nn.Linear(6, 5), hooked, nn.Linear(5, 3)), (6,)) == [
        "1: random numbers that are not keyed by sample"
    ]


class OwnModes(nn.Sequential):
    """Sets the mode of its dropout modules by their class."""

    kept = False

    def train(self, mode: bool = True) -> OwnModes:
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.Dropout):
                module.train(self.kept)
        return self


def test_dropout_whose_mode_the_network_sets_keeps_it() -> None:
    """The defect: the network did not find the keyed dropout, so that it dropped in training."""
    model = OwnModes(nn.Dropout(0.5), nn.Dropout2d(0.5))
    convert_dropout(model)
    assert [type(module) for module in model] == [nn.Dropout, KeyedDropout]
    assert [module.training for module in model.train()] == [False, True]
    model = OwnModes(nn.Dropout(0.5))
    model.kept = True
    assert convert_dropout(model).eval()[0].training, "Monte Carlo dropout: random also in evaluation"  # type: ignore[index]


def test_a_schedule_of_drop_path_sets_the_probability_by_timms_name() -> None:
    module = convert_dropout(DropPath(0.1))
    assert isinstance(module, KeyedDropout)
    module.drop_prob = 0.9
    assert (module.p, module.drop_prob) == (0.9, 0.9)
    with pytest.raises(ValueError, match=r"p = 1 must be in \[0, 1\)"):
        module.drop_prob = 1
    assert module.p == 0.9
