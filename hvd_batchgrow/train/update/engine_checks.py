"""Check that an update engine can train its model: parameters, optimizer, modes of norms, and keys of samples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from hvd_batchgrow.messages.wording import counted, listed
from hvd_batchgrow.nn.keyed_random import KeyedModule
from hvd_batchgrow.nn.modes import norms_out_of_mode
from hvd_batchgrow.nn.parameters import parameter_faults


def check_parts(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Raise ValueError with a line for each fault of a model and its optimizer.

    A fault is one of `parameter_faults`; a trainable parameter that only the model or only the optimizer has; or a norm
    with running statistics in evaluation mode that `model.train()` would put into training mode.
    """
    faults = [*parameter_faults(model), *_foreign(model, optimizer), *_untrained(model, optimizer), *_modes(model)]
    if faults:
        raise ValueError("\n".join(faults))


def _foreign(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[str]:
    """The engine has buckets for the model's parameters only."""
    own = set(model.parameters())
    for index, group in enumerate(optimizer.param_groups):
        foreign = [k for k, p in enumerate(group["params"]) if p.requires_grad and p not in own]
        if foreign:
            names = group.get("param_names") or [f"shape {tuple(p.shape)}" for p in group["params"]]
            found = listed([names[k] for k in foreign], separator="; ")
            yield (
                f"parameter group {index} of the optimizer has {counted(len(foreign), 'parameter')} that the model "
                f"does not have ({found}): their gradients would be neither averaged nor set to 0. Make them part of "
                "the model: register them in the network, or pass a module that holds the network and them as the model"
            )


def _untrained(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[str]:
    optimized = {p for group in optimizer.param_groups for p in group["params"]}
    names = [name for name, p in model.named_parameters() if p.requires_grad and p not in optimized]
    if names:
        yield (
            f"the optimizer lacks {counted(len(names), 'parameter')} of the model ({listed(names)}): they would not be "
            "trained, but count in the norm of the gradient. Set requires_grad = False for them, or add them to the "
            "optimizer"
        )


def _modes(model: nn.Module) -> Iterator[str]:
    if names := norms_out_of_mode(model):
        yield (
            f"{counted(len(names), 'norm')} in evaluation mode ({listed(names)}), but the engine calls model.train() "
            "before each update, which would train the running statistics. Override train() of the model so that it "
            "keeps them in evaluation mode, or set frozen = True for a ghost norm; to train them, call model.train()"
        )


def check_keys(modules: Sequence[KeyedModule], keys: Tensor | None, *, exact: bool) -> None:
    """Raise ValueError if modules would draw from torch's generator, which is not keyed by sample, in exact mode."""
    drawing = [module.kind for module in modules if module.training]
    if exact and keys is None and drawing:
        raise ValueError(
            f"exact=True, but the micro-batch has no keys, from which {drawing[0]} draws its random numbers for each "
            "sample: use PlannedMicroBatch.micro_batch(inputs, targets), or MicroBatch(…, keys=part.keys)"
        )
