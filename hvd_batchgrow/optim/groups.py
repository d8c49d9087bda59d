"""Divide the trainable parameters of a network into groups with their own learning rate and weight decay."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import nn

from hvd_batchgrow.config.optim import GroupSection, OptimBase
from hvd_batchgrow.messages.errors import Fault, JobError
from hvd_batchgrow.messages.wording import counted
from hvd_batchgrow.nn.name_patterns import matches, names_of_parameters, nearest


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that the optimizer treats alike, apart from their dimensions."""

    name: str
    """The pattern that matches them, and their layer, in words; for the start of a run."""
    lr_scale: float
    """Their learning rate, divided by the schedule's."""
    weight_decay: float
    decay_norm_and_bias: bool
    """Whether weight decay applies to those with fewer than two dimensions too."""
    parameters: list[nn.Parameter] = field(default_factory=list)

    def describe(self) -> str:
        """Return a line with the number of parameters, the learning rate and the weight decay."""
        number, tensors = sum(p.numel() for p in self.parameters), counted(len(self.parameters), "tensor")
        is_split = self.weight_decay and not self.decay_norm_and_bias
        some = " except for norms and biases" if is_split and any(p.ndim <= 1 for p in self.parameters) else ""
        rule = f"lr × {self.lr_scale:.4g}, weight decay {self.weight_decay:g}{some}"
        return f"{self.name}: {counted(number, 'parameter')} in {tensors}, {rule}"


def is_divided(optim: OptimBase) -> bool:
    """Return whether the job divides the parameters into groups with their own learning rate or weight decay."""
    return bool(optim.groups) or optim.layer_decay is not None


def parameter_groups(model: nn.Module, optim: OptimBase) -> list[ParameterGroup]:
    """Return the groups of the parameters that are trained, in the order of `optim.groups`; all others come last.

    With `layer_decay`, each layer has its own group. Its learning rate is multiplied by d^k, where k counts the
    layers above it: 0 for the last one. See `layer_indices`.

    Raises:
        JobError: a pattern matches no parameter that is trained, or only those of earlier patterns; or an entry
            changes nothing, and does not exempt parameters from a later entry.

    Source of the decay: ELECTRA (arXiv 2003.10555), appendix B; BEiT (arXiv 2106.08254), section 3.1.
    """
    names = names_of_parameters(model)
    layers = dict(zip(names, layer_indices([first for first, *_ in names.values()]), strict=True))
    last = max(layers.values(), default=0)
    patterns = [group.match for group in optim.groups]
    trained = {parameter: of for parameter, of in names.items() if parameter.requires_grad}
    matched = {p: [k for k, pattern in enumerate(patterns) if matches(pattern, of)] for p, of in trained.items()}
    _check(optim.groups, matched, names)
    groups: dict[tuple[int, int], ParameterGroup] = {}
    for parameter in trained:
        index = min(matched[parameter], default=len(patterns))
        layer = layers[parameter] if optim.layer_decay else last
        if (index, layer) not in groups:
            groups[index, layer] = _group(optim, index, layer, last)
        groups[index, layer].parameters.append(parameter)
    return [groups[key] for key in sorted(groups)]


def overlaps(model: nn.Module, optim: OptimBase) -> list[str]:
    """Return a line for each pair of patterns that match the same parameters, of which the first applies."""
    patterns = [group.match for group in optim.groups]
    found: Counter[tuple[str, str]] = Counter()
    for parameter, names in names_of_parameters(model).items():
        first, *others = [pattern for pattern in patterns if matches(pattern, names)] or [""]
        found.update((first, other) for other in others if parameter.requires_grad)
    return [
        f"optim.groups: {counted(number, 'tensor')} match both {first!r} and {other!r}: the first applies"
        for (first, other), number in found.items()
    ]


def layer_indices(names: Sequence[str]) -> list[int]:
    """Return the index of the layer of each parameter, from the input to the output.

    A block is a module whose name is a number and that no other block contains: an entry of `nn.Sequential` or
    `nn.ModuleList`, such as layer1.0 or blocks.11. Each block is a layer. The parameters before the first block are
    the first layer, and those after the last block the last one. Parameters between two blocks belong to the block
    before them. In a network without blocks, each child module is a layer.

    Args:
        names: of all parameters, in the order of `named_parameters`.
    """
    blocks = [_block(name) for name in names]
    if not any(blocks):
        blocks = [name.partition(".")[0] for name in names]
    last = max((place for place, block in enumerate(blocks) if block), default=-1)
    indices: list[int] = []
    index, current = 0, ""
    for place, block in enumerate(blocks):
        here = block or ("after the last block" if place > last else current)
        index += bool(indices) and here != current
        current = here
        indices.append(index)
    return indices


def _block(name: str) -> str:
    """Return the name of the outermost numbered module around a parameter; empty outside of blocks."""
    modules = name.split(".")[:-1]
    place = next((place for place, module in enumerate(modules) if module.isdecimal()), -1)
    return ".".join(modules[: place + 1])


def _group(optim: OptimBase, index: int, layer: int, last: int) -> ParameterGroup:
    section = optim.groups[index] if index < len(optim.groups) else None
    name = f"parameters that match {section.match}" if section else ("other " if optim.groups else "") + "parameters"
    decay, scale = optim.layer_decay, section.lr_scale if section else 1.0
    weight_decay, others = (section.weight_decay, section.decay_norm_and_bias) if section else (None, None)
    return ParameterGroup(
        f"{name}, layer {layer + 1} of {last + 1}" if decay else name,
        scale * decay ** (last - layer) if decay else scale,
        optim.weight_decay if weight_decay is None else weight_decay,
        optim.decay_norm_and_bias if others is None else others,
    )


def _check(
    sections: Sequence[GroupSection], matched: dict[nn.Parameter, list[int]], names: dict[nn.Parameter, list[str]]
) -> None:
    faults, patterns = [], [section.match for section in sections]
    for index, pattern in enumerate(patterns):
        if applied := [found for found in matched.values() if found[:1] == [index]]:
            if sections[index].is_plain and all(len(found) == 1 for found in applied):
                fault = f"{pattern!r} has no effect: set lr_scale, weight_decay or decay_norm_and_bias, or remove it"
                faults.append(Fault(f"optim.groups.{index}", fault))
            continue
        earlier = {patterns[found[0]] for found in matched.values() if index in found}
        all_names = [name for of in names.values() for name in of]
        if earlier:
            fault = f"matches only parameters that earlier patterns match: {', '.join(sorted(earlier))}; put it first"
        elif any(matches(pattern, of) for of in names.values()):
            fault = "matches only frozen parameters, which are not trained; remove it"
        else:
            fault = f"matches no parameter{nearest(pattern, all_names)}"
        faults.append(Fault(f"optim.groups.{index}.match", f"{pattern!r} {fault}"))
    if faults:
        raise JobError(faults)
