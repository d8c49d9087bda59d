"""Ghost batch norm as operators of PyTorch, which torch.compile keeps in one graph with the rest of a network.

A ghost norm of a compiled network calls `ghost_normalize`, which computes what the norm computes uncompiled, and
`keep_statistics`, which hands the statistics of a pass to the norm.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from hvd_batchgrow.nn.ghost.ghost_choice import kernels_for
from hvd_batchgrow.nn.ghost.ghost_function import dense, empty_results, laid_as

if TYPE_CHECKING:
    from hvd_batchgrow.nn.ghost.ghost_batch_norm import GhostBatchNorm

_norms: WeakValueDictionary[int, GhostBatchNorm] = WeakValueDictionary()
_numbers = itertools.count()
ORDER = torch.zeros(1)
"""The `order` of all calls of `keep_statistics`."""


def number_of(norm: GhostBatchNorm) -> int:
    """Return a number by which `keep_statistics` finds a norm of this process."""
    number = next(_numbers)
    _norms[number] = norm
    return number


@torch.library.custom_op("hvd_batchgrow::keep_statistics", mutates_args={"order"})
def keep_statistics(statistics: Tensor, order: Tensor, norm: int) -> None:
    """Hand the statistics of a pass to a norm.

    Args:
        statistics: (k, 2, C).
        order: is not changed, but is declared as changed, so that a compiled graph keeps the call and its place.
        norm: its `number_of`.
    """
    _norms[norm].keep(statistics.clone())  # a compiler may reuse the memory after this call


@keep_statistics.register_fake
def _(statistics: Tensor, order: Tensor, norm: int) -> None:
    pass


@torch.library.custom_op("hvd_batchgrow::ghost_normalize", mutates_args=())
def ghost_normalize(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, num_ghost_batches: int, eps: float, relu: bool, norm: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalize each ghost batch: see `ghost_reference.normalize`.

    `norm` is a norm's `number_of`; its `keep_sums` is called in each backward.

    Returns:
        Output, statistics (k, 2, C), and inverse standard deviations (k, C), which the gradient needs.
    """
    x = dense(x)
    results = empty_results(x, num_ghost_batches)
    kernels_for(x, num_ghost_batches, relu=relu).forward(x, weight, bias, results, eps)
    return results


@ghost_normalize.register_fake
def _(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, num_ghost_batches: int, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return empty_results(dense(x), num_ghost_batches)


@torch.library.custom_op("hvd_batchgrow::ghost_differentiate", mutates_args=())
def ghost_differentiate(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: Tensor,
    inverses: Tensor,
    num_ghost_batches: int,
    relu: bool,
    norm: int,
) -> tuple[Tensor, Tensor]:
    """Return the gradient of x, and the sums (k, 2, C) that make up those of weight and bias."""
    x = dense(x)
    grad_x, sums = torch.empty_like(x), torch.empty_like(statistics)
    saved = (x, laid_as(x, grad_y), weight, bias, statistics, inverses)
    kernels_for(x, num_ghost_batches, relu=relu).backward(saved, grad_x, sums)
    if keep_sums := _norms[norm].keep_sums:
        keep_sums(sums.clone())  # a compiler may reuse the memory of what an operator returns
    return grad_x, sums


@ghost_differentiate.register_fake
def _(grad_y: Tensor, x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(dense(x)), torch.empty_like(arguments[2])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, ctx.num_ghost_batches, _, ctx.relu, ctx.norm = inputs
    ctx.save_for_backward(x, weight, bias, *output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx: Any, grad_y: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    x, weight, bias, statistics, inverses = ctx.saved_tensors
    constants = (ctx.num_ghost_batches, ctx.relu, ctx.norm)
    grad_x, sums = ghost_differentiate(grad_y, x, weight, bias, statistics, inverses, *constants)
    of_weight, of_bias = sums.sum(0)
    return (
        grad_x,
        None if weight is None else of_weight.to(weight.dtype),
        None if bias is None else of_bias.to(bias.dtype),
        *(None,) * 4,
    )


ghost_normalize.register_autograd(_backward, setup_context=_setup)
