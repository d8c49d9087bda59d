"""torchrun processes (agents) that join, leave and are killed: the weights equal those of an undisturbed rank."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # not in its __all__

from hvd_batchgrow.verification.audit import audit, read_consumed
from hvd_batchgrow.verification.digest import final_weights
from tests.helpers import job_tree, small_source, write_idx_folder
from tests.launch.test_forms import BIN, ENVIRONMENT, launched, write_program

GATE = 160
"""Samples that each attempt trains before it waits at a gate, until the test opens it or its rank gets a signal."""
GUARD_S = 400
FOR_TORCHRUN = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "TORCH_ELASTIC_WORKER_IDENTICAL": "1"}
"""Variables that torchrun needs so that agents can join and be killed (docs/growing-ranks.md)."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("torchrun")
    root = write_idx_folder(folder / "data", small_source())
    schedule = {"epochs": 6.0, "boundaries_epochs": [2.0], "noise_factor": 3.0, "max_batch": 48}
    sections: dict[str, Any] = {"evaluation": {"every_epochs": 1000.0}, "checkpoint": {"every_epochs": 1.0}}
    layout = {"exact": True, "max_micro_batch": 8}
    (folder / "job.toml").write_text(tomli_w.dumps(job_tree(root, schedule=schedule, layout=layout, **sections)))
    write_program(
        folder,
        "gated",
        "from hvd_batchgrow.train.trainer import Trainer",
        "stop_requested, starts = Trainer._stop_requested, []",
        "def wait(self, stop):",
        "    starts.append(self.state.samples)",
        "    file = lambda name: self.folder.parent.parent / f'{self.folder.name}.{name}'",
        f"    at_gate = self.state.samples - starts[0] >= {GATE}",
        "    while at_gate and not stop.stop_requested and not file('open').exists():",
        "        if self.ranks.rank == 0:",
        "            file(f'{self.ranks.size}-at-gate').touch()",
        "        time.sleep(0.05)",
        "    if stop.stop_requested:",
        "        file(f'{self.ranks.size}-signalled').touch()",
        "    return stop_requested(self, stop)",
        "Trainer._stop_requested = wait",
    )
    return folder


@pytest.fixture(scope="module")
def digest(folder: Path) -> str:
    command = [str(BIN / "hvd-batchgrow"), "train", "job.toml", "--name", "alone"]
    subprocess.run(command, check=True, cwd=folder, env=ENVIRONMENT, capture_output=True, timeout=GUARD_S)
    return final_weights(folder / "runs/alone").digest


class Agents:
    """The agents of a run, each with one rank. They meet at a store of the test's process, so each may be killed."""

    def __init__(self, folder: Path, name: str, stack: ExitStack) -> None:
        self.folder, self.name, self._stack = folder, name, stack
        self.processes: list[subprocess.Popen[str]] = []
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def start(self) -> None:
        # A short wait for other agents, and a short one for agents that have died.
        conf = "is_host=0,last_call_timeout=1,keep_alive_interval=2,keep_alive_max_attempt=5"
        words = ["--nnodes", "1:3", "--nproc-per-node", "1", "--max-restarts", "20", "--local-addr", "127.0.0.1"]
        words += f"--rdzv-backend c10d --rdzv-endpoint 127.0.0.1:{self._store.port} --rdzv-conf {conf}".split()
        log = self._stack.enter_context(self._log(len(self.processes)).open("w"))
        command = [str(BIN / "torchrun"), *words, "gated.py", "train", "job.toml", "--name", self.name]
        self.processes.append(
            self._stack.enter_context(
                launched(command, cwd=self.folder, env=ENVIRONMENT | FOR_TORCHRUN, stdout=log, stderr=subprocess.STDOUT)
            )
        )

    def _log(self, agent: int) -> Path:
        return self.folder / f"{self.name}-{agent}.log"

    def text(self, agent: int) -> str:
        return self._log(agent).read_text()

    def attempts(self) -> list[int]:
        """The ranks of each attempt."""
        record = json.loads((self.folder / "runs" / self.name / "record.json").read_text())
        return [attempt["ranks"] for attempt in record["attempts"]]

    def samples(self) -> int:
        """The sample counter after the last recorded update."""
        last = json.loads((self.folder / "runs" / self.name / "consumed.jsonl").read_text().splitlines()[-1])
        return int(last["samples"] + last["global_batch"])

    def wait_for(self, event: str) -> None:
        """Wait for a file that the gated program makes: "2-at-gate", for instance."""
        deadline, file = time.monotonic() + GUARD_S, self.folder / f"{self.name}.{event}"
        while not file.exists():
            assert time.monotonic() < deadline, [self.text(agent) for agent in range(len(self.processes))]
            time.sleep(0.1)

    def open_gate(self) -> None:
        (self.folder / f"{self.name}.open").touch()

    def assert_done(self, agent: int) -> None:
        assert self.processes[agent].wait(GUARD_S) == 0, self.text(agent)


@contextmanager
def two_agents(folder: Path, name: str) -> Iterator[Agents]:
    with ExitStack() as stack:
        agents = Agents(folder, name, stack)
        agents.start()
        agents.wait_for("1-at-gate")
        agents.start()
        agents.wait_for("2-at-gate")
        yield agents


def assert_undisturbed(folder: Path, name: str, digest: str) -> None:
    assert final_weights(folder / "runs" / name).digest == digest
    assert audit(read_consumed(folder / "runs" / name), lambda *_: None).passed


def test_an_agent_that_joins_trains_too(folder: Path, digest: str) -> None:
    with two_agents(folder, "joined") as agents:
        agents.start()
        agents.wait_for("3-at-gate")
        agents.open_gate()
        for agent in range(3):
            agents.assert_done(agent)
        text = agents.text(0) + agents.text(1) + agents.text(2)
    assert "the run continues when torchrun starts the ranks again" in text
    assert "changed since the last attempt: ranks was 2, is 3" in text
    assert_undisturbed(folder, "joined", digest)


def worker_of(agent: subprocess.Popen[str]) -> int:
    (worker,) = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
    return int(worker)


def test_the_run_resumes_after_an_agent_is_killed_with_its_rank(folder: Path, digest: str) -> None:
    with two_agents(folder, "killed") as agents:
        worker = worker_of(agents.processes[0])
        agents.processes[0].kill()
        os.kill(worker, signal.SIGKILL)
        trained = agents.samples()
        agents.open_gate()
        agents.assert_done(1)
        text = agents.text(1)
    assert "another rank has ended or cannot be reached any more" in text
    assert "torchrun starts the ranks again" in text
    assert agents.attempts()[-2:] == [2, 1]
    resumed = int(text.split("resumed at ")[-1].split(" of")[0].replace(",", ""))
    assert resumed < trained
    assert_undisturbed(folder, "killed", digest)


def test_an_agent_that_receives_sigterm_leaves_after_a_checkpoint(folder: Path, digest: str) -> None:
    with two_agents(folder, "left") as agents:
        agents.processes[1].terminate()
        agents.wait_for("2-signalled")
        trained = agents.samples()
        agents.open_gate()  # for the rank that gets no signal
        agents.assert_done(0)
        text = agents.text(0)
    assert f"resumed at {trained + 16:,} of" in text, "both ranks stop after the next update"
    assert agents.attempts()[-2:] == [2, 1]
    assert_undisturbed(folder, "left", digest)


def test_one_torchrun_starts_its_ranks_again_without_variables(folder: Path, digest: str) -> None:
    """One torchrun serves all attempts from one store, in which the addresses of earlier ranks remain."""
    write_program(
        folder,
        "dies",
        "import os, signal",
        "from hvd_batchgrow.train.trainer import Trainer",
        "stop_requested = Trainer._stop_requested",
        "def die(self, stop):",
        f"    is_due = self.ranks.rank == 0 and self.state.samples >= {GATE}",
        "    if is_due and os.environ['TORCHELASTIC_RESTART_COUNT'] in '01':",
        "        os.kill(os.getpid(), signal.SIGKILL)",
        "    return stop_requested(self, stop)",
        "Trainer._stop_requested = die",
    )
    command = [
        str(BIN / "torchrun"),
        "--standalone",
        "--nproc-per-node",
        "2",
        "--max-restarts",
        "2",
        "dies.py",
        "train",
    ]
    command += ["job.toml", "--name", "again"]
    done = subprocess.run(
        command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=GUARD_S
    )
    assert done.returncode == 0, done.stderr
    assert_undisturbed(folder, "again", digest)
