"""Starts ranks by fork from a process that has imported everything: an attempt costs tenths of a second, not seconds.

It is a separate process without threads or connections to other ranks: what it forks is as good as
new. One JSON object a line comes in, one goes out.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from hvd_batchgrow.interrupt import end_on_interrupt


class Nursery:
    """The other end: a context that starts the process and ends it."""

    def __enter__(self) -> Nursery:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.storm.nursery"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe:
                pipe.close()

    def start(self, words: list[str], environment: dict[str, str], folder: Path, log: Path) -> int:
        """Fork a rank that runs `hvd-batchgrow WORDS`; returns its process id."""
        request = {"words": words, "environment": environment, "folder": str(folder), "log": str(log)}
        return int(self._ask({"start": request}))

    def wait(self, process: int, timeout_s: float) -> int | None:
        """Its exit code, negative for a signal; None: it still runs."""
        code = self._ask({"wait": process, "timeout_s": timeout_s})
        return None if code is None else int(code)

    def _ask(self, request: dict[str, Any]) -> Any:
        assert self._process.stdin
        assert self._process.stdout
        print(json.dumps(request), file=self._process.stdin, flush=True)
        return json.loads(self._process.stdout.readline())


def _fork(words: list[str], environment: dict[str, str], folder: str, log: str) -> int:
    process = os.fork()
    if process:
        return process
    code = 1
    end_on_interrupt()
    try:
        os.chdir(folder)
        os.environ.update(environment)
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(descriptor, stream)
        from hvd_batchgrow.cli import main
        from tests.storm.sabotage import plant_from_environment

        plant_from_environment()
        code = main(words)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _wait(process: int, timeout_s: float) -> int | None:
    deadline = time.monotonic() + timeout_s
    while True:
        found, status = os.waitpid(process, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            return None
        time.sleep(0.005)


def _serve() -> None:
    import torch.distributed

    assert torch.distributed.is_available()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's; the driver ends this process
    for line in sys.stdin:
        request = json.loads(line)
        if "start" in request:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            answer: int | None = _fork(**request["start"])
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        else:
            answer = _wait(request["wait"], request["timeout_s"])
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    _serve()
