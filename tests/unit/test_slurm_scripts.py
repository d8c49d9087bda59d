"""The shell scripts of slurm/, with Slurm's commands replaced."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

SLURM = Path(__file__).parents[2] / "slurm"
NASTY = 'it\'s "a" job $(touch stolen) `touch stolen`\n.toml'


def run(script: str, *words: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "HVD_BATCHGROW_"))}
    return subprocess.run(
        ["bash", str(SLURM / script), *words],
        check=False,
        cwd=cwd,
        env={**kept, **variables},
        capture_output=True,
        text=True,
    )


@pytest.fixture
def path(tmp_path: Path) -> str:
    """PATH with an sbatch that writes down each call, counts from 1 and refuses 9 nodes, and a scancel."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "sbatch").write_text(
        '#!/bin/bash\nhere=$(dirname "$0")\nprintf "%s\\0" "$@" END >>"$here/calls"\n'
        'case "$*" in *--parsable*--nodes=8*) exit 1;; *--nodes=9*) echo "too many nodes" >&2; exit 1;; esac\n'
        'case $1 in --parsable) echo >>"$here/count"; echo "$(wc -l <"$here/count");north";; esac\n'
    )
    (folder / "scancel").write_text('#!/bin/bash\necho "$*" >"$(dirname "$0")/cancelled"\n')
    for command in folder.iterdir():
        command.chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


def calls(folder: Path) -> list[list[str]]:
    """What sbatch was given, call by call."""
    return [call.split("\0")[:-1] for call in (folder / "bin" / "calls").read_text().split("END\0")[:-1]]


def test_grow_chain_asks_about_all_links_and_submits_each_after_the_last(tmp_path: Path, path: str) -> None:
    (tmp_path / NASTY).write_text("")
    options = ["--", "--name", "a b", "--layout.ranks_per_phase", "[1,2]"]
    done = run("grow-chain.sh", NASTY, "1:1-1", "2:2-3", *options, cwd=tmp_path, PATH=path, RANKS_PER_NODE="4")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "chain job 1:1-1: job 1\nchain job 2:2-3: job 2\n"

    def expected(nodes: int, phases: str, *options: str) -> list[str]:
        ranks = ["--ntasks-per-node=4", f"--ntasks={4 * nodes}"]
        mine = [f"--nodes={nodes}", *ranks, str(SLURM / "train.sbatch"), NASTY, "--resume", "auto"]
        return [*options, *mine, "--phases", phases, "--name", "a b", "--layout.ranks_per_phase", "[1,2]"]

    assert calls(tmp_path) == [
        expected(1, "1-1", "--test-only"),
        expected(2, "2-3", "--test-only"),
        expected(1, "1-1", "--parsable"),
        expected(2, "2-3", "--parsable", "--dependency=afterok:1", "--kill-on-invalid-dep=yes"),
    ]
    assert not (tmp_path / "stolen").exists()


def test_grow_chain_submits_nothing_where_a_link_could_never_run(tmp_path: Path, path: str) -> None:
    (tmp_path / "job.toml").write_text("")
    done = run("grow-chain.sh", "job.toml", "1:1-1", "9:2-2", cwd=tmp_path, PATH=path)
    assert done.returncode == 2
    assert "refuses chain job 9:2-2, and nothing is submitted: too many nodes" in done.stderr
    assert all(call[0] == "--test-only" for call in calls(tmp_path))


def test_grow_chain_takes_back_what_it_has_submitted(tmp_path: Path, path: str) -> None:
    (tmp_path / "job.toml").write_text("")
    done = run("grow-chain.sh", "job.toml", "1:1-1", "2:2-2", "8:3-3", cwd=tmp_path, PATH=path)
    assert done.returncode == 2
    assert "chain job 8:3-3 is refused; cancelled the submitted jobs: 1 2" in done.stderr
    assert (tmp_path / "bin" / "cancelled").read_text() == "1 2\n"


@pytest.mark.parametrize("number", ["INT", "TERM", "HUP"])
def test_grow_chain_takes_back_what_it_has_submitted_when_it_is_stopped(tmp_path: Path, path: str, number: str) -> None:
    (tmp_path / "job.toml").write_text("")
    sbatch = tmp_path / "bin" / "sbatch"
    # The second link is submitted while the signal comes.
    sbatch.write_text(sbatch.read_text() + f'case "$*" in *--parsable*--nodes=2*) kill -s {number} $PPID;; esac\n')
    listens = (
        f"import os, signal, sys; signal.signal(signal.SIG{number}, signal.SIG_DFL); os.execvp('bash', sys.argv[1:])"
    )
    words = [sys.executable, "-c", listens, "bash", str(SLURM / "grow-chain.sh"), "job.toml", "1:1-1", "2:2-2", "4:3-4"]
    done = subprocess.run(
        words, check=False, cwd=tmp_path, env={**os.environ, "PATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "interrupted; cancelled the submitted jobs: 1 2" in done.stderr
    assert (tmp_path / "bin" / "cancelled").read_text() == "1 2\n"
    assert "--nodes=4" not in calls(tmp_path)[-1]


def test_grow_chain_cancels_jobs_if_its_output_cannot_be_written(tmp_path: Path, path: str) -> None:
    (tmp_path / "job.toml").write_text("")
    words = ["bash", str(SLURM / "grow-chain.sh"), "job.toml", "1:1-1", "2:2-2"]
    reader, writer = os.pipe()
    os.close(reader)
    environment = {**os.environ, "PATH": path}
    done = subprocess.run(words, check=False, cwd=tmp_path, env=environment, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert done.returncode != 0
    assert (tmp_path / "bin" / "cancelled").read_text() == "1\n"


def test_a_dry_run_of_grow_chain_prints_what_a_shell_reads_back(tmp_path: Path, path: str) -> None:
    (tmp_path / NASTY).write_text("")
    done = run("grow-chain.sh", "--dry-run", NASTY, "1:1-1", "2:2-2", cwd=tmp_path, PATH=path)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "bin" / "calls").exists()
    subprocess.run(["bash", "-c", done.stdout], check=True, cwd=tmp_path, env={**os.environ, "PATH": path})
    assert [call[0] for call in calls(tmp_path)] == ["--test-only", "--test-only", "--parsable", "--parsable"]
    assert all(NASTY in call for call in calls(tmp_path))
    assert not (tmp_path / "stolen").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["job.toml"], "usage: slurm/grow-chain.sh"),
        (["job.toml", "2:2"], "a chain job must be NODES:FIRST-LAST such as 2:2-3, got '2:2'"),
        (["none.toml", "1:1-1"], "none.toml cannot be read"),
        (["job.toml", "--", "1:1-1"], "usage: slurm/grow-chain.sh"),
    ],
)
def test_grow_chain_says_what_is_wrong(tmp_path: Path, path: str, words: list[str], message: str) -> None:
    (tmp_path / "job.toml").write_text("")
    done = run("grow-chain.sh", *words, cwd=tmp_path, PATH=path)
    assert done.returncode == 2
    assert message in done.stderr


def test_grow_chain_checks_the_ranks_of_a_node(tmp_path: Path, path: str) -> None:
    (tmp_path / "job.toml").write_text("")
    done = run("grow-chain.sh", "job.toml", "1:1-1", cwd=tmp_path, PATH=path, RANKS_PER_NODE="four")
    assert done.returncode == 2
    assert "RANKS_PER_NODE must be a whole number, 1 or more, got 'four'" in done.stderr


def write_run(folder: Path, samples: int) -> Path:
    """A run of three phases on 1, 2 and 6 ranks, from samples 0, 100 and 300, and one without updates between."""
    starts = [(0, 1, 10), (100, 2, 4), (300, 4, 0), (300, 6, 2)]
    phases = [{"start_samples": s, "ranks": r, "num_updates": n} for s, r, n in starts]
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "plan.json").write_text(json.dumps({"phases": phases}))
    for counter in {0, samples}:
        (folder / "checkpoints" / f"samples-{counter:015d}.pt").touch()
    return folder


@pytest.mark.parametrize(
    ("samples", "lines"),
    [
        (0, ["a:1"]),
        (99, ["a:1"]),
        (100, ["a:2"]),
        # 6 ranks: the second host has room for 4, the third is not needed
        (300, ["a:2", "b:4"]),
        (999, ["a:2", "b:4"]),
    ],
)
def test_hosts_join_as_the_phase_of_the_run_needs_them(tmp_path: Path, samples: int, lines: list[str]) -> None:
    (tmp_path / "hosts").write_text("a:2   # the first\n\nb\nc:4\n")
    folder = write_run(tmp_path / "a run", samples)
    variables = {"HVD_BATCHGROW_HOSTS_FILE": "hosts", "HVD_BATCHGROW_SLOTS": "4"}
    done = run("discover-hosts.sh", cwd=tmp_path, HVD_BATCHGROW_RUN=str(folder), **variables)
    assert done.stdout.splitlines() == lines, done.stderr
    everything = run("discover-hosts.sh", cwd=tmp_path, **variables)
    assert everything.stdout.splitlines() == ["a:2", "b:4", "c:4"]
    not_begun = variables | {"HVD_BATCHGROW_RUN": "none"}
    assert run("discover-hosts.sh", cwd=tmp_path, **not_begun).stdout == "a:1\n"
    not_begun["HVD_BATCHGROW_FIRST_RANKS"] = "3"
    assert run("discover-hosts.sh", cwd=tmp_path, **not_begun).stdout == "a:2\nb:1\n"


def test_the_hosts_of_an_allocation_have_its_ranks(tmp_path: Path) -> None:
    (tmp_path / "scontrol").write_text('#!/bin/bash\n[ "$*" = "show hostnames n[1-2]" ] && printf "n1\\nn2\\n"\n')
    (tmp_path / "scontrol").chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    allocation = {"SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NTASKS_PER_NODE": "4"}
    assert run("discover-hosts.sh", cwd=tmp_path, PATH=path, **allocation).stdout == "n1:4\nn2:4\n"


def test_missing_host_names_are_an_error(tmp_path: Path) -> None:
    done = run("discover-hosts.sh", cwd=tmp_path)
    assert done.returncode == 1
    assert "no hosts: set HVD_BATCHGROW_HOSTS_FILE" in done.stderr
    (tmp_path / "hosts").write_text("a:many\n")
    done = run("discover-hosts.sh", cwd=tmp_path, HVD_BATCHGROW_HOSTS_FILE="hosts")
    assert done.returncode == 1
    assert "slots must be a number, got 'a:many'" in done.stderr
    first = {"HVD_BATCHGROW_RUN": "none", "HVD_BATCHGROW_FIRST_RANKS": "0"}
    done = run("discover-hosts.sh", cwd=tmp_path, HVD_BATCHGROW_HOSTS_FILE="hosts", **first)
    assert done.returncode == 1
    assert "HVD_BATCHGROW_FIRST_RANKS must be a number of ranks, 1 or more, got '0'" in done.stderr


@pytest.mark.parametrize(("script", "launcher"), [("train.sbatch", "srun"), ("train-mpirun.sbatch", "mpirun")])
@pytest.mark.parametrize(
    ("end", "code", "said"),
    [
        ("exit 0", 0, "ends with code 0"),
        ('touch "$HVD_BATCHGROW_UNFINISHED"', 1, "ended with code 0, but the training is not done: ranks were lost"),
        ("exit 2", 2, "ends with code 2"),
        ("exit 75", 75, "stopped, and is requeued to resume"),
        (
            "exit 140",
            75,
            "stop requested before the ranks could handle it",
        ),  # what srun makes of a rank that died of USR2
        ("kill -s USR2 $$", 75, "stop requested before the ranks could handle it"),
    ],
)
def test_a_link_is_queued_again_when_it_was_stopped_and_only_then(
    tmp_path: Path, script: str, launcher: str, end: str, code: int, said: str
) -> None:
    (tmp_path / launcher).write_text(f"#!/bin/bash\n{end}\n")
    (tmp_path / "scontrol").write_text('#!/bin/bash\necho "scontrol $*"\n')
    for command in (launcher, "scontrol"):
        (tmp_path / command).chmod(0o755)
    variables = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    done = run(script, "small.toml", cwd=tmp_path, **variables)
    assert done.returncode == code
    assert said in done.stdout
    assert not list(tmp_path.glob(".unfinished*"))
    assert ("scontrol requeue 7" in done.stdout) == (code == 75)
    # Of an array, the task alone
    task = run(script, "small.toml", cwd=tmp_path, **variables, SLURM_ARRAY_JOB_ID="7", SLURM_ARRAY_TASK_ID="4")
    assert ("scontrol requeue 7_4\n" in task.stdout) == (code == 75)
    again = run(script, "small.toml", cwd=tmp_path, **variables, MAX_RESTARTS="1", SLURM_RESTART_COUNT="1")
    assert "scontrol" not in again.stdout
    assert ("not requeued: max_restarts=1 is reached" in again.stdout) == (code == 75)


@pytest.mark.parametrize(("script", "launcher"), [("train.sbatch", "srun"), ("train-mpirun.sbatch", "mpirun")])
@pytest.mark.parametrize(
    ("states", "code", "lost"),
    [
        ("n1 allocated\\nn2 down*\\n", 14, "n2"),
        ("n1 mixed*\\nn1 mixed*\\nn2 down\\n", 1, "n1 n2"),
        ("n1 allocated\\nn2 mixed\\n", 14, None),
        ("n1 allocated\\nn2 down*\\n", 2, None),
        ("n1 allocated\\nn2 down*\\n", 0, None),
    ],
)
def test_a_job_that_has_lost_a_node_is_requeued(
    tmp_path: Path, script: str, launcher: str, states: str, code: int, lost: str | None
) -> None:
    (tmp_path / launcher).write_text(f"#!/bin/bash\nexit {code}\n")
    (tmp_path / "sinfo").write_text(f"#!/bin/bash\nprintf '{states}'\n")
    (tmp_path / "scontrol").write_text('#!/bin/bash\necho "scontrol $*"\n')
    for command in (launcher, "sinfo", "scontrol"):
        (tmp_path / command).chmod(0o755)
    variables = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]"}
    done = run(script, "small.toml", cwd=tmp_path, **variables)
    assert done.returncode == (75 if lost else code)
    assert (f"lost {lost};" in done.stdout) == bool(lost)
    assert ("scontrol requeue 7" in done.stdout) == bool(lost)


@pytest.mark.parametrize(("script", "launcher"), [("train.sbatch", "srun"), ("train-mpirun.sbatch", "mpirun")])
def test_a_link_that_is_cancelled_is_not_queued_again(tmp_path: Path, script: str, launcher: str) -> None:
    # scancel sends SIGTERM to all processes of the job: ranks that hear it may still end with 75.
    (tmp_path / launcher).write_text(
        "#!/bin/bash\ntouch \"$HVD_BATCHGROW_UNFINISHED\"; trap 'exit 75' TERM\necho listens\nsleep 60 & wait\n"
    )
    (tmp_path / "scontrol").write_text('#!/bin/bash\necho "scontrol $*"\n')
    for command in (launcher, "scontrol"):
        (tmp_path / command).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    words = ["bash", str(SLURM / script), "small.toml"]
    with subprocess.Popen(
        words, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as job:
        assert job.stdout is not None
        while job.stdout.readline() != "listens\n":
            assert job.poll() is None
        os.killpg(job.pid, signal.SIGTERM)
        report = job.stdout.read()
    assert job.returncode == -signal.SIGTERM
    assert "scontrol" not in report
    assert not list(tmp_path.glob(".unfinished*"))


@pytest.mark.parametrize(("script", "launcher"), [("train.sbatch", "srun"), ("train-mpirun.sbatch", "mpirun")])
def test_a_stop_request_waits_for_a_launcher_that_was_started_late(tmp_path: Path, script: str, launcher: str) -> None:
    text = (SLURM / script).read_text()
    assert "-lt 10 ]" in text
    late = text.replace("command=train\n", "command=train\nSECONDS=60\n").replace("-lt 10 ]", "-lt 2 ]")
    (tmp_path / script).write_text(late)
    (tmp_path / launcher).write_text(
        "#!/bin/bash\nkill -s USR2 $PPID; sleep 0.5; trap 'exit 75' USR2; for k in {1..100}; do sleep 0.1; done\n"
    )
    (tmp_path / "scontrol").write_text("#!/bin/bash\n")
    for command in (launcher, "scontrol"):
        (tmp_path / command).chmod(0o755)
    variables = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    done = run(str(tmp_path / script), "small.toml", cwd=tmp_path, **variables)
    assert done.returncode == 75
    assert "stopped, and is requeued to resume" in done.stdout
    assert "before the ranks could handle it" not in done.stdout


@pytest.mark.parametrize("script", ["train.sbatch", "train-mpirun.sbatch"])
def test_a_limit_of_restarts_that_is_not_a_number_is_an_error(tmp_path: Path, script: str) -> None:
    done = run(script, "small.toml", cwd=tmp_path, SLURM_JOB_ID="7", MAX_RESTARTS="5x")
    assert done.returncode == 2
    assert done.stderr == "max_restarts (MAX_RESTARTS) must be a whole number, 0 or more, got '5x'\n"


@pytest.mark.parametrize(("script", "launcher"), [("train.sbatch", "srun"), ("train-mpirun.sbatch", "mpirun")])
def test_a_job_that_starts_again_removes_the_file_of_a_start_that_was_killed(
    tmp_path: Path, script: str, launcher: str
) -> None:
    for name in (".unfinished-7-0", ".unfinished-71-0"):
        (tmp_path / name).touch()
    (tmp_path / launcher).write_text("#!/bin/bash\n")
    (tmp_path / launcher).chmod(0o755)
    variables = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"}
    assert run(script, "small.toml", cwd=tmp_path, **variables).returncode == 0
    assert [path.name for path in tmp_path.glob(".unfinished*")] == [".unfinished-71-0"]


@pytest.mark.parametrize("name", ["train.sbatch", "train-mpirun.sbatch", "tensorboard.sbatch"])
def test_what_a_site_must_edit_is_marked(name: str) -> None:
    text = (SLURM / name).read_text()
    assert text.startswith("#!/usr/bin/env bash\n")
    assert len(re.findall(r"^# EDIT: ", text, flags=re.MULTILINE)) >= 3
    directives = [line for line in text.splitlines() if line.startswith("#SBATCH")]
    assert not [line for line in directives if "partition" in line or "account" in line]
