from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tomli_w

from hvd_batchgrow.job_file import load_job, parse_job, split_overrides
from hvd_batchgrow.messages.errors import JobError
from tests.helpers import job_tree

JOBS = sorted((Path(__file__).parents[2] / "jobs").glob("*.toml"))


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_every_shipped_job_is_valid_and_named_as_its_file(path: Path) -> None:
    assert load_job(path).name == path.stem


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        ("schedule", "factr", 3.0, "schedule.factr: unknown key; did you mean schedule.noise_factor?"),
        (
            "optim",
            "zzz",
            1,
            "optim.zzz: unknown key; known here: name, lr, weight_decay, weight_decay_rule, "
            "decay_norm_and_bias, groups, layer_decay, momentum, nesterov, rescale_momentum",
        ),
        ("optim", "name", "lasr", "optim.name: must be one of sgd, adam, adamw, lars, got 'lasr'"),
        ("optim", "trust_coefficient", 0.01, "optim.trust_coefficient: unknown key of 'sgd'; it belongs to lars"),
        ("optim", "momentum", 1.0, "optim.momentum: must be less than 1, got 1.0"),
        ("schedule", "policy", "grwo", "schedule.policy: must be one of adabatch, adaptive, decay, grow"),
        ("schedule", "every_epochs", 1.0, "schedule.every_epochs: unknown key of 'grow'; it belongs to adabatch"),
        ("optim", "lr", "0.1", "optim.lr: must be a number, got '0.1'"),
        ("optim", "lr", float("nan"), "optim.lr: must be a finite number, got nan"),
        ("schedule", "noise_factor", 0.5, "schedule.noise_factor: must be at least 1, got 0.5; nearest: 1"),
        ("schedule", "max_batch", "N/0", "schedule.max_batch: must be a fraction of the"),
        ("schedule", "max_batch", True, "schedule.max_batch: must be a whole number or text, got true"),
        ("schedule", "boundaries_epochs", [1.0, "2"], "schedule.boundaries_epochs.1: must be a number, got '2'"),
        ("model", "ghost_batch", 0, "model.ghost_batch: must be greater than 0, got 0; nearest: 1"),
        ("model", "ghost_batch", 1, "model.ghost_batch: 1: small_conv_net has batch norm, and one sample has no batch"),
        ("model", "ghost_batch", 8.0, "model.ghost_batch: must be a whole number, got 8.0"),
        (
            "model",
            "name",
            "resnet21",
            "model.name: must be resnetD of depth D = 6n+2, nearest: resnet20, resnet26, got",
        ),
        ("model", "channels", [], "model.channels: must have at least 1 item, not 0, got []"),
        ("model", "kwargs", [1], "model.kwargs: must be a table of keys and values, got [1]"),
    ],
)
def test_a_fault_names_its_key_the_value_and_what_is_right(section: str, key: str, value: Any, message: str) -> None:
    with pytest.raises(JobError) as caught:
        parse_job(job_tree(**{section: {key: value}}))
    assert [str(fault)[: len(message)] for fault in caught.value.faults] == [message]


def test_all_faults_are_reported_at_once() -> None:
    tree = job_tree(optim={"lr": -1.0, "momentum": 2.0}, schedule={"factr": 2.0})
    del tree["model"]
    with pytest.raises(JobError) as caught:
        parse_job(tree)
    assert {fault.path for fault in caught.value.faults} == {"optim.lr", "optim.momentum", "schedule.factr", "model"}


def test_lars_has_its_own_ranges_and_no_nesterov() -> None:
    values = {"name": "lars", "trust_coefficient": 0.0, "eps": -1e-8, "nesterov": True}
    with pytest.raises(JobError) as caught:
        parse_job(job_tree(optim=values))
    assert [str(fault) for fault in caught.value.faults] == [
        "optim.trust_coefficient: must be greater than 0, got 0.0",
        "optim.eps: must be at least 0, got -1e-08; nearest: 0.0",
        "optim.nesterov: unknown key of 'lars'; it belongs to sgd",
    ]


def test_a_job_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        parse_job(job_tree()).optim.lr = 1.0


def test_toml_faults_give_line_and_column(tmp_path: Path) -> None:
    path = tmp_path / "job.toml"
    path.write_text('name = "a"\n[data\n')
    with pytest.raises(JobError, match=r"job.toml: 1 fault\n  is not valid TOML: .*line 2, column 6"):
        load_job(path)


def test_a_missing_job_file_suggests_its_neighbor() -> None:
    with pytest.raises(JobError, match=r"did you mean .*fashion_mnist_quickstart.toml\?"):
        load_job(JOBS[0].with_name("fashion_mnist_quickstrat.toml"))


def test_overrides_are_taken_out_of_a_command_line() -> None:
    words = ["train", "job.toml", "--optim.lr", "-0.2", "--runs-dir=a.b", "--schedule.max-batch=N/10", "--seed", "3"]
    others, overrides = split_overrides([*words, "--schedule.boundaries-epochs", "[1, 2.5]"])
    assert others == ["train", "job.toml", "--runs-dir=a.b", "--seed", "3"]
    assert overrides == {
        "optim.lr": -0.2,
        "schedule.max_batch": "N/10",
        "schedule.boundaries_epochs": [1, 2.5],
    }


def test_an_override_without_a_value_is_refused() -> None:
    with pytest.raises(JobError, match=r"optim.lr: has no value"):
        split_overrides(["--optim.lr"])


def test_overrides_go_over_the_file_and_are_checked_like_it() -> None:
    assert load_job(JOBS[0], {"optim.lr": 0.7}).optim.lr == 0.7
    with pytest.raises(JobError, match=r"optimm: unknown key; did you mean optim\?"):
        load_job(JOBS[0], {"optimm.lr": 0.7})
    with pytest.raises(JobError, match=r"name.x: name is a value, not a section"):
        load_job(JOBS[0], {"name.x": 1})


def test_only_keys_that_decide_the_weights_are_compared_at_a_resume() -> None:
    base = parse_job(job_tree()).deciding(300)
    assert parse_job(job_tree(layout={"max_micro_batch": 32}, data={"pipeline": "torch"})).deciding(300) == base
    for change in (
        {"optim": {"lr": 0.06}},
        {"schedule": {"noise_factor": 2.0}},
        {"model": {"ghost_batch": 16}},
        {"seed": 8},
    ):
        assert parse_job(job_tree(**change)).deciding(300) != base
    assert parse_job(job_tree()).deciding(301) != base


def test_a_growth_put_over_puts_aside_what_the_file_says_of_another(tmp_path: Path) -> None:
    layout = {"grow_by": "auto", "max_ranks": 4, "objective": "least_rank_hours", "time_limit_h": 3.0}
    path = tmp_path / "job.toml"
    path.write_text(tomli_w.dumps(job_tree(layout=layout)))

    def left(**overrides: Any) -> dict[str, Any]:
        made = load_job(path, {f"layout.{key}": value for key, value in overrides.items()}).layout
        return {key: value for key in layout if (value := getattr(made, key)) is not None}

    assert left(uneven_ranks=True) == layout
    assert left(grow_by="ranks") == {"grow_by": "ranks", "max_ranks": 4, "objective": "least_time"}
    assert left(grow_by="accumulation") == {"grow_by": "accumulation", "objective": "least_time"}
    assert left(grow_by="ranks", ranks_per_phase=[1, 2]) == {"grow_by": "ranks", "objective": "least_time"}
    assert left(grow_by="accumulation", max_ranks=2)["max_ranks"] == 2  # said, and so refused
