"""Settings for all tests."""

import gc
import os
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from xdist.scheduler import LoadFileScheduling

from tests.devices import hide_gpus, only_gpu_tests

# Imports and collection create a million objects that live until the process ends. Without the collector, which finds
# no garbage there, collecting the unit tests takes a fifth less processor time.
gc.disable()

# A slow example means a busy machine, not a fault.
settings.register_profile("default", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("default")

MARKERS = {"parallel": "mpi", "launch": "mpi", "slurm": "slurm", "gpu": "gpu", "storm": "slow", "emulated": "slow"}
"""The marker of every test in a folder; pyproject.toml says what each marker means."""


def pytest_configure(config: pytest.Config) -> None:
    """Hide the GPUs, unless all tests of this run need one."""
    if not only_gpu_tests(config.args, config.invocation_params.dir):
        hide_gpus()


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Let the garbage collector run during the tests, over what they create."""
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.hookimpl(tryfirst=True)  # before pytest reads -m
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests by their folder."""
    for item in items:
        folder = item.path.relative_to(Path(__file__).parent).parts[0]
        if folder in MARKERS:
            item.add_marker(MARKERS[folder])


@pytest.fixture(autouse=True)
def _environment_is_restored() -> Iterator[None]:
    """Fail a test that leaves a changed environment: the processes of later tests would inherit it."""
    before = _environment()
    yield
    assert _environment() == before


def _environment() -> dict[str, str]:
    """Return the environment without what libraries set for themselves."""
    own = ("PYTEST_", "TORCHINDUCTOR_", "_TORCHINDUCTOR_", "HOROVOD_")
    return {name: value for name, value in os.environ.items() if not name.startswith(own)}


BY_PARAMETER = ("tests/launch/test_examples.py", "tests/launch/test_recipes.py")
"""Files whose tests share what is made for each parameter, such as an example, and nothing else."""


class ByFileAndCluster(LoadFileScheduling):  # type: ignore[misc]  # xdist has no types
    """One process runs all tests of a file, of a parameter in `BY_PARAMETER`, or of tests/slurm with its cluster."""

    def _split_scope(self, nodeid: str) -> str:
        if nodeid.startswith("tests/slurm/"):
            return "tests/slurm"
        file: str = super()._split_scope(nodeid)
        return file + nodeid.partition("[")[2] if nodeid.startswith(BY_PARAMETER) else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadFileScheduling | None:
    """Replace `--dist loadfile`."""
    return ByFileAndCluster(config, log) if config.option.dist == "loadfile" else None
