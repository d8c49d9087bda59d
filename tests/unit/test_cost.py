from __future__ import annotations

import io
import itertools
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from hvd_batchgrow.cli import main
from hvd_batchgrow.config import Job
from hvd_batchgrow.job_file import load_job, parse_job
from hvd_batchgrow.messages.errors import JobError, RunError
from hvd_batchgrow.observers.console_tables import cost_table
from hvd_batchgrow.schedule.cost.branch_round import round_notes
from hvd_batchgrow.schedule.cost.cost import Cost, choose_ranks, predict
from hvd_batchgrow.schedule.cost.probe_file import (
    Probe,
    RankProbe,
    TimedSum,
    TimedUpdate,
    load_probe,
    merge_probes,
    save_probe,
    subject_of,
)
from hvd_batchgrow.schedule.cost.step_time import StepTimes, fit_step_time
from hvd_batchgrow.schedule.layout import Layout
from hvd_batchgrow.schedule.plan import Plan, compile_plan
from hvd_batchgrow.schedule.twin import decay_twin
from tests.helpers import NUM_TRAIN, job_tree, measured_job, small_job

BYTES = 1_000_000
F, A, B = 2e-3, 3e-3, 2e-4  # fixed s, s per pass, s per sample
ALPHA, BETA = 1e-2, 1e-8  # s, s per byte: 20 ms for a gradient


def true_update_s(passes: int, micro: int, sync_s: float, c: float) -> float:
    """Formulas §8, written once more."""
    pass_s = A + B * micro
    return float(F + (passes - 1) * pass_s + (pass_s**c + sync_s**c) ** (1 / c))


def measure(ranks: int, c: float = 2.0, alpha: float = ALPHA, beta: float = BETA) -> RankProbe:
    """What a machine that is just like the model would show, one rank being free of sums."""
    sync_s = 0.0 if ranks == 1 else alpha + beta * BYTES
    return RankProbe(
        ranks=ranks,
        ranks_per_host=ranks,
        threads_per_rank=1,
        host="here",
        device="cpu",
        backend="test",
        measured_at="2026-01-01T00:00:00+0000",
        micro_batch_limit=64,
        sums=tuple(TimedSum(num_bytes=n, seconds=alpha + beta * n) for n in (1000, BYTES, 4 * BYTES) if ranks > 1),
        updates=tuple(
            TimedUpdate(micro_batch=m, accumulation=s, seconds=true_update_s(s, m, sync_s, c), data_wait_s=0.0)
            for m, s in itertools.product((8, 16, 64), (1, 2, 4))
        ),
    )


def make_probe(job: Job, *measured: RankProbe) -> Probe:
    subject = {**subject_of(job), "data.pipeline": "torch"}
    return Probe(job=job.name, subject=subject, image_shape=(8, 8, 1), gradient_bytes=BYTES, measured=measured)


def plan_and_cost(job: Job, ranks: int, *measured: RankProbe) -> tuple[Plan, Cost]:
    plan = compile_plan(job, ranks, NUM_TRAIN)
    return plan, predict(plan, make_probe(job, *measured))


# --- the fit ---------------------------------------------------------------------------------


@pytest.mark.parametrize("c", [1.0, 1.5, 3.0, 6.0, 10.0])
def test_the_fit_finds_what_the_measurements_were_made_of(c: float) -> None:
    found = fit_step_time(measure(2, c), BYTES)
    assert (found.sync_s, found.sync_s_per_byte) == pytest.approx((ALPHA, BETA))
    assert found.overlap == pytest.approx(c, abs=0.021)
    assert (found.fixed_s, found.pass_s, found.sample_s) == pytest.approx((F, A, B), rel=0.03)
    assert found.misfit < 1e-3


def test_one_rank_sums_nothing() -> None:
    found = fit_step_time(measure(1), BYTES)
    assert (found.sync_s, found.sync_s_per_byte, found.overlap) == (0.0, 0.0, 1.0)
    assert (found.fixed_s, found.pass_s, found.sample_s) == pytest.approx((F, A, B))


def test_a_single_micro_batch_is_enough_to_predict_itself() -> None:
    part = measure(1)
    only = part.model_copy(update={"updates": tuple(u for u in part.updates if u.micro_batch == 8)})
    found = fit_step_time(only, BYTES)
    for passes in (1, 3, 10):
        layout = Layout(1, passes, 8, uneven_ranks=False)
        assert found.update_s(8 * passes, layout, BYTES) == pytest.approx(true_update_s(passes, 8, 0, 1))


def test_passes_that_the_job_will_not_do_hardly_sway_the_fit() -> None:
    # what is beyond the cache takes 30 % longer; the job's passes of 16 and less are met to 1 %
    part = measure(1)
    swayed = tuple(
        u.model_copy(update={"seconds": u.seconds * (1.3 if u.micro_batch > 16 else 1.0)}) for u in part.updates
    )
    found = fit_step_time(part.model_copy(update={"micro_batch_limit": 16, "updates": swayed}), BYTES)
    for passes, micro in itertools.product((1, 4), (8, 16)):
        layout = Layout(1, passes, micro, uneven_ranks=False)
        assert found.update_s(passes * micro, layout, BYTES) == pytest.approx(
            true_update_s(passes, micro, 0, 1), rel=0.01
        )


def test_the_misfit_counts_errors_above_the_limit_in_full() -> None:
    # a third of the time is missed there: the prediction is 1/1.5 of the measurement
    part = measure(1)
    slow = tuple(
        u.model_copy(update={"seconds": u.seconds * (1.5 if u.micro_batch > 16 else 1.0)}) for u in part.updates
    )
    found = fit_step_time(part.model_copy(update={"micro_batch_limit": 16, "updates": slow}), BYTES)
    assert found.misfit == pytest.approx(1 - 1 / 1.5, abs=0.03)


def test_no_coefficient_is_negative_however_odd_the_times() -> None:
    # the more samples, the faster: no sense in it, and still nothing below 0
    part = measure(1)
    odd = tuple(u.model_copy(update={"seconds": 1.0 / u.micro_batch}) for u in part.updates)
    found = fit_step_time(part.model_copy(update={"updates": odd}), BYTES)
    assert min(found.fixed_s, found.pass_s, found.sample_s) >= 0
    assert found.misfit > 0.1


def test_a_count_between_two_measured_takes_the_nearest_passes_and_sums_on_a_line_in_log2() -> None:
    job = small_job()
    times = StepTimes(make_probe(job, measure(1), measure(2), measure(8, alpha=3 * ALPHA, beta=2 * BETA)))
    # log2: 2 ranks at 1, 8 at 3, so 4 lie half way between them
    between = times.at(4)
    assert (between.sync_s, between.sync_s_per_byte) == pytest.approx((2 * ALPHA, 1.5 * BETA))
    assert (between.ranks, between.measured_ranks) == (4, 2)
    assert times.at(7).measured_ranks == 8
    # one count alone: a line through it and nothing at one rank
    alone = StepTimes(make_probe(job, measure(2))).at(8)
    assert (alone.sync_s, alone.sync_s_per_byte) == pytest.approx((3 * ALPHA, 3 * BETA))
    assert StepTimes(make_probe(job, measure(2))).at(1).sync_s == 0


# --- prediction ------------------------------------------------------------------------------


def test_the_prediction_is_the_formula_times_the_updates() -> None:
    plan, cost = plan_and_cost(small_job(), 2, measure(2))
    assert len({layout.accumulation for layout in plan.layouts}) > 1
    for phase, layout, found in zip(plan.schedule.phases, plan.layouts, cost.phases, strict=True):
        expected = true_update_s(layout.accumulation, layout.micro_batch, ALPHA + BETA * BYTES, 2.0)
        assert found.update_s == pytest.approx(expected, rel=2e-3)
        assert found.seconds == pytest.approx(phase.num_updates * found.update_s)
        assert found.rank_hours == pytest.approx(found.seconds * 2 / 3600)
        assert found.extrapolated_from is None
    assert cost.seconds == pytest.approx(sum(phase.seconds for phase in cost.phases))
    assert cost.notes == ()
    assert json.loads(json.dumps(cost.to_dict()))["seconds"] == cost.seconds


def test_the_share_of_waiting_for_data_is_that_of_the_measured_updates() -> None:
    part = measure(2)
    waiting = tuple(u.model_copy(update={"data_wait_s": 0.25 * u.seconds}) for u in part.updates)
    plan, cost = plan_and_cost(small_job(), 2, part.model_copy(update={"updates": waiting}))
    assert [phase.data_wait_share for phase in cost.phases] == pytest.approx([0.25] * 4)
    console = Console(file=io.StringIO(), width=140)
    console.print(cost_table(plan.job.name, cost))
    assert console.file.getvalue().count(" 25% ") == 4  # type: ignore[attr-defined]


def test_the_fullest_rank_decides_a_ragged_layout_and_its_last_pass_is_short() -> None:
    # 5 groups of 8 on 2 ranks: 3 and 2; passes of 16: one full, one of 8
    job = small_job(
        schedule={"global_batch": 40, "boundaries_epochs": [], "max_batch": 40}, layout={"uneven_ranks": True}
    )
    plan, cost = plan_and_cost(job, 2, measure(2, c=1.0))
    assert plan.layouts == (Layout(2, 2, 16, uneven_ranks=True),)
    expected = F + 2 * A + B * 24 + ALPHA + BETA * BYTES
    assert cost.phases[0].update_s == pytest.approx(expected)


def test_a_chain_holds_what_a_phase_uses_and_one_job_holds_the_peak() -> None:
    job = small_job(layout={"grow_by": "ranks", "ranks_per_phase": [1, 2, 2, 4]})
    plan, cost = plan_and_cost(job, 4, measure(1), measure(2), measure(4))
    seconds = [phase.seconds for phase in cost.phases]
    assert cost.peak_ranks == 4
    assert cost.chain_rank_hours == pytest.approx(
        sum(s * layout.ranks for s, layout in zip(seconds, plan.layouts, strict=True)) / 3600
    )
    assert cost.held_rank_hours == pytest.approx(4 * sum(seconds) / 3600)
    assert cost.held_rank_hours > cost.chain_rank_hours


def test_a_phase_without_updates_holds_no_ranks() -> None:
    """Updates of 16 up to sample 160 and one of 192 end at 352, after 1.1 epochs of 300 samples."""
    layout = {"grow_by": "ranks", "ranks_per_phase": [1, 2, 4]}
    steps = {"policy": "steps", "epochs": 1.1, "batch_steps": "0:16 150:192 320:256"}
    job = parse_job(job_tree(layout=layout) | {"schedule": steps})
    plan, cost = plan_and_cost(job, 2, measure(1), measure(2), measure(4))
    assert [phase.num_updates for phase in cost.phases] == [10, 1, 0]
    assert (plan.peak_ranks, cost.peak_ranks) == (2, 2)
    assert cost.held_rank_hours == pytest.approx(2 * cost.seconds / 3600)


def test_the_twin_is_predicted_from_the_same_probe() -> None:
    job = small_job()
    probe = make_probe(job, measure(2))
    twin = compile_plan(decay_twin(job, NUM_TRAIN), 2, NUM_TRAIN)
    grown, decayed = predict(compile_plan(job, 2, NUM_TRAIN), probe), predict(twin, probe)
    # a batch of 16 on 2 ranks: one pass of 8 all along
    expected = twin.num_updates * true_update_s(1, 8, ALPHA + BETA * BYTES, 2.0)
    assert decayed.seconds == pytest.approx(expected, rel=2e-3)
    assert decayed.seconds > grown.seconds  # more updates: more sums over the ranks


def test_what_was_not_measured_is_said() -> None:
    _, cost = plan_and_cost(small_job(layout={"max_micro_batch": 96}), 1, measure(2))
    assert cost.phases[0].extrapolated_from == 2
    assert cost.notes == (
        "no measurement on 1 rank: micro-batches as on 2",
        "micro-batch 96 is outside the measured range: 8 … 64 on 2 ranks",
    )
    job = small_job(schedule={"global_batch": 32})
    _, cost = plan_and_cost(job, 4, measure(1), measure(2))
    assert cost.notes == ("no measurement on 4 ranks: micro-batches as on 2, all-reduces by log2(ranks) from 2",)


def test_a_model_that_misses_its_own_measurements_is_said() -> None:
    part = measure(1)
    slow = part.updates[0].model_copy(update={"seconds": 3 * part.updates[0].seconds})
    disturbed = part.model_copy(update={"updates": (slow, *part.updates[1:])})
    _, cost = plan_and_cost(small_job(), 1, disturbed)
    assert len(cost.notes) == 1
    assert re.match(
        r"the predicted time of an update differs from the measured one by \d\d % \(1 rank\): run", cost.notes[0]
    )


def test_one_rank_alone_does_not_price_two() -> None:
    job = small_job()
    plan = compile_plan(job, 2, NUM_TRAIN)
    with pytest.raises(JobError, match=r"ranks: 2 were not measured.*mpirun -np 2 hvd-batchgrow probe JOB"):
        predict(plan, make_probe(job, measure(1)))


def test_a_probe_of_another_model_is_refused_key_by_key() -> None:
    job = small_job()
    other = small_job(model={"channels": [4, 4], "ghost_batch": 4}, data={"pipeline": "dali"})
    with pytest.raises(JobError) as caught:
        predict(compile_plan(job, 1, NUM_TRAIN), make_probe(other, measure(1)))
    assert [fault.path for fault in caught.value.faults] == ["model.channels", "model.ghost_batch"]
    assert "is 8, but the probe was measured with 4" in str(caught.value)
    compiled = small_job(layout={"compile": True}, update={"allreduce_dtype": "float16"})
    with pytest.raises(JobError) as caught:
        predict(compile_plan(compiled, 1, NUM_TRAIN), make_probe(job, measure(1)))
    assert [fault.path for fault in caught.value.faults] == ["update.allreduce_dtype", "layout.compile"]
    with pytest.raises(JobError, match=r"data.pipeline: is 'dali', but the probe was measured with 'torch'"):
        predict(compile_plan(other, 1, NUM_TRAIN), make_probe(other, measure(1)))


def test_a_probe_from_before_shakedrop_fits_jobs_without_it() -> None:
    plain = small_job(model={"name": "resnet8", "channels": None})
    other = small_job(model={"name": "resnet8", "channels": None, "shakedrop": 0.5, "classifier": "hadamard"})
    probe = make_probe(plain, measure(1))
    new_keys = {"model.shakedrop", "model.classifier"}
    subject = {key: value for key, value in probe.subject.items() if key not in new_keys}
    old = probe.model_copy(update={"subject": subject})
    predict(compile_plan(plain, 1, NUM_TRAIN), old)
    with pytest.raises(JobError) as caught:
        predict(compile_plan(other, 1, NUM_TRAIN), old)
    assert [str(fault).partition(";")[0] for fault in caught.value.faults] == [
        "model.shakedrop: is 0.5, but the probe was measured with 0.0",
        "model.classifier: is 'hadamard', but the probe was measured with 'linear'",
    ]


def test_a_probe_from_before_augmentation_fits_jobs_without_it() -> None:
    plain, augmented = small_job(), small_job(data={"auto_augment": "randaugment", "mixup_alpha": 0.2})
    new_keys = {f"data.{key}" for key in ("auto_augment", "randaugment_num_ops", "color_jitter", "random_erasing")}
    probe = make_probe(plain, measure(1))
    old = probe.model_copy(
        update={
            "subject": {
                key: value
                for key, value in probe.subject.items()
                if key not in new_keys | {"data.mixup_alpha", "data.cutmix_alpha"}
            }
        }
    )
    predict(compile_plan(plain, 1, NUM_TRAIN), old)
    assert merge_probes(old, make_probe(plain, measure(2))).subject == probe.subject
    with pytest.raises(JobError) as caught:
        predict(compile_plan(augmented, 1, NUM_TRAIN), old)
    assert [fault.path for fault in caught.value.faults] == ["data.auto_augment", "data.mixup_alpha"]
    with pytest.raises(RunError, match=r"data.mixup_alpha: was 0.0, is 0.2"):
        merge_probes(old, make_probe(augmented, measure(2)))


def test_what_costs_nothing_may_differ_from_the_probe() -> None:
    job = small_job()
    other = small_job(name="other", seed=8, optim={"lr": 0.1}, schedule={"epochs": 3.0}, layout={"uneven_ranks": True})
    predict(compile_plan(other, 1, NUM_TRAIN), make_probe(job, measure(1)))


# --- ranks by cost ---------------------------------------------------------------------------

FREE = {"alpha": 1e-12, "beta": 1e-18}
"""A network that costs nothing."""


def auto_job(**layout: Any) -> Job:
    return small_job(layout={"grow_by": "auto", "max_micro_batch": 16, **layout})


def chosen_ranks(job: Job, *measured: RankProbe, ranks: int = 8) -> tuple[list[int], Cost]:
    probe = make_probe(job, *measured)
    plan = compile_plan(job, ranks, NUM_TRAIN, choose_ranks(job, NUM_TRAIN, probe, ranks))
    return [layout.ranks for layout in plan.layouts], predict(plan, probe)


def all_choices(job: Job, *measured: RankProbe, ranks: int = 8) -> list[Cost]:
    """Every way to give the phases ranks, priced."""
    groups = [phase.global_batch // 8 for phase in compile_plan(small_job(), 1, NUM_TRAIN).schedule.phases]
    options = [[r for r in range(1, ranks + 1) if n % r == 0] for n in groups]
    costs = []
    for choice in itertools.product(*options):
        given = job.model_copy(update={"layout": job.layout.grown_by("ranks", ranks_per_phase=choice)})
        costs.append(predict(compile_plan(given, ranks, NUM_TRAIN), make_probe(job, *measured)))
    return costs


def test_where_sums_are_free_the_most_ranks_that_can_be_formed_are_fastest() -> None:
    # batches of 16, 48, 96, 96: 2, 6, 12, 12 ghost batches; 8 divides none of them
    free = [measure(r, **FREE) for r in (1, 2, 4, 8)]
    assert chosen_ranks(auto_job(), *free)[0] == [2, 6, 6, 6]
    assert chosen_ranks(auto_job(max_ranks=3), *free)[0] == [2, 3, 3, 3]
    assert chosen_ranks(auto_job(uneven_ranks=True), *free)[0] == [
        2,
        6,
        6,
        6,
    ]  # 12 groups: 2 on the fullest of 6, 7 or 8


def test_where_sums_are_dear_one_rank_is_fastest() -> None:
    dear = [measure(1), measure(2, c=1.0, alpha=10.0)]
    assert chosen_ranks(auto_job(), *dear)[0] == [1, 1, 1, 1]


def test_the_fastest_choice_is_that_of_all_choices() -> None:
    measured = [measure(1), measure(2, c=1.0, alpha=5e-3, beta=0.0), measure(8, c=1.0, alpha=15e-3, beta=0.0)]
    ranks, cost = chosen_ranks(auto_job(), *measured)
    assert cost.seconds == pytest.approx(min(c.seconds for c in all_choices(auto_job(), *measured)))
    assert ranks[0] < ranks[-1]  # what a sum costs is spread over a larger batch


def test_the_cheapest_choice_is_that_of_all_choices() -> None:
    measured = [measure(1), measure(2, c=10.0, alpha=1e-4, beta=0.0)]
    job = auto_job(objective="least_rank_hours")
    _, cost = chosen_ranks(job, *measured)
    assert cost.chain_rank_hours == pytest.approx(min(c.chain_rank_hours for c in all_choices(job, *measured)))


@pytest.mark.parametrize("share", [0.001, 0.05, 0.2, 0.5, 0.8, 0.99, 1.2])
def test_a_time_limit_is_kept_and_nothing_is_both_as_fast_and_cheaper(share: float) -> None:
    measured = [measure(1), measure(2, c=1.0, alpha=2e-3, beta=0.0), measure(8, c=1.0, alpha=6e-3, beta=0.0)]
    everything = all_choices(auto_job(), *measured)
    fastest = min(everything, key=lambda c: c.seconds)
    cheapest = min(everything, key=lambda c: c.chain_rank_hours)
    limit_s = fastest.seconds + share * (cheapest.seconds - fastest.seconds)
    _, cost = chosen_ranks(auto_job(objective="least_rank_hours", time_limit_h=limit_s / 3600), *measured)
    assert cost.seconds <= limit_s
    rivals = [c.chain_rank_hours for c in everything if c.seconds <= cost.seconds * (1 + 1e-12)]
    assert cost.chain_rank_hours <= min(rivals) * (1 + 1e-9)


@pytest.mark.parametrize("objective", ["least_time", "least_rank_hours"])
def test_a_limit_that_nothing_meets_is_refused_with_the_fastest_time(objective: str) -> None:
    free = [measure(r, **FREE) for r in (1, 2, 4, 8)]
    _, fastest = chosen_ranks(auto_job(), *free)
    with pytest.raises(JobError) as caught:
        chosen_ranks(auto_job(objective=objective, time_limit_h=1e-6), *free)
    (fault,) = caught.value.faults
    assert fault.path == "layout.time_limit_h"
    assert "1e-06 h cannot be met: the fastest phases, on 2, 6, 6, 6 ranks, take " in fault.message
    total_h = float(re.findall(r"= ([\d.e-]+) h", fault.message)[0])
    assert total_h == pytest.approx(fastest.seconds / 3600, rel=0.01)
    enough_h = float(re.findall(r"set >= ([\d.e-]+)", fault.message)[0])
    chosen_ranks(auto_job(objective=objective, time_limit_h=enough_h), *free)


@pytest.mark.parametrize(
    ("max_ranks", "advice"),
    [(None, "(--ranks)"), (16, "(--ranks)"), (8, "(layout.max_ranks and --ranks)"), (4, "(layout.max_ranks)")],
)
def test_a_missed_limit_names_what_limits_the_ranks(max_ranks: int | None, advice: str) -> None:
    free = [measure(r, **FREE) for r in (1, 2, 4, 8)]
    with pytest.raises(JobError, match=f"or more ranks {re.escape(advice)}$"):
        chosen_ranks(auto_job(max_ranks=max_ranks, objective="least_rank_hours", time_limit_h=1e-6), *free)


def test_ranks_chosen_for_nodes_fit_on_one_or_fill_whole_ones() -> None:
    """Without nodes of 4, they are 2, 6, 6, 6. 12 ghost batches: 2 passes of 16 on 3 ranks, 3 of 8 on 4 ranks."""
    job = auto_job()
    probe = make_probe(job, *[measure(r, **FREE) for r in (1, 2, 4, 8)])
    plan = compile_plan(job, 8, NUM_TRAIN, choose_ranks(job, NUM_TRAIN, probe, 8, ranks_per_node=4))
    assert [layout.ranks for layout in plan.layouts] == [2, 3, 3, 3]


def test_repeated_shares_are_priced() -> None:
    """On one rank, an update repeats all its micro-batches; every fourth update does so."""
    job, checked = small_job(), small_job(checks={"replay_every": 4})
    plain = predict(compile_plan(job, 1, NUM_TRAIN), make_probe(job, measure(1))).phases
    repeated = predict(compile_plan(checked, 1, NUM_TRAIN), make_probe(checked, measure(1))).phases
    # micro-batches of 16: 1, 3, 6 and 6 of them
    added = [now.update_s - before.update_s for before, now in zip(plain, repeated, strict=True)]
    assert added == pytest.approx([n * (A + B * 16) / 4 for n in (1, 3, 6, 6)], rel=1e-2)


def test_a_probe_of_another_number_of_classes_is_refused() -> None:
    few, many, unknown = (small_job(data={"num_classes": n}) for n in (3, 5000, None))
    with pytest.raises(JobError, match=r"data.num_classes: is 5000, but the probe was measured with 3"):
        predict(compile_plan(many, 1, NUM_TRAIN), make_probe(few, measure(1)))
    for job, probed in ((few, unknown), (unknown, few)):
        predict(compile_plan(job, 1, NUM_TRAIN), make_probe(probed, measure(1)))
        merge_probes(make_probe(probed, measure(1)), make_probe(job, measure(2)))


def test_faults_of_a_job_are_reported_as_without_costs() -> None:
    job = auto_job()
    bad = job.model_copy(update={"schedule": job.schedule.model_copy(update={"global_batch": 20})})
    with pytest.raises(
        JobError,
        match=re.escape("schedule.global_batch: 20 = 2.50 ghost batches of 8, which are never cut; nearest: 16, 24"),
    ):
        chosen_ranks(bad, measure(1), measure(2))


def test_ten_thousand_ranks_are_tried_at_once() -> None:
    big = small_job(
        data={"num_samples": 10**9},
        schedule={"global_batch": 8 * 2520, "max_batch": 8 * 2520 * 32},
        layout={"grow_by": "auto", "max_micro_batch": 16},
    )
    probe = make_probe(big, *[measure(r, **FREE) for r in (1, 2)])
    plan = compile_plan(big, 10_000, 10**9, choose_ranks(big, 10**9, probe, 10_000))
    assert [
        math.gcd(phase.global_batch // 8, layout.ranks)
        for phase, layout in zip(plan.schedule.phases, plan.layouts, strict=True)
    ] == [layout.ranks for layout in plan.layouts]
    assert plan.layouts[0].ranks == 2520


def test_ranks_that_are_chosen_by_cost_are_trained_on(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    save_probe(Path("P.json"), make_probe(load_job(Path(job)), measure(1)))
    words = ["train", job, "--layout.grow_by", "auto"]
    assert main(words) == 2
    assert "layout.grow_by: 'auto' needs costs: --cost with a PROBE.json" in capsys.readouterr().err
    assert main([*words, "--cost", "P.json"]) == 0
    assert "small: done: 17 of 17 updates" in capsys.readouterr().err
    layout = load_job(Path("runs/small/job.toml")).layout
    assert (layout.grow_by, layout.ranks_per_phase) == ("ranks", (1, 1, 1, 1))


def test_the_twin_has_its_ranks_chosen_by_the_same_objective(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The defect: it was priced on all the ranks that its batch can be cut into, however slow these are."""
    made = make_probe(load_job(Path(job)), measure(1), measure(2, alpha=1.0))
    save_probe(Path("P.json"), made)
    words = ["plan", job, "--ranks", "2", "--cost", "P.json", "--json"]
    assert main([*words, "--layout.grow_by", "auto", "--layout.time-limit-h", "1"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert {phase["ranks"] for tree in (plan, plan["twin"]) for phase in tree["phases"]} == {1}
    assert main(words) == 0
    assert {phase["ranks"] for phase in json.loads(capsys.readouterr().out)["twin"]["phases"]} == {2}


# --- the file --------------------------------------------------------------------------------


def test_a_probe_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    probe = make_probe(small_job(), measure(1), measure(2))
    save_probe(tmp_path / "PROBE.json", probe)
    assert load_probe(tmp_path / "PROBE.json") == probe
    assert [path.name for path in tmp_path.iterdir()] == ["PROBE.json"]


def test_rank_counts_gather_in_one_file_and_the_newest_of_one_count_stays() -> None:
    job = small_job()
    again = measure(2, c=5.0)
    merged = merge_probes(make_probe(job, measure(1), measure(2)), make_probe(job, measure(4)))
    merged = merge_probes(merged, make_probe(job, again))
    assert merged.measured == (measure(1), again, measure(4))
    assert merge_probes(None, merged) == merged


def test_probes_of_different_things_are_kept_apart() -> None:
    old = make_probe(small_job(), measure(1))
    new = make_probe(small_job(model={"channels": [8, 8]}), measure(2).model_copy(update={"device": "H100"}))
    with pytest.raises(
        RunError, match=r"'small' cannot share(.|\n)*model.channels: was \[4, 8\], is \[8, 8\]"
    ) as caught:
        merge_probes(old, new)
    assert "device: was 'cpu', is 'H100'" in str(caught.value)


def tree_of(probe: Probe) -> dict[str, Any]:
    tree: dict[str, Any] = json.loads(probe.model_dump_json())
    return tree


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("format", 2, "format: Input should be 1"),
        ("measured.0.updates.3.seconds", -1.0, "measured.0.updates.3.seconds: Input should be greater than 0"),
        ("measured.0.updates.3.seconds", None, "measured.0.updates.3.seconds: Input should be a valid number"),
        ("measured.0.updates.3.accumulation", 10**400, "accumulation: Input should be less than 9007199254740992"),
        ("measured.1.ranks", "two", "measured.1.ranks: Input should be a valid integer"),
        ("measured.1.ranks", 1, r"damaged: measured: rank counts must rise without repeats, got \[1, 1\]"),
        ("measured.1.sums", [], "damaged: measured.1.sums: empty, for 2 ranks"),
        ("measured.0.updates", [], "damaged: measured.0.updates: empty"),
        ("measured", [], r"damaged: measured: rank counts must rise without repeats, got \[\]"),
        ("more", 1, "more: Extra inputs are not permitted"),
    ],
)
def test_damage_is_named_by_its_place(tmp_path: Path, path: str, value: Any, message: str) -> None:
    tree: Any = tree_of(make_probe(small_job(), measure(1), measure(2)))
    *parents, last = [int(key) if key.isdigit() else key for key in path.split(".")]
    place = tree
    for key in parents:
        place = place[key]
    place[last] = value
    file = tmp_path / "PROBE.json"
    file.write_text(json.dumps(tree))
    with pytest.raises(RunError, match=f"PROBE.json.*{message}.*hvd-batchgrow probe JOB --out"):
        load_probe(file)


def test_a_file_cut_short_missing_or_foreign_is_not_a_probe(tmp_path: Path) -> None:
    file = tmp_path / "PROBE.json"
    with pytest.raises(RunError, match="cannot be read: No such file"):
        load_probe(file)
    file.write_text(make_probe(small_job(), measure(1)).model_dump_json()[:-10])
    with pytest.raises(RunError, match="damaged, or not a probe: whole file: Invalid JSON"):
        load_probe(file)
    file.write_text("{}")
    with pytest.raises(RunError, match="damaged, or not a probe: job: Field required"):
        load_probe(file)
    with pytest.raises(RunError, match="cannot be written: No such file"):
        save_probe(tmp_path / "missing" / "PROBE.json", make_probe(small_job(), measure(1)))


def test_a_probe_of_another_length_of_text_is_refused() -> None:
    # The length is part of the plan only through the data, and attention costs its square.
    subjects = [subject_of(small_job(data={"source": "tests.own:make", "context": length})) for length in (128, 512)]
    assert [subject["data.context"] for subject in subjects] == [128, 512]


def test_a_round_of_a_branch_trigger_takes_the_time_of_its_updates() -> None:
    trigger = {"name": "branch", "factors": [1, 4], "branch_samples": 16 * 64}
    job = measured_job(trigger, schedule={"epochs": 120.0, "lr_rule": "linear"})
    plan = compile_plan(job, 1, NUM_TRAIN)
    probe = make_probe(job, measure(1, alpha=0.0))
    # 64 updates of 2 passes of 8 samples, and 16 updates of 8 passes
    expected = 64 * true_update_s(2, 8, 0.0, 2.0) + 16 * true_update_s(8, 8, 0.0, 2.0)
    (note,) = round_notes(plan, probe)
    assert f"a round at the first batch takes {expected:.0f} s" in note
    assert expected > 1
    assert round_notes(compile_plan(small_job(), 1, NUM_TRAIN), probe) == []
