"""Make every `import torchvision` work with a CPU build of torch.

The torchvision of PyPI is built for torch with CUDA. With a CPU build of torch, its compiled operators cannot be
loaded, and the import fails at the first one that it describes, `torchvision::nms`. Networks, transforms and data sets
do not use these operators. If they are declared without a kernel, the import succeeds, and only calls of them fail.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_MISSING = "operator torchvision::nms does not exist"
_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_declared: list[Any] = []
"""Fragments of torch's operator library, kept because deleting one would delete its operators."""


def repair_torchvision() -> None:
    """Let all later imports of torchvision in this process succeed.

    This imports neither torch nor torchvision. When torchvision is first imported and its operators are missing
    beside a CPU build of torch, they are declared and it is imported again. An import that succeeds, or fails for
    another reason, stays as it is.
    """
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def import_torchvision() -> None:
    """Import torchvision, even if its compiled operators cannot be loaded.

    Raises:
        ImportError: torchvision is not installed.
        RuntimeError: the import fails for another reason.
    """
    repair_torchvision()
    importlib.import_module("torchvision")


class _Finder(MetaPathFinder):
    """Finds torchvision where the other finders do, and adds the second attempt to its loader."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "torchvision":
            return None
        others = (finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec"))
        spec = next((found for finder in others if (found := finder.find_spec(fullname, path, target))), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(Loader):
    """Runs torchvision's own loader, and once more if operators had to be declared."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)  # type: ignore[no-any-return]

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        before = dict(vars(module))
        try:
            self._loader.exec_module(module)
        except RuntimeError as error:
            if _MISSING not in str(error) or not _is_cpu_build():
                raise
            for name in [name for name in sys.modules if name.startswith("torchvision.")]:
                del sys.modules[name]  # partly imported
            vars(module).clear()
            vars(module).update(before)
            _declare_operators()
            self._loader.exec_module(module)


def _is_cpu_build() -> bool:
    import torch

    return torch.version.cuda is None


def _declare_operators() -> None:
    import torch

    _declared.append(library := torch.library.Library("torchvision", "FRAGMENT"))
    for name in ("nms", "qnms"):
        library.define(name + _SCHEMA)
