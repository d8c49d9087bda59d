"""Import torchvision with a CPU build of torch."""

from __future__ import annotations

import importlib
import sys

import torch

_MISSING = "operator torchvision::nms does not exist"
_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_declared: list[torch.library.Library] = []


def import_torchvision() -> None:
    """Import torchvision, even if its compiled operators cannot be loaded.

    The torchvision of PyPI is built for a torch with CUDA. With a CPU build of torch, its operators are
    missing, and the import fails at the first one that it needs, `torchvision::nms`. Networks do not use
    these operators. This function declares them without a kernel: the import then succeeds, and a call of
    such an operator fails. It declares nothing if the import succeeds, or fails for another reason.

    Raises:
        ImportError: torchvision is not installed.
        RuntimeError: the import fails for another reason.
    """
    try:
        importlib.import_module("torchvision")
        return
    except RuntimeError as error:
        if torch.version.cuda is not None or _MISSING not in str(error):
            raise
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]  # partly imported
    # Kept, because deleting the library would delete the operators.
    _declared.append(library := torch.library.Library("torchvision", "FRAGMENT"))
    for name in ("nms", "qnms"):
        library.define(name + _SCHEMA)
    importlib.import_module("torchvision")
