"""`completion`: in real shells, the TAB key completes commands, options, values, job-file keys and files."""

from __future__ import annotations

import ast
import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hvd_batchgrow.cli import main
from hvd_batchgrow.cli.commands import commands_by_name
from hvd_batchgrow.job_file import job_keys

SHELLS = {
    # bracketed paste would put escape sequences between the words
    "bash": ["bash", "--noprofile", "--norc", "-i"],
    "zsh": ["zsh", "-f", "-i"],
}
SETUP = {"bash": "bind 'set enable-bracketed-paste off'", "zsh": "autoload -Uz compinit; compinit -u -D"}
CASES = {
    "doc\t --js\t": "doctor --json",
    "train jo\t --res\tau\t": "train job.toml --resume auto",
    "train job.toml --schedule.polic\tadap\t": "train job.toml --schedule.policy adaptive",
    "train job.toml --optim.nest\tt\t": "train job.toml --optim.nesterov true",
}
"""What is typed after the program's name, and the arguments that the program then receives."""


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the scripts of both shells, and a job file."""
    folder = tmp_path_factory.mktemp("completion")
    for shell in SHELLS:
        done = subprocess.run(
            [sys.executable, "-m", "hvd_batchgrow.cli", "completion", shell], check=True, capture_output=True
        )
        (folder / f"script.{shell}").write_bytes(done.stdout)
    (folder / "job.toml").write_text("")
    return folder


def typed(shell: str, folder: Path, keys: list[str]) -> list[str]:
    """Type lines at a shell's terminal, and return the arguments with which it then calls hvd-batchgrow."""
    if not shutil.which(shell):
        pytest.skip(f"{shell} is not installed")
    control, terminal = pty.openpty()
    environment = {**os.environ, "PS1": "$ ", "TERM": "dumb", "LC_ALL": "C.UTF-8"}
    process = subprocess.Popen(
        SHELLS[shell], cwd=folder, env=environment, stdin=terminal, stdout=terminal, stderr=terminal,
        start_new_session=True,
    )  # fmt: skip
    os.close(terminal)
    seen = ""

    def type_and_await(text: str, pattern: str) -> str:
        nonlocal seen
        os.write(control, text.encode())
        end = time.monotonic() + 120
        while not (found := re.search(pattern, seen)):
            ready, _, _ = select.select([control], [], [], max(0.0, end - time.monotonic()))
            assert ready, seen
            seen += os.read(control, 65536).decode(errors="replace")
        seen = seen[found.end() :]
        return found[1]

    try:
        # The name is split, so that the echo of the line does not match.
        function = 'hvd-batchgrow() { echo "<""called $*>"; }'
        type_and_await(f'{SETUP[shell]}; source ./script.{shell}; {function}; echo "<""ready>"\n', "(<ready>)")
        return [type_and_await(f"hvd-batchgrow {line}\n", "<called (.*?)>") for line in keys]
    finally:
        process.kill()
        process.wait()
        os.close(control)


@pytest.mark.slow
@pytest.mark.parametrize("shell", [*SHELLS])
def test_the_tab_key_completes_commands_options_values_keys_and_files(shell: str, scripts: Path) -> None:
    received = typed(shell, scripts, [*CASES])
    assert [" ".join(line.split()) for line in received] == [*CASES.values()]


@pytest.mark.slow
def test_bash_registers_a_function_that_offers_the_commands(scripts: Path) -> None:
    code = (
        "source ./script.bash; complete -p hvd-batchgrow; "
        'COMP_WORDS=(hvd-batchgrow "") COMP_CWORD=1; _tyro_hvd_batchgrow; printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(["bash", "-c", code], check=True, cwd=scripts, capture_output=True, text=True)
    registered, *words = done.stdout.splitlines()
    assert registered == "complete -o bashdefault -o default -F _tyro_hvd_batchgrow hvd-batchgrow"
    assert {*words} == {"-h", "--help", *commands_by_name()}


@pytest.mark.slow
def test_zsh_finds_the_script_as_a_file_in_fpath(scripts: Path, tmp_path: Path) -> None:
    if not shutil.which("zsh"):
        pytest.skip("zsh is not installed")
    shutil.copy(scripts / "script.zsh", tmp_path / "_hvd-batchgrow")
    code = (
        f"fpath=({tmp_path} $fpath); autoload -Uz compinit; compinit -u -D; print -r -- $_comps[hvd-batchgrow]; "
        '_describe() { print -rl -- "${(@P)2}" }; words=(hvd-batchgrow list --); CURRENT=3; _hvd-batchgrow'
    )
    done = subprocess.run(["zsh", "-f", "-c", code], check=True, capture_output=True, text=True)
    registered, *offered = done.stdout.splitlines()
    assert registered == "_hvd-batchgrow"
    assert {line.partition(":")[0] for line in offered} == {"--help", "--json"}


@pytest.mark.slow
@pytest.mark.parametrize("shell", [*SHELLS])
def test_a_script_has_every_key_for_commands_that_read_a_job_and_each_description_on_one_line(
    shell: str, scripts: Path
) -> None:
    found = re.search(r"^COMPLETION_SPEC = (.*)$", (scripts / f"script.{shell}").read_text(), flags=re.MULTILINE)
    assert found
    commands = ast.literal_eval(found[1])["subcommands"]
    assert {*commands} == {*commands_by_name()}
    flags = {name: [flag for option in of["options"] for flag in option["flags"]] for name, of in commands.items()}
    assert {flag.replace("-", "_") for flag in flags["train"]} >= {f"__{key}" for key in job_keys()}
    assert not [flag for flag in flags["digest"] if "." in flag]
    assert not [option for of in commands.values() for option in of["options"] if "\n" in option["description"]]


def test_an_unknown_shell_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["completion", "fish"])
    assert "bash" in capsys.readouterr().err
