"""The record of a failed replay check: what was computed since the last passed one cannot be trusted."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from hvd_batchgrow.messages.errors import RunError
from hvd_batchgrow.messages.wording import counted
from hvd_batchgrow.schedule.branches import parse_branches_folder
from hvd_batchgrow.storage.atomic import write_file
from hvd_batchgrow.storage.regular_files import read_regular
from hvd_batchgrow.storage.strict_json import json_bytes
from hvd_batchgrow.train.run.decision_record import drop_decisions

NAME = "failed_check.json"


def write_failure(folder: Path, message: str, samples: int, last_passed: int | None) -> None:
    """Record in the run folder that a check has failed.

    Args:
        folder: the run folder.
        message: what was found.
        samples: sample counter before the update.
        last_passed: sample counter before the update whose check has last passed; None: no check has passed.

    Raises:
        RunError: it cannot be written.
    """
    record = {"samples": samples, "last_passed": last_passed, "message": message}
    write_file(folder / NAME, json_bytes(record))


def refuse_suspect(folder: Path, samples: int | None, *, is_fork: bool = False) -> list[str]:
    """Refuse to continue from a checkpoint that was written after the last passed check, if a check has failed.

    Once the run continues from an earlier checkpoint, its later decisions and branches are removed, because they may
    follow from wrong numbers, and then the record of the failed check.

    Args:
        folder: the run folder.
        samples: sample counter of the checkpoint; None: the run starts from the beginning.
        is_fork: another run continues from the checkpoint, so nothing in the folder changes.

    Returns:
        notes for the user on what was removed.

    Raises:
        RunError: the checkpoint cannot be trusted, or the record is damaged.
    """
    path = folder / NAME
    if not path.exists():
        return []
    try:
        record = json.loads(read_regular(path))
        last, failed = record["last_passed"], int(record["samples"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise RunError(
            f"{path} is damaged ({error}): a replay check of this run has failed; see its last output"
        ) from None
    if samples is None or (last is not None and samples <= last):
        notes = [] if is_fork else _remove_later(folder, samples or 0)
        if not is_fork:
            path.unlink()
        return notes
    if last is None:
        since, suspects = "no check has passed before", "all checkpoints"
    else:
        since, suspects = f"the last check passed at sample {last:,}", f"the checkpoints after sample {last:,}"
    raise RunError(
        f"{folder}: the replay check at sample {failed:,} failed, and {since}. The checkpoint at sample {samples:,} "
        f"may be wrong. Exclude the host that {path} names, remove {suspects} from {folder}/checkpoints, and run this "
        f"again; or remove {path} to continue from this checkpoint all the same"
    )


def _remove_later(folder: Path, samples: int) -> list[str]:
    """Remove the decisions and branches after a sample counter; return notes on them."""
    after = f"after sample {samples:,}: a replay check has failed since"
    notes = []
    if num_decisions := drop_decisions(folder, samples):
        notes.append(f"removed {counted(num_decisions, 'decision')} {after}")
    for branches in sorted((folder / "branches").glob("at-*")):
        place = parse_branches_folder(branches.name)
        if place is not None and place[0] > samples:
            shutil.rmtree(branches)
            notes.append(f"removed {branches}, {after}")
    return notes
