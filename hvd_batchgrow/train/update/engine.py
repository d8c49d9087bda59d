"""One update: the sum of per-sample losses over B samples in any layout, divided once by their total weight."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hvd_batchgrow.comm.ranks import Ranks
from hvd_batchgrow.config import UpdateSection
from hvd_batchgrow.messages.errors import RunError
from hvd_batchgrow.nn.ghost.ghost_batch_norm import ghost_norms
from hvd_batchgrow.nn.ghost.norm_group import NormGroup, group_norms
from hvd_batchgrow.nn.keyed_random import keyed_modules, set_sample_keys
from hvd_batchgrow.nn.norm_gradients import NormGradients
from hvd_batchgrow.nn.state.forward_state import ForwardState
from hvd_batchgrow.optim.build import lr_ratios, set_hyperparameters, set_weight_decay, weight_decays
from hvd_batchgrow.schedule.phases import Phase
from hvd_batchgrow.tasks.classification import Classification
from hvd_batchgrow.tasks.task import Losses
from hvd_batchgrow.train.liveness.watchdog import WAITING
from hvd_batchgrow.train.update.changing_buffers import ChangingBuffers
from hvd_batchgrow.train.update.engine_checks import check_keys, check_parts
from hvd_batchgrow.train.update.exact_sums import check_range
from hvd_batchgrow.train.update.forward import Forward, MicroBatch, check_losses, forward_of
from hvd_batchgrow.train.update.gradient_noise import NoiseEstimate
from hvd_batchgrow.train.update.gradient_norms import GradientNorms
from hvd_batchgrow.train.update.gradients import GradientBuckets, wire_type_of
from hvd_batchgrow.train.update.local_sums import LocalSums
from hvd_batchgrow.train.update.loss_scale import LossScale
from hvd_batchgrow.train.update.micro_batches import gather_replaced, repeatable
from hvd_batchgrow.train.update.non_finite import NonFinite
from hvd_batchgrow.train.update.stopwatch import stopwatch_of
from hvd_batchgrow.train.update.totals import Share, SharedTotals, Totals


@dataclass(frozen=True)
class UpdateResult:
    """Results of one update over all its samples on all ranks."""

    loss_sum: float
    """Sum of the per-sample losses, with the weights before the update."""
    weight: float
    """Sum of the weights of its samples: B, unless `Losses.weights` says otherwise."""
    metrics: dict[str, tuple[float, float]]
    """Sum and count of each of `Losses.metrics`."""
    stop_requested: bool
    """Whether any rank requests a stop; equal on all ranks."""
    digest: int
    """`order_digest.digest` of all its samples, on all ranks."""
    replaced: tuple[tuple[int, int], ...]
    """(stream index, sample id) of each sample that replaced a bad one, on all ranks."""
    skipped: bool
    """Whether the update was skipped because it was not finite; weights, optimizer and statistics are unchanged."""
    gradient_norm: float
    """2-norm of the gradient of the mean loss, before it is clipped."""
    noise: dict[str, NoiseEstimate]
    """Noise of the gradient by name: `ALL` and layer groups, unless the update had a single micro-batch; `NORM_LAYERS`,
    unless it had a single unit. Empty if it is not measured."""


class UpdateEngine:
    """Computes updates of a model, which are equal in every layout up to rounding.

    Args:
        model: maps inputs to logits. Each update calls its `train()`.
        optimizer: has all trainable parameters of the model and no others; do not call its `zero_grad`. The parameter
            groups get the learning rate of the phase times their ratio, see `lr_ratios`.
        ranks: the processes that share an update.
        rule: how the gradient is computed, and how it is processed before the optimizer step.
        forward: maps a micro-batch to the loss of each of its samples, such as the result of `forward_of`; None:
            cross-entropy of one class per sample. A custom forward must apply the precision itself; the engine still
            applies the loss scale for float16.
        rescale_momentum: see `set_hyperparameters`.
        exact: sum gradients and ghost statistics exactly, so that they are bit-identical in all layouts. A
            micro-batch must then be one ghost batch, and all ranks must use the same threads and kernels.
        forward_state: the buffers, other than those of ghost norms, that a pass changes; None: all may change.
        at: called with the name of each stage that this rank enters, for the watchdog.

    Raises:
        ValueError: the first of several parameter groups has learning rate 0, or model and optimizer cannot be trained
            (see `check_parts`).
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
        check_parts(model, optimizer)
        self.model = model
        self.optimizer = optimizer
        self.ranks = ranks
        self.rule = rule or UpdateSection()
        self.forward = forward or forward_of(Classification(), self.rule.precision)
        self.rescale_momentum = rescale_momentum
        self.lr_ratios = lr_ratios(optimizer)
        self._weight_decays = weight_decays(optimizer)
        self._frozen = [
            (name, parameter) for name, parameter in model.named_parameters() if not parameter.requires_grad
        ]
        self.device = next(model.parameters()).device
        self.norms = list(ghost_norms(model))
        for norm in self.norms:
            norm.deferred = True
        self._norm_groups: list[NormGroup] = []
        """Those in training mode in the last pass."""
        self.keyed_modules = keyed_modules(model)
        self.changing = ChangingBuffers(model, forward_state)
        self.exact = exact
        self.buckets = GradientBuckets(
            [p for p in model.parameters() if p.requires_grad], ranks, exact=exact, wire_type=wire_type_of(self.rule)
        )
        self._magnitudes = self.buckets.magnitudes
        """Those after the last complete update: if ranks are lost in an update, a resumed run does it again."""
        self.loss_scale = LossScale() if self.rule.precision == "float16" else None
        self.at = at
        self.stopwatch = stopwatch_of(self.device)
        """The time of updates on this rank's device, stage by stage, since the caller's last `read`."""

    def measure_noise(
        self, *, preconditioned: bool = False, per_layer_group: bool = False, layers: NormGradients | None = None
    ) -> None:
        """Measure the noise in the gradient of each following update; this does not change the weights.

        It needs memory for one more gradient if an update has several micro-batches on this rank.

        Args:
            preconditioned: scale the gradient as Adam does, with the moments before the update.
            per_layer_group: measure the noise of each child of the model too.
            layers: records the gradients of the model's norm layers, whose noise is then measured too, also in an
                update of one micro-batch.

        Raises:
            ValueError: `preconditioned` is set and the optimizer is not Adam, or `layers` is given too.
        """
        if preconditioned and layers:
            raise ValueError("preconditioned=True does not measure norm layers: omit it, or layers")
        if preconditioned and not isinstance(self.optimizer, torch.optim.Adam | torch.optim.AdamW):
            kind = type(self.optimizer).__name__
            raise ValueError(f"preconditioned=True is for torch.optim.Adam or AdamW, not {kind}: omit it")
        groups = {p: name.partition(".")[0] for name, p in self.model.named_parameters()} if per_layer_group else None
        adam = self.optimizer if preconditioned else None
        members = self.buckets.members
        self.buckets.norms = GradientNorms(members, groups=groups, exact=self.exact, adam=adam, layers=layers)

    def state_dict(self) -> dict[str, Any]:
        """Return what the next update depends on besides weights, buffers and optimizer, as plain values."""
        scale = self.loss_scale and asdict(self.loss_scale)
        return {"loss_scale": scale, "gradient_magnitudes": self._magnitudes}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from the state of an engine with the same network and settings."""
        if self.loss_scale and state["loss_scale"]:
            self.loss_scale = LossScale(**state["loss_scale"])
        magnitudes = list(state["gradient_magnitudes"])
        if self.exact and len(magnitudes) == len(self._magnitudes):  # of other buckets: the first update finds them
            self.buckets.magnitudes = self._magnitudes = magnitudes

    def use(self, ranks: Ranks) -> None:
        """Share the following updates among these ranks, which include this one. Call it between updates."""
        self.ranks = ranks
        self.buckets.use(ranks)

    def update(
        self,
        micro_batches: Iterator[MicroBatch],
        num_micro_batches: int,
        phase: Phase,
        num_ghost_batches: int,
        *,
        stop: bool = False,
        again: Callable[[], Iterator[MicroBatch]] | None = None,
        check: Callable[[LocalSums, float], None] | None = None,
    ) -> UpdateResult:
        """Do one update.

        Args:
            micro_batches: yields this rank's share; ranks may have unequal shares.
            num_micro_batches: number of micro-batches to take, >= 1.
            phase: gives B, the learning rate and the momentum.
            num_ghost_batches: number of ghost batches of the whole update, B/γ.
            stop: whether this rank requests a stop; it is all-reduced with the losses.
            again: returns the same micro-batches again. Exact updates whose gradients are much larger or smaller than
                those of the update before are repeated. None: the engine keeps the micro-batches of an exact update, so
                their tensors must not change until the update is done.
            check: called before the optimizer step, if the gradient is finite, with what this rank has computed and
                the factor on the loss of each sample. If it raises, the weights are those before the update.

        Raises:
            NonFinite: loss or gradient is not finite, and `on_nonfinite` is "stop"; raised on all ranks.
            RunError: the network has set requires_grad of a parameter that was frozen when the engine was made; or
                the weights of all samples are 0.
            ValueError: a micro-batch does not have exactly the samples of its ghost batches, or no keys (see
                `check_keys`); a norm did not process them exactly once; `micro_batches` ended early; the ranks together
                did not process each ghost batch exactly once; or the optimizer has no momentum, and the phase has.
        """
        if num_micro_batches < 1:
            raise ValueError(f"num_micro_batches = {num_micro_batches}: must be at least 1 on each rank")
        if self.exact and again is None:
            micro_batches, again = repeatable(micro_batches)
        self.buckets.sketches = {} if check else None
        self.stopwatch.begin("forward")
        while (done := self._compute(micro_batches, num_micro_batches, phase, num_ghost_batches, stop=stop)) is None:
            assert again is not None  # only exact updates are repeated
            micro_batches = again()
        share, totals, statistics, norm = done
        norm /= self._weigh(totals.weight, phase.global_batch)
        factor = self._factor(phase, num_ghost_batches)
        noise = self.buckets.noise(phase.global_batch, totals.weight, factor)
        self._check_frozen()
        self.changing.share(self.ranks)
        replaced = gather_replaced(share.replaced, self.ranks) if totals.num_replaced else ()
        if check and math.isfinite(norm) and math.isfinite(totals.loss_sum):
            self.stopwatch.enter(None)
            check(self._local_sums(share), factor)
            self.stopwatch.enter("optimizer")
        skipped = not self._is_usable(norm, totals.loss_sum, share, num_ghost_batches)
        # Ranks are lost in collectives, all of which are above: the weights are then those before the update.
        if not skipped:
            set_hyperparameters(self.optimizer, phase, self.lr_ratios, rescale_momentum=self.rescale_momentum)
            set_weight_decay(self.optimizer, phase, self._weight_decays)
            self.optimizer.step()
            for norms, contributions in zip(self._norm_groups, statistics, strict=True):
                norms.commit(contributions, num_ghost_batches)
        self.changing.end(skipped=skipped)
        set_sample_keys(self.keyed_modules, None)
        self._magnitudes = self.buckets.magnitudes
        self.stopwatch.enter(None)
        return UpdateResult(
            loss_sum=totals.loss_sum,
            weight=totals.weight,
            metrics=totals.metrics,
            stop_requested=totals.num_stop_requests > 0,
            digest=totals.digest,
            replaced=replaced,
            skipped=skipped,
            gradient_norm=norm,
            noise={} if skipped else noise,
        )

    def _compute(
        self,
        micro_batches: Iterator[MicroBatch],
        num_micro_batches: int,
        phase: Phase,
        num_ghost_batches: int,
        *,
        stop: bool,
    ) -> tuple[Share, Totals, list[Tensor], float] | None:
        """Compute the averaged gradient.

        Returns:
            What this rank has added, the totals of all ranks, the contributions of the ghost norms, and the norm of the
            gradient; None: an exact sum does not fit, and the update must be repeated.
        """
        share = Share(stop, self.exact)
        shared, handle = self._accumulate(micro_batches, num_micro_batches, share, phase, num_ghost_batches)
        self.at(WAITING)
        self.stopwatch.enter("all-reduce")
        self.buckets.wait()
        self.ranks.wait(handle)
        self.stopwatch.enter("optimizer")
        self.buckets.average()
        self.at("updating the weights")
        statistics, bounds = shared.statistics()
        largest = self.buckets.sums_of_largest()
        # The only wait for the device: everything that the host needs is read together.
        totals, (norm, *read) = shared.read([self.buckets.norm(), *largest, *bounds], self.ranks)
        check_range(read[len(largest) :])
        if not self.buckets.end(read[: len(largest)]):
            if self.buckets.resize():
                self.changing.end(skipped=True)
                return None
            norm = math.nan
        return share, totals, statistics, norm

    def _accumulate(
        self,
        micro_batches: Iterator[MicroBatch],
        num_micro_batches: int,
        share: Share,
        phase: Phase,
        num_ghost_batches: int,
    ) -> tuple[SharedTotals, Any]:
        """Do the forward and backward passes; return the totals and the handle of their all-reduce."""
        self.model.train()
        self.buckets.zero(num_ghost_batches, is_single=num_micro_batches == 1 and self.ranks.size == 1)
        for norm in self.norms:
            norm.forget()
        self.changing.begin()
        factor = self._factor(phase, num_ghost_batches)
        for index in range(num_micro_batches):
            self.stopwatch.enter("data")
            micro_batch = next(micro_batches, None)
            if micro_batch is None:
                raise ValueError(f"micro_batches ended after {index} of the update's {num_micro_batches}")
            self.stopwatch.enter("forward")
            self.changing.restore()
            losses = self._forward(micro_batch, phase.global_batch // num_ghost_batches)
            loss, weight = share.add(micro_batch, losses)
            self.changing.after_forward(micro_batch.slots)
            if index == num_micro_batches - 1:
                # Everything but the gradients is known now, so its all-reduce overlaps the last backward too.
                self._norm_groups = group_norms(self.norms)
                totals = SharedTotals(share, num_ghost_batches, self._norm_groups, self.device)
                handle = self.ranks.start_all_reduce(totals.vector, "totals")
                self.buckets.start_when_ready(phase.global_batch * factor)
            self.stopwatch.enter("backward")
            scaled = loss * factor if self.loss_scale else loss
            self.buckets.begin_backward(scaled, weight, len(losses.each))
            scaled.backward()
            self.buckets.end_backward()
            self._add_units(losses, len(micro_batch.slots))
            self.changing.after_backward(micro_batch.slots)
        self.buckets.start_rest()
        return totals, handle

    def _forward(self, micro_batch: MicroBatch, ghost_batch: int) -> Losses:
        """Return the losses of the samples of a micro-batch."""
        check_keys(self.keyed_modules, micro_batch.keys, exact=self.exact)
        set_sample_keys(self.keyed_modules, micro_batch.keys, self.device)
        if (norms := self.buckets.norms) and norms.layers:
            norms.layers.begin(len(micro_batch.slots) * ghost_batch, len(micro_batch.slots))
        losses = self.forward(self.model, micro_batch)
        check_losses(losses, len(micro_batch.slots), ghost_batch)
        return losses

    def _add_units(self, losses: Losses, num_ghost_batches: int) -> None:
        """Add the recorded gradients of the norm layers of a micro-batch, if their noise is measured."""
        norms = self.buckets.norms
        if not (norms and norms.layers):
            return
        num_units = num_ghost_batches if norms.layers.unit == "ghost batch" else len(losses.each)
        weights = torch.ones_like(losses.each) if losses.weights is None else losses.weights
        of_units = weights.detach().double().view(num_units, -1)
        norms.add_units(norms.layers.end(), of_units.sum(1), of_units.shape[1])

    def _local_sums(self, share: Share) -> LocalSums:
        """Return what this rank has computed in the update in progress, whose buckets have sketches."""
        assert self.buckets.sketches is not None
        return LocalSums.of(share, [sketch for _, sketch in sorted(self.buckets.sketches.items())])

    def _weigh(self, weight: float, batch: int) -> float:
        """Turn the means over B samples into means over the total weight; return the mean weight of a sample.

        All ranks have the same sums, so they agree.
        """
        if math.isfinite(weight) and weight <= 0:
            raise RunError(f"the weights of the update's {batch} samples have the sum {weight:g}; it must be above 0")
        mean = weight / batch
        if mean != 1:
            self.buckets.divide(mean)
        return mean

    def _check_frozen(self) -> None:
        """Check that frozen parameters are still frozen: no optimizer has them, so they would never be trained."""
        if names := [name for name, parameter in self._frozen if parameter.requires_grad]:
            raise RunError(
                f"the network has set requires_grad = True for {', '.join(names[:3])} during training, and it is in no "
                "optimizer; set it where the network is built"
            )

    def _is_usable(self, norm: float, loss_sum: float, share: Share, num_ghost_batches: int) -> bool:
        """Clip the averaged gradient, and return whether it is finite. All ranks have the same sums, so they agree."""
        has_loss, has_norm = math.isfinite(loss_sum), math.isfinite(norm)
        if self.loss_scale and has_loss and self.loss_scale.after(overflow=not has_norm):
            return False  # the scale was too large
        if not (has_loss and has_norm):
            if self.rule.on_nonfinite == "stop":
                raise NonFinite(self._bad_ghost_batches(share, num_ghost_batches))
            return False
        if self.rule.clip_norm is not None and norm > self.rule.clip_norm:
            self.buckets.divide(norm / self.rule.clip_norm)
        return True

    def _factor(self, phase: Phase, num_ghost_batches: int) -> float:
        """Return the factor on the loss of each sample."""
        return self.loss_scale.per_sample(phase.global_batch // num_ghost_batches) if self.loss_scale else 1.0

    def _bad_ghost_batches(self, share: Share, num_ghost_batches: int) -> tuple[int, ...]:
        """Return the slots, over all ranks, of the ghost batches in micro-batches whose loss is not finite."""
        bad = torch.zeros(num_ghost_batches)
        for slots, loss in share.losses:
            if not torch.isfinite(loss):
                bad[list(slots)] = 1
        return tuple(self.ranks.all_reduce(bad, "bad ghost batches").nonzero().flatten().tolist())
