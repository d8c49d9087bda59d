"""Mistakes of a custom task are found before the first update."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hvd_batchgrow.config.task_specs import Direction
from hvd_batchgrow.data.datasets.dataset import ArrayDataset, Datasets
from hvd_batchgrow.data.datasets.example import source_form
from hvd_batchgrow.messages.errors import JobError
from hvd_batchgrow.nn.build import input_form
from hvd_batchgrow.tasks.task import Losses, Task
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


class Noisy(Cubed):
    """Gaussian noise on the logits."""

    def __call__(self, outputs: Tensor, targets: Tensor, *, training: bool) -> Losses:
        return super().__call__(outputs + 0.5 * torch.randn_like(outputs), targets, training=training)


class Running(Cubed):
    """Losses relative to their running mean."""

    def __init__(self) -> None:
        self.mean = 50.0

    def changed(self, each: Tensor) -> Tensor:
        self.mean = 0.9999 * self.mean + 0.0001 * float(each.detach().mean())
        return each / self.mean


class SeldomDrawn(Cubed):
    """A draw that changes a loss less than once in the life of a run."""

    def changed(self, each: Tensor) -> Tensor:
        return each * (1 if float(torch.rand(())) < 1 - 2**-50 else 2)


class Detached(Cubed):
    def changed(self, each: Tensor) -> Tensor:
        return each.detach()


class Averaged(Cubed):
    def changed(self, each: Tensor) -> Tensor:
        return each.mean()


class WithoutMode(Cubed):
    def __call__(self, outputs: Tensor, targets: Tensor) -> Losses:  # type: ignore[override]
        return super().__call__(outputs, targets, training=True)


class Returning(nn.Module):
    """Returns its logits as part of something else."""

    def __init__(self, logits: nn.Module, form: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.logits, self.form = logits, form

    def forward(self, rows: Tensor) -> Any:
        return self.form(self.logits(rows))


class OfPart:
    """A task for the logits in something else."""

    metrics = Cubed.metrics

    def __init__(self, task: Cubed, logits_of: Callable[[Any], Tensor]) -> None:
        self.task, self.logits_of = task, logits_of

    def __call__(self, outputs: Any, targets: Tensor, *, training: bool) -> Losses:
        return self.task(self.logits_of(outputs), targets, training=training)


class Attributes(dict[str, Tensor]):
    """A dict whose values are attributes too, as in transformers."""

    __getattr__ = dict.__getitem__


TREES: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]] = {
    "tuple": (lambda logits: (logits, logits[:, :1]), lambda outputs: outputs[0]),
    "dict": (lambda logits: {"out": logits, "aux": [logits]}, lambda outputs: outputs["out"]),
    "ordered dict": (lambda logits: OrderedDict(out=logits), lambda outputs: outputs["out"]),
}
OTHERS: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]] = {
    "a mean too": (lambda logits: (logits, logits.mean()), lambda outputs: outputs[0]),
    "attributes": (lambda logits: Attributes(out=logits), lambda outputs: outputs.out),
}


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.LazyLinear(3))


def trial(task: Cubed, **sections: Any) -> list[str]:
    hazards, notes = try_it(task, type(task).__name__, network(), **sections)
    assert not notes
    return hazards


def try_it(
    task: Task, name: str, model: nn.Module, source: Datasets | None = None, **sections: Any
) -> tuple[list[str], list[str]]:
    job = small_job(task={"name": f"{HERE}:{name}"}, **sections)
    source = source or small_source()
    form = input_form(job, source_form(source, None))
    model(torch.zeros(2, *form))  # type: ignore[misc]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = try_task(job, task, model, form, source)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    return found


def test_a_task_that_treats_samples_alone_has_no_hazard() -> None:
    assert trial(Cubed()) == []


@pytest.mark.parametrize(
    ("kind", "fault"),
    [
        (Noisy, "gives the same samples another loss in a second call: it draws random numbers or keeps state"),
        (Running, "gives the same samples another loss in a second call: it draws random numbers or keeps state"),
        (SeldomDrawn, "draws random numbers that are not keyed by sample"),
    ],
)
def test_random_losses_and_state_are_named(kind: type[Cubed], fault: str) -> None:
    """The defect: they passed as losses that cannot be compared, also in exact mode."""
    name = f"{HERE}:{kind.__name__}"
    assert trial(kind()) == [f"the task {name} {fault}"]
    for section, key, value in (("layout", "exact", True), ("checks", "replay_every", 10)):
        with pytest.raises(JobError, match=rf"{section}.{key}: is not possible with the task {name}: it {fault}"):
            trial(kind(), **{section: {key: value}})


def test_losses_that_depend_on_other_samples_are_named() -> None:
    name = f"{HERE}:Coupled"
    assert trial(Coupled()) == [f"the task {name} gives a sample another loss if its micro-batch has other samples"]
    with pytest.raises(JobError, match=rf"layout.exact: is not possible with the task {name}"):
        trial(Coupled(), layout={"exact": True})


class Balanced(Cubed):
    """The mean recall of the classes of each call, with the count of its samples; and the right samples."""

    metrics: dict[str, Direction] = {"balanced": "up", "right": "up", "mean": "up"}  # noqa: RUF012

    def __call__(self, outputs: Tensor, targets: Tensor, *, training: bool) -> Losses:
        right = (outputs.argmax(1) == targets).float()
        recall = torch.stack([right[targets == c].mean() for c in targets.unique()]).mean()
        count = len(targets)
        metrics = {"balanced": (recall * count, count), "right": (right.sum(), count), "mean": (right.mean(), 1)}
        return Losses(nn.functional.cross_entropy(outputs, targets, reduction="none"), metrics=metrics)


def try_class_0(classes: list[int]) -> tuple[list[str], list[str]]:
    """Try a network that predicts class 0, on samples of these classes."""
    train = ArrayDataset(np.zeros((len(classes), 8, 8, 1), np.uint8), np.array(classes))
    linear = nn.Linear(64, 3)
    linear.weight.data.zero_()
    linear.bias.data.copy_(torch.tensor([1.0, 0.0, 0.0]))
    network = nn.Sequential(nn.Flatten(), linear)
    return try_it(Balanced(), "Balanced", network, replace(small_source(), train=train))


def test_metrics_that_are_means_of_each_call_are_named() -> None:
    """Only the sample of class 0 is right: the recalls are 1 and 0 together, and 1 and 0, then 0, in pairs."""
    hazards, notes = try_class_0([0, 1, 1, 1])
    start = f"of the task {HERE}:Balanced depends on ranks and micro-batches: for 4 samples it has the sum"
    end = "in total; return a sum and a count that add up over samples"
    # 0.5 · 4 samples, and (0.5 + 0) · 2; the mean of 4 and of each pair, each with the count 1
    assert notes == [
        f"the metric balanced {start} 2 and the count 4, and for two pairs of them 1 and 4 {end}",
        f"the metric mean {start} 0.25 and the count 1, and for two pairs of them 0.5 and 2 {end}",
    ]
    assert not hazards
    # The first four samples are all wrong, and a sum of 0 is right in any case; the targets of others show it.
    _, notes = try_class_0([1, 2, 1, 2, *[0, 1] * 14])
    assert [note.split(" of the task ")[0] for note in notes] == ["the metric balanced", "the metric mean"]


@pytest.mark.parametrize("form", TREES)
def test_losses_of_several_outputs_are_checked_too(form: str) -> None:
    made, logits_of = TREES[form]
    for task, found in ((Cubed(), False), (Coupled(), True)):
        hazards, notes = try_it(OfPart(task, logits_of), "Task", Returning(network(), made))
        assert bool(hazards) == found
        assert not notes
    with pytest.raises(JobError, match=rf"layout.exact: is not possible with the task {HERE}:Task"):
        try_it(OfPart(Coupled(), logits_of), "Task", Returning(network(), made), layout={"exact": True})


@pytest.mark.parametrize("form", OTHERS)
def test_outputs_that_cannot_be_divided_by_sample_are_noted(form: str) -> None:
    made, logits_of = OTHERS[form]
    for exact in (False, True):
        found = try_it(OfPart(Coupled(), logits_of), "Task", Returning(network(), made), layout={"exact": exact})
        task = f"the task {HERE}:Task"
        why = "the outputs of small_conv_net cannot be divided by sample"
        assert found == ([], [f"it was not checked whether {task} mixes the samples of a micro-batch: {why}"])


def test_a_task_that_fails_is_shown_the_forms_of_outputs_and_targets() -> None:
    forms = r"a sample has the outputs \[float32 \(3,\), float32 \(1,\)\] and the targets int64 \(\)"
    with pytest.raises(JobError, match=f"'tuple' object has no attribute 'gather'.*; {forms}$"):
        try_it(Cubed(), "Cubed", Returning(network(), TREES["tuple"][0]))


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
