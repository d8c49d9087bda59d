"""The source `tokens`: a text as files of token ids."""

from __future__ import annotations

from collections.abc import Iterator

from hvd_batchgrow.config import DataSection
from hvd_batchgrow.config.source_specs import FILE_KEYS, SOURCES, SourceSpec, load_of
from hvd_batchgrow.messages.errors import Fault, JobError, RunError


def _num_samples(data: DataSection) -> int | None:
    """Return the number of windows of the training file, from its size; None: the file is missing or not valid."""
    if data.context is None:
        return None
    from hvd_batchgrow.data.tokens.token_files import find_file, num_windows, open_tokens  # they import NumPy

    try:
        tokens = open_tokens(find_file(data, "train"), data.token_dtype)
    except (JobError, RunError, OSError, ValueError):  # ValueError: a NUL in the path
        return None
    return num_windows(len(tokens), data.context) if len(tokens) > 1 else None


def _faults(data: DataSection) -> Iterator[Fault]:
    if data.context is None:
        fault = "is needed: tokens of one sample, such as 256; the network must accept sequences of this length"
        yield Fault("data.context", fault)
    if data.num_classes is None:
        fault = "is needed: the size of the vocabulary, such as 256 for bytes or 50257 for the tokens of GPT-2"
        yield Fault("data.num_classes", fault)
    if data.class_names is not None:
        yield Fault("data.class_names", "names classes, and tokens are numbers; remove the key")


SOURCES.register(
    SourceSpec(
        name="tokens",
        doc="`train.bin` and `test.bin`, flat files of integers, or `.npy` (T,); cut into windows ([text](#text))",
        kinds=("tokens",),
        keys=FILE_KEYS | {"context", "token_dtype"},
        load=load_of("hvd_batchgrow.data.tokens.load_tokens"),
        num_samples=_num_samples,
        target="tokens",
        faults=_faults,
    )
)
