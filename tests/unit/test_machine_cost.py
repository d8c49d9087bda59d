"""Costs from a machine's published figures, and their sensitivity."""

from __future__ import annotations

import json
import math
import tomllib
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from hvd_batchgrow.cli import main
from hvd_batchgrow.config import Job
from hvd_batchgrow.job_file import load_job
from hvd_batchgrow.messages.errors import JobError
from hvd_batchgrow.schedule.cost.allreduce import Link, allreduce_cost, hierarchical_cost
from hvd_batchgrow.schedule.cost.cost import predict
from hvd_batchgrow.schedule.cost.cost_file import load_cost_file
from hvd_batchgrow.schedule.cost.machine import Machine, MachineTimes, load_machine
from hvd_batchgrow.schedule.cost.sensitivity import sensitivity
from hvd_batchgrow.schedule.plan import compile_plan
from tests.helpers import NUM_TRAIN, small_job

ROOT = Path(__file__).parents[2]
MACHINES, JOBS = ROOT / "machines", ROOT / "jobs"
MODEL = small_job().model.name

TREE: dict[str, Any] = {
    "name": "paper",
    "source": "a data sheet",
    "compute": {"model": MODEL, "num_parameters": 1000, "samples_per_s": 500.0},
    "host": {"ranks": 4, "gigabytes_per_s": 100, "latency_us": 2},
    "network": {"gigabytes_per_s": 10, "latency_us": 30},
}
SIZE = {key: TREE["compute"][key] for key in ("model", "num_parameters")}


def wide_job(**sections: Any) -> Job:
    """A job whose batches of 64 and 192 can be split over 1, 2, 4 and 8 ranks."""
    return small_job(schedule={"global_batch": 64, "max_batch": 192}, **sections)


def changed(**sections: dict[str, Any]) -> dict[str, Any]:
    return TREE | {name: TREE[name] | keys for name, keys in sections.items()}


def machine(**sections: dict[str, Any]) -> Machine:
    return Machine.model_validate(changed(**sections))


@pytest.mark.parametrize("members", [1, 2, 3, 8, 1000])
def test_a_ring_costs_what_its_steps_cost(members: int) -> None:
    """Played step by step: in each of 2 (p - 1) steps every member sends one chunk of n/p bytes."""
    link, num_bytes = Link(1e-5, 1e-9), 8_000_000
    played = sum(link.latency_s + num_bytes / members * link.s_per_byte for _ in range(2 * (members - 1)))
    assert allreduce_cost(members, link, "ring").seconds(num_bytes) == pytest.approx(played, abs=1e-15)


@pytest.mark.parametrize("exponent", [0, 1, 5, 13])
def test_halving_costs_what_its_steps_cost(exponent: int) -> None:
    """Played step by step: n/2, n/4, … n/p bytes are exchanged, and then the same in reverse order."""
    link, num_bytes = Link(1e-5, 1e-9), 8_000_000
    sizes = [num_bytes / 2**step for step in range(1, exponent + 1)]
    played = 2 * sum(link.latency_s + size * link.s_per_byte for size in sizes)
    assert allreduce_cost(2**exponent, link, "halving").seconds(num_bytes) == pytest.approx(played, abs=1e-15)


def test_halving_needs_one_more_step_above_a_power_of_two() -> None:
    link = Link(1.0, 0.0)
    steps = [allreduce_cost(p, link, "halving").latency_s for p in (2, 3, 4, 5, 10_000)]
    assert steps == [2, 4, 4, 6, 28]


def test_over_hosts_the_gradient_crosses_the_network_once_each_way() -> None:
    inside, between = Link(1e-6, 1e-11), Link(1e-5, 1e-10)
    one_host = hierarchical_cost(8, 8, inside, between, "ring")
    assert one_host == allreduce_cost(8, inside, "ring")
    # 3 hosts: 2 · 7/8 n inside, 2 · 2/3 n on the network
    found = hierarchical_cost(24, 8, inside, between, "ring")
    assert found.s_per_byte == pytest.approx(2 * 7 / 8 * 1e-11 + 2 * 2 / 3 * 1e-10)
    assert found.latency_s == pytest.approx(14e-6 + 4e-5)
    assert hierarchical_cost(17, 8, inside, between, "ring") == found  # the third host counts as a full one


def test_the_cost_of_a_phase_is_computation_plus_all_reduce() -> None:
    plan = compile_plan(wide_job(), 4, NUM_TRAIN)
    found = predict(plan, machine(compute={"fixed_s": 0.25, "micro_batch_s": 0.5}))
    sync_s = 2 * 3 * 2e-6 + 2 * 3 / 4 * 4000 / 100e9
    for phase, layout, cost in zip(plan.schedule.phases, plan.layouts, found.phases, strict=True):
        assert layout.ranks == 4
        expected = 0.25 + 0.5 * layout.accumulation + phase.global_batch / 4 / 500 + sync_s
        assert cost.update_s == pytest.approx(expected, rel=1e-12)
        assert cost.extrapolated_from is None
        assert cost.data_wait_share is None
    assert found.notes == ("predicted from figures, not measured: paper: a data sheet",)


@pytest.mark.parametrize(
    ("overrides", "num_bytes"),
    [
        ({}, 4000),
        ({"update": {"allreduce_dtype": "bfloat16"}}, 2000),
        ({"layout": {"exact": True}}, 8000),
    ],
)
def test_the_job_gives_the_bytes_of_a_parameter(overrides: dict[str, Any], num_bytes: int) -> None:
    assert MachineTimes(machine(), small_job(**overrides)).gradient_bytes == num_bytes


def test_full_overlap_hides_the_shorter_of_the_two() -> None:
    plan = compile_plan(wide_job(), 8, NUM_TRAIN)
    apart = predict(plan, machine(network={"latency_us": 1000}))
    hidden = predict(plan, machine(network={"latency_us": 1000}, compute={"overlap": 10.0}))
    assert hidden.seconds < apart.seconds


def test_flops_give_the_speed() -> None:
    by_flops = Machine.model_validate(TREE | {"compute": SIZE | {"flop_per_sample": 2e9, "flop_per_s": 1e12}})
    assert by_flops.compute.sample_s == pytest.approx(2e-3)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (changed(compute={"flop_per_s": 1e12}), "compute: must have either samples_per_s, or both flop_per_sample"),
        (changed(network={"latency_us": -1}), "network.latency_us: must be at least 0, got -1"),
        (changed(network={"bandwidth": 3}), "network.bandwidth: unknown key; known here: gigabytes_per_s, latency_us"),
        (changed(network={"algorithm": "rings"}), "nearest: 'ring'"),
        (TREE | {"host": {"ranks": 8}}, r"\[host\] with 8 ranks needs gigabytes_per_s and latency_us"),
        ({"name": "x"}, "compute: is required"),
        (changed(compute={"samples_per_s": 1e-307}), "compute.samples_per_s: must be at least 0.000000001"),
        (changed(network={"gigabytes_per_s": 1e-307}), "network.gigabytes_per_s: must be at least 0.000000001"),
        (changed(network={"latency_us": 1e300}), "network.latency_us: must be at most 1000000000000000"),
        (
            TREE | {"compute": SIZE | {"flop_per_sample": 1e300, "flop_per_s": 1e-300}},
            r"compute: flop_per_sample / flop_per_s must be at most 1e\+09 s, got inf",
        ),
    ],
)
def test_a_wrong_machine_is_refused_with_the_key(tree: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "machine.toml"
    path.write_text(tomli_w.dumps(tree))
    with pytest.raises(JobError, match=message):
        load_cost_file(path)


def test_the_figures_of_another_model_are_refused() -> None:
    plan = compile_plan(small_job(), 2, NUM_TRAIN)
    with pytest.raises(JobError, match=r"model.name: is .* but 'paper' has figures for 'vgg99'"):
        predict(plan, machine(compute={"model": "vgg99"}))


# --- sensitivity -----------------------------------------------------------------------------


def test_each_figure_changes_its_own_term() -> None:
    plan = compile_plan(wide_job(), 8, NUM_TRAIN)
    figures = machine()
    base = predict(plan, figures).seconds
    sync = MachineTimes(figures, plan.job).sync(8)
    latency_s = plan.num_updates * sync.latency_s
    bytes_s = plan.num_updates * sync.s_per_byte * 4000
    compute_s = base - latency_s - bytes_s
    expected = {
        ("compute speed", 0.5): base + compute_s,
        ("compute speed", 2.0): base - compute_s / 2,
        ("bandwidth", 0.5): base + bytes_s,
        ("bandwidth", 2.0): base - bytes_s / 2,
        ("latency", 0.5): base - latency_s / 2,
        ("latency", 2.0): base + latency_s,
    }
    found = {(change.figure, change.factor): change for change in sensitivity(plan, figures)}
    assert {key: change.seconds for key, change in found.items()} == pytest.approx(expected, rel=1e-12)
    for change in found.values():
        assert change.chain_rank_hours == pytest.approx(8 * change.seconds / 3600)
        assert change.time_ratio == pytest.approx(change.seconds / base)


def test_doubling_the_bandwidth_in_the_file_gives_the_row_of_the_table() -> None:
    plan = compile_plan(wide_job(), 8, NUM_TRAIN)
    doubled = machine(host={"gigabytes_per_s": 200}, network={"gigabytes_per_s": 20})
    row = next(c for c in sensitivity(plan, machine()) if (c.figure, c.factor) == ("bandwidth", 2.0))
    assert row.seconds == pytest.approx(predict(plan, doubled).seconds, rel=1e-12)


# --- the command -----------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    monkeypatch.chdir(tmp_path)
    Path("job.toml").write_text(tomli_w.dumps(wide_job().model_dump(mode="json", exclude_none=True)))
    Path("machine.toml").write_text(tomli_w.dumps(TREE))
    return "job.toml", "machine.toml"


def test_plan_prints_cost_and_sensitivity(files: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    job, figures = files
    assert main(["plan", job, "--ranks", "2", "--cost", figures, "--sensitivity"]) == 0
    text = capsys.readouterr().out
    assert "if one figure were different" in text
    assert "predicted from figures, not measured: paper: a data sheet" in text
    assert main(["plan", job, "--ranks", "2", "--cost", figures, "--sensitivity", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["cost"]["sensitivity"]
    assert [(row["figure"], row["factor"]) for row in rows][:2] == [("compute speed", 0.5), ("compute speed", 2.0)]
    assert main(["plan", job, "--sensitivity"]) == 2
    assert "--sensitivity: needs --cost" in capsys.readouterr().err


def test_the_cost_of_an_adaptive_job_says_that_it_has_no_growth(
    files: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    job, figures = files
    tree = wide_job().model_dump(mode="json", exclude_none=True)
    tree["schedule"] = {"policy": "adaptive", "epochs": 4.0, "global_batch": tree["schedule"]["global_batch"]}
    tree["schedule"]["max_batch"] = 2 * tree["schedule"]["global_batch"]
    tree["trigger"] = {"name": "plateau", "patience_epochs": 1.0}
    Path(job).write_text(tomli_w.dumps(tree))
    assert main(["plan", job, "--ranks", "2", "--cost", figures]) == 0
    assert "as if the trigger never decided; --replay" in " ".join(capsys.readouterr().out.split())


def test_ranks_are_chosen_by_the_figures_of_a_machine(
    files: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    job, figures = files
    words = ["plan", job, "--ranks", "4", "--layout.grow_by", "auto", "--cost", figures, "--json"]
    Path(figures).write_text(tomli_w.dumps(changed(host={"latency_us": 1e6})))  # an all-reduce takes seconds
    assert main(words) == 0
    assert {phase["ranks"] for phase in json.loads(capsys.readouterr().out)["cost"]["phases"]} == {1}
    Path(figures).write_text(tomli_w.dumps(TREE))
    assert main(words) == 0
    assert {phase["ranks"] for phase in json.loads(capsys.readouterr().out)["cost"]["phases"]} == {4}


# --- the machines that come with the project -------------------------------------------------


def resnet50(ranks: int) -> Job:
    """ResNet-50 with 256 images a rank, as published."""
    batch = 256 * ranks
    overrides: dict[str, Any] = {"model.ghost_batch": 256, "layout.max_micro_batch": 256, "schedule.epochs": 4}
    overrides |= {"schedule.global_batch": batch, "schedule.max_batch": batch, "schedule.boundaries_epochs": [1, 2, 3]}
    return load_job(JOBS / "imagenet_resnet50_grow.toml", overrides | {"schedule.warmup_epochs": 1})


@pytest.mark.parametrize("path", sorted(MACHINES.glob("*.toml")), ids=lambda path: path.stem)
def test_every_machine_can_be_read_and_prices_10_000_ranks(path: Path) -> None:
    figures = load_machine(path)
    assert figures.source
    cost = predict(compile_plan(resnet50(10_000), 10_000, 10**9), figures)
    alone = predict(compile_plan(resnet50(1), 1, 10**6), figures)
    assert cost.phases[0].update_s > alone.phases[0].update_s  # the same samples for each rank, and an all-reduce
    assert math.isfinite(cost.chain_rank_hours)


def test_the_speed_of_one_dgx_is_predicted_near_the_published_one() -> None:
    """NVIDIA DeepLearningExamples, resnet50v1.5, DGX A100, TF32: 938 images/s on 1 GPU, 7,248 on 8."""
    tree = tomllib.loads((MACHINES / "dgx_a100_resnet50.toml").read_text())
    figures = Machine.model_validate(tree | {"compute": tree["compute"] | {"samples_per_s": 938}})
    update_s = predict(compile_plan(resnet50(8), 8, 10**6), figures).phases[0].update_s
    assert 8 * 256 / update_s == pytest.approx(7248, rel=0.05)
