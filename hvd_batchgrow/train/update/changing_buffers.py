"""Buffers, other than those of ghost norms, that a forward or backward pass changes: equal in every layout."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hvd_batchgrow.comm.int64_words import from_words, num_words, to_words
from hvd_batchgrow.comm.ranks import Ranks
from hvd_batchgrow.nn.ghost.ghost_batch_norm import ghost_norms
from hvd_batchgrow.nn.state.forward_state import ForwardState, slots


class ChangingBuffers:
    """Power-iteration vectors, codebooks, averages, counters: everything but ghost norms that training changes.

    Every micro-batch of an update starts from the same values. All ranks keep the values after the micro-batch
    that holds ghost batch 0 of the update. If a micro-batch is one ghost batch (exact mode), or if the values do not
    depend on the samples, they are bit-identical in all layouts. A counter of forward passes counts updates.

    Args:
        model: the model that has these buffers.
        state: the buffers that a pass changes; None: unknown, so all buffers but those of ghost norms are used.
    """

    def __init__(self, model: nn.Module, state: ForwardState | None = None) -> None:
        if state is None:
            names = tuple(_other_buffers(model))
            state = ForwardState(in_forward=names, in_backward=names)
        names = state.buffers
        self._slots = slots(model, names)
        self._tensors: list[Tensor] = []
        """The registered tensors, which a module may replace during a pass."""
        self._is_late = [name not in state.in_forward for name in names]
        self._is_repeated = [name in state.in_forward and name in state.in_backward for name in names]
        self._start: list[Tensor] = []
        self._kept: list[Tensor] = []

    def begin(self) -> None:
        """Before an update, read the values; first undo the changes of an update that failed."""
        self.restore()
        self._tensors = [place[own] for place, own in self._slots]  # type: ignore[misc]
        self._start, self._kept = self._read(), []

    def restore(self) -> None:
        """Within an update, restore the values before it; between updates, do nothing."""
        if self._start:
            self._write(self._start)

    def after_forward(self, slots: Sequence[int]) -> None:
        """Keep the values of ghost batch 0. A forward that the backward repeats starts from the same values again."""
        if 0 in slots:
            self._kept = self._read()
        for (place, own), value, is_repeated in zip(self._slots, self._start, self._is_repeated, strict=True):
            if is_repeated:
                # A new tensor: autograd may have saved the present one for the backward.
                place[own] = value.clone()

    def after_backward(self, slots: Sequence[int]) -> None:
        """Keep the values of ghost batch 0 that only the backward pass changes."""
        if 0 in slots and any(self._is_late):
            pairs = zip(self._read(), self._kept, self._is_late, strict=True)
            self._kept = [now if is_late else kept for now, kept, is_late in pairs]

    def share(self, ranks: Ranks) -> None:
        """Send the kept values from the rank that has them to all ranks; all ranks call it together."""
        if not self._slots or ranks.size == 1:
            return
        sizes = [num_words(value) for value in self._start]
        words = torch.zeros(sum(sizes), dtype=torch.int64)
        if self._kept:
            torch.cat([to_words(value) for value in self._kept], out=words)
        # The sum of integers with zeros from all other ranks is exact, so the values of any type arrive unchanged.
        parts = ranks.all_reduce(words, "changing buffers").split(sizes)
        self._kept = [from_words(part, like) for part, like in zip(parts, self._start, strict=True)]

    def end(self, *, skipped: bool) -> None:
        """After an update, write the values after ghost batch 0 or, if the update is skipped, those before it."""
        self._write(self._start if skipped else self._kept)
        self._start, self._kept = [], []

    def _read(self) -> list[Tensor]:
        return [place[own].detach().clone() for place, own in self._slots]  # type: ignore[union-attr]

    @torch.no_grad()
    def _write(self, values: Sequence[Tensor]) -> None:
        for (place, own), tensor, value in zip(self._slots, self._tensors, values, strict=True):
            place[own] = tensor.copy_(value)


def _other_buffers(model: nn.Module) -> list[str]:
    of_norms = {id(buffer) for norm in ghost_norms(model) for buffer in norm.buffers()}
    return [name for name, buffer in model.named_buffers() if id(buffer) not in of_norms]
