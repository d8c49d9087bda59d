"""The gradients of norm layers for each unit: what cannot be recorded is refused, and what follows from the noise."""

from __future__ import annotations

import copy
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hvd_batchgrow.comm.ranks import SingleRank
from hvd_batchgrow.config import GradientNoiseSection, Job
from hvd_batchgrow.messages.errors import JobError
from hvd_batchgrow.nn.build import build_model, check_norm_layers
from hvd_batchgrow.nn.checks.norm_gradients_trial import NUM_SAMPLES, try_norm_gradients
from hvd_batchgrow.nn.ghost.ghost_batch_norm import GhostBatchNorm1d
from hvd_batchgrow.nn.ghost.ghost_operators import ghost_differentiate, ghost_normalize, number_of
from hvd_batchgrow.nn.norm_gradients import NormGradients
from hvd_batchgrow.schedule.plan import compile_plan
from hvd_batchgrow.schedule.twin import decay_twin
from hvd_batchgrow.train.measured_noise import MeasuredNoise
from hvd_batchgrow.train.update.engine import UpdateResult
from hvd_batchgrow.train.update.gradient_noise import NoiseEstimate
from hvd_batchgrow.train.update.gradient_norms import ALL, NORM_LAYERS
from tests import golden
from tests.helpers import NUM_TRAIN as N
from tests.helpers import measured_job, small_job

LAYERS = {"measure": True, "estimator": "norm_layers"}
TRIGGER = {"name": "gradient_noise"}
ADASCALE = {"batch_scale": 2.0, "max_batch": 32}


class Net(nn.Module):
    """A norm on 4 features or tokens of them, in a forward that tests choose."""

    def __init__(self, norm: nn.Module, forward: Callable[[Net, Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.norm, self.head = nn.Linear(4, 4), norm, nn.Linear(4, 3)
        self.call = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self, x)


def straight(net: Net, x: Tensor) -> Tensor:
    return net.head(net.norm(net.inner(x)))  # type: ignore[no-any-return]


def tokens_first(net: Net, x: Tensor) -> Tensor:
    """The batch is the second axis, with as many tokens as samples."""
    tokens = net.inner(x[:, None] * torch.arange(1.0, len(x) + 1)[:, None]).transpose(0, 1)
    return net.head(net.norm(tokens).mean(0))  # type: ignore[no-any-return]


def mixing(net: Net, x: Tensor) -> Tensor:
    x = net.inner(x)
    return net.head(net.norm(x) + x.mean(0) + net.norm(x).mean(0))  # type: ignore[no-any-return]


def weight_elsewhere(net: Net, x: Tensor) -> Tensor:
    return net.head(net.norm(net.inner(x)) * net.norm.weight)  # type: ignore[no-any-return]


def checkpointed(net: Net, x: Tensor) -> Tensor:
    return net.head(checkpoint(lambda x: net.norm(net.inner(x)), x, use_reentrant=False))  # type: ignore[no-any-return]


def checkpointed_reentrant(net: Net, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    return net.head(checkpoint(lambda x: net.norm(net.inner(x)), x, use_reentrant=True))  # type: ignore[no-any-return]


def tried(model: nn.Module, **options: bool) -> NormGradients:
    generator = torch.Generator().manual_seed(0)
    return try_norm_gradients(
        model, torch.randn(NUM_SAMPLES, 4, generator=generator), mixes_samples=options.get("mixes", False)
    )


# --- what can be recorded ---------------------------------------------------------------------------


@pytest.mark.parametrize("forward", [straight, checkpointed, checkpointed_reentrant])
@pytest.mark.parametrize("norm", [nn.LayerNorm(4), nn.RMSNorm(4), nn.GroupNorm(2, 4), GhostBatchNorm1d(4, 3)])
def test_these_networks_can_be_measured_and_the_trial_leaves_no_trace(norm: nn.Module, forward: Any) -> None:
    torch.manual_seed(0)
    model = Net(copy.deepcopy(norm), forward)
    before = copy.deepcopy(model.state_dict())
    recorder = tried(model)
    assert recorder.unit == ("ghost batch" if isinstance(norm, GhostBatchNorm1d) else "sample")
    assert not model.norm._forward_hooks
    assert getattr(model.norm, "keep_sums", None) is None
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None and not p._backward_hooks for p in model.parameters())


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Net(nn.Identity(), straight), "has no norm layer with a trained weight or bias"),
        (Net(nn.LayerNorm(4, elementwise_affine=False), straight), "has no norm layer with a trained weight or bias"),
        (Net(nn.BatchNorm1d(4), straight), "norm is a torch batch norm, .* convert it to a ghost norm"),
        (
            Net(nn.LayerNorm(4), tokens_first),
            r"gradient of norm.weight, norm.bias is not a sum over separate samples",
        ),
        (Net(nn.LayerNorm(4), mixing), "is not a sum over separate samples"),
        (Net(nn.LayerNorm(4), weight_elsewhere), "gradient of norm.weight is not a sum over separate samples"),
        (Net(GhostBatchNorm1d(4, 3), mixing), "is not a sum over separate ghost batches"),
        (Net(GhostBatchNorm1d(4, 3), weight_elsewhere), "norm.weight is not a sum over separate ghost batches"),
        (
            Net(nn.LayerNorm(4), lambda net, x: straight(net, x).reshape(2, -1)),
            r"an output of shape \(2, 9\) for 6 samples",
        ),
    ],
)
def test_what_would_give_another_number_is_refused(model: nn.Module, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tried(model)


def test_a_row_of_something_else_than_a_sample_is_refused_in_an_update() -> None:
    net = Net(nn.LayerNorm(4), lambda net, x: net.head(net.norm(net.inner(x.repeat(2, 1))))[: len(x)])
    recorder = NormGradients(net)
    recorder.begin(6, 2)
    with pytest.raises(ValueError, match=r"a LayerNorm has an input of shape \(12, 4\) for 6 samples"):
        net(torch.randn(6, 4)).sum().backward()


def test_a_ghost_norm_that_leaves_training_mode_is_refused_in_an_update() -> None:
    net = Net(GhostBatchNorm1d(4, 3), straight)
    recorder = NormGradients(net)
    net.norm.eval()
    recorder.begin(6, 2)
    net(torch.randn(6, 4)).sum().backward()
    with pytest.raises(ValueError, match=r"norm\.weight: its norm was not in training mode"):
        recorder.end()


def test_frozen_batch_norms_leave_the_sample_as_the_unit() -> None:
    model = nn.Sequential(GhostBatchNorm1d(4, 3), nn.LayerNorm(4), nn.Linear(4, 3))
    ghost = model[0]
    assert isinstance(ghost, GhostBatchNorm1d)
    ghost.requires_grad_(False)
    ghost.frozen = True
    model.train()
    assert tried(model).unit == "sample"
    assert tried(model, mixes=True).unit == "ghost batch"


def test_copies_of_a_network_do_not_copy_what_records() -> None:
    model = nn.Sequential(GhostBatchNorm1d(4, 3), nn.LayerNorm(4))
    recorder = NormGradients(model)
    copied = copy.deepcopy(model)
    assert copied[0].keep_sums is model[0].keep_sums
    assert len(recorder.parameters) == 4


def test_a_ghost_norm_of_a_compiled_network_keeps_a_copy_of_its_sums() -> None:
    """The compiler may reuse the memory of what the operator returns."""
    norm, x, kept = GhostBatchNorm1d(4, 3), torch.randn(6, 4), list[Tensor]()
    norm.keep_sums = kept.append
    options = (2, False, number_of(norm))
    _, *saved = ghost_normalize(x, None, None, 2, 1e-5, False, options[-1])
    _, sums = ghost_differentiate(torch.randn(6, 4), x, None, None, *saved, *options)
    before = sums.clone()
    sums.zero_()
    assert before.abs().max() > 0
    assert torch.equal(kept[0], before)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler: install g++")
@pytest.mark.filterwarnings("ignore")  # warnings of the compiler
def test_a_compiled_network_gives_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()  # it compiles a function for a limited number of shapes, which other tests have used up
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    found = []
    for compiles in (False, True):
        engine = golden.make_engine(SingleRank())
        if compiles:
            engine.model.compile()
        engine.measure_noise(layers=NormGradients(engine.model))
        found.append([golden.serve(engine, engine.ranks, per_pass, 0).noise[NORM_LAYERS] for per_pass in (12, 6, 1)])
    for plain, compiled in zip(*found, strict=True):
        assert compiled.trace == pytest.approx(plain.trace, rel=1e-8)
        assert compiled.squared_norm == pytest.approx(plain.squared_norm, rel=1e-8)


def test_a_compiled_network_with_layer_norms_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    model._compiled_call_impl = lambda: None  # as compile() sets it
    with pytest.raises(ValueError, match="in a compiled network only ghost norms can be measured, not LayerNorm"):
        NormGradients(model)


# --- what a job may say -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"gradient_noise": {"estimator": "norm_layers"}}, "estimator: has no effect if nothing is measured"),
        ({"gradient_noise": {"norm_layers_factor": 2.0}}, "norm_layers_factor: is for estimator = 'norm_layers'"),
        (
            {"gradient_noise": {**LAYERS, "per_layer_group": True}},
            "per_layer_group: is for estimator = 'micro_batches'",
        ),
        (
            {"gradient_noise": {**LAYERS, "preconditioned": True}, "optim": {"name": "adam", "lr": 0.001}},
            "preconditioned: is for estimator = 'micro_batches'",
        ),
    ],
)
def test_keys_without_effect_are_refused(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(JobError, match=f"gradient_noise.{message}"):
        compile_plan(small_job(**sections), 1, N)


@pytest.mark.parametrize("name", ["norm_test", "cabs", "similarity", "gradient_noise", "adascale"])
def test_one_micro_batch_is_enough_for_every_trigger(name: str) -> None:
    schedule = {"batch_scale": 2.0} if name == "adascale" else {}
    sections = {"layout": {"max_micro_batch": 96}, "schedule": schedule}
    with pytest.raises(JobError, match=r"or gradient_noise\.estimator = 'norm_layers'"):
        compile_plan(measured_job({"name": name}, **sections), 1, N)
    noise = {"estimator": "norm_layers"}
    assert compile_plan(measured_job({"name": name}, **sections, gradient_noise=noise), 1, N)


def test_a_fixed_schedule_has_no_note_unless_an_update_is_one_ghost_batch() -> None:
    sections = {"gradient_noise": LAYERS, "layout": {"max_micro_batch": 96}}
    assert compile_plan(small_job(**sections), 1, N).notes == []
    (note,) = compile_plan(small_job(**sections, model={"ghost_batch": 16}), 1, N).notes
    assert "an update of one ghost batch (16 samples) is not measured" in note


def test_a_twin_without_a_trigger_does_not_name_an_estimator() -> None:
    job = small_job(gradient_noise=LAYERS)
    assert decay_twin(job, N).gradient_noise == job.gradient_noise
    adascale = measured_job({"name": "adascale"}, gradient_noise={"estimator": "norm_layers"}, schedule=ADASCALE)
    assert decay_twin(adascale, N).gradient_noise == GradientNoiseSection()


def check(job: Job, shape: tuple[int, int, int] = (8, 8, 1)) -> None:
    check_norm_layers(job, build_model(job, shape, 3), shape)


def test_a_network_is_tried_at_the_start() -> None:
    check(small_job(gradient_noise=LAYERS))
    check(small_job(gradient_noise=LAYERS, data={"mixup_alpha": 0.2}))
    check(small_job(gradient_noise=LAYERS, layout={"compile": True}))
    for keys in ({"dropout": 0.3}, {"shakedrop": 0.5}):  # draws that all passes of the trial must repeat
        check(small_job(model={"name": "wrn_10_1", "channels": None, **keys}, gradient_noise=LAYERS))
    nothing = {"name": "alexnet", "channels": None}
    check(small_job(model=nothing), (64, 64, 3))  # measures nothing
    with pytest.raises(JobError, match=r"gradient_noise\.estimator: 'norm_layers' is not .* alexnet: .* no norm layer"):
        check(small_job(model=nothing, gradient_noise=LAYERS), (64, 64, 3))


def test_a_first_batch_of_one_ghost_batch_is_refused_if_a_trigger_measures() -> None:
    noise = {"estimator": "norm_layers"}
    with pytest.raises(JobError, match=r"schedule\.global_batch: 16 is one ghost batch, .* use >= 32"):
        check(measured_job(TRIGGER, gradient_noise=noise, model={"ghost_batch": 16}))
    check(measured_job(TRIGGER, gradient_noise=noise))


# --- what follows from the noise --------------------------------------------------------------------


def result(
    batch: int, layers: tuple[float, float], micro_batches: tuple[float, float] | None, norm: float
) -> UpdateResult:
    """An update with given tr(Σ) and |G|² of the norm layers and, from micro-batches, of the whole gradient."""
    noise = {NORM_LAYERS: NoiseEstimate(*layers, num_gradients=batch // 8)}
    noise |= {ALL: NoiseEstimate(*micro_batches, num_gradients=2)} if micro_batches else {}
    return UpdateResult(1.0, float(batch), {}, False, 0, (), False, norm, noise)


def fed(noise: MeasuredNoise, count: int, batch: int, f: float = 3.0, *, micro_batches: bool) -> MeasuredNoise:
    """Updates in which the norm layers have tr(Σ) = 12 and |G|² = 0.5, and the whole gradient f · 120 and 5."""
    for k in range(count):
        wiggle = 1 + 0.1 * (-1) ** k
        layers, whole = (12.0 * wiggle, 0.5), (f * 120.0 * wiggle, 5.0)
        noise.add(result(batch, layers, whole if micro_batches else None, (whole[1] + whole[0] / batch) ** 0.5), batch)
    return noise


def section(factor: float = 1.0) -> GradientNoiseSection:
    return GradientNoiseSection(measure=True, estimator="norm_layers", norm_layers_factor=factor)


def test_the_factor_of_the_job_counts_until_the_run_has_measured_its_own() -> None:
    noise = fed(MeasuredNoise(section(3.0), 1000), 20, 64, micro_batches=False)
    first = noise.norm_layers
    assert first is not None
    assert (first.factor, first.is_measured, first.micro_batches, first.num_units) == (3.0, False, None, 8)
    assert first.b_simple == pytest.approx(24.0, rel=0.02)
    # The scale of the whole gradient follows from its |g|², and so tr(Σ) and |G|² do.
    whole = noise.scales[ALL]
    assert whole.b_simple == pytest.approx(72.0, rel=0.02)
    assert whole.trace == pytest.approx(360.0, rel=0.02)
    assert whole.squared_norm == pytest.approx(5.0, rel=0.02)
    fed(noise, 2, 64, f=2.0, micro_batches=True)
    assert noise.norm_layers is not None
    assert not noise.norm_layers.is_measured  # two updates have no interval
    fed(noise, 100, 64, f=2.0, micro_batches=True)
    last = noise.norm_layers
    assert last.is_measured
    assert last.factor == pytest.approx(2.0, rel=1e-6)
    assert noise.scales[ALL].b_simple == pytest.approx(48.0, rel=0.02)
    # It is kept where there are no more updates of several micro-batches.
    fed(noise, 50, 128, micro_batches=False)
    assert noise.norm_layers.factor == pytest.approx(2.0, rel=1e-6)


@pytest.mark.parametrize("batch", [128, 256, 1024])
def test_growth_of_the_batch_changes_no_estimate(batch: int) -> None:
    """The last update has 1.1 times the noise of the mean, and its weight in the average is not that of 64 samples."""
    noise = fed(MeasuredNoise(section(3.0), 100_000), 50, 64, micro_batches=False)
    fed(noise, 1, batch, micro_batches=False)
    kept = math.exp(-batch / 50_000)
    share = (1 - kept) / (1 - math.exp(-(50 * 64 + batch) / 50_000))
    after = noise.scales[ALL]
    assert after.squared_norm == pytest.approx(5.0, rel=1e-9)
    assert after.trace == pytest.approx(360 * (1 + 0.1 * share), rel=1e-4)
    assert after.b_simple == pytest.approx(72 * (1 + 0.1 * share), rel=1e-4)


def test_noise_without_a_signal_is_unresolved() -> None:
    noise = MeasuredNoise(section(), 1000)
    for _ in range(20):
        noise.add(result(64, (12.0, -0.1), None, 1.0), 64)
    whole = noise.scales[ALL]
    assert whole.b_simple is None
    assert whole.squared_norm <= 0 < whole.trace
    assert whole.trace == pytest.approx(64 * 1.0, rel=1e-6)  # all of |g|² is noise


def test_the_state_survives_a_checkpoint_and_another_estimator_ignores_it() -> None:
    noise = fed(fed(MeasuredNoise(section(), 1000), 50, 64, micro_batches=True), 5, 32, micro_batches=False)
    state = json.loads(json.dumps(noise.state()))
    again = MeasuredNoise(section(), 1000)
    again.load(state)
    assert (again.scales, again.norm_layers) == (noise.scales, noise.norm_layers)
    assert fed(again, 3, 32, micro_batches=True).scales == fed(noise, 3, 32, micro_batches=True).scales
    other = MeasuredNoise(GradientNoiseSection(measure=True), 1000)
    other.load(state)
    assert other.scales.keys() == {ALL}
    assert other.norm_layers is None


def test_after_a_change_of_estimator_the_factor_comes_from_updates_that_measure_both() -> None:
    earlier = MeasuredNoise(GradientNoiseSection(measure=True), 1000)
    for _ in range(100):  # B_simple = 300
        earlier.add(replace(result(64, (0.0, 0.0), (1500.0, 5.0), 1.0), noise={ALL: NoiseEstimate(1500.0, 5.0)}), 64)
    noise = MeasuredNoise(section(3.0), 1000)
    noise.load(json.loads(json.dumps(earlier.state())))
    fed(noise, 1, 64, f=2.0, micro_batches=True)
    first = noise.norm_layers
    assert first is not None
    assert (first.is_measured, first.factor) == (False, 3.0)
    assert first.micro_batches == pytest.approx(48.0 * 1.1)  # of this update alone
    fed(noise, 20, 64, f=2.0, micro_batches=True)
    assert noise.norm_layers is not None
    assert noise.norm_layers.is_measured
    assert noise.norm_layers.factor == pytest.approx(2.0, rel=1e-6)
