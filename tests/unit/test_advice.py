"""Advice from a run's record: pure functions on records whose answer can be worked out."""

from __future__ import annotations

import itertools
import json
import shlex
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvd_batchgrow.cli import main
from hvd_batchgrow.config import Job
from hvd_batchgrow.job_file import load_job, parse_job
from hvd_batchgrow.messages.errors import JobError, RunError
from hvd_batchgrow.observers.advice_tables import evidence_table, summary
from hvd_batchgrow.schedule.adaptive.noise_record import (
    Observation,
    more_gradients,
    read_observations,
    smaller_pass,
    typical,
    weaknesses,
)
from hvd_batchgrow.schedule.advice import (
    HOLD_EPOCHS,
    _beside,
    _measured_name,
    advise,
    supported_limit,
    supported_steps,
)
from hvd_batchgrow.schedule.phases import Phase
from hvd_batchgrow.schedule.plan import compile_plan
from hvd_batchgrow.schedule.recorded_run import RecordedRun
from tests.helpers import job_tree, small_job

GOLDEN = Path(__file__).parent / "golden" / "advice"
N, B0, LR, PER_EPOCH = 10_000, 100, 0.05, 20
LENGTH = N // PER_EPOCH


def seen(
    epochs: float, b_simple: Callable[[float], float | None], band: float = 1.2, start: float = 0.0
) -> list[Observation]:
    """Records of a run with batch B0; `b_simple` is a function of the epoch at a record's end."""
    records = []
    for k in range(round(start * PER_EPOCH), round(epochs * PER_EPOCH)):
        phi = b_simple((k + 1) / PER_EPOCH)
        ends = (None, None) if phi is None else (phi / band, phi * band)
        records.append(Observation(k * LENGTH, (k + 1) * LENGTH, LENGTH // B0, B0, LR, 4, True, phi, ends[0], ends[1]))
    return records


def steps(records: Sequence[Observation], **options: Any) -> list[tuple[int, int]]:
    defaults: dict[str, Any] = {"end_samples": 4 * N, "first_batch": B0, "unit": 20, "cap": N // 10}
    return supported_steps(records, N, **defaults | options)


def test_noise_that_stays_is_grown_into_by_steps_of_the_factor() -> None:
    """600/1.2 = 500: from 100 by at most ×2, a step every quarter of an epoch at whole updates."""
    records = seen(4, lambda _: 600)
    assert steps(records) == [(0, 100), (2500, 200), (5100, 400), (8300, 500)]
    # 5 100 = 2 500 + 13 · 200, as the record at 5 000 is the first to have held since 2 500; 8 300 = 5 100 + 8 · 400.
    assert steps(records, max_batch_factor=10) == [(0, 100), (2500, 500)]
    assert steps(records, headroom=2) == [
        (0, 100),
        (2500, 200),
    ]  # 600/1.2/2 = 250 is less than 1.25 × 200 in units of 20
    assert steps(records, cap=300) == [(0, 100), (2500, 200), (5100, 300)]


def test_noise_at_the_batch_of_the_run_supports_no_growth() -> None:
    assert steps(seen(4, lambda _: 120)) == [(0, 100)]
    assert steps(seen(4, lambda _: 149)) == [(0, 100)]  # 149/1.2 = 124 is less than the least step, ×1.25


def test_what_is_unresolved_is_not_grown_on_and_holding_begins_after_it() -> None:
    records = seen(4, lambda epoch: None if epoch <= 1.2 else 600)
    assert steps(records)[1] == (round((1.2 + HOLD_EPOCHS) * N), 200)
    gaps = seen(4, lambda epoch: None if round(epoch * PER_EPOCH) % 5 == 0 else 600)
    assert steps(gaps) == [(0, 100)]  # never a quarter of an epoch without one


def test_a_wide_band_counts_by_its_lower_end() -> None:
    assert steps(seen(4, lambda _: 600, band=6)) == [(0, 100)]
    assert steps(seen(4, lambda _: 600, band=3)) == [(0, 100), (2500, 200)]
    open_above = [replace(o, high=None) for o in seen(4, lambda _: 600)]
    assert steps(open_above) == steps(seen(4, lambda _: 600))


def test_noise_that_falls_again_is_not_outgrown_but_a_single_low_record_is_ignored() -> None:
    assert max(b for _, b in steps(seen(4, lambda epoch: 600 if epoch <= 2 else 240))) == 200  # 240/1.2
    assert max(b for _, b in steps(seen(4, lambda epoch: 600 if epoch <= 2.8 else 240))) == 200
    one_low = seen(4, lambda epoch: 120 if abs(epoch - 3) < 0.01 else 600)
    assert steps(one_low) == steps(seen(4, lambda _: 600))


def test_a_step_near_the_end_of_the_run_is_skipped() -> None:
    records = seen(1, lambda _: 600)
    assert steps(records, end_samples=N) == [(0, 100), (2500, 200), (5100, 400)]  # 500 would begin at 8 300


@given(
    st.lists(st.one_of(st.none(), st.floats(1, 5000)), min_size=1, max_size=80),
    st.floats(1.3, 8),
    st.floats(0.5, 4),
)
def test_any_record_gives_rising_batches_of_whole_units_within_all_limits(
    values: list[float | None], factor: float, headroom: float
) -> None:
    records = seen(len(values) / PER_EPOCH, lambda epoch: values[round(epoch * PER_EPOCH) - 1])
    advised = steps(records, max_batch_factor=factor, headroom=headroom)
    for (at, batch), (later, larger) in itertools.pairwise(advised):
        assert (later - at) % batch == 0
        assert later - at >= HOLD_EPOCHS * N
        assert 1.25 * batch <= larger <= min(factor * batch, N // 10)
        assert larger % 20 == 0
        held = [o for o in records if at <= o.start_samples and later - HOLD_EPOCHS * N <= o.start_samples < later]
        assert all(o.low is not None and o.low / headroom >= larger for o in held if o.samples <= later)


def limit(records: Sequence[Observation], wanted: Sequence[tuple[int, float]], **options: Any) -> int:
    return supported_limit(records, N, **{"wanted": wanted, "unit": 20, "cap": N // 10, **options})


def test_growth_in_place_of_decay_goes_as_far_as_every_phase_supports() -> None:
    wanted = [(0, 100.0), (N, 500.0), (2 * N, 2500.0)]
    assert limit(seen(3, lambda _: 6000), wanted) == N // 10  # the cap
    assert limit(seen(3, lambda epoch: 720 if epoch <= 2 else 6000), wanted) == N // 10  # 720/1.2 = 600 ≥ 500
    assert limit(seen(3, lambda epoch: 300 if epoch <= 2 else 6000), wanted) == 240  # 300/1.2 = 250
    assert limit(seen(3, lambda _: 960), wanted) == 800
    assert limit(seen(3, lambda _: 960), wanted, headroom=2) == 400


def test_a_phase_without_evidence_supports_no_more_than_the_one_before() -> None:
    wanted = [(0, 100.0), (N, 300.0), (2 * N, 900.0)]
    assert limit(seen(3, lambda epoch: None if epoch > 2 else 6000), wanted) == 300
    assert limit(seen(1.5, lambda _: 6000), wanted) == 300  # the run stopped there
    assert limit(seen(3, lambda epoch: None if epoch <= 1 else 6000), wanted) == 1000  # nothing grows at the start


def test_a_short_phase_needs_evidence_for_half_of_its_length() -> None:
    """Of the phase from epoch 1 to 1.3, less than `HOLD_EPOCHS` are resolved: 0.2."""
    wanted = [(0, 100.0), (N, 300.0), (N + 3000, 900.0)]
    assert limit(seen(3, lambda epoch: None if 1.21 < epoch < 1.31 else 6000), wanted) == N // 10
    assert limit(seen(3, lambda epoch: None if 1.11 < epoch < 1.31 else 6000), wanted) == 100


def lines(records: Sequence[Observation], **keys: Any) -> list[dict[str, Any]]:
    """What a run would write of them."""
    return [
        {
            "kind": "train",
            "samples": o.samples,
            "updates": o.samples // B0,
            "global_batch": o.global_batch,
            "lr": o.lr,
            "ranks": 2,
            "accumulation": 2,
            "gradient_noise": {"all": {"b_simple": o.b_simple, "low": o.low, "high": o.high}},
            **keys,
        }
        for o in records
    ]


def test_the_record_is_read_back_and_of_what_was_done_twice_the_later_holds() -> None:
    records = seen(1, lambda epoch: 100 * epoch)
    assert read_observations([*lines(records), {"kind": "eval", "samples": N}]) == records
    first, second = lines(seen(0.5, lambda _: 7)), lines(records)[4:]
    joined = read_observations([*first, *second])
    assert joined[4:] == records[4:]
    assert [o.b_simple for o in joined[:4]] == [7] * 4
    assert [o.start_samples for o in joined[1:]] == [o.samples for o in joined[:-1]]


def test_a_record_without_measurement_differs_from_an_unresolved_one() -> None:
    (bare,) = read_observations(lines(seen(0.05, lambda _: 1), gradient_noise={}))
    assert (bare.is_measured, bare.is_resolved, bare.gradients) == (False, False, 4)


def of_norm_layers(num_units: int, ranks: int, *, is_measured: bool) -> list[str]:
    """The weaknesses of a whole run whose noise comes from norm layers."""
    layers = {"num_units": num_units, "factor": 1.0, "is_measured": is_measured}
    job = parse_job(job_tree(gradient_noise={"measure": True, "estimator": "norm_layers"}))
    records = seen(job.schedule.epochs, lambda _: 100)
    return weaknesses(read_observations(lines(records, norm_layers=layers, ranks=ranks, accumulation=1)), job, N)


def test_norm_layers_have_a_gradient_for_each_unit() -> None:
    """Ghost batches of 8 samples, or the samples of a batch of 100."""
    assert of_norm_layers(12, 4, is_measured=True) == []
    (few,) = of_norm_layers(2, 4, is_measured=True)
    assert few == "an update has two gradients, the fewest that show noise; measure with a ghost batch below 8"
    job = small_job(gradient_noise={"measure": True, "estimator": "norm_layers"})
    records = [replace(o, units=B0) for o in seen(1, lambda _: 100)]
    assert more_gradients(records, job) == "measure with a batch above 100: each of its samples is a gradient already"


def test_a_factor_of_the_norm_layers_that_is_weak_or_not_measured_is_reported() -> None:
    (unmeasured,) = of_norm_layers(12, 1, is_measured=False)
    assert "times gradient_noise.norm_layers_factor, which the run had not measured; it" in unmeasured
    (weak,) = of_norm_layers(12, 2, is_measured=True)
    assert weak == (
        "the factor of the norm layers is measured from two micro-batches per update, the fewest that show noise; "
        "measure with more micro-batches: layout.max_micro_batch = 8"
    )


def test_typical_is_by_samples() -> None:
    short, long = (Observation(a, b, 1, B0, 0.1, 2, b_simple=v) for a, b, v in ((0, 10, 1.0), (10, 100, 2.0)))
    assert typical([long, short], lambda o: o.b_simple, 0.1) == 1.0
    assert typical([long, short], lambda o: o.b_simple, 0.5) == 2.0
    assert typical([long, short], lambda o: o.low, 0.5) is None


def test_weak_evidence_is_reported_with_its_epochs_and_a_remedy() -> None:
    job = parse_job(job_tree(schedule={"epochs": 8}))
    records = [
        *(replace(o, is_measured=False) for o in seen(0.5, lambda _: None)),
        *seen(1.2, lambda _: None, start=0.5),
        *seen(2, lambda _: 100, band=3, start=1.2),
        *(replace(o, low=None, high=None) for o in seen(2.5, lambda _: 100, start=2)),
        *seen(3, lambda _: 100, start=2.5),
    ]
    assert weaknesses(records, job, N) == [
        "epochs 0-0.5: B_simple was not measured",
        "epochs 0.5-1.2: |G|² is not resolved, so B_simple is unknown",
        "epochs 2-2.5: too few updates for a band",
        "epochs 1.2-2: band wider than ×4",
        "the run is at epoch 3 of 8: later epochs are unknown, and the batch does not grow there",
    ]
    two = [replace(o, gradients=2) for o in seen(8, lambda _: 100)]
    assert weaknesses(two, job, N) == [
        "an update has two gradients, the fewest that show noise; "
        "measure with more micro-batches: layout.max_micro_batch = 8"
    ]
    assert weaknesses(seen(8, lambda _: 100), job, N) == []


def recorded(records: Sequence[Observation], ranks: int = 1, **schedule: Any) -> RecordedRun:
    """A run of N samples with batch B0, ghost batch 20, and these records."""
    sections = {"policy": "decay", "epochs": 4, "global_batch": B0, "boundaries_epochs": [], **schedule}
    tree = job_tree(data={"num_samples": N}, model={"ghost_batch": 20}, layout={"max_micro_batch": 20})
    optim = {"name": "adam", "lr": LR} if sections["policy"] == "seesaw" else tree["optim"]
    job = parse_job({**tree, "schedule": sections, "optim": optim})
    plan = compile_plan(job, ranks, N).to_dict()
    return RecordedRun("runs/x", job, N, plan["num_updates"], tuple(plan["phases"]), tuple(records))


def test_a_noise_scale_that_rises_again_has_not_risen() -> None:
    run = replace(recorded([]), phases=tuple({"noise_scale": scale} for scale in (10.0, 2.0, 4.0)))
    assert run.falls == [1, 5, 5]


def test_the_efficiency_of_a_phase_is_its_mean_over_samples() -> None:
    """E = (φ + 100)/(φ + 200): 200/300 over 10 samples and 800/900 over 90, together 0.86667."""
    phase = Phase(0.0, LR, 0.9, 200, 200, start_samples=0, num_updates=1)
    records = [Observation(a, b, 1, B0, LR, 4, b_simple=phi) for a, b, phi in ((0, 10, 100.0), (10, 100, 700.0))]
    assert _beside(phase, records).efficiency == pytest.approx(0.1 * 200 / 300 + 0.9 * 800 / 900)


def test_a_run_that_held_its_noise_scale_is_grown_by_sample_counts() -> None:
    advice = advise(recorded(seen(4, lambda _: 600)))
    assert advice.job.schedule.policy == "steps"
    assert [(p.phase.start_samples, p.phase.global_batch) for p in advice.phases] == steps(seen(4, lambda _: 600))
    assert [p.phase.lr for p in advice.phases] == [0.05] * 4
    assert advice.run.num_updates == 4 * N // B0
    # 25 of 100, 13 of 200, 8 of 400, and the rest of 40 000 samples by 500
    assert advice.plan.num_updates == 25 + 13 + 8 + -(-(40_000 - 8_300) // 500)
    assert [p.efficiency for p in advice.phases] == pytest.approx([700 / (600 + b) for b in (100, 200, 400, 500)])
    assert advice.weak == ()
    linear = advise(recorded(seen(4, lambda _: 600)), lr_rule="linear")
    assert [p.phase.lr for p in linear.phases] == pytest.approx([0.05, 0.1, 0.2, 0.25])


def test_growth_takes_the_place_of_decay_at_the_noise_scale_of_the_run() -> None:
    run = recorded(seen(4, lambda _: 720), boundaries_epochs=[1, 2, 3], noise_factor=3.0)
    advice = advise(run)
    assert advice.job.schedule.policy == "grow"
    assert advice.job.schedule.model_dump()["noise_factor"] == (3.0, 3.0, 3.0)  # not 3.0000000000000004
    assert [p.phase.global_batch for p in advice.phases] == [100, 300, 600, 600]  # 900 is above 720/1.2
    assert [p.phase.lr for p in advice.phases] == pytest.approx([0.05, 0.05, 0.05 * 2 / 3, 0.05 * 2 / 9])
    ours = [advice.plan.noise_scale(p.phase) for p in advice.phases]
    assert ours == pytest.approx([phase["noise_scale"] for phase in run.phases])
    with pytest.raises(JobError, match="'linear' contradicts the run: its noise scale fell by 27"):
        advise(run, lr_rule="linear")


def test_a_run_that_grew_beyond_its_noise_is_advised_to_stop_earlier() -> None:
    keys: dict[str, Any] = {"policy": "grow", "boundaries_epochs": [1, 2], "noise_factor": 3.0, "max_batch": "N/10"}
    advice = advise(recorded(seen(4, lambda _: 480), **keys))
    assert [p.phase.global_batch for p in advice.phases] == [100, 300, 400]
    assert advice.plan.num_updates > advice.run.num_updates


def test_a_raised_start_is_kept_as_what_the_run_began_with() -> None:
    """ε and B both doubled: the advised job has no lr_scale to apply once more."""
    records = [replace(o, global_batch=2 * B0, lr=2 * LR) for o in seen(4, lambda _: 1200)]
    advice = advise(recorded(records, policy="grow", lr_scale=2.0))
    assert advice.job.schedule.lr_scale == 1
    assert [(p.phase.global_batch, p.phase.lr) for p in advice.phases] == [(b, 2 * LR) for b in (200, 400, 800, 1000)]
    assert advice.weak == ()


def test_a_seesaw_stays_one_up_to_what_is_supported() -> None:
    run = recorded(
        seen(4, lambda _: 480), policy="seesaw", boundaries_epochs=[1, 2], noise_factor=4.0, max_batch="N/10"
    )
    advice = advise(run)
    assert [p.phase.global_batch for p in advice.phases] == [100, 400, 400]
    # √4 at the first boundary; at the second the batch stays, and the learning rate takes all of 4.
    assert [p.phase.lr for p in advice.phases] == pytest.approx([LR, LR / 2, LR / 8])
    ours = [advice.plan.noise_scale(p.phase) for p in advice.phases]
    assert ours == pytest.approx([phase["noise_scale"] for phase in run.phases])


def test_records_of_another_schedule_are_reported() -> None:
    """A fork with another learning rate keeps the record of its source run. A warm-up is not another schedule."""
    records = [replace(o, lr=0.2 if o.samples <= N else LR) for o in seen(4, lambda _: 600)]
    (weak,) = advise(recorded(records)).weak
    assert weak.startswith("epochs 0-1: recorded with another schedule")
    assert advise(recorded(records, warmup_epochs=1.0)).weak == ()


def test_batches_can_be_formed_on_the_ranks_of_the_run() -> None:
    run = recorded(seen(4, lambda _: 600), ranks=5)
    assert run.unit == 100
    for phase in advise(run).phases:
        assert phase.phase.global_batch % 100 == 0
    assert recorded([], ranks=1).unit == 20


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([], "runs/x: nothing is recorded yet"),
        (
            [replace(o, is_measured=False) for o in seen(1, lambda _: None)],
            "not measured\n.*train runs/x/job.toml --name small-measured --gradient-noise.measure true",
        ),
        (
            [replace(o, is_measured=False, gradients=1) for o in seen(1, lambda _: None)],
            "an update had one gradient, .*: measure with more ranks, or a ghost batch below 20",
        ),
        (
            seen(4, lambda epoch: None if epoch > 0.1 else 600),
            "resolved for 0.1 epochs, at least 0.25 .*\n  epochs 0.1-4: .*not resolved.*\n.*noise.ema-epochs 1;",
        ),
        (seen(4, lambda _: 120), "no growth is supported: .* was 100 to 100.*100 → 140 in steps of 20"),
    ],
)
def test_without_evidence_no_growth_is_advised(records: list[Observation], message: str) -> None:
    with pytest.raises(RunError, match=message):
        advise(recorded(records))


def test_a_measured_run_loses_its_trigger_and_keeps_its_rule() -> None:
    tree = job_tree(data={"num_samples": N}, model={"ghost_batch": 20}, layout={"max_micro_batch": 20})
    tree |= {"trigger": {"name": "gradient_noise"}}
    tree["schedule"] = {"policy": "adaptive", "epochs": 4, "global_batch": B0, "lr_rule": "sqrt"}
    job = parse_job(tree)
    plan = compile_plan(job, 1, N).to_dict()
    run = RecordedRun("runs/x", job, N, plan["num_updates"], tuple(plan["phases"]), tuple(seen(4, lambda _: 600)))
    advice = advise(run)
    assert (advice.job.trigger.name, advice.job.gradient_noise.measure) == ("none", True)
    assert advice.phases[-1].phase.lr == pytest.approx(0.05 * 5**0.5)


def job_of(schedule: dict[str, Any], **sections: Any) -> Job:
    tree = job_tree(data={"num_samples": N}, model={"ghost_batch": 20}, layout={"max_micro_batch": 20}, **sections)
    return parse_job({**tree, "schedule": schedule})


def test_a_noise_scale_that_rises_is_not_said_to_be_that_of_the_run() -> None:
    """g is proportional to 1/B: 200, 100, 400 double it at epoch 1, and then end at half of the first value."""
    job = job_of({"policy": "steps", "epochs": 4, "batch_steps": f"0:200 {N}:100 {2 * N}:400"})
    plan = compile_plan(job, 1, N).to_dict()
    run = RecordedRun("runs/x", job, N, plan["num_updates"], tuple(plan["phases"]), tuple(seen(4, lambda _: 1200)))
    advice = advise(run)
    assert run.rise_epoch == 1
    assert [(p.phase.start_epoch, p.phase.global_batch) for p in advice.phases] == [(0, 200), (2, 400)]
    assert summary(advice)[1] == (
        "The noise scale follows the run's: where it fell, the batch grows as far as the evidence supports, and lr "
        "decays by the remaining factor. At epoch 1 it rose, which this job does not repeat: it stays at the lowest "
        "value before."
    )
    growing = recorded(seen(4, lambda _: 720), boundaries_epochs=[1, 2], noise_factor=3.0)
    assert growing.rise_epoch is None
    assert summary(advise(growing))[1].startswith("The noise scale equals the run's at every epoch: ")


def test_a_run_of_adascale_is_refused() -> None:
    """The defect: the advised job had the learning rate of the base batch, and the length of the progress."""
    schedule = {"policy": "adaptive", "epochs": 4, "global_batch": B0, "batch_scale": 4.0}
    run = replace(recorded(seen(4, lambda _: 600)), job=job_of(schedule, trigger={"name": "adascale"}))
    with pytest.raises(RunError, match="runs/x: cannot advise on this run: AdaScale sets its learning rate"):
        advise(run)


def test_growth_in_place_of_decay_has_batches_of_the_ranks_of_the_run() -> None:
    """Of 5 ranks × 20 samples: 2.3 × 100 is nearest to 200, and 2.3 × 2.3 × 100 = 529 to 500."""
    run = recorded(seen(4, lambda _: 1200), 5, boundaries_epochs=[1, 2], noise_factor=2.3)
    advice = advise(run)
    assert advice.plan.num_ranks == 5
    assert [p.phase.global_batch for p in advice.phases] == [100, 200, 500]
    ours = [advice.plan.noise_scale(p.phase) for p in advice.phases]
    assert ours == pytest.approx([phase["noise_scale"] for phase in run.phases])


# --- the command ------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recorded run folder, `runs/recorded`: see golden/advice/README.md."""
    folder = tmp_path / "runs" / "recorded"
    folder.mkdir(parents=True)
    for name in ("plan.json", "metrics.jsonl"):
        (folder / name).write_bytes((GOLDEN / name).read_bytes())
    monkeypatch.chdir(tmp_path)
    return folder


def test_the_advice_on_a_recorded_run_is_the_golden_one_and_plans(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["advise", "runs/recorded"]) == 0
    printed = capsys.readouterr()
    assert printed.out == (GOLDEN / "advised.toml").read_text()
    assert "too weak to rely on" not in printed.err
    Path("grown.toml").write_text(printed.out)
    job = load_job(Path("grown.toml"))
    assert main(["plan", "grown.toml", "--ranks", "2", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert main(["advise", "runs/recorded", "--json"]) == 0
    advised = json.loads(capsys.readouterr().out)
    assert [p["global_batch"] for p in advised["phases"]] == [p["global_batch"] for p in plan["phases"]]
    assert advised["num_updates"] == plan["num_updates"] < advised["run_updates"]
    assert advised["job_file"] == tomllib.loads(printed.out) == job.model_dump(mode="json", exclude_none=True)


def test_the_advice_can_be_drawn(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["advise", "runs/recorded", "--plot", "advice.png"]) == 0
    assert Path("advice.png").read_bytes().startswith(b"\x89PNG")
    assert main(["advise", "runs/recorded", "--plot", "advice.xyz"]) == 1
    printed = capsys.readouterr()
    assert "advice.xyz cannot be drawn: Format 'xyz' is not supported" in printed.err


def test_a_run_whose_noise_supports_nothing_prints_its_evidence_and_no_job(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["advise", "runs/recorded", "--headroom", "8", "--plot", "evidence.png"]) == 1
    assert Path("evidence.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "band of 95 %" in printed.err
    assert "no growth is supported" in printed.err


def test_a_run_without_measurement_gets_the_command_to_type(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", job, "--schedule.epochs", "1.6"]) == 0
    capsys.readouterr()
    assert main(["advise", "runs/small"]) == 1
    report = capsys.readouterr()
    words = shlex.split(report.err.split("hvd-batchgrow ")[1])
    assert report.out == ""
    assert words[0] == "train"
    assert words[-2:] == ["--layout.max-micro-batch", "8"]  # half of the one pass of 16
    assert main(words) == 0
    capsys.readouterr()
    assert main(["advise", "runs/small-measured"]) in {0, 1}
    assert "not measured" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["advise", "nowhere"], 1, "nowhere does not hold a run"),
        (["advise", "runs/recorded", "--max-batch-factor", "1"], 2, "--max-batch-factor: must be above 1, got 1"),
        (["advise", "runs/recorded", "--headroom", "0"], 2, "--headroom: must be above 0, got 0"),
        (["advise", "runs/recorded", "--lr-rule", "adam"], 2, "'adam' is for optim.name = 'adam'"),
        (["advise", "runs/recorded", "--optim.lr", "1"], 2, "optim.lr: this command reads no job file"),
    ],
)
def test_what_cannot_be_advised_is_refused(
    words: list[str], code: int, message: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == code
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.out == ""


def test_a_folder_that_holds_something_else_is_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "plan.json").write_text("{}")
    assert main(["advise", "runs/recorded"]) == 1
    assert "plan.json is damaged, or not a plan" in capsys.readouterr().err


def test_a_smaller_pass_is_half_of_what_a_rank_had_in_whole_ghost_batches() -> None:
    (one,) = seen(1, lambda _: 100)[-1:]
    job = small_job(layout={"max_micro_batch": 512})
    for batch, gradients, wanted in ((64, 1, 32), (64, 2, 16), (40, 1, 16), (2048, 1, 256), (8, 1, None)):
        assert smaller_pass([replace(one, global_batch=batch, gradients=gradients)], job) == wanted
    assert smaller_pass([replace(one, global_batch=64, gradients=1)], small_job(layout={"exact": True})) is None


def test_a_run_that_is_measured_again_has_a_short_name() -> None:
    assert [_measured_name(name) for name in ("a", "a-measured", "a-measured2")] == [
        "a-measured",
        "a-measured2",
        "a-measured3",
    ]


def test_a_missing_band_differs_from_an_unresolved_estimate() -> None:
    records = [
        *seen(1, lambda _: None),
        *(replace(o, low=None, high=None) for o in seen(2, lambda _: 100, start=1)),
        *seen(3, lambda _: 600, start=2),
    ]
    columns = {str(c.header): list(c.cells) for c in evidence_table(recorded(records)).columns}
    report = set(zip(columns["B_simple"], columns["band of 95 %"], columns["resolved"], strict=True))
    assert report == {("-", "unresolved", "0 %"), ("100", "no band yet", "-"), ("600", "500 … 720", "100 %")}
