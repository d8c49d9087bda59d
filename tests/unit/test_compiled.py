"""A compiled network computes the same as before, and training without torch.compile does not import it."""

from __future__ import annotations

import copy
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
import torch
from torch import nn

from hvd_batchgrow.comm.ranks import SingleRank
from hvd_batchgrow.nn.build import build_model
from hvd_batchgrow.nn.ghost.ghost_batch_norm import GhostBatchNorm1d
from hvd_batchgrow.nn.ghost.ghost_operators import keep_statistics, number_of
from hvd_batchgrow.nn.keyed_random import keyed_modules, sample_keys, set_sample_keys
from hvd_batchgrow.nn.networks import dense7
from hvd_batchgrow.schedule.phases import Phase
from hvd_batchgrow.train.update.engine import UpdateEngine
from hvd_batchgrow.train.update.forward import MicroBatch
from tests.helpers import job_tree, small_job

needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler: install g++")


def make(channels: tuple[int, ...]) -> nn.Module:
    return dense7.build(6, 3, channels=channels, ghost_batch=16, bn_momentum=0.1, dropout=0.3)


@pytest.mark.slow
@needs_compiler
@pytest.mark.filterwarnings("ignore")  # warnings of the compiler
def test_ghost_norms_and_dropout_work_as_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch.manual_seed(0)
    plain, compiled = (make(channels=(8, 8)) for _ in range(2))
    compiled.load_state_dict(plain.state_dict())
    compiled.compile()
    rows = torch.randn(32, 6)
    for model in (plain, compiled):
        set_sample_keys(keyed_modules(model), sample_keys(1, np.zeros(32, dtype=np.int64), np.arange(32)))
        model(rows).square().sum().backward()
    assert list(compiled.state_dict()) == list(plain.state_dict())
    for ours, theirs in zip(compiled.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(compiled.state_dict()[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # warnings of the compiler
@pytest.mark.parametrize(
    ("name", "shape", "keys"),
    [
        ("wrn_16_4", (32, 32, 3), {"dropout": 0.3, "shakedrop": 0.5, "classifier": "hadamard"}),
        ("torchvision.models:resnet50", (64, 64, 3), {}),
    ],
)
def test_a_network_becomes_one_graph(name: str, shape: tuple[int, int, int], keys: dict[str, Any]) -> None:
    model = build_model(small_job(model={"name": name, "channels": None, "ghost_batch": 4, **keys}), shape, 10)
    found = torch._dynamo.explain(model.train())(torch.randn(8, 3, *shape[:2]))
    assert (found.graph_count, found.graph_break_count) == (1, 0), found.break_reasons


@pytest.mark.slow
@needs_compiler
@pytest.mark.filterwarnings("ignore")  # warnings of the compiler
def test_growth_of_the_batch_compiles_nothing_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    model = dense7.build(6, 3, channels=(8,), ghost_batch=4, bn_momentum=0.1, dropout=0.3)
    model.compile()
    engine = UpdateEngine(model, torch.optim.SGD(model.parameters(), lr=0.1), SingleRank())
    for num_micro_batches in (1, 1, 2, 8):
        with torch.compiler.set_stance("fail_on_recompile") if num_micro_batches > 1 else nullcontext():
            keys = sample_keys(1, np.zeros(8, dtype=np.int64), np.arange(8))
            passes = [
                MicroBatch(torch.randn(8, 6), torch.arange(8) % 3, (2 * k, 2 * k + 1), keys=keys)
                for k in range(num_micro_batches)
            ]
            phase = Phase(0.0, 0.1, 0.9, 8 * num_micro_batches, 8.0 * num_micro_batches, start_samples=0, num_updates=1)
            engine.update(iter(passes), num_micro_batches, phase, 2 * num_micro_batches)


@pytest.mark.slow
@needs_compiler
@pytest.mark.filterwarnings("ignore")  # warnings of the compiler
def test_a_network_stays_compiled_when_the_size_of_the_micro_batch_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    model = dense7.build(6, 3, channels=(8,), ghost_batch=4, bn_momentum=0.1, dropout=0.0)
    plain = copy.deepcopy(model)
    model.compile(fullgraph=True)  # a part that cannot be compiled is an error, not computed without the compiler
    for size in (8, 16, 12, 8):
        rows = torch.randn(size, 6)
        torch.testing.assert_close(model(rows), plain(rows), rtol=1e-4, atol=1e-5)
        model.eval(), plain.eval()
        torch.testing.assert_close(model(rows[:5]), plain(rows[:5]), rtol=1e-4, atol=1e-5)
        model.train(), plain.train()
    with pytest.raises(ValueError, match="the micro-batch must be a multiple of 4"):
        plain(torch.randn(6, 6))


def test_a_norm_keeps_a_copy_of_its_statistics() -> None:
    """A compiler may use the memory again: it cannot know that the norm still reads it."""
    norm = GhostBatchNorm1d(3, 4)
    norm.deferred = True
    statistics = torch.ones(2, 2, 3)
    keep_statistics(statistics, torch.zeros(()), number_of(norm))
    statistics.zero_()
    assert torch.equal(norm.take_statistics(), torch.ones(2, 2, 3))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler warns of itself
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])  # noqa: S301  # just made
def test_a_copy_is_a_separate_network(copied: Callable[[nn.Module], nn.Module]) -> None:
    model = make(channels=(8,))
    model.compile()
    before = copy.deepcopy(model.state_dict())
    other = copied(model)
    set_sample_keys(keyed_modules(other), sample_keys(1, np.zeros(32, dtype=np.int64), np.arange(32)))
    other(torch.randn(32, 6))
    changed = {name for name, value in other.state_dict().items() if not torch.equal(value, before[name])}
    assert {name.rpartition(".")[2] for name in changed} == {"running_mean", "running_var"}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


TRAIN = """
import sys
from hvd_batchgrow.cli.commands import run

for name in ("sgd", "adam", "adamw", "lars"):
    assert run(["train", f"{name}.toml", "--max-updates", "2"]) == 75
assert run(["train", "sgd.toml", "--resume", "auto"]) == 0
sys.exit("torch._dynamo" in sys.modules)
"""


@pytest.mark.slow
@pytest.mark.usefixtures("job")
def test_training_does_not_import_the_compiler(tmp_path: Path) -> None:
    for name in ("sgd", "adam", "adamw", "lars"):
        tree = job_tree(tmp_path / "data", name=name, optim={"name": name})
        (tmp_path / f"{name}.toml").write_text(tomli_w.dumps(tree))
    subprocess.run([sys.executable, "-c", TRAIN], check=True, timeout=300)
