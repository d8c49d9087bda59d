"""All commands under one name."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import tyro

from hvd_batchgrow.cli.advise import AdviseCommand
from hvd_batchgrow.cli.inspect import AuditCommand, DigestCommand
from hvd_batchgrow.cli.plan import PlanCommand
from hvd_batchgrow.cli.probe import ProbeCommand
from hvd_batchgrow.cli.status import StatusCommand
from hvd_batchgrow.cli.submit import SubmitCommand
from hvd_batchgrow.cli.train import TrainCommand, TwinCommand
from hvd_batchgrow.cli.verify import VerifyCommand
from hvd_batchgrow.comm.launch import speaks
from hvd_batchgrow.errors import ExitCode, JobError, RunError
from hvd_batchgrow.job_file import split_overrides

Command = (
    Annotated[PlanCommand, tyro.conf.subcommand("plan")]
    | Annotated[ProbeCommand, tyro.conf.subcommand("probe")]
    | Annotated[TrainCommand, tyro.conf.subcommand("train")]
    | Annotated[TwinCommand, tyro.conf.subcommand("twin")]
    | Annotated[SubmitCommand, tyro.conf.subcommand("submit")]
    | Annotated[StatusCommand, tyro.conf.subcommand("status")]
    | Annotated[VerifyCommand, tyro.conf.subcommand("verify")]
    | Annotated[DigestCommand, tyro.conf.subcommand("digest")]
    | Annotated[AuditCommand, tyro.conf.subcommand("audit")]
    | Annotated[AdviseCommand, tyro.conf.subcommand("advise")]
)


def run(arguments: Sequence[str]) -> int:
    """Run what a command line asks for; returns the exit code."""
    try:
        words, overrides = split_overrides(arguments)
        command: Any = tyro.cli(
            Command,
            prog="hvd-batchgrow",
            description="Grow the batch where others decay the learning rate. "
            "Any key of the job file can be put over on the command line: --optim.lr 0.2",
            args=words,
            config=(tyro.conf.FlagCreatePairsOff, tyro.conf.OmitSubcommandPrefixes),
        )
        return int(command.run(overrides))
    except JobError as error:
        print(error, file=sys.stderr)
        return ExitCode.BAD_JOB
    except RunError as error:
        if speaks(os.environ):  # ranks that could not even join each other fail alike
            print(error, file=sys.stderr)
        return ExitCode.FAILURE
