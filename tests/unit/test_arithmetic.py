"""Exact mode: what decides the last bit beside the job is set, refused where ranks differ, or reported at a resume."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch

from hvd_batchgrow.cli import main
from hvd_batchgrow.comm.ranks import SingleRank
from hvd_batchgrow.messages.errors import JobError
from hvd_batchgrow.nn.ghost import ghost_choice, ghost_cpu, ghost_reference
from hvd_batchgrow.schedule.plan import compile_plan
from hvd_batchgrow.train.arithmetic_settings import arithmetic
from hvd_batchgrow.train.run.setup import prepare_rank
from tests.helpers import NUM_TRAIN, job_tree, small_job

WARNING = "layout.exact: the weights may differ in bits from a run without the change of"


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    """Undo afterwards what preparing a rank sets in torch."""
    mode, threads = torch.get_deterministic_debug_mode(), torch.get_num_threads()
    yield
    torch.set_deterministic_debug_mode(mode)
    torch.set_num_threads(threads)


@pytest.fixture
def exact(job: str) -> str:
    Path("exact.toml").write_text(tomli_w.dumps(job_tree("data", layout={"exact": True})))
    return "exact.toml"


def test_an_exact_resume_with_another_number_of_threads_is_reported(
    exact: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", exact, "--max-updates", "2"]) == 75
    error = resumed(exact, capsys, "--layout.threads-per-rank", "2")
    assert "changed since the last attempt: torch threads was 1, is 2" in error
    assert re.search(rf"{re.escape(WARNING)} (deterministic algorithms, )?torch threads", error)


@pytest.mark.parametrize("exact", [False, True])
def test_the_gradient_of_an_index_with_several_threads_is_reproducible(exact: bool) -> None:
    """Without `use_deterministic_algorithms`, each of these differs from the first."""
    prepare_rank(small_job(layout={"exact": exact, "threads_per_rank": 2}), SingleRank())
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(1000, 64, generator=generator, requires_grad=True)
    index, factors = torch.randint(1000, (20000,), generator=generator), torch.randn(20000, 64, generator=generator)
    found = [torch.autograd.grad((rows[index] * factors).sum(), rows)[0] for _ in range(6)]
    assert all(torch.equal(gradient, found[0]) for gradient in found)


@pytest.mark.parametrize("update", [{"precision": "float16"}, {"allreduce_dtype": "float16"}])
def test_what_rounds_exact_sums_is_refused(update: dict[str, str]) -> None:
    with pytest.raises(JobError, match=rf"update\.{next(iter(update))}: 'float16'"):
        compile_plan(small_job(layout={"exact": True}, update=update), 1, NUM_TRAIN)


def test_exact_mode_uses_one_thread_whatever_the_environment_says(
    job: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = job_tree("data", layout={"exact": True})
    del tree["layout"]["threads_per_rank"]
    Path("exact.toml").write_text(tomli_w.dumps(tree))
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert main(["train", "exact.toml", "--max-updates", "1"]) == 75
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
    assert "1 thread," in capsys.readouterr().err


def resumed(job: str, capsys: pytest.CaptureFixture[str], *options: str) -> str:
    capsys.readouterr()
    assert main(["train", job, "--resume", "auto", *options]) == 0
    return " ".join(capsys.readouterr().err.split())


def test_a_resume_under_other_kernels_says_so(
    exact: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", exact, "--max-updates", "2"]) == 75
    monkeypatch.setenv("ONEDNN_DEFAULT_FPMATH_MODE", "BF16")
    error = resumed(exact, capsys)
    assert "changed since the last attempt: ONEDNN_DEFAULT_FPMATH_MODE was None, is 'BF16'" in error
    assert f"{WARNING} ONEDNN_DEFAULT_FPMATH_MODE" in error


@pytest.mark.parametrize(
    ("option", "key"), [("--layout.exact", "layout.exact"), ("--data.channels-last", "data.channels_last")]
)
def test_a_resume_with_a_key_that_chooses_other_kernels_says_so(
    exact: str, capsys: pytest.CaptureFixture[str], option: str, key: str
) -> None:
    assert main(["train", exact, "--max-updates", "2"]) == 75
    assert f"{WARNING} {key}" in resumed(exact, capsys, option, "false" if key == "layout.exact" else "true")


def test_a_resume_without_a_change_says_nothing(exact: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", exact, "--max-updates", "2"]) == 75
    error = resumed(exact, capsys)
    assert "changed since" not in error
    assert WARNING not in error


@pytest.mark.slow
def test_a_fast_run_says_what_has_changed_and_promises_no_bits(
    job: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", job, "--max-updates", "2"]) == 75
    error = resumed(job, capsys, "--layout.threads-per-rank", "2")
    assert "changed since the last attempt: torch threads was 1, is 2" in error
    assert WARNING not in error


def test_the_switches_of_the_environment_and_of_torch_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def changed(change: Any) -> set[str]:
        before = arithmetic(on_gpu=False)
        change()
        return {key for key, value in arithmetic(on_gpu=False).items() if before.get(key) != value}

    monkeypatch.delenv("MKL_CBWR", raising=False)
    with monkeypatch.context() as patch:
        assert changed(lambda: patch.setenv("MKL_CBWR", "COMPATIBLE")) == {"MKL_CBWR"}
    torch.use_deterministic_algorithms(False)
    try:
        assert "deterministic algorithms" in changed(lambda: torch.use_deterministic_algorithms(True))
        assert "float32 matmul precision" in changed(lambda: torch.set_float32_matmul_precision("medium"))
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_float32_matmul_precision("highest")


def test_the_norms_of_a_gpu_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A100")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr("importlib.metadata.version", lambda name: "3.7")
    for normalize, expected in ((ghost_reference.normalize, "PyTorch"), (ghost_cpu.normalize, "Triton 3.7")):
        monkeypatch.setitem(ghost_choice._found, torch.device("cuda", 1), normalize)
        assert arithmetic(on_gpu=True)["ghost norms"] == expected
