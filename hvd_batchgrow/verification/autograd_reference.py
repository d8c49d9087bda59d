"""The first updates of a job by plain torch autograd: an independent reference for the update engine.

One process trains one ghost batch at a time. It uses no gradient buckets, no gradient hooks, no deferred
statistics, no all-reduce, no exact sums and no kernels of this package.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import torch
from torch import Tensor, nn

from hvd_batchgrow.config import Job
from hvd_batchgrow.data.datasets.dataset import Datasets
from hvd_batchgrow.data.datasets.example import source_form
from hvd_batchgrow.data.order.stream import Stream
from hvd_batchgrow.data.pipeline.reader import Reader
from hvd_batchgrow.data.tensor_tree import map_tensors
from hvd_batchgrow.nn.build import build_model, forward_state, load_pretrained
from hvd_batchgrow.nn.ghost.ghost_choice import by_pytorch_only
from hvd_batchgrow.nn.ghost.running_statistics import reestimate_running_statistics
from hvd_batchgrow.nn.keyed_random import keyed_modules, set_sample_keys
from hvd_batchgrow.nn.parameters import network_inputs
from hvd_batchgrow.nn.weights_file import read_weights
from hvd_batchgrow.optim.build import build_optimizer, lr_ratios, set_hyperparameters, set_weight_decay, weight_decays
from hvd_batchgrow.schedule.phases import Phase
from hvd_batchgrow.schedule.plan import compile_plan
from hvd_batchgrow.tasks.load_task import load_task
from hvd_batchgrow.train.update.changing_buffers import ChangingBuffers
from hvd_batchgrow.train.update.forward import MicroBatch, autocast, forward_of
from hvd_batchgrow.train.update.loss_scale import LossScale
from hvd_batchgrow.train.update.micro_batches import join_ghost_batches
from hvd_batchgrow.train.update.rounding_noise import Noise, noise_size
from hvd_batchgrow.verification.rounding_limits import States, tensors_of


@dataclass
class PlainRun:
    """A network and its optimizer, trained from their first state by plain autograd.

    Args:
        job: gives network, data and schedule.
        source: the job's data.
        device: the device to compute on.
        noise_seed: add noise of `noise_size` to inputs, weights and the gradient of each ghost batch, with
            signs from this seed; the weights keep none of it. None: no noise.
    """

    job: Job
    source: Datasets
    device: torch.device
    noise_seed: int | None = None

    def __post_init__(self) -> None:
        form = source_form(self.source, self.job.task.target)
        torch.manual_seed(self.job.seed)
        network = build_model(self.job, form, self.source.num_classes)
        if path := self.job.model.pretrained:
            load_pretrained(self.job, network, read_weights(path), self.source.num_classes)
        self._network = network.to(self.device)
        for parameter in self._network.parameters():
            # Ordinary memory, whatever view or stride the network gave its parameter.
            parameter.data = parameter.detach().clone(memory_format=torch.contiguous_format)
        self._changing = ChangingBuffers(self._network, forward_state(self.job, self._network, form))
        self.noise_size = noise_size(self.job.update, self._network, self.device)
        self._noise = Noise(0.0 if self.noise_seed is None else self.noise_size, self.noise_seed or 0)
        self._optimizer = build_optimizer(self._network, self.job.optim)
        self._lr_ratios, self._weight_decays = lr_ratios(self._optimizer), weight_decays(self._optimizer)
        task = load_task(self.job.task, self.source.num_classes, self.source.schema)
        self._forward = forward_of(task, self.job.update.precision)
        self._loss_scale = LossScale() if self.job.update.precision == "float16" else None
        self._schedule = compile_plan(self.job, 1, len(self.source.train)).schedule

    def train(self, num_updates: int) -> States:
        """Run the first updates of the job, and return the states after the first and the last of them."""
        samples, states, ghost_batch = 0, {}, self.job.model.ghost_batch
        ghost_batches = self._ghost_batches(0)
        with by_pytorch_only():
            for index in range(num_updates):
                phase = self._schedule.at(samples)
                self._update(list(islice(ghost_batches, phase.global_batch // ghost_batch)), phase)
                samples += phase.global_batch
                if samples == phase.end_samples and self.job.model.precise_bn_samples:
                    self._reestimate(samples, self.job.model.precise_bn_samples)
                is_last = index == num_updates - 1 or samples >= self._schedule.end_samples
                if index == 0 or is_last:
                    tensors = tensors_of(self._network.state_dict())
                    states[samples] = {name: value.cpu().clone() for name, value in tensors.items()}
                if is_last:
                    break
        return states

    def _ghost_batches(self, first: int) -> Iterator[MicroBatch]:
        """Yield the ghost batches of the stream from index `first` on, each as a micro-batch."""
        ghost_batch, num_samples = self.job.model.ghost_batch, len(self.source.train)
        reader = Reader(self.job.data, self.source, self.device, torch.get_num_threads(), lambda bad: None, ghost_batch)
        for batch in reader.training(Stream(num_samples, self.job.seed), ghost_batch, first, 1):
            yield join_ghost_batches([batch], (0,), (self.job.seed, num_samples))

    def _update(self, ghost_batches: Sequence[MicroBatch], phase: Phase) -> None:
        before = {name: buffer.clone() for name, buffer in self._network.named_buffers()}
        gradients = self._mean_gradients(ghost_batches)
        norm = float(torch.stack([gradient.norm().abs() for gradient in gradients.values()]).norm())
        is_finite = norm < float("inf")
        if self._loss_scale:
            self._loss_scale.after(overflow=not is_finite)
        self._changing.end(skipped=not is_finite)
        if not is_finite:
            for name, buffer in self._network.named_buffers():
                buffer.copy_(before[name])
            return
        clip = self.job.update.clip_norm
        shrink = clip / norm if clip and norm > clip else 1.0
        for parameter in self._network.parameters():
            # torch's optimizers skip a parameter without a gradient: neither weight decay nor momentum moves it.
            gradient = gradients.get(parameter)
            parameter.grad = None if gradient is None else (gradient * shrink).to(parameter.dtype)
        rescale = getattr(self.job.optim, "rescale_momentum", False)
        set_hyperparameters(self._optimizer, phase, self._lr_ratios, rescale_momentum=rescale)
        set_weight_decay(self._optimizer, phase, self._weight_decays)
        self._optimizer.step()

    def _mean_gradients(self, ghost_batches: Sequence[MicroBatch]) -> dict[nn.Parameter, Tensor]:
        """Return the float64 gradients of the mean loss, for the parameters that a loss reaches."""
        sums: dict[nn.Parameter, Tensor] = {}
        weight = 0.0
        scale = self._loss_scale.per_sample(self.job.model.ghost_batch) if self._loss_scale else 1.0
        self._network.train()
        self._changing.begin()
        with self._noise.on_weights(self._network):
            for index, ghost_batch in enumerate(ghost_batches):
                self._changing.restore()
                self._network.zero_grad(set_to_none=True)
                set_sample_keys(keyed_modules(self._network), ghost_batch.keys)
                noisy = replace(ghost_batch, inputs=map_tensors(self._noise, ghost_batch.inputs))
                losses = self._forward(self._network, noisy)
                loss = losses.each.sum()
                weight += len(losses.each) if losses.weights is None else float(losses.weights.double().sum())
                self._changing.after_forward((index,))
                (loss * scale).backward()
                self._changing.after_backward((index,))
                for parameter in self._network.parameters():
                    if parameter.grad is not None:
                        gradient = self._noise(_wide(parameter.grad.to_dense()))
                        sums[parameter] = sums[parameter] + gradient if parameter in sums else gradient
        return {parameter: total / (weight * scale) for parameter, total in sums.items()}

    def _reestimate(self, samples: int, num_samples: int) -> None:
        """Re-estimate the running statistics at the end of a phase, over the most recent samples."""
        ghost_batch = self.job.model.ghost_batch
        count = min(samples // ghost_batch, -(-num_samples // ghost_batch))
        last = islice(self._ghost_batches(samples // ghost_batch - count), count)
        with autocast(self.device, self.job.update.precision):
            inputs = (
                network_inputs(map_tensors(self._noise, ghost_batch.inputs), self._network) for ghost_batch in last
            )
            reestimate_running_statistics(self._network, inputs)


def _wide(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float64))
