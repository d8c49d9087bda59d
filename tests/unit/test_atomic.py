"""Files that are replaced whole, and paths that cannot be replaced."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from hvd_batchgrow.messages.errors import RunError
from hvd_batchgrow.storage.atomic import write_atomically, write_file


def test_a_link_stays_and_the_file_it_points_to_is_replaced(tmp_path: Path) -> None:
    real, link = tmp_path / "real" / "file", tmp_path / "link"
    real.parent.mkdir()
    real.write_bytes(b"old")
    link.symlink_to(real)
    write_atomically(link, b"new")
    assert link.is_symlink()
    assert real.read_bytes() == b"new"
    assert [path.name for path in real.parent.iterdir()] == ["file"]


def test_a_pipe_is_written_and_stays_a_pipe(tmp_path: Path) -> None:
    """The defect: `report --out PIPE`, or a device such as /dev/null, was replaced by a regular file."""
    pipe, received = tmp_path / "pipe", list[bytes]()
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: received.append(pipe.read_bytes()))
    reader.start()
    write_atomically(pipe, b"new")
    reader.join(10)
    assert received == [b"new"]
    assert pipe.is_fifo()


def test_a_link_to_a_pipe_is_written() -> None:
    """The defect: /dev/stdout leads to /proc/PID/fd/pipe:[…], a path that does not exist."""
    read, write = os.pipe()
    try:
        write_atomically(Path(f"/dev/fd/{write}"), b"new")
        assert os.read(read, 10) == b"new"
    finally:
        os.close(read)
        os.close(write)


def test_a_circle_of_links_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    write_atomically(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"new"


def test_a_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError):
        write_atomically(tmp_path, b"new")


def test_a_file_that_cannot_be_written_is_reported_with_its_path(tmp_path: Path) -> None:
    write_file(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"new"
    with pytest.raises(RunError, match=r"missing/file cannot be written: No such file or directory"):
        write_file(tmp_path / "missing" / "file", b"new")
