"""The `hvd-batchgrow` command: parse the arguments, run the subcommand, report its errors."""

from __future__ import annotations

import io
import os
import re
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from functools import reduce
from importlib import import_module
from operator import or_
from typing import Annotated, Any

import tyro

from hvd_batchgrow import __version__
from hvd_batchgrow.cli.argv_checks import word_faults
from hvd_batchgrow.cli.option_help import join_descriptions
from hvd_batchgrow.comm.launcher_env import environment_faults, is_first_process
from hvd_batchgrow.job_file import split_overrides
from hvd_batchgrow.messages.errors import UNNAMED, ExitCode, Fault, JobError, RunError, faults_of
from hvd_batchgrow.messages.wording import shown

_CLASSES = {
    "plan": "plan.PlanCommand",
    "probe": "probe.ProbeCommand",
    "train": "train.TrainCommand",
    "twin": "train.TwinCommand",
    "submit": "submit.SubmitCommand",
    "status": "status.StatusCommand",
    "verify": "verify.VerifyCommand",
    "list": "runs.ListCommand",
    "show": "runs.ShowCommand",
    "report": "report.ReportCommand",
    "compare": "compare.CompareCommand",
    "watch": "watch.WatchCommand",
    "digest": "digest_audit.DigestCommand",
    "audit": "digest_audit.AuditCommand",
    "branch": "branch.BranchCommand",
    "advise": "advise.AdviseCommand",
    "predict": "predict.PredictCommand",
    "evaluate": "evaluate.EvaluateCommand",
    "export": "export.ExportCommand",
    "doctor": "doctor.DoctorCommand",
    "completion": "completion.CompletionCommand",
}
"""Module and class of each command. A module is imported when its command is used, since importing all takes 0.5 s."""

PARSER: dict[str, Any] = {
    "prog": "hvd-batchgrow",
    "description": "Grow the batch where others decay the learning rate. "
    "Any key of the job file can be overridden on the command line: --optim.lr 0.2",
    "config": (tyro.conf.FlagCreatePairsOff, tyro.conf.OmitSubcommandPrefixes),
}
"""Arguments of `tyro.cli` for every command line."""


def commands_by_name() -> dict[str, type]:
    """Return the classes of the commands by name, with the descriptions of their options."""
    return {name: join_descriptions(_class_of(name)) for name in _CLASSES}


def _class_of(name: str) -> type:
    module, _, of_command = _CLASSES[name].partition(".")
    found: type = getattr(import_module(f"hvd_batchgrow.cli.{module}"), of_command)
    return found


def _parse(words: Sequence[str]) -> Any:
    """Return the command with its options. Raises JobError for invalid options, SystemExit after help or errors."""
    settings = {**PARSER, "console_outputs": is_first_process(os.environ)}
    if words and words[0] not in _CLASSES and not words[0].startswith("-"):
        near = get_close_matches(words[0], _CLASSES, n=1)
        hint = f"did you mean {near[0]}?" if near else f"one of {', '.join(_CLASSES)}"
        raise JobError([Fault("", f"{shown(words[0])} is not a command; {hint}")], "command line")
    if not words or words[0] not in _CLASSES:  # help, or which commands there are
        named: list[Any] = [Annotated[found, tyro.conf.subcommand(k)] for k, found in commands_by_name().items()]
        return tyro.cli(reduce(or_, named), args=words, **settings)
    name, *rest = words
    command = _class_of(name)
    if faults := word_faults(command, rest):
        raise JobError(faults, "command line")
    if not {"-h", "--help"}.isdisjoint(rest):
        join_descriptions(command)
    return tyro.cli(command, args=rest, **settings | {"prog": f"{PARSER['prog']} {name}", "description": None})


def _write_any_text() -> None:
    """Make stdout and stderr escape characters that they cannot encode: paths and terminals need not be UTF-8."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _remove_invalid_terminal_size() -> None:
    """Remove COLUMNS and LINES from the environment unless they are numbers above 0: rich would fail, or not print."""
    for name in ("COLUMNS", "LINES"):
        if not re.fullmatch("[1-9][0-9]{0,4}", os.environ.get(name, "")):
            os.environ.pop(name, None)


def run(arguments: Sequence[str]) -> int:
    """Run a command line; return the exit code."""
    _write_any_text()
    _remove_invalid_terminal_size()
    if list(arguments) == ["--version"]:
        print(f"hvd-batchgrow {__version__}")
        return ExitCode.DONE
    try:
        if faults := environment_faults(os.environ):
            raise JobError(faults, "environment")
        words, overrides = split_overrides(arguments)
        command = _parse(words)
        with faults_of(str(getattr(command, "job", UNNAMED))):
            return int(command.run(overrides))
    except JobError as error:
        # All ranks have the same arguments, so rank 0 reports them; a variable may be damaged on one rank only.
        if is_first_process(os.environ) or error.source == "environment":
            print(error, file=sys.stderr)
        return ExitCode.BAD_JOB
    except RunError as error:
        if is_first_process(os.environ):  # before the ranks are connected, all of them fail alike
            print(error, file=sys.stderr)
        return ExitCode.FAILURE
