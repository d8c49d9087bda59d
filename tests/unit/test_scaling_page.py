"""The figures of docs/scaling.md and docs/cost.md follow from the code."""

from __future__ import annotations

import math
import re
from functools import cache
from pathlib import Path

import pytest

from hvd_batchgrow.config import Job
from hvd_batchgrow.job_file import load_job
from hvd_batchgrow.schedule.cost.cost import PhaseCost, choose_ranks, predict
from hvd_batchgrow.schedule.cost.machine import Machine, MachineTimes, load_machine
from hvd_batchgrow.schedule.cost.sensitivity import sensitivity
from hvd_batchgrow.schedule.plan import compile_plan

ROOT = Path(__file__).parents[2]
SCALING, COST = ((ROOT / "docs" / name).read_text() for name in ("scaling.md", "cost.md"))
INFINIBAND, ETHERNET = "dgx_a100_resnet50", "dgx1_v100_ethernet_resnet50"
NUM_SAMPLES, GHOST = 1_281_167, 32


def imagenet(batch: int, **layout: object) -> Job:
    """ResNet-50 on ImageNet in one phase of one batch; ghost batches of 32 and micro-batches of at most 128."""
    overrides = {"schedule.global_batch": batch, "schedule.max_batch": batch}
    return load_job(
        ROOT / "jobs" / "imagenet_resnet50_grow.toml",
        overrides | {f"layout.{key}": value for key, value in layout.items()},
    )


@cache
def machine(name: str) -> Machine:
    return load_machine(ROOT / "machines" / f"{name}.toml")


@cache
def cost_of(name: str, batch: int, ranks: int) -> PhaseCost:
    """The planner's cost of the first phase."""
    return predict(compile_plan(imagenet(batch), ranks, NUM_SAMPLES), machine(name)).phases[0]


@cache
def times_of(name: str) -> MachineTimes:
    return MachineTimes(machine(name), imagenet(8192))


def sync_s(name: str, ranks: int) -> float:
    times = times_of(name)
    return times.sync(ranks).seconds(times.gradient_bytes)


def fastest_by_formula(name: str, batch: int, *, halving: bool = False) -> float:
    """R* of the page: the ranks at which a further host saves nothing."""
    figures = machine(name)
    per_host, alpha = figures.host.ranks, figures.network.latency_us * 1e-6
    twice_n_beta = 2 * 4 * figures.compute.num_parameters / (figures.network.gigabytes_per_s * 1e9)
    left = batch / figures.compute.samples_per_s / per_host - twice_n_beta if figures.compute.samples_per_s else 0.0
    return per_host * (left * math.log(2) / (2 * alpha) if halving else math.sqrt(left / (2 * alpha)))


def row(name: str, batch: int, ranks: int) -> str:
    """A row of the tables of docs/scaling.md."""
    cost, alone = cost_of(name, batch, ranks), cost_of(name, batch, 1)
    passes = batch // GHOST // ranks
    efficiency = alone.update_s / (ranks * cost.update_s)
    values = (f"{ranks:,}", f"{passes:,}", f"{1e3 * sync_s(name, ranks):.1f}", f"{1e3 * cost.update_s:.1f}")
    return f"| {' | '.join(values)} | {ranks * cost.update_s / 3.6:.2f} | {efficiency:.0%} |".replace("%", " %")


TABLES = [
    (INFINIBAND, 320_000, (625, 1250, 2500, 5000, 10_000)),
    (INFINIBAND, 640_000, (2500, 5000, 10_000)),
    (ETHERNET, 8192, (8, 32, 64, 256)),
    (ETHERNET, 40_960, (8, 32, 64, 256)),
]


@pytest.mark.parametrize(("name", "batch", "counts"), TABLES)
def test_the_planner_computes_the_rows_of_the_page(name: str, batch: int, counts: tuple[int, ...]) -> None:
    missing = [line for line in (row(name, batch, ranks) for ranks in counts) if line not in SCALING]
    assert not missing


@pytest.mark.parametrize(("name", "batch"), [(INFINIBAND, 320_000), (INFINIBAND, 640_000), (ETHERNET, 8192)])
def test_the_fastest_number_of_hosts_is_that_of_the_formula(name: str, batch: int) -> None:
    """Tried host by host, with ghost batches that can be divided."""
    per_host = machine(name).host.ranks
    compute_s = batch * machine(name).compute.sample_s
    fastest = min(range(1, 2000), key=lambda hosts: compute_s / (per_host * hosts) + sync_s(name, per_host * hosts))
    assert per_host * fastest == pytest.approx(fastest_by_formula(name, batch), abs=per_host)
    assert f"R* = {fastest_by_formula(name, batch):,.0f}" in SCALING


@pytest.mark.parametrize("batch", [320_000, 640_000])
def test_accumulation_is_faster_than_twice_the_ranks_exactly_where_the_formula_says(batch: int) -> None:
    limit = fastest_by_formula(INFINIBAND, batch) / math.sqrt(2)
    found = {
        ranks: cost_of(INFINIBAND, batch, ranks).update_s < cost_of(INFINIBAND, batch, 2 * ranks).update_s
        for ranks in (8, 40, 200, 1000, 5000)
    }
    assert found == {ranks: ranks > limit for ranks in found}
    assert len(set(found.values())) == (2 if batch == 320_000 else 1)


def test_the_planner_chooses_the_fastest_row() -> None:
    for batch, fastest in ((320_000, 5000), (640_000, 10_000)):
        job = imagenet(batch, grow_by="auto", max_ranks=10_000)
        plan = compile_plan(job, 10_000, NUM_SAMPLES, choose_ranks(job, NUM_SAMPLES, machine(INFINIBAND), 10_000))
        assert {layout.ranks for layout in plan.layouts} == {fastest}


def test_halving_needs_less_latency_on_10_000_ranks() -> None:
    figures = machine(INFINIBAND)
    halving = figures.model_copy(update={"network": figures.network.model_copy(update={"algorithm": "halving"})})
    found = predict(compile_plan(imagenet(320_000), 10_000, NUM_SAMPLES), halving).phases[0]
    assert f"an update on 10,000 ranks takes {1e3 * found.update_s:.1f} ms" in " ".join(SCALING.split())
    latency_s = times_of(INFINIBAND).sync(10_000).latency_s
    assert f"{1e3 * latency_s:.0f} of the 36.6 ms are latency" in " ".join(SCALING.split())


def test_growth_by_accumulation_divides_the_all_reduces() -> None:
    """The time of a run is (E N/B) (f + S) + E N t/(γ R): computed from the planner's phases of two batches."""
    small, large = (predict(compile_plan(imagenet(b), 64, NUM_SAMPLES), machine(ETHERNET)) for b in (8192, 40_960))
    samples = 90 * NUM_SAMPLES
    saved_s = samples * (1 / 8192 - 1 / 40_960) * sync_s(ETHERNET, 64)
    assert small.seconds - large.seconds == pytest.approx(saved_s, rel=2e-3)


# --- docs/cost.md ----------------------------------------------------------------------------


def test_the_planner_computes_the_sensitivities_of_the_page() -> None:
    job = load_job(
        ROOT / "jobs" / "imagenet_resnet50_grow.toml", {"schedule.global_batch": 320_000, "schedule.max_batch": 640_000}
    )
    plan = compile_plan(job, 10_000, NUM_SAMPLES)
    cells: dict[str, list[str]] = {}
    for name in (INFINIBAND, ETHERNET):
        changes = sensitivity(plan, machine(name))
        seconds = f"{predict(plan, machine(name)).seconds:.1f} s"
        assert re.search(rf"^\| \| .*: {seconds}", COST, re.MULTILINE), seconds
        for half, twice in zip(changes[::2], changes[1::2], strict=True):
            percents = [f"{100 * (change.time_ratio - 1):+.1f} %".replace("-", "−") for change in (half, twice)]
            cells.setdefault(half.figure, []).append(", ".join(percents))
    for figure, columns in cells.items():
        assert f"| {figure} × ½, × 2 | {' | '.join(columns)} |" in COST


@pytest.mark.parametrize(("images_per_s", "published"), [(938, 7248), (2470, 16_621)])
def test_the_comparison_with_a_published_measurement(images_per_s: int, published: int) -> None:
    predicted = 8 * 256 / (256 / images_per_s + sync_s(INFINIBAND, 8))
    assert f"{predicted:,.0f} ({100 * (predicted / published - 1):.1f} % more)" in " ".join(COST.split())
    assert f"{published:,}" in COST
