"""Settings for all tests."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# A slow example means a busy machine, not a fault.
settings.register_profile("default", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("default")

MARKERS = {"parallel": "mpi", "launch": "mpi", "slurm": "slurm", "gpu": "gpu", "storm": "slow"}
"""The marker of every test in a folder; pyproject.toml says what each marker means."""


@pytest.hookimpl(tryfirst=True)  # before pytest reads -m
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests by their folder."""
    for item in items:
        folder = item.path.relative_to(Path(__file__).parent).parts[0]
        if folder in MARKERS:
            item.add_marker(MARKERS[folder])
