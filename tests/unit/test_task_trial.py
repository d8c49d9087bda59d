"""Mistakes of a custom task are found before the first update."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hvd_batchgrow.config.task_specs import Direction
from hvd_batchgrow.data.datasets.example import source_form
from hvd_batchgrow.messages.errors import JobError
from hvd_batchgrow.nn.build import input_form
from hvd_batchgrow.tasks.task import Losses
from hvd_batchgrow.train.task_trial import try_task
from tests.helpers import small_job, small_source

HERE = __name__


class Cubed:
    """A task without a fault."""

    metrics: dict[str, Direction] = {"largest": "down"}  # noqa: RUF012

    def __call__(self, outputs: Tensor, targets: Tensor, *, training: bool) -> Losses:
        each = (outputs.gather(1, targets[:, None])[:, 0] - 1).abs() ** 3
        return Losses(self.changed(each), metrics={"largest": (each.sum(), len(each))})

    def changed(self, each: Tensor) -> Tensor:
        return each


class Coupled(Cubed):
    def changed(self, each: Tensor) -> Tensor:
        return each / each.mean().detach()


class Drawn(Cubed):
    def changed(self, each: Tensor) -> Tensor:
        return each * torch.rand(len(each))


class Detached(Cubed):
    def changed(self, each: Tensor) -> Tensor:
        return each.detach()


class Averaged(Cubed):
    def changed(self, each: Tensor) -> Tensor:
        return each.mean()


class WithoutMode(Cubed):
    def __call__(self, outputs: Tensor, targets: Tensor) -> Losses:  # type: ignore[override]
        return super().__call__(outputs, targets, training=True)


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.LazyLinear(3))


def trial(task: Cubed, **sections: Any) -> list[str]:
    job = small_job(task={"name": f"{HERE}:{type(task).__name__}"}, **sections)
    source = small_source()
    model = network()
    form = input_form(job, source_form(source, None))
    model(torch.zeros(2, *form))  # type: ignore[misc]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = try_task(job, task, model, form, source)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    return found


@pytest.mark.parametrize("task", [Cubed(), Drawn()])
def test_a_task_that_treats_samples_alone_has_no_hazard(task: Cubed) -> None:
    assert trial(task) == []


def test_losses_that_depend_on_other_samples_are_named() -> None:
    name = f"{HERE}:Coupled"
    assert trial(Coupled()) == [f"the task {name} gives a sample another loss if its micro-batch has other samples"]
    with pytest.raises(JobError, match=rf"layout.exact: is not possible with the task {name}"):
        trial(Coupled(), layout={"exact": True})


def test_a_compiled_network_is_not_compiled_for_the_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[nn.Module] = []
    made = network

    def compiled_network() -> nn.Module:
        found = made()

        def call(rows: Tensor) -> Any:
            compiled.append(found)
            return found.forward(rows)

        monkeypatch.setattr(found, "_compiled_call_impl", call)
        return found

    monkeypatch.setattr(f"{HERE}.network", compiled_network)
    assert trial(Cubed()) == []
    assert len(compiled) == 1  # the call in `trial`, which makes the lazy layer


@pytest.mark.parametrize(
    ("task", "fault"),
    [
        (Detached(), "have no gradient"),
        (Averaged(), r"each of shape \(\) for 4 samples"),
        (WithoutMode(), r"called as task\(outputs, targets, training=…\).*unexpected keyword argument 'training'"),
    ],
)
def test_a_fault_is_an_error_that_names_the_task(task: Cubed, fault: str) -> None:
    with pytest.raises(JobError, match=f"task.name: .*{fault}"):
        trial(task)
