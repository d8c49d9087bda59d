"""The command line `hvd-batchgrow`, with the commands of `commands.py`."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence

from hvd_batchgrow.cli.paused_gc import paused_gc
from hvd_batchgrow.interrupt import end_on_interrupt

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EIO}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line, sys.argv by default; return the exit code."""
    _open_missing_streams()
    if arguments is None:  # otherwise the signal handlers belong to the caller
        end_on_interrupt()
    # Imported afterwards: the import takes a second, and the user may press ctrl-C during it.
    with paused_gc():
        from hvd_batchgrow.cli.commands import run

    if arguments is not None:
        return run(arguments)
    try:
        code = run(sys.argv[1:])
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader has closed the pipe, as `| head` does
        why = None
    except OSError as error:
        if error.errno not in _FULL or error.filename is not None:
            raise
        why = f"the output cannot be written: {error.strerror}"
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for output that is flushed at exit
    if why:
        print(why, file=sys.stderr)
    return 1  # the code with which rich ends if the pipe is closed


def _open_missing_streams() -> None:
    """Open /dev/null as stdout or stderr if the shell has closed them, as `>&-` does."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
