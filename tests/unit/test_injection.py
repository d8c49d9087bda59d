"""What names, paths and notes hold stays text: every shell text that is written or printed, run by a real shell.

Stand-ins for Slurm's commands, ssh and the like write down what they are given. tests/slurm has a
real Slurm, whose sbatch reads the `#SBATCH` lines.
"""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvd_batchgrow.cli import main
from hvd_batchgrow.slurm.render import ARGUMENTS, directive, render

SLURM = Path(__file__).parents[2] / "slurm"
NASTY = 'it\'s "a" $(touch stolen) `touch stolen` ${HOME} $HOME; touch stolen & > stolen | #1 100% *[a]'
NASTY_LINES = f"{NASTY}\ntouch stolen\n#SBATCH --wrap=stolen"

Calls = Callable[[str], list[list[str]]]


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Stand-ins on PATH; gives what one of them was called with, call by call."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("sbatch", "srun", "mpirun", "ssh", "tensorboard", "hvd-batchgrow"):
        (folder / name).write_text('#!/bin/bash\nprintf "%s\\0" "$@" END >>"$0.calls"\n')
    (folder / "sbatch").write_text((folder / "sbatch").read_text() + "echo 7\n")
    (folder / "hostname").write_text(f"#!/bin/bash\nprintf %s {shlex.quote(NASTY_LINES)}\n")
    for path in folder.iterdir():
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)

    def of(name: str) -> list[list[str]]:
        found = folder / f"{name}.calls"
        texts = found.read_text().split("END\0")[:-1] if found.exists() else []
        return [text.split("\0")[:-1] for text in texts]

    return of


def bash(text: str, cwd: Path, **variables: str) -> str:
    """Run a shell text; what it said."""
    (cwd / "text.sh").write_text(text)
    environment = {**os.environ, "SLURM_JOB_ID": "41234", **variables}
    done = subprocess.run(
        ["bash", "text.sh"], check=False, cwd=cwd, env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def assert_nothing_stolen(folder: Path) -> None:
    assert not list(folder.rglob("stolen"))


@pytest.mark.parametrize(("template", "launcher"), [("train.sbatch", "srun"), ("train-mpirun.sbatch", "mpirun")])
def test_a_chain_runs_no_text_of_its_job(
    job: str, tmp_path: Path, calls: Calls, capsys: pytest.CaptureFixture[str], template: str, launcher: str
) -> None:
    here, there = Path.cwd(), tmp_path / NASTY_LINES.replace("/", "")
    there.mkdir()
    nasty_job = there / "job $(touch stolen) '.toml"
    nasty_job.write_text(Path(job).read_text())
    # Slurm itself cannot have a log below a folder whose name has two lines.
    runs = tmp_path / NASTY
    words = ["--template", str(SLURM / template), "--runs-dir", str(runs), "--sbatch", f"comment={NASTY}"]
    assert main(["submit", str(nasty_job), "--nodes-max", "1", "--account", NASTY, *words]) == 0
    folder = runs / "small" / "slurm"
    script = folder / "chain-job-1.sbatch"
    assert calls("sbatch") == [["--test-only", str(script)], ["--parsable", str(script)]]
    # As sbatch reads it: up to the first command, each line an option, in double quotes or none.
    head = script.read_text().partition("\nset -euo")[0].splitlines()
    options = [shlex.split(line)[1:] for line in head if line.startswith("#SBATCH")]
    assert [f"--comment={NASTY}"] in options
    assert [f"--account={NASTY}"] in options
    assert all(line.startswith("#") or not line for line in head)
    bash(script.read_text(), here)
    (call,) = calls(launcher)
    arguments = ["train", str(folder / "job.toml"), "--runs-dir", str(runs), "--resume", "auto", "--phases", "1-4"]
    assert call[-8:] == arguments
    bash(capsys.readouterr().out.splitlines()[-1], here)
    assert calls("hvd-batchgrow") == [["status", str(runs / "small")]]
    assert_nothing_stolen(tmp_path)
    assert_nothing_stolen(here)


def test_arguments_and_program_may_have_several_lines(tmp_path: Path, calls: Calls) -> None:
    text = render((SLURM / "train.sbatch").read_text(), {}, ("srun", NASTY_LINES), (NASTY_LINES, "--name", "a b"))
    bash(text, tmp_path)
    assert [call[-5:] for call in calls("srun")] == [[NASTY_LINES, "train", NASTY_LINES, "--name", "a b"]]
    assert_nothing_stolen(tmp_path)


@given(st.text(st.characters(exclude_categories=["C", "Zl", "Zp", "Zs"], include_characters=" \"'\\$`#;"), min_size=1))
def test_a_note_is_one_word_of_one_line(note: str) -> None:
    line = directive("comment", note)
    assert shlex.split(line) == ["#SBATCH", f"--comment={note}"]
    text = render(f"#!/bin/bash\n{ARGUMENTS}\n", {"comment": note}, (), ())
    assert text.splitlines()[1:] == [line, "arguments=()"]


@pytest.mark.parametrize("end", ["\n", "\r", "\x0b", "\x0c", "\x1c", "\x85", "\u2028", "\0"])
def test_a_note_of_several_lines_is_refused(job: str, end: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--nodes-max", "1", "--dry-run", "--sbatch", f"comment=a{end}#SBATCH --wrap=stolen"]
    assert main(["submit", job, *words]) == 2
    assert "--comment: a line of a batch script cannot hold 'a\\" in capsys.readouterr().err


def test_the_tunnel_that_is_printed_is_one_command_whatever_the_hosts_are_called(tmp_path: Path, calls: Calls) -> None:
    (tmp_path / NASTY).mkdir()
    text = (SLURM / "tensorboard.sbatch").read_text()
    variables = {"LOGIN_HOST": f"login{NASTY_LINES}", "USER": f"me{NASTY_LINES}", "SLURM_SUBMIT_HOST": "unused"}
    begin = f"set -- {shlex.quote(NASTY)}\n"
    said = bash(begin + text, tmp_path, **variables)
    port = str(20000 + 41234 % 40000)
    assert calls("tensorboard") == [["--logdir", NASTY, "--host", "localhost", "--port", port]]
    (line,) = [line for line in said.splitlines() if "ssh" in line]
    bash(line, tmp_path)
    user = variables["USER"]
    jump, node = f"{user}@{variables['LOGIN_HOST']}", f"{user}@{NASTY_LINES}"
    assert calls("ssh") == [["-N", "-L", f"6006:localhost:{port}", "-J", jump, node]]
    assert_nothing_stolen(tmp_path)
