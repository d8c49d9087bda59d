"""The package's rooms: what each may import of the others, also within functions."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import hvd_batchgrow

ROOT = Path(hvd_batchgrow.__file__).parent
ORDER = (
    *(
        "messages",
        "torchvision_shim",
        "import_string",
        "storage",
        "comm",
        "interrupt",
        "config",
        "tasks",
        "schedule",
        "data",
        "nn",
        "optim",
        "slurm",
    ),
    *("job_file", "results", "train", "verification", "deployment", "observers", "reports", "library", "doctor", "cli"),
)
"""Each room imports only rooms before it."""


def imported(path: Path) -> Iterator[list[str]]:
    """Yield every name that a file, or any file of a folder, imports, split at its dots."""
    for file in sorted(path.rglob("*.py")) if path.is_dir() else [path.with_suffix(".py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                yield from (alias.name.split(".") for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                yield from ([*(node.module or "").split("."), alias.name] for alias in node.names)


def subfolders(room: str) -> list[str]:
    """Return the names of the packages in a room."""
    return sorted(path.parent.name for path in (ROOT / room).glob("*/__init__.py"))


@pytest.mark.parametrize("room", ORDER)
def test_a_room_imports_only_rooms_before_it(room: str) -> None:
    ours = [parts for parts in imported(ROOT / room) if parts[0] == "hvd_batchgrow"]
    assert [parts for parts in ours if not {*parts[1:2]} <= {"__version__", *ORDER[: ORDER.index(room) + 1]}] == []


@pytest.mark.parametrize("room", [room for room in ORDER if subfolders(room)])
def test_the_subfolders_of_a_room_do_not_import_each_other_in_a_cycle(room: str) -> None:
    names = subfolders(room)
    imports = {
        name: {parts[2] for parts in imported(ROOT / room / name) if parts[:2] == ["hvd_batchgrow", room]}
        for name in names
    }
    TopologicalSorter({name: (found & {*names}) - {name} for name, found in imports.items()}).prepare()


def test_every_file_is_in_a_room() -> None:
    found = {path.stem for path in ROOT.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert found == {"__init__", *ORDER}


@pytest.mark.parametrize("room", ["config", "schedule", "slurm", "results", "reports"])
def test_the_rooms_that_plan_and_compare_import_neither_torch_nor_horovod(room: str) -> None:
    assert not {"torch", "horovod"} & {parts[0] for parts in imported(ROOT / room)}
    files = sorted((ROOT / room).rglob("*.py"))
    names = [".".join(["hvd_batchgrow", *file.relative_to(ROOT).with_suffix("").parts]) for file in files]
    code = f"import importlib, sys; [*map(importlib.import_module, {names})]; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert {"torch", "horovod"}.isdisjoint(loaded)


@pytest.mark.parametrize(
    ("folder", "registry"), [("data/sources", "SOURCES"), ("nn/networks", "MODELS"), ("tasks/kinds", "TASKS")]
)
def test_every_file_of_a_registry_registers_something(folder: str, registry: str) -> None:
    files = [path for path in (ROOT / folder).iterdir() if path.suffix == ".py" and path.name != "__init__.py"]
    assert [path.name for path in files if f"{registry}.register(" not in path.read_text()] == []


def test_sources_and_networks_are_known_without_numpy_torch_and_decoders() -> None:
    code = (
        "import sys; import hvd_batchgrow.job_file; "
        "from hvd_batchgrow.config import model_specs, source_specs, task_specs as t; "
        "model_specs.MODELS.names(), source_specs.SOURCES.names(), t.TASKS.names(); print(*sys.modules)"
    )
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert {"hvd_batchgrow.data.sources.webdataset", "hvd_batchgrow.nn.networks.vgg"} <= {*loaded}
    assert {"numpy", "torch", "PIL", "google.protobuf", "pyarrow", "sklearn", "urllib.request"}.isdisjoint(loaded)
