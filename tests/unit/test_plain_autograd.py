"""The plain reference of `verify`: equal to the update engine on every kind of job, and different where a fault is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hvd_batchgrow.comm.ranks import SingleRank
from hvd_batchgrow.config import Job
from hvd_batchgrow.job_file import parse_job
from hvd_batchgrow.train.precise_bn import reestimate
from hvd_batchgrow.train.trainer import Trainer
from hvd_batchgrow.train.update.rounding_noise import NUM_REPEATS
from hvd_batchgrow.verification.autograd_reference import PlainRun
from hvd_batchgrow.verification.rounding_limits import Deviation, RoundingLimits, States
from tests.helpers import job_tree, small_source
from tests.training import make_trainer

CPU = torch.device("cpu")


def job_of(**sections: Any) -> Job:
    """Return a job of two ghost batches of 8 per update, one per micro-batch; custom networks have no width."""
    tree = job_tree(**{"layout": {"max_micro_batch": 8}} | sections)
    tree["model"] = {"ghost_batch": 8, **sections["model"]} if "name" in sections.get("model", {}) else tree["model"]
    return parse_job(tree)


def plain(job: Job, num_updates: int = 2, noise_seed: int | None = None) -> States:
    return PlainRun(job, small_source(), CPU, noise_seed).train(num_updates)


def limits_of(job: Job, num_updates: int = 2) -> RoundingLimits:
    repeats = [plain(job, num_updates, seed) for seed in range(1, NUM_REPEATS + 1)]
    return RoundingLimits(plain(job, num_updates), repeats)


def trained(job: Job, folder: Path, num_updates: int = 2, fault: Callable[[Trainer], None] | None = None) -> States:
    """Return the same states by the trainer, optionally with a planted fault."""
    trainer = make_trainer(job, SingleRank(), folder)
    if fault:
        fault(trainer)
    batches, states = trainer.parts.ghost_batches(0, trainer.ranks), {}
    for index in range(num_updates):
        schedule = trainer.plan.schedule
        phase, layout = (
            schedule.at(trainer.state.samples),
            trainer.plan.layouts[schedule.index_at(trainer.state.samples)],
        )
        trainer.update(batches, phase, layout.micro_batch)
        if trainer.state.samples == phase.end_samples:
            reestimate(trainer.parts, trainer.state.samples, layout.micro_batch, trainer.ranks)
        if index in (0, num_updates - 1):
            states[trainer.state.samples] = copied(trainer)
    return states


def copied(trainer: Trainer) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in trainer.parts.model.state_dict().items()}


HERE = "tests.unit.test_plain_autograd"
KINDS: dict[str, Mapping[str, Any]] = {
    "SGD": {},
    "Nesterov, clipped and smoothed": {
        "optim": {"nesterov": True},
        "task": {"label_smoothing": 0.1},
        "update": {"clip_norm": 0.3},
    },
    "AdamW": {"optim": {"name": "adamw", "lr": 1e-3}},
    "LARS": {"optim": {"name": "lars", "lr": 0.5}},
    "dropout": {"model": {"name": "wrn_10_1", "dropout": 0.3}},
    "ShakeDrop and a Hadamard classifier": {
        "model": {"name": "wrn_10_1", "shakedrop": 0.5, "classifier": "hadamard"},
    },
    "bfloat16": {"update": {"precision": "bfloat16"}},
    "several ghost batches a micro-batch": {"layout": {"max_micro_batch": 16}},
    "exact": {"layout": {"exact": True}},
    "channels last": {"data": {"channels_last": True}},
    "a larger batch and new statistics after one update": {
        "schedule": {"boundaries_epochs": [16 / 300, 1.0], "epochs": 2.0},
        "model": {"precise_bn_samples": 16},
    },
    "a slice of a larger tensor": {"model": {"name": f"{HERE}:sliced", "kwargs": {"dense": False}}},
    "a layer used twice": {"model": {"name": f"{HERE}:used_twice", "kwargs": {"checkpointed": True}}},
    "a layer that no loss reaches": {"model": {"name": f"{HERE}:with_spare"}},
    "warm-up": {"schedule": {"warmup_epochs": 0.5}},
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_trainer_agrees_with_plain_autograd(tmp_path: Path, kind: str) -> None:
    job = job_of(**KINDS[kind])
    worst = limits_of(job).worst(trained(job, tmp_path))
    assert worst.passed, worst


def before_each_step(change: Callable[[nn.Module], None]) -> Callable[[Trainer], None]:
    """A fault that changes gradients after they are complete, and before the optimizer uses them."""

    def plant(trainer: Trainer) -> None:
        trainer.parts.optimizer.register_step_pre_hook(lambda *_: change(trainer.parts.model))

    return plant


def overlap(model: nn.Module) -> None:
    """Two entries of one gradient share one place in memory."""
    gradient = model.get_parameter("classifier.weight").grad
    assert gradient is not None
    gradient[0, 1] = gradient[0, 0]


def lose_a_ghost_batch(trainer: Trainer) -> None:
    """The gradient of one bias is complete one ghost batch too early."""
    calls: list[int] = []

    def hook(gradient: Tensor) -> Tensor:
        calls.append(1)
        return gradient * (len(calls) % 2)

    trainer.parts.model.get_parameter("classifier.bias").register_hook(hook)


@pytest.mark.parametrize(
    ("fault", "tensor"),
    [
        (before_each_step(overlap), "classifier.weight"),
        (lose_a_ghost_batch, "classifier.bias"),
    ],
)
def test_a_planted_fault_is_found_and_its_tensor_named(
    tmp_path: Path, fault: Callable[[Trainer], None], tensor: str
) -> None:
    job = job_of()
    worst = limits_of(job, 1).worst(trained(job, tmp_path, 1, fault))
    assert not worst.passed
    assert worst.tensor == tensor


def test_a_wrong_running_statistic_is_found() -> None:
    job = job_of()
    (samples, state), *_ = plain(job, 1).items()
    wrong = {**state, "features.1.running_mean": state["features.1.running_mean"] * 1.001}
    worst = limits_of(job, 1).worst({samples: wrong})
    assert (worst.passed, worst.tensor) == (False, "features.1.running_mean")
    assert worst.difference == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize(("in_limits", "passed"), [(0.6, True), (1.6, False)])
def test_a_gradient_that_is_wrong_by_a_little_more_than_the_limit_is_found(
    tmp_path: Path, in_limits: float, passed: bool
) -> None:
    """One SGD step is w - lr (g + decay w): a gradient (1 + s) g moves w by lr s |g| too far."""
    job, name = job_of(), "classifier.weight"
    limits = limits_of(job, 1)

    def with_fault(folder: str, size: Callable[[Tensor], float]) -> Deviation:
        def change(model: nn.Module) -> None:
            gradient = model.get_parameter(name).grad
            assert gradient is not None
            gradient.mul_(1 + size(gradient))

        return limits.worst(trained(job, tmp_path / folder, 1, before_each_step(change)))

    clear = with_fault("clear", lambda gradient: 1.0)
    assert (clear.passed, clear.tensor) == (False, name)
    norm = float(plain(job, 1)[16][name].norm())
    wanted = in_limits * clear.limit * norm
    worst = with_fault("near", lambda gradient: wanted / (job.optim.lr * float(gradient.norm())))
    assert worst.passed is passed
    if not passed:
        assert worst.tensor == name
        assert worst.difference == pytest.approx(wanted / norm, rel=0.1)


def network(hidden: nn.Module, num_classes: int) -> nn.Module:
    torch.manual_seed(1)
    layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), hidden, nn.Linear(8, num_classes))
    for parameter in layers.parameters():
        nn.init.normal_(parameter, std=0.2)
    return layers


class Square(nn.Module):
    """One layer used twice; each use may lie in a reentrant checkpoint, where gradient hooks fire once a use."""

    def __init__(self, *, checkpointed: bool) -> None:
        super().__init__()
        self.layer, self.checkpointed = nn.Linear(8, 8), checkpointed

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = (
                checkpoint(self.layer, x, use_reentrant=True)
                if self.checkpointed and x.requires_grad
                else self.layer(x)
            )
        return x


def used_twice(num_classes: int, checkpointed: bool) -> nn.Module:
    return network(Square(checkpointed=checkpointed), num_classes)


def sliced(num_classes: int, dense: bool) -> nn.Module:
    """A weight that is a slice of a larger tensor, as pruning leaves it, or its dense copy."""
    made = network(nn.Linear(8, 8), num_classes)
    larger = torch.randn(8, 12, generator=torch.Generator().manual_seed(1))
    weight = larger[:, :8]
    made[2].weight = nn.Parameter(weight.clone(memory_format=torch.contiguous_format) if dense else weight)  # type: ignore[index]
    return made


@pytest.mark.parametrize(("name", "argument"), [("used_twice", "checkpointed"), ("sliced", "dense")])
def test_plain_autograd_is_bit_identical_for_two_forms_of_one_network(name: str, argument: str) -> None:
    """Plain autograd depends neither on hooks that fire more than once nor on strides."""
    forms = [plain(job_of(model={"name": f"{HERE}:{name}", "kwargs": {argument: value}})) for value in (True, False)]
    for samples, state in forms[0].items():
        assert all(torch.equal(value, forms[1][samples][key]) for key, value in state.items())


class Spare(nn.Module):
    """A layer that no loss reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        return x


def with_spare(num_classes: int) -> nn.Module:
    return network(Spare(), num_classes)


def test_weight_decay_of_a_weight_that_no_loss_reaches_is_found(tmp_path: Path) -> None:
    """torch's optimizers skip a parameter without a gradient, but decay one with a zero gradient by lr · decay."""
    job = job_of(model={"name": f"{HERE}:with_spare"})
    limits, states = limits_of(job, 1), plain(job, 1)
    spare = with_spare(3).get_parameter("2.spare.weight")
    assert all(torch.equal(state["2.spare.weight"], spare) for state in states.values())

    def give_zeros(model: nn.Module) -> None:
        model.get_parameter("2.spare.weight").grad = torch.zeros(5, 5)

    worst = limits.worst(trained(job, tmp_path, 1, before_each_step(give_zeros)))
    assert (worst.passed, worst.tensor) == (False, "2.spare.weight")
    assert worst.difference == pytest.approx(0.05 * 1e-3, rel=1e-2)
