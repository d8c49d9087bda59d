"""Checks of the folders that a run writes to: space, atomic replacement, and locks between processes."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from hvd_batchgrow.doctor.check import Check, Facts, fail, note, ok
from hvd_batchgrow.doctor.gather import facts_of
from hvd_batchgrow.messages.errors import reason_of
from hvd_batchgrow.storage.atomic import write_atomically
from hvd_batchgrow.storage.file_lock import locked

LEAST_FREE_GIB = 0.1
SPARE_GIB = 5.0
GIB = 2**30

_TRY_LOCK = """
import sys
from pathlib import Path
from hvd_batchgrow.storage.file_lock import locked
try:
    with locked(Path(sys.argv[1]), wait=False):
        print("taken")
except BlockingIOError:
    print("refused")
"""


def folder_facts(folder: Path) -> Facts:
    """Return space, write time and locks of a folder, or of its first existing parent if it does not exist yet.

    Files are written to a temporary folder there, which is removed.
    """
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    facts = {"folder": str(folder), "existing": str(existing), "type": _file_system(existing)}
    if not existing.is_dir():
        return {**facts, "error": f"{existing} is not a folder"}
    status, usage = os.statvfs(existing), shutil.disk_usage(existing)
    space = {"free": usage.free, "total": usage.total, "has_inodes": status.f_favail > 0 or status.f_files == 0}
    try:
        with tempfile.TemporaryDirectory(prefix=".doctor-", dir=existing) as scratch:
            return {**facts, **space, "write_s": _seconds_to_replace(Path(scratch)), "lock": _lock(Path(scratch))}
    except OSError as error:
        return {**facts, **space, "error": reason_of(error)}


def _seconds_to_replace(scratch: Path) -> float:
    """Replace a file of 64 KiB by fsync and rename, as a checkpoint is written, and return the time."""
    path = scratch / "file"
    write_atomically(path, b"old")
    start = time.monotonic()
    write_atomically(path, new := os.urandom(2**16))
    duration = time.monotonic() - start
    if path.read_bytes() != new or [*scratch.iterdir()] != [path]:
        raise OSError(0, "a replaced file does not have the content that was written")
    return duration


def _lock(scratch: Path) -> str:
    """Return "works" if another process cannot take a lock that this one holds; otherwise the fault."""
    path = scratch / "lock"
    words = [sys.executable, "-c", _TRY_LOCK, str(path)]
    try:
        with locked(path, wait=False):
            tried = subprocess.run(words, check=False, capture_output=True, text=True, timeout=30)
    except OSError as error:
        return f"refused: {reason_of(error)}"
    outcome = tried.stdout.strip()
    if outcome == "refused":
        return "works"
    last = (tried.stderr.strip().splitlines() or ["no message"])[-1]
    return "two processes hold one lock" if outcome == "taken" else f"the test failed: {last}"


def _file_system(folder: Path) -> str:
    """Return the type of the file system of a folder, such as ext4 or nfs4; empty if it is unknown."""
    try:
        lines = Path("/proc/self/mounts").read_text(errors="replace").splitlines()
    except OSError:
        return ""
    mounts = {
        re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), line.split()[1]): line.split()[2] for line in lines
    }
    place = folder.resolve()
    return next((mounts[str(path)] for path in (place, *place.parents) if str(path) in mounts), "")


def check_folder(facts: Mapping[str, Facts], part: str, name: str, option: str) -> Check:
    """Check a folder.

    Args:
        facts: of all parts.
        part: `folder_facts` of the folder.
        name: of the check.
        option: the option or variable that sets another folder.
    """
    folder = facts_of(facts, part)
    other = f"choose another folder: {option}"
    if "folder" not in folder:
        return fail(name, f"the file system does not answer: {folder['error']}", other)
    where = (
        folder["folder"] if folder["folder"] == folder["existing"] else f"{folder['folder']}, in {folder['existing']}"
    )
    where += f" ({folder['type']})" if folder["type"] else ""
    if "error" in folder:
        return fail(name, f"{where} cannot be written: {folder['error']}", other)
    found = f"{where}: {folder['free'] / GIB:.1f} of {folder['total'] / GIB:.1f} GiB free"
    if folder["free"] < LEAST_FREE_GIB * GIB or not folder["has_inodes"]:
        inodes = "" if folder["has_inodes"] else ", but 0 free inodes, so no file can be created"
        return fail(name, found + inodes, other)
    if folder["lock"] != "works":
        why = f"locks do not work: {folder['lock']}. Two jobs could write to one run"
        return fail(name, f"{found}; {why}", f"{other}; or mount it with locks (NFS: without nolock; Lustre: flock)")
    found += f", replaces a file in {1000 * folder['write_s']:.3g} ms, locks work"
    return note(name, found, "remove old runs") if folder["free"] < SPARE_GIB * GIB else ok(name, found)
