"""The record of a failed replay check: what was computed since the last passed one cannot be trusted."""

from __future__ import annotations

import json
from pathlib import Path

from hvd_batchgrow.messages.errors import RunError
from hvd_batchgrow.storage.atomic import write_file
from hvd_batchgrow.storage.regular_files import read_regular
from hvd_batchgrow.storage.strict_json import json_bytes

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


def refuse_suspect(folder: Path, samples: int | None) -> None:
    """Refuse to continue from a checkpoint that was written after the last passed check, if a check has failed.

    The record is removed once the run continues from an earlier checkpoint.

    Args:
        folder: the run folder.
        samples: sample counter of the checkpoint; None: the run starts from the beginning.

    Raises:
        RunError: the checkpoint cannot be trusted, or the record is damaged.
    """
    path = folder / NAME
    if not path.exists():
        return
    try:
        record = json.loads(read_regular(path))
        last, failed = record["last_passed"], int(record["samples"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise RunError(
            f"{path} is damaged ({error}): a replay check of this run has failed; see its last output"
        ) from None
    if samples is None or (last is not None and samples <= last):
        path.unlink()
        return
    if last is None:
        since, suspects = "no check has passed before", "all checkpoints"
    else:
        since, suspects = f"the last check passed at sample {last:,}", f"the checkpoints after sample {last:,}"
    raise RunError(
        f"{folder}: the replay check at sample {failed:,} failed, and {since}. The checkpoint at sample {samples:,} "
        f"may be wrong. Exclude the host that {path} names, remove {suspects} from {folder}/checkpoints, and run this "
        f"again; or remove {path} to continue from this checkpoint all the same"
    )
