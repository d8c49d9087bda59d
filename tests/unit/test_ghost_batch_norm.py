from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from hvd_batchgrow.nn.ghost_batch_norm import GhostBatchNorm2d


def make(momentum: float = 0.1) -> GhostBatchNorm2d:
    torch.manual_seed(1)
    norm = GhostBatchNorm2d(3, ghost_batch=4, momentum=momentum).double()
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2)
        norm.bias.uniform_(-1, 1)
    return norm


def inputs(samples: int = 12) -> Tensor:
    return torch.randn(samples, 3, 5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) * 3 + 1


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_it_is_batch_norm_on_each_ghost_batch(memory_format: torch.memory_format) -> None:
    norm, plain = make(), nn.BatchNorm2d(3).double()
    plain.load_state_dict({**norm.state_dict(), "num_batches_tracked": torch.tensor(0)})
    x = inputs().to(memory_format=memory_format).requires_grad_()
    y = inputs().requires_grad_()
    out, expected = norm(x), torch.cat([plain(chunk) for chunk in y.split(4)])
    torch.testing.assert_close(out, expected)
    upstream = torch.randn(out.shape, dtype=torch.float64)
    out.backward(upstream)
    expected.backward(upstream)
    torch.testing.assert_close(x.grad, y.grad)
    torch.testing.assert_close(norm.weight.grad, plain.weight.grad)
    torch.testing.assert_close(norm.bias.grad, plain.bias.grad)
    torch.testing.assert_close(norm.running_mean, plain.running_mean)
    torch.testing.assert_close(norm.running_var, plain.running_var)


def test_its_gradient_is_that_of_its_output() -> None:
    norm = make()

    def function(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.func.functional_call(norm, {"weight": weight, "bias": bias}, (x,))  # type: ignore[no-any-return]

    arguments = (inputs(8), norm.weight.detach().clone(), norm.bias.detach().clone())
    assert torch.autograd.gradcheck(function, tuple(a.requires_grad_() for a in arguments))


def test_running_statistics_are_the_recurrence_written_out() -> None:
    norm, e, x = make(momentum=0.3), 0.3, inputs()
    norm(x)
    mean, variance = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    for chunk in x.split(4):
        mean = (1 - e) * mean + e * chunk.mean((0, 2, 3))
        variance = (1 - e) * variance + e * chunk.var((0, 2, 3), unbiased=True)
    torch.testing.assert_close(norm.running_mean, mean)
    torch.testing.assert_close(norm.running_var, variance)


@pytest.mark.parametrize("shares", [[[0, 1, 2]], [[0], [1], [2]], [[0, 2], [1]], [[2], [0, 1]]])
def test_deferred_statistics_add_up_to_the_same_in_any_cut(shares: list[list[int]]) -> None:
    whole = make()
    whole(inputs())
    parts = make()
    parts.deferred = True
    chunks = inputs().split(4)
    total = torch.zeros(2, 3, dtype=torch.float64)
    for positions in shares:
        for position in positions:
            parts(chunks[position])
        total += parts.take_contributions(positions, 3).sum(0)
    assert parts.running_mean.tolist() == [0, 0, 0], "nothing is committed before the update ends"
    parts.commit(total, 3)
    torch.testing.assert_close(parts.running_mean, whole.running_mean)
    torch.testing.assert_close(parts.running_var, whole.running_var)


def test_evaluation_is_batch_norms() -> None:
    norm, plain = make(), nn.BatchNorm2d(3).double()
    norm(inputs())
    plain.load_state_dict({**norm.state_dict(), "num_batches_tracked": torch.tensor(0)})
    assert torch.equal(norm.eval()(inputs(5)), plain.eval()(inputs(5)))


def test_float32_statistics_start_from_clean_memory() -> None:
    # The kernel blends into what it is given, with weight 0: of a NaN left in memory that is NaN.
    norm = GhostBatchNorm2d(3, ghost_batch=2)
    for _ in range(50):
        junk = torch.full((1, 2, 3), float("nan"))
        del junk
        norm(torch.randn(2, 3, 2, 2))
        assert norm.running_mean.isfinite().all()
        assert norm.running_var.isfinite().all()


@pytest.mark.parametrize("samples", [0, 3, 6])
def test_an_input_of_broken_ghost_batches_is_refused(samples: int) -> None:
    # (j): a ghost batch larger than the local batch is one of these
    with pytest.raises(ValueError, match=f"{samples} samples are {samples / 4:.2f} ghost batches of 4"):
        make()(inputs(samples))
