"""Gradients in flat buckets, all-reduced over ranks while the last backward still runs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import reduce
from typing import Any, cast

import torch
from torch import Tensor, nn

from hvd_batchgrow.comm.ranks import Ranks
from hvd_batchgrow.config import UpdateSection
from hvd_batchgrow.messages.errors import RunError
from hvd_batchgrow.optim.tensor_groups import parts_of_size
from hvd_batchgrow.train.update.bucket import Bucket, make_bucket
from hvd_batchgrow.train.update.fixed_point import FixedPointSum
from hvd_batchgrow.train.update.gradient_noise import NoiseEstimate
from hvd_batchgrow.train.update.gradient_norms import GradientNorms
from hvd_batchgrow.train.update.local_sums import sketch

_LEAST_BYTES, _MOST_BYTES, _NUM_BUCKETS = 1 << 20, 16 << 20, 8


def bucket_size(parameters: Sequence[nn.Parameter]) -> int:
    """Return the bytes of a bucket: an eighth of the gradient, at least 1 MiB and at most 16 MiB.

    All-reduces overlap the backward pass only if there are several buckets; below 1 MiB the latency of a network counts
    as much as its bandwidth. It depends on the network only, so that a resumed run adds in the same order.
    """
    num_bytes = sum(parameter.numel() * parameter.element_size() for parameter in parameters)
    return min(max(num_bytes // _NUM_BUCKETS, _LEAST_BYTES), _MOST_BYTES)


class GradientBuckets:
    """Owns the gradients of a model: each `param.grad` is a slice of one of a few flat buckets.

    Backward adds into the slices, micro-batch after micro-batch. Between `start_when_ready` and `wait` the
    all-reduce of a bucket starts as soon as the backward has finished with its last parameter, so
    that only the last micro-batch uses the network, and does so while it computes.

    All ranks start the buckets in one order, because torch.distributed matches all-reduces by their order. A bucket
    that is complete before its turn waits. The order is that in which rank 0's previous backward completed them.

    Autograd finishes a parameter once per backward, except where a backward runs inside another one, as
    reentrant checkpoints do. A bucket that has ever seen such a parameter starts after the backward. To see
    them, the first backward of all starts every bucket at its end.

    A parameter that no micro-batch on any rank has reached keeps `grad` = None, so that optimizers skip it.

    Args:
        parameters: the trained parameters, in the order of the forward pass; dense or not.
        ranks: to all-reduce over.
        bucket_bytes: largest size of a bucket of several parameters; None: `bucket_size`.
        exact: sum over micro-batches and ranks in fixed point, the same in any order; each micro-batch must be one
            ghost batch.
        wire_type: type of the gradients on the network, float16 or bfloat16; None: as the gradients are, or
            float32 for those of 16 bits, which are also summed over micro-batches in float32. A single rank sends
            nothing and ignores it.

    Raises:
        ValueError: the ranks cannot add numbers of that type, or no exact sum can be made of them.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        ranks: Ranks,
        bucket_bytes: int | None = None,
        *,
        exact: bool = False,
        wire_type: torch.dtype | None = None,
    ) -> None:
        check_wire_type(wire_type, ranks, exact=exact)
        self.exact = exact
        self.norms: GradientNorms | None = None
        """Receives the gradient of each micro-batch before it is added to the sum."""
        self.sketches: dict[int, Tensor] | None = None
        """Receives the `sketch` of each bucket's sum on this rank before the all-reduce; None: none is made."""
        self._is_backward = False
        self._armed = False
        self._num_backwards = 0
        self._num_earlier = 0
        self._outermost = -1
        """Autograd's id of the backward of the loss, which differs from that of a nested backward."""
        self._weight: Tensor | float = 0.0
        self._num_samples = 0
        self._divisor = 1.0
        self._reached = torch.empty(0)
        """How many ranks have reached each parameter; then the indices of the buckets in rank 0's order."""
        self._reached_handle: Any = None
        self._unannounced: list[tuple[list[tuple[Bucket, int]], Tensor]] = []
        """After each backward, the members that autograd's hook had not reached, and on the device whether each
        has a gradient all the same."""
        # Backward usually runs from the last parameter to the first, so the buckets have that order too.
        backwards = list(parameters)[::-1]
        self._buckets = [
            make_bucket(index, members, exact=exact, wire_type=wire_type if ranks.size > 1 else None)
            for index, members in enumerate(parts_of_size(backwards, bucket_bytes or bucket_size(backwards)))
        ]
        for bucket in self._buckets:
            for place, parameter in enumerate(bucket.members):
                parameter.grad = bucket.slices[place]
                parameter.register_post_accumulate_grad_hook(
                    lambda _, bucket=bucket, place=place: self._accumulated(bucket, place)
                )
        self._waiting: list[Bucket] = []
        """The buckets whose all-reduce has not started yet in this update, in the order of all ranks."""
        self._completed: list[Bucket] = []
        """The buckets that this backward has completed, in this order."""
        self.use(ranks)

    def use(self, ranks: Ranks) -> None:
        """All-reduce over these ranks from the next update on."""
        self.ranks = ranks
        self._order = self._buckets  # ranks that have just joined know no other order

    @property
    def members(self) -> list[Sequence[nn.Parameter]]:
        """The parameters of each bucket."""
        return [bucket.members for bucket in self._buckets]

    @property
    def _flats(self) -> list[Tensor]:
        return [bucket.flat for bucket in self._buckets]

    def empty_copies(self) -> list[Bucket]:
        """Return buckets without gradients for the same parameters and the update in progress."""
        copies = [make_bucket(old.index, old.members, exact=False, wire_type=None) for old in self._buckets]
        for copy, old in zip(copies, self._buckets, strict=True):
            copy.exact = old.exact and old.exact.empty_copy()
        return copies

    def zero(self, num_ghost_batches: int, *, is_single: bool = False) -> None:
        """Set all gradients to zero, and restore the slices that something else has replaced.

        Args:
            num_ghost_batches: number of ghost batches of the update, over all ranks.
            is_single: as `GradientNorms.begin` takes it.
        """
        for bucket in self._buckets:
            for parameter, slice_ in zip(bucket.members, bucket.slices, strict=True):
                if parameter.grad is not slice_:  # after `zero_grad`, or an update that did not reach it
                    parameter.grad = slice_
            bucket.reached = [False] * len(bucket.members)
            bucket.handle = None
            if bucket.exact:
                bucket.exact.begin(num_ghost_batches)
        self._waiting, self._unannounced = list(self._order), []
        sums = (part for bucket in self._buckets for part in (bucket.flat, bucket.earlier))
        torch._foreach_zero_([part for part in sums if part is not None])
        self._num_earlier = 0
        if self.norms:
            self.norms.begin(max(self.magnitudes, default=0), is_single=is_single)

    def begin_backward(self, loss: Tensor, weight: Tensor | float, samples: int) -> None:
        """Prepare for a backward.

        Args:
            loss: the loss to differentiate, summed over the samples.
            weight: the sum of their weights.
            samples: their number.
        """
        self._is_backward, self._completed = True, []
        self._weight, self._num_samples = weight, samples
        for bucket in self._buckets:
            bucket.accumulated.clear()
        loss.register_hook(self._note_outermost)

    def end_backward(self) -> None:
        """Add the gradients of a finished backward to the sums."""
        self._is_backward = False
        self._num_backwards += 1
        self._note_unannounced()
        if self._armed:
            return
        if self.norms:
            for bucket in self._buckets:
                self.norms.add(bucket.index, bucket.flat, self._weight, self._num_samples)
        for bucket in self._buckets:
            if bucket.exact or bucket.is_half or self.norms:
                bucket.set_aside()
        self._num_earlier += 1

    def start_when_ready(self, divisor: float) -> None:
        """All-reduce each bucket as soon as it is complete. Call it before the last backward.

        Args:
            divisor: turns the sums into means. A sum over the samples of an update may be too large for float16,
                and a mean too small, so the network transfers the mean times 2¹⁰.
        """
        self._divisor, self._armed = divisor, True

    def start_rest(self) -> None:
        """After the last backward, start the remaining all-reduces."""
        while self._waiting:
            self._start(self._waiting.pop(0))
        self._armed = False
        self._read_unannounced()
        completed = [bucket for bucket in self._completed if bucket.is_complete]
        order = completed + [bucket for bucket in self._order if bucket not in completed]
        indices = [bucket.index * (self.ranks.rank == 0) for bucket in order]
        self._reached = torch.tensor([*(flag for bucket in self._buckets for flag in bucket.reached), *indices])
        self._reached_handle = self.ranks.start_all_reduce(self._reached, "reached")
        if self.norms:
            self.norms.start(self.ranks)

    def wait(self) -> None:
        """Wait for the all-reduces."""
        for handle in [bucket.handle for bucket in self._buckets] + [self._reached_handle]:
            self.ranks.wait(handle)

    def average(self) -> None:
        """After the all-reduces, turn each gradient from the sum over all ranks into the mean."""
        undivided = []
        for bucket in self._buckets:
            if bucket.exact:
                bucket.flat.copy_(bucket.exact.values().div_(self._divisor))
            elif (wire := self._wire_of(bucket)) is not None:
                bucket.flat.copy_(wire).div_(bucket.wire_scale)
            else:
                undivided.append(bucket.flat)
        if undivided:
            torch._foreach_div_(undivided, self._divisor)
        self._hide_unreached()
        self._order = [self._buckets[index] for index in self._reached[-len(self._buckets) :].tolist()]

    def noise(self, batch: int, weight: float, loss_scale: float) -> dict[str, NoiseEstimate]:
        """Return the noise estimates of the update; see `GradientNorms.finish`. Empty without norms."""
        return self.norms.finish(self.ranks, self._flats, batch, weight, loss_scale) if self.norms else {}

    def divide(self, divisor: float) -> None:
        """Divide all gradients."""
        torch._foreach_div_(self._flats, divisor)

    def sums_of_largest(self) -> list[Tensor]:
        """Return for each bucket what `end` reads, float64 (); empty without `exact`."""
        return [one.total[-1].double() for one in self._exact_sums]

    def end(self, sums_of_largest: Sequence[float]) -> bool:
        """Return whether the exact sums of an update are right. All ranks agree; True without `exact`."""
        are_right = [one.end(summed) for one, summed in zip(self._exact_sums, sums_of_largest, strict=True)]
        return all(are_right)

    def resize(self) -> bool:
        """After an update whose sums are not right, prepare for its repetition; all ranks call it together.

        Returns:
            Whether all gradients are finite. If not, the repetition would not help.
        """
        if self.norms:
            self.norms.wait(self.ranks)
        words = [one.largest_word for one in self._exact_sums]
        largest = self.ranks.all_gather(words, "largest gradients").max(0).values.tolist()
        are_finite = [one.resize(word) for one, word in zip(self._exact_sums, largest, strict=True)]
        return all(are_finite)

    @property
    def magnitudes(self) -> list[int]:
        """`FixedPointSum.magnitude` of each bucket, on which the next exact update depends; empty without `exact`."""
        return [one.magnitude for one in self._exact_sums]

    @magnitudes.setter
    def magnitudes(self, values: Sequence[int]) -> None:
        for one, value in zip(self._exact_sums, values, strict=True):
            one.magnitude = value

    @property
    def _exact_sums(self) -> list[FixedPointSum]:
        return [bucket.exact for bucket in self._buckets if bucket.exact]

    def norm(self) -> Tensor:
        """Return the 2-norm of all gradients together, float64 (); infinite or NaN if any of them is.

        The norm of a bucket is computed in float32 or wider: squares of 16-bit gradients overflow.
        """
        wide = reduce(torch.promote_types, (flat.dtype for flat in self._flats), torch.float32)
        norms = torch._foreach_norm(self._flats, 2, dtype=wide)
        if len(norms) == 1:
            return norms[0].double()
        return cast("Tensor", torch.linalg.vector_norm(torch.stack(norms), dtype=torch.float64))

    def _note_outermost(self, _: Tensor) -> None:
        self._outermost = torch._C._current_graph_task_id()

    def _accumulated(self, bucket: Bucket, place: int) -> None:
        """Note that autograd has added to the gradient of a member."""
        if not self._is_backward:
            return
        if bucket not in self._waiting:
            raise RunError(
                f"the gradient of a parameter of shape {tuple(bucket.slices[place].shape)} was accumulated in parts, "
                "the last one after its all-reduce had started; use non-reentrant checkpoints (use_reentrant=False)"
            )
        bucket.reached[place] |= bucket.members[place].grad is not None
        bucket.restore(place)
        if place in bucket.accumulated or torch._C._current_graph_task_id() != self._outermost:
            bucket.starts_last = True
        bucket.accumulated.add(place)
        if bucket.is_complete:
            self._completed.append(bucket)
        while self._armed and self._num_backwards and self._waiting and self._waiting[0].is_complete:
            self._start(self._waiting.pop(0))

    def _start(self, bucket: Bucket) -> None:
        total = bucket.flat
        if self._armed:
            if self.norms:
                self.norms.add(bucket.index, bucket.flat, self._weight, self._num_samples)
            if bucket.exact:
                bucket.exact.add(bucket.flat)
            elif bucket.is_half:
                total = bucket.sum_with_earlier()
            elif bucket.earlier is not None and self._num_earlier:
                total.add_(bucket.earlier)
        if self.sketches is not None:
            self.sketches[bucket.index] = sketch(bucket.exact.total if bucket.exact else total)
        if (wire := self._wire_of(bucket)) is not None:
            total = torch.mul(total, bucket.wire_scale / self._divisor, out=wire)
        summed = bucket.exact.total if bucket.exact else total
        bucket.handle = self.ranks.start_all_reduce(summed, f"gradients.{bucket.index}")

    def _note_unannounced(self) -> None:
        """Note which gradients a backward has written without autograd's hook, without reading them."""
        silent = [
            (bucket, place) for bucket in self._buckets for place, reached in enumerate(bucket.reached) if not reached
        ]
        for bucket, place in silent:
            bucket.restore(place)
        if silent:
            norms = torch._foreach_norm([bucket.slices[place] for bucket, place in silent], 1)
            self._unannounced.append((silent, torch.stack(norms) != 0))

    def _read_unannounced(self) -> None:
        """Mark the gradients that `_note_unannounced` has found as reached; the host waits once for all of them."""
        if not self._unannounced:
            return
        members = [member for silent, _ in self._unannounced for member in silent]
        written = torch.cat([flags for _, flags in self._unannounced]).tolist()
        for (bucket, place), is_written in zip(members, written, strict=True):
            bucket.reached[place] |= is_written

    def _wire_of(self, bucket: Bucket) -> Tensor | None:
        """Return the tensor to all-reduce instead of the gradients, if any; a single rank rounds nothing."""
        return bucket.wire if self.ranks.size > 1 or bucket.is_half else None

    def _hide_unreached(self) -> None:
        """Set the gradient to None where no rank has one, as torch does."""
        reached = iter(self._reached.tolist())
        for bucket in self._buckets:
            for parameter in bucket.members:
                if not next(reached):
                    parameter.grad = None


def wire_type_of(rule: UpdateSection) -> torch.dtype | None:
    """Return the type of the gradients in the all-reduce; None: the type of the gradients."""
    return None if rule.allreduce_dtype == "none" else getattr(torch, rule.allreduce_dtype)


def summed_type(gradient: torch.dtype, wire_type: torch.dtype | None, *, exact: bool) -> torch.dtype:
    """Return the type of the numbers that several ranks all-reduce for gradients of a type; see `GradientBuckets`."""
    if exact:
        return torch.int64
    return wire_type or torch.promote_types(gradient, torch.float32)


def check_wire_type(wire_type: torch.dtype | None, ranks: Ranks, *, exact: bool) -> None:
    """Check that the ranks can sum numbers of a wire type.

    Raises:
        ValueError: as for `GradientBuckets`.
    """
    if wire_type is None or ranks.size == 1:
        return
    name = str(wire_type).removeprefix("torch.")
    if exact:
        raise ValueError(f"exact mode cannot all-reduce gradients rounded to {name}")
    if wire_type not in ranks.sum_types:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in ranks.sum_types)
        raise ValueError(f"{ranks.backend} cannot sum {name}; allowed: {allowed}")
