"""What these tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.storm.nursery import Nursery


@pytest.fixture(scope="session")
def nursery() -> Iterator[Nursery]:
    """Forks ranks."""
    with Nursery() as nursery:
        yield nursery
