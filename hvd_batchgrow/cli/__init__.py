"""The command line: `hvd-batchgrow plan|probe|train|twin|submit|status|verify|digest|audit|advise`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from hvd_batchgrow.interrupt import end_on_interrupt


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    if arguments is None:  # else this process belongs to somebody else
        end_on_interrupt()
    # After that: it takes a second, in which ctrl-C may come.
    from hvd_batchgrow.cli.commands import run

    if arguments is not None:
        return run(arguments)
    try:
        code = run(sys.argv[1:])
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # who reads has seen enough: `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is written at exit
        return 1  # as rich ends, where it is in a table
