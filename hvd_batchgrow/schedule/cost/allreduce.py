"""The published cost of an all-reduce: its latency, and seconds per byte.

A message of n bytes takes α + n β on a link: α is the link's latency, β the reciprocal of its bandwidth. The time
of the additions is neglected.

Sources: Thakur, Rabenseifner & Gropp, Optimization of collective communication operations in MPICH (2005),
doi:10.1177/1094342005051521, sections 4.4 and 4.5; Patarasu & Yuan, Bandwidth optimal all-reduce algorithms for
clusters of workstations (2009), doi:10.1016/j.jpdc.2008.09.002, for the ring.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Algorithm = Literal["ring", "halving"]
"""ring: reduce-scatter and all-gather around a ring. halving: recursive halving, then recursive doubling."""


@dataclass(frozen=True)
class Link:
    """A link between two members of an all-reduce."""

    latency_s: float
    s_per_byte: float
    """Reciprocal of the bandwidth in one direction."""


@dataclass(frozen=True)
class SyncCost:
    """The cost of an all-reduce."""

    latency_s: float
    """Seconds that do not depend on its size."""
    s_per_byte: float

    def seconds(self, num_bytes: int) -> float:
        """Return the seconds of an all-reduce of this many bytes on each rank."""
        return self.latency_s + self.s_per_byte * num_bytes

    def __add__(self, other: SyncCost) -> SyncCost:
        return SyncCost(self.latency_s + other.latency_s, self.s_per_byte + other.s_per_byte)


def num_steps(members: int, algorithm: Algorithm) -> int:
    """Return the number of messages that each member sends, one after the other.

    2 (p - 1) around a ring; 2 ⌈log2 p⌉ by halving and doubling.
    """
    return 2 * (members - 1) if algorithm == "ring" else 2 * (members - 1).bit_length()


def allreduce_cost(members: int, link: Link, algorithm: Algorithm) -> SyncCost:
    """Return the cost of an all-reduce among p members: steps · α + 2 (p - 1)/p · n β."""
    share = 2 * (members - 1) / members
    return SyncCost(num_steps(members, algorithm) * link.latency_s, share * link.s_per_byte)


def hierarchical_cost(
    ranks: int, ranks_per_host: int, in_host: Link, between_hosts: Link, algorithm: Algorithm
) -> SyncCost:
    """Return the cost of an all-reduce over hosts.

    The ranks of a host reduce-scatter around a ring, each rank all-reduces its share with the same rank of the other
    hosts, and the ranks of a host all-gather. All ranks of a host share its links to the network, through which the
    whole gradient passes once in each direction and phase.

    Args:
        ranks: R.
        ranks_per_host: hosts are filled one after the other; one that is not full counts as a full one.
        in_host: a rank's link to the other ranks of its host.
        between_hosts: all links of a host to the network together.
        algorithm: of the all-reduce between hosts.
    """
    hosts = -(-ranks // ranks_per_host)
    inside = allreduce_cost(min(ranks, ranks_per_host), in_host, "ring")
    return inside + allreduce_cost(hosts, between_hosts, algorithm)
