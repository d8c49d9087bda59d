"""Restarts by torchrun in one process; tests/launch/test_torchrun_elastic.py has real ones."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hvd_batchgrow.cli import main
from hvd_batchgrow.cli import train as train_command
from hvd_batchgrow.comm.launcher_env import restarts_ranks, torchrun_agent
from hvd_batchgrow.comm.ranks import SingleRank
from hvd_batchgrow.messages.errors import ExitCode, JobError, RunError
from hvd_batchgrow.schedule.plan import compile_plan
from hvd_batchgrow.train.liveness.stop import StopRequest
from hvd_batchgrow.train.run.plan_for_ranks import plan_for_ranks, plan_to_write
from hvd_batchgrow.train.run.restart import is_restart, notes_on_restarts
from hvd_batchgrow.train.run.run_lock import RunLock
from hvd_batchgrow.train.update.engine import UpdateEngine
from hvd_batchgrow.verification.digest import final_weights
from tests.helpers import measured_job, small_job

AGENT = {"RANK": "0", "WORLD_SIZE": "1", "TORCHELASTIC_RESTART_COUNT": "0", "TORCHELASTIC_MAX_RESTARTS": "3"}
AGENT |= {"TORCHELASTIC_ERROR_FILE": "/torchelastic_a/none_b/attempt_0/0/error.json"}


class Restarting(SingleRank):
    restarts = True

    def __init__(self, size: int = 1) -> None:
        self.size = size


@pytest.mark.parametrize(
    ("changes", "restarts"),
    [
        ({}, True),
        ({"TORCHELASTIC_MAX_RESTARTS": "0"}, False),
        ({"TORCHELASTIC_MAX_RESTARTS": ""}, False),
        ({"WORLD_SIZE": ""}, False),  # not torchrun
    ],
)
def test_torchrun_restarts_ranks_if_max_restarts_is_above_0(changes: dict[str, str], restarts: bool) -> None:
    assert restarts_ranks(AGENT | changes) == restarts


def test_a_torchrun_process_has_one_name_for_all_that_it_starts() -> None:
    file = "/torchelastic_a/{}/attempt_{}/{}/error.json"
    first, later, other = (
        torchrun_agent(AGENT | {"TORCHELASTIC_ERROR_FILE": file.format(*place)})
        for place in (("none_b", 0, 0), ("none_b", 7, 3), ("none_c", 0, 0))
    )
    assert first == later != other
    assert first.endswith(":/torchelastic_a/none_b")
    assert torchrun_agent(AGENT | {"TORCHELASTIC_ERROR_FILE": ""}) == ""
    assert torchrun_agent({"TORCHELASTIC_ERROR_FILE": file.format("none_b", 0, 0)}) == ""


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"attempts": [{"agents": ["a"]}, {"agents": ["b", "c"]}]}, True),
        ({"attempts": [{"agents": ["b"]}, {"agents": ["d"]}]}, False),  # another launch has trained it since
        ({"attempts": [{"agents": ["b"]}, {}]}, False),
        ({"attempts": []}, False),
        ({"attempts": [None]}, False),
        ({"attempts": [{"agents": 5}]}, False),
        ([], False),
    ],
)
def test_a_restart_is_recognized_by_the_agents_of_the_last_attempt(tmp_path: Path, record: Any, expected: bool) -> None:
    assert not is_restart(tmp_path, ["b"])
    (tmp_path / "record.json").write_text(json.dumps(record))
    assert is_restart(tmp_path, ["b", "x"]) == expected
    assert not is_restart(tmp_path, [])


def test_a_damaged_record_shows_no_restart(tmp_path: Path) -> None:
    (tmp_path / "record.json").write_text('{"attempts":' + "[" * 100_000)
    assert not is_restart(tmp_path, ["b"])


def test_notes_on_a_shared_store_and_a_layout_that_was_changed() -> None:
    job = small_job()
    plan, _ = plan_for_ranks(job, Restarting(2))
    shared = AGENT | {"TORCHELASTIC_USE_AGENT_STORE": "True"}
    (note,) = notes_on_restarts(shared, plan, job, 2, resume=True)
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in note
    assert notes_on_restarts(shared | {"TORCHELASTIC_MAX_RESTARTS": "0"}, plan, job, 2, resume=False) == []
    assert notes_on_restarts(AGENT | {"TORCHELASTIC_USE_AGENT_STORE": "False"}, plan, job, 2, resume=True) == []
    (note,) = notes_on_restarts(AGENT, plan, job, 2, resume=False)
    assert note.startswith("add --resume auto")
    changed, _ = plan_for_ranks(job, Restarting(4))
    (note,) = notes_on_restarts(AGENT, changed, job, 4, resume=True)
    assert note == "the job's layout cannot be formed on 4 ranks: shares may be unequal, and ranks may be idle"


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make this process the only rank of a torchrun process that restarts it."""
    for name, value in AGENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("hvd_batchgrow.comm.backend.connect", lambda *_: Restarting())


@pytest.mark.slow
def test_an_attempt_of_the_same_torchrun_resumes_and_another_one_is_refused(
    job: str, launched: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, update, updates = Path("runs/small"), UpdateEngine.update, []

    def signalled(engine: UpdateEngine, *arguments: Any, **options: Any) -> Any:
        updates.append(1)
        if len(updates) == 5:
            signal.raise_signal(signal.SIGTERM)
        return update(engine, *arguments, **options)

    assert main(["train", job, "--name", "alone"]) == 0
    with monkeypatch.context() as patched:
        patched.setattr(UpdateEngine, "update", signalled)
        assert main(["train", job, "--overwrite"]) == 75
    assert "the run continues when torchrun starts the ranks again" in capsys.readouterr().err
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", "/torchelastic_a/none_OTHER/attempt_1/0/error.json")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert main(["train", job]) == 1
    assert "runs/small holds a run already: add --resume auto to resume it" in capsys.readouterr().err
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", AGENT["TORCHELASTIC_ERROR_FILE"])
    assert main(["train", job, "--overwrite"]) == 0
    # The stop is requested in update 5, so the ranks vote for it in update 6: 6 updates of 16 samples.
    assert "resumed at 96 of" in capsys.readouterr().err
    assert final_weights(run).digest == final_weights(Path("runs/alone")).digest
    starts = [attempt["start_samples"] for attempt in json.loads((run / "record.json").read_text())["attempts"]]
    assert starts == [0, 96]


def test_max_updates_is_refused_because_torchrun_would_train_on(
    job: str, launched: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", job, "--max-updates", "3"]) == 2
    assert "--max-updates: torchrun would start the ranks again" in capsys.readouterr().err
    assert not Path("runs").exists()


class WaitedFor(StopRequest):
    waited_s = 0.0

    def wait(self, timeout_s: float) -> None:
        self.waited_s += timeout_s


def test_only_a_rank_that_stops_waits_for_its_own_signal(launched: None, monkeypatch: pytest.MonkeyPatch) -> None:
    stop = WaitedFor()
    assert train_command._after_signal(ExitCode.DONE, stop) == ExitCode.DONE
    assert stop.waited_s == 0
    assert train_command._after_signal(ExitCode.STOPPED, stop) == ExitCode.STOPPED
    assert stop.waited_s > 0
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "0")
    waited_s = stop.waited_s
    train_command._after_signal(ExitCode.STOPPED, stop)
    assert stop.waited_s == waited_s


@pytest.mark.parametrize(("connecting", "code"), [(True, 75), (False, 7)])
def test_sigterm_ends_a_rank_that_is_not_connected_yet(connecting: bool, code: int) -> None:
    program = (
        "import os, signal, sys, time\n"
        "from hvd_batchgrow.train.liveness.stop import StopRequest\n"
        f"with StopRequest(connecting={connecting}) as stop:\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    stop.wait(60)\n"
        f"    time.sleep({60 * connecting})\n"  # until the thread has read the signal
        "    sys.exit(7 if stop.stop_requested else 8)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], check=False, env=os.environ, timeout=120)
    assert done.returncode == code


def ranks_of(num_ranks: int, **layout: Any) -> list[int]:
    """The ranks of each phase: of 2, 6, 12 and 12 ghost batches of 8, with micro-batches of at most 16."""
    job = small_job(layout=layout)
    plan, shown = plan_for_ranks(job, ranks := Restarting(num_ranks))
    assert shown.job == job
    assert plan_to_write(plan, shown, ranks) == shown
    assert plan.num_ranks <= num_ranks
    assert [phase.global_batch for phase in plan.schedule.phases] == [16, 48, 96, 96]
    assert shown.layouts == plan.layouts
    return [each.ranks for each in plan.layouts]


def test_any_number_of_ranks_has_a_plan() -> None:
    assert ranks_of(1) == [1, 1, 1, 1]
    assert ranks_of(2) == [2, 2, 2, 2]
    assert ranks_of(4) == [2, 4, 4, 4]  # with unequal shares of 6 ghost batches
    assert ranks_of(20) == [2, 6, 12, 12]
    for_four = {"grow_by": "ranks", "ranks_per_phase": [1, 2, 4, 4]}
    assert ranks_of(4, **for_four) == [1, 2, 4, 4]
    assert ranks_of(6, **for_four) == [1, 2, 4, 4]
    assert ranks_of(3, **for_four) == [2, 3, 3, 3]


def test_an_adaptive_job_uses_the_ranks_that_its_first_batch_can() -> None:
    plan, _ = plan_for_ranks(measured_job({"name": "norm_test"}), Restarting(5))
    assert {layout.ranks for layout in plan.layouts} == {2}


class Elastic(Restarting):
    restarts, elastic = False, True


@pytest.mark.parametrize("launch", [Restarting, Elastic])
def test_one_rank_measures_gradients_in_two_micro_batches(launch: type[Restarting]) -> None:
    """A batch of 16 is one micro-batch on one rank: two gradients need micro-batches of 8."""
    job = measured_job({"name": "norm_test"}, layout={"max_micro_batch": 16})
    plan, shown = plan_for_ranks(job, ranks := launch(1))
    assert shown.job == job
    assert plan_to_write(plan, shown, ranks) == shown
    assert (plan.layouts[0].ranks, plan.layouts[0].micro_batch, plan.layouts[0].accumulation) == (1, 8, 2)
    plan, _ = plan_for_ranks(job, launch(2))
    assert (plan.layouts[0].ranks, plan.layouts[0].micro_batch) == (2, 8)
    with pytest.raises(JobError, match="use 8, or 2 ranks"):
        plan_for_ranks(job, SingleRank())
    with pytest.raises(JobError, match="8 is one ghost batch, so an update has one gradient"):
        plan_for_ranks(measured_job({"name": "norm_test"}, schedule={"global_batch": 8}), launch(1))
    for cut in (
        small_job(layout={"max_micro_batch": 20}),
        measured_job({"name": "norm_test"}, layout={"max_micro_batch": 20}),
    ):
        with pytest.raises(JobError, match=r"max_micro_batch: 20 = 2\.50 ghost batches of 8"):
            plan_for_ranks(cut, launch(1))


@pytest.mark.parametrize(
    ("sections", "fault"),
    [
        ({"schedule": {"global_batch": 20}}, "never cut"),
        ({"layout": {"grow_by": "ranks", "ranks_per_phase": [1, 2]}}, "2 numbers for 4 phases"),
        ({"layout": {"grow_by": "auto"}}, "needs costs: --cost"),
    ],
)
def test_faults_that_have_nothing_to_do_with_the_number_of_ranks_are_reported(
    sections: dict[str, Any], fault: str
) -> None:
    with pytest.raises(JobError, match=fault):
        plan_for_ranks(small_job(**sections), Restarting(3))


def test_fixed_ranks_are_refused_as_before() -> None:
    fixed = Restarting(4)
    fixed.restarts = False
    with pytest.raises(JobError, match=r"2 ghost batches of 8 for 4 ranks"):
        plan_for_ranks(small_job(), fixed)
    assert plan_for_ranks(small_job(), SingleRank())[0] == compile_plan(small_job(), 1, 300)


def test_a_lock_that_is_released_meanwhile_is_taken(tmp_path: Path) -> None:
    with RunLock(tmp_path / "run") as before, RunLock(tmp_path / "run") as lock:
        before.take()
        reports = []

        def release(what: str, *_: Any) -> None:
            reports.append(what)
            before.__exit__(None, None, None)

        with pytest.raises(RunError, match="is being written by another job: process"):
            lock.take(release)
        assert not reports
        lock.take(release, wait_s=60)
        (report,) = reports
        assert f"is being written by another job: process {os.getpid()} on" in report


def test_a_job_whose_trigger_needs_two_micro_batches_has_a_plan_for_more_ranks_than_ghost_batches() -> None:
    trigger = {"name": "norm_test", "theta": 0.5, "first_decision_epoch": 0.0}
    job = measured_job(trigger, layout={"max_micro_batch": 16})
    for launched, used in ((1, 1), (2, 2), (3, 2), (4, 2)):
        plan, _ = plan_for_ranks(job, Restarting(launched))
        assert plan.peak_ranks == used


def test_a_start_that_was_killed_before_its_record_is_not_a_run(job: str) -> None:
    Path("runs/small").mkdir(parents=True)
    Path("runs/small/job.toml").write_text(Path(job).read_text())
    assert main(["train", job, "--max-updates", "1"]) == 75
