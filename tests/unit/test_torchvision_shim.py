"""The user's modules may import torchvision, also beside a CPU build of torch that cannot load its operators."""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tomli_w
from PIL import Image

from hvd_batchgrow import torchvision_shim
from hvd_batchgrow.import_string import NotFound, find_callable
from tests.helpers import job_tree, small_source, write_idx_folder

needs_torchvision = pytest.mark.skipif(importlib.util.find_spec("torchvision") is None, reason="needs torchvision")

STAND_IN = {
    "torchvision/__init__.py": """
        from torchvision import _first
        if "declared" not in _first.__dict__:
            raise RuntimeError("operator torchvision::nms does not exist")
        from torchvision import models
    """,
    "torchvision/_first.py": """
        from hvd_batchgrow import torchvision_shim
        if torchvision_shim._declared:
            declared = True
    """,
    "torchvision/models.py": "VALUE = 3",
    "userside.py": """
        import torchvision
        from torchvision.models import VALUE
        def value(): return VALUE
    """,
}
"""A torchvision that fails until operators are declared, and a user's module that imports it."""


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(textwrap.dedent(text))


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Yield a folder with a stand-in for torchvision; unload it at the end."""
    ours = ("torchvision", "userside")
    true_ones = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] in ours}
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    monkeypatch.setattr(torchvision_shim, "_declared", [])
    monkeypatch.setattr(torchvision_shim, "_declare_operators", lambda: torchvision_shim._declared.append("nms"))
    monkeypatch.setattr(torchvision_shim, "_is_cpu_build", lambda: True)
    write(tmp_path, STAND_IN)
    yield tmp_path
    for name in [name for name in sys.modules if name.split(".")[0] in ours]:
        del sys.modules[name]
    sys.modules.update(true_ones)


def test_a_module_that_imports_torchvision_is_imported_although_operators_are_missing(stand_in: Path) -> None:
    assert find_callable("userside:value")() == 3
    assert torchvision_shim._declared == ["nms"]
    spec = sys.modules["torchvision"].__spec__
    assert spec is not None
    assert type(spec.loader) is importlib.machinery.SourceFileLoader
    assert sys.modules["torchvision._first"].__dict__["declared"]


def test_a_later_import_within_the_users_function_works_too(stand_in: Path) -> None:
    write(stand_in, {"userside.py": "def value():\n    import torchvision\n    return torchvision.models.VALUE\n"})
    value = find_callable("userside:value")
    assert "torchvision" not in sys.modules
    assert value() == 3


def test_beside_a_cuda_build_nothing_is_declared(stand_in: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchvision_shim, "_is_cpu_build", lambda: False)
    with pytest.raises(NotFound, match=r"RuntimeError: operator torchvision::nms does not exist \(.*__init__"):
        find_callable("userside:value")
    assert torchvision_shim._declared == []


def test_a_module_that_exits_at_import_is_reported(stand_in: Path) -> None:
    write(stand_in, {"userside.py": "import sys\nsys.exit(3)\n"})
    with pytest.raises(NotFound, match=r"userside:value cannot be imported: SystemExit: 3 \(.*userside.py, line 2\)"):
        find_callable("userside:value")


def test_another_failure_of_torchvision_stays_as_it_is(stand_in: Path) -> None:
    write(stand_in, {"torchvision/__init__.py": "raise RuntimeError('built for another torch')"})
    with pytest.raises(NotFound, match="built for another torch"):
        find_callable("userside:value")
    assert torchvision_shim._declared == []
    assert "torchvision" not in sys.modules


def test_the_finder_is_added_once(stand_in: Path) -> None:
    for _ in range(3):
        find_callable("userside:value")
    assert sum(isinstance(finder, torchvision_shim._Finder) for finder in sys.meta_path) == 1


def test_a_module_without_torchvision_costs_no_import_of_torch(tmp_path: Path) -> None:
    write(tmp_path, {"plain.py": "def one(): return 1"})
    code = (
        "import sys; from hvd_batchgrow.import_string import find_callable; assert find_callable('plain:one')() == 1; "
        "print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, capture_output=True, text=True)
    assert {"torch", "torchvision", "numpy"}.isdisjoint(done.stdout.split())


USER = {
    "own_network": """
        from torch import nn
        def network(num_classes):
            return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, num_classes))
    """,
    "own_source": """
        from tests.helpers import small_source
        def source(data): return small_source()
    """,
    "own_curve": """
        def curve(epoch): return 1 if epoch < 1 else 0.5
    """,
}
COMMANDS = {
    "train": ["train", "job.toml"],
    "evaluate": ["evaluate", "runs/small"],
    "predict": ["predict", "runs/small", "photo.png"],
    "verify": ["verify", "job.toml", "--layouts", "1x2x8,1x1x16"],
    "plan": ["plan", "job.toml"],
}


@pytest.mark.slow
@needs_torchvision
@pytest.mark.parametrize(
    ("module", "commands"),
    [
        ("own_network", ("train", "predict", "verify")),
        ("own_source", ("train", "evaluate")),
        ("own_curve", ("plan",)),
    ],
)
def test_each_command_imports_users_modules_that_import_torchvision_first(
    tmp_path: Path, module: str, commands: tuple[str, ...]
) -> None:
    write(tmp_path, {f"{name}.py": textwrap.dedent(text) for name, text in USER.items()})
    path = tmp_path / f"{module}.py"
    path.write_text(f"import torchvision\nfrom torchvision.transforms import v2\n{path.read_text()}")
    write_idx_folder(tmp_path / "data", small_source())
    Image.fromarray(small_source().test.fetch(np.array([0]))[0, :, :, 0]).save(tmp_path / "photo.png")
    tree = job_tree("data")
    del tree["model"]["channels"]
    tree["model"]["name"] = "own_network:network"
    if module == "own_source":
        tree["data"]["source"] = "own_source:source"
    if module == "own_curve":
        tree["schedule"] = {"policy": "import", "lr_schedule": "own_curve:curve", "epochs": 2, "num_phases": 2}
        tree["schedule"] |= {"global_batch": 16, "max_batch": 96}
    (tmp_path / "job.toml").write_text(tomli_w.dumps(tree))
    for command in commands:
        words = [sys.executable, "-m", "hvd_batchgrow.cli", *COMMANDS[command]]
        done = subprocess.run(words, check=False, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
