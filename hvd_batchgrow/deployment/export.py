"""Export the network of a run for use without this package, with a card that describes it."""

from __future__ import annotations

import hashlib
import importlib
import io
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hvd_batchgrow.data.datasets.example import Example
from hvd_batchgrow.data.tensor_tree import Tree, form_of, map_tensors, tensors_in
from hvd_batchgrow.deployment.plain_network import to_plain
from hvd_batchgrow.deployment.trained_network import TrainedNetwork
from hvd_batchgrow.messages.errors import RunError, describe_error, unwritable
from hvd_batchgrow.messages.wording import listed
from hvd_batchgrow.nn.parameters import input_type, network_inputs
from hvd_batchgrow.nn.state.forward_state import restored_buffers
from hvd_batchgrow.results.records import NOT_METRICS
from hvd_batchgrow.storage.atomic import write_atomically
from hvd_batchgrow.storage.json_lines import scan_json_lines
from hvd_batchgrow.storage.strict_json import dump_json

Format = Literal["safetensors", "onnx", "torchscript", "exported_program", "state_dict"]
_SINGLE_TENSOR = frozenset({"onnx", "torchscript"})
_LARGEST_DIFFERENCE = 1e-4
"""Between the logits of the network and of the exported program, relative to the largest of them."""


def export(network: TrainedNetwork, to: Format, output: Path) -> tuple[Path, list[str]]:
    """Write the network's weights, or its program with the weights, and a card beside them.

    Args:
        network: from `load_network` on the CPU; its modules are replaced by torch's.
        to: the format.
        output: the file.

    Returns:
        the path of the card, and notes for the user.

    Raises:
        RunError: a package is missing, the network cannot be exported, the exported program computes other logits, or
            a file cannot be written.
    """
    if output.exists() and not output.is_file():
        raise RunError(f"--output {output} must be a regular file, because export also writes {output}.json")
    example, samples = (_samples(network, count) for count in (2, 3))
    if to in _SINGLE_TENSOR and not isinstance(example, Tensor):
        fault = f"{to} is for networks with one input tensor; the inputs of this one are {form_of(example)}"
        raise RunError(f"{fault}; export to exported_program, state_dict or safetensors")
    changing = network.forward_state.in_evaluation
    with torch.no_grad():
        with restored_buffers(network.model, changing):
            expected = network.model(samples)
        model = to_plain(network.model).requires_grad_(requires_grad=False)
        with restored_buffers(model, changing):
            _check(expected, model(samples), "the network with torch's batch norms")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        content, program = _EXPORTERS[to](model, example, expected, network)
    notes = [f"{to}: {' '.join(str(w.message).split())}" for w in caught if w.category.__name__ == "TracerWarning"]
    if program is not None:
        with torch.no_grad():
            _check(expected, program(samples), f"the exported program ({to})")
    card = output.with_name(f"{output.name}.json")
    text = dump_json(_card(network, to, output, content, example, notes), indent=2) + "\n"
    for path, data in ((output, content), (card, text.encode())):
        try:
            write_atomically(path, data)
        except OSError as error:
            raise unwritable(path, error) from None
    return card, notes


def _samples(network: TrainedNetwork, count: int) -> Tree:
    """Return inputs of the network: real samples, if it has them, otherwise random numbers."""
    if isinstance(network.form, Example):
        return network_inputs(network.form.take(count).inputs, network.model)
    return torch.rand(count, *network.form).to(input_type(network.model))


def _check(expected: Tree, found: Tree, what: str) -> None:
    """Raise RunError if outputs differ by more than rounding; those of a program may be in other containers."""
    ours, theirs = list(tensors_in(expected)), list(tensors_in(found))
    hint = "does its forward depend on the values or on the number of the samples?"
    if [tensor.shape for tensor in ours] != [tensor.shape for tensor in theirs]:
        raise RunError(f"{what} returns {form_of(found)}, and the network {form_of(expected)}: {hint}")
    for a, b in zip(ours, theirs, strict=True):
        if torch.equal(a, b):
            continue
        difference = (b.double() - a.double()).abs().max() / a.double().abs().max().clamp_min(1e-30)
        if not difference <= _LARGEST_DIFFERENCE:
            raise RunError(f"{what} computes outputs that differ by {difference:.1e} from the network's: {hint}")


# --- formats -----------------------------------------------------------------------------------

_Exported = tuple[bytes, Callable[[Tree], Tree] | None]
"""The content of the file, and the program as loaded from it; None for weights alone."""


def _state_dict(model: nn.Module, example: Tree, outputs: Tree, network: TrainedNetwork) -> _Exported:
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    return buffer.getvalue(), None


def _safetensors(model: nn.Module, example: Tree, outputs: Tree, network: TrainedNetwork) -> _Exported:
    save = _need("safetensors.torch", "safetensors").save
    state = model.state_dict()
    if others := [name for name, value in state.items() if not isinstance(value, Tensor)]:
        raise RunError(f"{others[0]} is not a tensor, which safetensors cannot hold: export to state_dict")
    # Clones: safetensors refuses tensors that share memory.
    tensors = {name: value.clone(memory_format=torch.contiguous_format) for name, value in state.items()}
    return save(tensors, metadata={"format": "pt", "classes": dump_json(network.description.classes)}), None


def _torchscript(model: nn.Module, example: Tree, outputs: Tree, network: TrainedNetwork) -> _Exported:
    """Trace the network: TorchScript's compiler accepts fewer networks."""
    buffer = io.BytesIO()
    with _exporting("torchscript"):
        # Strict tracing refuses a dict or list of outputs.
        is_strict = isinstance(outputs, Tensor)
        with restored_buffers(model, network.forward_state.in_evaluation):
            program = torch.jit.trace(model, example, check_trace=False, strict=is_strict)
        # Tracing has run the network once. A program keeps all buffers in its state, a network not all.
        program.load_state_dict(model.state_dict(), strict=False)
        torch.jit.save(program, buffer)
    buffer.seek(0)
    return buffer.getvalue(), torch.jit.load(buffer)


def _exported_program(model: nn.Module, example: Tree, outputs: Tree, network: TrainedNetwork) -> _Exported:
    buffer = io.BytesIO()
    with _exporting("exported_program"):
        torch.export.save(_program(model, example), buffer)
    buffer.seek(0)
    return buffer.getvalue(), torch.export.load(buffer).module()


def _onnx(model: nn.Module, example: Tree, outputs: Tree, network: TrainedNetwork) -> _Exported:
    for package in ("onnx", "onnxscript"):
        _need(package, "onnx onnxscript")
    names = ["logits"] if isinstance(outputs, Tensor) else [f"output_{path}" for path in _paths(outputs)]
    with _exporting("onnx"):
        program = torch.onnx.export(
            _program(model, example), input_names=["inputs"], output_names=names, dynamo=True, verbose=False
        )
    assert program is not None
    content = program.model_proto.SerializeToString()
    return content, _onnx_reference(content, names)


def _paths(outputs: Tree) -> Iterator[str]:
    """Yield the path of each tensor in a dict, list or tuple: its keys and positions, such as `aux_0`."""
    for key, part in outputs.items() if isinstance(outputs, dict) else enumerate(outputs):
        yield from [f"{key}"] if isinstance(part, Tensor) else (f"{key}_{path}" for path in _paths(part))


def _onnx_reference(content: bytes, names: Sequence[str]) -> Callable[[Tensor], list[Tensor]]:
    """Return the program as onnx's reference implementation runs it."""
    onnx, reference = _need("onnx", "onnx"), _need("onnx.reference", "onnx")
    evaluator = reference.ReferenceEvaluator(onnx.load_from_string(content))
    return lambda inputs: [torch.from_numpy(found) for found in evaluator.run([*names], {"inputs": inputs.numpy()})]


def _program(model: nn.Module, example: Tree) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch")
    shapes: Any = map_tensors(lambda tensor: {0: batch}, example)
    return torch.export.export(model, (example,), dynamic_shapes=(shapes,))


_EXPORTERS: Mapping[Format, Callable[[nn.Module, Tree, Tree, TrainedNetwork], _Exported]] = {
    "safetensors": _safetensors,
    "onnx": _onnx,
    "torchscript": _torchscript,
    "exported_program": _exported_program,
    "state_dict": _state_dict,
}


class _exporting:  # noqa: N801  # used as a function
    """Turn the errors of torch's exporters into a RunError: they may be of any kind."""

    def __init__(self, to: str) -> None:
        self._to = to

    def __enter__(self) -> None:
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, Exception):
            remedy = "try another format; state_dict and safetensors need no program"
            raise RunError(
                f"torch cannot export the network to {self._to}: {describe_error(error)}; {remedy}"
            ) from error


def _need(module: str, packages: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise RunError(
            f"{module} is needed for this format and cannot be imported ({error}): pip install {packages}"
        ) from None


# --- the card ----------------------------------------------------------------------------------


def _card(
    network: TrainedNetwork, to: Format, output: Path, content: bytes, example: Tree, notes: list[str]
) -> dict[str, Any]:
    """Return what users of the file need, as plain values. The type of several input tensors is None."""
    description = network.description.model_dump(mode="json")
    description.pop("format")
    dtype = str(example.dtype).removeprefix("torch.") if isinstance(example, Tensor) else None
    description["inputs"]["dtype"] = dtype  # the program does not convert it
    return {
        "file": output.name,
        "format": to,
        "file_sha256": hashlib.sha256(content).hexdigest(),
        "weights": "average" if network.is_average else "last",
        "weights_sha256": network.digest,
        "samples": network.checkpoint.samples,
        "metrics": _metrics(network, notes),
        **description,
    }


def _metrics(network: TrainedNetwork, notes: list[str]) -> dict[str, Any]:
    """Return the evaluations of these weights, such as `test_top1`; empty if they were not evaluated.

    Damaged lines are skipped, with a note.
    """
    samples, prefix = network.checkpoint.samples, "average_" if network.is_average else ""
    evaluation = network.checkpoint.evaluation
    if evaluation.get("samples") != samples:  # the weights may have been restored after it
        return {}
    metrics: dict[str, Any] = {}
    path, damaged, is_of_run = network.run / "metrics.jsonl", list[int](), False
    for number, line in scan_json_lines(path):
        if line is None:
            damaged.append(number)
        elif line.get("kind") == "eval" and line["samples"] == samples:
            names = [name for name in line if f"average_{name}" in line] if prefix else _result_names(line)
            metrics |= {f"{line.get('dataset', 'test')}_{name}": line[f"{prefix}{name}"] for name in names}
            loss = line.get("loss")  # None: not finite; an evaluation that a resume repeats may round in another way
            is_of_run |= loss is None or math.isclose(loss, evaluation["loss"], rel_tol=1e-4)
    if metrics and not is_of_run:
        notes.append(f"{path} has the results of another checkpoint at sample {samples:,}: the card has no metrics")
        return {}
    if damaged:
        what = f"line {damaged[0]} is" if len(damaged) == 1 else f"lines {listed(damaged)} are"
        was = "was" if len(damaged) == 1 else "were"
        notes.append(f"{path} is damaged: {what} not JSON and {was} skipped, so metrics may be missing from the card")
    return metrics


def _result_names(line: dict[str, Any]) -> list[str]:
    return [name for name in line if name not in NOT_METRICS - {"loss"} and not name.startswith("average_")]
