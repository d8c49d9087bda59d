"""Kinds of modules: trained as in torch, or refused in one line before the run folder is created."""

from __future__ import annotations

import sys
import textwrap
import tomllib
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
import torch
from torch import Tensor, nn

from hvd_batchgrow.cli import main
from hvd_batchgrow.comm.ranks import SingleRank
from hvd_batchgrow.config import Job
from hvd_batchgrow.job_file import parse_job
from hvd_batchgrow.messages.errors import JobError, RunError
from hvd_batchgrow.nn.build import build_model, forward_state
from hvd_batchgrow.nn.ghost.ghost_batch_norm import GhostBatchNorm1d
from hvd_batchgrow.nn.state.extra_state import plain_fault
from hvd_batchgrow.train.checkpoints.checkpoint import Checkpoint
from hvd_batchgrow.train.events import Observer, RunStarted
from hvd_batchgrow.verification.verify import find_hazards
from tests.helpers import job_tree, small_job, small_source
from tests.training import Recorder, StopAfter, bytes_of, digest, make_trainer, train

SHAPE = (6,)


def job_of(name: str, **sections: Any) -> Job:
    """Return a job with a network of this file."""
    model = {"name": f"{__name__}:{name}", "ghost_batch": 8, **sections.pop("model", {})}
    return parse_job({**job_tree(**sections), "model": model})


def base(num_classes: int) -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, num_classes))


def ready(num_classes: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, num_classes))


# --- refused ------------------------------------------------------------------------------------


def scripted(num_classes: int) -> nn.Module:
    return torch.jit.script(ready(num_classes))


def traced_part(num_classes: int) -> nn.Module:
    return nn.Sequential(torch.jit.trace(nn.Linear(6, 6), torch.zeros(2, 6)), nn.Linear(6, num_classes))


def compiled(num_classes: int) -> nn.Module:
    return torch.compile(ready(num_classes))  # type: ignore[return-value]


def compiled_in_place(num_classes: int) -> nn.Module:
    model = ready(num_classes)
    model[0].compile()
    return model


def on_meta(num_classes: int) -> nn.Module:
    return ready(num_classes).to("meta")


def wrapped(num_classes: int) -> nn.Module:
    return nn.DataParallel(ready(num_classes))


def sparse(num_classes: int) -> nn.Module:
    model = ready(num_classes)
    model.register_buffer("mask", torch.eye(3).to_sparse())
    return model


class Looks(nn.Module):
    """Rows looked up in a table; numbers of the input are the indices."""

    def __init__(self, num_classes: int, table: nn.Module) -> None:
        super().__init__()
        self.table, self.last = table, nn.Linear(4, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        rows: Tensor = self.table((x.abs() * 3).long().clamp(max=4))
        return self.last(rows.flatten(1)[:, :4])  # type: ignore[no-any-return]


def max_norm(num_classes: int) -> nn.Module:
    return Looks(num_classes, nn.Embedding(5, 4, max_norm=1.0))


def max_norm_of_a_bag(num_classes: int) -> nn.Module:
    return Looks(num_classes, nn.EmbeddingBag(5, 4, max_norm=2.5))


def by_frequency(num_classes: int) -> nn.Module:
    return Looks(num_classes, nn.Embedding(5, 4, scale_grad_by_freq=True))


def plain_table(num_classes: int) -> nn.Module:
    return Looks(num_classes, nn.Embedding(5, 4))


class Quantized(nn.Module):
    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.layer, self.rest = torch.ao.nn.quantized.Linear(6, 6), ready(num_classes)

    def forward(self, x: Tensor) -> Tensor:
        quantized = torch.quantize_per_tensor(x, 0.1, 0, torch.quint8)
        return self.rest(self.layer(quantized).dequantize())  # type: ignore[no-any-return]


class LazyBeside(nn.Module):
    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.rest, self.spare = ready(num_classes), nn.LazyLinear(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(x)  # type: ignore[no-any-return]


class Noted(nn.Module):
    """A network with any value as extra state."""

    def __init__(self, num_classes: int, note: Any = None) -> None:
        super().__init__()
        self.rest = base(num_classes)
        self.note = note or {"calls": 3, "seen": [1, 2.5, None, ("x", True)], 7: torch.arange(3)}

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(x)  # type: ignore[no-any-return]

    def get_extra_state(self) -> Any:
        return self.note

    def set_extra_state(self, state: Any) -> None:
        self.note = state


def noted_set(num_classes: int) -> nn.Module:
    return Noted(num_classes, {"a": [{1, 2}]})


class Unsettable(Noted):
    set_extra_state = nn.Module.set_extra_state


class Initializing(nn.Module):
    """A network whose first forward sets a parameter from its input."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.rest, self.shift = ready(num_classes), nn.Parameter(torch.zeros(6))
        self.register_buffer("is_set", torch.tensor(False))

    def forward(self, x: Tensor) -> Tensor:
        if not self.is_set:
            self.shift.data.copy_(x.mean(0))
            self.is_set.fill_(True)  # type: ignore[operator]
        return self.rest(x - self.shift)  # type: ignore[no-any-return]


class BackwardFails(nn.Module):
    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.rest = ready(num_classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.rest(x)
        exponential = logits.exp()
        exponential.add_(1)  # autograd needs the previous value
        return exponential


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # TorchScript and quantization
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("scripted", r"the network is a TorchScript module, .*return the nn\.Module from before torch\.jit\.script"),
        ("traced_part", r"0 is a TorchScript module"),
        ("compiled", r"the network is compiled already; return it without torch\.compile, and set layout\.compile"),
        ("compiled_in_place", r"0 is compiled already"),
        ("on_meta", r"0\.weight, 0\.bias, 1\.weight and 6 more: on the meta device, without values"),
        ("wrapped", r"the network is wrapped in DataParallel; return the module inside"),
        ("sparse", r"mask: quantized or sparse; parameters and buffers must be dense"),
        (
            "max_norm",
            r"table has max_norm = 1\.0: its forward pass shortens the rows of its weight, which only the opti",
        ),
        ("max_norm_of_a_bag", r"table has max_norm = 2\.5: .*; build it without max_norm, and divide each row"),
        (
            "by_frequency",
            r"table has scale_grad_by_freq = True: the gradient of a token is divided by how often it occu",
        ),
        (
            "Quantized",
            r"layer\._packed_params\.dtype in its state_dict is a dtype, not a tensor; quantize modules after",
        ),
        ("LazyBeside", r"no forward reaches the lazy spare\.weight, spare\.bias; give them their sizes"),
        ("noted_set", r"_extra_state\['a'\]\[0\] is of class set; a checkpoint holds tensors and plain values"),
        ("Unsettable", r"its state_dict cannot be saved and loaded again: RuntimeError: .*_extra_state"),
        ("Initializing", r"a pass changes the parameters shift, which only the optimizer may change"),
        ("BackwardFails", r"fails in two trial passes, forward and backward, .*modified by an inplace operation"),
    ],
)
def test_what_cannot_be_trained_is_refused_in_one_line(name: str, message: str) -> None:
    torch.manual_seed(3)
    job = job_of(name)
    with pytest.raises(JobError, match=message) as caught:
        forward_state(job, build_model(job, SHAPE, 3), SHAPE)
    (fault,) = caught.value.faults
    assert fault.path == "model.name"
    assert "\n" not in fault.message


def test_a_forward_with_max_norm_changes_the_weight_and_dividing_its_rows_gives_the_same_outputs() -> None:
    """This is why it is refused, and the remedy in the message. The rows have the lengths 3 and 0.5."""
    table, ids = nn.Embedding(2, 4, max_norm=1.0), torch.tensor([0, 1, 0])
    weight = torch.tensor([[3.0, 0, 0, 0], [0, 0.5, 0, 0]])
    table.weight.data.copy_(weight)
    out = table(ids)
    assert table.weight[0, 0].item() == pytest.approx(1)
    rows = weight[ids]
    torch.testing.assert_close(out, rows / rows.norm(dim=1, keepdim=True).clamp(min=1))


def test_a_plain_table_is_trained() -> None:
    job = job_of("plain_table")
    forward_state(job, build_model(job, SHAPE, 3), SHAPE)


class Counts(nn.Module):
    """A counter in a plain attribute."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.rest, self.calls = ready(num_classes), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.rest(x)  # type: ignore[no-any-return]


def test_state_outside_the_buffers_is_refused_in_exact_mode() -> None:
    job = job_of("Counts", layout={"exact": True, "max_micro_batch": 8})
    with pytest.raises(JobError, match=r"layout\.exact: is not possible with .*Counts: .* not buffers \(calls\)"):
        forward_state(job, build_model(job, SHAPE, 3), SHAPE)
    fast = job_of("Counts")
    assert forward_state(fast, build_model(fast, SHAPE, 3), SHAPE).attributes == ("calls",)


# --- trained ------------------------------------------------------------------------------------


def lazy_norm(num_classes: int) -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.LazyLinear(5), nn.LazyBatchNorm1d(), nn.Dropout(0.1), nn.ReLU(), nn.LazyLinear(num_classes)
    )


def test_lazy_modules_are_those_of_the_sizes_that_they_find() -> None:
    torch.manual_seed(3)
    model = build_model(job_of("lazy_norm"), SHAPE, 3)
    assert isinstance(model[2], GhostBatchNorm1d)  # type: ignore[index]
    assert model.training
    torch.manual_seed(3)
    expected = [nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)]  # initialized in the order of the forward
    for layer, found in zip(expected, (model[1], model[2], model[5]), strict=True):  # type: ignore[index]
        for name, value in found.state_dict().items():
            assert torch.equal(value, layer.state_dict()[name])


class LazyInTraining(nn.Module):
    """A lazy layer that only a forward in training uses."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.rest, self.more = ready(num_classes), nn.LazyLinear(num_classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.rest(x)
        return logits + self.more(x) if self.training else logits


def test_a_forward_in_training_initializes_what_evaluation_does_not_reach() -> None:
    model = build_model(job_of("LazyInTraining"), SHAPE, 3)
    assert model.more.weight.shape == (3, 6)  # type: ignore[union-attr]
    assert not model.rest[1].running_mean.any()  # type: ignore[index, union-attr]


class Lists(nn.Module):
    """Parameters in a list and a dict."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.layers = nn.ParameterList(nn.Parameter(torch.randn(64, 64) / 8) for _ in range(2))
        self.last = nn.ParameterDict({"weight": nn.Parameter(torch.randn(64, num_classes))})

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        for weight in self.layers:
            x = (x @ weight).tanh()
        return x @ self.last["weight"]  # type: ignore[no-any-return]


def normed(num_classes: int) -> nn.Module:
    weight_norm = nn.utils.parametrizations.weight_norm
    return nn.Sequential(nn.Flatten(), weight_norm(nn.Linear(64, 6)), nn.ReLU(), weight_norm(nn.Linear(6, num_classes)))


@pytest.mark.parametrize("name", ["base", "lazy_norm", "Lists", "normed", "Noted"])
def test_they_are_trained_and_resumed_to_the_bit(name: str, tmp_path: Path) -> None:
    job = job_of(name, layout={"exact": True, "max_micro_batch": 8})
    whole, _ = train(job, SingleRank(), tmp_path / "whole")
    first, _ = train(job, SingleRank(), tmp_path / "parts", stop=StopAfter(3, here=True))
    (path,) = (tmp_path / "parts" / "checkpoints").glob("*.pt")
    again, _ = train(job, SingleRank(), tmp_path / "again", checkpoint=Checkpoint.from_bytes(path.read_bytes()))
    assert first.state.samples < again.state.samples == whole.state.samples
    assert digest(again) == digest(whole)


def test_extra_state_comes_back_as_it_was(tmp_path: Path) -> None:
    job = job_of("Noted")
    trainer = make_trainer(job, SingleRank(), tmp_path)
    trainer.parts.model.note = {"calls": 4, "more": OrderedDict(a=(1, b"x")), 7: torch.arange(4)}  # type: ignore[assignment]
    checkpoint = Checkpoint.from_bytes(bytes_of(trainer.state.capture()))
    other = make_trainer(job, SingleRank(), tmp_path)
    other.state.load(checkpoint)
    note: Any = other.parts.model.note
    assert (note["calls"], note["more"], note[7].tolist()) == (4, {"a": (1, b"x")}, [0, 1, 2, 3])


@pytest.mark.parametrize(
    ("value", "fault"),
    [
        ({"a": [1, 2.5, "x", b"x", None, True, (torch.ones(2),)], 3: OrderedDict()}, None),
        ({"a": [0, np.float64(1)]}, r"x['a'][1] is of class numpy.float64"),
        ({(1, 2): 3}, "x is of class dict"),
        (torch.eye(2).to_sparse(), "x is of class torch.Tensor"),
    ],
)
def test_other_than_plain_values_are_named(value: Any, fault: str | None) -> None:
    assert plain_fault(value, "x") == fault


def test_a_checkpoint_has_plain_values_under_the_names_of_extra_state_only(tmp_path: Path) -> None:
    trainer = make_trainer(small_job(), SingleRank(), tmp_path)
    for name, value in (("weight", 3), ("a._extra_state", {1, 2})):
        checkpoint = trainer.state.capture()
        checkpoint.model[name] = value
        with pytest.raises(RunError, match=rf"not a checkpoint of this version: model\.{name}: is of class"):
            Checkpoint.from_bytes(bytes_of(checkpoint))


# --- no folder is left ---------------------------------------------------------------------------

NETS = """
    import torch
    from torch import nn

    class Net(nn.Module):
        def __init__(self, num_classes):
            super().__init__()
            self.layer, self.calls = nn.Linear(64, num_classes), 0

        def forward(self, x):
            if len(x) > 7:
                raise RuntimeError("too many samples")
            return self.layer(x.flatten(1))
"""


@pytest.fixture
def failing(job: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the arguments of a run whose network passes the trial and fails in its first update."""
    Path("nets_that_fail.py").write_text(textwrap.dedent(NETS))
    monkeypatch.setattr(sys, "path", [*sys.path])
    tree = tomllib.loads(Path(job).read_text())
    Path(job).write_text(tomli_w.dumps(tree | {"model": {"name": "nets_that_fail:Net", "ghost_batch": 8}}))
    return ["train", job]


class Fails(Observer):
    def on_start(self, event: RunStarted) -> None:
        raise RuntimeError("no display")


def test_a_start_that_fails_leaves_no_run_folder(failing: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SingleRank, "abort", lambda self, code: None)
    with pytest.raises(RuntimeError, match="too many samples"):
        main(failing)
    assert not Path("runs/small").exists()
    monkeypatch.setattr("hvd_batchgrow.cli.train.run_observers", lambda *_: [Recorder(), Fails()])
    with pytest.raises(RuntimeError, match="no display"):
        main(failing)
    assert not Path("runs/small").exists()


def test_a_start_that_fails_leaves_what_was_there(failing: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SingleRank, "abort", lambda self, code: None)
    Path("runs/small/slurm").mkdir(parents=True)
    Path("runs/small/slurm/ledger.json").write_text("{}")
    with pytest.raises(RuntimeError, match="too many samples"):
        main(failing)
    assert [path.name for path in Path("runs/small").iterdir()] == ["slurm"]
    assert Path("runs/small/slurm/ledger.json").exists()


def test_a_resume_that_fails_leaves_the_run(job: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["train", job, "--max-updates", "2"]) == 75
    before = sorted(path.name for path in Path("runs/small").iterdir())
    monkeypatch.setattr(SingleRank, "abort", lambda self, code: None)
    monkeypatch.setattr("hvd_batchgrow.cli.train.run_observers", lambda *_: [Fails()])
    with pytest.raises(RuntimeError, match="no display"):
        main(["train", job, "--resume", "auto"])
    assert sorted(path.name for path in Path("runs/small").iterdir()) == before


def spectral(num_classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.utils.parametrizations.spectral_norm(nn.Linear(64, num_classes)))


def test_train_and_verify_name_the_buffers_that_training_changes(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    tree = tomllib.loads(Path(job).read_text()) | {"model": {"name": f"{__name__}:spectral", "ghost_batch": 8}}
    Path(job).write_text(tomli_w.dumps(tree))
    assert main(["train", job, "--max-updates", "1"]) == 75
    line = f"{__name__}:spectral changes buffers in training (1.parametrizations.weight.0._u, "
    assert line in " ".join(capsys.readouterr().err.split())
    (note,) = find_hazards(parse_job(tree), small_source())[1]
    assert note.startswith(line)
