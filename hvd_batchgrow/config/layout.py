"""`[layout]`: how a global batch is split over ranks and micro-batches."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from hvd_batchgrow.config.types import NumRanks, PositiveFloat, PositiveInt, Section, tuples

KEYS_OF_GROW_BY: dict[str, tuple[str, ...]] = {
    "accumulation": (),
    "ranks": ("ranks_per_phase", "max_ranks"),
    "auto": ("max_ranks", "objective", "time_limit_h"),
}
"""Keys of `[layout]` that only some values of `grow_by` use."""

MOST_EXACT_GHOST_BATCHES = 1 << 20
"""Most ghost batches of an update with `exact`."""


def _check_device(value: object) -> object:
    if value == "gpu":  # as text, its nearest value would be "cpu"
        raise ValueError("a GPU is called 'cuda'")
    return value


class LayoutSection(Section):
    """`[layout]`: how a global batch is split over ranks and micro-batches.

    It changes results by rounding only. With update.precision = "float16" it also decides which updates overflow.
    """

    max_micro_batch: PositiveInt | None = None
    """Largest micro-batch: samples of one forward and backward pass on one rank, a multiple of γ. None: the largest
    multiple up to 128, but at least γ."""
    grow_by: Literal["accumulation", "ranks", "auto"] = "accumulation"
    """How a larger batch is formed. accumulation: more micro-batches on all ranks. ranks: more ranks, each with a full
    micro-batch while ranks are available. auto: `objective` decides per phase, from measured costs (`plan --cost`)."""
    ranks_per_phase: Annotated[tuple[NumRanks, ...], BeforeValidator(tuples)] | None = None
    """For grow_by = "ranks": number of ranks of each phase. None: derived from the batch."""
    max_ranks: NumRanks | None = None
    """For grow_by = "ranks" and "auto": largest number of ranks to use. None: all that are launched."""
    objective: Literal["least_time", "least_rank_hours"] = "least_time"
    """For grow_by = "auto": minimize the time, or the rank-hours within `time_limit_h`."""
    time_limit_h: PositiveFloat | None = None
    """For objective = "least_rank_hours": longest allowed run, in hours. None: no limit."""
    uneven_ranks: bool = False
    """Allow ranks to hold different numbers of ghost batches."""
    exact: bool = False
    """Make the weights bit-identical in every layout: one ghost batch per micro-batch, gradients summed without
    rounding. false: equal within float32 rounding, and faster."""
    compile: bool = False
    """Compile the network with torch.compile. The first update with each shape of micro-batch takes minutes longer."""
    device: Annotated[Literal["auto", "cuda", "cpu"], BeforeValidator(_check_device)] = "auto"
    """Device of the ranks. auto: GPUs if every rank sees one, otherwise the CPU. cuda: an error if they cannot be used.
    """
    ranks_per_gpu: PositiveInt | None = None
    """Most ranks that may share a GPU; with 2 or more, gradients are summed over Gloo. None: one rank per GPU."""
    threads_per_rank: PositiveInt | None = None
    """Torch threads per rank. None: OMP_NUM_THREADS, otherwise the rank's share of the cores that it may use; 1 with
    `exact`, where another number changes the last bits of the weights."""

    def unused(self) -> list[str]:
        """Return the keys that are set and that this `grow_by` does not use."""
        others = dict.fromkeys(
            key for keys in KEYS_OF_GROW_BY.values() for key in keys if key not in KEYS_OF_GROW_BY[self.grow_by]
        )
        beside = ["max_ranks"] if self.grow_by == "ranks" and self.ranks_per_phase else []
        return [
            key for key in [*others, *beside] if getattr(self, key) not in (type(self).model_fields[key].default, ())
        ]

    def grown_by(self, grow_by: str, **changes: Any) -> LayoutSection:
        """Return a copy with another `grow_by` and these changes; keys that it does not use get their defaults."""
        grown = self.model_copy(update={"grow_by": grow_by, **changes})
        return grown.model_copy(update={key: type(self).model_fields[key].default for key in grown.unused()})
