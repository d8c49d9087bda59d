"""A folder gets its name when it is complete, and a lock has one holder."""

from __future__ import annotations

from pathlib import Path

import pytest

from hvd_batchgrow.storage.atomic import new_folder
from hvd_batchgrow.storage.file_lock import locked


def test_a_folder_gets_its_name_when_it_is_complete(tmp_path: Path) -> None:
    (tmp_path / ".made.writing").mkdir()
    (tmp_path / ".made.writing" / "left").touch()  # by a killed process
    with new_folder(tmp_path / "made") as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "file").write_text("x")
        assert not (tmp_path / "made").exists()
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")) == [
        *("made", "made/inner", "made/inner/file")
    ]


def test_a_folder_that_fails_leaves_the_previous_one_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "old").touch()
    with pytest.raises(ZeroDivisionError), new_folder(tmp_path / "made") as folder:
        (folder / "new").write_bytes(bytes(1 // 0))
    with pytest.raises(OSError, match="not empty"), new_folder(tmp_path / "made") as folder:
        (folder / "new").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["made", "old"]


def test_a_lock_has_one_holder_and_keeps_the_content(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    path.write_text("kept")
    with locked(path), pytest.raises(BlockingIOError), locked(path, wait=False):
        pass
    with locked(path, wait=False):
        assert path.read_text() == "kept"
