"""The source `tokens`: windows of a text, each token a target once, from files written by NumPy alone."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from hvd_batchgrow.config import DataSection, Job
from hvd_batchgrow.data.count_samples import with_counted_samples
from hvd_batchgrow.data.datasets.dataset import ArrayDataset, Datasets
from hvd_batchgrow.data.datasets.example import Example, source_form
from hvd_batchgrow.data.load_source import load_source
from hvd_batchgrow.data.order.stream import Stream
from hvd_batchgrow.data.own_source import check_own
from hvd_batchgrow.data.pipeline.reader import Reader
from hvd_batchgrow.data.source_checks import known_num_samples
from hvd_batchgrow.data.tokens.token_windows import TokenWindows
from hvd_batchgrow.job_file import parse_job
from hvd_batchgrow.messages.errors import JobError, RunError
from hvd_batchgrow.schedule.plan import compile_plan
from tests.helpers import job_tree, no_report

VOCABULARY, CONTEXT = 300, 8
BYTES = {"token_dtype": "uint8"}
HERE = "tests.unit.test_token_source"

pytestmark = pytest.mark.usefixtures("cache")


def text(num_tokens: int, seed: int = 0) -> NDArray[np.int64]:
    return np.random.default_rng(seed).integers(1, VOCABULARY, num_tokens)


def write(root: Path, train: NDArray[Any], dtype: str = "uint16", test: NDArray[Any] | None = None) -> None:
    train.astype(f"<{np.dtype(dtype).str[1:]}").tofile(root / "train.bin")
    (text(20, 1) if test is None else test).astype(dtype).tofile(root / "test.bin")


def section(root: Path, **keys: Any) -> DataSection:
    given: dict[str, Any] = {"context": CONTEXT, "num_classes": VOCABULARY, "token_dtype": "uint16"} | keys
    return DataSection(source="tokens", root=str(root), **given)


def load(root: Path, **keys: Any) -> Datasets:
    return load_source(section(root, **keys), 7, no_report, "tokens")


def token_job(root: Path | str = "data", **sections: Any) -> Job:
    """A job on 160 windows, in ghost batches of one window, with an adaptive optimizer."""
    tree = job_tree(root, **{"task": {"name": "language_model"}, "optim": {"name": "adamw", "weight_decay": 0.0}})
    tree["data"] = {"source": "tokens", "root": str(root), "token_dtype": "uint16", "context": CONTEXT}
    tree["data"] |= {"num_classes": VOCABULARY, **sections.pop("data", {})}
    tree["model"] = {"name": f"{HERE}:unused", "ghost_batch": 1, **sections.pop("model", {})}
    tree["schedule"] = {"policy": "seesaw", "epochs": 3.0, "boundaries_epochs": [1.0, 2.0], "noise_factor": 2.0}
    tree["schedule"] |= {"global_batch": 4, "max_batch": 16}
    tree["schedule"] = sections.pop("whole_schedule", tree["schedule"])
    return parse_job({**tree, **sections})


# --- windows -----------------------------------------------------------------------------------


@pytest.mark.parametrize("num_tokens", [9, 10, 16, 17, 18, 1203])
@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_each_token_but_the_first_is_a_target_once_after_the_token_before_it(
    tmp_path: Path, num_tokens: int, dtype: str
) -> None:
    tokens = text(num_tokens)
    write(tmp_path, tokens, dtype)
    data = section(tmp_path, token_dtype=dtype)
    train = load(tmp_path, token_dtype=dtype).train
    assert len(train) == known_num_samples(data)
    ids = np.arange(len(train))[::-1]
    inputs, targets = train.fetch(ids)[::-1], train.targets[ids][::-1]
    assert inputs.dtype == targets.dtype == np.int64
    assert inputs.shape == targets.shape == (len(train), CONTEXT)
    counts = targets.reshape(-1) != -100
    assert targets.reshape(-1)[counts].tolist() == tokens[1:].tolist()
    assert inputs.reshape(-1)[counts].tolist() == tokens[:-1].tolist()
    assert counts.sum() == num_tokens - 1
    assert counts.argmin() in {0, num_tokens - 1}  # what does not count is at the end only
    assert len(train) * CONTEXT - counts.sum() < CONTEXT


def test_a_last_window_that_is_not_full_is_noted(tmp_path: Path) -> None:
    write(tmp_path, text(1 + 3 * CONTEXT), test=text(1 + 2 * CONTEXT + 3))
    (note,) = load(tmp_path).notes
    assert note.endswith(
        "test.bin: 20 tokens in 3 windows of 8; the last one has 3 targets, and the rest of it does not count"
    )


@pytest.mark.parametrize("num_tokens", [2, 5, 8])
def test_a_text_shorter_than_a_window_is_padded(tmp_path: Path, num_tokens: int) -> None:
    tokens = text(num_tokens)
    write(tmp_path, tokens)
    train = load(tmp_path).train
    padding = 8 - (num_tokens - 1)
    assert len(train) == 1
    assert train.targets[np.array([0])].tolist() == [[*tokens[1:], *[-100] * padding]]
    inputs = train.fetch(np.array([0]))[0].tolist()
    assert inputs[:num_tokens] == tokens.tolist()
    assert not any(inputs[num_tokens:])


def test_an_epoch_has_each_token_once_in_the_keyed_order(tmp_path: Path) -> None:
    tokens = text(1203)
    write(tmp_path, tokens)
    source = load(tmp_path)
    num_samples, device = len(source.train), torch.device("cpu")
    reader = Reader(section(tmp_path), source, device, 1, lambda bad: None, 64)
    batches = [reader.training(Stream(num_samples, 7), 1, first, 3) for first in range(3)]
    seen: list[int] = []
    for k in range(num_samples):
        batch = next(batches[k % 3])
        (sample,) = Stream(num_samples, 7).ids(k, k + 1).tolist()
        part = tokens[sample * CONTEXT : (sample + 1) * CONTEXT]
        assert batch.inputs[0, : len(part)].tolist() == part.tolist()
        assert batch.inputs.dtype == batch.targets.dtype == torch.int64
        seen += [sample * CONTEXT + 1 + j for j in np.flatnonzero(batch.targets[0].numpy() != -100)]
    assert sorted(seen) == list(range(1, 1203))


def test_billions_of_windows_are_addressed_without_reading_them(tmp_path: Path) -> None:
    path, num_tokens = tmp_path / "huge.bin", 3 * 2**31 + 5
    with path.open("wb") as file:
        file.truncate(num_tokens)
        file.seek(num_tokens - 4)
        file.write(bytes([1, 2, 3, 4]))
    windows = TokenWindows(np.memmap(path, np.uint8, mode="r"), 2)
    assert len(windows) == 3 * 2**30 + 2
    last = np.array([len(windows) - 2, len(windows) - 1])
    assert windows.fetch(last).tolist() == [[0, 1], [2, 3]]
    assert windows.targets[last].tolist() == [[1, 2], [3, 4]]


def test_validation_windows_are_held_out_of_training(tmp_path: Path) -> None:
    tokens = text(1 + 40 * CONTEXT)
    write(tmp_path, tokens)
    source = load(tmp_path, validation_fraction=0.1)
    assert source.validation is not None
    assert (len(source.train), len(source.validation)) == (36, 4)
    targets = [part.targets[np.arange(len(part))].reshape(-1).tolist() for part in (source.train, source.validation)]
    assert sorted(targets[0] + targets[1]) == sorted(tokens[1:].tolist())


# --- files -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["uint8", "uint16", ">u2", "uint32", "int32", "int64"])
def test_a_npy_file_says_its_type_itself(tmp_path: Path, dtype: str) -> None:
    tokens = text(100) % 200
    np.save(tmp_path / "train.npy", tokens.astype(dtype))
    np.save(tmp_path / "test.npy", tokens[:20].astype(dtype))
    train = load(tmp_path, token_dtype=None).train
    assert train.targets[np.arange(12)].tolist() == tokens[1:97].reshape(12, CONTEXT).tolist()


def test_bytes_of_any_file_are_tokens(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("Nature does not hurry. Größe")
    (tmp_path / "other.txt").write_text("Yet everything is accomplished.")
    train = load(tmp_path, train="book.txt", test="other.txt", num_classes=256, **BYTES).train
    assert bytes(train.fetch(np.arange(2)).reshape(-1).astype(np.uint8)) == b"Nature does not "
    assert train.locate(1) == f"{tmp_path / 'book.txt'}, tokens 8 … 15"


@pytest.mark.parametrize(
    ("tokens", "dtype", "vocabulary"),
    [
        (np.arange(1, 5001), "uint32", 5001),
        (text(5000) % 256, "uint8", 257),
        (np.frombuffer(b"Nature does not hurry. " * 50, np.uint8), "uint8", 50257),
        (np.random.default_rng(0).integers(0, 1 << 16, 5000), "uint16", 100277),
        (np.random.default_rng(0).integers(0, 100277, 5000), "uint32", 100277),
    ],
)
def test_a_file_of_its_type_is_read_whatever_the_vocabulary(
    tmp_path: Path, tokens: NDArray[Any], dtype: str, vocabulary: int
) -> None:
    write(tmp_path, tokens, dtype, test=tokens[:999])
    train = load(tmp_path, token_dtype=dtype, num_classes=vocabulary).train
    assert train.targets[np.arange(3)].reshape(-1).tolist() == tokens[1:25].tolist()


def spoilt(root: Path, name: str, content: bytes) -> None:
    (root / name).write_bytes(content)


@pytest.mark.parametrize(
    ("spoil", "keys", "message"),
    [
        (lambda root: (root / "train.bin").unlink(), {}, "holds neither train.bin nor train.npy: numpy.array(ids"),
        (lambda root: None, {"train": "trian.bin"}, "data.train = 'trian.bin': {root}/trian.bin does not exist"),
        (lambda root: spoilt(root, "train.bin", b""), {}, "train.bin is empty"),
        (lambda root: spoilt(root, "train.bin", b"abc"), {}, "train.bin has 3 bytes, which is not a multiple of the 2"),
        (lambda root: write(root, text(1)), {},
         "train.bin has 1 token; it needs 2, since the first one is not a target"),
        (lambda root: None, {"test": "train.bin"}, "1 file in the training set and in the test set: {root}/train.bin"),
        (lambda root: np.save(root / "train.npy", text(9)), {}, "contains both train.bin and train.npy: remove one"),
        (lambda root: np.save(root / "a.npy", text(9).reshape(3, 3)), {"train": "a.npy", "token_dtype": None},
         "a.npy is int64 (3, 3); tokens must be (T,) of uint8, uint16"),
        (lambda root: np.save(root / "a.npy", text(9) / 2), {"train": "a.npy", "token_dtype": None},
         "a.npy is float64 (9,); tokens must be"),
        (lambda root: write(root, np.array([5] * 20 + [300, 7, 301, 299])), {},
         "train.bin: 2 of 24 tokens are not in 0 … 299: token 20 is 300, token 22 is 301; set data.num_classes to the "
         "size of the vocabulary, at least 302"),
        (lambda root: np.save(root / "a.npy", np.array([3] * 12 + [-1])), {"train": "a.npy", "token_dtype": None},
         "a.npy: 1 of 13 tokens are not in 0 … 299: token 12 is -1"),
        (lambda root: write(root, text(20), test=np.array([1, 999] * 9)), {}, "test.bin: 9 of 18 tokens are not in"),
        (lambda root: write(root, text(40)), {"token_dtype": "uint32"},
         "if the file holds uint16, set data.token_dtype = 'uint16'"),
        (lambda root: write(root, np.full(40, 98), "uint8"), {"num_classes": 256},
         "token 4 is 25186; if the file holds uint8, set data.token_dtype = 'uint8'; if not, set data.num_classes to "
         "the size of the vocabulary, at least 25187"),
        (lambda root: write(root, text(40), "uint32"), {},
         "train.bin: every second uint16 is 0, as in a file of uint32; set data.token_dtype = 'uint32'; if it is "
         "int64, numpy's default, save it as uint32: numpy.array(ids"),
        (lambda root: write(root, text(40), "int64"), {},
         "train.bin: every second uint16 is 0, as in a file of uint32"),
        (lambda root: write(root, text(40), "int64"), {"token_dtype": "uint32"},
         "train.bin: every second uint32 is 0, as in a file of int64; if it is int64, numpy's default, save it as"),
        (lambda root: write(root, 655 * text(200), "uint32"), {"num_classes": 200_000},
         "train.bin: every second uint16 is at most 3, as in a file of uint32; set data.token_dtype = 'uint32'"),
        (lambda root: write(root, text(200)), BYTES,
         "train.bin: every second uint8 is at most 1, as in a file of uint16; set data.token_dtype = 'uint16'"),
        (lambda root: None, {"num_samples": 7}, "data.num_samples = 7, but 5 training samples were found"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_used_is_an_error(
    tmp_path: Path, spoil: Callable[[Path], None], keys: dict[str, Any], message: str
) -> None:
    write(tmp_path, text(40))
    spoil(tmp_path)
    with pytest.raises((RunError, JobError), match=re.escape(message.format(root=tmp_path))):
        load(tmp_path, **keys)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"context": None}, "data.context: is needed: tokens of one sample"),
        ({"class_names": ["a"]}, "data.class_names: names classes, and tokens are numbers; remove the key"),
        ({"num_classes": None}, "data.num_classes: is needed: the size of the vocabulary, such as 256 for bytes"),
        ({"token_dtype": None}, "data.token_dtype: is needed: train.bin does not say its type"),
        (
            {"mean": (0.5,)},
            "data.mean: is for images of one size and rows and encoded images, and 'tokens' has windows of",
        ),
        ({"hflip": True}, "data.hflip: is for images of one size"),
        ({"workers": 2}, "data.workers: is for samples of a torch Dataset"),
        ({"label": "x"}, "data.label: is not used by the source 'tokens'"),
        ({"pipeline": "dali"}, "'dali' reads images, and these are windows of tokens"),
    ],
)
def test_a_key_that_is_missing_or_not_used_is_an_error(tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    write(tmp_path, text(40))

    def read() -> None:
        source = load(tmp_path, **keys)
        reader = Reader(section(tmp_path, **keys), source, torch.device("cpu"), 1, lambda bad: None, 64)
        next(reader.testing([range(2)]))

    with pytest.raises(JobError, match=re.escape(message)):
        read()


@pytest.mark.parametrize("key", ["context", "token_dtype"])
def test_its_keys_are_for_no_other_source(key: str) -> None:
    with pytest.raises(JobError, match=f"data.{key}: is not used by the source 'idx', but by tokens"):
        parse_job(job_tree(data={key: {"context": 8, "token_dtype": "uint8"}[key]}))


def test_the_type_of_a_npy_file_is_not_stated_twice(tmp_path: Path) -> None:
    for part in ("train", "test"):
        np.save(tmp_path / f"{part}.npy", text(40).astype(np.uint32))
    with pytest.raises(JobError, match=r"data.token_dtype: 'uint16', and train.npy says uint32; remove the key"):
        load(tmp_path)


# --- jobs --------------------------------------------------------------------------------------


def test_a_plan_needs_the_size_of_the_file_only(tmp_path: Path) -> None:
    with (tmp_path / "train.bin").open("wb") as file:
        file.truncate(2 * (1 + 160 * CONTEXT))
    assert known_num_samples(token_job(tmp_path).data) == 160
    with pytest.raises(RunError, match=r"holds neither test.bin nor test.npy"):
        load(tmp_path)
    (tmp_path / "train.bin").unlink()
    with pytest.raises(JobError, match=r"data.num_samples: is needed"):
        known_num_samples(token_job(tmp_path).data)
    with pytest.raises(RunError, match=r"holds neither train.bin nor train.npy"):
        with_counted_samples(token_job(tmp_path), no_report)
    assert known_num_samples(token_job(tmp_path, data={"num_samples": 99}).data) == 99


def test_networks_of_this_package_do_not_read_tokens() -> None:
    with pytest.raises(
        JobError, match=r"model.name: 'dense7' accepts images or rows, but 'tokens' has windows of tokens"
    ):
        token_job(model={"name": "dense7", "ghost_batch": 8})


def test_a_task_that_needs_classes_is_not_for_tokens() -> None:
    with pytest.raises(JobError, match=r"data.source: 'tokens' has tokens, and the task needs a class per sample"):
        token_job(task={"name": "classification"})


def test_the_tokens_of_a_step_are_those_of_a_window() -> None:
    steps = {"policy": "steps", "epochs": 3.0, "batch_steps": "0:4 800:8", "batch_steps_unit": "tokens"}
    message = r"schedule.sequence_length: 16, but a sample has data.context = 8 tokens; use 8"
    with pytest.raises(JobError, match=message):
        compile_plan(token_job(whole_schedule={**steps, "sequence_length": 16}), 1, 160)
    phases = compile_plan(token_job(whole_schedule={**steps, "sequence_length": 8}), 1, 160).schedule.phases
    assert [(phase.start_samples, phase.global_batch) for phase in phases] == [(0, 4), (100, 8)]


# --- custom sources ----------------------------------------------------------------------------


def own(tokens: NDArray[Any], num_classes: int = VOCABULARY) -> Datasets:
    windows = TokenWindows(tokens, CONTEXT)
    return Datasets(windows, windows, num_classes, (), ())


def test_a_custom_source_may_return_windows() -> None:
    assert check_own(own(text(40)), target="tokens") == []
    floats = ArrayDataset(np.zeros((4, 8), np.float32), np.zeros(4, np.int64))
    mixed = Datasets(TokenWindows(text(40), CONTEXT), floats, VOCABULARY, (), ())
    assert any("train and test must have the same kind" in fault for fault in check_own(mixed, target=None))
    with pytest.raises(
        RunError,
        match=r"^1 targets are not in 0 … 199, or -100 where .*: data.source, train, sample 12, token 3 is 200",
    ):
        check_own(own(np.array([*range(100), 200, *range(100)]), 200), target="tokens")


def test_trial_samples_are_random_tokens_of_the_whole_vocabulary_or_those_of_the_set() -> None:
    source = own(text(1000))
    form = source_form(source, "tokens")
    assert isinstance(form, Example)
    assert form.inputs.shape == (8, CONTEXT)
    assert int(form.inputs.max()) == VOCABULARY - 1
    assert torch.equal(form.inputs, source_form(source, "tokens").inputs)  # type: ignore[union-attr]
    real = source_form(source, None)
    assert isinstance(real, Example)
    assert real.inputs.reshape(-1).tolist() == source.train.fetch(np.arange(8)).reshape(-1).tolist()
