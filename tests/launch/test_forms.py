"""The same job by every launch form, as a user types them: real processes, real signals."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from hvd_batchgrow.verification.digest import Weights, compare_weights, final_weights
from tests.helpers import job_tree, small_source, write_idx_folder

BIN = Path(sys.executable).parent
TOOLS = Path(__file__).parents[2] / "tools"
FORMS = {
    "one": [],
    "mpirun": [str(TOOLS / "mpirun.sh"), "2"],
    "horovodrun-gloo": [str(BIN / "horovodrun"), "-np", "2", "--gloo"],
    "horovodrun-mpi": [str(BIN / "horovodrun"), "-np", "2", "--mpi"],
    "mpirun-torch": [str(TOOLS / "mpirun.sh"), "2"],
    "torchrun": [str(BIN / "torchrun"), "--standalone", "--no-python", "--nproc-per-node", "2"],
}
OPTIONS = {"mpirun-torch": ["--backend", "torch"]}
BACKENDS = {"horovodrun-gloo": "horovod-gloo", "mpirun-torch": "torch-gloo", "torchrun": "torch-gloo", "one": "single"}
ENVIRONMENT = {
    **os.environ,
    "PATH": f"{BIN}:{os.environ['PATH']}",
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("forms")
    root = write_idx_folder(folder / "data", small_source())
    (folder / "small.toml").write_text(tomli_w.dumps(job_tree(root)))
    return folder


def command(form: str, *words: str) -> list[str]:
    return [*FORMS[form], str(BIN / "hvd-batchgrow"), *words, *OPTIONS.get(form, [])]


@contextlib.contextmanager
def launched(words: list[str], **options: Any) -> Iterator[subprocess.Popen[str]]:
    """Start a process that is killed at the end of its test, so that a failing test does not wait for it."""
    with subprocess.Popen(words, text=True, **options) as process:
        try:
            yield process
        finally:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
            process.kill()


def run(folder: Path, form: str, *words: str, timeout_s: float = 300) -> subprocess.CompletedProcess[str]:
    return captured(command(form, *words), folder, timeout_s)


def captured(words: Sequence[str], folder: Path, timeout_s: float = 300) -> subprocess.CompletedProcess[str]:
    """Run a command in a folder to its end, and keep its output."""
    return subprocess.run(
        words, check=False, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=timeout_s
    )


def for_any_machine(script: str) -> str:
    """Return the commands of a page in a form in which mpirun starts more ranks than there are cores, also as root."""
    return re.sub(r"\bmpirun -np (\d+)", rf"{shlex.quote(str(TOOLS / 'mpirun.sh'))} \1", script)


def write_program(folder: Path, name: str, *lines: str) -> Path:
    """Write the trainer with some lines before its start."""
    path = folder / f"{name}.py"
    first = ("import sys, time", "from hvd_batchgrow.cli import main")
    path.write_text("\n".join([*first, *lines, "sys.exit(main())", ""]))
    return path


def train(folder: Path, form: str, name: str, *words: str) -> Weights:
    """Train the job to its end."""
    done = run(folder, form, "train", "small.toml", "--name", name, *words)
    assert done.returncode == 0, done.stderr
    record = json.loads((folder / "runs" / name / "record.json").read_text())["attempts"][-1]
    assert record["ranks"] == (1 if form == "one" else 2)
    assert record["backend"] == BACKENDS.get(form, "horovod-mpi")
    return final_weights(folder / "runs" / name)


@pytest.fixture(scope="module")
def weights(folder: Path) -> dict[str, Weights]:
    """The weights of whole runs. Other forms train the job in two attempts, or in exact mode."""
    return {form: train(folder, form, form) for form in ("one", "mpirun", "horovodrun-mpi")}


# Of two numbers the sum is the same in either order: the bits are equal without exact mode, too.
def test_two_ranks_end_bit_identical_by_either_launcher(weights: dict[str, Weights]) -> None:
    assert compare_weights(weights["mpirun"], weights["horovodrun-mpi"]) == "bit-identical"


def test_one_rank_and_two_agree_to_rounding(weights: dict[str, Weights]) -> None:
    one, two = weights["one"].tensors, weights["mpirun"].tensors
    for name, tensor in one.items():
        difference = (two[name] - tensor).norm() / tensor.norm()
        # 17 updates of float32 sums in another order
        assert difference < 1e-4, name


def ranks_of(launcher: int) -> list[int]:
    """Process ids of the ranks below a launcher: those that run the trainer itself."""
    parents, lines = {}, {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended since
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
            lines[int(path.parent.name)] = path.with_name("cmdline").read_bytes()

    def is_below(process: int) -> bool:
        while process in parents:
            process = parents[process]
            if process == launcher:
                return True
        return False

    trainer = f"{BIN}/python".encode()
    return [process for process, line in lines.items() if is_below(process) and line.startswith(trainer)]


def write_slow(folder: Path, seconds: float) -> Path:
    """The trainer, with a pause before each update."""
    return write_program(
        folder,
        "slow",
        *("from hvd_batchgrow.train.update.engine import UpdateEngine", "update = UpdateEngine.update"),
        "def slowly(self, *arguments, **options):",
        f"    time.sleep({seconds})",
        "    return update(self, *arguments, **options)",
        "UpdateEngine.update = slowly",
    )


@pytest.mark.parametrize(
    ("form", "code"), [("mpirun", 75), ("horovodrun-gloo", 1), ("mpirun-torch", 75), ("torchrun", 1)]
)
def test_a_stop_by_signal_leaves_a_checkpoint_and_a_resume_the_same_weights(
    folder: Path, weights: dict[str, Weights], form: str, code: int
) -> None:
    # Some four updates before the first record, and a dozen after it: five seconds to ask in.
    slow = write_slow(folder, 0.4)
    name = f"stopped-{form}"
    words = ["train", "small.toml", "--name", name, *OPTIONS.get(form, [])]
    launch = [*FORMS[form], sys.executable, str(slow), *words]
    metrics = folder / "runs" / name / "metrics.jsonl"
    with launched(launch, cwd=folder, env=ENVIRONMENT, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 300
        while not (metrics.exists() and metrics.stat().st_size):
            assert process.poll() is None
            assert time.monotonic() < deadline, "it does not begin"
            time.sleep(0.01)
        # mpirun forwards USR2, torchrun TERM; under horovodrun one rank gets it, and the vote of the update spreads it
        receiver = max(ranks_of(process.pid)) if form == "horovodrun-gloo" else process.pid
        os.kill(receiver, signal.SIGTERM if form == "torchrun" else signal.SIGUSR2)
        assert process.wait(timeout=300) == code
    assert final_weights(folder / "runs" / name).samples < weights["mpirun"].samples
    resumed = train(folder, form, name, "--resume", "auto")
    assert compare_weights(weights["mpirun"], resumed) == "bit-identical"
    steps = [line["samples"] for line in map(json.loads, metrics.read_text().splitlines()) if line["kind"] == "train"]
    assert steps == sorted(set(steps))


def test_exact_mode_is_equal_to_the_bit_on_any_ranks(folder: Path) -> None:
    forms = ("one", "mpirun", "horovodrun-gloo", "mpirun-torch", "torchrun")
    one, *others = (train(folder, form, f"exact-{form}", "--layout.exact", "true") for form in forms)
    assert [compare_weights(one, other) for other in others] == ["bit-identical"] * 4


def test_exact_mode_with_two_threads_per_rank_is_equal_to_the_bit_on_any_ranks(folder: Path) -> None:
    threads = ["--layout.exact", "true", "--layout.threads-per-rank", "2"]
    one, two = (train(folder, form, f"threads-{form}", *threads) for form in ("one", "mpirun"))
    assert compare_weights(one, two) == "bit-identical"


@pytest.mark.parametrize("comm", ["horovod", "torch"])
def test_exact_mode_on_one_two_and_three_ranks_is_the_same_by_either_backend(folder: Path, comm: str) -> None:
    batch = ["--schedule.global-batch", "48", "--layout.exact", "true"]
    done = run(folder, "one", "verify", "small.toml", *batch, "--layouts", "1x6x8,2x3x8,3x2x8", "--backend", comm)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("bit-identical") == 3, done.stdout


@pytest.mark.parametrize("form", ["mpirun", "horovodrun-gloo", "mpirun-torch", "torchrun"])
def test_a_rank_that_raises_takes_the_job_down_and_is_named(folder: Path, form: str) -> None:
    # Rank 1 alone finds its run in trouble: its second update raises.
    broken = write_program(
        folder,
        "broken",
        "from hvd_batchgrow.train.update.engine import UpdateEngine",
        "update = UpdateEngine.update",
        "def fail(self, *arguments, **options):",
        "    result = update(self, *arguments, **options)",
        "    if self.ranks.rank == 1:",
        "        print(f'raised at {time.time():.2f}', file=sys.stderr, flush=True)",
        "        raise ZeroDivisionError('planted')",
        "    return result",
        "UpdateEngine.update = fail",
    )
    words = ["train", "small.toml", "--name", f"broken-{form}", *OPTIONS.get(form, [])]
    done = captured([*FORMS[form], sys.executable, str(broken), *words], folder)
    over = time.time()
    assert done.returncode != 0
    text = done.stdout + done.stderr
    raised = re.search(r"raised at (\d+\.\d+)", text)
    assert raised is not None, text
    print(f"{form}: a rank that raised took its job down in {over - float(raised[1]):.1f} s")
    assert over - float(raised[1]) < 60
    assert text.count("ZeroDivisionError: planted") == 1
    assert "rank 1 of 2 on " in text


@pytest.mark.parametrize("form", ["mpirun", "horovodrun-gloo", "torchrun"])
def test_a_fault_in_the_job_is_reported_once(folder: Path, form: str) -> None:
    done = run(folder, form, "train", "small.toml", "--optim.lr", "-1", "--name", "faulty")
    text = done.stdout + done.stderr
    assert text.count("optim.lr: must be greater than 0, got -1") == 1
    assert "Traceback (most recent call last)" not in text or form != "mpirun"  # the launcher's own
    assert not (folder / "runs" / "faulty").exists()
    if form == "mpirun":
        assert done.returncode == 2
