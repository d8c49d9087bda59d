"""Properties of every job, for any policy, layout and ranks; and invalid jobs are always reported."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from hvd_batchgrow.config.layout import LayoutSection
from hvd_batchgrow.job_file import parse_job, variants
from hvd_batchgrow.messages.errors import Fault, JobError
from hvd_batchgrow.schedule.layout import Layout
from hvd_batchgrow.schedule.phases import Phase
from hvd_batchgrow.schedule.plan import Plan, compile_plan
from hvd_batchgrow.schedule.twin import compile_twin, decay_twin

N, GROUP = 50_000, 32
SCHEDULES = variants("schedule")


def job_tree(schedule: dict[str, Any], layout: dict[str, Any], optim: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": "any",
        "data": {"source": "cifar10"},
        "model": {"name": "resnet20", "ghost_batch": GROUP},
        "optim": optim,
        "schedule": schedule,
        "layout": layout,
    }


def compiled(tree: dict[str, Any], ranks: int) -> Plan:
    return compile_plan(parse_job(tree), ranks, N)


# --- any valid job -----------------------------------------------------------------------------

batches = st.integers(1, 40).map(lambda groups: GROUP * groups)
rising = st.lists(st.floats(0.5, 20), max_size=4).map(
    lambda gaps: [round(sum(gaps[: k + 1]), 3) for k in range(len(gaps))]
)
factors = st.floats(1, 12)
falling = st.lists(st.floats(0.01, 1), max_size=4).map(lambda values: sorted(values, reverse=True))


@st.composite
def boundary_schedules(draw: st.DrawFn, policy: str) -> tuple[dict[str, Any], list[float]]:
    """A schedule with boundaries; and by what its noise is to fall at each."""
    epochs = draw(rising)
    falls = draw(st.lists(factors, min_size=len(epochs), max_size=len(epochs)))
    made: dict[str, Any] = {"boundaries_epochs": epochs, "noise_factor": falls, "global_batch": draw(batches)}
    if len(set(falls)) == 1 and draw(st.booleans()):
        made["noise_factor"] = falls[0]
    made |= {"hybrid": {"growing_boundaries": draw(st.integers(0, len(epochs)))}}.get(policy, {})
    return made | {"epochs": (epochs[-1] if epochs else 0) + 2.5}, falls


@st.composite
def adabatch_schedules(draw: st.DrawFn) -> tuple[dict[str, Any], list[float]]:
    beta, alpha, count = draw(st.floats(1, 4)), draw(st.floats(0.1, 1)), draw(st.integers(1, 6))
    made = {"epochs": 2.0 * count, "every_epochs": 2.0, "batch_factor": beta, "lr_factor": alpha}
    return {**made, "global_batch": draw(batches)}, [beta / alpha] * (count - 1)


@dataclass(frozen=True)
class Line:
    """A learning rate that falls in a line to a fraction of the first, imported; the plan chooses the phases."""

    end: float

    def falls(self, phases: Sequence[Phase], epochs: float) -> list[float]:
        """Return by what the mean over each phase falls; the mean of a line is its value in the middle."""
        edges = [*(phase.start_epoch for phase in phases), epochs]
        means = [self.end + (1 - self.end) * (1 - (a + b) / 2 / epochs) for a, b in pairwise(edges)]
        return [a / b for a, b in pairwise(means)]


@dataclass(frozen=True)
class Steps:
    """Growth to the limit in equal factors."""

    count: int

    def falls(self, plan: Plan) -> list[float]:
        """Return the factor by which N/B falls (N/B - 1 with the exact noise scale)."""
        first, schedule = plan.schedule.phases[0].global_batch, plan.job.schedule
        limit = schedule.stated_limit
        assert limit is not None
        last = limit if isinstance(limit, int) else N // int(limit[2:]) // GROUP * GROUP
        wanted = [first * (last / first) ** (k / self.count) for k in range(self.count + 1)]
        noise = [N / batch - (1 if schedule.exact_noise else 0) for batch in wanted]
        return [a / b for a, b in pairwise(noise)]


Falls = list[float] | Line | Steps
"""By what the noise is to fall from phase to phase."""


def falls_of(falls: Falls, plan: Plan) -> list[float]:
    if isinstance(falls, Steps):
        return falls.falls(plan)
    return falls.falls(plan.schedule.phases, plan.job.schedule.epochs) if isinstance(falls, Line) else falls


@st.composite
def imported_schedules(draw: st.DrawFn) -> tuple[dict[str, Any], Falls]:
    epochs, multiples = draw(rising), draw(falling)
    count = min(len(epochs), len(multiples))
    if count and draw(st.booleans()):
        steps = [list(pair) for pair in zip(epochs, multiples, strict=False)]
        made = {"epochs": epochs[count - 1] + 2.0, "lr_schedule": "steps", "lr_steps": steps}
        return {**made, "global_batch": draw(batches)}, [a / b for a, b in pairwise([1.0, *multiples[:count]])]
    count, end = draw(st.integers(1, 5)), draw(st.floats(0, 0.9))
    made = {"epochs": 9.0, "lr_schedule": "polynomial", "end_lr_fraction": end, "num_phases": count}
    return {**made, "global_batch": draw(batches)}, Line(end)


@st.composite
def late_schedules(draw: st.DrawFn) -> tuple[dict[str, Any], Falls]:
    count = draw(st.integers(1, 4))
    made = {"epochs": 9.0, "hold_fraction": draw(st.floats(0.05, 0.95)), "growth_steps": count}
    return {**made, "global_batch": draw(batches)}, Steps(count)


@st.composite
def step_schedules(draw: st.DrawFn) -> tuple[dict[str, Any], list[float]]:
    sizes = draw(st.lists(batches, min_size=1, max_size=4))
    steps = " ".join(f"{k * 60_000}:{batch}" for k, batch in enumerate(sizes))
    rule = draw(st.sampled_from([0.0, 0.5, 1.0]))
    made = {"epochs": 6.0, "batch_steps": steps, "lr_rule": {0.0: "none", 0.5: "sqrt", 1.0: "linear"}[rule]}
    return made, [(after / before) ** (1 - rule) for before, after in pairwise(sizes)]


def of_policy(policy: str) -> st.SearchStrategy[tuple[dict[str, Any], Falls]]:
    own = {"adabatch": adabatch_schedules, "import": imported_schedules}
    own |= {"late": late_schedules, "steps": step_schedules}
    return own[policy]() if policy in own else boundary_schedules(policy)


@st.composite
def jobs(draw: st.DrawFn) -> tuple[dict[str, Any], int, Falls]:
    """A job's tree, ranks, and by what its noise is to fall from phase to phase."""
    policy = draw(st.sampled_from(sorted(SCHEDULES.keys() - {"adaptive"})))
    schedule, falls = draw(of_policy(policy))
    lr, momentum = draw(st.floats(1e-4, 10)), draw(st.floats(0, 0.99))
    if policy not in {"decay", "steps"}:
        whole = 13 * schedule["global_batch"] if policy == "import" else 4992
        schedule["max_batch"] = draw(st.sampled_from(["N/10", "N/7", whole]))
    if policy not in {"decay", "steps"} and draw(st.booleans()):
        schedule["batch_multiple"] = GROUP
    if policy not in {"seesaw", "steps"}:
        schedule["exact_noise"] = draw(st.booleans())
    if policy != "steps":
        schedule["lr_scale"] = draw(st.sampled_from([1.0, 1.0, 1.7, 3.0]))
    if policy not in {"seesaw", "steps"}:
        schedule["raise_momentum_to"] = draw(st.sampled_from([momentum, (1 + momentum) / 2]))
    if "boundaries_epochs" in schedule and draw(st.booleans()):
        count = len(schedule["boundaries_epochs"])
        others = draw(st.lists(st.floats(0, 0.99), min_size=count, max_size=count))
        schedule["momenta"] = [schedule.get("raise_momentum_to", momentum), *others]
    if draw(st.booleans()):
        share = draw(st.floats(0, 0.5))
        schedule |= {"warmup_epochs": draw(st.floats(0.1, schedule["epochs"] - 0.1)), "warmup_start_lr": share * lr}
    layout = {"grow_by": draw(st.sampled_from(["accumulation", "ranks"])), "uneven_ranks": draw(st.booleans())}
    own = {"name": "adam", "betas": [momentum, 0.999]} if policy == "seesaw" else {"name": "sgd", "momentum": momentum}
    optim = {**own, "lr": lr}
    ranks = draw(st.integers(1, 8))
    return job_tree({"policy": policy, **schedule}, layout, optim), ranks, falls


def is_formed(layout: Layout, phase: Phase) -> bool:
    """Whether every group has its place, and no rank a pass that it does not need."""
    groups = phase.global_batch // GROUP
    most = math.ceil(groups / layout.ranks) * GROUP
    whole = layout.uneven_ranks or layout.ranks * layout.accumulation * layout.micro_batch == phase.global_batch
    return whole and groups >= layout.ranks and math.ceil(most / layout.micro_batch) == layout.accumulation


@pytest.mark.slow
@settings(max_examples=200)
@given(jobs())
def test_any_job_has_its_noise_fall_and_its_phases_in_order(made: tuple[dict[str, Any], int, Falls]) -> None:
    tree, ranks, falls = made
    try:
        plan = compiled(tree, ranks)
    except JobError:
        reject()
    phases = plan.schedule.phases
    assert [plan.noise_scale(a) / plan.noise_scale(b) for a, b in pairwise(phases)] == pytest.approx(
        falls_of(falls, plan), rel=1e-9
    )
    assert [after.start_samples for after in phases[1:]] == [before.end_samples for before in phases[:-1]]
    assert plan.schedule.end_samples == sum(p.num_updates * p.global_batch for p in phases)
    assert all(p.lr > 0 and p.global_batch % GROUP == 0 and p.global_batch < N for p in phases)
    assert all(is_formed(layout, phase) for layout, phase in zip(plan.layouts, phases, strict=True))
    assert max(layout.ranks for layout in plan.layouts) <= ranks
    again = compiled(json.loads(json.dumps(plan.to_dict()["job_file"])), ranks)
    assert again.to_dict() == plan.to_dict()


@settings(max_examples=100)
@given(jobs(), st.integers(0, 10**6))
def test_any_job_that_falls_has_a_twin_of_its_noise(made: tuple[dict[str, Any], int, Falls], at: int) -> None:
    tree, ranks, falls = made
    try:
        plan = compiled(tree, ranks)
    except JobError:
        reject()
    if min(falls_of(falls, plan), default=1) < 1 - 1e-12:
        reject()
    twin = compile_twin(decay_twin(plan.job, N), ranks, N)
    for ours, theirs in zip(plan.schedule.phases, twin.schedule.phases, strict=True):
        lrs = [p.schedule.warmup.lr_at(at, phase.lr) for p, phase in ((plan, ours), (twin, theirs))]
        noise = [
            p.start.noise.of(lr, phase.momentum, phase.global_batch)
            for p, lr, phase in zip((plan, twin), lrs, (ours, theirs), strict=True)
        ]
        assert noise[1] == pytest.approx(noise[0], rel=1e-9)


# --- any nonsense --------------------------------------------------------------------------------

NUMBERS = st.one_of(st.integers(-3, 300), st.sampled_from([10**6, 2**62, 2**63]), st.floats(), st.floats(0.01, 20))
WORDS = ["N/10", "N/1", "N/99999", "0:128 500:64", "0:1 1:9999999", "steps", "cosine", "polynomial", "ranks", "auto"]
WORDS += ["least_rank_hours", "linear", "sqrt", "adam", "x"]
JUNK = st.one_of(
    NUMBERS,
    st.booleans(),
    st.sampled_from(WORDS),
    st.lists(NUMBERS, max_size=4),
    st.lists(st.floats(0.01, 3), max_size=3),
    st.lists(st.tuples(st.floats(0.1, 9), st.floats(0.01, 1)).map(list), max_size=3),
)
SOUND: dict[str, Any] = {
    "epochs": 9.0,
    "global_batch": 128,
    "boundaries_epochs": [2.0, 4.0],
    "max_batch": "N/10",
    "every_epochs": 3.0,
    "batch_steps": "0:128 100000:256",
    "lr_schedule": "cosine",
}


@st.composite
def nonsense(draw: st.DrawFn) -> dict[str, Any]:
    """A job of any policy, of which any keys of schedule and layout hold anything."""
    policy = draw(st.sampled_from(sorted(SCHEDULES)))
    keys = SCHEDULES[policy].model_fields.keys() - {"policy"}
    schedule = {key: value for key, value in SOUND.items() if key in keys} | {"policy": policy}
    schedule |= draw(st.dictionaries(st.sampled_from(sorted(keys)), JUNK, max_size=3))
    layout = draw(st.dictionaries(st.sampled_from(sorted(LayoutSection.model_fields)), JUNK, max_size=2))
    name = draw(st.sampled_from(["sgd", "lars", "adam"]))
    tree = job_tree(schedule, layout, {"name": name, "lr": draw(st.sampled_from([0.1, 1e-300, 1e300]))})
    return tree | ({"trigger": {"name": "cabs"}} if policy == "adaptive" else {})


@pytest.mark.slow
@settings(max_examples=400)
@given(nonsense(), st.integers(-1, 8))
def test_any_nonsense_is_a_job_error_with_a_path(tree: dict[str, Any], ranks: int) -> None:
    faults = [Fault("nothing", "is wrong")]
    try:
        plan = compiled(tree, ranks)
        assert all(math.isfinite(p.lr) and p.lr > 0 and 1 <= p.global_batch < N for p in plan.schedule.phases)
        decay_twin(plan.job, N)
    except JobError as error:
        faults = list(error.faults)
    assert faults
    assert all(fault.path and "\n" not in fault.message for fault in faults)
