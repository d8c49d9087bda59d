from __future__ import annotations

import io
import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from benchmarks.lars import loop, resnet50_shapes, timm_lars
from hvd_batchgrow.messages.errors import JobError
from hvd_batchgrow.optim import lars
from hvd_batchgrow.optim.build import build_optimizer, set_hyperparameters
from hvd_batchgrow.optim.lars import Lars
from hvd_batchgrow.optim.tensor_groups import parts_of_size
from hvd_batchgrow.schedule.plan import Plan, compile_plan
from hvd_batchgrow.schedule.transitions import describe_transitions
from tests.helpers import NUM_TRAIN, small_job

LRS = (0.5, 0.5, 0.1, 0.1, 0.3, 0.02)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def parameter(*shape: int, seed: int = 0) -> nn.Parameter:
    return nn.Parameter(drawn(*shape, seed=seed))


def steps(optimizer: torch.optim.Optimizer, lrs: Sequence[float], first: int = 0) -> None:
    """Run updates whose gradients depend only on the weights, the parameter and the update."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for update, lr in enumerate(lrs, start=first):
        for k, param in enumerate(params):
            noise = drawn(*param.shape, seed=100 * update + k)
            param.grad = (0.3 * param.detach() + noise).to(param.dtype)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()


# --- the formulas -------------------------------------------------------------------------------


@pytest.mark.parametrize(("decay", "eps"), [(0.0, 0.0), (0.02, 0.0), (0.02, 1.5)])
def test_updates_are_those_of_the_formulas_under_a_changing_rate(decay: float, eps: float) -> None:
    weight, momentum, eta = parameter(4, 3, 2), 0.8, 0.05
    optimizer = Lars([weight], LRS[0], momentum, decay, eta, eps)
    w: NDArray[np.float64] = weight.detach().numpy().copy()
    v, held = np.zeros_like(w), LRS[0]
    for update, lr in enumerate(LRS):
        gradient = 0.3 * w + drawn(4, 3, 2, seed=100 * update).numpy()
        size, slope = np.sqrt((w**2).sum()), np.sqrt((gradient**2).sum())
        ratio = eta * size / (slope + decay * size + eps)
        v = momentum * lr / held * v + lr * ratio * (gradient + decay * w)
        w, held = w - v, lr
        steps(optimizer, [lr], first=update)
        np.testing.assert_allclose(weight.detach().numpy(), w, rtol=1e-13)
        np.testing.assert_allclose(optimizer.state[weight]["momentum_buffer"].numpy(), v, rtol=1e-12)
        np.testing.assert_allclose(optimizer.trust_ratios().numpy(), [ratio], rtol=1e-13)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_the_first_step_is_a_share_of_the_weights_size_whatever_the_gradients(scale: float) -> None:
    weight = parameter(5, 4)
    before = weight.detach().clone()
    weight.grad = scale * drawn(5, 4, seed=1)
    Lars([weight], 0.5, trust_coefficient=0.01).step()
    assert (weight.detach() - before).norm().item() == pytest.approx(0.5 * 0.01 * before.norm().item(), rel=1e-12)


def _course(momenta: list[float] | None) -> Plan:
    """300 samples: a warm-up from 0, growth to 48, then a falling rate."""
    schedule = {"warmup_epochs": 0.4, "max_batch": 48, **({"momenta": momenta} if momenta else {})}
    optim = {"momentum": momenta[0]} if momenta else {}
    return compile_plan(small_job(schedule=schedule, optim=optim), 1, NUM_TRAIN)


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("momenta", [None, [0.9, 0.8, 0.8, 0.85], [0.0, 0.9, 0.0, 0.8], [0.9, 0.0, 0.95, 0.95]])
def test_without_trust_the_correction_gives_torchs_sgd_under_any_schedule(
    monkeypatch: pytest.MonkeyPatch, momenta: list[float] | None, rescale: bool
) -> None:
    # (i): the form with ε in its buffer needs the correction at every change, each update of a warm-up too
    monkeypatch.setattr(lars, "_trust_ratios", lambda params, *_: torch.ones(len(params), dtype=torch.float64))
    plan = _course(momenta)
    inputs, targets = drawn(NUM_TRAIN, 5, seed=1), drawn(NUM_TRAIN, 3, seed=2)

    def train(kind: type[torch.optim.Optimizer]) -> tuple[list[Tensor], set[float], set[int]]:
        weight, bias = parameter(5, 3), parameter(3)
        groups = [{"params": [weight], "weight_decay": 0.01}, {"params": [bias], "weight_decay": 0.0}]
        optimizer = kind(groups, lr=0.05, momentum=0.9)  # type: ignore[call-arg]
        course, samples, lrs = [], 0, set()
        while samples < plan.schedule.end_samples:
            phase = plan.schedule.at(samples)
            ids = torch.arange(samples, samples + phase.global_batch) % NUM_TRAIN
            optimizer.zero_grad()
            (inputs[ids] @ weight + bias - targets[ids]).square().sum(1).mean().backward()
            set_hyperparameters(optimizer, phase, rescale_momentum=rescale)
            optimizer.step()
            course.append(torch.cat([weight.detach().flatten(), bias.detach()]))
            samples += phase.global_batch
            lrs.add(phase.lr)
        return course, lrs, {phase.global_batch for phase in plan.schedule.phases}

    expected, lrs, batches = train(torch.optim.SGD)
    course, _, _ = train(Lars)
    assert 0.0 in lrs
    assert (len(lrs), len(batches)) >= (8, 2)
    torch.testing.assert_close(torch.stack(course), torch.stack(expected), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("zero", ["weight", "gradient"])
def test_where_a_norm_is_zero_the_ratio_is_one(zero: str) -> None:
    weight, gradient = drawn(3, 2) * (zero != "weight"), drawn(3, 2, seed=1) * (zero != "gradient")
    moved = nn.Parameter(weight.clone())
    moved.grad = gradient
    optimizer = Lars([moved], 0.1, weight_decay=0.5)
    optimizer.step()
    torch.testing.assert_close(moved.detach(), weight - 0.1 * (gradient + 0.5 * weight), rtol=1e-14, atol=1e-14)
    assert optimizer.trust_ratios().tolist() == [1.0]


@pytest.mark.parametrize(
    ("adapt", "scaled"), [(None, {"matrix", "kernel"}), (True, {"matrix", "kernel", "bias", "scale"}), (False, set())]
)
def test_parameters_of_one_dimension_are_neither_scaled_nor_decayed_unless_the_group_sets_adapt(
    adapt: bool | None, scaled: set[str]
) -> None:
    shapes = {"bias": (3,), "matrix": (3, 2), "scale": (), "kernel": (2, 2, 3, 3)}
    params = {name: parameter(*shape, seed=k) for k, (name, shape) in enumerate(shapes.items())}
    before = {name: param.detach().clone() for name, param in params.items()}
    for k, param in enumerate(params.values()):
        param.grad = drawn(*param.shape, seed=10 + k)
    optimizer = Lars([{"params": list(params.values()), "adapt": adapt}], 0.1, 0.9, 0.5)
    optimizer.step()
    ratios = []
    for name, param in params.items():
        weight, gradient, ratio, decay = before[name], param.grad, 1.0, 0.0
        assert gradient is not None
        if name in scaled:
            ratio = (0.001 * weight.norm() / (gradient.norm() + 0.5 * weight.norm())).item()
            decay = 0.5
            ratios.append(ratio)
        if adapt is False:
            decay = 0.5
        torch.testing.assert_close(param.detach(), weight - 0.1 * ratio * (gradient + decay * weight))
    assert optimizer.trust_ratios().tolist() == pytest.approx(ratios, rel=1e-12)


# --- other implementations ------------------------------------------------------------------------------


def test_equal_to_timms_where_it_scales_the_same_tensors() -> None:
    """timm's form has ε outside its buffer. It scales the decayed parameters and adds eps, as ours does here."""
    timm = timm_lars()
    if timm is None:
        pytest.skip("needs timm: pip install --no-deps timm")
    shapes = ((4, 3), (4,), (2, 4, 3, 3), (2,))
    ours, theirs = ([parameter(*shape, seed=k) for k, shape in enumerate(shapes)] for _ in range(2))
    groups = [
        [{"params": params[::2], "weight_decay": 0.02}, {"params": params[1::2], "weight_decay": 0.0}]
        for params in (ours, theirs)
    ]
    steps(Lars(groups[0], LRS[0], 0.9, eps=1e-8), LRS)
    settings: dict[str, Any] = {"momentum": 0.9, "eps": 1e-8, "trust_clip": False, "always_adapt": False}
    steps(timm(groups[1], lr=LRS[0], **settings), LRS)
    torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-13)


def test_lists_cut_to_the_cache_are_updated_like_their_tensors_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = ((3, 3), (4,), (9, 9), (2, 2), (5, 3), (3,), (4, 4))
    monkeypatch.setattr(lars, "_CACHE_BYTES", 8 * 30)
    ours, theirs = ([parameter(*shape, seed=k) for k, shape in enumerate(shapes)] for _ in range(2))
    loads = parts_of_size([param for param in ours if param.ndim > 1], lars._CACHE_BYTES)
    assert [[param.numel() for param in load] for load in loads] == [[9], [81], [4, 15], [16]]
    for k, pair in enumerate(zip(ours, theirs, strict=True)):
        for param in pair:
            param.grad = drawn(*param.shape, seed=20 + k)
    optimizer = Lars(ours, 0.1, 0.9, 5e-5)
    buffers = [torch.zeros_like(param) for param in theirs]
    for _ in range(2):
        optimizer.step()
        loop(theirs, buffers)
    torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-13)
    assert optimizer.trust_ratios().shape == (5,)


def test_the_benchmark_updates_resnet_50() -> None:
    shapes = resnet50_shapes()
    assert (len(shapes), sum(map(math.prod, shapes))) == (161, 25_557_032)


# --- what parameters and gradients may be ---------------------------------------------------------


def test_a_parameter_without_a_gradient_waits_and_its_buffer_keeps_its_rate() -> None:
    weight, idle = parameter(3, 2), parameter(3, 2, seed=1)
    optimizer = Lars([idle, weight], 0.5, 0.9)
    moved = []
    for update, lr in enumerate((0.5, 0.2, 0.05)):
        before = idle.detach().clone()
        weight.grad, idle.grad = drawn(3, 2, seed=update), None if update == 1 else drawn(3, 2, seed=7)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        moved.append(before - idle.detach())
        assert optimizer.trust_ratios().shape == (1 if update == 1 else 2,)
    assert not moved[1].any()
    ratio = optimizer.trust_ratios()[0]
    torch.testing.assert_close(moved[2], 0.9 * 0.05 / 0.5 * moved[0] + 0.05 * ratio * drawn(3, 2, seed=7))


def test_types_are_mixed_freely_and_the_norm_of_short_ones_is_taken_in_float32() -> None:
    dtypes = (torch.float64, torch.bfloat16, torch.float32, torch.bfloat16)
    together = [nn.Parameter(drawn(40, 50, seed=k).to(dtype)) for k, dtype in enumerate(dtypes)]
    alone = [nn.Parameter(param.detach().clone()) for param in together]
    for param, twin in zip(together, alone, strict=True):
        param.grad, twin.grad = (0.01 * drawn(40, 50, seed=9).to(param.dtype) for _ in range(2))
    optimizer = Lars(together, 0.5, weight_decay=0.01)
    optimizer.step()
    for twin in alone:
        Lars([twin], 0.5, weight_decay=0.01).step()
    assert all(torch.equal(param, twin) for param, twin in zip(together, alone, strict=True))
    # By type, then in their order: the second bfloat16 tensor is of the second type.
    weight = drawn(40, 50, seed=3).bfloat16().double().norm()
    slope = (0.01 * drawn(40, 50, seed=9).bfloat16()).double().norm()
    assert optimizer.trust_ratios()[2].item() == pytest.approx((0.001 * weight / (slope + 0.01 * weight)).item(), 1e-5)


def test_no_value_is_read_on_the_host() -> None:
    """Reading a value would wait for a GPU, and fails for tensors of the meta device."""
    params = [nn.Parameter(torch.empty(shape, device="meta")) for shape in ((3, 2), (3,))]
    for param in params:
        param.grad = torch.empty_like(param)
    optimizer = Lars(params, 0.1, weight_decay=0.1)
    for lr in (0.1, 0.2, 0.0):
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
    assert optimizer.trust_ratios().shape == (1,)


def test_gradients_are_left_as_they_are_and_a_closure_is_called_with_gradients_on() -> None:
    weight = parameter(3, 2)

    def closure() -> float:
        weight.grad = None
        loss = weight.square().sum()
        loss.backward()
        return loss.item()

    optimizer, before = Lars([weight], 0.1, weight_decay=0.1), weight.detach().clone()
    assert optimizer.trust_ratios().tolist() == []
    assert optimizer.step(closure) == before.square().sum().item()
    torch.testing.assert_close(weight.grad, 2 * before, rtol=0, atol=0)


def test_sparse_gradients_are_refused_before_anything_moves() -> None:
    dense, embedding = parameter(3, 2), nn.Embedding(4, 2, sparse=True)
    dense.grad, before = drawn(3, 2), dense.detach().clone()
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(
        ValueError, match=r"does not support sparse gradients, got one for a parameter of shape \(4, 2\)"
    ):
        Lars([{"params": [dense]}, {"params": list(embedding.parameters())}], 0.1).step()
    assert torch.equal(dense, before)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lr": 0.0}, r"lr of Lars must be a number > 0, got 0.0"),
        ({"lr": float("nan")}, r"lr of Lars must be a number > 0, got nan"),
        ({"lr": torch.tensor(0.1)}, r"lr of Lars must be a number > 0, got tensor"),
        ({"momentum": 1.0}, r"momentum of Lars must be a number >= 0 and < 1, got 1.0"),
        ({"weight_decay": -0.1}, r"weight_decay of Lars must be a number >= 0, got -0.1"),
        ({"trust_coefficient": 0}, r"trust_coefficient of Lars must be a number > 0, got 0"),
        ({"eps": float("inf")}, r"eps of Lars must be a number >= 0, got inf"),
        ({"adapt": "norms"}, r"adapt of Lars must be True, False or None .*, got 'norms'"),
        (
            {"params": [nn.Parameter(torch.zeros(2, dtype=torch.complex64))]},
            r"does not support complex parameters.*\(2,\)",
        ),
    ],
)
def test_values_out_of_range_are_refused_for_all_and_for_a_group(values: dict[str, Any], message: str) -> None:
    optimizer = Lars([parameter(3, 2)], 0.1)
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [parameter(2, 2)], **values})
    assert len(optimizer.param_groups) == 1
    if "adapt" not in values:
        with pytest.raises(ValueError, match=message):
            Lars(**{"params": [parameter(3, 2)], "lr": 0.1, **values})


# --- resumed runs, and jobs ---------------------------------------------------------------


@pytest.mark.parametrize("cut", range(1, len(LRS)))
def test_a_run_resumed_from_its_state_dict_is_bit_identical(cut: int) -> None:
    def make() -> tuple[list[nn.Parameter], Lars]:
        params = [nn.Parameter(drawn(*shape).float()) for shape in ((4, 3), (4,), (2, 3))]
        return params, Lars(params, LRS[0], 0.9, 0.01)

    lrs = (0.0, *LRS[1:])
    whole, optimizer = make()
    steps(optimizer, lrs)
    first, optimizer = make()
    steps(optimizer, lrs[:cut])
    file = io.BytesIO()
    torch.save([[param.detach() for param in first], optimizer.state_dict()], file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    second, optimizer = make()
    for param, weight in zip(second, weights, strict=True):
        param.data.copy_(weight)
    optimizer.load_state_dict(state)
    steps(optimizer, lrs[cut:], first=cut)
    assert all(torch.equal(a, b) for a, b in zip(second, whole, strict=True))


def test_a_job_gives_all_its_values_to_the_groups_by_shape() -> None:
    values = {"momentum": 0.8, "trust_coefficient": 0.02, "eps": 1e-6}
    job = small_job(optim={"name": "lars", "lr": 0.3, "weight_decay": 0.01, **values})
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 3))
    optimizer = build_optimizer(model, job.optim)
    assert isinstance(optimizer, Lars)
    weights, others = optimizer.param_groups
    assert all({key: group[key] for key in values} == values and group["lr"] == 0.3 for group in (weights, others))
    assert (weights["adapt"], weights["weight_decay"], len(weights["params"])) == (True, 0.01, 2)
    assert (others["adapt"], others["weight_decay"], len(others["params"])) == (False, 0.0, 4)


def test_the_plan_and_its_noise_are_those_of_sgd() -> None:
    schedule = {"momenta": [0.9, 0.8, 0.8, 0.85], "warmup_epochs": 0.2}
    sgd, lars_ = (compile_plan(small_job(optim={"name": k}, schedule=schedule), 1, NUM_TRAIN) for k in ("sgd", "lars"))
    assert lars_.schedule == sgd.schedule
    assert list(map(lars_.noise_scale, lars_.schedule.phases)) == list(map(sgd.noise_scale, sgd.schedule.phases))


def test_adams_rule_is_refused_as_for_sgd() -> None:
    with pytest.raises(JobError, match=r"lr_rule: 'adam' is for optim.name = 'adam' or 'adamw', not 'lars'"):
        compile_plan(small_job(optim={"name": "lars"}, schedule={"lr_rule": "adam"}), 1, NUM_TRAIN)


def test_transitions_mention_the_correction_and_the_ratio_in_the_decay() -> None:
    def lines(**optim: Any) -> list[str]:
        job = small_job(
            optim={"name": "lars", **optim},
            schedule={"max_batch": 48, "momenta": [0.9, 0.9, 0.9, 0.8], "noise_factor": 3.0},
        )
        return describe_transitions(compile_plan(job, 1, NUM_TRAIN))

    # 16 → 48 holds ε; at the limit of 48, ε ÷ 3; then g ÷ 3 by m = 0.8 alone would be ÷ 2: ε ÷ 1.5
    grown, decayed, both = lines()
    assert "; momentum buffer kept, no correction due; " in grown
    assert "; buffer ÷ 3 with the lr it holds; " in decayed
    assert "; momentum 0.9 → 0.8, buffer refills over B/(N(1-m)) = 0.8 epochs, buffer ÷ 1.5 with the lr" in both
    assert "; momentum 0.9 → 0.8, buffer × 0.5, buffer ÷ 1.5 with the lr it holds; " in lines(rescale_momentum=True)[2]
    # β ε N / (B (1-m)) = 10⁻³ · 0.05 · 300 / (16 · 0.1)
    assert grown.endswith("weight decay per epoch 0.00938 → 0.00313 times the trust ratio")


def test_each_change_of_rate_is_corrected_once() -> None:
    weight = parameter(3, 2)
    optimizer = Lars([weight], 0.5, 0.9)
    levels: list[float] = []
    for lr in (0.5, 0.1, 0.1):
        weight.grad = torch.zeros(3, 2, dtype=torch.float64) if levels else drawn(3, 2, seed=1)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        levels.append(optimizer.state[weight]["momentum_buffer"].norm().item())
    assert [b / a for a, b in itertools.pairwise(levels)] == pytest.approx([0.9 * 0.1 / 0.5, 0.9])
