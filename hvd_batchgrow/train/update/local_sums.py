"""What one rank has computed for an update, small enough to be compared between ranks."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from hvd_batchgrow.train.update.totals import Share

WIDTH = 1024
"""Numbers of a sketch."""
_ROWS_CPU, _ROWS_GPU = 64, 4096
"""Rows of `WIDTH` values that are added at once: they fit into a CPU's cache, or occupy a GPU."""
_SEED = 20


@dataclass(frozen=True)
class LocalSums:
    """Gradient, loss and samples of one rank's share of an update."""

    sketches: Tensor
    """`sketch` of the gradient sum of each bucket, (buckets, WIDTH), on the CPU: int64 in exact mode, else float64."""
    loss: float
    """Sum of the losses."""
    digest: int
    """`order_digest.digest` of the samples, modulo 2⁶⁴."""

    @classmethod
    def of(cls, share: Share, sketches: Sequence[Tensor]) -> LocalSums:
        """Return those of a rank that has processed its share. It waits for the device."""
        loss = torch.stack([loss.double() for _, loss in share.losses]).sum()
        return cls(torch.stack(tuple(sketches)).cpu(), float(loss), share.digest % 2**64)

    def words(self) -> Tensor:
        """Return all values as int64 (n,), bit by bit, for a collective."""
        loss = torch.tensor([self.loss], dtype=torch.float64).view(torch.int64)
        digest = torch.tensor([self.digest - (self.digest >> 63 << 64)])
        return torch.cat([self.sketches.view(torch.int64).flatten(), loss, digest])

    def checksum(self) -> int:
        """Return 64 bits that are equal for equal `words`, as a signed integer."""
        digest = hashlib.blake2b(self.words().numpy().tobytes(), digest_size=8).digest()
        return int.from_bytes(digest, "little", signed=True)

    def from_words(self, words: Tensor) -> LocalSums:
        """Invert `words`, for a rank with the same buckets as this one."""
        sketches = words[:-2].clone().view(self.sketches.dtype).view_as(self.sketches)
        return LocalSums(sketches, words[-2:-1].clone().view(torch.float64).item(), int(words[-1]) % 2**64)

    def distances(self, other: LocalSums) -> Tensor:
        """Return |a - b| / |a| for the gradient of each bucket and, last, for the loss: float64 (buckets + 1,).

        The 2-norms of gradients are estimates, see `sketch`. 0 / 0 counts as 0.
        """
        own = torch.cat([self.sketches.double().norm(dim=1), torch.tensor([abs(self.loss)], dtype=torch.float64)])
        loss = torch.tensor([abs(self.loss - other.loss)], dtype=torch.float64)
        apart = torch.cat([(self.sketches - other.sketches).double().norm(dim=1), loss])
        return torch.where(apart == 0, 0.0, apart / own)

    def agrees(self, other: LocalSums, limits: Tensor | None) -> bool:
        """Return whether both hold the same result.

        Args:
            other: of the same share.
            limits: the largest `distances`; None: all bits must be equal.
        """
        if limits is None:
            return torch.equal(self.words(), other.words())
        return self.digest == other.digest and bool((self.distances(other) <= limits).all())


def sketch(values: Tensor) -> Tensor:
    """Return a linear sketch of values (n,): the sums of every `WIDTH`-th value, with random signs.

    The sketch of a difference is the difference of the sketches. A change of one value changes one sum by as much. The
    squared 2-norm of a sketch has the squared 2-norm of the values as its mean over the signs, which are equal on all
    ranks.

    Returns:
        (WIDTH,): float64, or for integers int64, modulo 2⁶⁴.

    Source: Alon, Matias & Szegedy 1996, "The space complexity of approximating the frequency moments", §2.2.
    """
    kind = torch.float64 if values.is_floating_point() else torch.int64
    total = torch.zeros(WIDTH, dtype=kind, device=values.device)
    whole = len(values) // WIDTH * WIDTH
    rows, rest = values[:whole].view(-1, WIDTH), values[whole:]
    at_once = _ROWS_CPU if values.device.type == "cpu" else _ROWS_GPU
    signs = _signs(len(rows), values.device)
    for part, of_part in zip(rows.split(at_once), signs.split(at_once), strict=True):
        total += (part.to(kind) * of_part).sum(0)
    total[: len(rest)] += rest
    return total


@lru_cache(maxsize=64)
def _signs(rows: int, device: torch.device) -> Tensor:
    """Return the sign of each row, int8 (rows, 1)."""
    generator = torch.Generator().manual_seed(_SEED)
    return (torch.randint(0, 2, (rows, 1), generator=generator, dtype=torch.int8) * 2 - 1).to(device)
