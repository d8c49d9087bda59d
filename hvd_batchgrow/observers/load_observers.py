"""The observers that a job file names: MLflow, Weights & Biases, and the user's own."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from importlib.util import find_spec
from typing import Any

from hvd_batchgrow.config.observer_names import SERVICES
from hvd_batchgrow.import_string import NotFound, find_callable
from hvd_batchgrow.messages.errors import Fault, JobError, describe_error
from hvd_batchgrow.train.events import (
    BranchesCompared,
    BranchStarted,
    Decided,
    Evaluation,
    Observer,
    RunEnded,
    RunStarted,
    TrainRecord,
    UpdateDone,
)


def check_observers(names: Sequence[str]) -> None:
    """Check that the observers can be imported, without creating one.

    Args:
        names: `logging.observers`.

    Raises:
        JobError: a package is not installed, or a `module:name` cannot be imported. The error lists all of them.
    """
    faults: list[Fault] = []
    for index, name in enumerate(names):
        try:
            _factory(index, name)
        except JobError as error:
            faults += error.faults
    if faults:
        raise JobError(faults)


def load_observers(names: Sequence[str], report: Callable[[str], None]) -> list[Observer]:
    """Create the observers.

    Args:
        names: `logging.observers`.
        report: receives a message if an observer fails later.

    Raises:
        JobError: an observer cannot be imported or created, or is not an `Observer`.
    """
    return [GuardedObserver(name, _made(index, name), report) for index, name in enumerate(names)]


class GuardedObserver(Observer):
    """Forwards the events of a run to an observer that must not affect the run.

    Each event is a copy, so the observer cannot change the run. If the observer raises an exception, it is reported
    once, the observer receives no more events, and training continues.

    Args:
        name: as in the job file.
        observer: receives the copies.
        report: receives the message.
    """

    def __init__(self, name: str, observer: Observer, report: Callable[[str], None]) -> None:
        self._name, self._observer, self._report = name, observer, report
        self._has_failed = False

    def on_start(self, event: RunStarted) -> None:
        """Pass the event on."""
        self._notify("on_start", event)

    def on_update(self, event: UpdateDone) -> None:
        """Pass the event on."""
        self._notify("on_update", event)

    def on_record(self, event: TrainRecord) -> None:
        """Pass the event on."""
        self._notify("on_record", event)

    def on_evaluation(self, event: Evaluation) -> None:
        """Pass the event on."""
        self._notify("on_evaluation", event)

    def on_decision(self, event: Decided) -> None:
        """Pass the event on."""
        self._notify("on_decision", event)

    def on_branch(self, event: BranchStarted) -> None:
        """Pass the event on."""
        self._notify("on_branch", event)

    def on_branches(self, event: BranchesCompared) -> None:
        """Pass the event on."""
        self._notify("on_branches", event)

    def on_end(self, event: RunEnded) -> None:
        """Pass the event on."""
        self._notify("on_end", event)

    def _notify(self, method: str, event: object) -> None:
        handle = getattr(self._observer, method)
        if self._has_failed or getattr(handle, "__func__", None) is getattr(Observer, method):
            return  # it ignores the event, and a copy of each update would take time
        try:
            handle(copy.deepcopy(event))
        except (Exception, SystemExit) as error:  # a service that cannot be reached, or the user's own code
            self._has_failed = True
            fault = f"the observer {self._name} failed in {method}: {describe_error(error)}"
            self._report(f"{fault}; it receives no more events, and training continues")


def _made(index: int, name: str) -> Observer:
    factory = _factory(index, name)
    try:
        made = factory()
    except (Exception, SystemExit) as error:  # the user's own code
        raise _refusal(index, f"{name}() failed: {describe_error(error)}") from error
    if not isinstance(made, Observer):
        raise _refusal(
            index, f"{name}() must return an Observer of hvd_batchgrow.train.events; it returned {type(made).__name__}"
        )
    events = [method for method in vars(Observer) if method.startswith("on_")]
    for method in dir(made):
        if method.startswith("on_") and method not in events and (near := get_close_matches(method, events, n=1)):
            raise _refusal(index, f"{name} has the method {method}, which is not an event; did you mean {near[0]}?")
    return made


def _factory(index: int, name: str) -> Callable[[], Any]:
    if name not in SERVICES:
        try:
            return find_callable(name)
        except NotFound as error:
            raise _refusal(index, str(error)) from error
    spec = find_spec(name)
    if spec is None or spec.origin is None:  # W&B creates a folder of this name, which find_spec finds too
        raise _refusal(index, f"{name} is not installed: pip install 'hvd_batchgrow[{name}]'")

    def make() -> Observer:
        made: Observer = getattr(importlib.import_module(f"hvd_batchgrow.observers.{name}"), SERVICES[name])()
        return made

    return make


def _refusal(index: int, fault: str) -> JobError:
    return JobError([Fault(f"logging.observers[{index}]", fault)])
