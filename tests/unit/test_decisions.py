"""Decisions: requests are rounded to batches that can be formed, saved, read again, and compiled to the same plan."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvd_batchgrow.config import Job
from hvd_batchgrow.messages.errors import JobError
from hvd_batchgrow.schedule.adaptive.batch_requests import BatchRequest, form_decision
from hvd_batchgrow.schedule.adaptive.decisions import (
    Decision,
    decisions_text,
    parse_decisions,
    read_decisions,
)
from hvd_batchgrow.schedule.plan import Plan, compile_plan
from hvd_batchgrow.schedule.stages import make_start
from hvd_batchgrow.schedule.trigger import Measurement, bounded, make_trigger
from hvd_batchgrow.schedule.twin import decay_twin
from tests.helpers import NUM_TRAIN, measured_job, small_job

N = NUM_TRAIN
TRIGGER = {"name": "gradient_noise"}
PLATEAU = {"name": "plateau", "patience_epochs": 1.0}


def decide(job: Job, request: BatchRequest, samples: int = 160, before: tuple[Decision, ...] = ()) -> Decision | None:
    return form_decision(job, N, before, samples, request, {})


def formed(job: Job, request: BatchRequest, samples: int = 160, before: tuple[Decision, ...] = ()) -> Decision:
    decision = decide(job, request, samples, before)
    assert decision is not None
    return decision


def noise_of(job: Job, decision: Decision) -> float:
    return make_start(job, N).noise.of(decision.new_lr, job.optim.momentum, decision.new_batch)


def decision_at(samples: int, batch: int = 48, lr: float = 0.05, **values: Any) -> Decision:
    return Decision(samples, "gradient_noise", "planted", 16, batch, float(batch), 0.05, lr, **values)


# --- rounding ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("multiple", [None, 8, 32])
@pytest.mark.parametrize("wanted", [21.0, 39.9, 40.0, 57.3, 95.0])
def test_a_wanted_batch_is_rounded_and_the_rate_makes_up_for_it(
    exact: bool, multiple: int | None, wanted: float
) -> None:
    schedule = {"exact_noise": exact, "global_batch": 16 if multiple != 32 else 32} | (
        {"batch_multiple": multiple} if multiple else {}
    )
    job = measured_job(TRIGGER, schedule=schedule)
    unit = multiple or 16
    decision = decide(job, BatchRequest("planted", batch=wanted))
    nearest = max(1, math.floor(wanted / unit + 0.5)) * unit  # 40 is 2.5 · 16: a tie, which rounds up
    if nearest == job.schedule.first_batch:
        assert decision is None  # the rate alone is not changed
        return
    assert decision is not None
    assert decision.new_batch == nearest
    assert decision.wanted_batch == wanted
    asked = make_start(job, N).noise.of(job.optim.lr, job.optim.momentum, wanted)
    assert noise_of(job, decision) == pytest.approx(asked, rel=1e-9)


def test_a_request_beyond_the_limit_is_cut_and_the_rate_stays() -> None:
    job = measured_job(TRIGGER)
    decision = formed(job, BatchRequest("planted", batch=5000.0))
    assert (decision.new_batch, decision.new_lr, decision.wanted_batch) == (96, 0.05, 5000.0)
    assert decide(job, BatchRequest("planted", batch=5000.0), 256, (decision,)) is None


@pytest.mark.parametrize(("before", "after"), [(16, 24), (24, 32), (32, 48), (40, 56), (48, 72), (80, 96)])
def test_rounding_takes_no_batch_beyond_the_factor_and_the_rate_makes_up_for_it(before: int, after: int) -> None:
    """Three half multiples are rounded to two, or to one, not beyond: at most × 1.5."""
    job = measured_job({**TRIGGER, "max_batch_factor": 1.5, "hold_epochs": 0.0}, schedule={"batch_multiple": 8})
    now = Measurement(160, before, 0.05, trace=1e6, squared_norm=1.0)
    forced = bounded(
        None, measured_job({**TRIGGER, "max_batch_factor": 1.5, "windows_epochs": [[0.1, 0.2]]}), N, 0, now
    )
    made = () if before == 16 else (decision_at(16, before),)
    for request in (make_trigger(job, N).look(now), forced):
        assert request is not None
        decision = formed(job, request, 160, made)
        assert (decision.new_batch, decision.wanted_batch) == (after, 1.5 * before)
        assert decision.new_lr == pytest.approx(0.05 * after / min(96, 1.5 * before))


@pytest.mark.parametrize("exact", [False, True])
def test_each_plateau_divides_the_noise_by_the_factor_beyond_the_limit_too(exact: bool) -> None:
    job = measured_job(PLATEAU, schedule={"exact_noise": exact})
    scale = make_start(job, N).noise.of(job.optim.lr, job.optim.momentum, 16)
    made: tuple[Decision, ...] = ()
    for k in range(4):
        at = made[-1].samples + 2 * made[-1].new_batch if made else 160
        decision = formed(job, BatchRequest("planted", noise_factor=5.0), at, made)
        assert noise_of(job, decision) == pytest.approx(scale / 5 ** (k + 1), rel=1e-9)
        made = (*made, decision)
    batches, rates = [d.new_batch for d in made], [d.new_lr for d in made]
    assert batches[1:] == [96, 96, 96]
    assert [a / b for a, b in pairwise(rates[1:])] == pytest.approx([5.0, 5.0])
    if not exact:
        assert (batches[0], rates[0]) == (80, 0.05)
        assert rates[1] == pytest.approx(0.05 * 96 / 400)
    plan = compile_plan(job, 1, N, None, made)
    assert [p.lr for p in plan.schedule.phases[1:]] == pytest.approx(rates)


def test_with_a_rule_growth_takes_the_place_of_earlier_decays() -> None:
    """By hand, in multiples of 16: 16 · 1.3 = 20.8 is formed as 16, and ε decays; 20.8 · 1.3 = 27.04 as 32, at ε.

    Then 32 · 1.3 = 41.6, 48 · 1.3 = 62.4, 64 · 1.3 = 83.2 and 80 · 1.3 = 104, above the limit of 96; there ε decays.
    """
    job = measured_job(PLATEAU, schedule={"lr_rule": "sqrt"})
    made: tuple[Decision, ...] = ()
    for _ in range(8):
        at = made[-1].samples + 2 * made[-1].new_batch if made else 160
        made = (*made, formed(job, BatchRequest("planted", noise_factor=1.3), at, made))
    assert [d.new_batch for d in made] == [16, 32, 48, 64, 80, 96, 96, 96]
    assert [d.wanted_batch for d in made][:6] == pytest.approx([20.8, 27.04, 41.6, 62.4, 83.2, 104])
    rates = [0.05 / 1.3, *[0.05] * 5, 0.05 / 1.3, 0.05 / 1.3**2]
    assert [d.new_lr for d in made] == pytest.approx(rates)


def test_adams_set_comes_on_top_of_decisions_as_of_other_growth() -> None:
    optim = {"name": "adam", "lr": 1e-3, "betas": [0.9, 0.999], "weight_decay": 0.0}
    job = measured_job(PLATEAU, optim=optim, schedule={"lr_rule": "adam", "max_batch": 64})
    made: tuple[Decision, ...] = (formed(job, BatchRequest("planted", noise_factor=2.0)),)
    made = (*made, formed(job, BatchRequest("planted", noise_factor=2.0), 256, made))
    assert [d.new_batch for d in made] == [32, 64]
    assert [d.new_lr for d in made] == pytest.approx([1e-3, 1e-3])
    last = compile_plan(job, 1, N, None, made).schedule.phases[-1]
    assert (last.lr, last.momentum) == pytest.approx((2e-3, 0.9**4))


def test_a_decision_describes_what_it_does() -> None:
    decision = formed(measured_job(TRIGGER), BatchRequest("B_simple = 57", batch=57.0))
    assert decision.describe() == "batch 16 → 64 (57 requested), lr 0.05 → 0.05614: B_simple = 57"
    report = decision_at(160, restore_samples=1000).describe()
    assert report == "batch 16 → 48, weights as at sample 1,000: planted"


# --- on record --------------------------------------------------------------------------------------


def test_decisions_go_through_their_file(tmp_path: Path) -> None:
    first = formed(measured_job(TRIGGER), BatchRequest('with "quotes", ε and\nlines', batch=57.3))
    second = decision_at(256, measured={"trace": 0.1 + 0.2, "b_simple": 1e300}, restore_samples=160)
    path = tmp_path / "decisions.jsonl"
    for source in (None, "runs/a b/decisions.jsonl"):
        path.write_bytes(decisions_text(source, [first, second]))
        assert read_decisions(path) == (source, (first, second))
        assert read_decisions(tmp_path) == (source, (first, second))  # the run's folder
    path.write_bytes(b"")
    assert read_decisions(path) == (None, ())


LINE = json.dumps(decision_at(160).to_dict())


def broken(**values: Any) -> str:
    return json.dumps({**decision_at(256).to_dict(), **values})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("nonsense", "Expecting value"),
        ("[1, 2]", "not an object"),
        ("{}", "missing .* required positional arguments: 'samples'"),
        (broken(color="red"), "unknown: color"),
        (broken(samples=-16), "whole numbers above 0"),
        (broken(samples=256.5), "whole numbers above 0"),
        (broken(samples=True), "whole numbers above 0"),
        (broken(new_batch=0), "whole numbers above 0"),
        (broken(new_batch="48"), "whole numbers above 0"),
        (broken(new_lr=math.nan), "learning rate above 0"),
        (broken(new_lr=-0.1), "learning rate above 0"),
        (broken(old_batch="x"), "whole numbers above 0"),
        (broken(old_lr=None), "learning rate above 0"),
        (broken(restore_samples="x"), "restore_samples"),
        (broken(why=3), "why"),
        (broken(measured=[1]), "measured"),
        (json.dumps({"replayed_from": "elsewhere"}), "unknown: replayed_from"),
        ("[" * 100_000, "maximum recursion depth"),
    ],
)
def test_nonsense_is_named_by_its_line(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "decisions.jsonl"
    path.write_text(f"{LINE}\n{line}\n{LINE}\n")
    with pytest.raises(JobError, match=rf"(?s)decisions\.jsonl.*line 2: is not a decision: .*{message}"):
        read_decisions(path)
    path.write_text(f"{LINE}\n{line}\n")  # the last line, but a whole one
    with pytest.raises(JobError, match="line 2: is not a decision"):
        read_decisions(path)


def test_a_last_line_cut_short_anywhere_is_skipped() -> None:
    whole = f"{LINE}\n"
    for end in range(1, len(LINE)):
        assert parse_decisions(whole + LINE[:end], Path("x")) == (None, (decision_at(160),))
    # Torn lines have their place at the end alone.
    with pytest.raises(JobError, match="line 2"):
        parse_decisions(f"{whole}{LINE[:20]}\n{LINE}\n", Path("x"))


def test_a_file_that_is_not_there_or_no_text_is_named(tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r"none.jsonl.*\n.*cannot be read: No such file"):
        read_decisions(tmp_path / "none.jsonl")
    (tmp_path / "bytes.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(JobError, match="cannot be read"):
        read_decisions(tmp_path / "bytes.jsonl")


# --- a plan of decisions ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("decisions", "message"),
    [
        ([decision_at(168)], "decision 1: at sample 168, 10.50 updates of 16 after sample 0"),
        ([decision_at(160), decision_at(200)], "decision 2: at sample 200, 0.83 updates of 48 after sample 160"),
        ([decision_at(160), decision_at(160)], "decision 2: at sample 160, 0.00 updates of 48 after sample 160"),
        ([decision_at(160), decision_at(112)], "decision 2: at sample 112, -1.00 updates of 48"),
        ([decision_at(960)], "decision 1: at sample 960, where the 3 epochs of this job are over"),
        ([replace(decision_at(160), old_batch=32)], "decision 1: .* made at a batch of 32, lr 0.05; this job is at 16"),
        ([replace(decision_at(160), old_lr=0.1)], "made at a batch of 16, lr 0.1; this job is at 16, lr 0.05 there"),
        ([decision_at(160), decision_at(256)], "decision 2: at sample 256, it was made at a batch of 16, .* at 48"),
        ([decision_at(160, batch=52)], "52 = 6.50 ghost batches of 8, which are never cut; nearest: 48, 56"),
    ],
)
def test_decisions_of_another_job_are_refused(decisions: list[Decision], message: str) -> None:
    with pytest.raises(JobError, match=message):
        compile_plan(measured_job(TRIGGER), 1, N, None, decisions)


def test_the_twin_of_what_was_decided_decays_where_the_batch_grew() -> None:
    job = measured_job(PLATEAU)
    made = (formed(job, BatchRequest("planted", noise_factor=5.0)),)
    twin = compile_plan(decay_twin(job, N, made), 1, N)
    assert [(p.start_samples, p.lr, p.global_batch) for p in twin.schedule.phases] == [(0, 0.05, 16), (160, 0.01, 16)]
    with pytest.raises(JobError, match="has a twin once it has decided"):
        decay_twin(job, N)


requests = st.lists(
    st.tuples(st.integers(1, 8), st.one_of(st.floats(1.01, 50.0).map(lambda f: ("noise", f)), st.just(("batch", 0.0)))),
    max_size=12,
)


@given(
    steps=requests,
    factors=st.lists(st.floats(1.0, 6.0), min_size=12, max_size=12),
    group=st.sampled_from([4, 8]),
    first=st.integers(1, 3),
    multiple=st.sampled_from([1, 2, 3]),
    cap=st.integers(3, 20),
    ranks=st.sampled_from([1, 2, 3]),
    uneven_ranks=st.booleans(),
)
def test_any_request_gives_a_plan_that_can_be_formed_and_read_again(
    steps: list[tuple[int, tuple[str, float]]],
    factors: list[float],
    group: int,
    first: int,
    multiple: int,
    cap: int,
    ranks: int,
    uneven_ranks: bool,
) -> None:
    unit = group * (1 if uneven_ranks else ranks) * multiple
    if uneven_ranks and unit < group * ranks:
        unit *= ranks
    job = measured_job(
        PLATEAU,
        model={"ghost_batch": group},
        schedule={
            "global_batch": unit * first,
            "batch_multiple": unit,
            "max_batch": unit * max(first, cap),
            "epochs": 9.0,
        },
        layout={"max_micro_batch": 2 * group, "uneven_ranks": uneven_ranks},
    )
    if unit * max(first, cap) >= N:
        return
    made: tuple[Decision, ...] = ()
    plan = compile_plan(job, ranks, N)
    samples = 0
    for (updates, (kind, noise_factor)), factor in zip(steps, factors, strict=False):
        batch = plan.schedule.at(samples).global_batch
        samples += updates * batch
        if samples >= 9 * N:
            break
        request = (
            BatchRequest("x", noise_factor=noise_factor) if kind == "noise" else BatchRequest("x", batch=factor * batch)
        )
        decision = decide(job, request, samples, made)
        if decision is None:
            continue
        assert decision.new_batch >= batch
        assert decision.new_batch % unit == 0
        made = (*made, decision)
        plan = compile_plan(job, ranks, N, None, made)
    _check_plan(plan)
    again = parse_decisions(decisions_text(None, made).decode(), Path("x"))[1]
    assert compile_plan(job, ranks, N, None, again) == plan


def _check_plan(plan: Plan) -> None:
    phases = plan.schedule.phases
    assert [p.start_samples for p in phases] == [0, *(p.end_samples for p in phases[:-1])]
    assert plan.schedule.end_samples - phases[-1].global_batch < 9 * N <= plan.schedule.end_samples
    for phase, layout, decision in zip(phases[1:], plan.layouts[1:], plan.decisions, strict=True):
        assert phase.start_samples == decision.samples
        held = layout.ranks * layout.accumulation * layout.micro_batch
        assert held == phase.global_batch or (layout.uneven_ranks and held > phase.global_batch)


# --- what can be known to go wrong ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ranks", "trigger", "sections", "message"),
    [
        (1, {"name": "none"}, {}, "trigger.name: schedule.policy = 'adaptive' needs a trigger"),
        (1, TRIGGER, {"layout": {"grow_by": "auto"}}, "layout.grow_by: needs to know the phases in advance"),
        (
            1,
            TRIGGER,
            {"layout": {"grow_by": "ranks", "ranks_per_phase": [1]}},
            "layout.ranks_per_phase: needs to know the phases in advance",
        ),
        (
            1,
            {**TRIGGER, "windows_epochs": [[1.0, 0.5]]},
            {},
            "must rise from window to window: 0.5 follows 1",
        ),
        (
            1,
            {**TRIGGER, "windows_epochs": [[0.5, 1.0], [1.0, 1.5], [1.2, 2.0]]},
            {},
            "must rise from window to window: 1.2 follows 1.5",
        ),
        (1, {**TRIGGER, "windows_epochs": [[0.5, 1.0], [1.0, 1.5]]}, {}, "1 follows 1"),
        (1, {**TRIGGER, "windows_epochs": [[0.5, 3.0]]}, {}, "windows_epochs: 3 is not before epochs = 3"),
        (
            1,
            PLATEAU,
            {
                "optim": {"name": "adam", "lr": 1e-3, "weight_decay": 0.0},
                "schedule": {"lr_rule": "adam_linear", "max_batch": 160},
            },
            r"schedule.lr_rule: lr_rule = 'adam_linear' needs .*160/16 · 0.1 = 1; use 'adam', or grow to at most 144",
        ),
        (
            1,
            {**TRIGGER, "max_batch_factor": 1.2},
            {},
            "trigger.min_factor: 1.25 is above max_batch_factor = 1.2: the batch would never grow",
        ),
        (
            1,
            {**TRIGGER, "max_batch_factor": 1.5},
            {},
            r"trigger.max_batch_factor: 1.5 × 16 = 24 is below 32, the next whole multiple of 16: .* nearest: 2; or a",
        ),
        (
            1,
            TRIGGER,
            {"gradient_noise": {"preconditioned": True}},
            "gradient_noise.preconditioned: is for optim.name = 'adam' or 'adamw', not 'sgd'",
        ),
        (4, TRIGGER, {}, r"schedule.global_batch: 16 = 0.50 × 32, ghost batches of 8 on 4 ranks; nearest: 32"),
        (1, TRIGGER, {"schedule": {"batch_multiple": 12}}, r"batch_multiple: 12 = 1.50 × 8, .* nearest: 8 or 16"),
        (
            3,
            TRIGGER,
            {},
            r"16 = 0.67 × 24, ghost batches of 8 on 3 ranks; nearest: 24; or layout.uneven_ranks = true",
        ),
        (
            1,
            TRIGGER,
            {"schedule": {"max_batch": 304, "exact_noise": True}},
            r"max_batch: 304 must be below N = 300: the whole training set has no sampling noise; nearest: 296",
        ),
        (
            1,
            {**PLATEAU, "patience_epochs": 3.0},
            {},
            "patience_epochs: 3 is not below the run's 3 epochs: it would never",
        ),
        (1, {**TRIGGER, "hold_epochs": 4.0}, {}, "trigger.hold_epochs: 4 is not below the run's 3 epochs"),
        (
            1,
            {"name": "adascale", "every_epochs": 6.0},
            {"schedule": {"batch_scale": 2.0}, "evaluation": {"every_epochs": 9.0}},
            "trigger.every_epochs: 6 is not below the run's 6 epochs",
        ),
        (1, TRIGGER, {"schedule": {"max_batch": 90}}, r"max_batch: 90 = 5.62 × 16, .* nearest: 80, 96"),
        (
            1,
            TRIGGER,
            {"schedule": {"global_batch": 48, "batch_multiple": 32}},
            r"schedule.global_batch: 48 = 1.50 × 32, but every batch must be a multiple of 32; nearest: 32, 64",
        ),
        (
            1,
            TRIGGER,
            {"schedule": {"global_batch": 8}, "layout": {"max_micro_batch": 8}},
            "schedule.global_batch: 8 is one ghost batch, so an update has one gradient: tr.* needs two; use >= 16",
        ),
        (
            1,
            TRIGGER,
            {"layout": {"max_micro_batch": 16}},
            "layout.max_micro_batch: 16 makes a batch of 16 one micro-batch: .* use 8, or 2 ranks",
        ),
        (
            2,
            TRIGGER,
            {"layout": {"max_micro_batch": 16, "grow_by": "ranks"}},
            "layout.max_micro_batch: 16 makes a batch of 16 one micro-batch",
        ),
    ],
)
def test_what_cannot_be_measured_or_formed_is_refused_beforehand(
    ranks: int, trigger: dict[str, Any], sections: dict[str, Any], message: str
) -> None:
    with pytest.raises(JobError, match=message):
        compile_plan(measured_job(trigger, **sections), ranks, N)


@pytest.mark.parametrize(
    ("ranks", "sections", "messages"),
    [
        (1, {}, [r"layout.max_micro_batch: 16 makes a batch of 16 one micro-batch: .* use 8, or 2 ranks"]),
        (1, {"model": {"ghost_batch": 16}}, [r"schedule.global_batch: 16 is one ghost batch.* use >= 32"]),
        (
            1,
            {"layout": {"max_micro_batch": 48}},
            ["48 makes a batch of 16 one micro-batch", "a batch of 48 one micro-batch: .* use 24,"],
        ),
        (1, {"layout": {"max_micro_batch": 8}}, []),
        (2, {}, []),
        (2, {"layout": {"grow_by": "ranks", "max_micro_batch": 16}}, ["16 makes a batch of 16 one micro-batch"]),
        (1, {"gradient_noise": {"measure": False}}, []),
    ],
)
def test_a_fixed_schedule_that_measures_nothing_says_so(
    ranks: int, sections: dict[str, Any], messages: list[str]
) -> None:
    sections = {"gradient_noise": {"measure": True}, "layout": {"max_micro_batch": 16}} | sections
    notes = compile_plan(small_job(**sections), ranks, N).notes
    assert len(notes) == len(messages)
    for note, expected in zip(notes, messages, strict=True):
        assert re.search(f"^gradient_noise.measure: an update of one micro-batch is not measured; .*{expected}", note)


def test_layer_groups_of_nothing_that_is_measured_are_refused() -> None:
    groups = {"per_layer_group": True}
    for job in (small_job(gradient_noise=groups), measured_job(PLATEAU, gradient_noise=groups)):
        with pytest.raises(JobError, match=r"gradient_noise.per_layer_group: .* set gradient_noise.measure = true"):
            compile_plan(job, 1, N)
    measuring = measured_job(TRIGGER, gradient_noise=groups)
    assert compile_plan(measuring, 1, N).job.gradient_noise.per_layer_group
    twin = decay_twin(measuring, N, (decision_at(160),))  # which has no trigger to measure for
    assert not compile_plan(twin, 1, N).job.gradient_noise.per_layer_group


def test_a_trigger_without_a_measured_schedule_is_refused() -> None:
    with pytest.raises(JobError, match=r"trigger.name: 'plateau' has no effect with policy = 'grow'"):
        compile_plan(small_job(trigger=PLATEAU), 1, N)


@pytest.mark.parametrize(
    ("ranks", "trigger", "sections"),
    [
        (1, TRIGGER, {}),
        (2, TRIGGER, {"layout": {"max_micro_batch": 16}}),
        (1, PLATEAU, {"layout": {"max_micro_batch": 16}}),
        (1, TRIGGER, {"layout": {"exact": True}}),
        (2, TRIGGER, {"layout": {"grow_by": "ranks"}}),
        (3, TRIGGER, {"layout": {"uneven_ranks": True}, "schedule": {"global_batch": 24, "batch_multiple": 8}}),
        (1, {**TRIGGER, "windows_epochs": [[0.0, 1.0], [1.5, 1.5]]}, {}),
        (1, {**TRIGGER, "max_batch_factor": 1.5}, {"schedule": {"batch_multiple": 8}}),
        (1, {**PLATEAU, "noise_factor": 1.5}, {}),
        (1, {**PLATEAU, "patience_epochs": 9.0, "windows_epochs": [[0.0, 1.0]]}, {}),
        (1, {**PLATEAU, "patience_epochs": 2.9}, {"evaluation": {"every_epochs": 1e9}}),
        (1, {**TRIGGER, "every_epochs": 9.0}, {"evaluation": {"every_epochs": 1.0}}),
        (1, {"name": "adascale", "every_epochs": 5.0}, {"schedule": {"batch_scale": 2.0}}),
    ],
)
def test_what_can_is_not(ranks: int, trigger: dict[str, Any], sections: dict[str, Any]) -> None:
    compile_plan(measured_job(trigger, **sections), ranks, N)


# --- AdaScale ---------------------------------------------------------------------------------


def test_a_scaled_batch_that_is_rounded_says_what_was_requested() -> None:
    """1.7 · 16 = 27.2 samples are 1.7 units of 16, so 32 are formed. The defect: the plan did not show that."""
    job = measured_job({"name": "adascale"}, schedule={"batch_scale": 1.7})
    first = compile_plan(job, 1, N).schedule.phases[0]
    assert (first.wanted_batch, first.global_batch) == pytest.approx((27.2, 32))
    first = compile_plan(measured_job({"name": "adascale"}, schedule={"batch_scale": 2.0}), 1, N).schedule.phases[0]
    assert (first.wanted_batch, first.global_batch) == (32, 32)


def test_the_twin_of_adascale_is_the_schedule_that_it_scales() -> None:
    job = measured_job({"name": "adascale"}, schedule={"batch_scale": 4.0, "lr_boundaries_epochs": [1.0, 2.0]})
    twin = decay_twin(job, N)
    assert [phase.global_batch for phase in compile_plan(job, 1, N).schedule.phases] == [64] * 3
    assert [phase.global_batch for phase in compile_plan(twin, 1, N).schedule.phases] == [16] * 3
    rates = [phase.lr for phase in compile_plan(twin, 1, N).schedule.phases]
    assert rates == pytest.approx([0.05, 0.005, 0.0005])
    assert twin.schedule.epochs == job.schedule.epochs


@pytest.mark.parametrize(
    ("trigger", "schedule", "fault"),
    [
        ("plateau", {"batch_scale": 2.0}, "schedule.batch_scale: 2 is for trigger.name = 'adascale'"),
        ("adascale", {"lr_boundaries_epochs": [2.0, 1.0]}, "schedule.lr_boundaries_epochs: must rise"),
        (
            "adascale",
            {"lr_boundaries_epochs": [5.0]},
            "lr_boundaries_epochs: must end before epochs = 3, got 5",
        ),
        ("adascale", {}, "schedule.batch_scale: 1 × 16 is formed as 16: the gain would always be 1; nearest: 2"),
        ("adascale", {"batch_scale": 1.4}, "schedule.batch_scale: 1.4 × 16 is formed as 16"),
        (
            "adascale",
            {"batch_scale": 8.0},
            "schedule.batch_scale: 8 × 16 = 128 is above schedule.max_batch = 96, 96 samples; nearest: 6",
        ),
        ("adascale", {"batch_scale": 2.0, "lr_scale": 2.0}, "schedule.lr_scale: 2.0 is not for 'adascale', whose gain"),
        ("adascale", {"batch_scale": 2.0, "raise_momentum_to": 0.95}, "schedule.raise_momentum_to: 0.95 is not for"),
        ("adascale", {"batch_scale": 2.0, "lr_rule": "sqrt"}, "schedule.lr_rule: 'sqrt' is not for 'adascale'"),
    ],
)
def test_faults_of_a_scaled_batch(trigger: str, schedule: dict[str, Any], fault: str) -> None:
    with pytest.raises(JobError, match=re.escape(fault)):
        compile_plan(measured_job({"name": trigger}, schedule=schedule), 1, N)


def test_warm_up_under_adascale_follows_progress() -> None:
    """κ = 4 at gain 1 until 640: an update of 64 counts as 16, and so it lasts four times the samples."""
    schedule = {"batch_scale": 4.0, "warmup_epochs": 1.0, "warmup_start_lr": 0.01}
    job = measured_job({"name": "adascale"}, schedule=schedule)
    rates = compile_plan(job, 1, N).schedule
    assert [rates.at(s).lr for s in (0, 640, 1152, 1216)] == pytest.approx(
        [0.01, *(0.01 + 0.04 * t / 300 for t in (160, 288)), 0.05]
    )
    gained = Decision(640, "adascale", "planted", 64, 64, 64.0, 0.05, 0.1)
    rates = compile_plan(job, 1, N, None, (gained,)).schedule  # a gain of 2, of lr too: as 32 from there on
    assert [rates.at(s).lr for s in (640, 896, 960)] == pytest.approx(
        [2 * (0.01 + 0.04 * t / 300) for t in (160, 288)] + [0.1]
    )
