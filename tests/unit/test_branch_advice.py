"""Advice from branches: critical batches whose schedule is worked out by hand, and the command on stored branches."""

from __future__ import annotations

import json
import math
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hvd_batchgrow.cli import main
from hvd_batchgrow.config.schedules import LrRule
from hvd_batchgrow.job_file import parse_job
from hvd_batchgrow.messages.errors import RunError
from hvd_batchgrow.results.branching import read_branch
from hvd_batchgrow.schedule.branch_advice import CriticalBatch, advise_from_branches, needed_lr_rule
from hvd_batchgrow.schedule.branches import BranchLrRule
from hvd_batchgrow.schedule.plan import Plan, compile_plan
from hvd_batchgrow.schedule.recorded_run import RecordedRun
from tests.helpers import plan_tree

N, B = 64_000, 128


def plan_of(
    policy: str = "decay",
    optim: dict[str, Any] | None = None,
    sections: dict[str, dict[str, Any]] | None = None,
    **schedule: Any,
) -> Plan:
    tree = {
        "name": "base",
        "data": {"source": "synthetic_images", "num_samples": N},
        "model": {"name": "small_conv_net", "ghost_batch": 32},
        "optim": optim or {"name": "sgd", "lr": 0.1, "momentum": 0.9},
        "schedule": {"policy": policy, "epochs": 10.0, "global_batch": B, **schedule},
        **(sections or {}),
    }
    return compile_plan(parse_job(tree), 1, N)


def run_of(plan: Plan) -> RecordedRun:
    return RecordedRun("runs/base", plan.job, N, plan.num_updates, tuple(plan.to_dict()["phases"]), ())


def at(epoch: float, critical: int, largest: int = 1024, batch: int = B) -> CriticalBatch:
    return CriticalBatch(round(epoch * N), batch, 0.1, largest, critical)


def batches(found: list[CriticalBatch], plan: Plan, rule: BranchLrRule = "linear") -> list[tuple[float, int]]:
    advice = advise_from_branches(run_of(plan), found, rule)
    return [(phase.start_samples / N, phase.global_batch) for phase in advice.plan.schedule.phases]


# --- a constant noise scale -----------------------------------------------------------------------


def test_the_batch_grows_to_the_critical_batch_of_each_checkpoint() -> None:
    found = [at(5, 512), at(2, 256)]
    assert batches(found, plan_of()) == [(0, 128), (2, 256), (5, 512)]


def test_a_step_starts_at_the_first_update_that_reaches_the_checkpoint() -> None:
    """After 128 100 samples, updates of 128 end at 128 128."""
    found = [CriticalBatch(128_100, B, 0.1, 1024, 256)]
    assert batches(found, plan_of())[1] == (128_128 / N, 256)


def test_a_smaller_critical_batch_later_on_limits_the_earlier_growth() -> None:
    assert batches([at(2, 1024), at(5, 512)], plan_of()) == [(0, 128), (2, 512)]


def test_growth_ends_at_a_tenth_of_the_training_set() -> None:
    """N/10 = 6400 = 50 × 128."""
    assert batches([at(2, 100_000)], plan_of()) == [(0, 128), (2, 6400)]


def test_growth_by_less_than_a_quarter_and_at_the_end_of_the_run_is_not_advised() -> None:
    assert batches([at(2, 256), at(4, 300), at(9.8, 1024)], plan_of()) == [(0, 128), (2, 256)]
    with pytest.raises(RunError, match="no growth is supported: the critical batch was 128 at sample 128,000"):
        batches([at(2, 128)], plan_of())


def test_branches_at_the_start_replace_the_first_batch() -> None:
    assert batches([at(0, 256)], plan_of()) == [(0, 256)]


@pytest.mark.parametrize(
    ("optim", "rule", "expected", "factor"),
    [
        ({"name": "sgd", "lr": 0.1}, "linear", "linear", 4.0),
        ({"name": "sgd", "lr": 0.1}, "sqrt", "sqrt", 2.0),
        ({"name": "sgd", "lr": 0.1}, "none", "none", 1.0),
        ({"name": "adamw", "lr": 0.001}, "sqrt", "adam", 2.0),
    ],
)
def test_the_learning_rate_follows_as_in_the_branches(
    optim: dict[str, Any], rule: BranchLrRule, expected: LrRule, factor: float
) -> None:
    advice = advise_from_branches(run_of(plan_of(optim=optim)), [at(2, 512)], rule)
    assert advice.job.schedule.rule == expected
    first, last = advice.plan.schedule.phases
    assert last.lr / first.lr == pytest.approx(factor)


LAYOUT = {"layout": {"max_micro_batch": 32}}


@pytest.mark.parametrize("noise", [{"estimator": "norm_layers"}, {"per_layer_group": True}])
def test_a_run_whose_trigger_measured_by_layers_is_advised(noise: dict[str, Any]) -> None:
    """The defect: keys of the trigger's measurements were refused in the advised job, which has no trigger."""
    trigger = {"name": "gradient_noise", "first_decision_epoch": 0.0}
    plan = plan_of("adaptive", sections={"trigger": trigger, "gradient_noise": noise, **LAYOUT})
    advice = advise_from_branches(run_of(plan), [at(2, 512)], "none")
    assert advice.job.gradient_noise.estimator == "micro_batches"
    assert [phase.global_batch for phase in advice.plan.schedule.phases] == [128, 512]


# --- a noise scale that falls ---------------------------------------------------------------------

FALLS: dict[str, Any] = {"boundaries_epochs": [3.0, 7.0], "noise_factor": 4.0}


def test_growth_replaces_decay_up_to_the_critical_batch() -> None:
    """g ÷ 4 twice asks for 512 and 2048; 512 is supported from epoch 3 on, so ε is divided by 4 at epoch 7."""
    plan = plan_of(**FALLS)
    assert needed_lr_rule(run_of(plan)) == "linear"
    advice = advise_from_branches(run_of(plan), [at(3, 512)], "linear")
    assert [phase.global_batch for phase in advice.plan.schedule.phases] == [128, 512, 512]
    assert [phase.lr for phase in advice.plan.schedule.phases] == pytest.approx([0.1, 0.1, 0.025])
    noise = [[each.noise_scale(phase) for phase in each.schedule.phases] for each in (plan, advice.plan)]
    assert noise[1] == pytest.approx(noise[0], rel=1e-9)


def test_a_later_checkpoint_supports_later_growth_only() -> None:
    advice = advise_from_branches(run_of(plan_of(**FALLS)), [at(3, 512), at(7, 2048)], "linear")
    assert [phase.global_batch for phase in advice.plan.schedule.phases] == [128, 512, 2048]


def test_phases_before_the_first_checkpoint_do_not_grow() -> None:
    with pytest.raises(RunError, match="no growth is supported"):
        advise_from_branches(run_of(plan_of(**FALLS)), [at(7, 2048)], "linear")


def test_the_rule_of_normalized_gradients_is_the_square_root() -> None:
    adam = {"name": "adamw", "lr": 0.001}
    plan = plan_of("seesaw", adam, max_batch=2048, **FALLS)
    assert needed_lr_rule(run_of(plan)) == "sqrt"
    assert needed_lr_rule(run_of(plan_of(optim=adam))) is None


# --- the command ----------------------------------------------------------------------------------


def write_branch(run: Path, samples: int, factor: int, losses: float, rule: str = "linear") -> None:
    """Write what is read of a finished branch of 64 blocks of 4 B samples; its losses share the noise of the blocks."""
    folder = run / f"branches/at-{samples}-for-{256 * B}-{rule}/k{factor}"
    folder.mkdir(parents=True)
    updates, batch = 256 // factor, factor * B
    end = samples + updates * batch
    phase = {"start_samples": samples, "lr": 0.1 * factor, "global_batch": batch, "num_updates": updates}
    (folder / "plan.json").write_text(json.dumps(plan_tree(N, end, seed=1) | {"phases": [phase]}))
    noise = np.random.default_rng(5).normal(0, 0.1, 256).reshape(updates, factor).mean(1)
    noise += np.random.default_rng(factor).normal(0, 0.001, updates)
    lines = [
        {"kind": "train", "samples": samples + (k + 1) * batch, "updates": k + 1, "loss": losses + noise[k]}
        | {"samples_per_s": 1000.0, "ranks": 1, "global_batch": batch}
        for k in range(updates)
    ]
    lines.append({"kind": "eval", "samples": end, "loss": losses, "dataset": "test"})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "record.json").write_text('{"attempts": []}')


def test_the_time_of_an_update_is_unknown_without_all_speeds(tmp_path: Path) -> None:
    write_branch(tmp_path, 160, 2, 1.0)
    (folder,) = tmp_path.glob("branches/*/k2")
    assert math.isfinite(read_branch(folder, 2, 160).update_s)
    metrics = folder / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('"samples_per_s": 1000.0', '"samples_per_s": null', 1))
    assert math.isnan(read_branch(folder, 2, 160).update_s)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A decaying run with branches at its first boundary, of which k = 4 is worse by 0.05."""
    monkeypatch.chdir(tmp_path)
    folder = Path("runs/base")
    folder.mkdir(parents=True)
    plan = plan_of(**FALLS)
    (folder / "plan.json").write_text(json.dumps(plan.to_dict()))
    start = plan.schedule.phases[1].start_samples
    for factor, loss in ((1, 0.5), (2, 0.5), (4, 0.55)):
        write_branch(folder, start, factor, loss)
    return folder


def advised(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["advise", "runs/base", "--from-branches", "--json", *words]) == 0
    tree: dict[str, Any] = json.loads(capsys.readouterr().out)
    return tree


def test_the_command_compares_the_branches_and_prints_a_job(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree = advised(capsys)
    assert [(one["critical"], one["largest"], one["is_bound"]) for one in tree["critical_batches"]] == [
        (256, 512, False)
    ]
    assert [phase["global_batch"] for phase in tree["phases"]] == [128, 256, 256]
    assert main(["advise", str(run), "--from-branches"]) == 0
    printed = capsys.readouterr()
    assert "critical batch 256 (batch of the run 128)" in printed.out
    job = parse_job(tomllib.loads(printed.out))
    assert job == parse_job(tree["job_file"])
    assert compile_plan(job, 1, N).num_updates == tree["num_updates"]
    assert "256" in printed.err
    # within 0.1, k = 4 is not worse: then g ÷ 4 is growth to 512 altogether
    tree = advised(capsys, "--tolerance", "0.1")
    assert [phase["global_batch"] for phase in tree["phases"]] == [128, 512, 512]
    assert tree["critical_batches"][0]["is_bound"]


def test_unfinished_branches_do_not_count(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = next(run.glob("branches/*/k4/metrics.jsonl"))
    metrics.write_text("".join(line + "\n" for line in metrics.read_text().splitlines()[:20]))
    assert advised(capsys)["critical_batches"][0]["largest"] == 256


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--tolerance", "0.1"], 2, "--tolerance: is for --from-branches"),
        (["--from-branches", "--tolerance", "-1"], 2, "--tolerance: must be above 0, got -1"),
        (["--from-branches", "--headroom", "2"], 2, "--headroom: is for advice from gradient noise"),
        (["--from-branches", "--lr-rule", "sqrt"], 2, "growth takes the place of decay, which is 'linear'"),
        (["--from-branches", "--lr-rule", "adam_linear"], 2, "'adam_linear' is not a rule of branches; use 'adam'"),
    ],
)
def test_options_that_contradict_are_refused(
    run: Path, words: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["advise", str(run), *words]) == code
    assert message in capsys.readouterr().err


def test_a_run_without_branches_names_the_command_that_trains_them(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = plan_of(**FALLS)
    other = Path("runs/other")
    other.mkdir()
    (other / "plan.json").write_text(json.dumps(plan.to_dict()))
    assert main(["advise", str(other), "--from-branches"]) == 1
    error = capsys.readouterr().err
    assert "runs/other has no finished branches with --lr-rule linear; train them: hvd-batchgrow branch runs/o" in error
    for factor in (1, 2):
        write_branch(other, 128, factor, 0.5, "none")
    assert main(["advise", str(other), "--from-branches"]) == 1
    assert "with --lr-rule linear; there are branches with none; train them" in capsys.readouterr().err
