"""Freeze parameters by patterns of their names, and keep the norms among them in evaluation mode."""

from __future__ import annotations

from collections.abc import Sequence
from types import MethodType

from torch import nn

from hvd_batchgrow.messages.errors import Fault
from hvd_batchgrow.nn.ghost.ghost_batch_norm import GhostBatchNorm
from hvd_batchgrow.nn.name_patterns import matches, names_of_parameters, nearest


def freeze(model: nn.Module, patterns: Sequence[str]) -> list[Fault]:
    """Freeze the parameters that match a pattern, and the statistics of norms whose own parameters are all frozen.

    A norm is a module with a buffer `running_mean`. A norm without parameters is frozen if a pattern matches its name.
    Frozen norms stay in evaluation mode, whatever mode the network has. Other modules, such as dropout, follow the
    network's mode.

    Args:
        model: changed in place.
        patterns: as `matches` reads them.

    Returns:
        A fault for each pattern that matches nothing, or if nothing is left to train.
    """
    parameters = names_of_parameters(model)
    norms = _norms(model)
    found = {norm: [pattern for pattern in patterns if _is_inside(norm, names, pattern)] for norm, names in norms}
    matched = {p: [pattern for pattern in patterns if matches(pattern, names)] for p, names in parameters.items()}
    effective = {pattern for some in (*found.values(), *matched.values()) for pattern in some}
    all_names = [name for names in parameters.values() for name in names]
    faults = [
        Fault("model.freeze", f"{pattern!r} matches no parameter{nearest(pattern, all_names)}")
        for pattern in patterns
        if pattern not in effective
    ]
    for parameter, of in matched.items():
        if of:
            parameter.requires_grad_(False)
    if not any(p.requires_grad for p in parameters):
        faults.append(Fault("model.freeze", "leaves no parameter to train"))
    for norm, _ in norms:
        own = list(norm.parameters(recurse=False))
        if found[norm] or (any(matched[p] for p in own) and not any(p.requires_grad for p in own)):
            _keep_in_evaluation(norm)
    return faults


def _norms(model: nn.Module) -> list[tuple[nn.Module, list[str]]]:
    """Return the modules with running statistics, each with all its names."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if module._buffers.get("running_mean") is not None:
            names.setdefault(module, []).append(name)
    return list(names.items())


def _is_inside(norm: nn.Module, names: Sequence[str], pattern: str) -> bool:
    """Return whether a pattern matches a norm that has no parameters, by which it could be matched."""
    return not any(True for _ in norm.parameters(recurse=False)) and matches(pattern, names)


def _keep_in_evaluation(norm: nn.Module) -> None:
    norm.training = False
    if isinstance(norm, GhostBatchNorm):
        norm.frozen = True
    else:
        norm.train = MethodType(_train_children, norm)  # type: ignore[method-assign]


def _train_children(norm: nn.Module, mode: bool = True) -> nn.Module:
    """Set the mode of all modules inside a norm, but not its own."""
    nn.Module.train(norm, mode)
    norm.training = False
    return norm
