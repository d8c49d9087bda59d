"""Initial weights from a file."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hvd_batchgrow.cli import main
from hvd_batchgrow.messages.errors import JobError
from hvd_batchgrow.nn.build import build_model
from hvd_batchgrow.nn.ghost.convert import convert_ghost_batch_norm
from hvd_batchgrow.nn.load_weights import load_weights
from hvd_batchgrow.nn.weights_file import read_weights
from hvd_batchgrow.train.checkpoints.checkpoint import Checkpoint, checkpoint_paths
from tests.helpers import NUM_CLASSES, SIDE, small_job

State = dict[str, Any]


class Net(nn.Module):
    """A user's network, with torch's norms."""

    def __init__(self, num_classes: int, width: int = 4) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3), nn.BatchNorm2d(width))
        self.head = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stem(x).mean((2, 3)))  # type: ignore[no-any-return]


def trained(num_classes: int = 3) -> State:
    """The state_dict of the network with torch's norms after some training."""
    torch.manual_seed(1)
    net = Net(num_classes)
    net(torch.randn(5, 1, 6, 6))
    for parameter in net.parameters():
        parameter.data.normal_()
    return net.state_dict()


def fresh(num_classes: int = 3) -> nn.Module:
    torch.manual_seed(2)
    return convert_ghost_batch_norm(Net(num_classes), 4)


def load(model: nn.Module, path: Path, num_classes: int = 3, *, allow: bool = False) -> list[str]:
    return load_weights(model, read_weights(str(path)), num_classes, allow_new_head=allow)


def save(tree: Any, path: Path) -> Path:
    torch.save(tree, path)
    return path


def prefixed(prefix: str, state: State) -> State:
    return {prefix + name: value for name, value in state.items()}


FORMS: dict[str, tuple[Callable[[State], Any], str]] = {
    "plain": (dict, ""),
    "state_dict": (lambda state: {"epoch": 3, "state_dict": state}, ", from its entry state_dict"),
    "model": (lambda state: {"model": state, "optimizer": {"lr": 1}}, ", from its entry model"),
    "nested": (lambda state: {"model": {"state_dict": state}}, ", from its entry model.state_dict"),
    "DistributedDataParallel": (lambda state: prefixed("module.", state), ", without the prefix module."),
    "torch.compile": (lambda state: prefixed("_orig_mod.", state), ", without the prefix _orig_mod."),
    "both": (lambda state: prefixed("module._orig_mod.", state), ", without the prefix module._orig_mod."),
    "Lightning": (
        lambda state: {"state_dict": prefixed("model.", state)},
        ", from its entry state_dict, without the prefix model.",
    ),
    "a compiled part": (lambda state: {name.replace("stem.", "stem._orig_mod."): v for name, v in state.items()}, ""),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_file_of_the_users_network_gives_the_network_with_ghost_norms_its_weights(form: str, tmp_path: Path) -> None:
    make, note = FORMS[form]
    state = trained()
    path = save(make(state), tmp_path / "weights.pth")
    model = fresh()
    # the parameters, running means and variances; ghost norms count no batches
    assert load(model, path) == [f"initial weights: {len(state) - 1} tensors of {path}{note}"]
    reference = Net(3)
    reference.load_state_dict(state)
    x = torch.randn(4, 1, 6, 6)
    torch.testing.assert_close(model.eval()(x), reference.eval()(x), rtol=0, atol=0)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_a_network_whose_own_names_begin_with_a_prefix_keeps_them(tmp_path: Path) -> None:
    model, state = nn.Sequential(), prefixed("module.", trained())
    model.add_module("module", fresh())
    for form in (state, prefixed("module.", state), {"state_dict": prefixed("_orig_mod.", state)}):
        load(model, save(form, tmp_path / "weights.pth"))
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


class Wrapped(nn.Module):
    """A network whose larger part is called model."""

    def __init__(self) -> None:
        super().__init__()
        self.model, self.head = Net(4).stem, nn.Linear(4, 3)


def test_a_part_called_model_keeps_its_name(tmp_path: Path) -> None:
    state = {name: torch.randn_like(value.float()) for name, value in Wrapped().state_dict().items()}
    part = {name: value for name, value in state.items() if name.startswith("model.")}
    model = convert_ghost_batch_norm(Wrapped(), 4)
    load(model, save(part, tmp_path / "part.pth"), allow=True)
    loaded = {name for name, value in model.state_dict().items() if torch.equal(value, state[name])}
    assert loaded == part.keys() - {"model.1.num_batches_tracked"}


def test_a_norm_with_two_names_counts_no_batches_under_either(tmp_path: Path) -> None:
    net = Wrapped()
    net.norm = net.model[1]
    path = save(net.state_dict(), tmp_path / "weights.pth")
    assert {name for name in net.state_dict() if "num_batches" in name} == {
        "model.1.num_batches_tracked",
        "norm.num_batches_tracked",
    }
    load(convert_ghost_batch_norm(net, 4), path)


def test_safetensors_are_read_and_the_package_is_named_if_it_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch_format = pytest.importorskip("safetensors.torch")
    state, path = trained(), tmp_path / "weights.safetensors"
    torch_format.save_file(state, path)
    model = fresh()
    load(model, path)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(JobError, match=r"needs the package safetensors: pip install safetensors"):
        read_weights(str(path))


def test_types_are_converted_and_reported(tmp_path: Path) -> None:
    state = {name: value.half() if value.is_floating_point() else value for name, value in trained().items()}
    model = fresh()
    notes = load(model, save(state, tmp_path / "half.pth"))
    assert notes[1:] == ["initial weights are converted from float16 to float32"]
    assert all(torch.equal(value, state[name].float()) for name, value in model.state_dict().items())


def faults(model: nn.Module, path: Path, **options: Any) -> list[str]:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(JobError) as caught:
        load(model, path, **options)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    return [str(fault).removeprefix(f"model.pretrained: {path}: ") for fault in caught.value.faults]


def test_everything_that_does_not_fit_is_in_one_error(tmp_path: Path) -> None:
    state = trained()
    state["steam.0.weight"] = state.pop("stem.0.weight")
    state["stem.0.bias"] = torch.zeros(5)
    state["stem.1.bias"] = torch.zeros(4, dtype=torch.int64)
    del state["head.bias"]
    state["n_averaged"] = torch.tensor(3)
    assert faults(fresh(), save(state, tmp_path / "weights.pth")) == [
        "stem.0.weight (4, 1, 3, 3) is missing; nearest: steam.0.weight",
        "head.bias (3,) is missing",
        "steam.0.weight (4, 1, 3, 3) is not in the network; nearest: stem.0.weight",
        "n_averaged () of int64 is not in the network",
        "stem.0.bias is (5,), must be (4,)",
        "stem.1.bias is (4,) of int64, must be (4,)",
    ]


def test_a_new_classifier_must_be_allowed_and_keeps_its_initial_weights(tmp_path: Path) -> None:
    state = trained(num_classes=7)
    path = save(state, tmp_path / "seven.pth")
    about = "the classifier (head.weight, head.bias) has 7 classes in the file, 3 in the data"
    assert faults(fresh(), path) == [
        "head.weight is (7, 4), must be (3, 4)",
        "head.bias is (7,), must be (3,)",
        f"{about}; model.allow_new_head = true keeps its initial weights",
    ]
    model, initial = fresh(), fresh().state_dict()
    assert load(model, path, allow=True)[1] == f"{about}: it keeps its initial weights"
    for name, value in model.state_dict().items():
        assert torch.equal(value, (initial if name.startswith("head") else state)[name])


def test_a_file_without_a_classifier_is_one_with_a_new_classifier(tmp_path: Path) -> None:
    state = {name: value for name, value in trained().items() if not name.startswith("head")}
    path = save(state, tmp_path / "headless.pth")
    assert "the classifier (head.weight, head.bias) is not in the file; model.allow" in faults(fresh(), path)[-1]
    model, initial = fresh(), fresh().state_dict()
    load(model, path, allow=True)
    assert torch.equal(model.get_parameter("head.weight"), initial["head.weight"])
    assert torch.equal(model.get_parameter("stem.0.weight"), state["stem.0.weight"])


def test_nothing_but_a_classifier_may_differ(tmp_path: Path) -> None:
    torch.manual_seed(1)
    wide = save(Net(7, width=5).state_dict(), tmp_path / "wide.pth")
    found = faults(fresh(), wide, allow=True)
    assert "stem.0.weight is (5, 1, 3, 3), must be (4, 1, 3, 3)" in found
    assert "head.weight is (7, 5), must be (3, 4)" in found
    model = fresh()
    assert load(model, save(trained(), tmp_path / "same.pth"), allow=True) == [
        f"initial weights: {len(trained()) - 1} tensors of {tmp_path / 'same.pth'}"
    ]
    assert torch.equal(model.get_parameter("head.weight"), trained()["head.weight"])


def test_one_name_of_tied_parameters_is_enough_and_two_must_agree(tmp_path: Path) -> None:
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    model = nn.Sequential(first, second)
    state = {name: torch.randn_like(value) for name, value in model.state_dict().items()}
    assert "0.weight and 1.weight are one parameter of the network, but differ in the file" in faults(
        model, save(state, tmp_path / "differ.pth")
    )
    del state["0.weight"]
    load(model, save(state, tmp_path / "one.pth"))
    assert torch.equal(first.weight, state["1.weight"])


class Code:
    """An object that a pickle would make by running code."""

    def __reduce__(self) -> Any:
        return (Path.touch, (Path("run-by-a-pickle"),))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read: No such file or directory; did you mean"),
        (b"no weights", "cannot be read as weights"),
        (b"", "cannot be read as weights"),
        ({"state_dict": Code()}, "cannot be read as weights: it does not hold only tensors and plain values"),
        ([1, 2], "is not a state_dict: it is a list"),
        ({}, "is not a state_dict: it is empty"),
        ({"state_dict": {"a": 3}}, "entry state_dict, is not a state_dict: a is a int"),
        ({1: torch.zeros(1)}, "is not a state_dict: it has the key 1, which is not text"),
    ],
)
def test_a_file_that_does_not_hold_weights_is_refused_and_runs_no_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: Any, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "weights.pth"
    (tmp_path / "weight.pth").touch()
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        save(content, path)
    with pytest.raises(JobError) as caught:
        read_weights(str(path))
    assert message in str(caught.value)
    assert not Path("run-by-a-pickle").exists()


def test_a_damaged_safetensors_file_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    (tmp_path / "weights.safetensors").write_bytes(b"\0" * 5)
    with pytest.raises(JobError, match="is damaged, or not a safetensors file"):
        read_weights(str(tmp_path / "weights.safetensors"))


# --- whole runs ------------------------------------------------------------------------------------


def initial_weights(seed: int, num_classes: int = NUM_CLASSES) -> State:
    torch.manual_seed(seed)
    return build_model(small_job(), (SIDE, SIDE, 1), num_classes).state_dict()


def final(run: str) -> dict[str, Tensor]:
    path = checkpoint_paths(Path("runs", run, "checkpoints"))[-1]
    return Checkpoint.from_bytes(path.read_bytes()).model


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


def train(job: str, *words: str) -> int:
    return main(["train", job, *words])


def test_a_run_from_the_weights_of_the_seed_is_the_run_of_the_seed(job: str) -> None:
    save(initial_weights(7), Path("seven.pth"))
    save(initial_weights(8), Path("eight.pth"))
    assert train(job, "--max-updates", "3") == 75
    assert train(job, "--max-updates", "3", "--name", "same", "--model.pretrained", "seven.pth") == 75
    assert train(job, "--max-updates", "3", "--name", "other", "--model.pretrained", "eight.pth") == 75
    assert same(final("small"), final("same"))
    assert not same(final("small"), final("other"))


def test_a_resume_needs_no_file_and_refuses_another_one(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = save(initial_weights(8), Path("eight.pth"))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    words = ["--model.pretrained", "eight.pth"]
    assert train(job, *words, "--name", "whole") == 0
    assert train(job, *words, "--resume", "auto", "--max-updates", "3") == 75  # as a chain of jobs starts
    assert "initial weights: 12 tensors of eight.pth" in capsys.readouterr().err
    path.unlink()
    assert train(job, *words, "--resume", "auto") == 0
    assert "initial weights" not in capsys.readouterr().err
    assert same(final("small"), final("whole"))
    record = json.loads(Path("runs/small/record.json").read_text())
    assert record["pretrained"] == {"path": "eight.pth", "sha256": digest}
    assert len(record["attempts"]) == 2
    assert train(job, "--model.pretrained", "nine.pth", "--resume", "auto") == 1
    assert "model.pretrained: was 'eight.pth', is 'nine.pth'" in capsys.readouterr().err
    assert train(job, *words, "--fork", "forked", "--schedule.epochs", "2.4") == 0
    assert train(job, "--fork", "another") == 1
    assert "cannot be forked with a change of\n  model.pretrained: was" in capsys.readouterr().err


def test_a_start_without_the_file_leaves_no_folder(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], ["--resume", "auto"]):
        assert train(job, "--model.pretrained", "eight.pth", *words) == 2
        assert "model.pretrained: eight.pth cannot be read: No such file or directory" in capsys.readouterr().err
        assert not Path("runs/small").exists()
    assert train(job, "--model.allow-new-head", "true") == 2
    assert "model.allow_new_head: is not used without model.pretrained" in capsys.readouterr().err


def test_a_checkpoint_of_a_run_can_be_loaded(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(job, "--max-updates", "3") == 75
    path = checkpoint_paths(Path("runs/small/checkpoints"))[-1]
    words = ["--model.pretrained", str(path), "--optim.lr", "1e-30", "--name", "next"]
    assert train(job, *words, "--max-updates", "1") == 75
    assert f"initial weights: 12 tensors of {path}, from its entry model" in capsys.readouterr().err
    kept = {name for name, value in final("next").items() if torch.equal(value, final("small")[name])}
    assert {name for name in final("small") if "running" not in name} == kept


@pytest.mark.slow
@pytest.mark.parametrize("exact", ["true", "false"])
def test_verify_starts_every_layout_and_its_reference_from_the_file(
    job: str, capsys: pytest.CaptureFixture[str], exact: str
) -> None:
    save(initial_weights(8, num_classes=5), Path("five.pth"))
    words = ["--model.pretrained", "five.pth", "--model.allow-new-head", "true", "--layout.exact", exact]
    assert main(["verify", job, "--layouts", "1x2x8", *words]) == 0, capsys.readouterr()


def test_a_twin_starts_from_the_same_weights(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    save(initial_weights(8), Path("eight.pth"))
    words = ["--model.pretrained", "eight.pth", "--schedule.epochs", "0.4", "--schedule.boundaries-epochs", "[0.2]"]
    assert main(["twin", job, *words]) == 0
    assert capsys.readouterr().err.count("initial weights: 12 tensors of eight.pth") == 2
