"""One attempt of a run: its ranks, from their start to any kind of end."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

from tests.launch.test_forms import ENVIRONMENT, FORMS, ranks_of
from tests.launch.test_torch import meeting
from tests.storm.nursery import Nursery
from tests.storm.sabotage import RANK_VARIABLES, VARIABLE

PATIENCE_S = 300.0
"""An attempt that lasts longer counts as a hang."""


class Attempt(ABC):
    """Ranks that run."""

    @abstractmethod
    def ranks(self) -> Sequence[int]:
        """Process ids, by rank where that can be known; none before they are there."""

    @abstractmethod
    def wait(self, timeout_s: float) -> int | None:
        """The exit code of the whole, negative for a signal; None: it still runs."""

    @abstractmethod
    def end(self) -> None:
        """Kill what is left."""


class Forked(Attempt):
    """Ranks forked from the nursery: one alone, or several that talk through torch.distributed, as under torchrun."""

    def __init__(self, nursery: Nursery, num_ranks: int, words: list[str], sabotage: str, folder: Path) -> None:
        self._nursery = nursery
        self._codes: dict[int, int] = {}
        # As torchrun does: the port stays bound between its choice and its use.
        self._store = meeting() if num_ranks > 1 else None
        port = self._store.port if self._store else 0
        self._ranks = [
            nursery.start(words, _environment(rank, num_ranks, port) | {VARIABLE: sabotage}, folder, folder / "log")
            for rank in range(num_ranks)
        ]

    def ranks(self) -> Sequence[int]:
        return [rank for rank in self._ranks if rank not in self._codes]

    def wait(self, timeout_s: float) -> int | None:
        if not self.ranks():
            return self._code()
        first, *others = self.ranks()
        if (code := self._nursery.wait(first, timeout_s)) is not None:
            self._codes[first] = code
        for other in others:
            if (code := self._nursery.wait(other, 0.0)) is not None:
                self._codes[other] = code
        # A launcher ends the others when one is gone.
        if any(code not in {0, 75} for code in self._codes.values()):
            self.end()
        return None if self.ranks() else self._code()

    def end(self) -> None:
        for rank in self.ranks():
            code = self._nursery.wait(rank, 1.0)  # an orderly exit of the rank comes first
            if code is None:
                os.kill(rank, signal.SIGKILL)
                code = self._nursery.wait(rank, PATIENCE_S)
            assert code is not None
            self._codes[rank] = code

    def _code(self) -> int:
        """Return the most informative exit code: a rank's own failure, then a signal, then a stop."""
        return max(self._codes.values(), key=lambda code: (code in {1, 2}, code < 0, code))


class Launched(Attempt):
    """Ranks under a real launcher."""

    def __init__(self, form: str, words: list[str], sabotage: str, folder: Path) -> None:
        with (folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [*FORMS[form], sys.executable, "-m", "tests.storm.sabotage", *words],
                cwd=folder,
                env=ENVIRONMENT | {VARIABLE: sabotage, "PYTHONPATH": str(Path(__file__).parents[2])},
                stdout=log,
                stderr=log,
            )

    def ranks(self) -> Sequence[int]:
        return list(numbered_ranks(self._process.pid).values())

    def wait(self, timeout_s: float) -> int | None:
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None

    def end(self) -> None:
        for rank in self.ranks():
            with contextlib.suppress(ProcessLookupError):  # it has ended since
                os.kill(rank, signal.SIGKILL)
        self._process.kill()
        self._process.wait()


def numbered_ranks(launcher: int) -> dict[int, int]:
    """Process id of each rank below a launcher, in the order of the ranks; without what horovodrun puts between."""
    found = {}
    for process in ranks_of(launcher):
        with contextlib.suppress(OSError):  # it has ended
            variables = Path(f"/proc/{process}/environ").read_text().split("\0")
            if b"/horovodrun\0" not in Path(f"/proc/{process}/cmdline").read_bytes():
                values = dict(variable.partition("=")[::2] for variable in variables)
                numbers = [values[name] for name in RANK_VARIABLES if name in values]
                found.update({int(number): process for number in numbers[:1]})
    return dict(sorted(found.items()))


def _environment(rank: int, size: int, port: int) -> dict[str, str]:
    """Return the environment that torchrun gives a rank; empty for a single rank."""
    if size == 1:
        return {}
    place = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": size}
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    return {name: str(number) for name, number in place.items()} | meeting | {"TORCHELASTIC_RESTART_COUNT": "0"}
