"""A batch sampler for torch's DataLoader that follows a plan."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice, takewhile
from typing import Any, Literal, TypeVar

from torch.utils.data import Sampler

from hvd_batchgrow.library.updates import Update, check_boundary, check_ranks, updates
from hvd_batchgrow.schedule.layout import Layout
from hvd_batchgrow.schedule.plan import Plan

T = TypeVar("T")

Span = Literal["epoch", "phase", "run"]
"""What one iteration of a `PlanBatchSampler` covers."""


class PlanBatchSampler(Sampler[list[int]]):
    """Yields the sample ids of this rank's micro-batches, for `DataLoader(dataset, batch_sampler=…)`.

    All ranks together yield each sample exactly once per epoch, in the order that the seed gives, for any number of
    ranks. The layouts of the plan decide how the batch grows: with `plan_updates(…, max_micro_batch=n)`, the
    micro-batch grows up to n samples, and then the number of micro-batches per update. All micro-batches of an update
    have equal sizes on all ranks, so the mean of their mean losses is that of the update.

    An iteration covers a span, from the counter `samples` on:

    - "epoch": the updates that begin before the end of the current epoch. The last one may extend into the next epoch;
      the next iteration then begins there.
    - "phase": the same, but it also ends where the batch changes, for frameworks that can change the number of
      accumulated micro-batches only between two of their epochs.
    - "run": all remaining updates.

    A `PlanLR` that was created with this sampler moves `samples` at each of its steps. Without one, an iteration moves
    it to its end as it yields its last micro-batch. After the end of the run, iterations are empty.

    Args:
        plan: of `plan_updates`, for these ranks.
        seed: determines the order of the samples.
        rank: this rank.
        num_ranks: R, as in the plan.
        start_samples: sample counter, between two updates, at which the first iteration begins.
        span: what an iteration covers.

    Raises:
        ValueError: the plan is for another number of ranks, or has unequal micro-batches (`uneven_ranks`); there is no
            such rank or span; or `start_samples` is not an update boundary.
    """

    def __init__(
        self, plan: Plan, seed: int, rank: int = 0, num_ranks: int = 1, *, start_samples: int = 0, span: Span = "epoch"
    ) -> None:
        check_ranks(plan, rank, num_ranks)
        if span not in ("epoch", "phase", "run"):
            raise ValueError(f'span = {span!r} must be "epoch", "phase" or "run"')
        if any(layout.uneven_ranks for layout in plan.layouts):
            raise ValueError(
                "this plan has micro-batches of unequal sizes (uneven_ranks), whose mean losses must not be averaged; "
                "use UpdateEngine with updates(…), which sums the losses of samples, or batches that the ranks divide"
            )
        self.plan, self.seed, self.rank, self.num_ranks, self.span = plan, seed, rank, num_ranks, span
        self.moved_by_scheduler = False
        """Whether only a scheduler moves `samples`; `PlanLR` sets it."""
        self._read: tuple[int, int] | None = None
        """First sample and end of the last iteration that was read to its end."""
        self.set_samples(start_samples)

    @property
    def samples(self) -> int:
        """Sample counter at which the next iteration begins."""
        return self._samples

    def set_samples(self, samples: int) -> None:
        """Begin the next iteration at another sample counter. Raises ValueError if it is not an update boundary."""
        check_boundary(self.plan.schedule, samples)
        self._samples, self._read = samples, None

    def follow(self, samples: int) -> None:
        """Set the counter after a step of the scheduler."""
        self._samples = samples

    @property
    def accumulation(self) -> int:
        """Number of micro-batches, on each rank, of the update at `samples`; after the end, that of the last update."""
        return self._layout_at(min(self._samples, self.plan.schedule.end_samples - 1)).accumulation

    def updates(self) -> Iterator[Update]:
        """Yield the updates of the next iteration, with this rank's share of each."""
        end = self._end()
        whole_run = updates(self.plan, self.seed, self.rank, self.num_ranks, start_samples=self._samples)
        return takewhile(lambda update: update.samples < end, whole_run)

    def by_update(self, batches: Iterable[T]) -> Iterator[tuple[Update, Iterator[T]]]:
        """Yield each update of the next iteration with its micro-batches.

        Args:
            batches: a DataLoader with this batch sampler, or an iterable that yields one element per micro-batch.

        Yields:
            the update, and an iterator over its `len(update.micro_batches)` micro-batches, all of which must be taken
            before the next update.

        Raises:
            ValueError: `batches` ended early, or micro-batches of an update were not taken.
        """
        planned = self.updates()  # before a loader's workers read ahead, which moves `samples`
        remaining = iter(batches)
        for update in planned:
            number = len(update.micro_batches)
            taken = _Counted(islice(remaining, number))
            yield update, taken
            if taken.count != number:
                raise ValueError(
                    f"{taken.count} of the {number} micro-batches of the update at sample {update.samples} "
                    "were processed: the loop must take all of them, and the loader must have this batch sampler"
                )

    def __iter__(self) -> Iterator[list[int]]:
        self._check_steps()
        start = after = self._samples
        end = self._end()
        for update in self.updates():
            after = update.samples + update.phase.global_batch
            for number, part in enumerate(update.micro_batches, start=1):
                if after >= end and number == len(update.micro_batches) and not self.moved_by_scheduler:
                    self._samples = after  # before the yield: a loop that counts batches never asks for the end
                yield part.ids.tolist()
        self._read = (start, after)

    def _check_steps(self) -> None:
        """Check that the scheduler has counted the updates of an iteration that was read to its end.

        A loader reads ahead, so a loop that ends an iteration early may have made fewer steps. One step is too few.

        Raises:
            ValueError: it was called once or not at all.
        """
        if not self.moved_by_scheduler or self._read is None:
            return
        first, last, now = map(self.plan.schedule.updates_at, (*self._read, self._samples))
        if last - first > 2 and now - first <= 1:
            raise ValueError(
                f"the last iteration had {last - first} updates, but PlanLR.step() was called {now - first} times: "
                "call it after each optimizer.step(), not once per epoch"
            )

    def __len__(self) -> int:
        """Return the number of micro-batches from `samples` to the end of the span."""
        start, end = self._samples, self._end()
        count = 0
        for phase, layout in zip(self.plan.schedule.phases, self.plan.layouts, strict=True):
            inside = min(end, phase.end_samples) - max(start, phase.start_samples)
            count += -(-max(0, inside) // phase.global_batch) * layout.accumulation
        return count

    def state_dict(self) -> dict[str, Any]:
        """Return the sample counter, under "samples"."""
        return {"samples": self._samples}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Set the sample counter. Raises ValueError if it is not an update boundary of this plan."""
        self.set_samples(state["samples"])

    def _layout_at(self, samples: int) -> Layout:
        return self.plan.layouts[self.plan.schedule.index_at(samples)]

    def _end(self) -> int:
        """Return the sample counter before which the updates of the next iteration begin."""
        schedule, start = self.plan.schedule, self._samples
        if self.span == "run" or start == schedule.end_samples:
            return schedule.end_samples
        end = min((start // self.plan.num_samples + 1) * self.plan.num_samples, schedule.end_samples)
        if self.span == "epoch":
            return end
        index = schedule.index_at(start)
        batch = schedule.phases[index].global_batch
        later = (phase for phase in schedule.phases[index + 1 :] if phase.num_updates and phase.global_batch != batch)
        return min([end, *(phase.start_samples for phase in islice(later, 1))])


class _Counted(Iterator[T]):
    """An iterator that counts the elements taken from it."""

    def __init__(self, elements: Iterator[T]) -> None:
        self._elements = elements
        self.count = 0

    def __next__(self) -> T:
        element = next(self._elements)
        self.count += 1
        return element
