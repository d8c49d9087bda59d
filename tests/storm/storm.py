"""A storm: a run is killed again and again, at random moments and in the middle of a write, and resumed."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tomli_w

from hvd_batchgrow.messages.errors import ExitCode
from hvd_batchgrow.train.checkpoints.checkpoint import newest_good
from hvd_batchgrow.verification.audit import audit, read_consumed
from hvd_batchgrow.verification.digest import Weights, compare_weights, final_weights
from tests.helpers import job_tree, measured_tree, small_source, write_idx_folder
from tests.storm.attempts import PATIENCE_S, Attempt, Forked, Launched
from tests.storm.nursery import Nursery
from tests.storm.sabotage import PLACES, Sabotage

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)
"""SIGINT comes twice."""
FORMS = {"1 rank": 1, "2 ranks": 2, "3 ranks": 3, "mpirun": 2, "horovodrun-gloo": 2}


def write_job(folder: Path, *, measured: bool = False) -> None:
    """The job of the storm: 65 updates at 5 batches, 35 checkpoints and 6 evaluations.

    Args:
        folder: where to.
        measured: let the batch grow where the gradient's noise says so, in 50 updates at 3 batches.
    """
    root = write_idx_folder(folder / "data", small_source())
    sections: dict[str, Any] = {
        "data": {"pipeline": "torch"},
        "layout": {"uneven_ranks": True},
        "checkpoint": {"every_epochs": 0.2},
        "logging": {"logs_per_epoch": 5},
    }
    if measured:
        trigger = {"name": "gradient_noise", "ratio": 0.01, "every_epochs": 0.2, "hold_epochs": 1.0}
        tree = measured_tree(root, trigger, schedule={"epochs": 6.0, "global_batch": 24}, **sections)
    else:
        schedule = {"epochs": 6.0, "boundaries_epochs": [1.0, 2.5, 4.0], "global_batch": 24, "noise_factor": 1.5}
        tree = job_tree(root, schedule=schedule, **sections)
    (folder / "small.toml").write_text(tomli_w.dumps(tree))


@dataclass
class Tally:
    """What a storm has done so far."""

    attempts: int = 0
    blows: Counter[str] = field(default_factory=Counter)
    """Lives that ended by each kind of blow."""
    runs: int = 0
    """Runs that came to their end and were the same as the undisturbed."""
    seconds: float = 0.0

    @classmethod
    def of(cls, figures: Mapping[str, Any]) -> Tally:
        """What `vars` of a tally has given, through JSON."""
        return cls(**{**figures, "blows": Counter(figures.get("blows", {}))})

    @property
    def kills(self) -> int:
        """Lives that a blow has ended."""
        return self.blows.total()

    @property
    def inside(self) -> int:
        """How many of these kills came in the middle of a write."""
        return sum(count for blow, count in self.blows.items() if blow.startswith("in "))

    def describe(self) -> str:
        """On one line."""
        blows = ", ".join(f"{count} {blow}" for blow, count in sorted(self.blows.items()))
        return (
            f"{self.attempts} attempts; {self.kills} were killed, {self.inside} of them during a write ({blows}); "
            f"all {self.runs} runs bit-identical, each sample once per epoch; {self.seconds:.0f} s"
        )


class Storm:
    """Runs one job to its end, over and over, through blows.

    Args:
        folder: of the job.
        nursery: forks the ranks.
        seed: of all that is random.
        forms: some of FORMS; each attempt draws one. With more than one, the job is in exact mode.
        tally: counts of an earlier storm, which this one continues in place.
    """

    def __init__(
        self, folder: Path, nursery: Nursery, seed: int, forms: tuple[str, ...], tally: Tally | None = None
    ) -> None:
        self.folder, self.nursery, self.forms = folder, nursery, forms
        self.tally = tally or Tally()
        # A new seed for the rest: a storm that continues does not repeat its kills.
        self.draw = random.Random(f"{seed} {forms} {self.tally.runs}")  # noqa: S311
        self.mode = ["--layout.exact", "true"] if len(forms) > 1 else []
        begin = time.monotonic()
        assert self._live("calm", forms[0], None, 0.0) == 0, self._log()
        self.calm_s = time.monotonic() - begin
        self.calm = final_weights(folder / "runs" / "calm")
        assert self.calm.is_final

    def until(self, kills: int, deadline: float) -> Tally:
        """Continue until this many attempts were killed or the time is over; then let the last run finish.

        Args:
            kills: how many.
            deadline: of time.monotonic().

        Raises:
            AssertionError: something was lost.
        """
        while self.tally.kills < kills and time.monotonic() < deadline:
            self.weather(kills, deadline)
        return self.tally

    def weather(self, kills: int, deadline: float) -> None:
        """Take one run through blows to its end, and count it if nothing was lost; the arguments are those of `until`.

        Raises:
            AssertionError: something was lost.
        """
        name, begin, code = f"run-{self.tally.runs}", time.monotonic(), None
        attempts, blows = 0, Counter[str]()
        while code != 0:
            form = self.draw.choice(self.forms)
            is_over = self.tally.kills + blows.total() >= kills or time.monotonic() > deadline
            sabotage, number = (None, None) if is_over else self._blow()
            blow = number.name if number else f"in {sabotage.place}" if sabotage else "none"
            code = self._live(name, form, sabotage, self.draw.uniform(0.1, 1.0) * self.calm_s, number)
            attempts += 1
            if code not in {0, 75}:
                assert blow != "none", f"ended by itself, with {code}:\n{self._log()}"
                self._check_code(code, form, blow)
            if code != 0:
                blows[blow] += 1
            if code == 75:
                self._check_stop(self.folder / "runs" / name)
        self._check(name)
        self.tally.runs += 1
        self.tally.attempts += attempts
        self.tally.blows += blows
        self.tally.seconds += time.monotonic() - begin

    def _check_stop(self, run: Path) -> None:
        """What it has done up to the stop is all there."""
        checkpoint, skipped = newest_good(run / "checkpoints")
        assert checkpoint, "stopped without a checkpoint"
        assert skipped == []
        assert checkpoint.samples == read_consumed(run).bounds[-1]

    def _check_code(self, code: int, form: str, blow: str) -> None:
        """A rank that is killed may take others down with 1; nothing else may fail."""
        may_end_so = code < 0 or FORMS[form] > 1 or (blow, code) == ("SIGINT", ExitCode.INTERRUPTED)
        assert may_end_so, f"{blow} ended it with {code}:\n{self._log()}"
        assert code != 2, f"{blow} ended it with {code}:\n{self._log()}"

    def _blow(self) -> tuple[Sabotage | None, signal.Signals | None]:
        if self.draw.random() < 0.5:
            return None, self.draw.choice(SIGNALS)
        place = self.draw.choice(PLACES)
        # Starting a run writes 5 files; a checkpoint syncs 4 times, and is written in some 20 parts.
        return Sabotage(place, self.draw.randint(1, 200 if place == "write" else 40), self.draw.random() < 0.5), None

    def _live(
        self, name: str, form: str, sabotage: Sabotage | None, delay_s: float, number: signal.Signals | None = None
    ) -> int:
        (self.folder / "log").write_bytes(b"")
        words = ["train", "small.toml", "--name", name, "--resume", "auto", *self.mode]
        planted = f"0:{sabotage}" if sabotage else ""
        attempt: Attempt
        if form in {"mpirun", "horovodrun-gloo"}:
            attempt = Launched(form, words, planted, self.folder)
        else:
            attempt = Forked(self.nursery, FORMS[form], words, planted, self.folder)
        try:
            if number and attempt.wait(delay_s) is None and (ranks := attempt.ranks()):
                self._strike(self.draw.choice(ranks), number)
            code = self._patient(attempt)
        finally:
            attempt.end()
        assert code is not None, f"hangs: {name}, {form}, {sabotage}, {number}\n{self._log()}"
        return code

    def _patient(self, attempt: Attempt) -> int | None:
        deadline = time.monotonic() + PATIENCE_S
        code = None
        while code is None and time.monotonic() < deadline:
            code = attempt.wait(0.2)
        return code

    def _strike(self, process: int, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):  # it was quicker
            os.kill(process, number)
            if number == signal.SIGINT:
                time.sleep(0.02)  # else the kernel would make one of them
                os.kill(process, number)

    def _check(self, name: str) -> None:
        run = self.folder / "runs" / name
        weights: Weights = final_weights(run)
        assert compare_weights(self.calm, weights) == "bit-identical"
        assert weights.is_final
        consumed = read_consumed(run)
        assert audit(consumed, lambda *_: None).passed
        assert consumed.bounds[-1] == weights.samples
        if (self.folder / "runs" / "calm" / "decisions.jsonl").exists():
            calm, stormy = (self.folder / "runs" / other / "decisions.jsonl" for other in ("calm", name))
            assert stormy.read_text() == calm.read_text(), "decided otherwise"
        assert not list((run / "checkpoints").glob(".*")), "left of a write that was killed"
        for kind in ("train", "eval"):
            before, after = (_points(self.folder / "runs" / other, kind) for other in ("calm", name))
            counters = [point["samples"] for point in after]
            assert counters == sorted(set(counters)), f"double points in {kind}: {counters}"
            assert set(counters) >= {point["samples"] for point in before}, f"lost points in {kind}"
        assert [point["top1"] for point in after] == [point["top1"] for point in before]

    def _log(self) -> str:
        return (self.folder / "log").read_text(errors="replace")[-3000:]


def _points(run: Path, kind: str) -> list[dict[str, Any]]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == kind]
