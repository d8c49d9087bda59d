"""A run of a language model from its job file to its uses, and ghost batches of one sample."""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
import tomllib
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import tomli_w
import torch
from torch import nn

from hvd_batchgrow.cli import main
from hvd_batchgrow.config import Job
from hvd_batchgrow.deployment.trained_network import load_network
from hvd_batchgrow.job_file import parse_job
from hvd_batchgrow.library import plan_updates, updates
from hvd_batchgrow.messages.errors import JobError
from hvd_batchgrow.nn.build import build_model
from hvd_batchgrow.nn.ghost.ghost_batch_norm import ghost_norms
from hvd_batchgrow.schedule.plan import compile_plan
from hvd_batchgrow.schedule.transitions import describe_transitions
from tests.helpers import job_tree

HERE = "tests.unit.test_language_model_run"
EXAMPLE = Path(__file__).parents[2] / "examples/language_model"
VOCABULARY, CONTEXT, RUN = 20, 8, Path("runs/small")


def example(name: str) -> ModuleType:
    """Import a module of the example, which is in no package."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def network(num_classes: int) -> nn.Module:
    made: nn.Module = example("gpt").gpt(num_classes, CONTEXT, layers=1, heads=2, width=8)
    return made


def narrow(num_classes: int) -> nn.Module:
    """Return a network whose vocabulary lacks the last token."""
    return nn.Sequential(nn.Embedding(num_classes - 1, 4), nn.Linear(4, num_classes))


def tree(**sections: Any) -> dict[str, Any]:
    found = job_tree(**{"optim": {"name": "adamw", "weight_decay": 0.0}, "task": {"name": "language_model"}})
    found["data"] = {"source": "tokens", "root": "text", "token_dtype": "uint16", "context": CONTEXT}
    found["data"] |= {"num_classes": VOCABULARY}
    found["model"] = {"name": f"{HERE}:network", "ghost_batch": 1}
    found["schedule"] = {"policy": "seesaw", "epochs": 2.0, "boundaries_epochs": [1.0], "noise_factor": 2.0}
    found["schedule"] |= {"global_batch": 4, "max_batch": 8}
    return found | sections


@pytest.fixture
def run(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished run; the last window of its test text has 3 tokens of 8."""
    monkeypatch.chdir(tmp_path)
    Path("text").mkdir()
    for name, count in (("train", 1 + 60 * CONTEXT), ("test", 1 + 9 * CONTEXT + 3)):
        np.random.default_rng(count).integers(1, VOCABULARY, count).astype(np.uint16).tofile(f"text/{name}.bin")
    Path("small.toml").write_text(tomli_w.dumps(tree()))
    assert main(["train", "small.toml"]) == 0
    return RUN


def last_evaluation() -> dict[str, Any]:
    lines = map(json.loads, (RUN / "metrics.jsonl").read_text().splitlines())
    found: dict[str, Any] = [line for line in lines if line["kind"] == "eval"][-1]
    return found


@pytest.mark.slow
def test_evaluate_repeats_the_last_evaluation_and_reads_other_texts(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert main(["evaluate", str(run), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["bits_per_token"] == pytest.approx(last_evaluation()["bits_per_token"], rel=1e-9)
    other = np.fromfile("text/test.bin", np.uint16).astype(np.uint32)
    other.tofile("text/other.bin")
    shutil.copy("text/train.bin", "text/kept.bin")
    np.fromfile("text/train.bin", np.uint16).astype(np.uint32).tofile("text/train.bin")
    words = ["--data.test", "other.bin", "--data.token-dtype", "uint32"]
    assert main(["evaluate", str(run), "--json", *words]) == 0
    assert json.loads(capsys.readouterr().out)["bits_per_token"] == found["bits_per_token"]
    assert main(["evaluate", str(run), "--data.context", "4"]) == 2
    assert "data.context: belongs to the training of the network" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("to", ["torchscript", "exported_program", "state_dict", "safetensors"])
def test_the_exported_network_reads_tokens_and_needs_no_text(run: Path, to: str) -> None:
    shutil.rmtree("text")
    tokens = torch.randint(VOCABULARY, (5, CONTEXT), generator=torch.Generator().manual_seed(1))
    expected = load_network(run, device="cpu").outputs(tokens)
    assert expected.shape == (5, CONTEXT, VOCABULARY)
    assert main(["export", str(run), "--to", to, "--output", "net"]) == 0
    if to == "torchscript":
        warnings.simplefilter("ignore", DeprecationWarning)  # of torch.jit; pytest restores the filters
        found = torch.jit.load("net")(tokens)
    elif to == "exported_program":
        found = torch.export.load("net").module()(tokens)
    else:
        plain = network(VOCABULARY)
        load = torch.load if to == "state_dict" else pytest.importorskip("safetensors.torch").load_file
        plain.load_state_dict(load("net"))
        found = plain(tokens)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    card = json.loads(Path("net.json").read_text())
    assert card["inputs"] == {"kind": "tokens", "shape": [CONTEXT], "channels": None, "dtype": "int64"}
    assert card["task"]["target"] == "tokens"
    assert (card["num_outputs"], card["classes"]) == (VOCABULARY, [])


@pytest.mark.slow
def test_predict_says_that_it_generates_no_text(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", str(run), "text/test.bin"]) == 1
    printed = " ".join(capsys.readouterr().err.split())
    assert "predict reads photos and tables, and this network reads tokens; evaluate it with" in printed


@pytest.mark.slow
def test_a_vocabulary_that_is_too_small_fails_before_training(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "small.toml", "--name", "narrow", "--model.name", f"{HERE}:narrow"]) == 2
    printed = " ".join(capsys.readouterr().err.split())
    assert f"model.name: {HERE}:narrow(num_classes=20) fails on two samples of the data" in printed
    assert "IndexError: index out of range" in printed


# --- ghost batches of one sample ---------------------------------------------------------------


def normed(num_classes: int) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, num_classes))


def layer_normed(num_classes: int) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, num_classes))


def rows_job(group: int, **model: Any) -> Job:
    data = {"source": f"{HERE}:unused", "num_samples": 300}
    return parse_job({**job_tree(), "data": data, "model": {"name": f"{HERE}:normed", "ghost_batch": group, **model}})


def test_a_network_with_batch_norm_needs_two_samples_in_a_ghost_batch() -> None:
    message = rf"model.ghost_batch: 1: {HERE}:normed has batch norm, and one sample has no batch statistics; use >= 2"
    with pytest.raises(JobError, match=message):
        build_model(rows_job(1), (4,), 3)
    assert next(ghost_norms(build_model(rows_job(2), (4,), 3))).ghost_batch == 2
    assert not list(ghost_norms(build_model(rows_job(1, name=f"{HERE}:layer_normed"), (4,), 3)))


@pytest.mark.parametrize("name", ["dense7", "small_conv_net", "resnet20", "wrn_16_4", "vgg16_bn"])
def test_networks_of_this_package_with_batch_norm_are_refused_by_plan(name: str) -> None:
    with pytest.raises(JobError, match=rf"model.ghost_batch: 1: {name} has batch norm"):
        parse_job(job_tree(model={"name": name, "ghost_batch": 1, "channels": None}))


def test_plan_accepts_a_network_of_this_package_without_batch_norm() -> None:
    assert parse_job(job_tree(model={"name": "alexnet", "ghost_batch": 1, "channels": None})).model.ghost_batch == 1


@pytest.mark.parametrize("key", ["bn_momentum", "precise_bn_samples"])
def test_keys_of_batch_norm_are_not_ignored(key: str) -> None:
    values = {"bn_momentum": 0.2, "precise_bn_samples": 64}
    with pytest.raises(JobError, match=rf"model.{key}: has no effect with model.ghost_batch = 1"):
        rows_job(1, **{key: values[key]})


def test_a_plan_has_any_batch_and_says_nothing_of_batch_norm() -> None:
    job = parse_job(tree(schedule={**tree()["schedule"], "global_batch": 3, "max_batch": 7}))
    plan = compile_plan(job, 1, 60)
    assert [phase.global_batch for phase in plan.schedule.phases] == [3, 6]
    assert "BN memory" not in "".join(describe_transitions(plan))


def test_a_custom_loop_may_distribute_single_samples() -> None:
    schedule = {"policy": "grow", "epochs": 2, "boundaries_epochs": [1], "noise_factor": 2, "global_batch": 3}
    keys: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "num_samples": 60, "ghost_batch": 1}
    plan = plan_updates({**schedule, "max_batch": 6}, num_ranks=3, **keys)
    seen = [
        [k for u in updates(plan, 0, rank, 3) for part in u.micro_batches for k in part.ids.tolist()]
        for rank in range(3)
    ]
    assert sorted(k for ids in seen for k in ids) == sorted([*range(60)] * 2)
    assert [len(ids) for ids in seen] == [40, 40, 40]


# --- the example -------------------------------------------------------------------------------


def test_the_gpt_of_the_example_sees_no_later_token() -> None:
    torch.manual_seed(0)
    model = network(VOCABULARY).eval()
    tokens = torch.randint(VOCABULARY, (3, CONTEXT))
    later = tokens.clone()
    later[:, 5:] = (later[:, 5:] + 1) % VOCABULARY
    assert torch.equal(model(tokens)[:, :5], model(later)[:, :5])
    assert not torch.equal(model(tokens)[:, 5:], model(later)[:, 5:])


def test_the_gpt_of_the_example_depends_on_every_earlier_token_and_starts_near_a_uniform_guess() -> None:
    torch.manual_seed(0)
    model = example("gpt").gpt(256, 64)
    tokens = torch.randint(256, (8, 64))
    logits = model(tokens[:, :-1])
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    assert math.log(256) - 0.5 < loss.item() < math.log(256) + 1.5
    for k in range(63):
        changed = tokens[:1, :63].clone()
        changed[0, k] = (changed[0, k] + 1) % 256
        assert not torch.equal(model(changed)[0, -1], model(tokens[:1, :63])[0, -1])
    with pytest.raises(ValueError, match=r"width = 10 must be a multiple of heads = 4"):
        example("gpt").gpt(256, 64, width=10)


def test_the_data_of_the_example_are_the_same_each_time_and_the_test_text_is_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = example("make_data")
    folder = tmp_path / "perl" / "5.99.0"
    held_out = {name: f"test text of {name}. ".encode() * 20 for name in module.TEST}
    others = {f"A{k}.pod": bytes([97 + k]) * 90_000 for k in range(5)}
    for name, text in {**held_out, **others, f"{module.SIMILAR}x.pod": b"version" * 9}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(text)
    monkeypatch.setattr(module, "FOLDER", tmp_path / "perl")
    monkeypatch.chdir(tmp_path)
    module.main()
    train, test = (np.fromfile(f"data/{name}.bin", np.uint16).astype(np.uint8).tobytes() for name in ("train", "test"))
    job = parse_job(example_job())
    assert job.data.num_samples is not None
    assert job.data.context is not None
    assert len(train) == job.data.num_samples * job.data.context + 1
    assert train == b"".join(others[name] for name in sorted(others))[: len(train)]
    assert test == b"".join(held_out[name] for name in sorted(held_out))
    (folder / "A4.pod").unlink()
    (folder / "A3.pod").unlink()
    with pytest.raises(
        SystemExit, match=r"has 6 files \*.pod with 270,000 bytes .* 327,681 are needed: apt-get install"
    ):
        module.main()


def example_job() -> dict[str, Any]:
    return tomllib.loads((EXAMPLE / "job.toml").read_text())
