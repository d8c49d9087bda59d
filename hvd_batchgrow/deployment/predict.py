"""Predict classes, labels or numbers of photos and of rows of tables, through the pipeline of the run's evaluation."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from hvd_batchgrow.data.datasets.dataset import ArrayDataset, BadSample, Dataset, Datasets
from hvd_batchgrow.data.images.class_folders import is_image_name
from hvd_batchgrow.data.images.decode_rgb import UNDECODABLE, fault_text, open_image, stored_rgb
from hvd_batchgrow.data.images.encoded_dataset import EncodedDataset, read_header
from hvd_batchgrow.data.images.image_header import bad_header
from hvd_batchgrow.data.images.image_index import Entry, make_index
from hvd_batchgrow.data.pipeline.reader import Reader
from hvd_batchgrow.data.tensor_tree import form_of
from hvd_batchgrow.deployment.table_rows import read_rows
from hvd_batchgrow.deployment.trained_network import TrainedNetwork
from hvd_batchgrow.messages.errors import RunError, reason_of
from hvd_batchgrow.storage.regular_files import read_regular

OnBadFile = Callable[[Path, str], None]
"""Called with a file that cannot be used and the reason, as the end of a sentence that names it."""


@dataclass(frozen=True)
class Prediction:
    """The answer for one photo or row."""

    file: Path
    place: str
    """Location of a row in the file: `line 3`; empty for a photo."""
    values: NDArray[np.float32]
    """(outputs,) the probability of each class or label, or the predicted numbers."""

    def top(self, count: int) -> list[tuple[int, float]]:
        """Return the largest values, the first one first, each after its index."""
        order = np.argsort(-self.values, kind="stable")[:count]
        return [(int(k), float(self.values[k])) for k in order]


def predict(
    network: TrainedNetwork,
    files: Sequence[Path],
    on_bad: OnBadFile,
    on_note: Callable[[str], None] = lambda note: None,
) -> Iterator[Prediction]:
    """Return the predictions of files in their order. A file that cannot be used is reported, and the others follow.

    Args:
        network: of the run.
        files: photos, or tables of rows in csv or parquet.
        on_bad: called with each file that cannot be used.
        on_note: called with each note on a file, such as one without rows.

    Raises:
        RunError: the task has no answers that can be printed, or the inputs of the network are tokens or samples of a
            torch Dataset.
    """
    if "tokens" in {network.description.inputs.kind, network.description.task.target}:
        remedy = "evaluate it with hvd-batchgrow evaluate, or export it and generate text with your own code"
        raise RunError(f"predict reads photos and tables, and this network reads tokens; {remedy}")
    if network.description.task.answer is None:
        name = network.description.task.name
        remedy = 'a custom task says what its outputs mean by an attribute answer = "class", "labels" or "values"'
        raise RunError(f"predict does not know the meaning of the outputs of the task {name!r}; {remedy}")
    if network.description.inputs.kind == "samples":
        fault = (
            f"the inputs of this network are made by data.source = {network.job.data.source!r}, which reads no files"
        )
        raise RunError(f"{fault}; evaluate the run's test set with hvd-batchgrow evaluate, or export the network")
    return _predictions(network, files, on_bad, on_note)


def _predictions(
    network: TrainedNetwork, files: Sequence[Path], on_bad: OnBadFile, on_note: Callable[[str], None]
) -> Iterator[Prediction]:
    if network.description.inputs.kind == "rows":
        for path in files:
            yield from _of_table(network, path, on_bad, on_note)
        return
    step = network.job.evaluation.batch_size
    for start in range(0, len(files), step):
        yield from _of_photos(network, files[start : start + step], on_bad)


def _of_table(
    network: TrainedNetwork, path: Path, on_bad: OnBadFile, on_note: Callable[[str], None]
) -> Iterator[Prediction]:
    try:
        rows = read_rows(path, network.description, network.job.data, with_targets=False)
    except RunError as error:
        fault = str(error).removeprefix(str(path)).lstrip(":, ")
        is_image = path.is_file() and is_image_name(os.fsencode(path.name))
        on_bad(path, "is an image; this run reads csv and parquet files" if is_image else fault)
        return
    for note in rows.notes if len(rows.values) else [f"{path}: has no rows"]:
        on_note(note)
    samples = ArrayDataset(rows.values, rows.targets, str(path))
    for ids, inputs in evaluation_inputs(network, samples):
        for k, found in zip(ids, _answers(network, inputs), strict=True):
            yield Prediction(path, rows.places[k], found)


def _of_photos(network: TrainedNetwork, files: Sequence[Path], on_bad: OnBadFile) -> Iterator[Prediction]:
    faults: dict[int, str] = {}
    samples, numbers = (
        (encoded_photos(files, apply_orientation=network.job.data.apply_orientation), range(len(files)))
        if network.description.inputs.kind == "encoded"
        else _photos_of_one_size(files, network.description.inputs.shape, faults)
    )
    if isinstance(samples, EncodedDataset):
        faults |= {k: samples.fault(k) for k in np.flatnonzero(samples.sizes.min(axis=1) == 0).tolist()}
    results = {}
    for ids, inputs in evaluation_inputs(network, samples, lambda bad: faults.update({bad.sample_id: bad.why})):
        for k, found in zip(ids, _answers(network, inputs), strict=True):
            results[numbers[k]] = Prediction(files[numbers[k]], "", found)
    for k, path in enumerate(files):
        if k in results:
            yield results[k]
        else:
            on_bad(path, faults[k])


def evaluation_inputs(
    network: TrainedNetwork, samples: Dataset, on_bad_sample: Callable[[BadSample], None] = lambda bad: None
) -> Iterator[tuple[list[int], Tensor]]:
    """Yield ids of samples, and the network's inputs as the run's evaluation makes them.

    The torch pipeline decodes photos to the same pixels as DALI on a CPU, and needs no further package.
    """
    job, normalization = network.job, network.description.normalization
    source = Datasets(samples, samples, network.description.num_outputs, normalization.mean, normalization.std)
    data = job.data.model_copy(update={"pipeline": "torch"})
    step = job.evaluation.batch_size
    reader = Reader(data, source, network.device, torch.get_num_threads(), on_bad_sample, step)
    chunks = [range(start, min(start + step, len(samples))) for start in range(0, len(samples), step)]
    for batch in reader.testing(chunks):
        yield batch.ids.tolist(), batch.inputs


def _answers(network: TrainedNetwork, inputs: Tensor) -> NDArray[np.float32]:
    """Return probabilities of classes or labels, or predicted numbers, (n, outputs)."""
    outputs, task = network.outputs(inputs), network.description.task
    if not isinstance(outputs, Tensor):
        fault = f"predict needs a network that returns one tensor, and this one returns {form_of(outputs)}"
        raise RunError(f"{fault}; export it and predict with your own code")
    if task.answer == "class":
        outputs = outputs.softmax(1)
    elif task.answer == "labels":
        outputs = outputs.sigmoid()
    elif task.mean is not None and task.std is not None:
        outputs = outputs * outputs.new_tensor(task.std) + outputs.new_tensor(task.mean)
    return outputs.cpu().numpy()


def encoded_photos(files: Sequence[Path], *, apply_orientation: bool) -> EncodedDataset:
    """Return photos of any size as samples. One that cannot be used has a size of 0 and a `fault`."""
    entries = []
    for path in files:
        try:
            data = read_regular(path)
            header = read_header(data) if data else (*bad_header("is empty"), 0)
            length = len(data)
        except OSError as error:
            header, length = (*bad_header(f"cannot be read: {reason_of(error)}"), 0), 0
        entries.append(Entry(str(path), 0, length, 0, *header))
    return EncodedDataset(Path(), make_index(entries), apply_orientation=apply_orientation)


def _photos_of_one_size(
    files: Sequence[Path], shape: Sequence[int], faults: dict[int, str]
) -> tuple[ArrayDataset, list[int]]:
    """Return the photos of the network's size, and their numbers among the files."""
    channels, height, width = shape
    pixels, numbers = [np.zeros((0, height, width, channels), np.uint8)], []
    for k, path in enumerate(files):
        try:
            found = _pixels(path, channels)
        except RunError as error:
            faults[k] = str(error)
            continue
        if found.shape[:2] != (height, width):
            size = f"is {found.shape[0]} × {found.shape[1]} pixels"
            faults[k] = f"{size}; the network was trained on images of {height} × {width}: resize it"
            continue
        pixels.append(found[None])
        numbers.append(k)
    return ArrayDataset(np.concatenate(pixels), np.zeros(len(numbers), dtype=np.int64)), numbers


def _pixels(path: Path, channels: int) -> NDArray[np.uint8]:
    """Return the pixels of a photo, (H, W, channels); gray is ITU-R 601's luma of a color. Raises RunError."""
    if channels not in {1, 3}:
        raise RunError(
            f"cannot be used: the network was trained on images of {channels} channels, and photos have 1 or 3"
        )
    stream = BytesIO()
    try:
        stream = BytesIO(read_regular(path))
        with open_image(stream) as image:
            rgb = stored_rgb(image, stream)
    except UNDECODABLE as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise RunError(f"cannot be read: {reason_of(error)}") from None
        raise RunError(fault_text(error, stream)) from None
    if channels == 3:
        return rgb
    is_gray = bool((rgb == rgb[..., :1]).all())
    return rgb[..., :1] if is_gray else np.asarray(Image.fromarray(rgb).convert("L"))[..., None]
