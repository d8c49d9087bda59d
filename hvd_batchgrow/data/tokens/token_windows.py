"""Windows of a text as samples."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvd_batchgrow.config.source_specs import Kind
from hvd_batchgrow.config.task_specs import IGNORED_TOKEN
from hvd_batchgrow.data.datasets.dataset import NO_SIZES, Ids
from hvd_batchgrow.data.tokens.token_files import num_windows


@dataclass(frozen=True)
class TokenWindows:
    """Consecutive windows of L of T tokens. `Dataset` describes the members.

    The inputs of sample k are the tokens kL … kL + L - 1, and its targets the tokens kL + 1 … kL + L. Every token but
    the first is therefore a target once. If T - 1 is not a multiple of L, the last window is padded: its targets are
    -100, which do not count, and its inputs are 0 after the last token.
    """

    tokens: NDArray[Any]
    """(T,) of any integer type, in memory or mapped; T >= 2."""
    context: int
    """L."""
    name: str = "tokens"
    """Name of the file or array, for messages."""
    sizes: NDArray[np.int32] = field(default_factory=lambda: NO_SIZES)
    kind: Kind = "tokens"

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one sample."""
        return (self.context,)

    def __len__(self) -> int:
        return num_windows(len(self.tokens), self.context)

    def fetch(self, ids: Ids) -> NDArray[np.int64]:
        """See `Dataset`."""
        return self._shifted(ids, 0, 0)

    @cached_property
    def targets(self) -> _NextTokens:
        """See `Dataset`: the next token of each token, int64 (n, L)."""
        return _NextTokens(self)

    def locate(self, sample_id: int) -> str:
        """See `Dataset`."""
        start = sample_id * self.context
        return f"{self.name}, tokens {start} … {min(start + self.context, len(self.tokens)) - 1}"

    def _shifted(self, ids: Ids, shift: int, filling: int) -> NDArray[np.int64]:
        """Return the windows of some ids, shifted by `shift` tokens, with `filling` after the last token."""
        positions = np.asarray(ids, dtype=np.int64)[:, None] * self.context + np.arange(shift, self.context + shift)
        last = len(self.tokens) - 1
        windows: NDArray[np.int64] = self.tokens[np.minimum(positions, last)].astype(np.int64)
        windows[positions > last] = filling
        return windows


class _NextTokens:
    """The targets of windows."""

    def __init__(self, windows: TokenWindows) -> None:
        self._windows = windows

    def __getitem__(self, ids: Ids, /) -> NDArray[np.int64]:
        return self._windows._shifted(ids, 1, IGNORED_TOKEN)
