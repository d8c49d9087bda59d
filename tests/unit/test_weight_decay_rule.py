"""`optim.weight_decay_rule`: expected values follow from λ ε N/B (AdamW) and λ ε N/((1-m) B) (SGD), by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch

from hvd_batchgrow.cli import main
from hvd_batchgrow.job_file import parse_job
from hvd_batchgrow.library.plan_lr import PlanLR
from hvd_batchgrow.messages.errors import JobError
from hvd_batchgrow.optim.build import build_optimizer, set_weight_decay, weight_decays
from hvd_batchgrow.schedule.plan import Plan, compile_plan
from hvd_batchgrow.schedule.transitions import describe_transitions
from hvd_batchgrow.schedule.twin import decay_twin, weight_decay_note
from hvd_batchgrow.schedule.weight_decay import decay_per_sample
from tests.helpers import enter_with_job, job_tree

N = 64_000
ADAMW = {"name": "adamw", "lr": 1e-3, "weight_decay": 0.01}
SGD = {"name": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}
PER_EPOCH = {"weight_decay_rule": "per_epoch"}


def plan_of(optim: dict[str, Any], num_samples: int = N, **schedule: Any) -> Plan:
    tree = {
        "name": "decayed",
        "data": {"source": "synthetic_images", "num_samples": num_samples},
        "model": {"name": "small_conv_net", "ghost_batch": 32},
        "optim": optim,
        "schedule": {
            **{"epochs": 3.0, "boundaries_epochs": [1.0, 2.0], "global_batch": 128, "noise_factor": 4.0},
            **{"max_batch": 2048, "policy": "grow", **schedule},
        },
    }
    return compile_plan(parse_job(tree), 1, num_samples)


def factors(plan: Plan) -> list[float]:
    found = [phase.weight_decay_factor for phase in plan.schedule.phases]
    return [1.0 if factor is None else factor for factor in found]


def test_seesaw_and_its_twin_decay_weights_alike_per_epoch() -> None:
    """At f = 4, Seesaw halves ε and quadruples B, so λ × 8; its twin divides ε by 4, so λ × 4."""
    plan = plan_of(ADAMW | PER_EPOCH, policy="seesaw")
    twin = compile_plan(decay_twin(plan.job, N), 1, N)
    assert factors(plan) == pytest.approx([1, 8, 64], rel=1e-9)
    assert factors(twin) == pytest.approx([1, 4, 16], rel=1e-9)
    # λ ε N / B = 0.01 · 0.001 · 64000 / 128 in every phase of both
    for each in (plan, twin):
        pairs = zip(factors(each), each.schedule.phases, strict=True)
        decays = [0.01 * factor * phase.lr * N / phase.global_batch for factor, phase in pairs]
        assert decays == pytest.approx([0.005] * 3, rel=1e-9)
    assert weight_decay_note(plan, twin) is None
    assert "weight decay × 8, per epoch held at 0.005" in describe_transitions(plan)[0]


def test_without_the_rule_the_twin_of_seesaw_is_reported_as_confounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    plan = plan_of(ADAMW, policy="seesaw")
    twin = compile_plan(decay_twin(plan.job, N), 1, N)
    assert factors(plan) == factors(twin) == [1, 1, 1]
    note = weight_decay_note(plan, twin) or ""
    # After one boundary λ ε N / B has fallen by 8 in the run, and by 4 in the twin.
    assert note == (
        "run and twin also differ in weight decay: 0.000625 and 0.00125 per epoch from epoch 1 on; "
        'optim.weight_decay_rule = "per_epoch" makes them equal'
    )
    assert "weight decay per epoch 0.005 → 0.000625" in describe_transitions(plan)[0]
    Path("job.toml").write_text(tomli_w.dumps(plan.job.model_dump(mode="json", exclude_none=True)))
    assert main(["plan", "job.toml", "--ranks", "1"]) == 0
    assert " ".join(note.split()) in " ".join(capsys.readouterr().out.split())
    assert main(["plan", "job.toml", "--ranks", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["notes"][-1] == note


@pytest.mark.parametrize(("rule", "expected"), [({}, [1, 1, 1]), (PER_EPOCH, [1, 4, 16])])
def test_growth_with_sgd_has_the_decay_of_its_twin_under_both_rules(rule: dict[str, str], expected: list[int]) -> None:
    plan = plan_of(SGD | rule)
    twin = compile_plan(decay_twin(plan.job, N), 1, N)
    assert factors(plan) == pytest.approx(expected, rel=1e-9)
    assert factors(twin) == pytest.approx(expected, rel=1e-9)
    assert weight_decay_note(plan, twin) is None


def test_an_update_that_straddles_a_boundary_causes_no_note() -> None:
    """At epoch 1 the run, in steps of 160, is at sample 63,200, and the twin, in steps of 128, at 63,232."""
    plan = plan_of(SGD, 63_200, lr_scale=1.25)
    twin = compile_plan(decay_twin(plan.job, 63_200), 1, 63_200)
    assert [each.schedule.phases[1].start_samples for each in (plan, twin)] == [63_200, 63_232]
    assert weight_decay_note(plan, twin) is None


@pytest.mark.parametrize("optim", [ADAMW, SGD], ids=["adamw", "sgd"])
def test_a_phase_that_is_cut_into_pieces_decays_weights_like_its_twin(optim: dict[str, Any]) -> None:
    """A cosine of four phases, of which the last is cut into 25 pieces: its batch of 2,440 is above the limit.

    The mean of (1 + cos πt)/2 over part k of n is ½ + (n/2π) (sin π(k+1)/n - sin πk/n). It is 0.950158158 in the
    first phase. λ × its ratio to the mean of a piece, part 75 to 99 of 100, keeps λ ε/B. The defect: the run kept the λ
    of the first piece, and its twin did not.
    """
    job = plan_of(optim | PER_EPOCH, epochs=8.0, boundaries_epochs=[]).job
    cosine = {"policy": "import", "lr_schedule": "cosine", "num_phases": 4, "epochs": 8.0, "global_batch": 128}
    tree = job.model_dump(mode="json", exclude_none=True) | {"schedule": {**cosine, "max_batch": 512}}
    plan = compile_plan(parse_job(tree), 1, N)
    last = [phase.weight_decay_factor for phase in plan.schedule.phases if phase.start_epoch >= 6]
    means = [0.5 + 50 / math.pi * (math.sin(math.pi * (k + 1) / 100) - math.sin(math.pi * k / 100)) for k in (75, 90)]
    assert (last[0], last[15]) == pytest.approx([0.950158158 / mean for mean in means], rel=1e-8)
    twin = compile_plan(decay_twin(plan.job, N), 1, N)
    assert factors(twin) == pytest.approx(factors(plan), rel=1e-9)
    rest = 1 - 0.9 if optim is SGD else 1.0
    first = optim["weight_decay"] * optim["lr"] * 0.950158158 * N / (128 * rest)  # λ ε N / (B (1-m))
    for each in (plan, twin):
        decays = [N * decay_per_sample(each.job.optim, phase) for phase in each.schedule.phases]
        assert decays == pytest.approx([first] * 28, rel=1e-8)
    assert weight_decay_note(plan, twin) is None


def test_momentum_counts_for_sgd_and_not_for_adamw() -> None:
    """B × 4, and with SGD m from 0.9 to 0.95 doubles 1/(1-m), so B × 8 has the same noise; λ × 4 for both."""
    schedule: dict[str, Any] = {"momenta": [0.9, 0.95], "boundaries_epochs": [1.0]}
    assert factors(plan_of(SGD | PER_EPOCH, **schedule)) == pytest.approx([1, 4], rel=1e-9)
    assert factors(plan_of(ADAMW | PER_EPOCH, **schedule)) == pytest.approx([1, 4], rel=1e-9)


def test_the_note_names_the_rule_only_where_it_is_possible() -> None:
    """With exact noise, growth by N/B - 1 from 128 to N/2 at a constant rate divides ε/B by 250, the twin's by 499."""
    exact: dict[str, Any] = {
        "exact_noise": True,
        "boundaries_epochs": [1.0],
        "noise_factor": 499.0,
        "max_batch": 32_000,
    }
    lars = {"name": "lars", "lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}
    notes = {}
    for optim in (SGD, lars):
        plan = plan_of(optim, **exact)
        notes[optim["name"]] = weight_decay_note(plan, compile_plan(decay_twin(plan.job, N), 1, N)) or ""
    assert notes["lars"].startswith(
        "run and twin also differ in weight decay: 0.001 and 0.000501 per epoch from epoch 1"
    )
    assert notes["sgd"] == f'{notes["lars"]}; optim.weight_decay_rule = "per_epoch" makes them equal'


def test_warm_up_does_not_change_weight_decay() -> None:
    plan = plan_of(ADAMW | PER_EPOCH, warmup_epochs=0.5)
    assert [plan.schedule.at(k * 128).weight_decay_factor for k in (0, 100, 300)] == [1, 1, 1]


@pytest.mark.parametrize(
    ("optim", "message"),
    [
        ({"name": "adam", "lr": 1e-3, "weight_decay": 0.1}, "'per_epoch' is not defined for adam, which"),
        (
            {"name": "lars", "lr": 1.0, "weight_decay": 5e-4},
            r"'per_epoch' is not possible with lars: its trust ratio η ‖w‖/\(‖g‖ \+ β ‖w‖\) falls as the weight decay",
        ),
        ({"name": "sgd", "lr": 0.1}, "'per_epoch' has no effect without optim.weight_decay above 0"),
        # λ × 16 in the last phase, at 10 times the learning rate: 10 · 8 · 16 · 0.001 = 1.28
        (
            ADAMW | {"groups": [{"match": "*.weight", "weight_decay": 8.0, "lr_scale": 10.0}]},
            r"'per_epoch' needs weight decay 1280 .* 1.28 of .*; use weight_decay × lr_scale in optim.groups < 62.5",
        ),
        # λ × 16 in the last phase: 80 · 16 · 0.001 = 1.28 of every weight in each update
        (
            ADAMW | {"weight_decay": 80.0},
            r"'per_epoch' needs weight decay 1280 at the batch of 2048; .* 0.001, .* 1.28 of",
        ),
    ],
)
def test_an_impossible_per_epoch_rule_is_refused(optim: dict[str, Any], message: str) -> None:
    with pytest.raises(JobError, match=rf"optim.weight_decay_rule: {message}"):
        plan_of(optim | PER_EPOCH)


def test_the_optimizer_gets_the_weight_decay_of_the_phase() -> None:
    plan = plan_of(ADAMW | PER_EPOCH)
    network = torch.nn.Linear(2, 2)
    optimizer = build_optimizer(network, plan.job.optim)
    first = weight_decays(optimizer)
    for phase, expected in zip(plan.schedule.phases, (0.01, 0.04, 0.16), strict=True):
        set_weight_decay(optimizer, phase, first)
        assert [group["weight_decay"] for group in optimizer.param_groups] == pytest.approx([expected, 0.0])


def test_plan_lr_sets_the_same_weight_decay_if_the_state_of_the_optimizer_was_loaded_before() -> None:
    plan = plan_of(ADAMW | PER_EPOCH)
    network = torch.nn.Linear(2, 2)
    saved, resumed = (build_optimizer(network, plan.job.optim) for _ in range(2))
    PlanLR(saved, plan).set_samples(plan.schedule.phases[1].start_samples)
    resumed.load_state_dict(saved.state_dict())
    PlanLR(resumed, plan).set_samples(plan.schedule.phases[2].start_samples)
    assert [group["weight_decay"] for group in resumed.param_groups] == pytest.approx([0.16, 0.0])  # 0.01 · 4 · 4


def test_the_weight_decay_of_groups_alone_is_reported_too() -> None:
    optim = {"name": "adamw", "lr": 1e-3, "groups": [{"match": "*.weight", "weight_decay": 0.01}]}
    plan = plan_of(optim, policy="seesaw")
    note = weight_decay_note(plan, compile_plan(decay_twin(plan.job, N), 1, N)) or ""
    assert "0.000625 and 0.00125 per epoch from epoch 1 on" in note
    assert "weight decay per epoch 0.005 → 0.000625" in describe_transitions(plan)[0]


def test_a_run_that_is_resumed_in_a_later_phase_ends_with_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    optim = {"name": "adamw", "lr": 0.01, "weight_decay": 1.0, **PER_EPOCH}
    tree = job_tree("data")
    tree["optim"] = optim
    enter_with_job(tmp_path, tree, monkeypatch)
    assert main(["train", "job.toml"]) == 0
    assert main(["train", "job.toml", "--name", "stopped", "--max-updates", "16"]) == 75
    assert main(["train", "job.toml", "--name", "stopped", "--resume", "auto"]) == 0
    assert main(["train", "job.toml", "--name", "other", "--optim.weight-decay-rule", "per_update"]) == 0

    def weights(name: str) -> torch.Tensor:
        path = max(Path(f"runs/{name}/checkpoints").iterdir())
        state = torch.load(path, weights_only=False)
        model = state["model"]
        return torch.cat([value.flatten().float() for value in model.values()])

    assert torch.equal(weights("small"), weights("stopped"))
    assert not torch.equal(weights("small"), weights("other"))
    assert math.isfinite(float(weights("small").sum()))
