"""Ghost norm for any network: its batch norms are replaced, with all they hold."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from hvd_batchgrow.nn.ghost_batch_norm import GhostBatchNorm, GhostBatchNorm1d, GhostBatchNorm2d

_KINDS: dict[type[_BatchNorm], type[GhostBatchNorm]] = {
    nn.BatchNorm1d: GhostBatchNorm1d,
    nn.BatchNorm2d: GhostBatchNorm2d,
}


def convert_ghost_batch_norm(model: nn.Module, ghost_batch: int, momentum: float | None = None) -> nn.Module:
    """Replace every nn.BatchNorm1d and nn.BatchNorm2d of a model, in place.

    Weights, running statistics, eps, mode, device and type are kept. What a subclass does beside
    normalising, as timm's BatchNormAct2d does, follows the ghost norm.

    Args:
        model: any network; a batch norm itself is replaced by what is returned.
        ghost_batch: γ, in samples.
        momentum: weight of one ghost batch in the running statistics; None: each norm's own.

    Returns:
        the model.

    Raises:
        ValueError: naming each norm that has no ghost form: of three dimensions, without affine parameters or
            running statistics, or with a cumulative average (momentum=None).
    """
    faults = [f"{name or 'the model'}: {fault}" for name, m in model.named_modules() if (fault := _fault(m, momentum))]
    if faults:
        raise ValueError("these norms have no ghost form:\n  " + "\n  ".join(faults))
    if isinstance(model, _BatchNorm):
        return _ghost_form(model, ghost_batch, momentum)
    made: dict[nn.Module, nn.Module] = {}  # a norm that is used twice stays one
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if isinstance(child, _BatchNorm):
                if child not in made:
                    made[child] = _ghost_form(child, ghost_batch, momentum)
                setattr(parent, name, made[child])
    return model


def _fault(module: nn.Module, momentum: float | None) -> str | None:
    if not isinstance(module, _BatchNorm):
        return None
    if not isinstance(module, tuple(_KINDS)):
        return f"{type(module).__name__} is none of {', '.join(kind.__name__ for kind in _KINDS)}"
    if not (module.affine and module.track_running_stats):
        return "must have affine parameters and running statistics"
    return "has a cumulative average: give a momentum" if module.momentum is None and momentum is None else None


def _ghost_form(norm: _BatchNorm, ghost_batch: int, momentum: float | None) -> nn.Module:
    kind = next(ghost for plain, ghost in _KINDS.items() if isinstance(norm, plain))
    weight = momentum if momentum is not None else norm.momentum
    assert weight is not None
    ghost = kind(norm.num_features, ghost_batch, norm.eps, weight).to(norm.weight.device, norm.weight.dtype)
    ghost.load_state_dict({key: value for key, value in norm.state_dict().items() if key in ghost.state_dict()})
    ghost.weight.requires_grad_(norm.weight.requires_grad)
    ghost.bias.requires_grad_(norm.bias.requires_grad)
    ghost.train(norm.training)
    after = [getattr(norm, name) for name in ("drop", "act") if isinstance(getattr(norm, name, None), nn.Module)]
    return nn.Sequential(ghost, *after) if after else ghost
