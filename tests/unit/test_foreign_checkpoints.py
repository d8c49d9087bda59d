"""Checkpoints with a valid seal that do not belong to this run."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch

from hvd_batchgrow.cli import main
from hvd_batchgrow.messages.errors import RunError
from hvd_batchgrow.optim.build import build_optimizer
from hvd_batchgrow.optim.eager import SGD, Adam, AdamW, EagerOptimizer
from hvd_batchgrow.train.checkpoints.checkpoint import Checkpoint, checkpoint_paths
from hvd_batchgrow.train.checkpoints.compatibility import check_fits
from hvd_batchgrow.verification.digest import compare_weights, final_weights
from tests.helpers import job_tree, small_job
from tests.training import bytes_of
from tests.unit.test_checkpoint import make


def sealed(**changes: Any) -> bytes:
    """Return a sealed checkpoint with changed fields; None removes a field."""
    values = torch.load(io.BytesIO(bytes_of(make())), weights_only=True) | changes
    values = {key: value for key, value in values.items() if key not in changes or value is not None}
    buffer = io.BytesIO()
    torch.save(values, buffer)
    data = buffer.getvalue()
    return data + b"\nsha256 " + hashlib.sha256(data).hexdigest().encode() + b"\n"


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"samples": "640"}, "samples: "),
        ({"samples": -1}, "samples: "),
        ({"samples": True}, "samples: "),
        ({"elapsed_s": float("nan")}, "elapsed_s: "),
        ({"model": [1]}, "model: "),
        ({"model": {"w": 1.0}}, "model.w: "),
        ({"optimizer": {}}, "optimizer.state: "),
        ({"optimizer": {"state": {}, "param_groups": 3}}, "optimizer.param_groups: "),
        ({"evaluation": {"samples": 1}}, "evaluation"),
        ({"loss_scale": {"value": 0.0}}, "loss_scale"),
        ({"num_skipped": None}, "num_skipped: "),
        ({"unfinished": None}, "unfinished: Field required"),
        ({"more": 1}, "more: "),
        ({"model": {"w": torch.zeros(2, 2).to_sparse()}}, ""),
    ],
)
def test_fields_of_a_wrong_type_are_named(changes: dict[str, Any], where: str) -> None:
    with pytest.raises(RunError, match=f"^not a checkpoint of this version: {where}"):
        Checkpoint.from_bytes(sealed(**changes))


def test_empty_optional_fields_are_accepted() -> None:
    assert Checkpoint.from_bytes(sealed(evaluation={}, loss_scale={})).samples == 640


def _other_shape(good: Checkpoint) -> Checkpoint:
    return replace(good, model={**good.model, "classifier.bias": torch.zeros(5)})


def _other_type(good: Checkpoint) -> Checkpoint:
    return replace(good, model={name: tensor.double() for name, tensor in good.model.items()})


def _other_name(good: Checkpoint) -> Checkpoint:
    return replace(good, model={f"module.{name}": tensor for name, tensor in good.model.items()})


def _state_of_unknown_parameter(good: Checkpoint) -> Checkpoint:
    return replace(good, optimizer={**good.optimizer, "state": {99: {"momentum_buffer": torch.zeros(1)}}})


def _state_of_another(good: Checkpoint) -> Checkpoint:
    return replace(good, optimizer={**good.optimizer, "state": {0: {"momentum_buffer": torch.zeros(7)}}})


def _state_of_a_number(good: Checkpoint) -> Checkpoint:
    return replace(good, optimizer={**good.optimizer, "state": {0: {"momentum_buffer": 3}}})


def _group_without_a_key(good: Checkpoint) -> Checkpoint:
    groups = [{key: value for key, value in g.items() if key != "momentum"} for g in good.optimizer["param_groups"]]
    return replace(good, optimizer={**good.optimizer, "param_groups": groups})


def _group_of_text(good: Checkpoint) -> Checkpoint:
    groups = [{**group, "lr": "0.1"} for group in good.optimizer["param_groups"]]
    return replace(good, optimizer={**good.optimizer, "param_groups": groups})


@pytest.mark.parametrize(
    ("change", "misfit"),
    [
        (_other_shape, "model.classifier.bias: is float32 (5,), must be float32 (3,)"),
        (_other_type, "model.classifier.bias: is float64 (3,), must be float32 (3,)"),
        (_other_name, "model.classifier.bias: is nothing, must be float32 (3,)"),
        (_state_of_unknown_parameter, "optimizer.state.99: does not belong to any parameter"),
        (_state_of_another, "optimizer.state.0.momentum_buffer: is (7,), must be (4, 1, 3, 3)"),
        (_state_of_a_number, "optimizer.state.0.momentum_buffer: is int, must be (4, 1, 3, 3)"),
        (_group_without_a_key, "optimizer.param_groups.0.momentum: is nothing, must be float"),
        (_group_of_text, "optimizer.param_groups.0.lr: is str, must be float"),
        (lambda good: replace(good, samples=17), "from sample 17, which is in the middle of a ghost batch of 8"),
    ],
)
@pytest.mark.parametrize("fork", [False, True])
def test_a_checkpoint_that_does_not_fit_is_refused_and_no_file_changes(
    job: str, change: Callable[[Checkpoint], Checkpoint], misfit: str, fork: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", job, "--max-updates", "1"]) == 75
    (path,) = checkpoint_paths(Path("runs/small/checkpoints"))
    path.write_bytes(bytes_of(change(Checkpoint.from_bytes(path.read_bytes()))))
    before = {p: p.read_bytes() for p in Path("runs").rglob("*") if p.is_file()}
    capsys.readouterr()
    assert main(["train", job, *(["--fork", "other"] if fork else ["--resume", "auto"])]) == 1
    error = capsys.readouterr().err
    assert misfit in error or (fork and "no update of this job starts there" in error)
    assert "Traceback" not in error
    assert {p: p.read_bytes() for p in Path("runs").rglob("*") if p.is_file() and p.suffix != ".lock"} == {
        p: data for p, data in before.items() if p.suffix != ".lock"
    }


@pytest.mark.parametrize("num_steps", [0, 1])
@pytest.mark.parametrize(
    "optim",
    [
        {"name": "sgd", "momentum": 0.0},
        {"name": "sgd", "nesterov": True},
        {"name": "adam"},
        {"name": "adamw", "weight_decay": 0.1},
        {"name": "lars", "weight_decay": 0.1},
    ],
    ids=lambda optim: "-".join(map(str, optim.values())),
)
def test_every_optimizer_accepts_its_own_checkpoint(optim: dict[str, Any], num_steps: int, tmp_path: Path) -> None:
    job = small_job(optim={"lr": 0.1, **optim})
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2))
    optimizer = build_optimizer(model, job.optim)
    for _ in range(num_steps):
        model(torch.randn(4, 1, 5, 5)).square().sum().backward()
        optimizer.step()
    check_fits(checkpoint_of(model, optimizer), model, build_optimizer(model, job.optim), tmp_path)


def checkpoint_of(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Checkpoint:
    saved = replace(make(), model=model.state_dict(), optimizer=optimizer.state_dict(), average={}, growth={})
    return Checkpoint.from_bytes(bytes_of(saved))


@pytest.mark.parametrize("kind", [SGD, Adam, AdamW])
def test_a_run_with_a_parameter_that_no_loss_reaches_resumes_twice(kind: type[EagerOptimizer], tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 2))
    options: dict[str, Any] = {"lr": 0.1, "fused": True} | ({"momentum": 0.9} if kind is SGD else {})
    optimizer = kind(model.parameters(), **options)
    for _ in range(2):
        model[0](torch.ones(1, 3)).sum().backward()
        optimizer.step()
        saved, optimizer = checkpoint_of(model, optimizer), kind(model.parameters(), **options)
        check_fits(saved, model, optimizer, tmp_path)
        optimizer.load_state_dict(saved.optimizer)
    assert sorted(optimizer.state_dict()["state"]) == [0, 1]


def test_a_checkpoint_of_another_torch_resumes(job: str) -> None:
    Path(job).write_text(tomli_w.dumps(job_tree("data", optim={"name": "adamw", "lr": 1e-3})))
    for name in ("whole", "small"):
        assert main(["train", job, "--name", name, "--max-updates", "12"]) == 75
    for path in checkpoint_paths(Path("runs/small/checkpoints")):
        checkpoint = Checkpoint.from_bytes(path.read_bytes())
        for group in checkpoint.optimizer["param_groups"]:
            del group["decoupled_weight_decay"]  # torch 2.6 had no such key
            group["of_a_later_torch"] = None
        path.write_bytes(bytes_of(checkpoint))
    for name in ("whole", "small"):
        assert main(["train", job, "--name", name, "--resume", "auto"]) == 0
    whole, resumed = (final_weights(Path("runs", name)) for name in ("whole", "small"))
    assert compare_weights(whole, resumed) == "bit-identical"
