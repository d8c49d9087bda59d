"""The live view: what it shows follows from the records, at every width, and no line is wider than the terminal."""

from __future__ import annotations

import io
import math
from typing import Any

import pytest
from rich.cells import cell_len

from hvd_batchgrow.messages.wording import short_time
from hvd_batchgrow.observers.console import PlainConsole, SpanLines
from hvd_batchgrow.observers.live_lines import live_lines, sparkline
from hvd_batchgrow.observers.progress_lines import progress_line
from hvd_batchgrow.results.live_plan import LivePlan
from hvd_batchgrow.results.live_state import LiveState, LiveView
from hvd_batchgrow.schedule.plan import compile_plan
from tests.helpers import NUM_TRAIN, measured_job, small_job

PLAN = compile_plan(small_job(), 2, NUM_TRAIN)
NOISE = {"all": {"trace": 1.0, "squared_norm": 1.0, "b_simple": 1234.4, "low": 900.0, "high": 2345.0}}


def line(samples: int, updates: int, phase: int = 0, **values: Any) -> dict[str, Any]:
    """Return a training record of one second per update of 16 samples."""
    known = {"kind": "train", "samples": samples, "epoch": samples / NUM_TRAIN, "updates": updates, "phase": phase}
    batch = {"lr": 0.05, "global_batch": 16, "accumulation": 1, "ranks": 2, "loss": 2.0 - samples / 1000, "top1": 0.5}
    speed = {"samples_per_s": 16.0, "data_wait_pct": 3.5, "allreduce_pct": 12.25, "skipped": 0, "gradient_noise": {}}
    return {**known, **batch, **speed, **values}


def evaluation(samples: int, top1: Any, dataset: str = "test") -> dict[str, Any]:
    known = {"kind": "eval", "samples": samples, "epoch": samples / NUM_TRAIN, "updates": 1}
    return {**known, "loss": 0.5, "top1": top1, "dataset": dataset}


def state_of(*lines: dict[str, Any]) -> LiveState:
    """Return the state after lines that came when the updates were done, without evaluations between."""
    state, now_s = LiveState(LivePlan.of(PLAN.to_dict())), 0.0
    state.begin(now_s)
    for each in lines:
        now_s += max(0, each["samples"] - state.samples) / 16
        state.add(each, now_s)
    return state


def shown(view: LiveView, width: int, now_s: float = 0.0, *, ascii_only: bool = False) -> list[str]:
    return ["".join(text for text, _ in spans) for spans in live_lines(view, width, now_s, ascii_only=ascii_only)]


FULL = state_of(
    line(16, 1),
    line(48, 3, gradient_noise=NOISE, skipped=2),
    evaluation(48, 0.75),
    evaluation(64, 0.625),
).view("trained by process 7 on node3")


@pytest.mark.parametrize("width", [1, 2, 7, 11, 12, 20, 40, 63, 64, 79, 80, 100, 119, 120, 160, 300])
@pytest.mark.parametrize("view", [FULL, LiveState(LivePlan.of(PLAN.to_dict())).view()])
@pytest.mark.parametrize("ascii_only", [False, True])
def test_no_line_is_wider_than_the_terminal(view: LiveView, width: int, ascii_only: bool) -> None:
    out = io.StringIO()
    PlainConsole(out, width).print(SpanLines(lambda w, _: live_lines(view, w, 5.0, ascii_only=ascii_only)))
    lines = out.getvalue().splitlines()
    assert max(map(cell_len, lines)) <= width
    assert len(lines) == len(live_lines(view, width, 5.0))  # none was folded


@pytest.mark.parametrize("width", [50, 80, 160])
def test_every_field_is_shown(width: int) -> None:
    text = "\n".join(shown(FULL, width, now_s=10.0))
    phase = PLAN.schedule.phases[0]
    for part in (
        *(f"1 of {len(PLAN.schedule.phases)}", "0.05", "16 = 2 ranks × 1 pass × 8", "1.9520", "50.00 %"),
        *("75.00 % (epoch 0.16)", "62.50 % (test, epoch 0.21)", f"3 of {PLAN.num_updates}", "3.5 %", "12.2 %"),
        *("1,234, 95 % 900 to 2,345", f"{100 * 64 / (phase.end_samples):.1f} %", "last record 7 s ago"),
        f"{100 * 64 / PLAN.schedule.end_samples:.1f} %",
    ):
        assert part in text
    assert "2 updates skipped, last record" in text


def test_the_time_left_is_that_of_the_updates_that_are_left_and_runs_down() -> None:
    view = state_of(line(16, 1), line(48, 3)).view()  # 1 s per update of 8 samples per rank: 1/8 s per sample
    phase_s = (PLAN.schedule.phases[0].end_samples - 48) / 16
    run_s = phase_s + sum(
        phase.num_updates * phase.global_batch / layout.ranks / 8
        for phase, layout in list(zip(PLAN.schedule.phases, PLAN.layouts, strict=True))[1:]
    )
    *_, phase, run, _ = shown(view, 80, now_s=3.0)
    assert phase.endswith(f"  {short_time(phase_s)} left")
    assert run.endswith(f"  {short_time(run_s)} left")
    *_, phase, run, age = shown(view, 80, now_s=8.0)
    assert phase.rstrip().endswith(f"  {short_time(phase_s - 5)} left")
    assert run.endswith(f"  {short_time(run_s - 5)} left")
    assert age == "last record 5 s ago"


def test_no_time_is_left_in_a_phase_that_has_ended() -> None:
    to_go = state_of(line(16, 1), line(PLAN.schedule.phases[0].end_samples, 10)).to_go()
    assert to_go is not None
    assert to_go.phase_s == 0
    assert to_go.run_s > 0


def test_the_time_left_includes_the_time_beside_updates() -> None:
    state = LiveState(LivePlan.of(PLAN.to_dict()))
    state.begin(100.0)
    state.add(line(16, 1), 103.0)  # 1 s of updates in 3 s
    to_go = state.to_go()
    assert to_go is not None
    assert to_go.phase_s == pytest.approx(3 * (PLAN.schedule.phases[0].end_samples - 16) / 16)


def test_a_progress_line_without_an_estimate_ends_with_the_record() -> None:
    """The defect: it ended with "; "."""
    state = LiveState(LivePlan.of(PLAN.to_dict()))
    state.add(line(16, 1), measures_time=False)  # of another invocation
    assert progress_line(state.view()).endswith("16 samples/s, all-reduce 12.2 %")


def test_the_best_is_of_the_validation_set_if_there_is_one() -> None:
    tests = state_of(evaluation(16, 0.5), evaluation(32, 0.9), evaluation(48, 0.7))
    assert (tests.view().best, tests.view().last) != (None, None)
    assert shown(tests.view(), 80)[3].split("best")[1].split() == ["90.00", "%", "(epoch", "0.11)"]
    both = state_of(evaluation(16, 0.5, "validation"), evaluation(32, 0.6, "validation"), evaluation(32, 0.9))
    assert "60.00 % (epoch 0.11)" in shown(both.view(), 80)[3]
    assert "90.00 % (test, epoch 0.11)" in shown(both.view(), 80)[3]


@pytest.mark.parametrize(
    ("scale", "text"),
    [
        ({}, "not measured"),
        ({"all": {"b_simple": None, "low": None, "high": None}}, "unresolved"),
        ({"all": {"b_simple": None, "low": 70.2, "high": None}}, "unresolved, 95 % ≥ 70"),
        ({"all": {"b_simple": 50.0, "low": None, "high": None}}, "50, 95 % unknown"),
        ({"all": {"b_simple": "x", "low": [], "high": {}}}, "unresolved"),
        ([], "not measured"),
    ],
)
def test_the_gradient_noise_scale(scale: Any, text: str) -> None:
    lines = shown(state_of(line(16, 1, gradient_noise=scale)).view(), 80)
    assert [row.removeprefix("B_simple").strip() for row in lines if row.startswith("B_simple")] == [text]


def test_noise_from_norm_layers_is_shown_with_its_factor() -> None:
    keys: dict[str, Any] = {"gradient_noise": NOISE, "norm_layers": {"factor": 1.314, "b_simple": 40.0}}
    lines = shown(state_of(line(16, 1, **keys)).view(), 300)
    assert any("(norm layers × 1.31)" in row for row in lines)
    assert not any(
        "norm layers" in row for row in shown(state_of(line(16, 1, **keys | {"norm_layers": 3})).view(), 300)
    )


def test_an_uneven_batch_is_not_shown_as_a_product() -> None:
    assert "B 16 on 3 ranks, 1 pass of ≤ 8" in shown(state_of(line(16, 1, ranks=3)).view(), 80)[1]


@pytest.mark.parametrize(
    ("values", "expected"),
    [([1, 2], "▁█"), ([3, 3], "▁▁"), ([0, 7, math.nan, 3.5], "▁█ ▅"), ([math.nan], ""), ([], "")],
)
def test_a_sparkline_spans_its_values(values: list[float], expected: str) -> None:
    assert sparkline(values) == expected


def test_ascii_terminals_get_ascii() -> None:
    lines = shown(FULL, 80, ascii_only=True)
    assert "".join(lines[0] + lines[2] + lines[-3] + lines[-2]).isascii()


@pytest.mark.parametrize(
    "key", ["epoch", "updates", "phase", "lr", "global_batch", "ranks", "loss", "top1", "samples_per_s"]
)
@pytest.mark.parametrize(
    "value", [None, "x", -1, 1e308, 10**400, [1], {"a": 1}, True, "\x1b[2J"], ids=lambda v: repr(v)[:9]
)
def test_hostile_values_are_shown_or_skipped(key: str, value: Any) -> None:
    state = state_of(line(16, 1), line(32, 2) | {key: value}, evaluation(32, value))
    for width in (30, 80):
        assert not any("\x1b" in row for row in shown(state.view(), width))


def test_names_from_files_cannot_move_the_cursor() -> None:
    tree = PLAN.to_dict() | {"job": "a\x1b[2J\nb"}
    assert r"a\x1b[2J\nb" in shown(LiveState(LivePlan.of(tree)).view(), 80)[0]


def test_a_trigger_may_add_phases() -> None:
    plan = compile_plan(measured_job({"name": "plateau", "patience_epochs": 1.0}), 2, NUM_TRAIN)
    assert "1 of 1 so far" in shown(LiveState(LivePlan.of(plan.to_dict())).view(), 80)[1]


@pytest.mark.parametrize("no_color", [False, True])
def test_no_color_is_respected(no_color: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("NO_COLOR", "1" if no_color else "")
    out = io.StringIO()
    PlainConsole(out, 80, is_terminal=True).print(SpanLines(lambda w, _: live_lines(FULL, w, 5.0)))
    codes = {code for part in out.getvalue().split("\x1b[")[1:] for code in part.split("m")[0].split(";")}
    colors = {code for code in codes if code.isdigit() and 30 <= int(code) < 110}
    assert colors == (set() if no_color else {"35", "31"})  # magenta and red, readable on black and on white
