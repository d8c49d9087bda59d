"""Find by trial passes which state of a network training changes, apart from that of ghost norms."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from hvd_batchgrow.data.tensor_tree import Tree, num_rows, tensors_in
from hvd_batchgrow.messages.wording import listed
from hvd_batchgrow.nn.ghost.ghost_batch_norm import GhostBatchNorm, ghost_norms
from hvd_batchgrow.nn.keyed_random import KeyedModule, keyed_modules, set_sample_keys
from hvd_batchgrow.nn.state.saved_state import Saved, SavedState, changed
from hvd_batchgrow.nn.state.side_effect_free import cloned, dry_run, other_samples

NUM_SAMPLES, _NUM_GHOST_BATCHES = 4, 2
"""Each trial pass has two ghost batches of two samples."""


class StateFault(ValueError):  # noqa: N818  # a fault of the network
    """A network keeps state in an unsupported way."""


@dataclass(frozen=True)
class ForwardState:
    """Names of the state that passes change, apart from ghost norms."""

    in_forward: tuple[str, ...] = ()
    """Buffers that a forward pass in training changes."""
    in_backward: tuple[str, ...] = ()
    """Buffers that a backward pass changes, by hooks or by repeating a forward (activation checkpointing)."""
    in_evaluation: tuple[str, ...] = ()
    """Buffers that a forward pass in evaluation changes."""
    attributes: tuple[str, ...] = ()
    """Plain attributes that keep state from one forward to the next; a `state_dict` does not contain them."""
    depends_on_samples: bool = False
    """Whether the new values depend on the samples, as in a codebook, unlike in spectral norm."""

    @property
    def buffers(self) -> tuple[str, ...]:
        """All buffers that a training pass changes."""
        return tuple(dict.fromkeys(self.in_forward + self.in_backward))

    def notes(self, name: str, *, exact: bool) -> list[str]:
        """Return lines that explain the state to the user.

        Args:
            name: the network's name.
            exact: whether each micro-batch is one ghost batch.
        """
        lines = []
        if self.buffers:
            line = (
                f"{name} changes buffers in training ({listed(self.buffers)}): every micro-batch of an update starts "
                "from the same values, and the values after ghost batch 0 are kept"
            )
            depends = self.depends_on_samples and not exact
            lines.append(line + ("; they depend on the micro-batch, unless layout.exact = true" if depends else ""))
        if self.in_evaluation:
            names = listed(self.in_evaluation)
            lines.append(f"{name} changes buffers in evaluation ({names}): they are restored after each evaluation")
        if self.attributes:
            lines.append(f"{name}: {self.attributes_fault()}")
        return lines

    def attributes_fault(self) -> str:
        """Return why state outside the buffers is a fault."""
        return (
            f"a forward pass changes attributes that are not buffers ({listed(self.attributes)}): each rank has its "
            "own, they depend on the rank/accumulation layout, and no checkpoint saves them; use register_buffer"
        )


def find_forward_state(model: nn.Module, example: Tree) -> ForwardState:
    """Run training and evaluation passes over two ghost batches, and compare all state before and after.

    Args:
        model: maps samples to logits; is not changed.
        example: `NUM_SAMPLES` samples, not all equal.

    Raises:
        StateFault: the network changes its parameters or the shape of a buffer, or a ghost norm does not process
            each ghost batch once.
        Exception: any exception of the network.
    """
    training = _train(model, example)
    in_evaluation, attributes = _evaluate(model, example)
    attributes = tuple(dict.fromkeys(training.attributes + attributes))
    return replace(training, in_evaluation=in_evaluation, attributes=attributes)


def _train(model: nn.Module, example: Tree) -> ForwardState:
    with dry_run(
        model, num_rows(example), training=True, gradients=True, num_ghost_batches=_NUM_GHOST_BATCHES
    ) as before:
        first = _states_of_a_pass(model, example, before)
        _check_parameters(model, before)
        _changed_buffers(model, first)
        _move_weights(model)  # so that a buffer computed from them changes; a view of them does not count
        moved = SavedState(model)
        second = _states_of_a_pass(model, example, moved)
        _check_parameters(model, moved)
        in_forward = _changed_buffers(model, first[:2] + second[:2])
        in_backward = _changed_buffers(model, first[1:] + second[1:])
        # Again from the same tensors: attributes computed from them are equal, counters are not.
        before.restore(attributes=False)
        trial_loss(model, example)
        attributes = _changed_attributes(model, first[1], SavedState(model, parameters=False))
        before.restore(attributes=False)
        trial_loss(model, other_samples(example))
        buffers = {*in_forward, *in_backward}
        is_shown = buffers == {*_changed_buffers(model, first[:2])}  # otherwise this forward does not show them all
        differing = changed(first[1].buffers, SavedState(model, parameters=False).buffers)
    return ForwardState(in_forward, in_backward, (), attributes, not is_shown or bool(buffers & {*differing}))


def _states_of_a_pass(model: nn.Module, example: Tree, before: SavedState) -> list[SavedState]:
    """Return the states before the forward, between forward and backward, and after the backward."""
    loss = trial_loss(model, example)
    between = SavedState(model, parameters=False)
    _backward(model, loss)
    return [before, between, SavedState(model, parameters=False)]


def _evaluate(model: nn.Module, example: Tree) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the buffers and the attributes that a forward in evaluation changes."""
    with dry_run(model, num_rows(example), training=False) as before:
        model(cloned(example))
        first = SavedState(model, parameters=False)
        _check_parameters(model, before)
        before.restore(attributes=False)
        model(cloned(example))
        attributes = _changed_attributes(model, first, SavedState(model, parameters=False))
        return _changed_buffers(model, [before, first]), attributes


def trial_loss(model: nn.Module, example: Tree) -> Tensor:
    """Return the summed loss of a forward pass over samples, with the same random numbers in each call.

    Its value does not matter, but its gradient must reach all that the outputs depend on. For logits (n, C), it is
    the cross-entropy with class 0; for other outputs, the sum of their softplus.
    """
    torch.manual_seed(0)  # random numbers are not state of the network
    set_sample_keys(keyed_modules(model), torch.arange(num_rows(example)))
    outputs = model(cloned(example))
    if isinstance(outputs, Tensor) and outputs.dim() == 2 and outputs.shape[1] > 1:
        labels = torch.zeros(len(outputs), dtype=torch.int64, device=outputs.device)
        return nn.functional.cross_entropy(outputs.float(), labels, reduction="sum")
    parts = [part for part in tensors_in(outputs) if part.is_floating_point()]
    return torch.stack([nn.functional.softplus(part.float()).sum() for part in parts]).sum()


def _backward(model: nn.Module, loss: Tensor) -> None:
    loss.backward()
    for path, norm in model.named_modules():
        if not isinstance(norm, GhostBatchNorm) or not norm.training:
            continue
        if not (count := len(norm.take_statistics())):
            raise StateFault(f"a pass does not reach norm {path} in training; remove it, or keep it in evaluation mode")
        if count != _NUM_GHOST_BATCHES:
            raise StateFault(
                f"a pass gives {count} ghost batches instead of {_NUM_GHOST_BATCHES} to norm {path or 'itself'}; "
                "use a separate norm in each place, and one row per sample"
            )


@torch.no_grad()
def _move_weights(model: nn.Module) -> None:
    """Change all weights by up to 1 %, as training does, so that a converged power iteration changes again."""
    for parameter in model.parameters():
        if parameter.is_floating_point() and 0 not in parameter.stride():
            parameter.mul_(1 + 0.01 * torch.rand_like(parameter))


def _check_parameters(model: nn.Module, before: SavedState) -> None:
    if names := changed(before.parameters, SavedState(model).parameters):
        raise StateFault(
            f"a pass changes the parameters {listed(names)}, which only the optimizer may change; set initial values "
            "where the network is built (data-dependent initialization), and keep averages of weights in buffers"
        )


def _changed_buffers(model: nn.Module, states: Sequence[SavedState]) -> tuple[str, ...]:
    """Return the buffers that change from states 0 to 1, 2 to 3 and so on, without those of ghost norms and caches.

    Raises:
        StateFault: a persistent buffer changes its shape.
    """
    of_norms = {id(buffer) for norm in ghost_norms(model) for buffer in norm.buffers()}
    found: list[str] = []
    for before, after in zip(states[::2], states[1::2], strict=False):
        for name in changed(before.buffers, after.buffers):
            pair = before.buffers.get(name), after.buffers.get(name)
            is_norms = any(saved is not None and id(saved.value) in of_norms for saved in pair)
            if not is_norms and not _is_cache(model, name, *map(_shape, pair)):
                found.append(name)
    return tuple(dict.fromkeys(found))


def _shape(saved: Saved | None) -> tuple[int, ...] | None:
    return tuple(saved.content.shape) if saved is not None and saved.value is not None else None


def _is_cache(model: nn.Module, name: str, before: tuple[int, ...] | None, after: tuple[int, ...] | None) -> bool:
    """Return whether a buffer changes its shape and is not persistent. Raises StateFault if it is persistent."""
    if before == after:
        return False
    path, _, own = name.rpartition(".")
    if own in model.get_submodule(path)._non_persistent_buffers_set:
        return True
    raise StateFault(f"a pass changes the shape of buffer {name} from {before} to {after}; give it its final shape")


def _changed_attributes(model: nn.Module, before: SavedState, after: SavedState) -> tuple[str, ...]:
    """Return the attributes that differ after two forwards that began with the same tensors."""
    ours = [path for path, module in model.named_modules() if isinstance(module, GhostBatchNorm | KeyedModule)]
    names = changed(before.attributes, after.attributes)
    return tuple(name for name in names if name.rpartition(".")[0] not in ours)


Slot = tuple[dict[str, Tensor | None], str]
"""The `_buffers` of a module, and a name in it. The module may replace the tensor at any time."""


def slots(model: nn.Module, names: Sequence[str]) -> list[Slot]:
    """Return the slots of the named buffers."""
    paths = [name.rpartition(".") for name in names]
    return [(model.get_submodule(path)._buffers, own) for path, _, own in paths]


@contextmanager
def restored_buffers(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Restore the named buffers at the end, such as those that an evaluation changes."""
    before = [(place, own, place[own].clone()) for place, own in slots(model, names)]  # type: ignore[union-attr]
    try:
        yield
    finally:
        for place, own, value in before:
            place[own] = value


def save_with_state_dict(model: nn.Module, names: Sequence[str]) -> None:
    """Make buffers persistent: checkpoints must contain what training changes."""
    for name in names:
        path, _, own = name.rpartition(".")
        model.get_submodule(path).register_buffer(own, model.get_buffer(name), persistent=True)
