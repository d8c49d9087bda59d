"""Convert the batch norms of a model to ghost norms."""

from __future__ import annotations

from collections import Counter, defaultdict
from itertools import pairwise

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from hvd_batchgrow.nn.ghost.ghost_batch_norm import (
    GhostBatchNorm,
    GhostBatchNorm1d,
    GhostBatchNorm2d,
    check_ghost_batch,
)
from hvd_batchgrow.nn.modes import modes_of
from hvd_batchgrow.nn.overridden import has_hooks, has_own_methods


class GhostBatchNormAct2d(GhostBatchNorm2d):
    """`GhostBatchNorm2d`, followed by the `drop` and the `act` of timm's `BatchNormAct2d`, under the same names.

    If `drop` is an identity, `act` a ReLU, and neither has hooks, the norm's kernel computes the ReLU.
    """

    drop: nn.Module
    act: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """Normalize, drop and activate."""
        is_plain = type(self.drop) is nn.Identity and type(self.act) is nn.ReLU
        if is_plain and not has_hooks(self.drop, self.act):
            return self._normalize(x, relu=True)
        return self.act(self.drop(super().forward(x)))  # type: ignore[no-any-return]


def convert_ghost_batch_norm(model: nn.Module, ghost_batch: int, momentum: float | None = None) -> nn.Module:
    """Replace all batch norms by ghost norms.

    Each ghost norm keeps the weight, bias and running statistics of the norm that it replaces. They are the
    same tensors, so their type, device, `requires_grad` and optimizer state stay. It also keeps eps, momentum,
    mode, and timm's activation. Results in evaluation are bit-identical. A norm that is used in several places
    is replaced by one ghost norm. A norm that `model.train()` keeps in evaluation mode stays there: the ghost norm is
    frozen if `train()` no longer recognizes it. Frozen norms of another class (`FrozenBatchNorm2d`) are not replaced.
    `nn.SyncBatchNorm` becomes `GhostBatchNorm`, which does not communicate in a forward.

    The momentum was the weight of a batch, and becomes the weight of γ samples. If the running statistics
    are to average over as many samples as before, set it to momentum · γ / batch.

    Args:
        model: from any library; changed in place.
        ghost_batch: γ, in samples.
        momentum: momentum of all ghost norms; None: each keeps the momentum of its norm.

    Returns:
        The model, or a ghost norm if the model itself is a norm.

    Raises:
        ValueError: some norms cannot be converted. The message names all of them with the reasons; the model
            is not changed.
    """
    check_ghost_batch(ghost_batch)
    faults = [
        f"{path or 'the model itself'}: {fault}"
        for path, module in model.named_modules()
        if isinstance(module, _BatchNorm) and (fault := _fault(module, momentum))
    ]
    shared = _sharing(model)
    faults += [
        f"{path}: shares the running statistics of another norm; use separate ones"
        for path, module in model.named_modules()
        if module in shared
    ]
    in_evaluation = modes_of(model, training=False)
    faults += [
        f"{path}: is in training mode when the network is evaluated, where a ghost norm has no ghost batches"
        for path, module in model.named_modules()
        if isinstance(module, _BatchNorm) and type(module).train is nn.Module.train and in_evaluation[module]
    ]
    if faults:
        raise ValueError("these norms cannot be converted to ghost norms:\n  " + "\n  ".join(faults))
    ghosts = {
        module: _ghost(module, ghost_batch, momentum) for module in model.modules() if isinstance(module, _BatchNorm)
    }
    in_training = modes_of(model, training=True)
    for parent in list(model.modules()):
        for name, child in parent._modules.items():  # named_children() omits the second name of a shared module
            if isinstance(child, _BatchNorm):
                parent._modules[name] = ghosts[child]
    converted = ghosts[model] if isinstance(model, _BatchNorm) else model
    now_in_training = modes_of(converted, training=True)
    for module, ghost in ghosts.items():
        ghost.frozen = now_in_training[ghost] and not in_training[module]
    return converted


def fuse_relu(model: nn.Module) -> nn.Module:
    """Let ghost norms compute the ReLU that follows them in an `nn.Sequential`, which saves memory traffic on a GPU.

    An `nn.Identity` replaces the ReLU, so that names stay. Outputs and gradients of the whole sequence stay too,
    on a CPU bit-identically. The output of the norm alone changes, so a model must not use it elsewhere. Norms
    and ReLUs with hooks, and norms used in several places, are not fused.

    Args:
        model: changed in place.

    Returns:
        The model.
    """
    num_uses = Counter(child for module in model.modules() for child in module._modules.values())
    for sequence in [module for module in model.modules() if type(module) is nn.Sequential]:
        for (_, norm), (name, relu) in pairwise(list(sequence._modules.items())):
            if not isinstance(norm, GhostBatchNorm) or isinstance(norm, GhostBatchNormAct2d) or num_uses[norm] > 1:
                continue
            if type(relu) is nn.ReLU and not has_hooks(norm, relu):
                norm.relu = True
                sequence._modules[name] = nn.Identity().train(relu.training)
    return model


def _fault(module: _BatchNorm, momentum: float | None) -> str | None:
    is_unknown = _has_own_forward(module) and not _is_timms(module)
    used = module.momentum if momentum is None else momentum
    faults = {
        "is a BatchNorm3d; ghost norms are for inputs of 2 to 4 dimensions": isinstance(module, nn.BatchNorm3d),
        "is uninitialized; call the model once": isinstance(module, nn.modules.lazy.LazyModuleMixin),
        "has no running statistics (track_running_stats=False)": module.running_mean is None,
        "averages over all batches (momentum=None); give a momentum": module.momentum is None and momentum is None,
        f"has momentum {used}; a ghost norm's must be in [0, 1]": used is not None and not 0 <= used <= 1,
        f"has eps = {module.eps}; a ghost norm's must be >= 0": not module.eps >= 0,
        f"is a {type(module).__name__}, which overrides forward() and is not timm's BatchNormAct2d": is_unknown,
        "has hooks, which would be lost": has_hooks(module),
        "has parametrized weights, which would be lost": is_parametrized(module),
        "overrides train() or forward(), which would be lost; do that in the network around it": _is_overridden(module),
    }
    return next((fault for fault, is_so in faults.items() if is_so), None)


def _is_overridden(module: _BatchNorm) -> bool:
    """Return whether the class overrides `train`, or the instance has its own `train` or `forward`."""
    return type(module).train is not nn.Module.train or has_own_methods(module)


def _sharing(model: nn.Module) -> set[_BatchNorm]:
    """Return the norms that share running statistics with another norm."""
    norms: dict[int, set[_BatchNorm]] = defaultdict(set)
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            for buffer in (module.running_mean, module.running_var):
                if buffer is not None and not is_lazy(buffer):
                    norms[id(buffer)].add(module)
    return {norm for sharing in norms.values() if len(sharing) > 1 for norm in sharing}


def _has_own_forward(module: _BatchNorm) -> bool:
    return type(module).forward not in (_BatchNorm.forward, nn.SyncBatchNorm.forward)


def _is_timms(module: _BatchNorm) -> bool:
    """Return whether the forward is that of timm's BatchNormAct2d or of its synchronized form; timm is not imported."""
    owner = next(kind for kind in type(module).__mro__ if "forward" in vars(kind))
    is_timms = owner.__module__.partition(".")[0] == "timm"
    is_known = owner.__name__ in {"BatchNormAct2d", "SyncBatchNormAct"} and set(module._modules) == {"drop", "act"}
    return is_timms and is_known


def _ghost(module: _BatchNorm, ghost_batch: int, momentum: float | None) -> GhostBatchNorm:
    ghost = _class_for(module)(
        module.num_features,
        ghost_batch,
        module.eps,
        momentum if momentum is not None else module.momentum,  # type: ignore[arg-type]
        module.affine,
    )
    for name, child in module.named_children():
        ghost.add_module(name, child)
    ghost.weight, ghost.bias = module.weight, module.bias
    ghost.running_mean, ghost.running_var = module.running_mean, module.running_var  # type: ignore[assignment]
    ghost.training = module.training
    return ghost


def _class_for(module: _BatchNorm) -> type[GhostBatchNorm]:
    if _has_own_forward(module):
        return GhostBatchNormAct2d
    if isinstance(module, nn.BatchNorm1d):
        return GhostBatchNorm1d
    return GhostBatchNorm2d if isinstance(module, nn.BatchNorm2d) else GhostBatchNorm
