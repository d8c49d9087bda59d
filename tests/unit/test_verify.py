from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from hvd_batchgrow.cli import main
from hvd_batchgrow.comm.devices import DeviceKey, VisibleGpus, assign_devices
from hvd_batchgrow.comm.launcher_env import Backend
from hvd_batchgrow.config import Job
from hvd_batchgrow.config.layout import LayoutSection
from hvd_batchgrow.messages.errors import JobError, RunError
from hvd_batchgrow.train.update.engine import UpdateEngine
from hvd_batchgrow.verification import verify
from hvd_batchgrow.verification.same_device import same_device
from hvd_batchgrow.verification.verify import Shape, default_shapes, parse_shapes
from tests.helpers import measured_tree


@pytest.mark.parametrize(
    ("text", "batch", "shapes"),
    [
        ("1x1x16", 16, [(1, 1, 16)]),
        ("1x2x8, 2×1×8", 16, [(1, 2, 8), (2, 1, 8)]),
        ("3x1x16", 40, [(3, 1, 16)]),  # five groups: ranks hold 2, 2 and 1
        ("3x2x8", 40, [(3, 2, 8)]),
        ("1x1x16,1x1x16", 16, [(1, 1, 16)]),
    ],
)
def test_layouts_are_read(text: str, batch: int, shapes: Sequence[tuple[int, int, int]]) -> None:
    assert parse_shapes(text, batch, 8, exact=False) == [Shape(*shape) for shape in shapes]


def test_all_impossible_layouts_are_reported_at_once() -> None:
    with pytest.raises(JobError) as error:
        parse_shapes("1x1x12,2x1x4,1x3x8,3x1x8,two,0x1x8", 16, 8, exact=False)
    lines = [
        "1x1x12: a micro-batch of 12 would split ghost batches of 8; nearest: 1x1x16, 1x2x8",
        "2x1x4: a micro-batch of 4 would split ghost batches of 8; nearest: 2x1x8",
        "1x3x8 processes 24 samples, but the first phase's batch is 16; nearest: 1x1x16, 1x2x8",
        "3x1x8 processes 24 samples, but the first phase's batch is 16; nearest: fewer ranks",
        "'two' is not RANKSxACCUMULATIONxMICRO-BATCH, such as 2x2x8",
        "'0x1x8' is not",
    ]
    assert all(line in str(error.value) for line in lines)
    with pytest.raises(JobError, match=r"in exact mode a micro-batch must be one ghost batch of 8; nearest: 1x2x8$"):
        parse_shapes("1x1x16", 16, 8, exact=True)


def test_default_layouts_have_the_largest_and_the_smallest_micro_batch() -> None:
    assert [str(shape) for shape in default_shapes(40, 8, exact=False)] == [
        "1x1x40", "1x5x8", "2x1x24", "2x3x8", "3x1x16", "3x2x8", "4x1x16", "4x2x8",
    ]  # fmt: skip
    assert [str(shape) for shape in default_shapes(16, 8, exact=True)] == ["1x2x8", "2x1x8"]
    for text in ("1x1x40", "2x1x24", "3x1x16", "4x2x8"):
        parse_shapes(text, 40, 8, exact=False)


@pytest.mark.parametrize(
    ("device", "ranks_per_gpu", "num_gpus", "backend", "keys"),
    [
        ("auto", None, 0, "auto", {}),  # all on the CPU
        ("cuda", None, 0, "auto", {}),  # the first run raises the error
        ("cpu", None, 2, "auto", {}),
        ("auto", None, 4, "auto", {"device": "cuda"}),
        ("auto", None, 8, "horovod", {"device": "cuda"}),
        ("auto", None, 3, "auto", {"device": "cuda", "ranks_per_gpu": 2}),
        ("auto", None, 2, "torch", {"device": "cuda", "ranks_per_gpu": 2}),
        ("auto", None, 1, "auto", {"device": "cuda", "ranks_per_gpu": 4}),
        ("auto", 3, 2, "auto", {"device": "cuda", "ranks_per_gpu": 3}),
        ("auto", 1, 2, "auto", {"device": "cuda", "ranks_per_gpu": 2}),
        ("auto", None, 2, "horovod", {"device": "cpu"}),
        ("cuda", None, 2, "horovod", {"device": "cuda", "ranks_per_gpu": 2}),  # raises the error: NCCL allows one
    ],
)
def test_all_layouts_use_one_kind_of_device(
    device: DeviceKey, ranks_per_gpu: int | None, num_gpus: int, backend: Backend, keys: dict[str, Any]
) -> None:
    layout = LayoutSection(device=device, ranks_per_gpu=ranks_per_gpu)
    found, notice = same_device(layout, 4, num_gpus, backend)
    assert found == keys
    assert bool(notice) == (found.get("device") == "cpu" or "ranks_per_gpu" in found)
    if found:  # every layout of 1 to 4 ranks gets that kind of device, and none is refused
        seen = VisibleGpus("a", tuple(map(str, range(num_gpus))))
        for ranks in (1, 2, 3, 4):
            given = assign_devices([seen] * ranks, found["device"], found.get("ranks_per_gpu"))
            assert given.is_cuda == (found["device"] == "cuda")


@pytest.mark.parametrize(
    ("backend", "shown", "words"),
    [
        ("auto", "2 ranks share 1 GPU: layout.ranks_per_gpu = 2, so", ["--layout.device=cuda", "--layout.ranks_per_g"]),
        ("horovod", "all layouts use the CPU: 2 ranks share 1 GPU, for", ["--layout.device=cpu"]),
    ],
)
def test_the_runs_and_plain_autograd_get_the_same_device(
    job: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    backend: str,
    shown: str,
    words: list[str],
) -> None:
    """One GPU is visible, and the default layouts of this job have up to two ranks."""
    received: list[tuple[Job, Sequence[str]]] = []

    def verify_nothing(_: Path, job: Job, source: object, options: Sequence[str], *rest: object) -> list[object]:
        received.append((job, options))
        return []

    monkeypatch.setattr("hvd_batchgrow.comm.devices.visible_gpus", lambda: VisibleGpus("a", ("0",)))
    monkeypatch.setattr(verify, "verify", verify_nothing)
    assert main(["verify", job, "--backend", backend, "--layout.device", "auto"]) == 0
    assert shown in capsys.readouterr().err
    ((found, options),) = received
    assert f"--layout.device={found.layout.device}" in options
    assert [word for word in options if "device" in word or "per_gpu" in word] == [
        f"--layout.device={found.layout.device}",
        *([f"--layout.ranks_per_gpu={found.layout.ranks_per_gpu}"] if found.layout.ranks_per_gpu else []),
    ]
    assert all(any(option.startswith(word) for option in options) for word in words)


def test_train_stops_after_updates_and_resumes(job: str) -> None:
    assert main(["train", job, "--max-updates", "3"]) == 75
    assert [path.stem for path in Path("runs/small/checkpoints").glob("*.pt")] == ["samples-000000000000048"]
    assert main(["train", job, "--resume", "auto"]) == 0


def test_the_number_of_updates_must_be_positive(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", job, "--max-updates", "0"]) == 2
    assert "--max-updates: must be greater than 0, got '0'; nearest: 1" in capsys.readouterr().err


@pytest.mark.slow
def test_layouts_of_one_rank_agree_with_plain_autograd(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", job, "--layouts", "1x1x16,1x2x8"]) == 0
    shown = capsys.readouterr()
    text = shown.out
    assert "small: 2 updates, fast mode" in text
    assert len(re.findall(r"1 × (1 × 16|2 × 8) .* agrees", text)) == 2
    assert max(map(len, text.splitlines())) <= 80
    assert "plain autograd, values changed by ± 7.6e-06: 3" in shown.err  # 64 · 2⁻²³


@pytest.mark.slow
def test_a_launcher_may_end_with_another_code_than_its_ranks(
    job: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """torchrun and horovodrun end with 1 when a rank ends with 75."""
    monkeypatch.setattr(verify, "_launcher", lambda ranks, backend: ["bash", "-c", '"$@" || exit 1', "launcher"])
    # Sample 16 is the end of the run: the heading named the 9 updates that were requested.
    words = ["--updates", "9", "--schedule.epochs", "0.05", "--schedule.boundaries_epochs", "[]"]
    assert main(["verify", job, "--layouts", "1x2x8", *words]) == 0
    text = capsys.readouterr().out
    assert "small: 1 update, fast mode" in text
    assert "agrees" in text
    assert main(["verify", job, "--layouts", "1x2x8", "--updates", "1", "--data.root", "nowhere"]) == 1


@pytest.mark.slow
def test_layouts_in_exact_mode_are_bit_identical(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["verify", job, "--layouts", "1x2x8", "--layout.exact", "true", "--updates", "1"]
    assert main(words) == 0
    assert re.search(r"1 × 2 × 8 +[0-9a-f]{8} .* bit-identical", capsys.readouterr().out)


@pytest.mark.slow
def test_growth_that_costs_decide_is_verified_without_costs(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    """An earlier defect: verify requested --cost, an option that it does not have and does not need."""
    words = ["--layouts", "1x2x8", "--updates", "1", "--layout.grow_by", "auto", "--layout.max-ranks", "2"]
    assert main(["verify", job, *words]) == 0
    assert "1 × 2 × 8" in capsys.readouterr().out


@pytest.mark.slow
def test_a_layout_that_decides_is_found(
    job: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second run gets another learning rate."""
    train, runs = verify._train, []

    def other(job_file: Path, options: Sequence[str], *rest: object) -> None:
        runs.append(job_file)
        train(job_file, [*options, "--optim.lr", "0.06"] if len(runs) > 1 else options, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(verify, "_train", other)
    assert main(["verify", job, "--layouts", "1x1x16,1x2x8", "--updates", "1"]) == 1
    assert len(re.findall("agrees|DIFFERS", capsys.readouterr().out)) == 2


@pytest.mark.slow
def test_a_fault_that_all_layouts_share_is_found(
    job: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The network makes the update engine lose part of a gradient. Plain autograd does not use the engine."""
    monkeypatch.setattr(UpdateEngine, "__init__", UpdateEngine.__init__)  # the network replaces it in this process too
    Path("faulty.py").write_text(
        "import torch\n"
        "from hvd_batchgrow.train.update.engine import UpdateEngine\n"
        "prepare = UpdateEngine.__init__\n"
        "def lose(engine, model, optimizer, *rest, **options):\n"
        "    prepare(engine, model, optimizer, *rest, **options)\n"
        "    def zero(*_):\n"
        "        model[1].bias.grad[:1] = 0\n"
        "    optimizer.register_step_pre_hook(zero)\n"
        "UpdateEngine.__init__ = lose\n"
        "def net(num_classes):\n"
        "    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, num_classes))\n"
    )
    tree = tomllib.loads(Path(job).read_text())
    tree["model"] = {"name": "faulty:net", "ghost_batch": 8}
    Path("faulty.toml").write_text(tomli_w.dumps(tree))
    assert main(["verify", "faulty.toml", "--layouts", "1x2x8", "--updates", "1"]) == 1
    assert re.search(r"1\.bias +DIFFERS", capsys.readouterr().out)


@pytest.mark.slow
def test_a_measured_job_is_compared_without_its_trigger(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    tree = measured_tree("data", {"name": "cabs", "scale": 1e6, "every_epochs": 0.01})
    tree["data"]["root"] = tomllib.loads(Path(job).read_text())["data"]["root"]
    Path("measured.toml").write_text(tomli_w.dumps(tree))
    assert main(["verify", "measured.toml", "--layouts", "1x2x8", "--updates", "3"]) == 0
    assert "agrees" in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_that_fails_says_why(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", job, "--layouts", "1x1x16", "--optim.lr", "1e30"]) == 1
    text = capsys.readouterr().err
    assert "the run as 1x1x16 ended with 1:" in text
    assert "is not finite" in text
    assert main(["verify", job, "--layouts", "1x1x16", "--data.root", "nowhere"]) == 1
    assert "data.root = nowhere is not a folder" in capsys.readouterr().err


@pytest.mark.slow
def test_the_cause_is_named(job: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    text = "import torch\n\ndef net(num_classes):\n"
    layers = "torch.nn.Flatten(), *map(torch.nn.AlphaDropout, (0.5, 0.5)), torch.nn.Linear(64, num_classes)"
    Path("drawing.py").write_text(f"{text}    return torch.nn.Sequential({layers})\n")
    # The fixture's job sets widths, which this network does not accept.
    tree = tomllib.loads(Path(job).read_text())
    tree["model"] = {"name": "drawing:net", "ghost_batch": 8}
    Path("drawing.toml").write_text(tomli_w.dumps(tree))
    assert main(["verify", "drawing.toml", "--layouts", "1x1x16,1x2x8"]) == 1
    text = capsys.readouterr().out
    assert "results of drawing:net depend on the layout: 1, 2: random numbers that are not keyed by sample" in text


def test_a_launcher_that_ignores_sigterm_is_killed_after_the_grace_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "_GRACE_S", 0.1)
    stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", stubborn], stdout=subprocess.PIPE, text=True)
    assert process.stdout
    process.stdout.readline()
    verify._end(process)  # raises nothing
    assert process.returncode == -9
    process.stdout.close()


def test_ranks_are_launched_by_what_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    there = {"mpirun", "horovodrun"}
    monkeypatch.setattr(shutil, "which", lambda name: name if name in there else None)
    assert verify._launcher(1, "auto") == []
    assert verify._launcher(2, "torch")[:3] == ["mpirun", "-np", "2"]
    there.remove("mpirun")
    assert verify._launcher(2, "auto") == ["horovodrun", "--gloo", "-np", "2"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--no-python", "--nproc-per-node", "2"]
    assert verify._launcher(2, "torch") == torchrun
    there.remove("horovodrun")
    assert verify._launcher(2, "auto") == torchrun
    with pytest.raises(RunError, match="2 ranks need mpirun or horovodrun on PATH; or --backend torch"):
        verify._launcher(2, "horovod")


def test_under_a_launcher_rank_0_alone_does_the_work(
    job: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE"):
        monkeypatch.setenv(f"OMPI_COMM_WORLD_{name}", "2" if name.endswith("SIZE") else "1")
    assert main(["verify", job]) == 0
    assert capsys.readouterr() == ("", "")


def test_mpirun_can_be_started_within_mpirun() -> None:
    """Open MPI refuses a recursive call if OMPI_UNIVERSE_SIZE or a similar variable is set. User settings are kept."""
    of_mpirun = {
        "OMPI_UNIVERSE_SIZE": "2",
        "OMPI_MCA_orte_hnp_uri": "x",
        "OMPI_MCA_ess": "^singleton",
        "PMIX_RANK": "0",
    }
    kept = verify._environment({**of_mpirun, "OMPI_MCA_btl": "self,tcp", "PATH": "/bin"})
    assert {key: value for key, value in kept.items() if "ROOT" not in key} == {
        "OMPI_MCA_btl": "self,tcp",
        "PATH": "/bin",
    }
