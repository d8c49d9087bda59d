"""Activation checkpoints: a repeated forward counts once and draws the same random numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hvd_batchgrow.comm.ranks import SingleRank
from hvd_batchgrow.nn.dropout import KeyedDropout
from hvd_batchgrow.nn.ghost.ghost_batch_norm import GhostBatchNorm1d
from hvd_batchgrow.nn.state.forward_state import ForwardState, StateFault, find_forward_state
from hvd_batchgrow.schedule.phases import Phase
from hvd_batchgrow.train.update.engine import UpdateEngine
from hvd_batchgrow.train.update.forward import MicroBatch

GROUP, NUM_GROUPS = 4, 4
PHASE = Phase(0.0, 0.1, 0.9, GROUP * NUM_GROUPS, GROUP * NUM_GROUPS, start_samples=0, num_updates=10)


class Blocks(nn.Module):
    """Two blocks of linear layer, norm and dropout, optionally as activation checkpoints."""

    def __init__(self, use_reentrant: bool | None, p: float = 0.3, uses: int = 1) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)
        self.linears = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.norms = nn.ModuleList(GhostBatchNorm1d(8, GROUP) for _ in range(2))
        self.drops = nn.ModuleList(KeyedDropout(p) for _ in range(2))
        self.use_reentrant, self.uses = use_reentrant, uses

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for k in range(2):
            if self.use_reentrant is None or not self.training:
                x = self._block(x, k)
            else:
                x = checkpoint(self._block, x, k, use_reentrant=self.use_reentrant)
        return self.last(x)  # type: ignore[no-any-return]

    def _block(self, x: Tensor, k: int) -> Tensor:
        x = self.norms[k](self.linears[k](x)).relu()
        for _ in range(self.uses):
            x = self.drops[k](x)
        return x


def updated(model: nn.Module, groups_per_pass: int, **arguments: Any) -> dict[str, Tensor]:
    """Return the state after two updates of four ghost batches."""
    generator = torch.Generator().manual_seed(5)
    inputs = torch.randn(GROUP * NUM_GROUPS, 6, generator=generator)
    labels = torch.randint(0, 3, (GROUP * NUM_GROUPS,), generator=generator)
    size = groups_per_pass * GROUP
    passes = [
        MicroBatch(
            inputs[k : k + size],
            labels[k : k + size],
            tuple(range(k // GROUP, (k + size) // GROUP)),
            keys=torch.arange(k, k + size),
        )
        for k in range(0, len(inputs), size)
    ]
    engine = UpdateEngine(model, torch.optim.SGD(model.parameters(), lr=0.1), SingleRank(), **arguments)
    for _ in range(2):
        engine.update(iter(passes), len(passes), PHASE, NUM_GROUPS)
    return model.state_dict()


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize(("groups_per_pass", "exact"), [(4, False), (2, False), (1, False), (1, True)])
def test_updates_are_those_of_the_network_without_checkpoints(
    use_reentrant: bool, groups_per_pass: int, exact: bool
) -> None:
    plain, repeated = (updated(Blocks(reentrant), groups_per_pass, exact=exact) for reentrant in (None, use_reentrant))
    assert_equal(repeated, plain)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_compiled_networks_too(use_reentrant: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn.Module, "compile", compile_eagerly)
    model = Blocks(use_reentrant)
    model.compile()
    assert_equal(updated(model, 2), updated(Blocks(None), 2))


def compile_eagerly(module: nn.Module) -> None:
    """Trace like torch.compile, but skip the C++ compiler, which takes minutes."""
    module._compiled_call_impl = torch.compile(module._call_impl, backend="aot_eager")


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_norm_by_itself_counts_a_repeated_forward_once(use_reentrant: bool) -> None:
    norm, x = GhostBatchNorm1d(3, 4), torch.randn(8, 3, requires_grad=True)
    checkpoint(norm, x, use_reentrant=use_reentrant).sum().backward()
    mean = torch.zeros(3)
    for ghost_batch in x.detach().split(4):
        mean = 0.9 * mean + 0.1 * ghost_batch.mean(0)
    torch.testing.assert_close(norm.running_mean, mean)


def test_the_trial_finds_no_fault_in_them() -> None:
    example = torch.randn(4, 6)
    assert find_forward_state(Blocks(False), example) == find_forward_state(Blocks(True), example) == ForwardState()


def test_a_dropout_that_a_checkpoint_repeats_must_have_one_place() -> None:
    with pytest.raises(ValueError, match=r"repeats a dropout that the forward uses 2 times.*its own dropout module"):
        find_forward_state(Blocks(False, uses=2), torch.randn(4, 6))
    assert find_forward_state(Blocks(None, uses=2), torch.randn(4, 6)) == ForwardState()


def test_a_norm_that_only_the_backward_uses_is_found_in_the_trial() -> None:
    class Skips(Blocks):
        """The second norm is used only in some forwards."""

        calls = 0

        def _block(self, x: Tensor, k: int) -> Tensor:
            self.calls += 1
            return super()._block(x, k) if k == 0 or self.calls < 3 else x

    with pytest.raises(StateFault, match=r"a pass does not reach norm norms\.1 in training"):
        find_forward_state(Skips(None), torch.randn(4, 6))
