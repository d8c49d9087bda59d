"""ShakeDrop: the formula of one block by hand, draws by sample, and the networks that have it."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hvd_batchgrow.data.order.splitmix import mix
from hvd_batchgrow.job_file import parse_job
from hvd_batchgrow.messages.errors import JobError
from hvd_batchgrow.nn.build import build_model
from hvd_batchgrow.nn.dropout import KeyedDropout
from hvd_batchgrow.nn.keyed_random import KeyedModule, keyed_modules, sample_keys, set_sample_keys
from hvd_batchgrow.nn.layers import PreActivationBlock
from hvd_batchgrow.nn.shakedrop import ShakeDrop
from tests.helpers import job_tree

STEP = 0x9E3779B97F4A7C15


def keys(n: int, seed: int = 3, epoch: int = 0) -> Tensor:
    return sample_keys(seed, np.full(n, epoch), np.arange(n))


def uniforms(of: Tensor, place: int) -> NDArray[np.float64]:
    """The three numbers of each sample in the module of an index: top 24 bits of hashes of hashed keys."""
    hashed = mix(of.numpy().view(np.uint64) + np.uint64((STEP * (place << 32) - STEP) % 2**64))  # mix adds a step
    counters = np.uint64(STEP) * np.arange(3, dtype=np.uint64)
    return (mix(hashed[:, None] + counters) >> np.uint64(40)).astype(np.float64) / 2**24


def factors(of: Tensor, place: int, p: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """b + α - bα and b + β - bβ of each sample."""
    u = uniforms(of, place)
    b, alpha, beta = (u[:, 0] >= p).astype(float), 2 * u[:, 1] - 1, u[:, 2]
    return b + alpha - b * alpha, b + beta - b * beta


def scaled(x: Tensor, of: Tensor, module: ShakeDrop) -> Tensor:
    set_sample_keys([module], of)
    out: Tensor = module(x)
    return out


def test_a_block_is_the_formula_in_both_passes() -> None:
    """G(x) = x + f F(x) with F(x) = W x. The gradients are g + f' Wᵀ g and Σ f' g xᵀ, with β in f' instead of α."""
    n, p = 40, 0.6
    generator = np.random.default_rng(1)
    x, g, w = (generator.normal(size=size) for size in ((n, 3), (n, 3), (3, 3)))
    linear, first, second = nn.Linear(3, 3, bias=False), ShakeDrop(0.3), ShakeDrop(p)
    linear.weight.data = torch.from_numpy(w).float()
    block = PreActivationBlock(nn.Identity(), nn.Sequential(linear, second), None)
    of = keys(n)
    set_sample_keys([first, second], of)
    inputs = torch.from_numpy(x).float().requires_grad_()
    y = block(inputs)
    y.backward(torch.from_numpy(g).float())
    forward, backward = factors(of, 1, p)
    assert len({*np.round(forward, 6)}) > 10  # some samples have α, others 1
    assert (forward == 1).any()
    assert (forward < 0).any()
    np.testing.assert_allclose(y.detach(), x + forward[:, None] * (x @ w.T), rtol=1e-5, atol=1e-5)
    assert inputs.grad is not None
    assert linear.weight.grad is not None
    np.testing.assert_allclose(inputs.grad, g + backward[:, None] * (g @ w), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(linear.weight.grad, (backward[:, None] * g).T @ x, rtol=1e-4, atol=1e-5)


def test_the_draws_have_their_distributions_and_the_factor_its_expectation() -> None:
    n, p, module = 20_000, 0.3, ShakeDrop(0.3)
    x = torch.ones(n, 1, requires_grad=True)
    y = scaled(x, keys(n), module)
    y.sum().backward()
    assert x.grad is not None
    forward, backward = y.detach().flatten(), x.grad.flatten()
    perturbed = forward != 1
    assert abs(float(perturbed.double().mean()) - p) < 4 * (p * (1 - p) / n) ** 0.5
    assert torch.equal(backward != 1, perturbed)
    for values, low in ((forward[perturbed], -1), (backward[perturbed], 0)):
        assert low <= float(values.min()) < low + 0.01
        assert 0.99 < float(values.max()) < 1
        spread = (1 - low) / 12**0.5
        assert abs(float(values.mean()) - (low + 1) / 2) < 4 * spread / len(values) ** 0.5
        assert float(values.std()) == pytest.approx(spread, rel=0.03)
    correlation = torch.corrcoef(torch.stack((forward[perturbed], backward[perturbed])))[0, 1]
    assert abs(float(correlation)) < 4 / int(perturbed.sum()) ** 0.5
    expected = module.eval()(torch.ones(1, 1))
    assert float(expected) == pytest.approx(1 - p)
    assert abs(float(forward.double().mean()) - (1 - p)) < 4 * float(forward.std()) / n**0.5


def test_a_factor_is_that_of_the_whole_sample() -> None:
    y = scaled(torch.ones(64, 3, 4, 5), keys(64), ShakeDrop(0.8)).flatten(1)
    assert torch.equal(y.amin(1), y.amax(1))
    assert len(y[:, 0].unique()) > 40


def test_any_division_and_order_of_the_samples_draws_the_same() -> None:
    x, of, module = torch.randn(12, 5, 4, 3), keys(12), ShakeDrop(0.7)
    whole = scaled(x, of, module)
    assert torch.equal(torch.cat([scaled(x[k : k + 4], of[k : k + 4], module) for k in (0, 4, 8)]), whole)
    order = torch.randperm(12)
    assert torch.equal(scaled(x[order], of[order], module), whole[order])


def test_seed_epoch_and_place_each_change_the_draws() -> None:
    x, first, second = torch.ones(8, 1), ShakeDrop(0.9), ShakeDrop(0.9)
    set_sample_keys([first, second], keys(8))
    drawn = [first(x), second(x), scaled(x, keys(8, seed=4), first), scaled(x, keys(8, epoch=1), first)]
    assert len({part.numpy().tobytes() for part in drawn}) == len(drawn)


def test_without_keys_it_draws_from_torchs_generator_and_other_keys_are_refused() -> None:
    x, module = torch.ones(50, 2), ShakeDrop(0.9)
    torch.manual_seed(1)
    first = module(x)
    torch.manual_seed(1)
    assert torch.equal(module(x), first)
    assert not torch.equal(module(x), first)
    with pytest.raises(ValueError, match="ShakeDrop got an input whose first dimension is 6, for 4 samples: "):
        scaled(torch.ones(6, 2), keys(4), module)
    with pytest.raises(ValueError, match=r"p = 1 must be in \[0, 1\)"):
        ShakeDrop(1)


def test_an_empty_batch_stays_empty() -> None:
    x = torch.zeros(0, 3, 2, 2, requires_grad=True)
    for of in (keys(0), None):
        module = ShakeDrop(0.5)
        set_sample_keys([module], of)
        y = module(x)
        assert y.shape == x.shape
        y.sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_type_of_the_residual_stays(dtype: torch.dtype) -> None:
    y = scaled(torch.ones(20, 2, dtype=dtype), keys(20), ShakeDrop(0.9))
    assert y.dtype == dtype
    torch.testing.assert_close(y[:, 0].double(), torch.from_numpy(factors(keys(20), 0, 0.9)[0]), rtol=8e-3, atol=1e-6)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_an_activation_checkpoint_repeats_the_draws(use_reentrant: bool) -> None:
    linear, module, x = nn.Linear(3, 3), ShakeDrop(0.9), torch.randn(8, 3, requires_grad=True)
    block = nn.Sequential(linear, module, nn.Tanh())
    gradients = []
    for repeated in (False, True):
        set_sample_keys([module], keys(8))
        y = checkpoint(block, x, use_reentrant=use_reentrant) if repeated else block(x)
        gradients.append(torch.autograd.grad(y.sum(), linear.weight) if not repeated else _backward(y, linear.weight))
    assert torch.equal(gradients[0][0], gradients[1][0])


def _backward(y: Tensor, weight: Tensor) -> tuple[Tensor]:
    """Reentrant checkpoints support `backward` only."""
    y.sum().backward()
    assert weight.grad is not None
    return (weight.grad,)


def test_a_checkpoint_of_one_that_is_used_twice_is_refused() -> None:
    module = ShakeDrop(0.5)
    set_sample_keys([module], keys(8))
    y = checkpoint(lambda x: module(module(x).tanh()), torch.randn(8, 3, requires_grad=True), use_reentrant=False)
    with pytest.raises(ValueError, match="give each place its own ShakeDrop module"):
        y.sum().backward()


# --- networks ------------------------------------------------------------------------------------


def build(name: str, **model: Any) -> nn.Module:
    torch.manual_seed(3)
    job = parse_job({**job_tree(), "model": {"name": name, "ghost_batch": 4, **model}})
    return build_model(job, (8, 8, 3), 5)


@pytest.mark.parametrize(("name", "num_blocks"), [("wrn_16_1", 6), ("wrn_10_1", 3), ("resnet20", 9), ("resnet8", 3)])
def test_the_probability_rises_linearly_to_that_of_the_last_block(name: str, num_blocks: int) -> None:
    model, without = build(name, shakedrop=0.6), build(name)
    found = [module for module in keyed_modules(model) if isinstance(module, ShakeDrop)]
    assert [module.p for module in found] == pytest.approx([0.6 * (k + 1) / num_blocks for k in range(num_blocks)])
    assert not keyed_modules(without)
    state = without.state_dict()
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[path]) for path, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["wrn_10_1", "resnet8"])
def test_a_network_scales_the_residual_of_each_block(name: str) -> None:
    """In training, by the factors of its place; in evaluation, by 1 - p."""
    model, x = build(name, shakedrop=0.9), torch.randn(8, 3, 8, 8)
    blocks = [module for module in model.modules() if hasattr(module, "residual")]
    assert len(blocks) == 3
    seen: list[tuple[Tensor, Tensor]] = []
    for module in keyed_modules(model):
        module.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output)))
    set_sample_keys(keyed_modules(model), keys(8))
    model(x)
    assert len(seen) == 3
    for place, (residual, output) in enumerate(seen):
        expected = torch.from_numpy(factors(keys(8), place, 0.9 * (place + 1) / 3)[0]).float()
        torch.testing.assert_close(output, residual * expected.view(-1, 1, 1, 1))
    seen.clear()
    model.eval()(x)
    assert len(seen) == 3
    for place, (residual, output) in enumerate(seen):
        torch.testing.assert_close(output, residual * (1 - 0.3 * (place + 1)))


def test_dropout_and_shakedrop_draw_independently() -> None:
    model = build("wrn_10_1", shakedrop=0.5, dropout=0.3)
    kinds: list[type[KeyedModule]] = [type(module) for module in keyed_modules(model)]
    assert kinds == [KeyedDropout, ShakeDrop] * 3
    set_sample_keys(keyed_modules(model), keys(4))
    assert [module._place for module in keyed_modules(model)] == [*range(6)]


@pytest.mark.filterwarnings("ignore")  # warnings of the compiler
def test_a_compiled_network_computes_the_same() -> None:
    plain, compiled = build("resnet8", shakedrop=0.9), build("resnet8", shakedrop=0.9)
    # Without the C++ compiler, which takes minutes.
    compiled._compiled_call_impl = torch.compile(compiled._call_impl, backend="aot_eager")
    x = torch.randn(8, 3, 8, 8)
    for model in (plain, compiled):
        set_sample_keys(keyed_modules(model), keys(8))
        model(x).square().sum().backward()
    for ours, theirs in zip(compiled.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["small_conv_net", "alexnet", "vgg11_bn", "dense7", "mynets:build"])
def test_a_network_without_residual_blocks_of_this_package_is_refused(name: str) -> None:
    users = "resnetD of depth D = 6n+2, wrn_D_K of depth D = 6n+4"
    with pytest.raises(JobError, match=re.escape(f"model.shakedrop: is not used by '{name}', but by {users}")):
        build(name, shakedrop=0.5)


def test_a_probability_of_1_is_refused() -> None:
    with pytest.raises(JobError, match=r"model.shakedrop: must be less than 1, got 1.0"):
        build("resnet8", shakedrop=1.0)
