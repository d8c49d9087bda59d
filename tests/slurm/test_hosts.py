"""What virtual hosts see of one another's files."""

from __future__ import annotations

import os
import shutil
import uuid
from pathlib import Path

import pytest

from tests.slurm.hosts import Hosts, why_no_hosts


@pytest.mark.skipif(why_no_hosts() is not None, reason=str(why_no_hosts()))
@pytest.mark.parametrize("place", ["/tmp", "/run", "/dev/shm"])  # noqa: S108
def test_a_shared_folder_is_the_same_on_every_host_and_the_rest_of_its_place_is_private(
    tmp_path: Path, place: str
) -> None:
    private = Path(place) / f"hosts-{uuid.uuid4()}"
    checkout = private / "check out"
    checkout.mkdir(parents=True)
    try:
        with Hosts(("head", "n1"), tmp_path, dict(os.environ), shared=(checkout,)) as hosts:
            written = hosts.run("n1", "sh", "-c", "echo of n1 > file && touch ../of-n1", cwd=checkout)
            assert written.returncode == 0, written.stderr
            assert hosts.run("head", "cat", "file", cwd=checkout).stdout == "of n1\n"
            assert hosts.run("head", "ls", str(private), cwd=Path("/")).stdout == "check out\n"
        assert (checkout / "file").read_text() == "of n1\n"
        assert [path.name for path in private.iterdir()] == ["check out"]
    finally:
        shutil.rmtree(private)
