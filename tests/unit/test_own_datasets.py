"""Sources that are torch Datasets, and arrays whose `fetch` augments."""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import default_collate

from hvd_batchgrow.cli import main
from hvd_batchgrow.config import DataSection
from hvd_batchgrow.data.datasets.dataset import ArrayDataset, Datasets, raise_bad
from hvd_batchgrow.data.datasets.subset import resolve
from hvd_batchgrow.data.load_source import load_source
from hvd_batchgrow.data.order.stream import Stream
from hvd_batchgrow.data.pipeline.reader import GhostBatches, Reader
from hvd_batchgrow.data.samples.collate import SampleFault, collate, split_sample
from hvd_batchgrow.data.samples.load_samples import load_samples
from hvd_batchgrow.data.source_checks import check_data
from hvd_batchgrow.data.tensor_tree import bit_identical, map_tensors, take_rows
from hvd_batchgrow.job_file import parse_job
from hvd_batchgrow.messages.errors import JobError, RunError
from hvd_batchgrow.nn.build import build_model, hazards
from hvd_batchgrow.schedule.plan import compile_plan
from hvd_batchgrow.tasks.classification import Classification
from hvd_batchgrow.torchvision_shim import import_torchvision
from hvd_batchgrow.train.update.non_finite import NonFinite, describe
from tests.helpers import job_tree, no_report, small_job
from tests.own_datasets import NUM_TEST, NUM_TRAIN, Pictures, Trees, augmented, to_floats

GROUP, CPU = 8, torch.device("cpu")


def section(function: str, **keys: Any) -> DataSection:
    return DataSection(source=f"tests.own_datasets:{function}", **keys)


def loaded(function: str, seed: int = 3, **keys: Any) -> Datasets:
    return load_source(section(function, **keys), seed, no_report, any_size=True)


def read(source: Datasets, count: int, first: int = 0, seed: int = 3, data: DataSection | None = None) -> Any:
    """Ghost batches of one rank."""
    reader = Reader(data or section("x"), source, CPU, 1, raise_bad, GROUP)
    batches = reader.training(Stream(len(source.train), seed), GROUP, first, 1)
    return [next(batches) for _ in range(count)]


def values(batch: GhostBatches) -> Any:
    return {"inputs": batch.inputs, "targets": batch.targets, "ids": torch.from_numpy(batch.ids)}


# --- samples -----------------------------------------------------------------------------------


def test_a_sample_depends_on_seed_epoch_and_id_alone() -> None:
    source = loaded("pictures")
    per_epoch = NUM_TRAIN // GROUP
    whole = read(source, 2 * per_epoch)
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    again = read(source, 2, first=per_epoch + 3)  # from the middle of the second epoch
    for ours, theirs in zip(whole[per_epoch + 3 :], again, strict=False):
        assert bit_identical(values(ours), values(theirs))
    first = {int(k): image for batch in whole[:per_epoch] for k, image in zip(batch.ids, batch.inputs, strict=True)}
    second = {int(k): image for batch in whole[per_epoch:] for k, image in zip(batch.ids, batch.inputs, strict=True)}
    assert sorted(first) == sorted(second) == list(range(NUM_TRAIN))
    assert sum(torch.equal(first[k], second[k]) for k in first) < NUM_TRAIN / 10  # RandAugment may do nothing
    other = read(loaded("pictures", seed=4), per_epoch, seed=4)
    theirs = {int(k): image for batch in other for k, image in zip(batch.ids, batch.inputs, strict=True)}
    assert sum(torch.equal(first[k], theirs[k]) for k in first) < NUM_TRAIN / 10


def test_the_parts_of_a_sample_from_all_generators_are_uniform_and_not_the_same() -> None:
    batches = read(loaded("trees"), 4 * NUM_TRAIN // GROUP)
    drawn = torch.cat([batch.inputs["parts"]["pair"][0] for batch in batches])
    assert len(drawn.unique(dim=0)) == len(drawn) == 480
    for k in range(3):  # the mean of 480 uniform numbers has a standard deviation of 0.013
        assert drawn[:, k].unique().numel() == 480
        assert abs(drawn[:, k].double().mean() - 0.5) < 0.06
    assert torch.corrcoef(drawn.T).fill_diagonal_(0).abs().max() < 0.2


def numpy_state() -> list[int]:
    state: Any = np.random.get_state(legacy=False)
    return [*state["state"]["key"].tolist(), state["state"]["pos"]]


def test_reading_leaves_the_generators_and_threads_of_the_process_alone() -> None:
    source = loaded("trees")
    threads, states = torch.get_num_threads(), (random.getstate(), numpy_state())
    torch.manual_seed(5)
    expected = torch.rand(())
    torch.manual_seed(5)
    read(source, 3)
    assert (random.getstate(), numpy_state()) == states
    assert torch.equal(torch.rand(()), expected)
    assert torch.get_num_threads() == threads


def test_inputs_keep_their_form_and_are_what_torch_collates() -> None:
    batch = read(loaded("trees"), 1)[0]
    assert set(batch.inputs) == {"ids", "mask", "parts"}
    samples = [Trees(NUM_TRAIN)[int(k)] for k in batch.ids]
    assert torch.equal(batch.targets, default_collate([sample["label"] for sample in samples]))
    assert torch.equal(batch.inputs["ids"], default_collate([sample["ids"] for sample in samples]))
    assert batch.inputs["mask"].dtype == torch.bool
    assert batch.inputs["parts"]["pair"][1].tolist() == [float(k) for k in batch.ids]
    part = batch[2:5]
    assert torch.equal(part.inputs["mask"], batch.inputs["mask"][2:5])
    assert part.targets.tolist() == batch.targets[2:5].tolist()


class Windows(ArrayDataset):
    """Integers as they are, without a torch Dataset."""

    kind: Any = "samples"

    def fetch(self, ids: Any) -> Any:
        return self.values[ids]


def test_another_dataset_may_give_the_network_integers_too() -> None:
    windows = Windows(np.arange(80).reshape(16, 5), np.arange(16))
    reader = Reader(section("x"), Datasets(windows, windows, 4, (), ()), CPU, 1, raise_bad, GROUP)
    batch = next(reader.training(Stream(16, 3), GROUP, 0, 1))
    assert batch.inputs.tolist() == windows.values[batch.ids].tolist()
    assert (batch.inputs.dtype, batch.targets.tolist()) == (torch.int64, batch.ids.tolist())


def test_a_test_set_is_read_in_order_and_also_keyed() -> None:
    source = loaded("pictures")
    reader = Reader(section("x"), source, CPU, 1, raise_bad, GROUP)
    batches = list(reader.testing([range(7), range(7, 20)]))
    plain = Pictures(NUM_TEST, 6, to_floats())
    assert [batch.ids.tolist() for batch in batches] == [list(range(7)), list(range(7, 20))]
    assert torch.equal(batches[1].inputs[3], plain[10][0])
    augmented = (
        list(reader.testing([range(9)], source.train)),
        list(reader.testing([range(5), range(5, 9)], source.train)),
    )
    assert torch.equal(augmented[0][0].inputs[5:], augmented[1][1].inputs)


def test_sums_of_torch_in_a_sample_do_not_depend_on_the_number_of_threads() -> None:
    batches = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            pair = load_source(section("summed"), 3, no_report, any_size=True)
            batches.append(read(pair, 1)[0].inputs)
    finally:
        torch.set_num_threads(threads)
    assert bit_identical(*batches)


@pytest.mark.parametrize(
    ("sample", "expected"),
    [
        ((1, 2), (1, 2)),
        ([1, 2], (1, 2)),
        ((1, 2, 3), ((1, 2), 3)),
        ({"a": 1, "target": 2}, ({"a": 1}, 2)),
        ({"a": 1, "b": 2, "labels": 3}, ({"a": 1, "b": 2}, 3)),
        (({"a": 1}, {"boxes": 2}), ({"a": 1}, {"boxes": 2})),
    ],
)
def test_inputs_and_target_of_a_sample(sample: Any, expected: Any) -> None:
    assert split_sample(sample) == expected


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (torch.zeros(3), "is a Tensor; return (inputs, target), or a dict with one of the keys target, targets,"),
        ((1,), "is a tuple of 1 part; return (inputs, target)"),
        ({"a": 1}, "is a dict that has 0 keys for its target ('a'); return"),
        ({"a": 1, "label": 1, "target": 1}, "is a dict that has 2 keys for its target ('a', 'label', 'target');"),
        ({"label": 1}, "is a dict that has no inputs besides its target ('label');"),
    ],
)
def test_other_samples_are_refused(sample: Any, message: str) -> None:
    with pytest.raises(SampleFault) as caught:
        split_sample(sample)
    assert message in str(caught.value)


def test_named_tuples_and_subclasses_of_tensors_are_collated() -> None:
    from collections import namedtuple

    import_torchvision()
    tv_tensors = importlib.import_module("torchvision.tv_tensors")
    pair = namedtuple("pair", "image mask")  # as users write it
    image = tv_tensors.Image(torch.zeros(3, 2, 2, dtype=torch.uint8))
    inputs, targets = collate([(pair(image, torch.ones(2, requires_grad=True)), {"boxes": torch.zeros(2, 4)})] * 3)
    assert (type(inputs.image), inputs.image.shape, inputs.mask.requires_grad) == (torch.Tensor, (3, 3, 2, 2), False)
    assert targets["boxes"].shape == (3, 2, 4)


# --- faults ------------------------------------------------------------------------------------

_START = r"data.source = 'tests.own_datasets:broken', training set \(Broken\), "


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (
            "own generator",
            _START + r"sample 0: 6 of 6 samples, drawn twice with equally seeded generators, differ; ins",
        ),
        ("counter", _START + r"sample 0: 6 of 6 samples, .* differ"),
        ("rare", _START + r"sample 119: 1 of 6 samples, .* differ; .*global generators of random, NumPy"),
        ("no pair", _START + r"sample 0, epoch 0, is a Tensor; return \(inputs, target\)"),
        ("single", _START + r"sample 0, epoch 0, is a tuple of 1 part; return"),
        ("two labels", _START + r"sample 0, epoch 0, is a dict that has 2 keys for its target"),
        ("text", _START + r"sample 0: inputs\['name'\] is text, which cannot become a tensor; remove it"),
        ("object", _START + r"sample 0: cannot become tensors: .*found <class 'object'>"),
        (
            "shape",
            _START + r"sample 23: \[inputs, target\] are \[float32 \(5,\), int64 \(\)\]; those .* 0 are .*\(3,\)",
        ),
    ],
)
def test_faults_that_are_found_before_training(fault: str, message: str) -> None:
    with pytest.raises(RunError, match=message):
        loaded("broken", label=fault, num_classes=4)


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("raises", _START + r"sample 17, epoch 0, failed: KeyError: 'key' \(.*own_datasets.py, line \d+\)"),
        (
            "other form",
            _START + r"sample \d+ and the 7 after it: the samples of a batch differ: .*; give all samples one",
        ),
        ("class", _START + r"sample 17 has the target 4; targets must be in 0 … 3 \(data.num_classes\)"),
    ],
)
def test_a_sample_that_fails_during_training_is_named_when_it_is_reached(
    fault: str, message: str, workers: int
) -> None:
    source = loaded("broken", label=fault, num_classes=4, workers=workers)
    stream = Stream(NUM_TRAIN, 3)
    reached = int(np.flatnonzero(stream.ids(0, NUM_TRAIN) == 17)[0]) // GROUP
    try:
        read(source, reached)
        with pytest.raises(RunError, match=message):
            read(source, reached + 1)
    finally:
        source.close()


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ("iterable", "the returned object is an Endless, which can only be read in its own order."),
        (
            "generator",
            "must return a hvd_batchgrow.data.datasets.dataset.Datasets, returned generator; or map-style",
        ),
        ("mapping", "the returned object is a dict, which is not a map-style Dataset with __getitem__ and __len__"),
        ("four", "returned a tuple of 4; return map-style torch Datasets: one, (train, test) or"),
        ("half", "test is a NoneType, which is not a map-style Dataset"),
        ("empty", "train is empty"),
        ("pairs", "returned one Dataset, and no test set; return (train, test), or set data.test_fraction, such as"),
        ("unknown classes", "data.num_classes: is needed: the Dataset has neither num_classes nor classes"),
        ("unknown classes", "; set the key, also for a custom task, or an attribute num_classes or classes of the"),
    ],
)
def test_what_a_source_may_not_return(label: str, message: str) -> None:
    keys = {} if label == "unknown classes" else {"num_classes": 4}
    with pytest.raises(JobError) as caught:
        loaded("returned", label=label, **keys)
    assert message in str(caught.value)


def test_a_list_of_two_datasets_and_a_list_of_samples_are_distinguished() -> None:
    assert len(loaded("returned", label="list").test) == 8
    source = loaded("returned", label="pairs", num_classes=4, test_fraction=0.25)
    assert (len(source.train), len(source.test)) == (30, 10)


@pytest.mark.parametrize("function", ["three_sets", "returned"])
def test_a_test_fraction_beside_a_test_set_is_an_error(function: str) -> None:
    message = rf"data.test_fraction: 0.25, but data.source = '.*:{function}' returned its own test set; remove the key"
    with pytest.raises(JobError, match=message):
        loaded(function, label="list", test_fraction=0.25)


def test_the_number_of_classes_is_the_jobs_or_the_datasets() -> None:
    assert loaded("pictures").num_classes == 3
    assert loaded("pictures").schema["classes"] == ["cat", "dog", "owl"]
    assert loaded("trees").num_classes == 4
    assert loaded("tokens", num_classes=5).num_classes == 5
    with pytest.raises(JobError, match=r"data.num_classes: 2 is below the 3 of the source"):
        loaded("pictures", num_classes=2)


def test_one_dataset_is_divided_by_the_seed() -> None:
    source = loaded("one_set", test_fraction=0.25, validation_fraction=0.1)
    assert source.validation is not None
    sets = source.train, source.validation, source.test
    assert [len(part) for part in sets] == [81, 9, 30]
    ids = [resolve(part, np.arange(len(part)))[1].tolist() for part in sets]
    assert sorted(k for part in ids for k in part) == list(range(NUM_TRAIN))
    assert ids[2] == sorted(ids[2]) != list(range(90, 120))
    other = loaded("one_set", seed=4, test_fraction=0.25)
    assert resolve(other.test, np.arange(30))[1].tolist() != ids[2]
    # A sample of a part is the one of the whole set.
    reader = Reader(section("x"), source, CPU, 1, raise_bad, GROUP)
    (batch,) = reader.testing([range(4)])
    assert batch.targets.tolist() == Pictures(NUM_TRAIN, 5, augmented()).labels[ids[2][:4]].tolist()


def test_a_source_with_its_own_validation_set() -> None:
    source = loaded("three_sets")
    assert source.validation is not None
    assert [len(part) for part in (source.train, source.validation, source.test)] == [120, 30, 40]
    with pytest.raises(JobError, match=r"validation_fraction: .* has its own validation set of 30 samples; use 0"):
        loaded("three_sets", validation_fraction=0.1)


@pytest.mark.parametrize(
    ("keys", "fault"),
    [
        (
            {"mean": (0.5,)},
            r"data.mean: is for images of one size and rows and encoded images, and .* has samples of a",
        ),
        ({"hflip": True}, r"data.hflip: is for images of one size and encoded images, and .* has samples of a torch"),
        ({"on_bad_sample": "replace"}, r"data.on_bad_sample: is for encoded images, and"),
        ({"channels_last": True}, r"data.channels_last: is for images"),
    ],
)
def test_keys_that_datasets_do_not_use_are_refused(keys: dict[str, Any], fault: str) -> None:
    with pytest.raises(JobError, match=fault):
        loaded("pictures", **keys)


def test_workers_are_refused_where_they_would_be_ignored() -> None:
    (fault,) = check_data(DataSection(source="cifar10", workers=2))
    assert str(fault) == "data.workers: is for samples of a torch Dataset, and 'cifar10' has images of one size"
    with pytest.raises(JobError, match=r"data.workers: is for samples of a torch Dataset, and .* has rows"):
        loaded("arrays", label="keyed", workers=2)


# --- networks ----------------------------------------------------------------------------------


def job_of(function: str, network: str, **sections: Any) -> Any:
    data = {"source": f"tests.own_datasets:{function}", "num_samples": NUM_TRAIN, **sections.pop("data", {})}
    tree = job_tree("x", model={"name": network, **sections.pop("model", {})}, schedule={"max_batch": 48}, **sections)
    tree["data"] = data
    if ":" in network:
        del tree["model"]["channels"]
    return parse_job(tree)


def test_networks_are_tried_with_real_samples() -> None:
    from hvd_batchgrow.data.datasets.example import Example, input_form

    source = loaded("tokens", num_classes=4)
    form = input_form(source.train)
    assert isinstance(form, Example)
    assert torch.equal(form.take(10).inputs[8], form.inputs[0])
    for mixing in (False, True):
        job = job_of(
            "tokens", "tests.own_datasets:TokenNet", model={"kwargs": {"mixing": mixing}}, data={"num_classes": 4}
        )
        found = hazards(job, build_model(job, form, 4), form)
        assert (found == []) is not mixing
    with pytest.raises(
        JobError, match=r"'small_conv_net' accepts .* rows \(features,\), but the samples are int64 \(6,\)"
    ):
        build_model(job_of("tokens", "small_conv_net", data={"num_classes": 4}), form, 4)
    with pytest.raises(JobError, match=r"fails on two samples of the data \(float32 \(3, 12, 12\)\), in evaluation"):
        build_model(job, input_form(loaded("pictures").train), 3)


@pytest.mark.parametrize("network", ["trees", pytest.param("tokens", marks=pytest.mark.slow)])
def test_jobs_with_inputs_of_any_form_are_trained_evaluated_and_exported(
    network: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_job(tmp_path, network)
    monkeypatch.chdir(tmp_path)
    assert main(["train", "job.toml"]) == 0
    if network == "trees":
        for to, code in (("exported_program", 0), ("state_dict", 0), ("onnx", 1)):
            assert main(["export", "runs/own", "--to", to, "--output", f"net.{to}"]) == code
        assert (
            "onnx is for networks with one input tensor; the inputs of this one are {'ids'" in capsys.readouterr().err
        )
        program = torch.export.load("net.exported_program").module()
        inputs = read(loaded("trees"), 1)[0].inputs
        assert program(inputs).shape == (GROUP, 4)
    assert main(["evaluate", "runs/own"]) == 0
    if network == "tokens":  # without another process
        assert main(["verify", "job.toml", "--updates", "1", "--layouts", "1x2x8"]) == 0
    assert main(["predict", "runs/own", "job.toml"]) == 1
    assert "the inputs of this network are made by data.source" in capsys.readouterr().err


def write_job(folder: Path, name: str, **data: Any) -> None:
    networks = {"trees": "TreeNet", "tokens": "TokenNet"}
    model = 'name = "small_conv_net"\nchannels = [4]'
    if name in networks:
        model = f'name = "tests.own_datasets:{networks[name]}"'
    keys = "".join(f"{key} = {value!r}\n" for key, value in data.items())
    keys += "num_classes = 4\n" if name == "tokens" else ""
    (folder / "job.toml").write_text(f"""
name = "own"
[data]
source = "tests.own_datasets:{name}"
{keys}
[model]
{model}
ghost_batch = 8
[optim]
name = "sgd"
lr = 0.05
[schedule]
policy = "grow"
epochs = 2.2
boundaries_epochs = [1.0]
noise_factor = 3.0
global_batch = 16
max_batch = 48
[layout]
threads_per_rank = 1
[logging]
tensorboard = false
""")


# --- workers -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_workers_change_no_sample_and_end_when_they_are_closed() -> None:
    here, there = loaded("pictures"), loaded("pictures", workers=2)
    children = {*multiprocessing.active_children()}
    try:
        for ours, theirs in zip(read(here, 5), read(there, 5), strict=True):
            assert bit_identical(values(ours), values(theirs))
        workers = {*multiprocessing.active_children()} - children
        assert len(workers) == 2
        reader = Reader(section("x"), there, CPU, 1, raise_bad, GROUP)
        (batch,) = reader.testing([range(3)])
        assert torch.equal(batch.inputs[0], Pictures(NUM_TEST, 6, to_floats())[0][0])
    finally:
        there.close()
    deadline = time.monotonic() + 10
    while any(worker.is_alive() for worker in workers) and time.monotonic() < deadline:
        time.sleep(0.01)  # a thread of the pool may be reading its exit code
    assert not any(worker.is_alive() for worker in workers)


@pytest.mark.slow
def test_a_dataset_that_cannot_be_sent_to_workers_is_named() -> None:
    source = loaded("broken", label="lock", num_classes=4, workers=2)
    with pytest.raises(RunError, match=r"cannot be sent to the 2 processes of data.workers: TypeError: cannot pickle"):
        read(source, 1)


@pytest.mark.slow
def test_a_worker_that_ends_is_reported() -> None:
    source = loaded("broken", label="exit", num_classes=4, workers=1)
    with pytest.raises(RunError, match=r"a process of data.workers = 1 ended while it drew samples of 'tests.own_dat"):
        read(source, NUM_TRAIN // GROUP)
    source.close()


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 75), (signal.SIGKILL, -9)])
def test_no_worker_is_left_when_a_run_is_stopped(tmp_path: Path, number: int, code: int) -> None:
    write_job(tmp_path, "pictures", workers=2)
    (tmp_path / "tests").symlink_to(Path(__file__).parents[1])
    text = (tmp_path / "job.toml").read_text().replace("epochs = 2.2", "epochs = 2000.0")
    (tmp_path / "job.toml").write_text(text)
    # These tests may ignore SIGINT, as under `nohup … &`.
    command = ["env", "--default-signal=INT", sys.executable, "-m", "hvd_batchgrow.cli", "train", "job.toml"]
    # Its own session: the signal reaches all its processes, as that of a terminal or of Slurm does.
    process = subprocess.Popen(
        command, cwd=tmp_path, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    try:
        metrics = tmp_path / "runs/own/metrics.jsonl"
        deadline = time.monotonic() + 120
        while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert len(members_of(process.pid)) >= 3
        if number == signal.SIGKILL:
            process.kill()
        else:
            os.killpg(process.pid, number)
        errors = process.communicate(timeout=60)[1]
        assert process.returncode == code, errors
        deadline = time.monotonic() + 20
        while members_of(process.pid) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert members_of(process.pid) == []
        if number != signal.SIGKILL:  # a worker may report that its connection to the killed process broke
            assert "Traceback" not in errors
    finally:
        for pid in members_of(process.pid):
            os.kill(pid, signal.SIGKILL)


def members_of(session: int) -> list[int]:
    """The processes of a session that have not ended."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            state, *_, own_session = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
            if state != "Z" and int(own_session) == session:
                found.append(int(folder.name))
    return found


# --- arrays ------------------------------------------------------------------------------------


def test_fetch_of_arrays_gets_epochs_and_keyed_generators() -> None:
    source = loaded("arrays", label="keyed")
    whole = read(source, 2 * NUM_TRAIN // GROUP)
    epochs = np.repeat([0, 1], NUM_TRAIN)
    rows = torch.cat([batch.inputs for batch in whole])
    noise = rows[:, 0].double() - 10 * torch.from_numpy(epochs)
    assert len(rows[:, 0].unique()) == 2 * NUM_TRAIN
    assert ((noise > -1e-5) & (noise < 1 + 1e-5)).all()
    assert abs(noise.mean() - 0.5) < 0.08  # its standard deviation is 0.019
    again = read(source, 1, first=20)
    assert torch.equal(again[0].inputs, whole[20].inputs)
    # A part of the set keeps the noise of its samples.
    split = loaded("arrays", label="keyed", validation_fraction=0.25)
    assert split.validation is not None
    ids = resolve(split.validation, np.arange(30))[1]
    assert np.array_equal(split.validation.fetch(np.arange(30)), source.train.fetch(ids))


def test_arrays_that_draw_their_own_random_numbers_are_named() -> None:
    with pytest.raises(RunError, match=r"own_datasets:arrays', train, array, entry 0: 6 of 6 samples, drawn twice"):
        loaded("arrays", label="unseeded")


def test_trees_are_mapped_and_cut_with_their_forms() -> None:
    tree = {"a": torch.arange(6.0).view(3, 2), "b": (torch.arange(3), [torch.ones(3, 1)])}
    cut = take_rows(tree, slice(1, 3))
    assert cut["b"][0].tolist() == [1, 2]
    assert type(cut["b"]) is tuple
    assert bit_identical(map_tensors(torch.clone, tree), tree)
    nan = {"a": torch.tensor([float("nan"), 0.0])}
    assert bit_identical(nan, map_tensors(torch.clone, nan))
    assert not bit_identical(nan, {"a": torch.tensor([0.0, float("nan")])})
    assert not bit_identical({"a": torch.zeros(2)}, {"a": torch.zeros(2, dtype=torch.float64)})


# --- docs/data.md ------------------------------------------------------------------------------


def examples_of_the_page() -> list[str]:
    text = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    return re.findall(r"^```python\n(.*?)^```", text.split("## Your own data")[1], flags=re.DOTALL | re.MULTILINE)


def test_the_examples_of_the_page_are_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets, arrays, noisy = examples_of_the_page()
    for name, size in (("train", 20), ("test", 8)):
        torch.save((torch.zeros(size, 3, 32, 32, dtype=torch.uint8), torch.arange(size) % 2), tmp_path / f"{name}.pt")
    np.save(tmp_path / "photos.npy", np.random.default_rng(0).integers(0, 256, (1100, 4, 4, 3), dtype=np.uint8))
    np.save(tmp_path / "labels.npy", np.arange(1100) % 10)
    rows = "def rows(data):\n    train = Noisy(np.ones((20, 3)), np.arange(20) % 2)\n"
    rows += "    return Datasets(train, train, 2, (0.0,) * 3, (1.0,) * 3)\n"
    (tmp_path / "page_datasets.py").write_text(datasets)
    (tmp_path / "page_arrays.py").write_text(f"{arrays}\n\n{noisy}\n\n{rows}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    found = load_source(DataSection(source="page_datasets:photos"), 3, no_report, any_size=True)
    assert read(found, 1)[0].inputs.shape == (GROUP, 3, 32, 32)
    assert (len(found.train), len(found.test), found.num_classes) == (20, 8, 2)
    assert len(load_source(DataSection(source="page_arrays:photos"), 3, no_report, any_size=True).train) == 100
    source = load_source(DataSection(source="page_arrays:rows"), 3, no_report, any_size=True)
    first, *_, last = read(source, 4)
    for inputs in (first.inputs, last.inputs):
        assert 0.02 < (inputs - 1).std() < 0.3  # 0.1 of a normal distribution, from the first epoch on
    assert not torch.equal(first.inputs, last.inputs)


class Lines:
    """A Dataset with a target that is given, the same for all samples but the last."""

    def __init__(self, target: Any, last: Any) -> None:
        self.target, self.last = target, last

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> Any:
        return torch.ones(2), self.last if index == len(self) - 1 else self.target


def load_lines(target: Any, last: Any, task: Any) -> Datasets:
    lines = Lines(target, last)
    return load_samples((lines, lines), section("unused", num_classes=2), 0, task)


@pytest.mark.parametrize(
    ("target", "fault"),
    [(1.0, "must be its class, an integer"), (torch.full((3,), 1 / 3), "has 3 probabilities, of 2 classes")],
)
def test_targets_that_are_no_classes_are_refused(target: Any, fault: str) -> None:
    with pytest.raises(JobError, match=fault):
        load_lines(target, target, "class")


@pytest.mark.parametrize(
    "target",
    [
        *(np.int32(1), torch.tensor(1, dtype=torch.uint8), np.bool_(True), np.uint16(1), np.uint32(1)),
        *(torch.ones(2) / 2, torch.ones(2, dtype=torch.bfloat16) / 2),
    ],
)
def test_classes_of_any_type_and_probabilities_have_a_loss(target: Any) -> None:
    (found,) = Reader(PLAIN_DATA, load_lines(target, target, "class"), CPU, 1, raise_bad, 8).testing([range(3)])
    logits = torch.tensor([[0.0, 1.0]] * 3)
    losses = Classification(class_weights=torch.tensor([1.0, 3.0]))(logits, found.targets, training=True)
    loss, weight = losses.each.sum() / 3, losses.weights.sum() / 3  # type: ignore[union-attr]
    wanted = torch.tensor([0.5, 0.5] if np.ndim(target) else [0.0, 1.0])
    weighted = wanted * torch.tensor([1.0, 3.0])
    assert weight == weighted.sum()
    torch.testing.assert_close(loss, -(weighted * logits[0].log_softmax(0)).sum())


def test_labels_that_count_from_one_are_explained() -> None:
    reader = Reader(PLAIN_DATA, load_lines(1, 2, "class"), CPU, 1, raise_bad, 8)
    with pytest.raises(
        RunError, match=r"has the target 2; .*\(data.num_classes\); if your labels are 1 … 2, return label"
    ):
        list(reader.testing([range(12, 20)]))
    reader = Reader(PLAIN_DATA, load_lines(0, 2, "class"), CPU, 1, raise_bad, 8)
    with pytest.raises(RunError, match=r"\(data.num_classes\)$"):
        list(reader.testing([range(12, 20)]))


@pytest.mark.parametrize(
    ("target", "shown"),
    [((1.0, 1.0), r"\[1.0, 1.0\]"), ((0.0, 0.0), r"\[0.0, 0.0\]"), ((1.5, -0.5), r"\[1.5, -0.5\]"), ((0.2, 0.5), "")],
)
def test_floats_that_are_no_probabilities_are_refused(target: tuple[float, float], shown: str) -> None:
    good = torch.tensor([0.3, 0.7])
    reader = Reader(PLAIN_DATA, load_lines(good, torch.tensor(target), "class"), CPU, 1, raise_bad, 8)
    fault = rf"sample 19 has the target {shown}.*; for classification, probabilities .*task.name = 'multi_label' or"
    with pytest.raises(RunError, match=fault):
        list(reader.testing([range(12, 20)]))
    reader = Reader(PLAIN_DATA, load_lines(good, torch.tensor(target), "values"), CPU, 1, raise_bad, 8)
    assert len(list(reader.testing([range(12, 20)]))) == 1


def test_counts_of_a_custom_task_are_no_classes() -> None:
    reader = Reader(PLAIN_DATA, load_lines(0, 7, None), CPU, 1, raise_bad, 8)  # there are 2 classes
    (found,) = reader.testing([range(12, 20)])
    assert found.targets.tolist() == [0] * 7 + [7]


@pytest.mark.parametrize(
    ("attributes", "wanted"),
    [
        ({"num_classes": np.int64(3)}, (3, None)),
        ({"num_classes": torch.tensor(3)}, (3, None)),
        ({"classes": np.array(["a", "b", "c"])}, (3, ["a", "b", "c"])),
        ({"classes": (name for name in "abc")}, (3, ["a", "b", "c"])),
    ],
)
def test_numbers_and_names_of_classes_may_have_any_type(attributes: dict[str, Any], wanted: Any) -> None:
    lines = Lines(1, 1)
    lines.__dict__ |= attributes
    source = load_samples((lines, lines), section("unused"), 0, "class")
    assert (source.num_classes, source.schema.get("classes")) == wanted


class WithNan(Lines):
    """Sample 17 has a NaN."""

    def __getitem__(self, index: int) -> Any:
        return torch.tensor([1.0, torch.nan if index == 17 else 2.0]), self.target


def test_the_sample_whose_nan_made_a_loss_nan_is_named() -> None:
    plan = compile_plan(small_job(), 1, 300)  # for its learning rate and ghost batch
    stream, group = Stream(20, 7), plan.ghost_batch
    found = stream.ids(0, 20).tolist().index(17) // group
    source = load_samples((WithNan(1, 1),) * 2, section("unused", num_classes=2), 0, "class")
    for slots in ((found,), tuple(range(found + 1))):
        text = describe(NonFinite(slots), plan, stream, 0, source.train)
        assert re.search(r"\n  the input of .*sample 17 has a NaN: correct the data$", text)
        assert "warm-up" not in text
    ids = stream.ids(8, 16).tolist()
    text = describe(NonFinite((1,)), plan, stream, 0, load_lines(1, 1, "class").train)
    assert f"in the micro-batch of the ghost batch with samples 8 … 15, ids {ids}\n" in text
    assert text.endswith("a lower learning rate or a warm-up may prevent them")


def test_a_token_outside_of_the_vocabulary_is_named() -> None:
    good, bad = torch.tensor([0, 1, -100]), torch.tensor([0, 2, -100])
    source = load_lines(good, bad, "tokens")
    reader = Reader(PLAIN_DATA, source, CPU, 1, raise_bad, 8)
    assert len(list(reader.testing([range(19)]))) == 1
    with pytest.raises(RunError, match=r"sample 19 has the target 2; targets must be in 0 … 1 .*, or -100"):
        list(reader.testing([range(12, 20)]))


PLAIN_DATA = section("unused")
