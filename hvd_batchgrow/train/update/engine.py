"""One update: the sum of per-sample losses over B samples in any layout, divided by B once."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hvd_batchgrow.comm.ranks import Ranks
from hvd_batchgrow.comm.to_device import to_device
from hvd_batchgrow.config import UpdateSection
from hvd_batchgrow.data.order.order_digest import from_halves, to_halves
from hvd_batchgrow.messages.errors import RunError
from hvd_batchgrow.nn.dropout import keyed_dropouts, set_sample_keys
from hvd_batchgrow.nn.ghost.ghost_batch_norm import ghost_norms
from hvd_batchgrow.nn.ghost.norm_group import NormGroup, group_norms
from hvd_batchgrow.nn.parameters import parameter_faults
from hvd_batchgrow.nn.state.forward_state import ForwardState
from hvd_batchgrow.optim.build import lr_ratios, set_hyperparameters
from hvd_batchgrow.schedule.phases import Phase
from hvd_batchgrow.train.liveness.watchdog import WAITING
from hvd_batchgrow.train.update.changing_buffers import ChangingBuffers
from hvd_batchgrow.train.update.exact import check_range, join_unchecked, largest, split
from hvd_batchgrow.train.update.forward import Forward, MicroBatch, classify
from hvd_batchgrow.train.update.gradient_noise import NoiseEstimate
from hvd_batchgrow.train.update.gradient_norms import GradientNorms
from hvd_batchgrow.train.update.gradients import GradientBuckets, wire_type_of
from hvd_batchgrow.train.update.loss_scale import LossScale
from hvd_batchgrow.train.update.micro_batches import gather_replaced
from hvd_batchgrow.train.update.non_finite import NonFinite

_NUM_TALLIES = 6
"""Loss, correct answers, stop requests, replaced samples, and the digest of all samples in two halves."""


@dataclass(frozen=True)
class UpdateResult:
    """Results of one update over all its samples on all ranks."""

    loss_sum: float
    """Sum of the per-sample losses, with the weights before the update."""
    num_correct: int
    stop_requested: bool
    """Whether any rank requests a stop; equal on all ranks."""
    seconds: float
    """Wall time of the whole update on this rank."""
    data_wait_s: float
    """The part of `seconds` spent waiting for micro-batches."""
    reduce_wait_s: float
    """The part of `seconds` spent waiting for all-reduces that did not overlap the last backward."""
    digest: int
    """`consumed.digest` of all its samples, on all ranks."""
    replaced: tuple[tuple[int, int], ...]
    """(stream index, sample id) of each sample that replaced a bad one, on all ranks."""
    skipped: bool
    """Whether the update was skipped because it was not finite; weights, optimizer and statistics are unchanged."""
    noise: dict[str, NoiseEstimate]
    """Noise of the gradient by name; empty if it is not measured, or if the update had a single micro-batch."""


@dataclass
class _Share:
    """Sums over this rank's micro-batches of an update."""

    tally: Tensor
    """Loss and correct answers, on the device."""
    stop: bool
    slots: list[int] = field(default_factory=list)
    losses: list[tuple[tuple[int, ...], Tensor]] = field(default_factory=list)
    """For each micro-batch, the slots of its ghost batches and the sum of its losses."""
    digest: int = 0
    replaced: list[tuple[int, int]] = field(default_factory=list)
    data_wait_s: float = 0.0

    def add(self, micro_batch: MicroBatch, loss: Tensor, num_correct: Tensor | int) -> None:
        self.tally[0] += loss
        self.tally[1] += num_correct
        self.slots += micro_batch.slots
        self.losses.append((micro_batch.slots, loss))
        self.digest += micro_batch.digest
        self.replaced += micro_batch.replaced


class UpdateEngine:
    """Computes updates of a model, which are equal in every layout up to rounding.

    Args:
        model: maps inputs to logits.
        optimizer: optimizes the model's parameters; do not call its `zero_grad`. The parameter groups
            get the learning rate of the phase times their ratio, see `lr_ratios`.
        ranks: the processes that share an update.
        rule: how the gradient is computed, and how it is processed before the optimizer step.
        forward: maps a micro-batch to the loss of each of its samples; None: `classify`. A custom forward must apply
            precision and label smoothing itself; the engine still applies the loss scale for float16.
        rescale_momentum: see `set_hyperparameters`.
        exact: sum gradients and ghost statistics exactly, so that they are bit-identical in all layouts. A
            micro-batch must then be one ghost batch, and all ranks must use the same threads and kernels.
        forward_state: the buffers, other than those of ghost norms, that a pass changes; None: all may change.
        at: called with the name of each stage that this rank enters, for the watchdog.

    Raises:
        ValueError: the first parameter group has learning rate 0 and others do not, or a parameter cannot be trained
            (see `parameter_faults`).
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        ranks: Ranks,
        *,
        rule: UpdateSection | None = None,
        forward: Forward | None = None,
        rescale_momentum: bool = False,
        exact: bool = False,
        forward_state: ForwardState | None = None,
        at: Callable[[str], None] = lambda stage: None,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.ranks = ranks
        self.rule = rule or UpdateSection()
        self.forward = forward or classify(self.rule)
        self.rescale_momentum = rescale_momentum
        self.lr_ratios = lr_ratios(optimizer)
        if faults := parameter_faults(model):
            raise ValueError("\n".join(faults))
        self._frozen = [
            (name, parameter) for name, parameter in model.named_parameters() if not parameter.requires_grad
        ]
        self.device = next(model.parameters()).device
        self.norms = list(ghost_norms(model))
        for norm in self.norms:
            norm.deferred = True
        self._norm_groups: list[NormGroup] = []
        """Those in training mode in the last pass."""
        self.dropouts = keyed_dropouts(model)
        self.changing = ChangingBuffers(model, forward_state)
        self.exact = exact
        self.buckets = GradientBuckets(
            [p for p in model.parameters() if p.requires_grad], ranks, exact=exact, wire_type=wire_type_of(self.rule)
        )
        self.loss_scale = LossScale() if self.rule.precision == "float16" else None
        self.at = at

    def measure_noise(self, *, preconditioned: bool = False, per_layer_group: bool = False) -> None:
        """Measure the noise in the gradient of each following update; this does not change the weights.

        It needs memory for one more gradient if an update has several micro-batches on this rank.

        Args:
            preconditioned: scale the gradient as Adam does, with the moments before the update.
            per_layer_group: measure the noise of each child of the model too.

        Raises:
            ValueError: `preconditioned` is set and the optimizer is not Adam.
        """
        if preconditioned and not isinstance(self.optimizer, torch.optim.Adam | torch.optim.AdamW):
            kind = type(self.optimizer).__name__
            raise ValueError(f"preconditioned=True is for torch.optim.Adam or AdamW, not {kind}: omit it")
        groups = {p: name.partition(".")[0] for name, p in self.model.named_parameters()} if per_layer_group else None
        adam = self.optimizer if preconditioned else None
        self.buckets.norms = GradientNorms(self.buckets.members, groups=groups, exact=self.exact, adam=adam)

    def use(self, ranks: Ranks) -> None:
        """Share the following updates among these ranks, which include this one. Call it between updates."""
        self.ranks = ranks
        self.buckets.use(ranks)

    def update(
        self,
        micro_batches: Iterator[MicroBatch],
        num_passes: int,
        phase: Phase,
        num_groups: int,
        *,
        stop: bool = False,
    ) -> UpdateResult:
        """Do one update.

        Args:
            micro_batches: yields this rank's share; ranks may have unequal shares.
            num_passes: number of micro-batches to take, >= 1.
            phase: gives B, the learning rate and the momentum.
            num_groups: number of ghost batches of the whole update, B/γ.
            stop: whether this rank requests a stop; it is all-reduced with the losses.

        Raises:
            NonFinite: loss or gradient is not finite, and `on_nonfinite` is "stop"; raised on all ranks.
            RunError: the network has set requires_grad of a parameter that was frozen when the engine was made.
            ValueError: a micro-batch does not have exactly the samples of its ghost batches; a norm did not process
                them exactly once; `micro_batches` ended early; or the ranks together did not process each ghost
                batch exactly once.
        """
        if num_passes < 1:
            raise ValueError(f"num_passes = {num_passes}: must be at least 1 on each rank")
        start = time.perf_counter()
        share = _Share(torch.zeros(2, dtype=torch.float64, device=self.device), stop=stop)
        totals, handle = self._compute(micro_batches, num_passes, share, phase, num_groups)
        self.at(WAITING)
        reduce_wait_s = self.buckets.wait()
        self.ranks.wait(handle)
        self.at("updating the weights")
        numbers, sums = totals.tensor_split([_NUM_TALLIES + num_groups])
        statistics, bounds = self._joined(sums)
        # The only wait for the device: everything that the host needs is read together.
        read = torch.cat([numbers, torch.stack([self.buckets.norm(), *bounds])]).tolist()
        tally, served, (norm, *read_bounds) = _split(read, _NUM_TALLIES, num_groups)
        loss_sum, num_correct, num_requests, num_replaced, *halves = tally
        check_range(read_bounds)
        noise = self.buckets.noise(phase.global_batch, self._factor(phase, num_groups))
        _check_served(served)
        self._check_frozen()
        self.changing.share(self.ranks)
        replaced = gather_replaced(share.replaced, self.ranks) if num_replaced else ()
        skipped = not self._is_usable(norm, loss_sum, share, num_groups)
        # Ranks are lost in collectives, all of which are above: the weights are then those before the update.
        if not skipped:
            set_hyperparameters(self.optimizer, phase, self.lr_ratios, rescale_momentum=self.rescale_momentum)
            self.optimizer.step()
            self._commit(statistics, num_groups)
        self.changing.end(skipped=skipped)
        return UpdateResult(
            loss_sum=loss_sum,
            num_correct=int(num_correct),
            stop_requested=num_requests > 0,
            seconds=time.perf_counter() - start,
            data_wait_s=share.data_wait_s,
            reduce_wait_s=reduce_wait_s,
            digest=from_halves(*halves),
            replaced=replaced,
            skipped=skipped,
            noise={} if skipped else noise,
        )

    def _compute(
        self, micro_batches: Iterator[MicroBatch], num_passes: int, share: _Share, phase: Phase, num_groups: int
    ) -> tuple[Tensor, Any]:
        """Do the forward and backward passes; return the totals and the handle of their all-reduce."""
        self.model.train()
        self.buckets.zero()
        for norm in self.norms:
            norm.forget()
        self.changing.begin()
        factor = self._factor(phase, num_groups)
        for index in range(num_passes):
            begin = time.perf_counter()
            micro_batch = next(micro_batches, None)
            if micro_batch is None:
                raise ValueError(f"micro_batches ended after {index} of the update's {num_passes} passes")
            share.data_wait_s += time.perf_counter() - begin
            self.changing.restore()
            loss, num_samples = self._forward(micro_batch, share, phase.global_batch // num_groups)
            self.changing.after_forward(micro_batch.slots)
            if index == num_passes - 1:
                # Everything but the gradients is known now, so its all-reduce overlaps the last backward too.
                totals = self._totals(share, num_groups)
                handle = self.ranks.start_sum(totals, "totals")
                self.buckets.start_when_ready(phase.global_batch * factor)
            scaled = loss * factor if self.loss_scale else loss
            self.buckets.begin_backward(scaled, num_samples)
            scaled.backward()
            self.buckets.end_backward()
            self.changing.after_backward(micro_batch.slots)
        self.buckets.start_rest()
        return totals, handle

    def _forward(self, micro_batch: MicroBatch, share: _Share, group: int) -> tuple[Tensor, int]:
        """Return the sum of the losses of a micro-batch, and the number of its samples."""
        keys = micro_batch.keys
        set_sample_keys(self.dropouts, None if keys is None else to_device(keys, self.device))
        losses = self.forward(self.model, micro_batch)
        self._check(losses.each, micro_batch, group)
        loss = losses.each.sum()
        share.add(micro_batch, loss.detach(), losses.num_correct)
        return loss, len(losses.each)

    def _check(self, losses: Tensor, micro_batch: MicroBatch, group: int) -> None:
        """Check that there is one loss per sample.

        A mean instead would give all micro-batches the same weight, whatever their size; and dividing by B is only
        correct for a sum of B losses.
        """
        num_groups = len(micro_batch.slots)
        if losses.shape != (num_groups * group,) or not num_groups:
            raise ValueError(
                f"forward returned losses of shape {tuple(losses.shape)} for a micro-batch of {num_groups} ghost "
                f"batches of {group}; it must return the loss of each sample, ({num_groups * group},): reduction='none'"
            )

    def _check_frozen(self) -> None:
        """Check that frozen parameters are still frozen: no optimizer has them, so they would never be trained."""
        if names := [name for name, parameter in self._frozen if parameter.requires_grad]:
            raise RunError(
                f"the network has set requires_grad = True for {', '.join(names[:3])} during training, and it is in no "
                "optimizer; set it where the network is built"
            )

    def _is_usable(self, norm: float, loss_sum: float, share: _Share, num_groups: int) -> bool:
        """Clip the averaged gradient, and return whether it is finite. All ranks have the same sums, so they agree."""
        if self.loss_scale and math.isfinite(loss_sum):
            is_the_scales = self.loss_scale.after(overflow=not math.isfinite(norm))
            if is_the_scales:
                return False
        if not (math.isfinite(loss_sum) and math.isfinite(norm)):
            if self.rule.on_nonfinite == "stop":
                raise NonFinite(self._bad_groups(share, num_groups))
            return False
        if self.rule.clip_norm is not None and norm > self.rule.clip_norm:
            self.buckets.divide(norm / self.rule.clip_norm)
        return True

    def _factor(self, phase: Phase, num_groups: int) -> float:
        """Return the factor on the loss of each sample."""
        return self.loss_scale.per_sample(phase.global_batch // num_groups) if self.loss_scale else 1.0

    def _bad_groups(self, share: _Share, num_groups: int) -> tuple[int, ...]:
        """Return the slots, over all ranks, of the ghost batches in micro-batches whose loss is not finite."""
        bad = torch.zeros(num_groups)
        for slots, loss in share.losses:
            if not torch.isfinite(loss):
                bad[list(slots)] = 1
        return tuple(self.ranks.sum(bad, "bad groups").nonzero().flatten().tolist())

    def _totals(self, share: _Share, num_groups: int) -> Tensor:
        """Return the tallies, how often each ghost batch was processed, and the contribution of each ghost norm.

        Returns:
            float64 (6 + G + Σ 2C). Exact sums have two parts, each with a largest value: 4 (C+1) numbers per norm.
        """
        outside = [slot for slot in share.slots if not 0 <= slot < num_groups]
        if outside:
            raise ValueError(
                f"slots {outside[:8]} must be in 0 … {num_groups - 1}: the update has {num_groups} ghost batches"
            )
        self._norm_groups = group_norms(self.norms)
        served = [0.0] * num_groups
        for slot in share.slots:
            served[slot] += 1
        known = [float(share.stop), float(len(share.replaced)), *to_halves(share.digest % 2**64), *served]
        weights = [group.norms[0].weights(share.slots, num_groups) for group in self._norm_groups]
        known += [weight for of_group in weights for weight in of_group]
        # What the host knows crosses to the device in one copy.
        numbers, rest = to_device(torch.tensor(known, dtype=torch.float64), self.device).tensor_split([4 + num_groups])
        sums: list[Tensor] = []
        num_slots = len(share.slots)
        for index, group in enumerate(self._norm_groups):
            of_group = rest[index * num_slots : (index + 1) * num_slots]
            sums += self._summed(group, of_group[:, None, None] * group.take_statistics(num_slots))
        return torch.cat([share.tally, numbers, *sums])

    def _summed(self, group: NormGroup, contributions: Tensor) -> list[Tensor]:
        """Sum the contributions (k, 2, ΣC) of this rank's ghost batches, flat; in exact mode as parts, norm by norm."""
        if not self.exact:
            return [contributions.sum(0).reshape(-1)]
        return [split(part).sum(1).reshape(-1) for part in contributions.split(group.sizes, dim=2)]

    def _joined(self, sums: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Return the contributions (2, ΣC) of each group, and the largest values of all exact sums of the update."""
        if not self.exact:
            sizes = [2 * sum(group.sizes) for group in self._norm_groups]
            return [part.view(2, -1) for part in sums.split(sizes)], []
        joined, bounds, start = [], self.buckets.largest(), 0
        for group in self._norm_groups:
            parts = []
            for size in group.sizes:
                part = sums[start : start + 4 * (size + 1)].view(2, 2, -1)
                parts.append(join_unchecked(part))
                bounds.append(largest(part))
                start += 4 * (size + 1)
            joined.append(torch.cat(parts, dim=1))
        return joined, bounds

    def _commit(self, statistics: Sequence[Tensor], num_groups: int) -> None:
        for group, contributions in zip(self._norm_groups, statistics, strict=True):
            group.commit(contributions, num_groups)


def _split(values: list[float], *sizes: int) -> list[list[float]]:
    """Split a list into parts of these sizes and the rest."""
    ends = list(itertools.accumulate(sizes))
    return [values[start:end] for start, end in zip([0, *ends], [*ends, len(values)], strict=True)]


def _check_served(counts: Sequence[float]) -> None:
    """Check that each ghost batch was processed once. All ranks have the same counts, so they raise together."""
    wrong = [slot for slot, count in enumerate(counts) if count != 1]
    if wrong:
        found = ", ".join(f"ghost batch {slot}: {counts[slot]:.0f} times" for slot in wrong[:8])
        raise ValueError(
            f"each of the update's {len(counts)} ghost batches must be processed exactly once, but {len(wrong)} were "
            f"not: {found}{', …' if wrong[8:] else ''}"
        )
