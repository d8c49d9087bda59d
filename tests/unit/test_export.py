"""`hvd-batchgrow export`: files that compute the run's logits where this package cannot be imported."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hvd_batchgrow.cli import main
from hvd_batchgrow.data.tensor_tree import tensors_in
from hvd_batchgrow.deployment.export import _metrics
from hvd_batchgrow.deployment.plain_network import to_plain
from hvd_batchgrow.deployment.trained_network import load_network
from hvd_batchgrow.nn.dropout import KeyedDropout
from hvd_batchgrow.nn.ghost.convert import fuse_relu
from hvd_batchgrow.nn.ghost.ghost_batch_norm import GhostBatchNorm, GhostBatchNorm1d, GhostBatchNorm2d
from hvd_batchgrow.torchvision_shim import import_torchvision
from tests.trained_runs import RUN

pytestmark = pytest.mark.slow

PROGRAMS = {
    "torchscript": "torch.jit.load('net')",
    "exported_program": "torch.export.load('net').module()",
}
NET = """
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.1))
        self.head = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, num_classes))

    def forward(self, x):
        return self.head(self.body(x).mean((2, 3)))
"""
TWO_OUTPUTS = """
import mynet
from hvd_batchgrow.library import Classification

class Tuple(mynet.Net):
    def forward(self, x):
        features = self.body(x).mean((2, 3))
        return self.head(features), [features]

class Dict(Tuple):
    def forward(self, x):
        logits, (features,) = super().forward(x)
        return {"out": logits, "aux": features}

class Task(Classification):
    answer = "class"

    def __call__(self, outputs, targets, *, training):
        logits = outputs["out"] if isinstance(outputs, dict) else outputs[0]
        return super().__call__(logits, targets, training=training)
"""
SAMPLES = torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(3))


def computed(expression: str) -> Tensor:
    """The logits of a model in a process that cannot import this package."""
    torch.save(SAMPLES, "samples.pt")
    code = (
        "import sys; sys.modules['hvd_batchgrow'] = None; import torch; "
        f"model = {expression}; logits = model(torch.load('samples.pt')); torch.save(logits.detach(), 'logits.pt')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    found: Tensor = torch.load("logits.pt")
    return found


@pytest.fixture
def net(photos: list[Path], monkeypatch: pytest.MonkeyPatch) -> str:
    """A run on photos with the user's own network, which replaces that of `photos`."""
    Path("mynet.py").write_text(NET)
    text = Path("small.toml").read_text().replace("small_conv_net", "mynet:Net")
    Path("small.toml").write_text(text.replace("channels = [\n    4,\n    8,\n]\n", ""))
    monkeypatch.syspath_prepend(Path.cwd())  # before the folders of other tests
    monkeypatch.delitem(sys.modules, "mynet", raising=False)
    assert main(["train", "small.toml", "--overwrite", "--update.ema-samples", "40"]) == 0
    return "mynet"


@pytest.mark.parametrize("to", PROGRAMS)
def test_a_program_computes_the_logits_of_the_run(to: str, photos: list[Path]) -> None:
    expected = load_network(RUN, device="cpu").outputs(SAMPLES)
    assert main(["export", str(RUN), "--to", to, "--output", "net"]) == 0
    torch.testing.assert_close(computed(PROGRAMS[to]), expected, rtol=1e-5, atol=1e-6)


@pytest.fixture
def residual(photos: list[Path]) -> list[Path]:
    """A run of a ResNet with ShakeDrop and a Hadamard classifier, which replaces that of `photos`."""
    text = Path("small.toml").read_text().replace("small_conv_net", "resnet8")
    keys = 'shakedrop = 0.6\nclassifier = "hadamard"\n'
    Path("small.toml").write_text(text.replace("channels = [\n    4,\n    8,\n]\n", keys))
    assert main(["train", "small.toml", "--overwrite"]) == 0
    return photos


@pytest.mark.parametrize("to", PROGRAMS)
def test_a_program_contains_the_fixed_matrix_and_the_factors_of_shakedrop(to: str, residual: list[Path]) -> None:
    expected = load_network(RUN, device="cpu").outputs(SAMPLES)
    assert main(["export", str(RUN), "--to", to, "--output", "net"]) == 0
    torch.testing.assert_close(computed(PROGRAMS[to]), expected, rtol=1e-5, atol=1e-6)


def test_predict_and_evaluate_rebuild_the_fixed_matrix(
    residual: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    line = json.loads((RUN / "metrics.jsonl").read_text().splitlines()[-1])
    capsys.readouterr()
    assert main(["evaluate", str(RUN), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [found["loss"], found["top1"]] == [line["loss"], line["top1"]]
    assert main(["predict", str(RUN), *map(str, residual[:2])]) == 0
    assert main(["export", str(RUN), "--to", "state_dict", "--output", "net"]) == 0
    assert [name for name in torch.load("net") if name.startswith("classifier")] == [
        "classifier.bias",
        "classifier.scale",
    ]


COUNTING = """
import torch
from torch import nn

class Net(nn.Sequential):
    def __init__(self, num_classes):
        super().__init__(nn.Flatten(), nn.LazyLinear(num_classes))
        self.register_buffer("calls", torch.tensor(0))

    def forward(self, x):
        self.calls += 1
        return super().forward(x)
"""


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.jit
@pytest.mark.parametrize("to", ["state_dict", "torchscript", "exported_program"])
def test_an_export_has_the_buffers_of_the_checkpoint(
    to: str, photos: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The defect: export runs the network, and wrote a buffer that each forward pass changes as it was afterwards."""
    Path("countnet.py").write_text(COUNTING)
    text = Path("small.toml").read_text().replace("small_conv_net", "countnet:Net")
    Path("small.toml").write_text(text.replace("channels = [\n    4,\n    8,\n]\n", ""))
    monkeypatch.syspath_prepend(Path.cwd())
    monkeypatch.delitem(sys.modules, "countnet", raising=False)
    assert main(["train", "small.toml", "--overwrite"]) == 0
    assert main(["export", str(RUN), "--to", to, "--output", "net"]) == 0
    state = {
        "state_dict": lambda: torch.load("net"),
        "torchscript": lambda: torch.jit.load("net").state_dict(),
        "exported_program": lambda: torch.export.load("net").state_dict,
    }[to]()
    saved = torch.load(max(RUN.glob("checkpoints/*.pt")), weights_only=True)["model"]
    assert state["calls"] == saved["calls"] > 0


@pytest.mark.parametrize("to", ["state_dict", "safetensors"])
def test_the_weights_fit_the_network_of_the_user(to: str, net: str) -> None:
    if to == "safetensors":
        pytest.importorskip("safetensors")
    expected = load_network(RUN, device="cpu").outputs(SAMPLES)
    assert main(["export", str(RUN), "--to", to, "--output", "net"]) == 0
    load = {"state_dict": "torch.load('net')", "safetensors": "__import__('safetensors.torch').torch.load_file('net')"}
    fill = f"(lambda net: (net.load_state_dict({load[to]}), net.eval())[1])(__import__('mynet').Net(3))"
    torch.testing.assert_close(computed(fill), expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(computed("__import__('mynet').Net(3).eval()"), expected, atol=1e-3)


@pytest.mark.slow
def test_a_network_of_torchvision_loads_its_weights(photos: list[Path]) -> None:
    import_torchvision()
    models = pytest.importorskip("torchvision.models")
    text = Path("small.toml").read_text().replace("small_conv_net", "torchvision.models:resnet18")
    Path("small.toml").write_text(text.replace("channels = [\n    4,\n    8,\n]\n", ""))
    assert main(["train", "small.toml", "--overwrite", "--max-updates", "2"]) == 75
    assert main(["export", str(RUN), "--to", "state_dict", "--output", "net.pt"]) == 0
    net = models.resnet18(num_classes=3)
    net.load_state_dict(torch.load("net.pt"))
    net.eval()
    with torch.no_grad():
        torch.testing.assert_close(net(SAMPLES), load_network(RUN, device="cpu").outputs(SAMPLES), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*torch.jit.load.*deprecated:DeprecationWarning")
def test_the_average_is_exported_with_its_metrics(net: str) -> None:
    last = load_network(RUN, device="cpu").outputs(SAMPLES)
    expected = load_network(RUN, device="cpu", average=True).outputs(SAMPLES)
    assert main(["export", str(RUN), "--to", "torchscript", "--output", "net", "--average"]) == 0
    found = computed(PROGRAMS["torchscript"])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(found, last, atol=1e-5)
    card = json.loads(Path("net.json").read_text())
    line = json.loads((RUN / "metrics.jsonl").read_text().splitlines()[-1])
    assert card["weights"] == "average"
    assert card["metrics"] == {"test_loss": line["average_loss"], "test_top1": line["average_top1"]}
    state = torch.load(max(RUN.glob("checkpoints/*.pt")), weights_only=True)
    program = torch.jit.load("net").state_dict()
    for name in ("head.2.bias", "head.1.running_mean", "head.1.running_var"):
        assert torch.equal(program[name], state["average"][name])
        assert not torch.equal(program[name], state["model"][name])


def test_a_card_describes_the_file(photos: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["export", str(RUN), "--to", "state_dict", "--output", "net"]) == 0
    assert capsys.readouterr().out == "net\nnet.json\n"
    card: dict[str, Any] = json.loads(Path("net.json").read_text())
    description = json.loads((RUN / "model.json").read_text())
    keys = ("classes", "inputs", "normalization", "preprocessing", "table", "job", "versions")
    assert {key: card[key] for key in keys} == {key: description[key] for key in keys}
    assert main(["digest", str(RUN)]) == 0
    assert card["weights_sha256"] == capsys.readouterr().out.strip()
    assert card["file_sha256"] == hashlib.sha256(Path("net").read_bytes()).hexdigest()
    line = json.loads((RUN / "metrics.jsonl").read_text().splitlines()[-1])
    assert [card["samples"], card["metrics"]] == [96, {"test_loss": line["loss"], "test_top1": line["top1"]}]
    assert [card["format"], card["weights"]] == ["state_dict", "last"]


def test_a_card_says_of_which_set_its_metrics_are(photos: list[Path]) -> None:
    options = ["--data.validation-fraction", "0.25", "--checkpoint.keep-best", "val/loss"]
    assert main(["train", "small.toml", "--overwrite", *options]) == 0
    (best,) = RUN.glob("checkpoints/best-*.pt")
    found = []
    for output, checkpoint in {"best": best, "last": max(RUN.glob("checkpoints/samples-*.pt"))}.items():
        words = ["export", str(RUN), "--to", "state_dict", "--output", output, "--checkpoint", str(checkpoint)]
        assert main(words) == 0
        found.append(json.loads(Path(f"{output}.json").read_text()))
    lines = [json.loads(line) for line in (RUN / "metrics.jsonl").read_text().splitlines()]
    for card in found:
        evaluated = [line for line in lines if line["kind"] == "eval" and line["samples"] == card["samples"]]
        expected = {f"{line['dataset']}_{name}": line[name] for line in evaluated for name in ("loss", "top1")}
        assert card["metrics"] == expected
    assert {name.partition("_")[0] for name in found[1]["metrics"]} == {"validation", "test"}


@pytest.mark.parametrize(
    ("evaluated", "is_average", "expected"),
    [
        (96, False, {"test_loss": 0.5, "test_top1": 0.8}),
        (96, True, {"test_loss": 0.4, "test_top1": 0.9}),
        (80, False, {}),  # other weights were restored after the evaluation at 96
    ],
)
def test_a_card_has_the_metrics_of_its_weights_alone(
    tmp_path: Path, evaluated: int, is_average: bool, expected: dict[str, float]
) -> None:
    later = {"kind": "eval", "samples": 112, "loss": 0.7, "top1": 0.6, "average_loss": 0.6, "average_top1": 0.7}
    here = {"kind": "eval", "samples": 96, "loss": 0.5, "top1": 0.8, "average_loss": 0.4, "average_top1": 0.9}
    lines = [here, later, {"kind": "train", "samples": 96, "loss": 0.3}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    checkpoint = SimpleNamespace(samples=96, evaluation={"samples": evaluated, "loss": 0.5})
    network: Any = SimpleNamespace(checkpoint=checkpoint, is_average=is_average, run=tmp_path)
    notes: list[str] = []
    assert _metrics(network, notes) == expected
    assert notes == []


def test_damaged_lines_are_skipped_with_a_note(tmp_path: Path) -> None:
    """The defect: one line that a full disk had cut ended every later `export` of the run with an error."""
    path = tmp_path / "metrics.jsonl"
    lines = ['{"kind": "eval", "sam', '{"kind": "eval", "samples": 96, "dataset": "test", "loss": 0.5, "top1": 0.8}']
    path.write_text("".join(f"{line}\n" for line in lines))
    checkpoint = SimpleNamespace(samples=96, evaluation={"samples": 96, "loss": 0.5})
    network: Any = SimpleNamespace(checkpoint=checkpoint, is_average=False, run=tmp_path)
    notes: list[str] = []
    assert _metrics(network, notes) == {"test_loss": 0.5, "test_top1": 0.8}
    assert notes == [f"{path} is damaged: line 1 is not JSON and was skipped, so metrics may be missing from the card"]


def test_a_card_has_no_metrics_of_another_run(tmp_path: Path) -> None:
    """The defect: --checkpoint with that of another seed got the results of the run at the same sample."""
    line = {"kind": "eval", "samples": 96, "dataset": "test", "loss": 0.5, "top1": 0.8}
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps(line) + "\n")
    checkpoint = SimpleNamespace(samples=96, evaluation={"samples": 96, "loss": 0.52})
    notes: list[str] = []
    network: Any = SimpleNamespace(checkpoint=checkpoint, is_average=False, run=tmp_path)
    assert _metrics(network, notes) == {}
    assert notes == [f"{path} has the results of another checkpoint at sample 96: the card has no metrics"]


@pytest.mark.skipif(importlib.util.find_spec("onnx") is not None, reason="onnx is installed")
def test_a_missing_package_is_named(photos: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(RUN), "--to", "onnx", "--output", "net"]) == 1
    error = capsys.readouterr().err
    assert "onnx is needed for this format and cannot be imported" in error
    assert "pip install onnx onnxscript" in error
    assert not Path("net").exists()


@pytest.mark.skipif(not importlib.util.find_spec("onnxscript"), reason="onnxscript is not installed")
@pytest.mark.filterwarnings("ignore")
def test_an_onnx_file_computes_the_logits_of_the_run(photos: list[Path]) -> None:
    reference = pytest.importorskip("onnx.reference")
    expected = load_network(RUN, device="cpu").outputs(SAMPLES)
    assert main(["export", str(RUN), "--to", "onnx", "--output", "net"]) == 0
    (found,) = reference.ReferenceEvaluator("net").run(None, {"inputs": SAMPLES.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-5)


def test_a_network_whose_forward_depends_on_the_number_of_samples_is_refused(
    net: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = NET.replace("return self.head", "return (2 if len(x) > 2 else 1) * self.head")
    Path("mynet.py").write_text(text)
    monkeypatch.delitem(sys.modules, "mynet")
    assert main(["export", str(RUN), "--to", "torchscript", "--output", "net"]) == 1
    assert "the exported program (torchscript) computes outputs that differ by" in capsys.readouterr().err
    assert not Path("net").exists()


@pytest.mark.filterwarnings("ignore:.*torch.jit.load.*deprecated:DeprecationWarning")
def test_networks_of_several_outputs_are_exported(
    photos: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("mynet.py").write_text(NET)
    Path("two.py").write_text(TWO_OUTPUTS)
    monkeypatch.syspath_prepend(Path.cwd())
    for module in ("mynet", "two"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    text = Path("small.toml").read_text().replace("channels = [\n    4,\n    8,\n]\n", "")
    has_onnx = importlib.util.find_spec("onnxscript") is not None
    for name in ("Tuple", "Dict"):
        task = '[task]\nname = "two:Task"\n'
        Path("small.toml").write_text(text.replace("small_conv_net", f"two:{name}") + task)
        assert main(["train", "small.toml", "--overwrite"]) == 0
        expected = load_network(RUN, device="cpu").outputs(SAMPLES)
        for to in ("state_dict", *PROGRAMS, *(["onnx"] if has_onnx else [])):
            assert main(["export", str(RUN), "--to", to, "--output", to]) == 0, capsys.readouterr().err
        assert "head.2.weight" in torch.load("state_dict")
        programs = [torch.jit.load("torchscript"), torch.export.load("exported_program").module()]
        outputs = [list(tensors_in(program(SAMPLES))) for program in programs]
        if has_onnx:
            names = {"Tuple": ["output_0", "output_1_0"], "Dict": ["output_out", "output_aux"]}
            evaluator = importlib.import_module("onnx.reference").ReferenceEvaluator("onnx")
            outputs.append([torch.from_numpy(x) for x in evaluator.run(names[name], {"inputs": SAMPLES.numpy()})])
        for found in outputs:
            torch.testing.assert_close(found, list(tensors_in(expected)), rtol=1e-4, atol=1e-5)
        assert main(["predict", str(RUN), str(photos[0])]) == 1
        fault = "predict needs a network that returns one tensor, and this one returns"
        assert fault in capsys.readouterr().err


def test_norms_and_dropout_become_those_of_torch() -> None:
    shared = GhostBatchNorm2d(4, 2)
    model = nn.Sequential(
        *(shared, GhostBatchNorm2d(4, 2, affine=False), nn.ReLU(), KeyedDropout(0.2, "channel"), shared),
        *(GhostBatchNorm2d(4, 2, relu=True), nn.Flatten(), GhostBatchNorm1d(16, 2, eps=1e-3, momentum=0.0)),
        *(nn.ReLU(), GhostBatchNorm(16, 2)),
    )
    fuse_relu(model)
    samples = torch.randn(6, 4, 2, 2)
    model(samples)
    model.eval()
    expected, names = model(samples), {*model.state_dict()}
    pointers = {name: value.data_ptr() for name, value in model.state_dict().items()}
    plain = to_plain(model)
    assert isinstance(plain, nn.Sequential)
    torch.testing.assert_close(plain(samples), expected, rtol=0, atol=0)
    kinds = [type(module) for module in plain]
    assert [kind.__name__ for kind in kinds[:5]] == ["BatchNorm2d", "BatchNorm2d", "ReLU", "Dropout2d", "BatchNorm2d"]
    assert kinds[7:9] == [nn.BatchNorm1d, nn.ReLU]
    assert plain[0] is plain[4]
    assert isinstance(plain[9], nn.BatchNorm2d)
    assert not any(isinstance(module, (GhostBatchNorm, KeyedDropout)) for module in plain.modules())
    state = plain.state_dict()
    assert {*state} - names == {f"{k}.num_batches_tracked" for k in (0, 1, 4, 5, 7, 9)}
    assert {name: state[name].data_ptr() for name in names} == pointers
