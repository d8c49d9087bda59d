"""What the start of a run and its record say about devices, drivers and libraries."""

from __future__ import annotations

import io
import json
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from hvd_batchgrow.cli import main
from hvd_batchgrow.comm import hardware
from hvd_batchgrow.comm.hardware import Hardware, hardware_of
from hvd_batchgrow.comm.ranks import SingleRank, version_text
from hvd_batchgrow.observers.console import PlainConsole
from hvd_batchgrow.observers.progress import ProgressDisplay
from hvd_batchgrow.schedule.plan import compile_plan
from hvd_batchgrow.train.events import RunStarted
from tests.helpers import NUM_TRAIN, small_job

OPEN = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (dvs-builder@U22-9)\n"
OF_2023 = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023\n"
COMPILER = "GCC version:  gcc version 12.3.0 (Ubuntu 12.3.0-1ubuntu1~22.04)\n"


class Ranks(SingleRank):
    def __init__(self, backend: str, collectives: str, nccl: str = "") -> None:
        self.size, self.backend, self.collectives, self._nccl = 4, backend, collectives, nccl

    def nccl_version(self) -> str:
        return self._nccl or super().nccl_version()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Fake what needs hardware; return the file of the driver's version."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "nccl", SimpleNamespace(version=lambda: (2, 27, 7)))
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91501)
    monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: 13010, raising=False)
    monkeypatch.setattr(hardware, "_DRIVER_FILE", tmp_path / "version")
    (tmp_path / "version").write_text(OPEN + COMPILER)
    return tmp_path / "version"


@pytest.mark.parametrize(
    ("ranks", "collectives"),
    [
        (Ranks("torch-nccl", "NCCL"), "NCCL 2.27.7"),
        (Ranks("horovod-mpi", "NCCL", "2.29.7"), "NCCL 2.29.7"),
        (Ranks("torch-gloo", "Gloo"), "Gloo"),  # ranks that share a GPU
        (SingleRank(), ""),
    ],
)
def test_a_gpu_is_named_with_its_driver_and_libraries(gpu: Path, ranks: SingleRank, collectives: str) -> None:
    assert hardware_of(ranks, torch.device("cuda", 1), (4, 4)) == Hardware(
        device="NVIDIA H100 80GB HBM3",
        gpus_per_host=(4, 4),
        collectives=collectives,
        cuda="13.0",
        cudnn="9.15.1",
        driver="580.65.06",
        driver_cuda="13.1",
    )


@pytest.mark.parametrize(
    ("text", "driver"),
    [
        (OF_2023 + COMPILER, "535.104.05"),
        ("", None),
        (None, None),
    ],
)
def test_the_version_of_a_driver_is_read_if_it_is_published(gpu: Path, text: str | None, driver: str | None) -> None:
    gpu.unlink()
    if text is not None:
        gpu.write_text(text)
    found = hardware_of(SingleRank(), torch.device("cuda", 0), (1,))
    assert (found.driver, found.driver_cuda) == (driver, "13.1")


@pytest.mark.parametrize(
    ("built_for", "visible", "why"),
    [
        (None, False, "; torch 2.0 is a CPU build"),
        ("13.0", False, "; torch 2.0 sees no GPU"),
        ("13.0", True, ""),  # `take_device` gives the reason
    ],
)
def test_a_cpu_is_named_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, built_for: str | None, visible: bool, why: str
) -> None:
    monkeypatch.setattr(torch, "__version__", "2.0")
    monkeypatch.setattr(torch.version, "cuda", built_for)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: visible)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    found = hardware_of(Ranks("torch-gloo", "Gloo"), torch.device("cpu"), (0, 0))
    assert found == Hardware(f"CPU (AVX2 kernels){why}", (0, 0), "Gloo")
    assert not found.is_cuda


def test_versions_are_read_from_their_numbers() -> None:
    assert [version_text(number) for number in (22707, 22907, 91501, 90100)] == ["2.27.7", "2.29.7", "9.15.1", "9.1.0"]


def shown(found: Hardware, backend: str, ranks: int) -> str:
    out = io.StringIO()
    job = small_job()
    plan = compile_plan(job, 1, NUM_TRAIN)
    event = RunStarted(job, plan, Path("runs/x"), 0, found, backend, ranks, 8, "dali", 25_557_032, ())
    ProgressDisplay(PlainConsole(out, 80)).on_start(event)
    return out.getvalue().partition("network: ")[2]


GPU = Hardware("NVIDIA H100 80GB HBM3", (4, 4), "NCCL 2.27.7", "13.0", "9.15.1", "580.65.06", "13.1")


def test_the_start_of_a_run_names_devices_and_libraries_in_80_columns() -> None:
    text = shown(GPU, "torch-nccl", 8)
    assert text == (
        "25,557,032 parameters\n"
        "device: NVIDIA H100 80GB HBM3, 4 GPUs per host\n"
        "CUDA 13.0, cuDNN 9.15.1, driver 580.65.06 (up to CUDA 13.1)\n"
        "ranks: 8 on 2 hosts by torch.distributed; NCCL 2.27.7 sums gradients\n"
        "8 threads each, pixels by dali\n"
        "run folder runs/x\n"
        "to follow the run from another terminal: hvd-batchgrow watch runs/x\n"
    )
    assert max(map(len, text.splitlines())) <= 80
    unequal = Hardware(**{**asdict(GPU), "gpus_per_host": (4, 1)})
    assert "device: NVIDIA H100 80GB HBM3, 1 to 4 GPUs per host\n" in shown(unequal, "horovod-mpi", 5)
    unpublished = Hardware(**{**asdict(GPU), "driver": None})
    assert "CUDA 13.0, cuDNN 9.15.1, driver (up to CUDA 13.1)\n" in shown(unpublished, "torch-nccl", 8)
    assert shown(Hardware("CPU (AVX2 kernels)", (0, 0), "MPI"), "horovod-mpi", 4) == (
        "25,557,032 parameters\n"
        "device: CPU (AVX2 kernels)\n"
        "ranks: 4 on 2 hosts by Horovod over MPI; MPI sums gradients\n"
        "8 threads each, pixels by dali\n"
        "run folder runs/x\n"
        "to follow the run from another terminal: hvd-batchgrow watch runs/x\n"
    )


def test_a_run_prints_and_records_its_hardware(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", job, "--max-updates", "1"]) == 75
    (attempt,) = json.loads(Path("runs/small/record.json").read_text())["attempts"]
    device = hardware_of(SingleRank(), torch.device("cpu")).device
    assert attempt["hardware"] == {**asdict(Hardware(device, (0,), "")), "gpus_per_host": [0]}
    assert f"\ndevice: {device}\nranks: 1 on 1 host without a launcher\n" in capsys.readouterr().err
