"""The `hvd-batchgrow` command: parse the arguments, run the subcommand, report its errors."""

from __future__ import annotations

import io
import os
import re
import sys
from collections.abc import Sequence
from typing import Annotated, Any, get_args

import tyro

from hvd_batchgrow import __version__
from hvd_batchgrow.cli.advise import AdviseCommand
from hvd_batchgrow.cli.argv_checks import word_faults
from hvd_batchgrow.cli.branch import BranchCommand
from hvd_batchgrow.cli.compare import CompareCommand
from hvd_batchgrow.cli.completion import CompletionCommand
from hvd_batchgrow.cli.digest_audit import AuditCommand, DigestCommand
from hvd_batchgrow.cli.doctor import DoctorCommand
from hvd_batchgrow.cli.evaluate import EvaluateCommand
from hvd_batchgrow.cli.export import ExportCommand
from hvd_batchgrow.cli.plan import PlanCommand
from hvd_batchgrow.cli.predict import PredictCommand
from hvd_batchgrow.cli.probe import ProbeCommand
from hvd_batchgrow.cli.report import ReportCommand
from hvd_batchgrow.cli.runs import ListCommand, ShowCommand
from hvd_batchgrow.cli.status import StatusCommand
from hvd_batchgrow.cli.submit import SubmitCommand
from hvd_batchgrow.cli.train import TrainCommand, TwinCommand
from hvd_batchgrow.cli.verify import VerifyCommand
from hvd_batchgrow.cli.watch import WatchCommand
from hvd_batchgrow.comm.launcher_env import environment_faults, is_first_process
from hvd_batchgrow.job_file import split_overrides
from hvd_batchgrow.messages.errors import UNNAMED, ExitCode, JobError, RunError, faults_of

Command = (
    Annotated[PlanCommand, tyro.conf.subcommand("plan")]
    | Annotated[ProbeCommand, tyro.conf.subcommand("probe")]
    | Annotated[TrainCommand, tyro.conf.subcommand("train")]
    | Annotated[TwinCommand, tyro.conf.subcommand("twin")]
    | Annotated[SubmitCommand, tyro.conf.subcommand("submit")]
    | Annotated[StatusCommand, tyro.conf.subcommand("status")]
    | Annotated[VerifyCommand, tyro.conf.subcommand("verify")]
    | Annotated[ListCommand, tyro.conf.subcommand("list")]
    | Annotated[ShowCommand, tyro.conf.subcommand("show")]
    | Annotated[ReportCommand, tyro.conf.subcommand("report")]
    | Annotated[CompareCommand, tyro.conf.subcommand("compare")]
    | Annotated[WatchCommand, tyro.conf.subcommand("watch")]
    | Annotated[DigestCommand, tyro.conf.subcommand("digest")]
    | Annotated[AuditCommand, tyro.conf.subcommand("audit")]
    | Annotated[BranchCommand, tyro.conf.subcommand("branch")]
    | Annotated[AdviseCommand, tyro.conf.subcommand("advise")]
    | Annotated[PredictCommand, tyro.conf.subcommand("predict")]
    | Annotated[EvaluateCommand, tyro.conf.subcommand("evaluate")]
    | Annotated[ExportCommand, tyro.conf.subcommand("export")]
    | Annotated[DoctorCommand, tyro.conf.subcommand("doctor")]
    | Annotated[CompletionCommand, tyro.conf.subcommand("completion")]
)

PARSER: dict[str, Any] = {
    "prog": "hvd-batchgrow",
    "description": "Grow the batch where others decay the learning rate. "
    "Any key of the job file can be overridden on the command line: --optim.lr 0.2",
    "config": (tyro.conf.FlagCreatePairsOff, tyro.conf.OmitSubcommandPrefixes),
}
"""Arguments of `tyro.cli` for every command line."""


def commands_by_name() -> dict[str, type]:
    """Return the classes of the commands by name."""
    parts = [get_args(part) for part in get_args(Command)]
    return {subcommand.name: command for command, subcommand in parts}


def _write_any_text() -> None:
    """Make stdout and stderr escape characters that they cannot encode: paths and terminals need not be UTF-8."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _remove_invalid_terminal_size() -> None:
    """Remove COLUMNS and LINES from the environment unless they are numbers: rich would fail."""
    for name in ("COLUMNS", "LINES"):
        if not re.fullmatch("[0-9]{1,5}", os.environ.get(name, "")):
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
        if faults := word_faults(commands_by_name(), words):
            raise JobError(faults, "command line")
        command: Any = tyro.cli(
            Command,
            args=words,
            console_outputs=is_first_process(os.environ),
            **PARSER,
        )
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
