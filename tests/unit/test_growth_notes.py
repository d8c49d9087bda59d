"""Notes before the run: a schedule that can never grow, and values that are rarely intended."""

from __future__ import annotations

from typing import Any

import pytest

from hvd_batchgrow.cli import main
from hvd_batchgrow.config import Job
from hvd_batchgrow.job_file import parse_job
from hvd_batchgrow.messages.errors import JobError
from hvd_batchgrow.schedule.plan import compile_plan
from tests.helpers import NUM_TRAIN, job_tree, measured_job, measured_tree

GROUP = 8
"""Ghost batch of the jobs, whose N is 300: N/10 is 24 in whole ghost batches."""


def grow_job(policy: str, num_samples: int = NUM_TRAIN, **schedule: Any) -> Job:
    tree = job_tree(data={"num_samples": num_samples})
    tree["schedule"] = {"policy": policy, "epochs": 3.0, "global_batch": 16, "max_batch": "N/10"} | schedule
    return parse_job(tree)


def notes_on_growth(job: Job, num_samples: int = NUM_TRAIN) -> list[str]:
    return [note for note in compile_plan(job, 1, num_samples).notes if "grow" in note]


BOUNDARY: dict[str, Any] = {"boundaries_epochs": [1.0, 2.0], "noise_factor": 5.0}
STEP_LR = {"lr_schedule": "steps", "lr_steps": [[1.0, 0.1], [2.0, 0.01]]}


@pytest.mark.parametrize(
    ("policy", "schedule", "remedy"),
    [
        ("grow", BOUNDARY, "max_batch >= 120"),  # 5 × 24
        ("hybrid", BOUNDARY, "max_batch >= 120"),
        ("seesaw", BOUNDARY, "max_batch >= 120"),
        ("import", STEP_LR, "max_batch >= 240"),  # torch's StepLR(gamma=0.1): 10 × 24
        ("adabatch", {"every_epochs": 1.0}, "max_batch >= 64"),  # β/α = 2/0.75, of 24
    ],
)
def test_a_limit_below_two_batches_is_reported(policy: str, schedule: dict[str, Any], remedy: str) -> None:
    optim = {"name": "adam", "lr": 0.001} if policy == "seesaw" else {"name": "sgd", "lr": 0.1}
    tree = job_tree(schedule={})
    tree["schedule"] = {"policy": policy, "epochs": 3.0, "global_batch": 24, "max_batch": "N/10"} | schedule
    tree["optim"] = optim
    plan = compile_plan(parse_job(tree), 1, NUM_TRAIN)
    assert {phase.global_batch for phase in plan.schedule.phases} == {24}
    (note,) = [note for note in plan.notes if "grow" in note]
    assert note.startswith("the batch never grows, and the learning rate decays instead at every boundary: ")
    assert "schedule.max_batch = 'N/10' = 24, with a first batch of 24; for growth use" in note
    if policy != "adabatch":  # whose wanted batch follows β alone
        assert note.endswith(remedy)


@pytest.mark.parametrize(
    ("policy", "schedule", "note"),
    [
        ("grow", {"boundaries_epochs": []}, "the batch never grows: schedule.boundaries_epochs is empty"),
        (
            "grow",
            BOUNDARY | {"noise_factor": 1.0},
            "the batch never grows: schedule.noise_factor does not enlarge the batch",
        ),
        (
            "hybrid",
            BOUNDARY | {"growing_boundaries": 0},
            "the batch never grows: schedule.growing_boundaries is 0",
        ),
        ("adabatch", {"every_epochs": 9.0}, "the batch never grows: no boundary comes before the end of the run; "),
        (
            "grow",
            {"boundaries_epochs": [1.0], "noise_factor": 1.2, "max_batch": 96},  # 19.2 is nearer to 16 than to 24
            "the batch never grows, and the learning rate decays instead at every boundary: the requested 19.2 is "
            "rounded to 16, a whole multiple of 8; use a larger factor",
        ),
        (
            "grow",
            BOUNDARY,  # to 24 of the 80 that are wanted
            "the first boundary requests a batch of 80: it grows to at most 24, and the learning rate decays by the "
            "remaining factor: schedule.max_batch = 'N/10' = 24, with a first batch of 16; for growth use "
            "max_batch >= 80",
        ),
    ],
)
def test_other_reasons_are_named(policy: str, schedule: dict[str, Any], note: str) -> None:
    (found,) = notes_on_growth(grow_job(policy, **schedule))
    assert found[: len(note)] == note


@pytest.mark.parametrize(
    ("trigger", "schedule", "notes"),
    [
        (
            {"name": "plateau", "noise_factor": 5.0},
            {"global_batch": 24, "max_batch": "N/10"},
            [
                "the batch never grows, and every decision of the trigger lowers the learning rate instead: "
                "schedule.max_batch = 'N/10' = 24, with a first batch of 24; for growth use max_batch >= 120"
            ],
        ),
        (
            {"name": "plateau", "noise_factor": 5.0},
            {"global_batch": 16, "max_batch": 48},
            [
                "the first decision requests a batch of 80: it grows to at most 48, and the learning rate decays by "
                "the remaining factor: schedule.max_batch = 48, with a first batch of 16; for growth use "
                "max_batch >= 80"
            ],
        ),
        ({"name": "plateau", "noise_factor": 3.0}, {"global_batch": 16, "max_batch": 48}, []),
        (
            {"name": "norm_test"},
            {"global_batch": 24, "max_batch": 24},
            [
                "the batch never grows, and no decision of the trigger 'norm_test' is possible: "
                "schedule.max_batch = 24, with a first batch of 24; for growth use max_batch >= 48"
            ],
        ),
        ({"name": "norm_test"}, {"global_batch": 16, "max_batch": 32}, []),
        # Evaluated at 1 and 2: at 2 there was no improvement for 1 epoch, which is not more than the patience.
        (
            {"name": "plateau", "noise_factor": 3.0, "patience_epochs": 1.0},
            {"epochs": 3.0},
            [
                "the batch never grows: the 3 epochs end before the first decision, by evaluation.every_epochs = 1 and "
                "trigger.patience_epochs = 1"
            ],
        ),
        ({"name": "plateau", "noise_factor": 3.0, "patience_epochs": 1.0}, {"epochs": 3.1}, []),  # at 3
        (
            {"name": "plateau", "noise_factor": 3.0, "patience_epochs": 1.0, "windows_epochs": [[1.0, 2.0]]},
            {"epochs": 3.0},
            [],
        ),
        ({"name": "adascale"}, {"global_batch": 16, "batch_scale": 2.0, "max_batch": 32}, []),  # its batch stays
    ],
)
def test_a_trigger_that_cannot_grow_the_batch_is_reported(
    trigger: dict[str, Any], schedule: dict[str, Any], notes: list[str]
) -> None:
    defaults = {"patience_epochs": 0.5} if trigger["name"] == "plateau" else {}
    tree = measured_tree("data", defaults | trigger, schedule=schedule)
    assert notes_on_growth(parse_job(tree)) == notes


@pytest.mark.parametrize(
    ("schedule", "start"),
    [
        ({"max_batch": 16}, "the batch never grows, and with schedule.lr_rule = 'linear' the learning rate does not "),
        ({"max_batch": 24}, "the first boundary requests a batch of 80: it grows to at most 24, and with schedule.lr_"),
    ],
)
def test_with_a_rule_the_learning_rate_is_not_said_to_decay(schedule: dict[str, Any], start: str) -> None:
    """With lr_rule = "linear", g is proportional to ε/B = 0.05/16 in every phase: nothing falls at the limit."""
    job = grow_job("grow", **BOUNDARY, lr_rule="linear", **schedule)
    plan = compile_plan(job, 1, NUM_TRAIN)
    assert [phase.lr / phase.global_batch for phase in plan.schedule.phases] == pytest.approx([0.05 / 16] * 3)
    (note,) = notes_on_growth(job)
    assert note.startswith(start)
    assert "decays" not in note


def test_remedies_take_the_enlarged_start_into_account() -> None:
    """ε × 2 asks for a first batch of 32, and ÷ 5 for 160: then max_batch = 24 would need global_batch = 2.4."""
    job = grow_job("grow", **BOUNDARY, lr_scale=2.0, max_batch=24)
    (note,) = notes_on_growth(job)
    assert note.endswith("for growth use max_batch >= 160")
    batches = [
        phase.global_batch
        for phase in compile_plan(
            grow_job("grow", 2000, **BOUNDARY, lr_scale=2.0, max_batch=160), 1, 2000
        ).schedule.phases
    ]
    assert batches[:2] == [32, 160]
    late = grow_job("late", hold_fraction=0.5, lr_scale=2.0, max_batch=32, num_samples=2000)
    (note,) = notes_on_growth(late, 2000)
    assert note.endswith("schedule.max_batch = 32, with a first batch of 32; for growth use max_batch > 32")


@pytest.mark.parametrize("policy", ["grow", "decay"])
def test_a_schedule_that_does_what_it_says_has_no_note(policy: str) -> None:
    tree = job_tree(schedule={"policy": policy})
    assert compile_plan(parse_job(tree), 1, NUM_TRAIN).notes == []


def test_plan_and_train_print_it_in_a_separate_line(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--schedule.max-batch", "16", "--name", "never"]
    assert main(["plan", job, *words]) == 0
    printed = [line for line in capsys.readouterr().out.splitlines() if "the batch never grows" in line]
    assert main(["train", job, *words, "--max-updates", "1"]) == 75
    shown = [line for line in capsys.readouterr().err.splitlines() if "the batch never grows" in line]
    assert [line.strip() for line in printed] == shown
    assert len(shown) == 1


# --- values that are rarely meant -------------------------------------------------------------------


def job_with(section: str, **values: Any) -> Job:
    tree = job_tree(**{section: values})
    if "name" in values and section == "optim":
        tree["optim"] = {"lr": 0.001} | values
    return parse_job(tree)


@pytest.mark.parametrize(
    ("section", "values", "note"),
    [
        ("optim", {"lr": 128.0, "weight_decay": 0.0}, "optim.lr = 128 is unusually large for 'sgd'"),
        ("optim", {"lr": 1e30, "weight_decay": 0.0}, "optim.lr = 1e+30 is unusually large for 'sgd'"),
        (
            "optim",
            {"momentum": 0.9, "rescale_momentum": True},
            "optim.rescale_momentum has no effect, because the momentum never changes; schedule.momenta changes",
        ),
        ("optim", {"name": "adam", "lr": 0.5}, "optim.lr = 0.5 is unusually large for 'adam'"),
        (
            "optim",
            {"momentum": 0.9999},
            "optim.momentum = 0.9999 averages gradients over 10,000 updates, and the run has",
        ),
        (
            "optim",
            {"name": "adam", "betas": [0.99, 0.9]},
            "optim.betas[1] = 0.9 is below optim.betas[0] = 0.99",
        ),
        ("optim", {"name": "adamw", "eps": 1e8}, "optim.eps = 1e+08 is far above a gradient's size"),
        # 0.05 · 2: 0.9⁷ = 0.478
        (
            "optim",
            {"lr": 4.0, "weight_decay": 0.3},
            "optim.weight_decay = 0.3 × lr = 4 alone halves the weights in 1 update",
        ),
        ("optim", {"weight_decay": 2.0}, "optim.weight_decay = 2 × lr = 0.05 alone halves the weights in 7 updates"),
        ("task", {"label_smoothing": 0.9}, "task.label_smoothing = 0.9 spreads 90% of each target"),
        (
            "model",
            {"bn_momentum": 0.99},
            "model.bn_momentum = 0.99 is the weight of the newest ghost batch in the",
        ),
        (
            "model",
            {"name": "resnet8", "channels": None, "shakedrop": 0.9},
            "model.shakedrop = 0.9 is the probability that a sample is perturbed in the last block; for the paper's "
            "p_L = 0.9: 0.1",
        ),
        ("schedule", {"warmup_epochs": 2.0}, "schedule.warmup_epochs = 2 is more than half of epochs = 2.2"),
        ("schedule", {"epochs": 20_000.0}, "schedule.epochs = 20000 counts passes over the training set, not updates"),
        ("evaluation", {"every_epochs": 0.05}, "evaluation.every_epochs = 0.05 is less than an update"),  # 15 of 16
        ("checkpoint", {"every_epochs": 0.05}, "checkpoint.every_epochs = 0.05 is less than an update"),
        ("logging", {"stall_timeout_s": 5.0}, "logging.stall_timeout_s = 5: any step that takes longer ends the job"),
        ("update", {"ema_samples": 15.0}, "update.ema_samples = 15 is less than a batch"),
    ],
)
def test_what_is_rarely_meant_is_a_note_and_no_more(section: str, values: dict[str, Any], note: str) -> None:
    notes = compile_plan(job_with(section, **values), 1, NUM_TRAIN).notes
    assert [found[: len(note)] for found in notes] == [note]


@pytest.mark.parametrize("validation", [0.0, 0.1])
def test_weights_that_are_selected_on_the_test_set_are_a_note(validation: float) -> None:
    data = {"validation_fraction": validation} if validation else {}
    job = measured_job({"name": "plateau", "patience_epochs": 1.0, "restore_best": True}, data=data)
    notes = [note for note in compile_plan(job, 1, NUM_TRAIN).notes if "restore_best" in note]
    assert ["are no longer a test" in note for note in notes] == [True] * (not validation)


@pytest.mark.parametrize(
    ("section", "values"),
    [
        ("optim", {"lr": 3.2}),
        ("optim", {"name": "lars", "lr": 29.0, "weight_decay": 1e-4}),
        ("optim", {"name": "adamw", "lr": 1e-3, "weight_decay": 1.0}),  # grokking
        ("task", {"label_smoothing": 0.3}),
        ("model", {"bn_momentum": 0.5}),
        ("model", {"name": "resnet8", "channels": None, "shakedrop": 0.8}),
        ("evaluation", {"every_epochs": 1e9}),
    ],
)
def test_what_is_used_on_purpose_has_no_note(section: str, values: dict[str, Any]) -> None:
    assert compile_plan(job_with(section, **values), 1, NUM_TRAIN).notes == []


@pytest.mark.parametrize(
    ("section", "values", "fault"),
    [
        # 300 samples and lr 0.05: 20 · 0.05 = 1
        ("optim", {"weight_decay": 20.0}, "optim.weight_decay: 20 × the learning rate 0.05 = 1: .*; use < 20"),
        (
            "optim",
            {"name": "adamw", "lr": 0.01, "weight_decay": 500.0},
            "optim.weight_decay: 500 × .* = 5: .*; use < 100",
        ),
        (
            "optim",
            {"momentum": 0.0, "nesterov": True},
            "optim.momentum: 0, and optim.nesterov = true needs momentum; use 0.9, or remove optim.nesterov$",
        ),
        # -16 / ln 0.999 = 15991.998…
        (
            "update",
            {"ema_samples": 0.999},
            "update.ema_samples: 0.999 is below 1, and the time constant counts samples; .* use 15992$",
        ),
        (
            "trigger",
            {"name": "plateau", "metric": "top1", "min_delta": 1.0, "patience_epochs": 1.0},
            "trigger.min_delta: 1: top1 is in .*; for 1 % use 0.01; if intended, 0.999",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused(section: str, values: dict[str, Any], fault: str) -> None:
    job = parse_job(measured_tree("data", values)) if section == "trigger" else job_with(section, **values)
    with pytest.raises(JobError, match=rf"1 fault\n  {fault}"):
        compile_plan(job, 1, NUM_TRAIN)


@pytest.mark.parametrize(
    "words",
    [
        {"trigger": {"name": "plateau", "noise_factor": 1e308, "patience_epochs": 0.0}},
        {"trigger": {"name": "plateau"}, "evaluation": {"every_epochs": 5e-324}},
        {"optim": {"name": "sgd", "lr": 1e-300, "weight_decay": 1e-300}},
        {"optim": {"name": "sgd", "lr": 1e300, "momentum": 0.9999999999999999}},
    ],
)
def test_numbers_at_the_edge_of_floating_point_are_no_trouble(words: dict[str, Any]) -> None:
    tree = measured_tree("data", {"name": "plateau", "patience_epochs": 0.5}) | words
    tree["trigger"] = {"patience_epochs": 0.5} | tree["trigger"]
    assert isinstance(compile_plan(parse_job(tree), 1, NUM_TRAIN).notes, list)
