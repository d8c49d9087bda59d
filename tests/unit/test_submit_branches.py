"""Branches as an array of Slurm jobs: scripts, what is submitted when, and errors, with stand-ins for Slurm."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from hvd_batchgrow.cli import main
from hvd_batchgrow.cli.submit_branches import width_of
from hvd_batchgrow.messages.errors import JobError
from hvd_batchgrow.schedule.plan import compile_plan
from hvd_batchgrow.slurm.branch_jobs import BranchArray
from hvd_batchgrow.slurm.branch_ledger import Submission, read_submissions, write_submissions
from hvd_batchgrow.slurm.chain import Site
from hvd_batchgrow.slurm.ledger import submitting
from hvd_batchgrow.slurm.render import ARGUMENTS, COMMAND, PROGRAM
from hvd_batchgrow.train.run.branch_folders import set_up
from tests.helpers import NUM_TRAIN, small_job

ROOT = Path(__file__).parents[2]
GOLDEN = Path(__file__).parent / "golden"
NASTY = 'it\'s "my" run $(touch stolen) `y` 100% #1; rm *'
RUN = Path("runs/small")
OPTIONS = ["--at", "160", "--factors", "1,2,4", "--samples", "3072"]
SUBMIT = ["submit", str(RUN), "--branch", *OPTIONS]
FOLDER = RUN / "branches/at-160-for-3072-linear"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What planning reads of a finished run on 2 ranks: batches of 48 follow the checkpoint at sample 160."""
    monkeypatch.chdir(tmp_path)
    job = small_job()
    (RUN / "checkpoints").mkdir(parents=True)
    (RUN / "plan.json").write_text(json.dumps(compile_plan(job, 1, NUM_TRAIN).to_dict()))
    (RUN / "job.toml").write_text(tomli_w.dumps(job.model_dump(mode="json", exclude_none=True)))
    (RUN / "checkpoints" / f"samples-{160:015d}.pt").touch()
    times = [{"samples": 48 * k, "updates": k, "global_batch": 48, "ranks": 2, "samples_per_s": 48.0} for k in (1, 2)]
    (RUN / "metrics.jsonl").write_text("".join(json.dumps({"kind": "train", **time}) + "\n" for time in times))
    write_attempt(RUN, ranks=2, hosts=1)
    return RUN


def write_attempt(run: Path, **attempt: Any) -> None:
    hosts = attempt.pop("hosts")
    record = {"attempts": [{**attempt, "hardware": {"gpus_per_host": [0] * hosts}}]}
    (run / "record.json").write_text(json.dumps(record))


def finish(*factors: int) -> None:
    """Write what shows that branches are trained."""
    for branch in set_up(RUN, 160, (1, 2, 4), 3072, None, 1).branches:
        if branch.factor in factors:
            (branch.folder / "checkpoints").mkdir(parents=True)
            (branch.folder / "checkpoints" / f"samples-{3232:015d}.pt").touch()
            tree = branch.plan.job.model_dump(mode="json", exclude_none=True)
            (branch.folder / "job.toml").write_text(tomli_w.dumps(tree))


Calls = Callable[[], list[list[str]]]


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Commands on PATH: sbatch counts from 11, squeue prints the file `queue`; returns how sbatch was called."""
    folder = tmp_path / "bin"
    folder.mkdir()
    write_down = '#!/bin/bash\ncd "$(dirname "$0")"; printf "%s\\0" "$@" END >>"$(basename "$0").calls"\n'
    (folder / "sbatch").write_text(f"{write_down}case $1 in --parsable) echo >>n; echo $((10 + $(wc -l <n)));; esac\n")
    (folder / "scancel").write_text(write_down)
    (folder / "squeue").write_text('#!/bin/bash\ncat "$(dirname "$0")/queue"\n')
    (folder / "queue").touch()
    for path in folder.iterdir():
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    before = 0

    def since_last() -> list[list[str]]:
        nonlocal before
        text = (folder / "sbatch.calls").read_text() if (folder / "sbatch.calls").exists() else ""
        found = [call.split("\0")[:-1] for call in text.split("END\0")[:-1]]
        new, before = found[before:], len(found)
        return new

    return since_last


def queue(*lines: str) -> None:
    Path("bin/queue").write_text("".join(f"{line}\n" for line in lines))


SCRIPTS = [str(Path("slurm") / name) for name in ("branches.sbatch", "table.sbatch")]


def words_of(folder: Path, *dependencies: int) -> list[list[str]]:
    """How sbatch is called for both scripts."""
    array, table = (str(folder.absolute() / script) for script in SCRIPTS)
    after = ":".join(map(str, dependencies))
    return [
        ["--test-only", array],
        ["--test-only", table],
        ["--parsable", array],
        ["--parsable", f"--dependency=afterany:{after}", table],
    ]


# --- scripts -----------------------------------------------------------------------------------


def scripts_of(template: str) -> list[str]:
    run = f"/data/{NASTY}/small"
    words = (run, "--at", "160", "--factors", "1,2,4")
    folder = Path(run) / "branches/at-160-for-3072-linear"
    array = BranchArray(folder, "small", (*words, "--tolerance", "0.1"), words, (2, 4), 2, 4)
    site = Site(template, ("/opt/my python", "-m", "hvd_batchgrow.cli"), {"partition": "gpu", "time": "1:00:00"})
    return [script.text for script in array.scripts(site)]


def test_the_scripts_are_these_texts() -> None:
    for name, text in zip(("branches", "table"), scripts_of((ROOT / "slurm/train.sbatch").read_text()), strict=True):
        assert text == (GOLDEN / f"{name}.txt").read_text()


@pytest.mark.parametrize(("template", "launcher"), [("train.sbatch", "srun"), ("train-mpirun.sbatch", "mpirun")])
def test_a_task_trains_the_branch_of_its_index(tmp_path: Path, template: str, launcher: str) -> None:
    (tmp_path / launcher).write_text('#!/bin/bash\nprintf "%s\\0" "$@" >>"$0.call"\n')
    (tmp_path / launcher).chmod(0o755)
    task = {"SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "4"}
    environment = {**os.environ, **task, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    program = ["/opt/my python", "-m", "hvd_batchgrow.cli", "branch", f"/data/{NASTY}/small"]
    options = ["--at", "160", "--factors", "1,2,4"]
    ends = [["--only", "4"], ["--tolerance", "0.1", "--table"]]
    for text, last in zip(scripts_of((ROOT / "slurm" / template).read_text()), ends, strict=True):
        (tmp_path / f"{launcher}.call").unlink(missing_ok=True)
        said = subprocess.run(
            ["bash", "-c", text], check=True, cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        words = [*program, *options, *last]
        assert (tmp_path / f"{launcher}.call").read_text().split("\0")[-len(words) - 1 : -1] == words
        assert "job 7_4, start 1: ends with code 0" in said.stdout
    assert {path.name for path in tmp_path.iterdir()} == {launcher, f"{launcher}.call"}


@pytest.mark.parametrize("lines", [[ARGUMENTS], [COMMAND, COMMAND, ARGUMENTS]])
def test_a_template_that_runs_train_only_is_refused(lines: list[str]) -> None:
    with pytest.raises(JobError, match=r'must have this line once, and run .* "\$command" .*: command=train'):
        scripts_of("\n".join(["#!/bin/bash", PROGRAM, *lines]))


# --- what is submitted -------------------------------------------------------------------------


def test_an_array_and_its_table_are_submitted(run: Path, calls: Calls, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SUBMIT, "--tolerance", "0.5", "--gres", "gpu:2", "--sbatch", "qos=long"]) == 0
    assert calls() == words_of(FOLDER, 11)
    assert capsys.readouterr().out.splitlines() == [
        "k = 1: job 11_1",
        "k = 2: job 11_2",
        "k = 4: job 11_4",
        f"table: job 12, when all of them have ended: {FOLDER}/slurm/small-table-12.out",
        "hvd-batchgrow status runs/small",
    ]
    assert read_submissions(FOLDER) == (Submission((1, 2, 4), 11, 12),)
    array, table = ((FOLDER / script).read_text() for script in SCRIPTS)
    own = ["--nodes=1", "--ntasks-per-node=2", "--array=1,2,4", f"--output={FOLDER.absolute()}/slurm/%x-%A_%a.out"]
    assert all(f"#SBATCH {option}\n" in array for option in [*own, "--gres=gpu:2", "--qos=long"])
    words = f"{run.absolute()} --at 160 --factors 1,2,4 --samples 3072"
    assert f'arguments=({words} --only "$SLURM_ARRAY_TASK_ID")\n' in array
    own = ["--nodes=1", "--ntasks-per-node=1", "--time=00:10:00", f"--output={FOLDER.absolute()}/slurm/%x-%j.out"]
    assert all(f"#SBATCH {option}\n" in table for option in own)
    assert "--array" not in table
    assert f"arguments=({words} --tolerance 0.5 --table)\n" in table


def test_only_what_is_missing_is_submitted_again(run: Path, calls: Calls, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(SUBMIT) == 0
    calls()
    capsys.readouterr()
    waiting = "12 PENDING 0 Dependency"
    queue("11_1 RUNNING 0 None", "11_2 RUNNING 1 None", "11_4 PENDING 0 Resources", waiting)
    table = f"hvd-batchgrow branch runs/small {' '.join(OPTIONS)} --table"
    assert main(SUBMIT) == 0
    assert capsys.readouterr().out.splitlines() == [
        "nothing to submit: jobs 11_1, 11_2, 11_4 are waiting or running already",
        f"the table will be in {FOLDER}/slurm/small-table-12.out",
        "to print it when all of them have ended:",
        table,
    ]
    finish(1)
    queue("11_1 COMPLETED 0 None", "11_2 RUNNING 1 None", "11_4 FAILED 0 NonZeroExitCode", waiting)
    assert calls() == []
    assert main(SUBMIT) == 0
    # The new table also waits for the old one, which writes the same files.
    assert calls() == words_of(FOLDER, 13, 11, 12)
    assert "#SBATCH --array=4\n" in (FOLDER / SCRIPTS[0]).read_text()
    assert capsys.readouterr().out.splitlines()[:4] == [
        "k = 1: trained already",
        "k = 2: job 11_2, submitted before",
        "k = 4: job 13_4",
        f"table: job 14, when all of them have ended: {FOLDER}/slurm/small-table-14.out",
    ]
    finish(2, 4)
    assert main(SUBMIT) == 0
    assert capsys.readouterr().out == f"nothing to submit: all branches are trained; to print their table:\n{table}\n"
    assert calls() == []


def test_a_dry_run_prints_costs_scripts_and_commands(
    run: Path, calls: Calls, capsys: pytest.CaptureFixture[str]
) -> None:
    finish(1)
    assert main([*SUBMIT, "--nodes-max", "2", "--ranks-per-node", "1", "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert calls() == []
    assert not (FOLDER / "slurm").exists()
    # Updates of 48 samples on 2 ranks took a second, so 3,072 samples on 2 ranks take 64 s for every batch.
    rows = {line.split()[0]: line.split() for line in text.splitlines() if line[:3].strip() in {"1", "2", "4"}}
    assert rows["1"][-1] == "trained"
    assert rows["2"] == ["2", "96", "0.1", "32", "2", "1:04", "min", "0.0356"]
    assert rows["4"] == ["4", "192", "0.2", "16", "2", "1:04", "min", "0.0356"]
    assert text.count("#!/usr/bin/env bash") == 2
    assert text.count("#SBATCH --nodes=2\n#SBATCH --ntasks-per-node=1\n#SBATCH --ntasks=2\n#SBATCH --array=2,4\n") == 1
    lines = text.splitlines()[-4:]
    (FOLDER / "slurm").mkdir()
    subprocess.run(["bash", "-c", "\n".join(lines)], check=True)
    assert calls() == words_of(FOLDER, 11)
    finish(2, 4)
    assert main([*SUBMIT, "--dry-run"]) == 0
    assert (
        capsys.readouterr().out.splitlines()[-2] == "nothing to submit: all branches are trained; to print their table:"
    )


def test_an_array_without_a_table_is_cancelled(run: Path, calls: Calls, capsys: pytest.CaptureFixture[str]) -> None:
    sbatch = Path("bin/sbatch")
    refused = 'case "$*" in *afterany*) echo "sbatch: error: no more jobs" >&2; exit 1;; esac\n'
    sbatch.write_text(sbatch.read_text().replace("case $1", f"{refused}case $1"))
    assert main(SUBMIT) == 1
    error = capsys.readouterr().err
    assert "table.sbatch: no more jobs\n  cancelled the submitted jobs: 11\n" in error
    assert main(SUBMIT) == 1  # squeue does not know 11 any more: nothing holds up another submit
    assert Path("bin/scancel.calls").read_text().split("END\0")[:-1] == ["11\0", "12\0"]


def test_what_slurm_could_never_run_is_not_submitted(
    run: Path, calls: Calls, capsys: pytest.CaptureFixture[str]
) -> None:
    sbatch = Path("bin/sbatch")
    sbatch.write_text(f'{sbatch.read_text()}case "$*" in *test-only*branches*) echo "bad array" >&2; exit 1;; esac\n')
    assert main(SUBMIT) == 1
    report = "sbatch --test-only refuses these scripts, and nothing is submitted: bad array\n"
    assert report in capsys.readouterr().err
    assert [call[0] for call in calls()] == ["--test-only", "--test-only"]
    assert read_submissions(FOLDER) == ()


def test_an_interrupted_submit_cancels_the_array(run: Path, calls: Calls, capsys: pytest.CaptureFixture[str]) -> None:
    sbatch = Path("bin/sbatch")
    stopped = 'case "$*" in *afterany*) kill -TERM $PPID; exit 1;; esac\n'
    sbatch.write_text(sbatch.read_text().replace("case $1", f"{stopped}case $1"))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    assert main(SUBMIT) == 1
    signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err.splitlines() == [
        "interrupted during sbatch: squeue --me shows whether Slurm has accepted a job",
        "  cancelled the submitted jobs: 11",
    ]


def test_one_submit_of_the_same_branches_at_a_time(run: Path, calls: Calls, capsys: pytest.CaptureFixture[str]) -> None:
    with submitting(FOLDER):
        assert main(SUBMIT) == 1
    assert f"{FOLDER} is being submitted by another process: wait for it, then run status" in capsys.readouterr().err
    assert calls() == []


def test_a_run_folder_may_be_the_working_directory(
    run: Path, calls: Calls, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(run)
    assert main(["submit", ".", "--branch", *OPTIONS]) == 0
    log = "branches/at-160-for-3072-linear/slurm/small-table-12.out"
    assert f": {log}\n" in capsys.readouterr().out
    assert "#SBATCH --job-name=small-table\n" in (FOLDER.relative_to(RUN) / SCRIPTS[1]).read_text()
    main(["status", "."])
    assert f"log: {log}\n" in capsys.readouterr().out


# --- status ------------------------------------------------------------------------------------


def test_status_prints_the_jobs_of_branches(run: Path, calls: Calls, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", str(run)]) == 1
    assert "holds no chain" in capsys.readouterr().err
    assert main(SUBMIT) == 0
    finish(1)
    capsys.readouterr()
    queue("11_2 RUNNING 1 None", "11_4 PENDING 0 Resources", "12 PENDING 0 Dependency")
    assert main(["status", str(run)]) == 0
    log = f"log: {FOLDER}/slurm/small-table-12.out"
    assert capsys.readouterr().out.splitlines() == [
        f"branches in {FOLDER}:",
        "  k = 1: trained",
        "  k = 2: job 11_2 RUNNING, requeued 1 ×",
        "  k = 4: job 11_4 PENDING, Resources",
        f"  table: job 12 PENDING, Dependency; {log}",
    ]
    queue("11_2 FAILED 0 NonZeroExitCode", "12 FAILED 0 NonZeroExitCode")
    assert main(["status", str(run)]) == 1
    assert capsys.readouterr().out.splitlines()[2:] == [
        "  k = 2: job 11_2 FAILED",
        "  k = 4: job 11_4 is unknown to Slurm by now",
        f"  table: job 12 FAILED; {log}",
        f"k = 2 is not trained; see {FOLDER}/slurm/small-branches-11_2.out",
        f"k = 4 is not trained; see {FOLDER}/slurm/small-branches-11_4.out",
        "fix the cause, then repeat the command that submitted the branches: it submits only these",
    ]


def test_a_table_job_that_fails_is_reported_although_an_older_table_exists(
    run: Path, calls: Calls, capsys: pytest.CaptureFixture[str]
) -> None:
    FOLDER.mkdir(parents=True)
    for name in ("table.txt", "table.json"):
        (FOLDER / name).touch()
    assert main(SUBMIT) == 0
    finish(1, 2, 4)
    queue("12 FAILED 0 NonZeroExitCode")
    assert main(["status", str(run)]) == 1
    assert f"the table was not printed; see {FOLDER}/slurm/small-table-12.out" in capsys.readouterr().out
    assert not (FOLDER / "table.json").exists()


def test_jobs_that_a_killed_submit_may_have_left_bar_another_submit(
    run: Path, calls: Calls, capsys: pytest.CaptureFixture[str]
) -> None:
    write_submissions(FOLDER, [Submission((1, 2, 4))])
    write_submissions(FOLDER.with_name("at-304-for-384-linear"), [Submission((1, 2), 3, 4)])
    Path("bin/squeue").write_text(
        '#!/bin/bash\ncase "$*" in *--name=small-branches*) printf "3\\n9\\n";; *--name=*) echo 4;; esac\n'
    )
    assert main(SUBMIT) == 1
    error = "submit was interrupted while it submitted branches; squeue --me --name=small-branches shows 9, which may"
    assert error in capsys.readouterr().err
    assert calls() == []


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("{", "cannot be read: "),
        ("[]", "cannot be read: "),
        ('{"format": 9}', "is of format 9, this version reads 1"),
        ('{"format": 1, "submissions": [{"factors": 1}]}', "cannot be read: submissions"),
    ],
)
def test_a_damaged_ledger_is_reported(run: Path, text: str, fault: str, capsys: pytest.CaptureFixture[str]) -> None:
    (FOLDER / "slurm").mkdir(parents=True)
    (FOLDER / "slurm/ledger.json").write_text(text)
    assert main(["status", str(run)]) == 1
    assert f"{FOLDER}/slurm/ledger.json {fault}" in capsys.readouterr().err


# --- ranks and errors --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ranks", "hosts", "nodes_max", "ranks_per_node", "expected"),
    [
        (1, 1, None, None, (1, 1)),
        (8, 2, None, None, (2, 4)),
        (8, 2, None, 8, (1, 8)),
        (8, 2, None, 2, (4, 2)),
        (2, 1, None, 4, (1, 2)),  # a node may be filled in part
        (8, 2, 3, None, (3, 4)),
        (8, 2, 1, 6, (1, 6)),
        (None, 1, None, None, (1, 1)),
        (None, 1, 2, 4, (2, 4)),
    ],
)
def test_the_branches_use_the_ranks_of_the_run_or_those_requested(
    run: Path,
    ranks: int | None,
    hosts: int,
    nodes_max: int | None,
    ranks_per_node: int | None,
    expected: tuple[int, int],
) -> None:
    write_attempt(run, ranks=ranks, hosts=hosts)
    width = width_of(run, nodes_max, ranks_per_node)
    assert (width.nodes, width.ranks_per_node) == expected


def test_a_fraction_of_a_node_is_refused(run: Path) -> None:
    write_attempt(run, ranks=6, hosts=1)
    with pytest.raises(JobError) as caught:
        width_of(run, None, 4)
    fault = "--ranks-per-node: the run used 6 ranks, which are 1.50 nodes of 4; nearest: --nodes-max 1 or 2 with"
    assert fault in str(caught.value)


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ([], 1, "sbatch is not on PATH: is this a login node of a Slurm cluster? --dry-run prints what would be"),
        (["--nodes-max", "5", "--ranks-per-node", "1"], 2, "5 ranks × 1.20 ghost batches of 8; nearest: 40, 80"),
        (["--at", "161"], 2, "--at: runs/small has no checkpoint at sample 161 before its end"),
        (["--factors", "1,x"], 2, "--factors: must be whole numbers such as 1,2,4,8, got '1,x'"),
        (["--name", "x"], 2, "--name: is for a job file, and --branch submits branches of a run that exists"),
        (["--resume", "auto", "--seed", "3"], 2, "--resume: is for a job file, and --branch submits"),
        (["--cost", "probe.json"], 2, "--cost: is for --dry-run"),
        (["--sbatch", "array=1-4"], 2, "--sbatch: array is set by submit: "),
        (["--optim.lr", "0.2"], 2, "optim.lr: is a key of a job file, and branches train with the run's"),
    ],
)
def test_what_cannot_be_submitted_says_why(
    run: Path,
    words: list[str],
    code: int,
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    factors = [] if "--factors" in words else ["--factors", "1,2,4"]
    assert main(["submit", str(run), "--branch", *factors, *words]) == code
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["runs/small/job.toml", "--branch"],
            "needs the folder of a run, such as runs/small, and runs/small/job.toml is",
        ),
        (["runs/small"], "runs/small is a folder; submit needs a job file, or --branch and the folder of a run"),
        (["runs/small/job.toml"], "--nodes-max: is missing: the largest number of nodes for a phase"),
        (["runs/small/job.toml", "--nodes-max", "1", "--tolerance", "1"], "--tolerance: is for --branch"),
    ],
)
def test_a_run_and_a_job_file_are_not_confused(
    run: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["submit", *words]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--only", "3"], "--only: must be one of --factors 1,2,4, got 3"),
        (["--only", "2", "--json"], "--json: has no effect with --only"),
        (["--only", "2", "--tolerance", "1"], "--tolerance: has no effect with --only"),
        (["--only", "2", "--table"], "--table: has no effect with --only"),
        (["--only", "2", "--dry-run"], "--dry-run: has no effect with --only"),
        (["--table", "--dry-run"], "--table: prints a comparison of finished branches, --dry-run their costs: choose"),
    ],
)
def test_options_of_branch_that_contradict_each_other_are_refused(
    run: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["branch", str(run), *OPTIONS, *words]) == 2
    assert message in capsys.readouterr().err


def test_a_table_of_unfinished_branches_names_them_and_how_to_continue(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    finish(1)
    (FOLDER / "k4/checkpoints").mkdir(parents=True)
    (FOLDER / "k4/checkpoints" / f"samples-{1312:015d}.pt").touch()
    assert main(["branch", str(run), *OPTIONS, "--tolerance", "0.5", "--table"]) == 1
    assert capsys.readouterr().err.splitlines() == [
        f"2 of 3 branches in {FOLDER} are not finished:",
        "  k = 2 has not begun",
        "  k = 4 has a checkpoint at sample 1,312 of 3,232",
        "  to train them, repeat the submit command, which submits only these, or run",
        f"  {shlex.join(['hvd-batchgrow', 'branch', str(run), *OPTIONS, '--tolerance', '0.5'])}",
    ]
    assert not (FOLDER / "table.txt").exists()
