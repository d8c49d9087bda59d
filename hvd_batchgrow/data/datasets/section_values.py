"""Values that several sources derive from `[data]`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hvd_batchgrow.config import DataSection
from hvd_batchgrow.messages.errors import Fault, JobError, RunError
from hvd_batchgrow.messages.suggest import near_folder
from hvd_batchgrow.messages.wording import counted, listed


def need_root(data: DataSection, what: str, *, or_file: bool = False) -> Path:
    """Return the folder `data.root`.

    Args:
        data: the section.
        what: what the folder has, for the message.
        or_file: accept a file, such as an archive, instead of a folder.

    Raises:
        JobError: the job has no `data.root`.
        RunError: it is not a folder.
    """
    if data.root is None:
        raise JobError([Fault("data.root", f"is needed for the source {data.source!r}: {what}")])
    root = Path(data.root)
    if not (root.exists() if or_file else root.is_dir()):
        place = "" if root.is_absolute() else f"; looked for in {Path.cwd()}"
        raise RunError(f"data.root = {data.root} is not a folder{near_folder(root)}{place}")
    return root


def refuse_shared(train: Sequence[Path], test: Sequence[Path], noun: str = "file") -> None:
    """Raise RunError if a file is in the training set and in the test set. Links are followed."""
    tested = {path.resolve() for path in test}
    if both := [path for path in train if path.resolve() in tested]:
        found = f"{counted(len(both), noun)} in the training set and in the test set: {listed(both)}"
        raise RunError(f"{found}; choose different ones with data.train and data.test")


def notes_on_unused(paths: Sequence[Path], data: DataSection) -> tuple[str, ...]:
    """Return a note on each of some conventional test files or folders that exist: `data.test_fraction` is used."""
    reason = f"data.test_fraction = {data.test_fraction:g} holds out a part of the training set"
    return tuple(f"{path} is not used: {reason}" for path in paths if path.exists())
