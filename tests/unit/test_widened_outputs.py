"""Losses are computed in float32 or better, whatever a network returns."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from hvd_batchgrow.config.task_specs import Direction
from hvd_batchgrow.tasks.task import Losses
from hvd_batchgrow.train.update.forward import MicroBatch, forward_of, widened

LOGITS = torch.randn(64, 10, generator=torch.Generator().manual_seed(0)).bfloat16()
CLASSES = torch.arange(64) % 10


class Pair(NamedTuple):
    logits: Tensor
    name: str


@dataclass(frozen=True)
class Record:
    logits: Tensor
    name: str = "x"


@dataclass(frozen=True, slots=True)
class Slots:
    logits: Tensor


class Attributes(dict[str, Any]):
    """A dict whose values are attributes too."""

    __getattr__ = dict.__getitem__


@dataclass
class Output(OrderedDict[str, Any]):
    """Like the outputs of transformers: its items are those of its fields that are set, and setting one sets both."""

    logits: Tensor
    hidden: Tensor | None = None

    def __post_init__(self) -> None:
        super().__setitem__("logits", self.logits)

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        super().__setattr__(key, value)


FORMS: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]] = {
    "tensor": (lambda logits: logits, lambda outputs: outputs),
    "dict": (lambda logits: {"logits": logits, "loss": None}, lambda outputs: outputs["logits"]),
    "nested": (lambda logits: {"all": [(logits, 3)]}, lambda outputs: outputs["all"][0][0]),
    "tuple": (lambda logits: (logits, "x"), lambda outputs: outputs[0]),
    "named tuple": (lambda logits: Pair(logits, "x"), lambda outputs: outputs.logits),
    "max": (lambda logits: logits[:, None].max(1), lambda outputs: outputs.values),
    "ordered dict": (lambda logits: OrderedDict(logits=logits), lambda outputs: outputs["logits"]),
    "attributes": (lambda logits: Attributes(logits=logits), lambda outputs: outputs.logits),
    "dataclass": (Record, lambda outputs: outputs.logits),
    "slots": (Slots, lambda outputs: outputs.logits),
    "items": (Output, lambda outputs: outputs["logits"]),
    "fields": (Output, lambda outputs: outputs.logits),
}


class Returning(nn.Module):
    """Returns its inputs in bfloat16, in some form."""

    def __init__(self, form: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.form, self.weight = form, nn.Parameter(torch.zeros(1))

    def forward(self, logits: Tensor) -> Any:
        return self.form((logits + self.weight).bfloat16())


@pytest.mark.parametrize("form", FORMS)
def test_losses_of_16_bit_outputs_have_the_digits_of_float32(form: str) -> None:
    made, logits_of = FORMS[form]
    seen: list[Any] = []

    class Task:
        metrics: dict[str, Direction] = {}  # noqa: RUF012

        def __call__(self, outputs: Any, targets: Tensor, *, training: bool) -> Losses:
            seen.append(outputs)
            return Losses(nn.functional.cross_entropy(logits_of(outputs), targets, reduction="none"))

    network = Returning(made)
    each = forward_of(Task(), "float32")(network, MicroBatch(LOGITS.float(), CLASSES, (0,))).each
    log_p = LOGITS.double() - LOGITS.double().exp().sum(1, keepdim=True).log()
    expected = -log_p[torch.arange(64), CLASSES]
    torch.testing.assert_close(each.double(), expected, rtol=1e-6, atol=1e-6)
    assert type(seen[0]) is type(made(LOGITS))
    each.sum().backward()
    assert network.weight.grad is not None


def test_everything_else_stays_as_it_is() -> None:
    wide, ids = torch.zeros(2, dtype=torch.float64), torch.arange(2)
    for outputs in (wide, ids, {"a": wide, "b": [ids, None, 1.5]}, Record(wide), object(), Record, "text"):
        assert widened(outputs) is outputs
    record = Record(torch.zeros(2, dtype=torch.float16), name="y")
    assert widened(record).name == "y"
    assert widened(record).logits.dtype == torch.float32
    assert record.logits.dtype == torch.float16
    output = Output(torch.zeros(2, dtype=torch.float16))
    assert list(widened(output)) == ["logits"]
    assert widened(output).hidden is None
    assert output["logits"].dtype == torch.float16
