"""What a job may ask of a device: channels_last, torch.compile, exact mode, a probe, a stop. Also on the CPU."""

from __future__ import annotations

import itertools
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
from torch import Tensor

from hvd_batchgrow.comm.ranks import SingleRank
from hvd_batchgrow.train.probe import probe_job
from hvd_batchgrow.train.trainer import Trainer
from tests import training
from tests.helpers import job_tree, small_job, small_source, write_idx_folder
from tests.training import Recorder, StopAfter, digest, newest

ROOT = Path(__file__).parents[2]


def sections_of(device: torch.device, **sections: Any) -> dict[str, Any]:
    """Return the sections of a job for a device."""
    layout = {"device": device.type, **sections.pop("layout", {})}
    return {"layout": layout, "data": {"pipeline": "torch", **sections.pop("data", {})}, **sections}


def train(folder: Path, device: torch.device, **sections: Any) -> tuple[Trainer, list[float]]:
    """Train a small job on a device; return the trainer and the losses."""
    recorder = Recorder()
    job = small_job(**sections_of(device, **sections))
    trainer, ended = training.train(job, SingleRank(), folder, recorder)
    assert ended.done
    assert trainer.parts.device == device
    return trainer, [record.loss for record in recorder.records]


def state(trainer: Trainer) -> dict[str, Tensor]:
    return {name: value.cpu() for name, value in trainer.parts.model.state_dict().items()}


def assert_alike(found: tuple[Trainer, list[float]], expected: tuple[Trainer, list[float]]) -> None:
    """Check that two runs of 80 updates differ by rounding, which grows with each update."""
    assert found[1][0] == pytest.approx(expected[1][0], rel=1e-4)
    assert found[1] == pytest.approx(expected[1], rel=1e-2)
    torch.testing.assert_close(state(found[0]), state(expected[0]), rtol=1e-2, atol=2e-3)


@pytest.mark.usefixtures("float32_convolutions")
def test_a_channels_last_run_is_the_contiguous_one_up_to_rounding(each_device: torch.device, tmp_path: Path) -> None:
    in_last = train(tmp_path / "last", each_device, data={"channels_last": True})
    weight = next(p for p in in_last[0].parts.model.parameters() if p.ndim == 4 and p.shape[1] > 1)
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert not weight.is_contiguous()
    assert weight.device == each_device
    assert_alike(in_last, train(tmp_path / "first", each_device))


@pytest.mark.usefixtures("float32_convolutions")
@pytest.mark.filterwarnings("ignore")  # warnings of the compiler
def test_a_compiled_run_is_the_uncompiled_one_up_to_rounding(
    each_device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not shutil.which("g++"):
        pytest.skip("torch.compile needs a C++ compiler: install g++")
    if each_device.type == "cuda" and not find_spec("triton"):
        pytest.skip("torch.compile needs Triton on a GPU")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    short = {"epochs": 0.7, "boundaries_epochs": [0.3]}
    compiled = train(tmp_path / "compiled", each_device, schedule=short, layout={"compile": True})
    plain = train(tmp_path / "plain", each_device, schedule=short)
    assert [run[0].parts.model._compiled_call_impl is not None for run in (compiled, plain)] == [True, False]
    assert_alike(compiled, plain)


@pytest.mark.usefixtures("float32_convolutions")
def test_a_run_that_is_stopped_and_resumed_is_bit_identical(each_device: torch.device, tmp_path: Path) -> None:
    job = small_job(**sections_of(each_device))
    whole, _ = training.train(job, SingleRank(), tmp_path / "whole")
    training.train(job, SingleRank(), tmp_path / "parts", stop=StopAfter(7, here=True))
    checkpoint = newest(SingleRank(), tmp_path / "parts")
    assert checkpoint is not None
    assert 0 < checkpoint.samples < whole.state.samples
    resumed, ended = training.train(job, SingleRank(), tmp_path / "parts", checkpoint=checkpoint)
    assert ended.done
    assert digest(resumed) == digest(whole)


@pytest.mark.usefixtures("arithmetic_restored")
def test_a_probe_measures_the_device(each_device: torch.device, tmp_path: Path) -> None:
    write_idx_folder(tmp_path / "data", small_source())
    job = small_job(tmp_path / "data", **sections_of(each_device))
    report: list[str] = []
    probe = probe_job(lambda: job, SingleRank(), lambda *_: None, report.append, budget_s=0.0)
    assert probe is not None
    (part,) = probe.measured
    assert part.device == ("cpu" if each_device.type == "cpu" else torch.cuda.get_device_name(each_device))
    assert {(u.micro_batch, u.accumulation) for u in part.updates} == set(itertools.product((8, 16), (1, 2, 4, 8)))
    assert all(0 <= update.data_wait_s < update.seconds for update in part.updates)


def hvd_batchgrow(folder: Path, *words: str, ranks: int = 1) -> str:
    """Run a command on one rank, or on several that torchrun starts on this host; return what it prints."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    command = [sys.executable, *launcher, "-m", "hvd_batchgrow.cli", *words]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_exact_weights_of_two_ranks_on_one_device_are_those_of_one(
    each_device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    write_idx_folder(tmp_path / "data", small_source())
    layout = {"exact": True, "max_micro_batch": 8, "ranks_per_gpu": 2}
    tree = job_tree(tmp_path / "data", **sections_of(each_device, layout=layout, schedule={"epochs": 1.2}))
    tree["schedule"]["boundaries_epochs"] = [0.5, 1.0]
    (tmp_path / "small.toml").write_text(tomli_w.dumps(tree))
    names = {1: "one", 2: "two"}
    for ranks, name in names.items():
        backend = ["--backend", "torch"] if ranks > 1 else []
        hvd_batchgrow(tmp_path, "train", "small.toml", "--name", name, *backend, ranks=ranks)
    one, two = (hvd_batchgrow(tmp_path, "digest", f"runs/{name}").split()[0] for name in names.values())
    assert one == two
