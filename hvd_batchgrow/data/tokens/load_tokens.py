"""Load files of tokens, and check that all tokens are in the vocabulary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvd_batchgrow.config import DataSection
from hvd_batchgrow.config.source_specs import ReportProgress
from hvd_batchgrow.data.datasets.cache import Arrays, cached_arrays, file_stamp
from hvd_batchgrow.data.datasets.dataset import Datasets
from hvd_batchgrow.data.datasets.normalization import chunks_of
from hvd_batchgrow.data.datasets.section_values import refuse_shared
from hvd_batchgrow.data.tokens.token_files import find_file, open_tokens
from hvd_batchgrow.data.tokens.token_windows import TokenWindows
from hvd_batchgrow.messages.errors import RunError
from hvd_batchgrow.messages.wording import counted

_WIDER = {"uint8": "uint16", "uint16": "uint32"}
_IF_INT64 = "if it is int64, numpy's default, save it as uint32: numpy.array(ids, numpy.uint32).tofile(…)"


def load(data: DataSection, seed: int, report: ReportProgress) -> Datasets:
    """Load the source `tokens`: a file of tokens for training and one for testing, as windows of `data.context`.

    The files are mapped. Their least and largest token are computed once and cached until a file changes.

    Raises:
        JobError: the job has no root, or the type of the tokens is missing or wrong.
        RunError: a file is missing, damaged, shorter than 2 tokens or in both sets, or a token is outside the
            vocabulary.
    """
    assert data.context  # as `SourceSpec.faults` requires
    assert data.num_classes
    paths = [find_file(data, part) for part in ("train", "test")]
    refuse_shared(paths[:1], paths[1:])
    train, test = (_windows(data, path, data.context, data.num_classes, report) for path in paths)
    notes = tuple(note for windows in (train, test) if (note := _note(windows)))
    return Datasets(train, test, data.num_classes, (), (), notes)


def _windows(data: DataSection, path: Path, context: int, vocabulary: int, report: ReportProgress) -> TokenWindows:
    tokens = open_tokens(path, data.token_dtype)
    if len(tokens) <= 1:
        raise RunError(f"{path} has {counted(len(tokens), 'token')}; it needs 2, since the first one is not a target")
    stamp = [file_stamp(path), str(tokens.dtype)]
    summary = cached_arrays("tokens", str(path.resolve()), stamp, lambda: _summary(tokens, path, report))["summary"]
    low, high, even, odd = summary.tolist()
    if fault := _wider_fault(data.token_dtype, vocabulary, even, odd):
        raise RunError(f"{path}: {fault}")
    if low < 0 or high >= vocabulary:
        raise RunError(_range_fault(tokens, path, vocabulary, high, data.token_dtype))
    return TokenWindows(tokens, context, str(path))


def _summary(tokens: NDArray[Any], path: Path, report: ReportProgress) -> Arrays:
    """Return the least and the largest token, and the largest one at an even and at an odd position, from 0."""
    low, start = int(tokens[0]), 0
    highest = [int(tokens[0]), int(tokens[1])]
    for chunk in chunks_of(tokens, f"reading {path.name}", report):
        low = min(low, int(chunk.min()))
        for first in range(min(2, len(chunk))):
            at = (start + first) % 2
            highest[at] = max(highest[at], int(chunk[first::2].max()))
        start += len(chunk)
    return {"summary": np.array([low, max(highest), *highest], dtype=np.int64)}


def _wider_fault(token_dtype: str | None, vocabulary: int, even: int, odd: int) -> str:
    """Return the fault of a flat file that seems to have a type of twice the bits or more; otherwise an empty text.

    Read as b bits, the upper half of a wider token is at an odd position, and is at most ⌊(C - 1) / 2^b⌋.

    Args:
        token_dtype: `data.token_dtype`; None: the file says its type.
        vocabulary: C.
        even: the largest token at an even position, from 0.
        odd: the largest token at an odd position.
    """
    if token_dtype is None:
        return ""
    upper = (vocabulary - 1) >> 8 * np.dtype(token_dtype).itemsize
    if not odd <= upper < even:
        return ""
    fault = f"every second {token_dtype} is {f'at most {upper}' if upper else 0}, as in a file of "
    wider = _WIDER.get(token_dtype)
    if wider is None:
        return f"{fault}int64; {_IF_INT64}"
    return f"{fault}{wider}; set data.token_dtype = {wider!r}" + (f"; {_IF_INT64}" if wider == "uint32" else "")


def _range_fault(tokens: NDArray[Any], path: Path, vocabulary: int, high: int, token_dtype: str | None) -> str:
    """Return the first tokens at fault and their number."""
    shown: list[str] = []
    count = start = 0
    for chunk in chunks_of(tokens, "", lambda *_: None):
        wrong = np.flatnonzero((chunk < 0) | (chunk >= vocabulary))
        count += len(wrong)
        shown += [f"token {start + k} is {chunk[k]}" for k in wrong[: 5 - len(shown)].tolist()]
        start += len(chunk)
    fault = f"{path}: {count} of {len(tokens)} tokens are not in 0 … {vocabulary - 1}: {', '.join(shown)}"
    narrower = "uint16" if high >= 1 << 16 and token_dtype == _WIDER["uint16"] else ""
    if vocabulary <= 1 << 8 and token_dtype in _WIDER.values():
        narrower = "uint8"
    hint = f"if the file holds {narrower}, set data.token_dtype = {narrower!r}; if not, " if narrower else ""
    return f"{fault}; {hint}set data.num_classes to the size of the vocabulary, at least {high + 1}"


def _note(windows: TokenWindows) -> str | None:
    """Return a note on a last window that is not full."""
    num_tokens, context = len(windows.tokens), windows.context
    rest = (num_tokens - 1) % context
    if not rest:
        return None
    shape = f"{num_tokens:,} tokens in {len(windows):,} windows of {context}"
    return f"{windows.name}: {shape}; the last one has {rest} targets, and the rest of it does not count"
