"""Build the optimizer of a job, and set its hyperparameters from phase to phase."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hvd_batchgrow.config.optim import AdamSection, LarsSection, SgdSection
from hvd_batchgrow.optim.eager import SGD, Adam, AdamW
from hvd_batchgrow.optim.groups import ParameterGroup, is_divided, parameter_groups
from hvd_batchgrow.optim.implementation import implementation
from hvd_batchgrow.optim.lars import Lars
from hvd_batchgrow.schedule.phases import Phase


def build_optimizer(model: nn.Module, optim: SgdSection | AdamSection | LarsSection) -> torch.optim.Optimizer:
    """Build torch's SGD, Adam or AdamW, or Lars.

    Weight decay applies to weights of two or more dimensions; with `decay_norm_and_bias` also to normalization
    parameters and biases, which have at most one dimension. Lars never scales the latter. The dimensions decide,
    never the name. `optim.groups` and `optim.layer_decay` divide the parameters further, see `parameter_groups`.

    Raises:
        JobError: a pattern of `optim.groups` matches no parameter that is trained.
    """
    groups = [part for group in parameter_groups(model, optim) for part in _by_dimensions(group)]
    if is_divided(optim):  # other optimizers' states do not contain lr_scale
        groups = [{**group, "lr": optim.lr * group["lr_scale"]} for group in groups]
    else:
        groups = [{key: group[key] for key in ("params", "weight_decay")} for group in groups]
    if isinstance(optim, LarsSection):
        for group in groups:
            group["adapt"] = all(p.ndim > 1 for p in group["params"])
        return Lars(
            groups, lr=optim.lr, momentum=optim.momentum, trust_coefficient=optim.trust_coefficient, eps=optim.eps
        )
    chosen = implementation(model.parameters())
    if isinstance(optim, SgdSection):
        # As an argument, torch would refuse it with momentum 0, which the schedule may raise.
        groups = [{**group, "nesterov": optim.nesterov} for group in groups]
        return SGD(groups, lr=optim.lr, momentum=optim.momentum, **chosen)
    kind = Adam if optim.name == "adam" else AdamW
    return kind(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, **chosen)


def _by_dimensions(group: ParameterGroup) -> list[dict[str, Any]]:
    """Return torch's parameter groups for the parameters of two or more dimensions and for the others."""
    decay_of_others = group.weight_decay if group.decay_norm_and_bias else 0.0
    parts: list[dict[str, Any]] = [
        {"params": [p for p in group.parameters if p.ndim > 1], "weight_decay": group.weight_decay},
        {"params": [p for p in group.parameters if p.ndim <= 1], "weight_decay": decay_of_others},
    ]
    return [{**part, "lr_scale": group.lr_scale} for part in parts if part["params"]]


def lr_ratios(optimizer: torch.optim.Optimizer) -> list[float]:
    """Return the learning rate of each parameter group, divided by the schedule's.

    The ratio is the group's `lr_scale`, as in timm, if any group has one. Otherwise the first group has the
    schedule's learning rate, and the ratios are those to the first group's. The learning rates are those with which
    the groups were made: `initial_lr`, if a scheduler of torch has stored it.

    Raises:
        ValueError: the first group's is 0, and there are others.
    """
    if any("lr_scale" in group for group in optimizer.param_groups):
        return [float(group.get("lr_scale", 1.0)) for group in optimizer.param_groups]
    first, *others = [float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups]
    if others and not first:
        fault = f"the first parameter group has lr 0, others {others}: their ratio to it is undefined"
        raise ValueError(f"{fault}; make the optimizer with its learning rates, and load its state afterwards")
    return [1.0, *(1.0 if lr == first else lr / first for lr in others)]


def set_hyperparameters(
    optimizer: torch.optim.Optimizer,
    phase: Phase,
    ratios: Sequence[float] | None = None,
    *,
    rescale_momentum: bool = False,
) -> None:
    """Set the learning rate and momentum of the next update.

    torch's SGD is u = m u + g, w -= ε u: with a mean gradient, a change of ε or B needs no correction
    of u (Goyal et al. 2017, §3.2, corrects the form that has ε inside u). Lars has that form, and
    corrects its buffer itself, at the update that uses a new ε. If m becomes m', the buffer of either
    settles at a level larger by (1-m)/(1-m').

    Args:
        optimizer: of `build_optimizer`.
        phase: gives the values.
        ratios: of `lr_ratios`; None: all groups get the phase's learning rate.
        rescale_momentum: scale the buffer to its new level at once, instead of letting it settle.
    """
    groups = optimizer.param_groups
    for group, ratio in zip(groups, ratios or [1.0] * len(groups), strict=True):
        group["lr"] = phase.lr * ratio
    set_momentum(optimizer, phase, rescale=rescale_momentum)


def set_momentum(
    optimizer: torch.optim.Optimizer, phase: Phase, *, rescale: bool = False, keeps_state: bool = False
) -> None:
    """Set the momentum of the next update: m, or β₁ of Adam, and β₂ and eps if the phase has them.

    If m becomes 0, or was 0, the buffer is cleared. With m = 0, torch's SGD neither uses nor updates it, so a later
    phase with momentum would step along gradients of long ago; and Lars keeps the last gradient in it.

    Args:
        optimizer: a group without "momentum" and "betas" is left as it is.
        phase: gives the values.
        rescale: `rescale_momentum` of `set_hyperparameters`.
        keeps_state: the optimizer's state, if it has one, is already that of the phase: leave it as it is.

    Raises:
        ValueError: the phase has momentum, and a parameter group has not.
    """
    check_momentum(optimizer, phase.momentum)
    for group in optimizer.param_groups:
        if "betas" in group:
            set_betas(optimizer, group, phase.momentum, phase.beta2, keeps_state=keeps_state)
            if phase.eps is not None:
                group["eps"] = phase.eps
        elif "momentum" in group:
            before, group["momentum"] = group["momentum"], phase.momentum
            if keeps_state or before == phase.momentum:
                continue
            if not (before and phase.momentum):
                _scale_buffers(optimizer, group["params"], 0.0)
            elif rescale:
                _scale_buffers(optimizer, group["params"], (1 - before) / (1 - phase.momentum))


def check_momentum(optimizer: torch.optim.Optimizer, momentum: float) -> None:
    """Raise ValueError if a plan has momentum, and a parameter group has neither "momentum" nor "betas"."""
    if momentum and not all("momentum" in group or "betas" in group for group in optimizer.param_groups):
        kind = type(optimizer).__name__
        raise ValueError(f"{kind} has no momentum, and the plan sets {momentum:g}; use plan_updates(…, momentum=0)")


def set_betas(
    optimizer: torch.optim.Optimizer,
    group: dict[str, Any],
    beta1: float,
    beta2: float | None,
    *,
    keeps_state: bool = False,
) -> None:
    """Set β₁ and β₂ of a parameter group of Adam; further betas, as of Adan, stay as they are.

    Adam divides its average of squares by 1 - β₂^t, the sum of the weights of all t squares. If β₂ becomes β₂', t
    becomes t' = t ln β₂ / ln β₂', so that the sum stays that of the average. It divides its average of gradients by
    1 - β₁^t, which becomes 1 - β₁'^t', so the average is multiplied by the ratio of the two; with β₁' = β₁^κ and
    β₂' = β₂^κ it is 1. Optimizers that correct by a product of all β₁, as NAdam does, need no such factor. With β₂ = 0
    the sum is 1 from the first step on, and a later t' is so large that it stays 1.

    Args:
        optimizer: the group's.
        group: of its `param_groups`.
        beta1: β₁.
        beta2: β₂; None: unchanged.
        keeps_state: see `set_momentum`.
    """
    before = group["betas"]
    after = (beta1, before[1] if beta2 is None else beta2, *before[2:])
    group["betas"] = after
    if keeps_state or after == tuple(before):
        return
    states = [optimizer.state[parameter] for parameter in group["params"] if parameter in optimizer.state]
    for state in states:
        if "step" not in state:  # Lion and others without a correction
            continue
        weights = _sum_of_weights(before[0], state["step"])
        if 0 < before[1] != after[1] > 0:
            state["step"] *= math.log(before[1]) / math.log(after[1])  # a tensor, or a number
        elif before[1] == 0 < after[1]:  # t' without limit; at this one 1 - β₂'^t' is 1 in float64
            state["step"] = (state["step"] > 0) * (math.log(2**-64) / math.log(after[1]))
        if "exp_avg" in state and "mu_product" not in state:
            ratio = _sum_of_weights(beta1, state["step"]) / weights
            state["exp_avg"].mul_(ratio.nan_to_num(1.0))  # NaN: both are 0, as long as no step was applied


def _sum_of_weights(beta: float, step: Tensor) -> Tensor:
    """Return 1 - β^t in float64, without cancellation near β = 1."""
    return -torch.expm1(torch.as_tensor(step, dtype=torch.float64) * (math.log(beta) if beta else -math.inf))


FIRST_DECAY = "initial_weight_decay"
"""Key of a parameter group, saved with the optimizer, like torch's initial_lr."""


def weight_decays(optimizer: torch.optim.Optimizer) -> list[float]:
    """Return the weight decay of each parameter group, without the factor of a phase.

    Of a new optimizer, before it gets a state; or of one whose groups keep it as FIRST_DECAY.
    """
    return [float(group.get(FIRST_DECAY, group.get("weight_decay", 0.0))) for group in optimizer.param_groups]


def set_weight_decay(optimizer: torch.optim.Optimizer, phase: Phase, first: Sequence[float]) -> None:
    """Set the weight decay of the next update, if the phase has a factor.

    Args:
        optimizer: its groups have "weight_decay".
        phase: gives the factor.
        first: of `weight_decays`.
    """
    if phase.weight_decay_factor is not None:
        for group, weight_decay in zip(optimizer.param_groups, first, strict=True):
            group["weight_decay"] = weight_decay * phase.weight_decay_factor


def _scale_buffers(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], factor: float) -> None:
    for parameter in parameters:
        buffer = optimizer.state.get(parameter, {}).get("momentum_buffer")
        if buffer is not None:
            buffer.mul_(factor)
