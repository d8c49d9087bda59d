"""The messages for bad command lines and environments."""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path

import pytest

from hvd_batchgrow import __version__
from hvd_batchgrow.cli import main
from hvd_batchgrow.cli.commands import _CLASSES
from hvd_batchgrow.comm.launcher_env import environment_faults


@pytest.mark.parametrize(
    ("words", "faults"),
    [
        (
            ["plan", "--rnks=3", "--seed", "x", "--ranks", "two"],
            [
                "--rnks: unknown option; did you mean --ranks?",
                "--seed: must be a whole number, got 'x'",
                "--ranks: must be a whole number, got 'two'",
            ],
        ),
        (
            ["plan", "a", "--ranks", "0", "--zzz", "--replay", "none.jsonl"],
            [
                "--ranks: must be greater than 0, got '0'; nearest: 1",
                "--zzz: unknown option; this command has --name, --seed, --ranks, --json, --twin, --plot, --cost, "
                "--sensitivity, --replay, and job-file keys such as --optim.lr",
            ],
        ),
        (
            ["train", "--lr", "0.1", "a", "--epochs=3", "--batch", "64", "--global-batch", "64"],
            [
                "--lr: unknown option; did you mean --optim.lr?",
                "--epochs: unknown option; did you mean --schedule.epochs?",
                "--batch: unknown option; did you mean --schedule.global_batch?",
                "--global-batch: unknown option; did you mean --schedule.global_batch?",
            ],
        ),
        (["digest", "--json", "a"], ["--json: unknown option; this command has no options"]),
        (
            ["train", "a", "--resume", "atuo", "--max-updates=1.5", "--backend", "mpi", "--fork", "a b"],
            [
                "--resume: must be 'never' or 'auto', got 'atuo'; nearest: 'auto'",
                "--max-updates: must be a whole number, got '1.5'",
                "--backend: must be 'auto', 'horovod' or 'torch', got 'mpi'",
                "--fork: must be a name of at most 200 letters, digits, dots, dashes and underscores, got 'a b'",
            ],
        ),
        (
            ["submit", "a", "--ranks-per-node", f"{10**30}", "--sbatch", "x=y", "z"],
            [f"--ranks-per-node: must be at most 1048576, got '{10**30}'; nearest: 1048576"],
        ),
        (
            ["submit", "a", "--sbatch", "qos=x", "--sbatch", "mem=10G"],
            [
                "--sbatch: is given twice, and the parser ignores the first: write --sbatch A B instead of "
                "--sbatch A --sbatch B"
            ],
        ),
        (["pla", "job.toml"], ["'pla' is not a command; did you mean plan?"]),
        (["trian", "--optim.lr", "1"], ["'trian' is not a command; did you mean train?"]),
        (["probe", "a", "--budget-s", "inf"], ["--budget-s: must be at most 86400, got 'inf'; nearest: 86400.0"]),
    ],
)
def test_unknown_options_and_invalid_values(
    words: list[str], faults: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    count = f"{len(faults)} fault{'s' if len(faults) > 1 else ''}"
    assert capsys.readouterr().err == "\n  ".join([f"command line: {count}", *faults]) + "\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "Expected one of {plan, probe,"),
        (["plan"], "The job file"),
        (["plan", "a", "b"], "Unrecognized options: b"),
        (["train", "a", "--max-updates"], "Missing value for argument '--max-updates'"),
        (["completion"], "{bash,zsh}"),
    ],
)
def test_tyro_reports_missing_and_extra_words_on_one_rank(
    words: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    for rank in ("0", "1"):
        monkeypatch.setenv("OMPI_COMM_WORLD_RANK", rank)
        monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
        with pytest.raises(SystemExit) as caught:
            main(words)
        assert caught.value.code == 2
        text = capsys.readouterr()
        assert (message in text.out + text.err) == (rank == "0")


def test_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"hvd-batchgrow {__version__}\n"


def test_help_is_printed_by_tyro(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["plan", "--help"])
    assert caught.value.code == 0
    assert "--ranks INT" in capsys.readouterr().out


@pytest.mark.parametrize("name", sorted(_CLASSES))
def test_no_description_in_the_help_is_broken_within_a_sentence(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "2000")  # so that no line is folded
    with pytest.raises(SystemExit):
        main([name, "--help"])
    boxes = [line.strip("│ ") for line in capsys.readouterr().out.splitlines() if line.startswith(("│", " "))]
    lines = [line for line in boxes if line.strip("-") and line not in {"positional arguments", "options"}]
    assert lines
    for line in lines:  # an option, its description, or both
        assert line.startswith(("-", "PATH", "[", "{")) or re.search(r"\((default: .*|required)\)$", line), line


def test_a_description_of_two_lines_is_printed_in_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    assert "without Horovod, or if it cannot sum on the GPUs. (default: auto)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("environment", "faults"),
    [
        ({}, []),
        ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "MASTER_PORT": "29500"}, []),
        ({"RANK": "a script's own", "WORLD_SIZE": "x"}, []),
        (
            {"OMPI_COMM_WORLD_RANK": "²", "OMPI_COMM_WORLD_SIZE": "-1"},
            [
                "OMPI_COMM_WORLD_SIZE: must be a whole number >= 0 and < 1048576, got '-1'",
                "OMPI_COMM_WORLD_RANK: must be a whole number >= 0 and < 1048576, got '²'",
            ],
        ),
        (
            {"PMI_RANK": "3", "PMI_SIZE": "2", "MASTER_PORT": "70000"},
            ["PMI_RANK: must be below PMI_SIZE = 2, got 3; nearest: 1", "MASTER_PORT: must be a port, 1 to 65535, "
             "got '70000'"],
        ),
        (
            {"RANK": "0", "WORLD_SIZE": "9" * 5000, "TORCHELASTIC_RESTART_COUNT": "0"},
            [f"WORLD_SIZE: must be a whole number >= 0 and < 1048576, got '{'9' * 79}… (5002 characters)"],
        ),
    ],
)  # fmt: skip
def test_faults_of_the_environment(environment: dict[str, str], faults: list[str]) -> None:
    assert [str(fault) for fault in environment_faults(environment)] == faults


def test_a_bad_environment_ends_with_2(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "x")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    assert main(["plan", "job.toml"]) == 2
    assert capsys.readouterr().err.startswith("environment: 1 fault\n  OMPI_COMM_WORLD_RANK: must be a whole number")


def test_only_rank_0_reports_a_bad_command_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    for rank, message in (("0", "command line: 1 fault\n  --nam: unknown option; did you mean --name?\n"), ("1", "")):
        monkeypatch.setenv("OMPI_COMM_WORLD_RANK", rank)
        assert main(["train", "job.toml", "--nam", "x"]) == 2
        assert capsys.readouterr().err == message


def test_an_elastic_run_cannot_fork(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("HOROVOD_ELASTIC", "1")
    assert main(["train", "job.toml", "--fork", "other"]) == 2
    assert "--fork: an elastic job restarts its run" in capsys.readouterr().err


def test_an_elastic_run_cannot_have_a_twin(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A rank that joins would begin with the first of the two runs."""
    monkeypatch.setenv("HOROVOD_ELASTIC", "1")
    assert main(["twin", "job.toml"]) == 2
    assert "twin: does not run as an elastic job: launch it on fixed ranks" in capsys.readouterr().err


def test_characters_that_a_terminal_cannot_encode_are_escaped(monkeypatch: pytest.MonkeyPatch, job: str) -> None:
    """Paths are bytes, and a terminal's encoding may lack the characters of a table."""
    monkeypatch.setenv("COLUMNS", "9" * 5000)
    for encoding, word in (("ascii", "\\xd7"), ("utf-8", "×")):
        out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        monkeypatch.setattr(sys, "stdout", out)
        assert main(["plan", job]) == 0
        out.flush()
        assert word in out.buffer.getvalue().decode(encoding)
    assert main(["digest", "\udcff"]) == 1
    assert not Path("runs").exists()


@pytest.mark.parametrize("words", [["--help"], ["-h"], ["plan", "--help"], ["train", "a.toml", "-h"]])
def test_help_is_printed_for_known_commands(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 0
    assert "usage: hvd-batchgrow" in capsys.readouterr().out
