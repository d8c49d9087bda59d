"""torchvision beside a torch that was built for the CPU."""

from __future__ import annotations

import importlib
import sys

import torch

_MISSING = "operator torchvision::nms does not exist"
_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_declared: list[torch.library.Library] = []


def import_torchvision() -> None:
    """Import torchvision, also where its compiled operators do not load.

    The package that the index serves is built for a torch with CUDA. Beside one without, its
    operators are missing, and its import ends at the first that it describes, `torchvision::nms`.
    Networks use none of them: declared without a kernel, they let the import pass, and fail if called.
    Nothing is declared where the import succeeds, where torch has CUDA, or where it fails otherwise.

    Raises:
        ImportError: it is not installed.
        RuntimeError: it fails for another reason.
    """
    try:
        importlib.import_module("torchvision")
        return
    except RuntimeError as error:
        if torch.version.cuda is not None or _MISSING not in str(error):
            raise
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]  # half imported
    # Kept: the operators go when the library does.
    _declared.append(library := torch.library.Library("torchvision", "FRAGMENT"))
    for name in ("nms", "qnms"):
        library.define(name + _SCHEMA)
    importlib.import_module("torchvision")
