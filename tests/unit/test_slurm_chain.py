"""Submitting a chain and asking how it stands, with a scheduler that is not there."""

from __future__ import annotations

import hashlib
import json
import math
import signal
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from hvd_batchgrow.cli import main
from hvd_batchgrow.config import Job
from hvd_batchgrow.job_file import load_job
from hvd_batchgrow.messages.errors import RunError
from hvd_batchgrow.schedule.plan import compile_plan
from hvd_batchgrow.slurm.chain import Site, make_scripts, open_chain, submit_chain, table_lines, trouble_lines
from hvd_batchgrow.slurm.chain_jobs import ChainJob, make_chain_jobs
from hvd_batchgrow.slurm.ledger import Ledger, read_ledger, submitting, update_ledger, write_ledger
from hvd_batchgrow.slurm.render import ARGUMENTS
from hvd_batchgrow.slurm.scheduler import JobState, Scheduler, Slurm, run_command
from hvd_batchgrow.slurm.time_limit import limit_s
from hvd_batchgrow.storage.seal import seal_of
from tests.helpers import NUM_TRAIN, small_job

TEMPLATE = f"#!/bin/bash\n{ARGUMENTS}\n"


@dataclass
class FakeScheduler(Scheduler):
    """A scheduler that numbers jobs from 11, and refuses the given ones."""

    never: dict[str, str] = field(default_factory=dict)
    refused: str = ""
    known: dict[int, JobState] = field(default_factory=dict)
    of_name: dict[str, list[int]] = field(default_factory=dict)
    calls: list[tuple[str, object]] = field(default_factory=list)

    def refusal(self, script: Path) -> str | None:
        self.calls.append(("test", script.name))
        return self.never.get(script.name)

    def submit(self, script: Path, after: int | None) -> int:
        self.calls.append(("submit", (script.name, after)))
        assert script.exists()
        if script.name == self.refused:
            raise RunError("sbatch refuses: no more jobs")
        return 11 + sum(call == "submit" for call, _ in self.calls) - 1

    def submit_after_any(self, script: Path, after: Sequence[int]) -> int:
        raise NotImplementedError

    def queued(self, name: str) -> list[int]:
        return self.of_name.get(name, [])

    def task_states(self, job_ids: Iterable[int]) -> dict[str, JobState]:
        raise NotImplementedError

    def cancel(self, job_ids: Sequence[int]) -> None:
        self.calls.append(("cancel", list(job_ids)))

    def states(self, job_ids: Iterable[int]) -> dict[int, JobState]:
        return {job: self.known[job] for job in job_ids if job in self.known}


def links() -> tuple[Job, tuple[ChainJob, ...]]:
    job = small_job(layout={"grow_by": "ranks", "ranks_per_phase": [1, 2, 4, 4]})
    return job, make_chain_jobs(compile_plan(job, 4, NUM_TRAIN), 4, 1)


def submit(run: Path, scheduler: FakeScheduler, *, resume: bool = False) -> Ledger:
    job, chain = links()
    scripts = make_scripts(job, chain, run, Site(TEMPLATE, ("hvd-batchgrow",), {}))
    ledger = open_chain(run, chain, scheduler, resume=resume)
    return submit_chain(job, ledger, scripts, run, scheduler)


def save(run: Path, samples: int) -> Path:
    """Write a sealed file with the name of a checkpoint, and return its path."""
    path = run / "checkpoints" / f"samples-{samples:015d}.pt"
    path.write_bytes(b"weights" + seal_of(hashlib.sha256(b"weights")))
    return path


def test_every_link_is_asked_about_before_the_first_is_submitted(tmp_path: Path) -> None:
    run, scheduler = tmp_path / "small", FakeScheduler()
    ledger = submit(run, scheduler)
    names = [f"chain-job-{k}.sbatch" for k in (1, 2, 3)]
    submits = zip(names, [None, 11, 12], strict=True)
    assert scheduler.calls == [*(("test", name) for name in names), *(("submit", call) for call in submits)]
    assert [entry.job_id for entry in ledger.entries] == [11, 12, 13]
    assert read_ledger(run) == ledger
    assert load_job(run / "slurm" / "job.toml") == links()[0]
    assert table_lines(ledger)[2] == "chain job 3: phases 3-4 on 4 nodes, 4 ranks, samples 304 … 688: job 13 PENDING"


def test_what_could_never_run_is_reported_for_each_job_and_nothing_is_submitted(tmp_path: Path) -> None:
    scheduler = FakeScheduler(never={"chain-job-2.sbatch": "no such partition", "chain-job-3.sbatch": "too many nodes"})
    with pytest.raises(RunError) as caught:
        submit(tmp_path / "small", scheduler)
    assert str(caught.value).splitlines() == [
        "sbatch --test-only refuses this chain, and nothing is submitted:",
        "  chain job 2 (phases 2-2 on 2 nodes, 2 ranks): no such partition",
        "  chain job 3 (phases 3-4 on 4 nodes, 4 ranks): too many nodes",
    ]
    assert "submit" not in dict(scheduler.calls)
    assert read_ledger(tmp_path / "small") is None
    assert not [path for path in (tmp_path / "small").rglob("*") if path.suffix in {".toml", ".sbatch"}]


def test_a_link_that_is_refused_takes_those_before_it_back(tmp_path: Path) -> None:
    scheduler = FakeScheduler(
        refused="chain-job-3.sbatch", known={11: JobState("CANCELLED"), 12: JobState("CANCELLED")}
    )
    with pytest.raises(
        RunError, match=r"chain job 3: sbatch refuses: no more jobs\n.*cancelled the submitted jobs: 11 12"
    ):
        submit(tmp_path / "small", scheduler)
    assert scheduler.calls[-1] == ("cancel", [11, 12])
    left = read_ledger(tmp_path / "small")
    assert left is not None
    assert [entry.state for entry in left.entries] == ["CANCELLED", "CANCELLED", "NOT SUBMITTED"]


def test_a_chain_resumes_after_the_jobs_that_are_done(tmp_path: Path) -> None:
    run, scheduler = tmp_path / "small", FakeScheduler()
    submit(run, scheduler)
    with pytest.raises(RunError, match="holds a run already: add --resume auto"):
        submit(run, scheduler)
    scheduler.known = {11: JobState("COMPLETED"), 12: JobState("RUNNING"), 13: JobState("PENDING")}
    with pytest.raises(RunError, match="two chains cannot write it: scancel 12 13"):
        submit(run, scheduler, resume=True)
    (run / "checkpoints").mkdir()
    save(run, 160)  # where the first job ends
    scheduler.known = {12: JobState("FAILED"), 13: JobState("CANCELLED")}
    scheduler.calls.clear()
    again = submit(run, scheduler, resume=True)
    assert [entry.state for entry in again.entries] == ["DONE BEFORE", "PENDING", "PENDING"]
    assert [call for call in scheduler.calls if call[0] == "submit"] == [
        ("submit", ("chain-job-2.sbatch", None)),
        ("submit", ("chain-job-3.sbatch", 11)),
    ]


def test_a_job_whose_last_checkpoint_is_damaged_is_submitted_again(tmp_path: Path) -> None:
    """The defect: it counted as done, so that the next job found no checkpoint to begin from, again and again."""
    run, scheduler = tmp_path / "small", FakeScheduler()
    submit(run, scheduler)
    (run / "checkpoints").mkdir()
    save(run, 96)
    damaged = save(run, 160)
    damaged.write_bytes(damaged.read_bytes()[:-1])
    again = submit(run, scheduler, resume=True)
    assert [entry.state for entry in again.entries] == ["PENDING"] * 3
    save(run, 160)
    assert submit(run, scheduler, resume=True).entries[0].state == "DONE BEFORE"


def test_a_link_that_is_queued_again_after_it_had_failed_bars_a_second_chain(tmp_path: Path) -> None:
    run, scheduler = tmp_path / "small", FakeScheduler()
    over = {11: JobState("NODE_FAIL"), 12: JobState("CANCELLED"), 13: JobState("CANCELLED")}
    write_ledger(run, submit(run, scheduler).with_states(over))
    scheduler.known = {**over, 11: JobState("PENDING", "BeginTime", 1)}
    with pytest.raises(RunError, match="two chains cannot write it: scancel 11"):
        submit(run, scheduler, resume=True)


def test_a_ledger_that_cannot_be_written_takes_the_chain_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, scheduler = tmp_path / "small", FakeScheduler()

    def write(run: Path, ledger: Ledger) -> None:
        if len(ledger.live_ids()) == 2:
            raise RunError("ledger.json cannot be written: No space left on device")
        write_ledger(run, ledger)

    monkeypatch.setattr("hvd_batchgrow.slurm.chain.write_ledger", write)
    with pytest.raises(RunError, match=r"chain job 2: ledger.json cannot be .*\n  cancelled .* jobs: 11 12$"):
        submit(run, scheduler)
    assert scheduler.calls[-1] == ("cancel", [11, 12])


@dataclass
class KilledInSbatch(FakeScheduler):
    """The process ends while sbatch is at the second link."""

    def submit(self, script: Path, after: int | None) -> int:
        if after == 11:
            raise MemoryError
        return super().submit(script, after)


def test_a_kill_while_sbatch_is_asked_leaves_a_trace(tmp_path: Path) -> None:
    run = tmp_path / "small"
    with pytest.raises(MemoryError):
        submit(run, KilledInSbatch())
    left = read_ledger(run)
    assert left is not None
    assert [entry.state for entry in left.entries] == ["PENDING", "BEING SUBMITTED", "NOT SUBMITTED"]
    assert list(trouble_lines(left, run)) == [
        "chain jobs never submitted because submit was interrupted: 3",
        "submit was interrupted while it submitted chain job 2; if squeue --me --name=small shows it, scancel that job",
        "scancel 11, then repeat the command that submitted it, with --resume auto",
    ]


def test_a_job_that_a_killed_submit_may_have_left_in_the_queue_bars_a_second_chain(tmp_path: Path) -> None:
    run = tmp_path / "small"
    with pytest.raises(MemoryError):
        submit(run, KilledInSbatch())
    with pytest.raises(
        RunError,
        match=r"interrupted while it submitted chain job 2; squeue --me --name=small shows 12, .*: scancel 12$",
    ):
        submit(run, FakeScheduler(of_name={"small": [12]}), resume=True)
    assert submit(run, FakeScheduler(), resume=True).job_ids() == [11, 12, 13]


def test_status_does_not_write_a_ledger_that_submit_is_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "small"
    ledger = submit(run, FakeScheduler())
    fake_slurm(tmp_path / "bin", monkeypatch)
    (tmp_path / "bin" / "squeue").write_text("#!/bin/bash\necho 11 RUNNING 0 None\n")
    with submitting(run):
        main(["status", str(run)])
    assert "job 11 RUNNING" in capsys.readouterr().out
    assert read_ledger(run) == ledger
    newer = ledger.with_job(0, 14)
    write_ledger(run, newer)
    update_ledger(run, ledger, ledger.with_states({}))
    assert read_ledger(run) == newer
    update_ledger(run, newer, ledger)
    assert read_ledger(run) == ledger


def test_a_first_job_that_is_refused_leaves_nothing_to_resume(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"chain job 1: sbatch refuses: no more jobs$"):
        submit(tmp_path / "small", FakeScheduler(refused="chain-job-1.sbatch"))
    assert submit(tmp_path / "small", FakeScheduler()).job_ids() == [11, 12, 13]


def test_without_slurm_submit_leaves_no_files(
    job: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The defect: the job file, the scripts and the lock stayed, and `watch` waited for the run."""
    monkeypatch.setenv("PATH", "/nonexistent")
    assert main(["submit", job, "--nodes-max", "1"]) == 1
    assert "--dry-run prints what would be submitted" in capsys.readouterr().err
    assert not Path("runs/small").exists()


def test_status_reports_states_that_it_cannot_write(
    job: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The defect: on a read-only mount, or for another user's chain, it printed the error alone."""
    fake_slurm(tmp_path / "bin", monkeypatch)
    assert main(["submit", job, "--nodes-max", "4", *RANKS]) == 0
    lock = Path("runs/small/slurm/.submit.lock")
    lock.unlink()
    lock.mkdir()
    capsys.readouterr()
    assert main(["status", "runs/small"]) == 0
    out, err = capsys.readouterr()
    assert "job 2 RUNNING" in out
    assert err.startswith("note: runs/small/slurm/.submit.lock cannot be written: ")


def test_one_submit_at_a_time(job: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    words = ["submit", job, "--nodes-max", "1"]
    with submitting(Path("runs/small").absolute()):
        assert main(words) == 1
        assert (
            "runs/small is being submitted by another process: wait for it, then run status" in capsys.readouterr().err
        )
        assert main([*words, "--dry-run"]) == 0
    assert main(words) == 1
    assert "sbatch is not on PATH" in capsys.readouterr().err


def test_status_reports_chain_jobs_that_were_never_submitted(tmp_path: Path) -> None:
    run = tmp_path / "small"
    _, chain = links()
    ledger = open_chain(run, chain, None, resume=False).with_job(0, 11)
    assert list(trouble_lines(ledger, run)) == [
        "chain jobs never submitted because submit was interrupted: 2, 3",
        "scancel 11, then repeat the command that submitted it, with --resume auto",
    ]
    done = ledger.with_states({11: JobState("COMPLETED")})
    assert list(trouble_lines(done, run))[1] == "repeat the command that submitted it, with --resume auto"


def test_status_reports_the_first_failure_and_what_to_do(tmp_path: Path) -> None:
    ledger = submit(tmp_path / "small", FakeScheduler()).with_states(
        {
            11: JobState("COMPLETED", "", 2, "0:0"),
            12: JobState("FAILED", "NonZeroExitCode", 0, "1:0"),
            13: JobState("CANCELLED", "DependencyNeverSatisfied"),
        }
    )
    log = tmp_path / "small" / "slurm" / "small-12.out"
    log.write_text("".join(f"line {k}\n" for k in range(20)))
    assert [line.partition(": job ")[2] for line in table_lines(ledger)] == [
        "11 COMPLETED, requeued 2 ×",
        "12 FAILED, exit code 1",
        "13 CANCELLED, DependencyNeverSatisfied",
    ]
    assert list(trouble_lines(ledger, tmp_path / "small")) == [
        f"chain job 2 broke the chain: job 12 FAILED, exit code 1; the end of {log}:",
        *(f"  | line {k}" for k in range(12, 20)),
        "chain jobs waiting for it were cancelled: 3",
        "fix the cause, then repeat the command that submitted it, with --resume auto",
    ]


def test_what_slurm_has_forgotten_the_ledger_and_the_checkpoints_know(tmp_path: Path) -> None:
    before = submit(tmp_path / "small", FakeScheduler())
    known = {11: JobState("COMPLETED", "", 1, "0:0"), 12: JobState("RUNNING"), 13: JobState("PENDING")}
    ledger = before.with_states(known)
    assert list(trouble_lines(ledger, tmp_path)) == []
    write_ledger(tmp_path / "small", ledger)
    read = read_ledger(tmp_path / "small")
    assert read == ledger
    # The second link ends at sample 304.
    assert [entry.state for entry in read.with_states({}, 304).entries] == ["COMPLETED", "COMPLETED", "GONE"]
    assert [entry.state for entry in read.with_states({}, 303).entries] == ["COMPLETED", "GONE", "GONE"]
    gone = read.with_states({}, 303)
    assert gone.entries[0] == ledger.entries[0]
    log = tmp_path / "small" / "slurm" / "small-12.out"
    assert list(trouble_lines(gone, tmp_path / "small")) == [
        f"chain job 2 broke the chain: job 12 is unknown to Slurm by now; the end of {log}:",
        "  | cannot be read: No such file or directory",
        "chain jobs unknown to Slurm by now: 3",
        "fix the cause, then repeat the command that submitted it, with --resume auto",
    ]


def test_a_ledger_that_is_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "slurm" / "ledger.json").mkdir(parents=True)
    with pytest.raises(RunError) as caught:
        read_ledger(tmp_path)
    assert str(caught.value) == f"{tmp_path / 'slurm/ledger.json'} cannot be read: Is a directory"


@pytest.mark.parametrize("text", ["{", "[]", '{"format": 9}', '{"format": 1, "name": "x", "chain_jobs": [{"job": 1}]}'])
def test_a_damaged_ledger_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "ledger.json").write_text(text)
    with pytest.raises(RunError, match=r"ledger\.json (cannot be read|is of format 9)"):
        read_ledger(tmp_path)


# --- Slurm's own commands ----------------------------------------------------------------------


def answering(**answers: tuple[int, str, str]) -> tuple[Slurm, list[Sequence[str]]]:
    """Slurm with given answers to each command: code, output, errors."""
    asked: list[Sequence[str]] = []

    def run(words: Sequence[str]) -> subprocess.CompletedProcess[str]:
        asked.append(words)
        code, output, errors = answers[words[0]]
        return subprocess.CompletedProcess(words, code, output, errors)

    return Slurm(run), asked


def test_the_number_of_a_job_is_read_beside_the_name_of_its_cluster() -> None:
    slurm, asked = answering(sbatch=(0, "123;north\n", ""))
    assert slurm.submit(Path("a b.sbatch"), 7) == 123
    assert asked == [["sbatch", "--parsable", "--dependency=afterok:7", "--kill-on-invalid-dep=yes", "a b.sbatch"]]
    slurm, _ = answering(sbatch=(1, "", "sbatch: error: Batch job submission failed: Invalid account\n"))
    with pytest.raises(RunError, match="sbatch refuses x: Batch job submission failed: Invalid account"):
        slurm.submit(Path("x"), None)


def test_a_refusal_is_quoted_and_the_start_time_is_unknown() -> None:
    slurm, asked = answering(sbatch=(0, "", "sbatch: Job 9 to start at 2030-01-01T00:00:00 using 2 processors\n"))
    assert slurm.refusal(Path("x")) is None
    assert asked == [["sbatch", "--test-only", "x"]]
    slurm, _ = answering(sbatch=(1, "", "allocation failure: Node count specification invalid\n"))
    assert slurm.refusal(Path("x")) == "allocation failure: Node count specification invalid"


QUEUE = """\
12                      RUNNING                 1           None
13                      PENDING                 0           Dependency
11                      FAILED                  2           NonZeroExitCode
"""
# A job that was queued again has a line for each attempt; a cancelled one says by whom.
ACCOUNTS = "11|PENDING|0:0\n11|FAILED|75:0\n10|CANCELLED by 1000|0:15\n"


def test_states_come_from_the_queue_and_what_is_over_from_the_accounts() -> None:
    slurm, asked = answering(squeue=(0, QUEUE, ""), sacct=(0, ACCOUNTS, ""))
    assert slurm.states([10, 11, 12, 13]) == {
        10: JobState("CANCELLED", "", None, "0:15"),
        11: JobState("FAILED", "NonZeroExitCode", 2, "75:0"),
        12: JobState("RUNNING", "", 1),
        13: JobState("PENDING", "Dependency", 0),
    }
    assert "--jobs=10,11,12,13" in asked[0]
    assert asked[1][:2] == ["sacct", "-c"]
    assert "--jobs=10,11" in asked[1]
    assert slurm.states([]) == {}


def test_without_accounts_the_queue_is_enough_and_without_a_queue_nothing_is_known() -> None:
    no_accounts = (1, "", "Slurm accounting storage is disabled\n")
    slurm, asked = answering(squeue=(0, QUEUE, ""), sacct=no_accounts)
    assert slurm.states([11, 12])[11] == JobState("FAILED", "NonZeroExitCode", 2)
    assert [words[1] for words in asked[1:]] == ["-c", "-X"]  # the completion log, then the database
    slurm, _ = answering(squeue=(1, "", "slurm_load_jobs error: Invalid job id specified\n"), sacct=no_accounts)
    assert slurm.states([11]) == {}
    slurm, _ = answering(squeue=(1, "", "slurm_load_jobs error: Unable to contact slurm controller\n"))
    with pytest.raises(RunError, match="squeue: slurm_load_jobs error: Unable to contact"):
        slurm.states([11])


def test_jobs_that_the_completion_log_lacks_are_looked_up_in_the_database() -> None:
    accounts = {"-c": "11|FAILED|1:0\n", "-X": "12|COMPLETED|0:0\n"}
    asked = []

    def run(words: Sequence[str]) -> subprocess.CompletedProcess[str]:
        asked.append(words)
        return subprocess.CompletedProcess(words, 0, accounts[words[1]] if words[0] == "sacct" else "", "")

    assert Slurm(run).states([11, 12]) == {
        11: JobState("FAILED", "", None, "1:0"),
        12: JobState("COMPLETED", "", None, "0:0"),
    }
    assert asked[-1][:2] == ["sacct", "-X"]
    assert "--jobs=12" in asked[-1]


def test_jobs_of_a_name_are_found_in_the_queue() -> None:
    slurm, asked = answering(squeue=(0, "7\n7\n5\n", ""))
    assert slurm.queued("small") == [5, 7]
    assert asked == [["squeue", "--noheader", "--me", "--name=small", "--format=%F"]]


def test_without_slurm_the_missing_command_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RunError, match="sbatch is not on PATH: is this a login node of a Slurm cluster"):
        run_command(["sbatch"])


# --- the commands ------------------------------------------------------------------------------

RANKS = ["--layout.grow_by", "ranks", "--layout.ranks_per_phase", "[1,2,4,4]"]


def test_a_job_that_does_not_grow_by_ranks_is_one_link_and_hears_so(
    job: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["submit", job, "--nodes-max", "2", "--dry-run"]) == 0
    report = capsys.readouterr()
    assert "layout.grow_by = 'accumulation': one job runs all phases on 2 ranks" in report.err
    assert report.out.count("#!/usr/bin/env bash") == 1
    assert "--phases 1-4)" in report.out


def test_a_dry_run_prints_all_and_does_nothing(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["submit", job, "--nodes-max", "2", "--ranks-per-node", "2", "--dry-run", *RANKS]
    assert main([*words, "--partition", "gpu", "--time", "2:00", "--signal-delay-s", "60"]) == 0
    text = capsys.readouterr().out
    assert text.count("#!/usr/bin/env bash") == 3
    assert text.count("#SBATCH --partition=gpu\n#SBATCH --time=2:00\n#SBATCH --signal=B:USR2@60\n") == 3
    assert text.count("#SBATCH --nodes=2\n#SBATCH --ntasks-per-node=2") == 1
    assert f"--runs-dir {Path.cwd()}/runs --resume auto --phases 3-4)" in text
    assert (
        "\n# chain job 3: phases 3-4 on 2 nodes, 4 ranks, samples 304 … 688: not submitted\nsbatch --test-only " in text
    )
    assert '\njob_3=$(sbatch --parsable --dependency=afterok:"$job_2" --kill-on-invalid-dep=yes ' in text
    assert not Path("runs").exists()


def test_a_reason_that_all_jobs_have_is_stated_once(tmp_path: Path) -> None:
    """The defect: an unreachable controller was a chain that could never run, once for each of its jobs."""
    reason = "Unable to contact slurm controller (connect failure)"
    scheduler = FakeScheduler(never={f"chain-job-{k}.sbatch": reason for k in (1, 2, 3)})
    with pytest.raises(RunError) as caught:
        submit(tmp_path / "small", scheduler)
    assert str(caught.value) == f"sbatch --test-only refuses this chain, and nothing is submitted: {reason}"


def test_a_run_with_other_settings_is_not_done(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The defect: a run that had finished with another learning rate was "done"."""
    assert main(["train", job]) == 0
    words = ["submit", job, "--nodes-max", "1", "--resume", "auto", "--dry-run"]
    assert main(words) == 0
    assert "runs/small is done: there is nothing to submit" in capsys.readouterr().out
    assert main([*words, "--optim.lr", "0.5"]) == 1
    error = capsys.readouterr().err
    assert (
        "cannot be resumed: these settings affect the weights and have changed:\n  optim.lr: was 0.05, is 0.5" in error
    )


def test_status_of_a_file_says_that_it_is_not_a_folder(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", job]) == 1
    assert f"{job} is not a folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--nodes-max", "4"], 1, "is this a login node of a Slurm cluster? --dry-run prints what would be submitted"),
        (["--nodes-max", "0", "--signal-delay-s", "0"], 2, "--signal-delay-s: must be greater than 0"),
        (["--nodes-max", "2"], 2, "phase 3 (from epoch 1): 4 ranks = 4 nodes of 1, and --nodes-max is 2"),
        (["--nodes-max", "4", "--template", "mine.sbatch"], 2, "--template: mine.sbatch does not exist"),
        (
            ["--nodes-max", "4", "--time", "2h"],
            2,
            "--time: must be minutes, minutes:seconds, hours:minutes:seconds, days-hours, days-hours:minutes or "
            "days-hours:minutes:seconds, got '2h'; nearest: 2:00:00",
        ),
        (
            ["--nodes-max", "4", "--time", "1:00"],
            2,
            "--time: 1:00 is 60 seconds, and the run is signalled to save and stop 120 s earlier; use a longer limit",
        ),
        (["--nodes-max", "4", "--signal-delay-s", "14400"], 2, "--time: 04:00:00 is 14,400 seconds, and the run is"),
        (["--nodes-max", "4", "--mem", "16G"], 2, "--mem: unknown option; an option of sbatch: --sbatch mem=16G"),
        (["--nodes-max", "4", "--exclusive", "--dry-run"], 2, "an option of sbatch: --sbatch exclusive\n"),
        (["--nodes-max", "4", "--tme", "10"], 2, "--tme: unknown option; did you mean --time?"),
        (
            ["--nodes-max", "4", "--time", "2:00", "--sbatch", "time=9:00:00", "--dry-run"],
            2,
            "--sbatch: time is also given as --time: remove one of the two",
        ),
        (["--nodes-max", "4", "--sbatch", "nodes=9"], 2, "--sbatch: nodes is set by submit: --nodes-max, and"),
        (["--nodes-max", "4", "--sbatch", "output=x"], 2, "output is set by submit: --runs-dir, the logs are"),
        (["--nodes-max", "4", "--partition", "a\nb", "--dry-run"], 2, "--partition: a line of a batch script cannot"),
        (["--nodes-max", "4", "--name", "a b", "--dry-run"], 2, "name: must be a name of at most 200 letters"),
        (
            ["--nodes-max", "4", "--name", "a\n#SBATCH -x", "--dry-run"],
            2,
            "name: must be a name of at most 200 letters",
        ),
        (["--nodes-max", "4", "--name", "a\n", "--dry-run"], 2, "name: must be a name of at most 200 letters"),
    ],
)
def test_what_cannot_be_submitted_says_why(
    job: str,
    words: list[str],
    code: int,
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    assert main(["submit", job, *words, *RANKS]) == code
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        *(("30", 1800), ("1:30", 90), ("2:00:00", 7200), ("1-12", 129_600), ("1-0:30", 88_200), ("1-0:0:5", 86_405)),
        *(("0", math.inf), ("UNLIMITED", math.inf), ("2h", None), ("", None), ("1:2:3:4", None), ("1-", None)),
    ],
)
def test_a_time_limit_of_slurm_in_seconds(text: str, seconds: float | None) -> None:
    assert limit_s(text) == seconds


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "template is not a file"), (b"#!\xff", "template cannot be read: not UTF-8 at byte 2")],
)
def test_a_template_that_is_not_text_is_reported(
    job: str, tmp_path: Path, content: bytes | None, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    template = tmp_path / "template"
    template.write_bytes(content) if content else template.mkdir()
    assert main(["submit", job, "--nodes-max", "4", "--dry-run", *RANKS, "--template", str(template)]) == 2
    assert f"--template: {template.parent}/{message}" in capsys.readouterr().err


def fake_slurm(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands on PATH: sbatch counts from 1 and writes down what it was given; nothing else is known."""
    folder.mkdir()
    (folder / "sbatch").write_text(
        '#!/bin/bash\ncd "$(dirname "$0")"; printf "%s\\n" "$*" >>calls\n'
        "case $1 in --parsable) echo >>count; wc -l <count;; esac\n"
    )
    (folder / "squeue").write_text(
        '#!/bin/bash\nprintf "%s\\n" "1 COMPLETED 0 None" "2 RUNNING 1 None" "3 PENDING 0 Dependency"\n'
    )
    (folder / "sacct").write_text("#!/bin/bash\nexit 1\n")
    for path in folder.iterdir():
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def test_submit_and_status_with_commands_on_path(
    job: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_slurm(tmp_path / "bin", monkeypatch)
    assert main(["submit", job, "--nodes-max", "4", *RANKS, "--seed", "3"]) == 0
    assert "hvd-batchgrow status runs/small" in capsys.readouterr().out
    calls = (tmp_path / "bin" / "calls").read_text().splitlines()
    assert [call.split()[0] for call in calls] == ["--test-only"] * 3 + ["--parsable"] * 3
    assert load_job(Path("runs/small/slurm/job.toml")).seed == 3
    assert main(["status", "runs/small"]) == 0
    link_2 = capsys.readouterr().out.splitlines()[1]
    assert link_2.endswith("job 2 RUNNING, requeued 1 ×")
    states = [link["state"] for link in json.loads(Path("runs/small/slurm/ledger.json").read_text())["chain_jobs"]]
    assert states == ["COMPLETED", "RUNNING", "PENDING"]
    assert main(["status", "."]) == 1
    assert "holds no chain" in capsys.readouterr().err
    monkeypatch.setenv("PATH", "/nonexistent")
    assert main(["status", "runs/small"]) == 1
    report = capsys.readouterr()
    assert report.out.splitlines() == [
        "chain job 1: phases 1-1 on 1 node, 1 rank, samples 0 … 160: job 1 COMPLETED",
        "chain job 2: phases 2-2 on 2 nodes, 2 ranks, samples 160 … 304: job 2 RUNNING, requeued 1 ×",
        "chain job 3: phases 3-4 on 4 nodes, 4 ranks, samples 304 … 688: job 3 PENDING, Dependency",
        "newest checkpoint: 0 of 688 samples",
    ]
    assert report.err == "squeue is not available: this is the ledger as submit or status last wrote it\n"


def test_variables_of_sbatch_do_not_override_the_command_line(
    job: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_slurm(tmp_path / "bin", monkeypatch)
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.write_text(sbatch.read_text().replace('"$*" >>', '"${!SBATCH_*}" >>'))
    for name in ("PARTITION", "QOS", "OUTPUT"):
        monkeypatch.setenv(f"SBATCH_{name}", "x")
    words = ["submit", job, "--nodes-max", "4", "--partition", "gpu", *RANKS]
    assert main([*words, "--dry-run"]) == 0
    assert "\nunset SBATCH_OUTPUT SBATCH_PARTITION\nsbatch --test-only " in capsys.readouterr().out
    assert main(words) == 0
    assert (tmp_path / "bin" / "calls").read_text().splitlines() == ["SBATCH_QOS"] * 6  # three tests, three jobs


@pytest.mark.parametrize("number", ["INT", "TERM", "HUP"])
def test_a_submit_that_is_interrupted_takes_back_what_slurm_has(
    job: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: str
) -> None:
    fake_slurm(tmp_path / "bin", monkeypatch)
    sbatch = tmp_path / "bin" / "sbatch"
    report = f'[ "$(wc -l <count)" = 1 ] || {{ kill -{number} $PPID; exit 1; }}; wc -l <count'
    sbatch.write_text(sbatch.read_text().replace("wc -l <count", report))
    (tmp_path / "bin" / "scancel").write_text('#!/bin/bash\necho "$*" >"$(dirname "$0")/cancelled"\n')
    (tmp_path / "bin" / "scancel").chmod(0o755)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # which `nohup … &` takes away
    assert main(["submit", job, "--nodes-max", "4", *RANKS]) == 1
    signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err.splitlines() == [
        "chain job 2: interrupted during sbatch: squeue --me shows whether Slurm has accepted the job",
        "  cancelled the submitted jobs: 1",
    ]
    assert (tmp_path / "bin" / "cancelled").read_text() == "1\n"


def test_a_link_trains_where_its_scripts_lie_already(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("runs/small/slurm").mkdir(parents=True)
    assert main(["train", job, "--phases", "1-2"]) == 0
    assert "small: these phases are done: 13 of 17 updates, 304 samples" in capsys.readouterr().err
    assert main(["train", job, "--phases", "3-4", "--resume", "auto"]) == 0
    assert "resumed at 304 of 688 samples" in capsys.readouterr().err
    assert main(["train", job, "--phases", "1-2", "--resume", "auto"]) == 0  # done long ago
    assert main(["train", job, "--name", "whole"]) == 0
    assert main(["digest", "runs/small", "runs/whole"]) == 0
    assert capsys.readouterr().out.endswith("bit-identical\n")


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--phases", "2"], 2, "--phases: must be FIRST-LAST such as 1-2, got '2'"),
        (["--phases", "3-9"], 2, "--phases: there is no 3-9 of the 4 phases 1-4 of this job"),
        (["--phases", "2-1"], 2, "--phases: there is no 2-1"),
        (
            ["--phases", "1-2", *RANKS],
            2,
            "--phases: 1-2 are planned for 1, 2 ranks, but the run has 1 rank: train phases",
        ),
        (["--phases", "2-2", *RANKS], 2, "--phases: 2-2 are planned for 2 ranks, but the run has 1 rank: launch 2"),
        (
            ["--phases", "2-2"],
            1,
            "--phases 2-2 begin at sample 160, but runs/small is at 0: train the phases before",
        ),
    ],
)
def test_phases_that_cannot_be_trained_say_why(
    job: str, words: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", job, *words]) == code
    assert message in capsys.readouterr().err


def test_a_comparison_takes_no_phases(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["twin", job, "--phases", "1-1"]) == 2
    assert "--phases: a comparison needs all phases of both runs" in capsys.readouterr().err
